//! Sweeping whole tokens: what being ready to compensate costs at each `n_tb`, what each projection adds to that, and
//! whether that adds up.
//!
//! A token whose layers are one launch pays for the blocks that compensate whatever they select, so nothing selected at
//! an `n_tb` is a point of its own. From there one projection's `k_chunk` is raised at a time. A few mixed choices say
//! how well the prices add up. Each is held against tokens without compensation that were timed at the same `n_tb`.
//!
//! The trace has what it has of products: each one's stretch of the last token of a configuration.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::{Context, Result, ensure};

use super::sweep::progress;
use super::{Options, grid};
use crate::backend::DecodeBackend;
use crate::backend::record::{Bandwidths, Recorder};
use crate::config::{LayerNorm, ModelConfig, Op, Projection};
use crate::fingerprint::Fingerprint;
use crate::format::Dense;
use crate::model::{LayerCompensation, Model, Operation, State, growth, share};
use crate::nsys::trace::{Kernel, Line, Role};
use crate::nsys::{Capture, KernelRecord, Kind, TokenTime, Writer};
use crate::weights::{Linear, ModelWeights};

/// Tokens of the text that timed tokens follow, if the model's context has room for as many.
const CONTEXT: usize = 256;

/// The `k_chunk` that the host link is measured with.
const HEAVY_K_CHUNK: usize = 64;

/// A model's first layers.
struct First<'a> {
    weights: &'a dyn ModelWeights,
    config: ModelConfig,
}

impl ModelWeights for First<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.weights.embedding()
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        self.weights.head()
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.weights.final_norm()
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.weights.norm(layer, norm)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        self.weights.projection(layer, projection)
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        self.weights.bits(layer)
    }
}

/// Where the last token's products began and ended, ns.
struct Stretches {
    layers: Vec<[(u64, u64); 4]>,
    /// All layers, first to last.
    all_ns: u64,
}

/// Everything that a sweep of whole tokens needs on the device.
pub(super) struct Tokens<'a, B: DecodeBackend> {
    model: Model<'a, B>,
    state: State<B>,
    recorder: &'a mut dyn Recorder<B>,
    options: &'a Options,
    n_tbs: Vec<usize>,
    context: Vec<u32>,
    share: f64, // of the layers that are compensated
    layer_bytes: usize,
    fingerprint: String,
    /// Tokens without compensation at the `n_tb` at hand, once they were timed.
    base_ns: Option<u64>,
}

impl<'a, B: DecodeBackend> Tokens<'a, B> {
    /// Loads the model, or half of its layers.
    pub(super) fn new(
        backend: &'a B,
        recorder: &'a mut dyn Recorder<B>,
        weights: &dyn ModelWeights,
        options: &'a Options,
        n_tbs: Vec<usize>,
    ) -> Result<Self> {
        let mut config = weights.config().clone();
        if options.halve_layers {
            config.layers.truncate(config.layers.len().div_ceil(2));
        }
        let (bits, layers) = (options.identity.bits, config.layers.len());
        let of_width = |&layer: &usize| weights.bits(layer) == Some(bits);
        let Some(first) = (0..layers).find(of_width) else {
            let found = (0..layers).find_map(|layer| weights.bits(layer));
            let found = found.map_or("full precision".into(), |bits| format!("{bits}-bit"));
            anyhow::bail!("--bitwidth is {bits}, but no layer is: the first ones are {found}");
        };
        let room = config.max_position_embeddings.saturating_sub(growth(options.tokens) + 1);
        ensure!(
            room > 0,
            "--tokens is {}, the model's context of {} has no room for them: give fewer",
            options.tokens,
            config.max_position_embeddings
        );
        let context = (0..CONTEXT.min(room)).map(|i| (i * 7919 % config.vocab_size) as u32).collect::<Vec<_>>();
        let mut fingerprint = Fingerprint::default();
        let mut layer_bytes = 0;
        for projection in Projection::ALL {
            let linear = weights.projection(first, projection)?;
            layer_bytes += linear.weight.bytes();
            fingerprint.linear(&linear);
        }
        let model = Model::load(backend, &First { weights, config }, |_| ())?;
        let share = share(model.layer_bits(), bits);
        let state = model.state(1, context.len() + growth(options.tokens) + 1)?;
        let fingerprint = fingerprint.digits();
        let base_ns = None;
        Ok(Self { model, state, recorder, options, n_tbs, context, share, layer_bytes, fingerprint, base_ns })
    }

    /// Whether the device runs this model's layers as one launch.
    pub(super) fn fused(&mut self) -> Result<bool> {
        self.model.compensate(None)?;
        self.model.time_tokens(&mut self.state, &self.context, 1)?;
        Ok(!self.model.backend().layer_stamps()?.is_empty())
    }

