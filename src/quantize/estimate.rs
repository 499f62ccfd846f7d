//! What a quantization will take, for those who want to know before: sizes from shapes, times from running a
//! sample of the very same work on this machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use rayon::prelude::*;

use super::backward::Compensated;
use super::compute::{Coded, Tensor, Trained};
use super::forward::{Affine, Ropes, norms};
use super::gram::{Hessian, Taken};
use super::head::{HEAD_ROWS, LmHead};
use super::host::Host;
use super::product::product;
use super::refine::Effort;
use super::regress::{Together, predicted};
use super::sqllm;
use super::{Calibration, Options, Refine, awq, backward, calibrate, divergence, fit, mixed, plan, polish, sample};
use crate::checkpoint::Manifest;
use crate::config::{Attention, FeedForward, Mixer, ModelConfig, Pairing, Projection, Rope, RopeScaling};
use crate::format::{Dense, Residual};
use crate::host;
use crate::sampling;

pub(crate) mod gpu;

/// Tokens, channels and rows of the sample.
const TOKENS: usize = 512;
const CHANNELS: usize = 1024;
const ROWS: usize = 512;
/// Channels of a group of the sample.
const GROUP: usize = 64;
/// Rows of it for each core, where codes are fitted: as many as go together.
const CORE_ROWS: usize = 64;
/// Bytes of a tokenizer for each of its words, measured on SmolLM2's and rounded up.
const WORD_BYTES: usize = 1000;
/// Words of the sample's head.
const WORDS: usize = 4096;

/// What a quantization will take and leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of codes, codebooks, norms, embedding and head: what a device holds.
    pub device_bytes: usize,
    /// Bytes of residuals and thresholds: what stays in host memory.
    pub host_bytes: usize,
    /// Bytes on disk while the job runs: finished layers beside the checkpoint made of them.
    pub disk_bytes: usize,
    /// Most bytes in memory at once, without what is only mapped.
    pub memory_bytes: usize,
    /// Most bytes of a GPU's memory at once, where one computes; it keeps more layers where it has room for all of them.
    pub gpu_bytes: usize,
    /// Time on the device asked for, if it does nothing else.
    pub time: Duration,
}

/// Estimates; checks the options as [`super::quantize`] does. Takes a few seconds.
///
/// # Errors
/// Options that do not fit the model.
pub fn estimate(config: &ModelConfig, options: &Options) -> Result<Estimate> {
    let manifest = plan(config, options)?;
    Ok(Estimate { time: time(config, options, &manifest)?, ..sizes(config, options, &manifest) })
}

/// All but the time.
fn sizes(config: &ModelConfig, options: &Options, manifest: &Manifest) -> Estimate {
    let each = (0..config.layers.len()).map(|layer| layer_bytes(config, layer, manifest));
    let (codes, residuals) = each.fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
    let rest = table_bytes(config) + 4 * config.hidden_size;
    let widths = if manifest.bits.is_mixed() { 2 } else { 1 };
    Estimate {
        device_bytes: codes + rest,
        host_bytes: residuals,
        disk_bytes: (1 + widths) * (codes + residuals) + rest,
        memory_bytes: memory(config, options, manifest),
        gpu_bytes: gpu::memory(config, options, manifest),
        time: Duration::ZERO,
    }
}

/// The same with the time that a GPU of these rates takes, what the host's cores do beside it included.
///
/// # Errors
/// Options that do not fit the model.
pub(crate) fn estimate_on_gpu(config: &ModelConfig, options: &Options, rates: gpu::Rates) -> Result<Estimate> {
    let (manifest, sample) = (plan(config, options)?, Sample::new());
    let weights = sum(config, |layer| sample::layer_weights(config, layer)) as f64;
    let widths = if manifest.bits.is_mixed() { 2.0 } else { 1.0 };
    let mut host = widths * weights * sample.quantize(options, &manifest)?;
    if trains_codebooks(options, &manifest) {
        host += weights * sample.residual()?;
    }
    let time = Duration::from_secs_f64(gpu::time(config, options, &manifest, rates) + host);
    Ok(Estimate { time, ..sizes(config, options, &manifest) })
}

/// The most that any layer needs.
fn most(config: &ModelConfig, of: impl Fn(usize) -> usize) -> usize {
    (0..config.layers.len()).map(of).max().unwrap_or(0)
}

/// What all layers need together.
fn sum(config: &ModelConfig, of: impl Fn(usize) -> usize) -> usize {
    (0..config.layers.len()).map(of).sum()
}

