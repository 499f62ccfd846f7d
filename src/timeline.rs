//! Where a token's time goes: bytes, the least time that they take, and the time of every part.
//!
//! A token is taken twice by the backend's recorder, inside a graph where it has them: operation by operation, and
//! with all layers as one. Where layers are one launch, its own stamps tell the parts apart. What takes times slows a
//! token a little; whole tokens are measured apart from this.

#[cfg(feature = "cli")]
mod plot;

use anyhow::{Result, ensure};

use crate::backend::DecodeBackend;
use crate::backend::record::{Bandwidths, Launch, Recorder, median};
use crate::config::{LayerConfig, LayerNorm, Op, Projection};
use crate::model::{Compensation, Model, Operation, State};
use crate::sampling::Sampling;
use crate::weights::ModelWeights;

#[cfg(feature = "cli")]
pub use plot::draw;

/// Tokens that a text needs room for beyond its context.
pub const ROOM: usize = 16;

/// Times of one token are medians over so many.
const ROUNDS: usize = 5;

/// One part of a token, all layers together.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// `embed`, `qkv`, `attend`, …
    pub name: &'static str,
    /// How often a token has it.
    pub count: usize,
    /// Bytes read from device memory: weights, keys and values (as 16-bit numbers).
    pub bytes: usize,
    /// Bytes of residuals read over the host link.
    pub host_bytes: usize,
    /// The least time that these take, µs; the two kinds at once.
    pub floor_us: f64,
    /// Operation by operation, µs.
    pub us: f64,
    /// Inside the one launch of all layers, or beside it, µs.
    pub fused_us: Option<f64>,
}

/// A token, part by part.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// What took the times.
    pub clock: String,
    /// What the floors are counted with, bytes per second.
    pub bandwidths: Bandwidths,
    /// They were measured by plain reads; otherwise the fastest part stands for them.
    pub measured: bool,
    /// In the order of a token.
    pub parts: Vec<Part>,
    /// All layers, fused as far as the backend does, µs.
    pub layers_us: f64,
}

impl Timeline {
    /// The least time of a token, µs.
    pub fn floor_us(&self) -> f64 {
        self.parts.iter().map(|part| part.floor_us).sum()
    }

    /// A token operation by operation, µs.
    pub fn us(&self) -> f64 {
        self.parts.iter().map(|part| part.us).sum()
    }
}

/// Names of parts, in the order of a token.
const PARTS: [&str; 9] = ["embed", "qkv", "attend", "o", "gu", "d", "advance", "head", "sample"];

fn part(operation: Operation) -> usize {
    match operation {
        Operation::Embed => 0,
        Operation::Layer(_, Op::Project { projection, .. }) => of_projection(projection),
        Operation::Layer(_, Op::NormQk(_) | Op::Attend) => 2,
        Operation::Layer(_, Op::AddNormed(LayerNorm::AttentionOutput)) => 3,
        Operation::Layer(_, Op::AddNormed(_)) => 5,
        Operation::Layers | Operation::Advance => 6,
        Operation::Head => 7,
        Operation::Sample => 8,
    }
}

/// The part that a projection is, with what follows it.
fn of_projection(projection: Projection) -> usize {
    [1, 3, 4, 5][projection.index()]
}

/// Measures a token of `model`, which was loaded from `weights` (with a head of so many bytes in place of its own, if any)
/// and is compensated as `compensation` says, behind a text of `context` tokens.
///
/// # Errors
/// No context, one that the model was not trained for, what the device says.
pub fn measure<B: DecodeBackend>(
    model: &Model<'_, B>,
    recorder: &mut dyn Recorder<B>,
    (weights, head): (&dyn ModelWeights, Option<usize>),
    compensation: Option<&Compensation>,
    context: usize,
) -> Result<Timeline> {
    ensure!(context > 0, "a context of 0 tokens, at least 1 is needed");
    let mut state = model.state(1, context + ROOM)?;
    let apart = model.operations();
    let fused: Vec<_> =
        [Operation::Embed, Operation::Layers].into_iter().chain(apart[apart.len() - 3..].iter().copied()).collect();
    let apart_us = times(model, &mut state, recorder, &apart, context)?;
    let fused_us = times(model, &mut state, recorder, &fused, context)?;
    let layers_us = fused_us[1];
    let mut parts = bytes(weights, head, compensation, &model.bit_widths(), context)?;
    for (&operation, us) in apart.iter().zip(&apart_us) {
        parts[part(operation)].us += us;
        parts[part(operation)].count += 1;
    }
    let stamped = inside(&model.backend().layer_stamps()?, weights.config().layers.len());
    if let Some(stamped) = stamped {
        for (&operation, us) in fused.iter().zip(&fused_us).filter(|(operation, _)| **operation != Operation::Layers) {
            parts[part(operation)].fused_us = Some(*us);
        }
        parts[1..6].iter_mut().zip(stamped).for_each(|(part, us)| part.fused_us = Some(us));
    }
    let measured = recorder.bandwidths(model.backend())?;
    let fastest = || {
        let weights = parts.iter().filter(|p| !matches!(p.name, "embed" | "attend") && p.us > 0.0);
        let device_memory = weights.map(|p| p.bytes as f64 / p.us * 1e6).fold(1.0, f64::max);
        Bandwidths { device_memory, host_link: device_memory }
    };
    let bandwidths = measured.unwrap_or_else(fastest);
    for part in &mut parts {
        let least = |bytes: usize, speed: f64| bytes as f64 / speed * 1e6;
        part.floor_us = least(part.bytes, bandwidths.device_memory).max(least(part.host_bytes, bandwidths.host_link));
    }
    Ok(Timeline { clock: recorder.clock(), bandwidths, measured: measured.is_some(), parts, layers_us })
}