    /// What the files say of this sweep, with nothing measured yet.
    pub(super) fn describe(&self) -> Capture {
        let (device, config) = (self.model.backend().device(), self.model.config());
        Capture {
            kind: Kind::Tokens,
            identity: self.options.identity.clone(),
            shapes: config.shapes(0),
            weights: self.options.weights.clone(),
            fingerprint: self.fingerprint.clone(),
            clock: self.recorder.clock(),
            device: device.id.clone(),
            device_name: device.name.clone(),
            driver: device.driver.clone(),
            tokens: self.options.tokens,
            layers: config.layers.len(),
            layers_ns: 0,
            device_memory: 0.0,
            host_link: 0.0,
            n_tbs: self.n_tbs.clone(),
            k_chunks: Vec::new(),
        }
    }

    /// The same with bandwidths measured, and the range of `k_chunk` that follows from them.
    pub(super) fn capture(&mut self) -> Result<Capture> {
        let base_ns = self.time(None)?;
        let layers_ns = self.stretches()?.all_ns;
        let bandwidths = match self.recorder.bandwidths(self.model.backend())? {
            Some(bandwidths) => bandwidths,
            None => self.bandwidths(base_ns, layers_ns)?,
        };
        let Bandwidths { device_memory, host_link } = bandwidths;
        let k_chunks = match &self.options.k_chunks {
            Some(k_chunks) => k_chunks.clone(),
            None => {
                let knee = bandwidths.knee(self.options.identity.bits);
                let mixed = self.options.choices.iter().flatten().copied().filter(|&k| k > 0);
                let all: BTreeSet<_> =
                    grid::token_k_chunks(knee, self.options.max_k_chunk)?.into_iter().chain(mixed).collect();
                all.into_iter().collect()
            }
        };
        Ok(Capture { device_memory, host_link, k_chunks, layers_ns, ..self.describe() })
    }

    /// Bandwidths as tokens reach them: weights by the time of the layers, residuals by what heavy compensation adds.
    fn bandwidths(&mut self, base_ns: u64, layers_ns: u64) -> Result<Bandwidths> {
        let config = self.model.config();
        let bytes = |p: Projection| {
            let (inputs, outputs) = config.shape(0, p);
            inputs * HEAVY_K_CHUNK / crate::dec::CHUNK * outputs / 2
        };
        let layers = config.layers.len() as f64;
        let (weights, residuals) =
            (layers * self.layer_bytes as f64, layers * Projection::ALL.map(bytes).iter().sum::<usize>() as f64);
        let n_tb = *self.n_tbs.last().context("no n_tb to sweep")?;
        let heavy_ns = self.time(Some(LayerCompensation { n_tb, k_chunks: [HEAVY_K_CHUNK; 4] }))?;
        let device_memory = weights / layers_ns.max(1) as f64 * 1e9;
        let added = heavy_ns.saturating_sub(base_ns);
        let host_link = if added > 0 { residuals / added as f64 * 1e9 } else { device_memory };
        Ok(Bandwidths { device_memory, host_link: host_link.clamp(1.0, device_memory) })
    }