/// Bytes of embedding and head in half precision.
fn table_bytes(config: &ModelConfig) -> usize {
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    2 * tables * config.vocab_size * config.hidden_size
}

/// Bytes of one layer, the mean over bit widths: codes, codebooks and norms; residuals and thresholds.
fn layer_bytes(config: &ModelConfig, layer: usize, manifest: &Manifest) -> (usize, usize) {
    let bits = f64::from(manifest.bits);
    let norms: usize = config.layers[layer].norms(config.hidden_size).iter().map(|(_, len)| len).sum();
    let mut codes = (4 * norms) as f64;
    let mut residuals = 0;
    for (inputs, outputs) in config.shapes(layer) {
        codes += bits / 8.0 * (inputs * outputs) as f64;
        codes += match manifest.group_size {
            None => {
                let centroids = f64::from((1u32 << manifest.bits.low()) + (1 << manifest.bits.high())) / 2.0;
                2.0 * centroids * outputs as f64
            }
            Some(group) => 2.0 * (bits + 1.0) * (inputs / group * outputs) as f64,
        };
        residuals += inputs * outputs / 2 + 2 * outputs + 4 * inputs;
    }
    (codes as usize, residuals)
}

/// Activations, one layer (twice where AWQ changes it), and the largest matrix a few times over.
fn memory(config: &ModelConfig, options: &Options, manifest: &Manifest) -> usize {
    let tokens = options.calibration.tokens();
    let residual_stream = 2 * 4 * tokens * config.hidden_size;
    let layer = most(config, |layer| layer_memory(config, layer, options, manifest));
    let mut all = residual_stream + layer;
    if trains_codebooks(options, manifest) {
        all = all.max(learning_memory(config, options, manifest));
    }
    all.max(sampling_memory(config, &options.calibration)) + WORD_BYTES * config.vocab_size
}

/// What quantizing one layer takes besides the residual stream.
fn layer_memory(config: &ModelConfig, layer: usize, options: &Options, manifest: &Manifest) -> usize {
    let tokens = options.calibration.tokens();
    let (shapes, weights) = (config.shapes(layer), sample::layer_weights(config, layer));
    let copies = if manifest.backend.is_grouped() && options.awq { 2 } else { 1 };
    let inputs = copies * 4 * tokens * shapes.iter().map(|s| s.0).sum::<usize>();
    let largest = shapes.iter().map(|s| s.0 * s.1).max().unwrap_or(0);
    // What was lost in f32, codes as bytes, codes and residual packed, and where codes are refined what they begin
    // with; or, in the forward pass, one batch.
    let refined = options.refine != Refine::None;
    let matrix = largest * if refined { 7 } else { 6 };
    // The Hessian, what is taken off it, and room for one more.
    let widest = shapes.iter().map(|s| s.0).max().unwrap_or(0);
    let matrix = matrix + if refined { 3 * 4 * widest * widest } else { 0 };
    let batch =
        4 * calibrate::BATCH_TOKENS.max(options.calibration.seq_len) * shapes.iter().map(|s| s.1).sum::<usize>();
    // The finished projections wait for each other, with about a byte for every weight.
    let finished = weights;
    inputs + copies * 4 * weights + finished + matrix.max(batch)
}

/// Where the model writes its own text: its layers in f32, what attention keeps of every text, embedding and head in half
/// precision, and the logits of all texts with a part of the head in f32.
fn sampling_memory(config: &ModelConfig, calibration: &Calibration) -> usize {
    let Some(own) = calibration.own else { return 0 };
    let (seq_len, samples) = (calibration.seq_len, sample::together(config, calibration.seq_len).min(own.samples));
    let weights = |layer| sample::layer_weights(config, layer);
    let layers = if sample::layers_stay(config) { sum(config, weights) } else { most(config, weights) };
    let kept = |layer: usize| {
        let Attention { num_kv_heads, head_dim, .. } = *config.layers[layer].attention();
        2 * samples * seq_len * num_kv_heads * head_dim
    };
    let logits = samples * config.vocab_size + HEAD_ROWS.min(config.vocab_size) * config.hidden_size;
    4 * (layers + sum(config, kept) + logits) + table_bytes(config)
}

/// True if codebooks are trained in the end.
fn trains_codebooks(options: &Options, manifest: &Manifest) -> bool {
    options.refine != Refine::None && manifest.group_size.is_none()
}

