//! What a quantization will take, for those who want to know before: sizes from shapes, times from running a
//! sample of the very same work on this machine.

use std::time::{Duration, Instant};

use anyhow::Result;
use rayon::prelude::*;
use serde_json::json;

use super::backward::Compensated;
use super::divergence::Speaker;
use super::forward::{Affine, Layer, Ropes, norms};
use super::gram::Hessian;
use super::product::product;
use super::refine::Effort;
use super::sqllm;
use super::{
    Calibration, Options, Refine, awq, backward, calibrate, divergence, finish, fit, mixed, plan, polish, sample,
};
use crate::checkpoint::Manifest;
use crate::config::{ModelConfig, Projection};
use crate::format::Dense;
use crate::host;
use crate::sampling;

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
    /// Time on this machine, if it does nothing else.
    pub time: Duration,
}

/// Estimates; checks the options as [`super::quantize`] does. Takes a few seconds.
///
/// # Errors
/// Options that do not fit the model.
pub fn estimate(config: &ModelConfig, options: &Options) -> Result<Estimate> {
    let manifest = plan(config, options)?;
    let (codes, residuals) = layer_bytes(config, &manifest);
    let rest = table_bytes(config) + 4 * config.hidden_size;
    let widths = if manifest.bits.is_mixed() { 2 } else { 1 };
    Ok(Estimate {
        device_bytes: config.layers.len() * codes + rest,
        host_bytes: config.layers.len() * residuals,
        disk_bytes: (1 + widths) * config.layers.len() * (codes + residuals) + rest,
        memory_bytes: memory(config, options, &manifest),
        time: time(config, options, &manifest)?,
    })
}

/// Bytes of embedding and head in half precision.
fn table_bytes(config: &ModelConfig) -> usize {
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    2 * tables * config.vocab_size * config.hidden_size
}