    /// Measures what `writer` does not have yet.
    pub(super) fn run(&mut self, writer: &mut Writer) -> Result<()> {
        let k_chunks = writer.capture().k_chunks.clone();
        self.prepare(&k_chunks)?;
        if writer.configurations() == 0 {
            writer.append(&self.set_up()?)?;
        }
        let bar = progress(
            (self.n_tbs.len() * (1 + 4 * k_chunks.len() + mixes(&k_chunks, &self.options.choices).len())) as u64,
        );
        let known = writer.tokens()?.into_iter().map(|token| ((token.n_tb, token.k_chunks), token));
        let mut at = Measured { known: known.collect(), writer };
        for n_tb in self.n_tbs.clone() {
            self.base_ns = None;
            let steps = 1 + 4 * k_chunks.len() as u64;
            let ready = at.token(self, n_tb, [0; 4])?;
            let mut prices = [const { Vec::new() }; 4];
            if !self.too_dear(&ready) {
                for projection in Projection::ALL {
                    for &k_chunk in &k_chunks {
                        let mut single = [0; 4];
                        single[projection.index()] = k_chunk;
                        let token = at.token(self, n_tb, single)?;
                        prices[projection.index()].push((k_chunk, token.token_ns.saturating_sub(ready.token_ns)));
                        bar.inc(1);
                        if self.too_dear(&token) {
                            break;
                        }
                    }
                }
            }
            for mix in mixes(&k_chunks, &self.options.choices) {
                let price = |i: usize| match mix[i] {
                    0 => Some(0),
                    k_chunk => prices[i].iter().find(|(k, _)| *k == k_chunk).map(|(_, ns)| *ns),
                };
                // One whose parts were too dear to measure is too dear itself.
                let Some(added) = (0..4).map(price).sum::<Option<u64>>() else { continue };
                if !self.too_dear(&TokenTime { token_ns: ready.token_ns + added, ..ready }) {
                    at.token(self, n_tb, mix)?;
                }
            }
            bar.set_position((bar.position() / steps + 1) * steps);
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn too_dear(&self, token: &TokenTime) -> bool {
        token.token_ns as f64 > token.base_ns as f64 * (1.0 + self.options.dearest)
    }

    /// Compiles everything at once that the sweep will need.
    fn prepare(&mut self, k_chunks: &[usize]) -> Result<()> {
        let ends = [0, *k_chunks.first().unwrap_or(&0), *k_chunks.last().unwrap_or(&0)];
        let ways: Vec<_> =
            self.n_tbs.iter().flat_map(|&n_tb| ends.map(|k| LayerCompensation { n_tb, k_chunks: [k; 4] })).collect();
        let Self { model, state, options, .. } = self;
        model.prepare_ways(state, ways.len(), &mut |model, way| {
            model.compensate_width(options.identity.bits, ways[way], options.selection)
        })
    }

    /// A token so compensated, ns.
    fn time(&mut self, compensation: Option<LayerCompensation>) -> Result<u64> {
        let Self { model, state, options, .. } = self;
        match compensation {
            None => model.compensate(None)?,
            Some(own) => model.compensate_width(options.identity.bits, own, options.selection)?,
        }
        let took = model.time_tokens(state, &self.context, options.tokens)?;
        Ok((took.as_nanos() as u64).max(1))
    }

    /// Times a configuration, held against tokens without compensation; its products' stretches come along.
    fn measure(&mut self, n_tb: usize, k_chunks: [usize; 4], writer: &mut Writer) -> Result<TokenTime> {
        let base_ns = match self.base_ns {
            Some(base_ns) => base_ns,
            None => {
                let base_ns = self.time(None)?;
                let lines = self.lines(Role::Standalone, None, usize::MAX)?;
                writer.append(&lines)?;
                *self.base_ns.insert(base_ns)
            }
        };
        let own = LayerCompensation { n_tb, k_chunks };
        let took = self.time(Some(own))?;
        // As if all layers were of the width that is compensated.
        let token_ns = base_ns as f64 + (took as f64 - base_ns as f64) / self.share;
        let token = TokenTime { n_tb, k_chunks, token_ns: (token_ns as u64).max(1), base_ns };
        let lines = self.lines(Role::Concurrent(writer.pairs()), Some(own), usize::MAX)?;
        let place = || format!("n_tb {n_tb}, k_chunk {k_chunks:?}");
        writer.append_token(&lines, Some(&token)).with_context(place)?;
        Ok(token)
    }

    /// The first and the second token, whose times mean nothing: one layer of each.
    fn set_up(&mut self) -> Result<Vec<(Line, KernelRecord)>> {
        let (n_tb, mut lines) = (self.n_tbs[0], Vec::new());
        for role in [Role::Compile, Role::Warmup] {
            for compensation in [None, Some(LayerCompensation { n_tb, k_chunks: [1; 4] })] {
                self.time(compensation)?;
                lines.extend(self.lines(role, compensation, 1)?);
            }
        }
        Ok(lines)
    }

    /// The last token's products in the first `layers` layers, each with its compensation if there is one. `role` has the
    /// number of the first pair.
    fn lines(
        &mut self,
        role: Role,
        compensation: Option<LayerCompensation>,
        layers: usize,
    ) -> Result<Vec<(Line, KernelRecord)>> {
        let stretches = self.stretches()?;
        let mut lines = Vec::new();
        let products = stretches.layers.iter().take(layers).flat_map(|layer| Projection::ALL.into_iter().zip(layer));
        for (i, (projection, &(start_ns, end_ns))) in products.enumerate() {
            let role = if let Role::Concurrent(first) = role { Role::Concurrent(first + i) } else { role };
            let record = KernelRecord { start_ns, end_ns, grid: [1; 3], ..KernelRecord::default() };
            if let Some(LayerCompensation { n_tb, k_chunks }) = compensation {
                let dec = KernelRecord { grid: [n_tb as u32, 1, 1], ..record.clone() };
                lines.push((Line { role, kernel: Kernel::Dec(k_chunks[projection.index()]) }, dec));
            }
            lines.push((Line { role, kernel: Kernel::Gemv(projection) }, record));
        }
        Ok(lines)
    }

    /// Where the products of the last token began and ended: by the stamps of the launch that had all layers in it, or,
    /// where there was none, of one more token that is taken operation by operation.
    fn stretches(&mut self) -> Result<Stretches> {
        let stamps = self.model.backend().layer_stamps()?;
        let (count, all) = (stamps.len() / 5, self.model.config().layers.len());
        if count > 0 && stamps.len() == 5 * count + 1 && count <= all {
            // qkv, attention, o, gate and up, down
            let product = |layer: usize| {
                [0, 2, 3, 4].map(|part| interval(stamps[5 * layer + part], stamps[5 * layer + part + 1]))
            };
            let launch_ns = stamps[5 * count] - stamps[0];
            return Ok(Stretches {
                layers: (0..count).map(product).collect(),
                all_ns: (launch_ns as f64 * all as f64 / count as f64) as u64,
            });
        }
        let operations: Vec<_> =
            self.model.operations().into_iter().filter(|operation| matches!(operation, Operation::Layer(..))).collect();
        let kind = |operation: &Operation| match operation {
            Operation::Layer(_, Op::Project { projection, .. }) => projection.index(),
            _ => 4,
        };
        let kinds: Vec<_> = operations.iter().map(kind).collect();
        let Self { model, state, recorder, .. } = self;
        let mut launch = |i: usize| model.operate(state, 0, operations[i]);
        let launches = recorder.record(model.backend(), &kinds, &mut launch)?;
        let mut layers = vec![[(1, 2); 4]; all];
        let (mut first, mut before) = (u64::MAX, 0);
        for (operation, launch) in operations.iter().zip(&launches) {
            let ends = launch.dec.iter().chain([&launch.gemv]);
            let (start, end) = ends.fold((u64::MAX, 0), |(start, end), k| (start.min(k.start_ns), end.max(k.end_ns)));
            if let Operation::Layer(layer, Op::Project { projection, .. }) = operation {
                layers[*layer][projection.index()] = interval(start.max(before), end);
            }
            (first, before) = (first.min(start), before.max(end));
        }
        Ok(Stretches { layers, all_ns: before.saturating_sub(first) })
    }
}

/// A stretch of time, a nanosecond at least.
fn interval(start: u64, end: u64) -> (u64, u64) {
    (start.max(1), end.max(start.max(1) + 1))
}

/// What was measured, in this run or in one that was interrupted.
struct Measured<'w> {
    known: HashMap<(usize, [usize; 4]), TokenTime>,
    writer: &'w mut Writer,
}

impl Measured<'_> {
    fn token<B: DecodeBackend>(
        &mut self,
        tokens: &mut Tokens<'_, B>,
        n_tb: usize,
        k_chunks: [usize; 4],
    ) -> Result<TokenTime> {
        if let Some(known) = self.known.get(&(n_tb, k_chunks)) {
            return Ok(*known);
        }
        let token = tokens.measure(n_tb, k_chunks, self.writer)?;
        self.known.insert((n_tb, k_chunks), token);
        Ok(token)
    }
}