/// Refuses what this machine cannot hold, before anything is sized by it.
pub(super) fn ensure_memory(config: &ModelConfig, options: &Options, manifest: &Manifest) -> Result<()> {
    let tokens = options.calibration.tokens();
    let bytes = memory(config, options, manifest) as u64;
    host::ensure_memory(
        bytes,
        &format!("calibrating with {tokens} tokens"),
        "use fewer --samples or a shorter --seq-len",
    )
}

/// Embedding and head in half precision, what full precision says, what a window leaves in every layer, codebooks with
/// two means, and one layer four times over (codes, weights, originals, derivatives) with what its tokens need on the
/// way; or the logits, and a part of the head in f32.
fn learning_memory(config: &ModelConfig, options: &Options, manifest: &Manifest) -> usize {
    let seq_len = options.calibration.seq_len;
    let truth = 4 * options.calibration.samples() * seq_len * config.hidden_size;
    let rows = sum(config, |layer| config.shapes(layer).iter().map(|s| s.1).sum());
    let codebooks = 3 * 4 * (rows << manifest.bits.high());
    let windows = polish::at_once(config, polish::steps(options.calibration.samples()), seq_len);
    let traces = windows * seq_len * sum(config, |layer| backward::trace_bytes(config, layer));
    let layer = most(config, |layer| {
        let tokens = 2 * 4 * seq_len * config.shapes(layer).iter().map(|s| s.0 + s.1).sum::<usize>();
        (1 + 4 + 4 + 4) * sample::layer_weights(config, layer) + tokens
    });
    // Codes and originals stay where all of them are small enough.
    let kept = if sample::layers_stay(config) { 5 * sum(config, |l| sample::layer_weights(config, l)) } else { 0 };
    let rows_of_head = 4 * HEAD_ROWS.min(config.vocab_size) * config.hidden_size;
    let logits = 2 * 4 * divergence::HEAD_TOKENS.min(seq_len) * config.vocab_size + rows_of_head;
    let most = table_bytes(config) + truth + traces + codebooks + kept + layer.max(logits);
    // What windows leave lies between matrices that come and go: about a fifth more was measured.
    most + most / 5
}