/// Bytes of one layer, the mean over bit widths: codes, codebooks and norms; residuals and thresholds.
fn layer_bytes(config: &ModelConfig, manifest: &Manifest) -> (usize, usize) {
    let bits = f64::from(manifest.bits);
    let mut codes = (8 * config.hidden_size) as f64;
    let mut residuals = 0;
    for (inputs, outputs) in Projection::ALL.map(|p| config.shape(0, p)) {
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
    let tokens = options.calibration.samples() * options.calibration.seq_len();
    let shapes = Projection::ALL.map(|p| config.shape(0, p));
    let copies = if manifest.backend.is_grouped() && options.awq { 2 } else { 1 };
    let residual_stream = 2 * 4 * tokens * config.hidden_size;
    let inputs = copies * 4 * tokens * shapes.iter().map(|s| s.0).sum::<usize>();
    let layer = copies * 4 * sample::layer_weights(config);
    let largest = shapes.iter().map(|s| s.0 * s.1).max().unwrap_or(0);
    // What was lost in f32, codes as bytes, codes and residual packed, and where codes are refined what they begin
    // with; or, in the forward pass, one batch.
    let refined = options.refine != Refine::None;
    let matrix = largest * if refined { 7 } else { 6 };
    // The Hessian, what is taken off it, and as much to spare.
    let widest = shapes.iter().map(|s| s.0).max().unwrap_or(0);
    let matrix = matrix + if refined { 3 * 4 * widest * widest } else { 0 };
    let batch =
        4 * calibrate::BATCH_TOKENS.max(options.calibration.seq_len()) * shapes.iter().map(|s| s.1).sum::<usize>();
    // The finished projections wait for each other, with about a byte for every weight.
    let finished = sample::layer_weights(config);
    let quantizing = residual_stream + inputs + layer + finished + matrix.max(batch);
    let most =
        if learns(options, manifest) { quantizing.max(learning_memory(config, options, manifest)) } else { quantizing };
    most.max(sampling_memory(config, &options.calibration)) + WORD_BYTES * config.vocab_size
}

/// Where the model writes its own text: its layers in f32, what attention keeps of every text, embedding and head in half
/// precision, and the logits of all texts with a part of the head in f32.
fn sampling_memory(config: &ModelConfig, calibration: &Calibration) -> usize {
    let &Calibration::Sampled { seq_len, samples, .. } = calibration else { return 0 };
    let layers = if sample::holds(config) { config.layers.len() } else { 1 };
    let kept = 2
        * config.layers.len()
        * samples
        * seq_len
        * config.layers[0].attention().num_kv_heads
        * config.layers[0].attention().head_dim;
    let logits = samples * config.vocab_size + sample::HEAD_ROWS.min(config.vocab_size) * config.hidden_size;
    4 * (layers * sample::layer_weights(config) + kept + logits) + table_bytes(config)
}

/// True if codebooks are learned in the end.
fn learns(options: &Options, manifest: &Manifest) -> bool {
    options.refine != Refine::None && manifest.group_size.is_none()
}

/// Refuses what this machine cannot hold, before anything is sized by it.
pub(super) fn ensure_memory(config: &ModelConfig, options: &Options, manifest: &Manifest) -> Result<()> {
    let tokens = options.calibration.samples() * options.calibration.seq_len();
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
    let seq_len = options.calibration.seq_len();
    let shapes = Projection::ALL.map(|p| config.shape(0, p));
    let rows: usize = shapes.iter().map(|s| s.1).sum();
    let truth = 4 * options.calibration.samples() * seq_len * config.hidden_size;
    let codebooks = 3 * 4 * config.layers.len() * (rows << manifest.bits.high());
    let traces = config.layers.len() * seq_len * backward::trace_bytes(config);
    let layer = (1 + 4 + 4 + 4) * sample::layer_weights(config);
    let tokens = 2 * 4 * seq_len * shapes.iter().map(|s| s.0 + s.1).sum::<usize>();
    let rows_of_head = 4 * sample::HEAD_ROWS.min(config.vocab_size) * config.hidden_size;
    let logits = 2 * 4 * divergence::HEAD_TOKENS.min(seq_len) * config.vocab_size + rows_of_head;
    let most = table_bytes(config) + truth + traces + codebooks + (layer + tokens).max(logits);
    // What windows leave lies between matrices that come and go: about a fifth more was measured.
    most + most / 5
}

fn time(config: &ModelConfig, options: &Options, manifest: &Manifest) -> Result<Duration> {
    let sample = Sample::new();
    let (texts, seq_len) = (options.calibration.samples(), options.calibration.seq_len());
    let layers = config.layers.len() as f64;
    let weights = sample::layer_weights(config) as f64;
    // Scores and weighted sums, half of which are masked.
    let attention = (seq_len * config.layers[0].attention().num_heads * config.layers[0].attention().head_dim) as f64;
    let per_token = sample.product()? * (weights + attention);
    let head = sample.product()? * (config.vocab_size * config.hidden_size) as f64;
    let mut seconds = layers * per_token * (texts * seq_len) as f64;
    if let Calibration::Sampled { .. } = options.calibration {
        seconds += sample::SAMPLED_TOKEN as f64 * (texts * seq_len) as f64 * (layers * per_token + head);
    }
    let widths = if manifest.bits.is_mixed() { 2.0 } else { 1.0 };
    seconds += widths * layers * weights * sample.quantize(options, manifest)?;
    if options.refine != Refine::None {
        let tokens = texts * seq_len;
        seconds += widths * layers * sample.product()? * hessian_products(config, tokens);
        seconds += widths * layers * sample.fit(manifest)? * fit_products(config);
    }
    if learns(options, manifest) {
        let (steps, tokens) = (polish::steps(texts) as f64, (polish::steps(texts) * seq_len) as f64);
        seconds += tokens * layers * weights * learn_layer(config, options)?;
        seconds += steps * layers * weights * sample.learn_weight(manifest)?;
        seconds += tokens * (config.vocab_size * config.hidden_size) as f64 * learn_head(config)?;
        // In the end residuals are made anew.
        seconds += layers * weights * sample.residual()?;
    }
    let channels: usize = Projection::ALL.iter().map(|&p| config.shape(0, p).0).sum();
    seconds += widths * layers * (texts * seq_len * channels) as f64 * sample.statistics()?;
    if manifest.bits.is_mixed() {
        let (mixed_texts, tokens) = mixed::windows(&options.calibration);
        let passes = mixed::work(&options.calibration, config.layers.len() as u64);
        seconds += passes as f64 * per_token + layers * (mixed_texts * tokens) as f64 * head;
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Multiply-adds of one layer's Hessians of `tokens`: `tokens·n²` for each projection of `n` channels.
fn hessian_products(config: &ModelConfig, tokens: usize) -> f64 {
    Projection::ALL.map(|p| tokens as f64 * (config.shape(0, p).0 as f64).powi(2)).iter().sum()
}

/// Multiply-adds of refining `m` rows of `n` channels: with [`fit::EFFORT`]'s `r` rounds of `s` steps,
/// `(r·(s + 1) + s + 3)·m·n²` for parameters and codes.
fn refine_products(rows: usize, channels: usize) -> f64 {
    let Effort { rounds, steps } = fit::EFFORT;
    (rounds * (steps + 1) + steps + 3) as f64 * rows as f64 * (channels as f64).powi(2)
}

/// The same of one layer.
fn fit_products(config: &ModelConfig) -> f64 {
    Projection::ALL.map(|p| config.shape(0, p)).map(|(n, m)| refine_products(m, n)).iter().sum()
}

/// Numbers without pattern, between −1 and 1.
fn number(i: usize) -> f32 {
    (i.wrapping_mul(2_654_435_761) % 65_536) as f32 / 32_768.0 - 1.0
}

/// Seconds for a token and a weight of a layer on which codebooks are learned: a small layer, up and down.
fn learn_layer(config: &ModelConfig, options: &Options) -> Result<f64> {
    let (hidden_size, tokens) = (CHANNELS / 2, options.calibration.seq_len().min(TOKENS));
    let config = config.with(json!({
        "hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": hidden_size / 8,
    }))?;
    let numbers = |len: usize| sampling::draws(1, len).iter().map(|x| (x - 0.5) / 8.0).collect::<Vec<f32>>();
    let linears = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(0, p);
        Affine { in_features, out_features, weight: numbers(in_features * out_features), bias: None }
    });
    let originals = linears.each_ref().map(|linear| linear.weight.iter().map(|w| 1.1 * w).collect());
    let k_chunks = options.refine.k_chunks(options.bits.low(), options.bits);
    let norms = norms(&config.layers[0], hidden_size, |_, len| vec![1.0; len]);
    let layer = Layer { config: config.layers[0].clone(), norms, linears };
    let layer = Compensated { layer, originals, k_chunks };
    let (ropes, h) = (Ropes::new(&config, tokens), numbers(tokens * hidden_size));
    let seconds = fastest(|| {
        let (mut h, mut d) = (h.clone(), h.clone());
        let (trace, _) = layer.forward(&config, &ropes, 1, &mut h)?;
        layer.backward(&config, &ropes, 1, trace, &mut d);
        Ok(())
    })?;
    Ok(seconds / (tokens * sample::layer_weights(&config)) as f64)
}

/// Seconds for a token and a weight of the head, which speaks for both models and takes the derivative back.
fn learn_head(config: &ModelConfig) -> Result<f64> {
    let (n, tokens) = (config.hidden_size.min(CHANNELS), divergence::HEAD_TOKENS);
    let values: Vec<f32> = sampling::draws(1, WORDS * n).iter().map(|x| (x - 0.5) / 8.0).collect();
    let head = Dense { in_features: n, out_features: WORDS, values: values.into() };
    let (norm, truth) = (vec![1.0; n], sampling::draws(2, tokens * n));
    let speaker = Speaker::new(&head, &norm, config.stream_eps());
    let h = sampling::draws(3, tokens * n);
    let seconds = fastest(|| {
        speaker.divergence(&truth, &h);
        Ok(())
    })?;
    Ok(seconds / (tokens * WORDS * n) as f64)
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
        let seconds = fastest(|| {
            product(&self.x, &self.linear.weight, CHANNELS, &mut y);
            Ok(())
        })?;
        Ok(seconds / (TOKENS * CHANNELS * ROWS) as f64)
    }

    /// Seconds to learn from one number that enters a projection.
    fn statistics(&self) -> Result<f64> {
        let seconds = fastest(|| {
            calibrate::energy(&self.x, CHANNELS);
            calibrate::thresholds(&self.x, CHANNELS);
            Ok(())
        })?;
        Ok(seconds / (TOKENS * CHANNELS) as f64)
    }

    /// Seconds for a multiply-add of refining, from [`refine_products`], with all that is not one.
    fn fit(&self, manifest: &Manifest) -> Result<f64> {
        let (rows, bits) = (CORE_ROWS * rayon::current_num_threads(), manifest.bits.high() as usize);
        let weight = self.linear.weight.iter().copied().cycle().take(rows * CHANNELS).collect();
        let linear = Affine { out_features: rows, weight, ..self.linear.clone() };
        let mut hessian = Hessian::of(&self.x, CHANNELS);
        hessian.damp();
        let seconds = |effort: Effort| {
            fastest(|| match manifest.group_size {
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
        let seconds = fastest(|| polish::rehearse(&weight, &self.linear))?;
        Ok(seconds / (CHANNELS * ROWS) as f64)
    }

    /// Seconds to make a weight's residual.
    fn residual(&self) -> Result<f64> {
        let weight = sqllm::quantize(&self.linear, 2, &[1.0; CHANNELS])?;
        let seconds = fastest(|| super::residual(&self.linear, &weight, &[1.0; CHANNELS]).map(drop))?;
        Ok(seconds / (CHANNELS * ROWS) as f64)
    }

    /// Seconds to quantize a weight, AWQ's search included.
    fn quantize(&self, options: &Options, manifest: &Manifest) -> Result<f64> {
        let bits = manifest.bits.high() as usize;
        let awq = options.awq.then_some(&self.x[..]);
        let seconds = fastest(|| {
            let weight = match manifest.group_size {
                None => sqllm::quantize(&self.linear, bits, &calibrate::energy(&self.x, CHANNELS))?,
                Some(_) => {
                    if awq.is_some() {
                        awq::search(&self.linear, &self.x, &[1.0; CHANNELS], bits, GROUP);
                    }
                    awq::quantize(&self.linear, bits, GROUP, awq)?
                }
            };
            finish(&self.linear, &self.x, weight, &[1.0; CHANNELS]).map(drop)
        })?;
        Ok(seconds / (CHANNELS * ROWS) as f64)
    }
}

/// The shortest of three runs.
fn fastest(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::BitWidth;

    /// While a small model writes its own calibration text, all of its layers are in memory in f32.
    #[test]
    fn own_text_takes_the_memory_of_all_layers() {
        let config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
        let config = config.with(json!({
            "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8,
            "head_dim": 128, "num_hidden_layers": 64, "vocab_size": 1000,
        }));
        let config = config.unwrap();
        let memory = |calibration| {
            let options = Options {
                backend: crate::format::Format::AnyPrec,
                bits: BitWidth::try_from(3.0).unwrap(),
                group_size: None,
                awq: false,
                refine: Refine::DEFAULT,
                calibration,
                source: "random".into(),
                overwrite: false,
            };
            estimate(&config, &options).unwrap().memory_bytes
        };
        let layers = 4 * 64 * (4 + 4 + 2) * 1024 * 1024;
        let text = Calibration::Text { tokens: vec![1; 16 * 256], seq_len: 256, samples: 16, name: "t".into() };
        assert!(memory(Calibration::Sampled { seq_len: 256, samples: 16, seed: 0 }) > layers);
        assert!(memory(text) < layers / 2);
    }
}
