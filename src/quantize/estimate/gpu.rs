//! What quantizing on a GPU takes (`backend/cuda/quantize`): its memory, and its time from how fast it multiplies.

use super::{most, refine_products, sum, table_bytes, trains_codebooks};
use crate::checkpoint::Manifest;
use crate::config::{ModelConfig, Projection};
use crate::quantize::{Options, Refine, backward, polish, regress, sample};

/// Numbers that leave the widest projection for the tokens that go through a layer at once.
const BATCH: usize = 1 << 28;
/// Tokens that go through a layer at once, at most.
const BATCH_TOKENS: usize = 8192;
/// Bytes that keys and values of texts sampled side by side may take.
pub(crate) const SAMPLED_CACHE: usize = 4 << 30;
/// Bytes that attention's scores may take at once.
pub(crate) const SCORES: usize = 256 << 20;
/// Weights that are fitted together.
pub(crate) const FITTED: usize = 1 << 27;
/// Numbers of one model's logits that are there at once.
pub(crate) const LOGITS: usize = 1 << 27;
/// Weights of the head that are in f32 at once.
pub(crate) const HEAD_WEIGHTS: usize = 1 << 28;
/// Bytes that are taken where not all layers that are trained fit; those of a model of 70B go in turns then.
pub(crate) const USUAL: usize = 24_000_000_000;

/// Tokens that go through a layer of the model at once.
pub(crate) fn batch_tokens(config: &ModelConfig) -> usize {
    let widest = most(config, |layer| config.shapes(layer).iter().map(|s| s.1).max().unwrap_or(1));
    (BATCH / widest.max(1)).clamp(1, BATCH_TOKENS)
}

/// Most bytes at once: a layer that texts go through while they are watched, one that is fitted, one that is trained, or
/// text that is sampled.
pub(super) fn memory(config: &ModelConfig, options: &Options, manifest: &Manifest) -> usize {
    let seq_len = options.calibration.seq_len;
    let tokens = batch_tokens(config).max(seq_len).min(options.calibration.samples() * seq_len);
    let weights = |layer| sample::layer_weights(config, layer);
    let largest = |layer: usize| config.shapes(layer).iter().map(|s| s.0 * s.1).max().unwrap_or(0);
    let widest = |layer: usize| config.shapes(layer).iter().map(|s| s.0).max().unwrap_or(0);
    let counts = match options.refine {
        Refine::None => 0,
        _ => usize::from(manifest.bits.is_mixed()) + 1,
    };
    // A Hessian, and what taken channels have in common with each other and the rest.
    let of_width = |n: usize| if n <= regress::WIDEST { 3 * n * n } else { n * n };
    let grams = |layer: usize| counts * 4 * config.shapes(layer).iter().map(|s| of_width(s.0)).sum::<usize>();
    // The matrices, one of them in f32; the stream, normed, what enters and comes out; what is masked of it.
    let watched = most(config, |layer| {
        let features: usize = config.shapes(layer).iter().map(|s| s.0 + s.1).sum();
        4 * (weights(layer) + largest(layer))
            + 4 * tokens * (2 * config.hidden_size + features + 2 * widest(layer))
            + SCORES
            + grams(layer)
    });
    let fitted = most(config, |layer| (5 * 4 + 1) * FITTED.min(largest(layer)) + grams(layer));
    let mut all = watched.max(fitted);
    if trains_codebooks(options, manifest) {
        let windows = polish::at_once(config, polish::steps(options.calibration.samples()), seq_len);
        let tokens = windows * seq_len;
        let traces = tokens * sum(config, |layer| backward::trace_bytes(config, layer));
        let kept = 5 * sum(config, weights);
        let step = most(config, |layer| {
            let features: usize = config.shapes(layer).iter().map(|s| s.0 + s.1).sum();
            // A projection as it is kept, one in f32, and the derivatives of all four.
            5 * largest(layer) + 4 * (largest(layer) + weights(layer)) + 2 * 4 * tokens * features + 3 * SCORES
        });
        let head = 2 * 4 * LOGITS.min(tokens * config.vocab_size)
            + 4 * HEAD_WEIGHTS.min(config.vocab_size * config.hidden_size);
        let work = table_bytes(config) + traces + step.max(head);
        all = all.max(work + kept.min(USUAL.saturating_sub(work)));
    }
    all
}

/// How fast a device does what takes the time, measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    /// Multiply-adds a second of products in f32.
    pub(crate) full: f64,
    /// The same with factors of TF32.
    pub(crate) fast: f64,
    /// Bytes a second of the device's memory.
    pub(crate) memory: f64,
    /// Bytes a second from the host.
    pub(crate) link: f64,
}

/// Seconds on the device, without what the host does beside it.
pub(super) fn time(config: &ModelConfig, options: &Options, manifest: &Manifest, rates: Rates) -> f64 {
    let tokens = (options.calibration.samples() * options.calibration.seq_len) as f64;
    let seq_len = options.calibration.seq_len as f64;
    let all = sum(config, |layer| sample::layer_weights(config, layer)) as f64;
    let widths = if manifest.bits.is_mixed() { 2.0 } else { 1.0 };
    let head = (config.vocab_size * config.hidden_size) as f64;
    let stream = 4.0 * tokens * (config.hidden_size * config.layers.len()) as f64;
    // Scores and weighted sums, half of which are masked but computed.
    let attention = 2.0 * seq_len * sum(config, |layer| config.shape(layer, Projection::O).0) as f64;
    let pass = tokens * (all + attention) / rates.full + 2.0 * stream / rates.link + 2.0 * all / rates.link;
    let mut seconds = pass;
    if options.refine != Refine::None {
        let squares = sum(config, |layer| config.shapes(layer).iter().map(|s| s.0.pow(2)).sum()) as f64;
        let each = config.projections().map(|(layer, p)| config.shape(layer, p));
        let refining: f64 = each.map(|(channels, rows)| refine_products(rows, channels)).sum();
        // Of each width: the rest with itself, and the taken with themselves and the rest.
        seconds += widths * (3.0 * tokens * squares / rates.fast + refining / rates.full);
    }
    if trains_codebooks(options, manifest) {
        let windows = polish::steps(options.calibration.samples());
        let learned = windows as f64 * seq_len;
        let steps = windows.div_ceil(polish::at_once(config, windows, options.calibration.seq_len)) as f64;
        let gate_up = sum(config, |layer| {
            let (inputs, outputs) = config.shape(layer, Projection::GateUp);
            inputs * outputs
        }) as f64;
        // Forwards through codes and originals, gate-up once more; back to what entered through both, and to the weights.
        seconds += learned * (5.0 * all + 2.0 * gate_up) / rates.fast;
        // Each of these reads codes or originals, writes them in f32 and reads those; derivatives are written and summed up.
        seconds += steps * (2.0 * 19.0 * all + 19.0 * gate_up + 9.0 * all) / rates.memory;
        seconds += learned * head * (2.0 / rates.full + 1.0 / rates.fast);
        // In the end texts go through once more, and what enters is watched again.
        seconds += pass;
    }
    seconds
}