fn time(config: &ModelConfig, options: &Options, manifest: &Manifest) -> Result<Duration> {
    let sample = Sample::new();
    let (texts, seq_len) = (options.calibration.samples(), options.calibration.seq_len);
    let layers = config.layers.len() as f64;
    let weights = sum(config, |layer| sample::layer_weights(config, layer)) as f64;
    // Scores and weighted sums, half of which are masked.
    let attention = seq_len * sum(config, |layer| config.shape(layer, Projection::O).0);
    let per_token = sample.product()? * (weights + attention as f64);
    let head = sample.product()? * (config.vocab_size * config.hidden_size) as f64;
    let mut seconds = per_token * (texts * seq_len) as f64;
    if let Some(own) = options.calibration.own {
        seconds += sample::SAMPLED_TOKEN as f64 * (own.samples * seq_len) as f64 * (per_token + head);
    }
    let widths = if manifest.bits.is_mixed() { 2.0 } else { 1.0 };
    seconds += widths * weights * sample.quantize(options, manifest)?;
    if options.refine != Refine::None {
        let tokens = (texts * seq_len) as f64;
        // The Hessian of `n` channels takes `tokens·n²` multiply-adds.
        let hessians = tokens * sum(config, |layer| config.shapes(layer).iter().map(|s| s.0.pow(2)).sum()) as f64;
        let each = config.projections().map(|(layer, p)| config.shape(layer, p));
        let refining: f64 = each.map(|(channels, rows)| refine_products(rows, channels)).sum();
        seconds += widths * (sample.product()? * hessians + sample.fit(manifest)? * refining);
    }
    if trains_codebooks(options, manifest) {
        let (windows, tokens) = (polish::steps(texts), (polish::steps(texts) * seq_len) as f64);
        let steps = windows.div_ceil(polish::at_once(config, windows, seq_len)) as f64;
        seconds += tokens * weights * learn_layer(config, options)?;
        seconds += steps * weights * sample.learn_weight(manifest)?;
        seconds += tokens * (config.vocab_size * config.hidden_size) as f64 * learn_head(config)?;
        // In the end residuals are made anew.
        seconds += weights * sample.residual()?;
    }
    let channels = sum(config, |layer| config.shapes(layer).iter().map(|s| s.0).sum());
    seconds += widths * (texts * seq_len * channels) as f64 * sample.statistics()?;
    if manifest.bits.is_mixed() {
        let (mixed_texts, tokens) = mixed::windows(&options.calibration);
        let passes = mixed::work(&options.calibration, config.layers.len() as u64);
        seconds += passes as f64 * per_token / layers + layers * (mixed_texts * tokens) as f64 * head;
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Multiply-adds of refining `m` rows of `n` channels: with [`fit::EFFORT`]'s `r` rounds of `s` steps,
/// `(r·(s + 1) + s + 3)·m·n²` for parameters and codes.
fn refine_products(rows: usize, channels: usize) -> f64 {
    let Effort { rounds, steps } = fit::EFFORT;
    (rounds * (steps + 1) + steps + 3) as f64 * rows as f64 * (channels as f64).powi(2)
}

/// Numbers without pattern, between −1 and 1.
fn number(i: usize) -> f32 {
    (i.wrapping_mul(2_654_435_761) % 65_536) as f32 / 32_768.0 - 1.0
}

/// The model's first layer in small, alone; others may see more or less of a text, which is little of the time.
fn small_layer(config: &ModelConfig) -> ModelConfig {
    let (hidden_size, head_dim) = (CHANNELS / 2, CHANNELS / 16);
    let mut layer = config.layers[0].clone();
    let Mixer::Attention(attention) = &mut layer.mixer;
    (attention.num_heads, attention.num_kv_heads, attention.head_dim) = (8, 4, head_dim);
    attention.rope = attention.rope.and(Some(0));
    let FeedForward::Dense { intermediate_size, .. } = &mut layer.feed_forward;
    *intermediate_size = 3 * hidden_size;
    let rope =
        Rope { head_dim, rotary_dim: head_dim, pairing: Pairing::Halves, theta: 10_000.0, scaling: RopeScaling::None };
    ModelConfig { hidden_size, layers: vec![layer], ropes: vec![rope], ..config.clone() }
}

/// Seconds for a token and a weight of a layer on which codebooks are learned: a small layer, up and down.
fn learn_layer(config: &ModelConfig, options: &Options) -> Result<f64> {
    let tokens = options.calibration.seq_len.min(TOKENS);
    let config = small_layer(config);
    let numbers = |len: usize| sampling::draws(1, len).iter().map(|x| (x - 0.5) / 8.0).collect::<Vec<f32>>();
    let linears = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(0, p);
        Affine { in_features, out_features, weight: numbers(in_features * out_features), bias: None }
    });
    let k_chunks = options.refine.k_chunks(options.bits.low(), options.bits);
    let layer = Compensated {
        config: &config.layers[0],
        norms: norms(&config.layers[0], config.hidden_size, |_, len| vec![1.0; len]),
        in_features: config.shapes(0).map(|(inputs, _)| inputs),
        projections: linears.map(|linear| {
            let weight = linear.weight.iter().map(|w| 1.1 * w).collect();
            let original = Arc::new(Affine { weight, ..linear.clone() });
            Trained::Host(Box::new(linear), Coded { original, codes: Arc::default() })
        }),
        k_chunks,
    };
    let (ropes, h) = (Ropes::new(&config, tokens), numbers(tokens * config.hidden_size));
    fastest(tokens * sample::layer_weights(&config, 0), || {
        let (mut h, mut d) = (Tensor::F32(h.clone()), Tensor::F32(h.clone()));
        let (trace, _) = layer.forward(&Host, &config, &ropes, (1, tokens), &mut h)?;
        layer.backward(&Host, &config, &ropes, (1, tokens), trace, &mut d)?;
        Ok(())
    })
}

/// Seconds for a token and a weight of the head, which speaks for both models and takes the derivative back.
fn learn_head(config: &ModelConfig) -> Result<f64> {
    let (n, tokens) = (config.hidden_size.min(CHANNELS), divergence::HEAD_TOKENS);
    let values: Vec<f32> = sampling::draws(1, WORDS * n).iter().map(|x| (x - 0.5) / 8.0).collect();
    let head = Dense { in_features: n, out_features: WORDS, values: values.into() };
    let softcap = config.logit_softcap.map(|cap| cap as f32);
    let head = LmHead { weight: &head, final_norm: vec![1.0; n], eps: config.stream_eps(), softcap };
    let (truth, h) = (sampling::draws(2, tokens * n), sampling::draws(3, tokens * n));
    fastest(tokens * WORDS * n, || {
        head.divergence(&truth, &h);
        Ok(())
    })
}

