//! Calibration: the texts' activations, layer by layer, and what is learned from them about each projection.

use std::borrow::Cow;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::compute::{Compute, Entered};
use super::forward::{Placed, Ropes};
use crate::config::ModelConfig;
use crate::format::{Dense, Floats};
use crate::progress::Progress;

/// Tokens that go through a layer at once: enough to keep the products busy.
pub(super) const BATCH_TOKENS: usize = 2048;

/// Tokens summed up by one thread; fixed, so that sums do not depend on the number of threads.
const SUM_TOKENS: usize = 256;

/// Texts of equal length on their way through the model.
#[derive(Debug, Clone)]
pub(crate) struct Activations {
    pub(crate) h: Vec<f32>, // [texts, tokens, hidden_size]
    pub(crate) tokens: usize,
    hidden: usize,
}

impl Activations {
    /// The embeddings of `ids`, texts of `tokens` ids each.
    ///
    /// # Errors
    /// An id that the model does not have.
    pub(crate) fn embed(config: &ModelConfig, embedding: &Dense<'_>, ids: &[u32], tokens: usize) -> Result<Self> {
        let factor = config.embedding_factor();
        let hidden = embedding.in_features;
        let mut h = vec![0.0; ids.len() * hidden];
        for (&id, h) in ids.iter().zip(h.chunks_exact_mut(hidden)) {
            ensure!(
                (id as usize) < embedding.out_features,
                "calibration token {id}, ids below {} are expected: is the tokenizer the model's own?",
                embedding.out_features
            );
            embedding.values.read_f32(id as usize * hidden, h);
            h.iter_mut().for_each(|h| *h *= factor);
        }
        Ok(Self { h, tokens, hidden })
    }

    /// Activations that were kept before; texts of `tokens` each.
    pub(crate) fn resume(h: Vec<f32>, tokens: usize, hidden: usize) -> Self {
        Self { h, tokens, hidden }
    }

    /// Takes all texts through one layer; what enters its projections goes to `entered`, one for each, or none.
    ///
    /// `progress` grows by one per token.
    ///
    /// # Errors
    /// [`super::Interrupted`], activations that overflow, and those of the device.
    #[allow(clippy::too_many_arguments, reason = "a layer, where it computes, who watches and who waits")]
    pub(crate) fn advance(
        &mut self,
        on: &dyn Compute,
        config: &ModelConfig,
        layer: &Placed<'_>,
        ropes: &Ropes,
        entered: &mut [Box<dyn Entered + '_>],
        stop: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let texts = (on.batch_tokens() / self.tokens).max(1);
        for h in self.h.chunks_mut(texts * self.tokens * self.hidden) {
            super::ensure_running(stop)?;
            let texts = h.len() / self.hidden / self.tokens;
            let mut cache = on.cache(layer.config(), texts, self.tokens)?;
            let mut stream = on.put(h.to_vec())?;
            let inputs = layer.forward(on, config, ropes, &mut cache, texts, &mut stream)?;
            h.copy_from_slice(&on.take(stream)?);
            // The weights are finite: what is not comes of numbers too large for f32 on the way.
            Floats::F32(Cow::Borrowed(h)).ensure_finite("what leaves it is too large for single precision: number")?;
            entered.iter_mut().zip(inputs).try_for_each(|(entered, x)| entered.add(x))?;
            progress.inc((texts * self.tokens) as u64);
        }
        Ok(())
    }
}

/// Σx² of every channel over the tokens of `x` `[tokens, in_features]`, and where a channel never carried
/// anything a trace of the mean, so that its weights still count for something.
pub(crate) fn energy(x: &[f32], in_features: usize) -> Vec<f32> {
    let parts: Vec<Vec<f64>> = x
        .par_chunks(SUM_TOKENS * in_features)
        .map(|x| {
            let mut sums = vec![0.0; in_features];
            for x in x.chunks_exact(in_features) {
                sums.iter_mut().zip(x).for_each(|(s, &x)| *s += f64::from(x) * f64::from(x));
            }
            sums
        })
        .collect();
    let sums: Vec<f64> = (0..in_features).map(|k| parts.iter().map(|p| p[k]).sum()).collect();
    floored(&sums)
}

/// Energies from sums of squares, as [`energy`] says of silent channels.
pub(crate) fn floored(sums: &[f64]) -> Vec<f32> {
    let floor = (sums.iter().sum::<f64>() / sums.len() as f64 * 1e-6).max(1e-30);
    sums.iter().map(|s| s.max(floor) as f32).collect()
}

/// Thresholds (spec §2.4): entry `r` is the maximum over the tokens of `x` of the (r+1)-th largest `|x|`.
pub(crate) fn thresholds(x: &[f32], in_features: usize) -> Vec<f32> {
    // Magnitudes are compared as bits: the order is the same, and integers sort several times faster.
    let parts: Vec<Vec<u32>> = x
        .par_chunks(SUM_TOKENS * in_features)
        .map(|x| {
            let mut largest = vec![0u32; in_features];
            let mut sorted = vec![0u32; in_features];
            for x in x.chunks_exact(in_features) {
                sorted.iter_mut().zip(x).for_each(|(s, x)| *s = x.to_bits() & 0x7fff_ffff);
                sorted.sort_unstable();
                largest.iter_mut().zip(sorted.iter().rev()).for_each(|(l, &s)| *l = (*l).max(s));
            }
            largest
        })
        .collect();
    (0..in_features).map(|r| f32::from_bits(parts.iter().map(|p| p[r]).max().unwrap_or(0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::threshold;

    #[test]
    fn thresholds_and_energies_are_the_plain_definitions() {
        let in_features = 37;
        let x: Vec<f32> = (0..600 * in_features).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 37.0).collect();
        let (mut want, mut scratch) = (vec![0.0; in_features], vec![0.0; in_features]);
        for x in x.chunks_exact(in_features) {
            threshold::update(&mut want, x, &mut scratch);
        }
        assert_eq!(thresholds(&x, in_features), want);
        let mut shifted = x.clone();
        shifted[5] = 1e6;
        assert_ne!(thresholds(&shifted, in_features), want);

        let energies = energy(&x, in_features);
        for (k, got) in energies.iter().enumerate() {
            let want: f64 = x.chunks_exact(in_features).map(|x| f64::from(x[k]).powi(2)).sum();
            assert!((f64::from(*got) - want).abs() <= want * f64::from(f32::EPSILON), "{k}: {got}, {want}");
        }
    }

    #[test]
    fn a_silent_channel_still_counts() {
        assert!(energy(&[0.0, 2.0, 0.0, 2.0], 2)[0] > 0.0);
        assert!(energy(&[0.0, 0.0], 2)[0] > 0.0);
    }
}
