//! The stages of a quantization, each of which finds on disk what an interrupted run has done of it.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::calibrate::Activations;
use super::compute::{Compute, Entered, Watch};
use super::forward::{Inputs, Layer, Placed, Ropes};
use super::openings::Openings;
use super::storable::ensure_storable;
use super::{Norms, Options, Refine, fit, mixed, polish, sample};
use crate::checkpoint::{CheckpointWriter, Manifest};
use crate::config::Projection;
use crate::fingerprint::Fingerprint;
use crate::progress::Progress;
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights};

/// File of the calibration tokens: u32, little-endian.
const TOKENS: &str = "tokens.bin";
/// File of the activations before the next layer: its index as u64, then f32, all little-endian.
const ACTIVATIONS: &str = "activations.bin";

/// File of the bits chosen for every layer.
const CHOSEN: &str = "chosen.json";

/// Quantizing a layer takes about as long as this many tokens through it, whatever its size.
const LAYER_WORK: u64 = 8192;

/// What leaves a layer is kept when so much time has passed: an interrupted run makes no more than that again.
const KEEP_EVERY: Duration = Duration::from_secs(20);

/// A quantization on its way.
pub(super) struct Job<'a> {
    pub(super) on: &'a dyn Compute,
    pub(super) source: &'a dyn ModelWeights,
    pub(super) options: &'a Options,
    pub(super) manifest: &'a Manifest,
    pub(super) writer: &'a CheckpointWriter,
    pub(super) stop: &'a AtomicBool,
    pub(super) progress: &'a dyn Progress,
}

/// A layer as it is stored: norms, and projections in the order of [`Projection::ALL`].
pub(super) type Made<'a> = (Norms, [Linear<'a>; 4]);