/// A small matrix and what may enter it.
struct Sample {
    linear: Affine,
    x: Vec<f32>, // [TOKENS, CHANNELS]
}

impl Sample {
    fn new() -> Self {
        let weight = (0..ROWS * CHANNELS).into_par_iter().map(number).collect();
        let linear = Affine { in_features: CHANNELS, out_features: ROWS, weight, bias: None };
        Self { linear, x: (0..TOKENS * CHANNELS).map(number).collect() }
    }

    /// Seconds for a token and a weight.
    fn product(&self) -> Result<f64> {
        let mut y = vec![0.0; TOKENS * ROWS];
        fastest(TOKENS * CHANNELS * ROWS, || {
            product(&self.x, &self.linear.weight, CHANNELS, &mut y);
            Ok(())
        })
    }

    /// Seconds to learn from one number that enters a projection.
    fn statistics(&self) -> Result<f64> {
        fastest(TOKENS * CHANNELS, || {
            calibrate::energy(&self.x, CHANNELS);
            calibrate::thresholds(&self.x, CHANNELS);
            Ok(())
        })
    }

    /// Seconds for a multiply-add of refining, from [`refine_products`], with all that is not one.
    fn fit(&self, manifest: &Manifest) -> Result<f64> {
        let (rows, bits) = (CORE_ROWS * rayon::current_num_threads(), manifest.bits.high() as usize);
        let weight = self.linear.weight.iter().copied().cycle().take(rows * CHANNELS).collect();
        let linear = Affine { out_features: rows, weight, ..self.linear.clone() };
        let mut hessian = Hessian::of(&self.x, CHANNELS);
        hessian.damp();
        let seconds = |effort: Effort| {
            fastest(1, || match manifest.group_size {
                None => sqllm::refined(&linear, bits, &hessian, effort).map(drop),
                Some(_) => awq::refined(&linear, bits, GROUP, None, &hessian, effort).map(drop),
            })
        };
        // Where it begins is part of quantizing.
        let start = seconds(Effort { rounds: 0, steps: 0 })?;
        Ok((seconds(fit::EFFORT)? - start).max(0.0) / refine_products(rows, CHANNELS))
    }

    /// Seconds for a weight in one step of learning, besides products: codes are read twice, codebooks follow.
    fn learn_weight(&self, manifest: &Manifest) -> Result<f64> {
        let bits = manifest.bits.high() as usize;
        let weight = sqllm::quantize(&self.linear, bits, &[1.0; CHANNELS])?;
        fastest(CHANNELS * ROWS, || polish::time_step(&weight, &self.linear))
    }

    /// Seconds to make a weight's residual.
    fn residual(&self) -> Result<f64> {
        let weight = sqllm::quantize(&self.linear, 2, &[1.0; CHANNELS])?;
        fastest(CHANNELS * ROWS, || {
            let mut lost = super::lost(&self.linear, &weight);
            let taken = Taken::select(&self.x, CHANNELS, 8)?;
            Together::of(&self.x, CHANNELS, &taken).regress(predicted, &mut lost)?;
            Residual::quantize_weighted(CHANNELS, ROWS, &lost, &[1.0; CHANNELS]).map(drop)
        })
    }

    /// Seconds to quantize a weight, AWQ's search included.
    fn quantize(&self, options: &Options, manifest: &Manifest) -> Result<f64> {
        let bits = manifest.bits.high() as usize;
        let awq = options.awq.then_some(&self.x[..]);
        fastest(CHANNELS * ROWS, || {
            let weight = match manifest.group_size {
                None => sqllm::quantize(&self.linear, bits, &calibrate::energy(&self.x, CHANNELS))?,
                Some(_) => {
                    if awq.is_some() {
                        awq::search(&self.linear, &self.x, &[1.0; CHANNELS], bits, GROUP);
                    }
                    awq::quantize(&self.linear, bits, GROUP, awq)?
                }
            };
            calibrate::thresholds(&self.x, CHANNELS);
            Residual::quantize_weighted(CHANNELS, ROWS, &super::lost(&self.linear, &weight), &[1.0; CHANNELS]).map(drop)
        })
    }
}

/// Seconds of the shortest of three runs, for each of the `count` things that it works on.
fn fastest(count: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best / count as f64)
}

#[cfg(test)]
mod tests;