/// Every mix of these `k_chunk`, for the four projections.
pub fn every_mix(of: &[usize]) -> Vec<[usize; 4]> {
    let mix = |mut i: usize| {
        [0; 4].map(|_| {
            let k_chunk = of[i % of.len()];
            i /= of.len();
            k_chunk
        })
    };
    (0..of.len().pow(4)).map(mix).collect()
}

/// Choices of several projections that are measured as they are: three usual ones, and those of `also`.
fn mixes(k_chunks: &[usize], also: &[[usize; 4]]) -> Vec<[usize; 4]> {
    let nearest = |wanted: usize| k_chunks.iter().copied().min_by_key(|k| k.abs_diff(wanted)).unwrap_or(0);
    let (few, some) = (nearest(4), nearest(8));
    let mut mixes = [&[[few; 4], [0, 0, some, some], [some; 4]], also].concat();
    mixes.retain(|mix| mix.iter().filter(|&&k| k > 0).count() > 1);
    let mut seen = HashSet::new();
    mixes.retain(|mix| seen.insert(*mix));
    mixes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixes_are_of_several_projections_and_each_comes_once() {
        assert_eq!(mixes(&[1, 2, 3, 4, 6, 8, 12], &[]), [[4; 4], [0, 0, 8, 8], [8; 4]]);
        assert_eq!(mixes(&[5], &[]), [[5; 4], [0, 0, 5, 5]]);
        assert!(mixes(&[], &[]).is_empty());
        let all = mixes(&[4, 8], &every_mix(&[0, 4, 8]));
        // Of 3^4 mixes, one has nothing and 4 · 2 have one projection.
        assert_eq!(all.len(), 81 - 9);
        assert!(all.contains(&[8, 0, 4, 0]) && !all.contains(&[0, 0, 4, 0]));
    }
}