impl Job<'_> {
    /// Length of the progress bar: tokens that go through a layer, summed over layers, and what else takes as long.
    pub(super) fn work(&self) -> u64 {
        let layers = self.source.config().layers.len() as u64;
        let mixed = if self.manifest.bits.is_mixed() { mixed::work(&self.options.calibration, layers) } else { 0 };
        let learning = if self.trains_codebooks() { self.learning_work() } else { 0 };
        self.sampling_work() + layers * (self.tokens() + self.layer_work()) + mixed + learning
    }

    /// Learning codebooks, in tokens through a layer.
    pub(super) fn learning_work(&self) -> u64 {
        let calibration = &self.options.calibration;
        let tokens = polish::steps(calibration.samples()) * calibration.seq_len;
        // In the end all texts pass once more.
        (polish::STEP_PASSES * tokens as u64 + self.tokens()) * self.source.config().layers.len() as u64
    }

    /// True if codebooks are learned when all layers are quantized.
    pub(super) fn trains_codebooks(&self) -> bool {
        self.options.refine != Refine::None && self.manifest.group_size.is_none()
    }

    /// Bits of every layer, for mixed widths, and what they were chosen by; chosen before any layer is written anew.
    pub(super) fn chosen(&self, ids: &[u32]) -> Result<(Vec<u32>, Vec<f64>)> {
        if let Some(chosen) = self.writer.read_file(CHOSEN).and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(chosen);
        }
        let chosen = mixed::choose(self, ids)?;
        self.writer.write_file(CHOSEN, &serde_json::to_vec(&chosen)?)?;
        Ok(chosen)
    }

    /// Length of the progress bar while every layer is made once, whatever its width.
    pub(super) fn work_once(&self) -> u64 {
        self.sampling_work() + self.source.config().layers.len() as u64 * (self.tokens() + LAYER_WORK)
    }

    fn sampling_work(&self) -> u64 {
        let calibration = &self.options.calibration;
        let tokens = calibration.own.map_or(0, |own| own.samples * calibration.seq_len);
        sample::SAMPLED_TOKEN * (tokens * self.source.config().layers.len()) as u64
    }

    fn tokens(&self) -> u64 {
        self.options.calibration.tokens() as u64
    }

    /// Quantizing a layer, in tokens that would go through it in that time.
    fn layer_work(&self) -> u64 {
        let widths = if self.manifest.bits.is_mixed() { 2 } else { 1 };
        widths * LAYER_WORK
    }

    /// Makes every layer that is not finished, once: `make` gets its index, the layer in full precision and what
    /// entered its projections; `bits` are those of every layer.
    pub(super) fn layers_once<'a>(
        &self,
        ids: &[u32],
        bits: &[u32],
        make: impl Fn(usize, &Layer, &[Box<dyn Entered + '_>; 4]) -> Result<Made<'a>>,
    ) -> Result<()> {
        let widths = |index: usize, _: &Layer| Ok(vec![bits[index]]);
        self.each_layer(ids, (LAYER_WORK, true), widths, |index, _, layer, entered| make(index, layer, entered))
    }

    /// Makes every layer that is not finished in each of its `widths`; `work` is the progress that a layer is worth, and
    /// `all` says whether to keep all that enters it.
    fn each_layer<'a>(
        &self,
        ids: &[u32],
        (work, all): (u64, bool),
        widths: impl Fn(usize, &Layer) -> Result<Vec<u32>>,
        make: impl Fn(usize, u32, &Layer, &[Box<dyn Entered + '_>; 4]) -> Result<Made<'a>>,
    ) -> Result<()> {
        let config = self.source.config();
        let ropes = Ropes::new(config, self.options.calibration.seq_len);
        let (first, mut activations) = self.activations(ids)?;
        let mut kept = Instant::now();
        self.progress.inc(first as u64 * (self.tokens() + work));
        self.progress.reset_eta();
        for index in first..config.layers.len() {
            let of_layer = || format!("layer {index}");
            self.progress.set_message(&format!("layer {} of {}", index + 1, config.layers.len()));
            let start = Instant::now();
            let layer = Layer::read(self.source, index).with_context(of_layer)?;
            let read = start.elapsed();
            let mut missing = widths(index, &layer)?;
            missing.retain(|&bits| !self.writer.has_layer(index, bits));
            let mut entered = Vec::new();
            if !missing.is_empty() {
                for projection in Projection::ALL {
                    entered.push(self.entered(&layer, projection, all)?);
                }
            }
            let placed = Placed::new(self.on, &layer).with_context(of_layer)?;
            let advanced =
                activations.advance(self.on, config, &placed, &ropes, &mut entered, self.stop, self.progress);
            advanced.with_context(of_layer)?;
            // A device needs the room.
            drop(placed);
            let through = start.elapsed();
            if let Ok(entered) = <[_; 4]>::try_from(entered) {
                for bits in missing {
                    super::ensure_running(self.stop)?;
                    let (norms, linears) = make(index, bits, &layer, &entered).with_context(of_layer)?;
                    self.writer.write_layer(config, (index, bits), &norms, &linears)?;
                }
            }
            tracing::debug!(
                "layer {index}: read {read:.1?}, texts through {through:.1?}, made {:.1?}",
                start.elapsed()
            );
            self.progress.inc(work);
            // What leaves a layer may be gigabytes, and takes little time to make again.
            if index + 1 == config.layers.len() || kept.elapsed() > KEEP_EVERY {
                self.keep(index + 1, &activations)?;
                kept = Instant::now();
            }
        }
        Ok(())
    }

    /// What will be watched of what enters a projection.
    pub(super) fn entered(&self, layer: &Layer, projection: Projection, all: bool) -> Result<Box<dyn Entered + '_>> {
        let bits = self.manifest.bits;
        let k_chunk = |own| self.options.refine.k_chunks(own, bits)[projection.index()];
        let mut k_chunks: Vec<usize> = Vec::new();
        if self.options.refine != Refine::None {
            k_chunks.extend((bits.low()..=bits.high()).map(k_chunk));
            k_chunks.dedup();
        }
        self.on.entered(layer.linear(projection).in_features, &Watch { k_chunks, alone: fit::ALONE, all })
    }

    /// The same where all `inputs` of a layer are at hand.
    pub(super) fn enter(&self, layer: &Layer, inputs: Inputs) -> Result<[Box<dyn Entered + '_>; 4]> {
        let each = Projection::ALL.into_iter().zip(inputs).map(|(projection, x)| {
            let mut entered = self.entered(layer, projection, true)?;
            entered.add(self.on.put(x)?)?;
            Ok(entered)
        });
        let each: Vec<_> = each.collect::<Result<_>>()?;
        each.try_into().ok().context("four projections")
    }

    /// The calibration tokens, windows of `seq_len`, one after the other: those of the text, then the model's own, which
    /// `texts` says how to begin.
    pub(super) fn calibration(&self, texts: &TextFiles) -> Result<Vec<u32>> {
        let calibration = &self.options.calibration;
        let seq_len = calibration.seq_len;
        let given = calibration.text.iter().flat_map(|text| &text.tokens[..calibration.given() * seq_len]);
        let mut ids: Vec<u32> = given.copied().collect();
        let Some(own) = calibration.own.filter(|own| own.samples > 0) else { return Ok(ids) };
        self.progress.set_message("writing own text");
        let kept = self.writer.read_file(TOKENS).filter(|bytes| bytes.len() == 4 * own.samples * seq_len);
        if let Some(bytes) = kept {
            self.progress.inc(self.sampling_work());
            ids.extend(bytemuck::pod_collect_to_vec::<u8, u32>(&bytes));
            return Ok(ids);
        }
        let openings = Openings::new(texts, self.source.config());
        let written = sample::sample(self.on, self.source, &openings, own, seq_len, self.stop, self.progress)?;
        self.writer.write_file(TOKENS, bytemuck::cast_slice(&written))?;
        ids.extend(written);
        Ok(ids)
    }

    /// Quantizes every layer that is not finished, at every bit width that is needed.
    pub(super) fn layers(&self, ids: &[u32]) -> Result<()> {
        let widths = |index: usize, layer: &Layer| {
            ensure_storable(self.source.config(), index, layer)?;
            Ok((self.manifest.bits.low()..=self.manifest.bits.high()).collect())
        };
        let all = self.options.awq && self.manifest.group_size.is_some();
        self.each_layer(ids, (self.layer_work(), all), widths, |_, bits, layer, entered| {
            super::quantize_layer(self, bits, layer, entered)
        })
    }

    /// The next layer and what enters it.
    pub(super) fn activations(&self, ids: &[u32]) -> Result<(usize, Activations)> {
        let config = self.source.config();
        let (tokens, hidden) = (self.options.calibration.seq_len, config.hidden_size);
        let kept = self.writer.read_file(ACTIVATIONS).filter(|bytes| bytes.len() == 8 + 4 * ids.len() * hidden);
        if let Some((index, h)) = kept.as_deref().and_then(|bytes| bytes.split_first_chunk::<8>()) {
            let index = u64::from_le_bytes(*index) as usize;
            return Ok((index, Activations::resume(bytemuck::pod_collect_to_vec(h), tokens, hidden)));
        }
        Ok((0, Activations::embed(config, &self.source.embedding()?, ids, tokens)?))
    }

    /// Keeps what enters layer `next`.
    pub(super) fn keep(&self, next: usize, activations: &Activations) -> Result<()> {
        let mut bytes = (next as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&activations.h));
        self.writer.write_file(ACTIVATIONS, &bytes)
    }
}

/// Everything that a result depends on, in words and in a hash: unfinished work with another key is of no use.
pub(super) fn key(
    source: &dyn ModelWeights,
    texts: &TextFiles,
    manifest: &Manifest,
    options: &Options,
    stop: &AtomicBool,
) -> Result<String> {
    let mut fingerprint = Fingerprint::default();
    fingerprint.model(source, stop)?;
    fingerprint.texts(texts);
    if let Some(text) = &options.calibration.text {
        fingerprint.numbers(b"calibration", &text.tokens);
    }
    let manifest = serde_json::to_string(manifest)?;
    let version = env!("CARGO_PKG_VERSION");
    let Options { awq, refine, .. } = options;
    Ok(format!("quantize\n{version}\n{manifest}\nawq {awq}\nrefine {refine:?}\n{}\n", fingerprint.digits()))
}