/// The median time of each of `operations`, µs: from the end of the one before to its own.
fn times<B: DecodeBackend>(
    model: &Model<'_, B>,
    state: &mut State<B>,
    recorder: &mut dyn Recorder<B>,
    operations: &[Operation],
    context: usize,
) -> Result<Vec<f64>> {
    let prompt = vec![model.config().bos_token_id.unwrap_or(0); context];
    let kinds: Vec<_> = operations.iter().map(|&operation| part(operation)).collect();
    let mut all = vec![Vec::with_capacity(ROUNDS); operations.len()];
    for _ in 0..ROUNDS {
        // Also empties the list of sampled tokens, which every repetition adds to.
        model.begin(state, 0, &Sampling::GREEDY, &[])?;
        model.prompt(state, 0, &prompt, false)?;
        let mut launch = |i: usize| model.operate(state, 0, operations[i]);
        let launches = recorder.record(model.backend(), &kinds, &mut launch)?;
        let mut before = 0;
        for (times, Launch { gemv, dec }) in all.iter_mut().zip(&launches) {
            let start = dec.as_ref().map_or(gemv.start_ns, |dec| dec.start_ns.min(gemv.start_ns)).max(before);
            let end = dec.as_ref().map_or(gemv.end_ns, |dec| dec.end_ns.max(gemv.end_ns)).max(start);
            times.push((end - start) as f64 / 1e3);
            before = end;
        }
    }
    Ok(all.iter_mut().map(|times| median(times)).collect())
}

/// What `qkv`, `attend`, `o`, `gu` and `d` took inside one launch, all layers together, µs: means over the layers
/// that the last launch had.
fn inside(stamps: &[u64], layers: usize) -> Option<[f64; 5]> {
    let spans = stamps.len().checked_sub(1)?;
    let launched = spans / 5;
    if launched == 0 || !spans.is_multiple_of(5) || launched > layers {
        return None;
    }
    let mut sums = [0.0; 5];
    for (i, pair) in stamps.windows(2).enumerate() {
        sums[i % 5] += (pair[1] - pair[0]) as f64 / 1e3;
    }
    Some(sums.map(|sum| sum * layers as f64 / launched as f64))
}

/// Every part with its bytes, and without times.
fn bytes(
    weights: &dyn ModelWeights,
    head: Option<usize>,
    compensation: Option<&Compensation>,
    widths: &[u32],
    context: usize,
) -> Result<Vec<Part>> {
    let empty = |name| Part { name, count: 0, bytes: 0, host_bytes: 0, floor_us: 0.0, us: 0.0, fused_us: None };
    let mut parts: Vec<_> = PARTS.into_iter().map(empty).collect();
    let c = weights.config();
    for layer in 0..c.layers.len() {
        for p in Projection::ALL {
            let linear = weights.projection(layer, p)?;
            let part = &mut parts[of_projection(p)];
            part.bytes += linear.weight.bytes();
            part.host_bytes += compensation.map_or(0, |own| own.fetched(c, (layer, weights.bits(layer)), widths, p));
        }
    }
    let cached = |layer: &LayerConfig| {
        let attention = layer.attention();
        let seen = attention.window.map_or(context, |window| context.min(window));
        2 * attention.num_kv_heads * attention.head_dim * seen * 2
    };
    parts[2].bytes = c.layers.iter().map(cached).sum();
    parts[0].bytes = c.hidden_size * 2;
    parts[7].bytes = match head {
        Some(bytes) => bytes,
        None => weights.head()?.map_or_else(|| weights.embedding(), Ok)?.values.bytes(),
    };
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two of four layers in the last launch.
    #[test]
    fn stamps_become_parts() {
        let launch = |spans: &[u64]| {
            let ends = spans.iter().cycle().take(2 * spans.len());
            let mut now = 1000;
            std::iter::once(now)
                .chain(ends.map(|span| {
                    now += span;
                    now
                }))
                .collect::<Vec<u64>>()
        };
        assert_eq!(inside(&launch(&[7000, 3000, 5000, 20_000, 11_000]), 4), Some([28.0, 12.0, 20.0, 80.0, 44.0]));
        assert_eq!(inside(&launch(&[7000, 3000, 5000]), 4), None, "no five parts a layer");
        assert_eq!(inside(&[], 4), None);
    }
}
