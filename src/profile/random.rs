//! A model of the right shapes and random weights: speed does not depend on what the weights say.

use std::borrow::Cow;

use anyhow::{Result, bail};
use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::config::{ModelConfig, Projection};
use crate::format::{AnyPrec, Dense, LutGemm, Residual};
use crate::nsys::Algo;
use crate::weights::{Linear, ModelWeights, Weight};

/// Random weights of a model's shapes, made when asked for, the same for the same seed.
#[derive(Debug, Clone)]
pub struct RandomModel {
    config: ModelConfig,
    algo: Algo,
    bits: u32,
    seed: u64,
}

impl RandomModel {
    /// Random `bits`-bit weights for `config`.
    pub fn new(config: ModelConfig, algo: Algo, bits: u32, seed: u64) -> Self {
        Self { config, algo, bits, seed }
    }

    /// Numbers that depend on the seed and on what they are for.
    fn stream(&self, what: usize) -> ChaCha8Rng {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(what as u64);
        random
    }

    fn rows(&self, what: usize) -> Dense<'static> {
        let (in_features, out_features) = (self.config.hidden_size, self.config.vocab_size);
        let values = uniform(&mut self.stream(what), in_features * out_features, 0.02);
        Dense { in_features, out_features, values: values.into() }
    }

    fn weight(&self, random: &mut ChaCha8Rng, in_features: usize, out_features: usize) -> Result<Weight<'static>> {
        let bits = self.bits as usize;
        let words = Cow::Owned(words(random, in_features / 32 * bits * out_features));
        // Such weights keep the size of what passes through them.
        let size = 1.7 / (in_features as f32).sqrt();
        match self.algo {
            Algo::Sqllm => {
                let lut = uniform(random, out_features << bits, size).into();
                Ok(Weight::AnyPrec(AnyPrec::new(in_features, out_features, bits, words, lut)?))
            }
            Algo::Awq => {
                let Some(group) = [128, 64, 32].into_iter().find(|&g| in_features.is_multiple_of(g)) else {
                    bail!("{in_features} input channels, a multiple of 32 is expected");
                };
                let groups = in_features / group;
                let plane = |b: usize| f16::from_f32(size * (1 << b) as f32 / (1 << bits) as f32);
                let alpha: Vec<f16> =
                    (0..groups * bits).flat_map(|i| std::iter::repeat_n(plane(i % bits), out_features)).collect();
                let q_bias = vec![f16::ZERO; groups * out_features].into();
                let weight = LutGemm::new(in_features, out_features, bits, group, words, alpha.into(), q_bias)?;
                Ok(Weight::LutGemm(weight))
            }
        }
    }
}

impl ModelWeights for RandomModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        Ok(self.rows(0))
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        Ok((!self.config.tie_word_embeddings).then(|| self.rows(1)))
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(vec![1.0; self.config.hidden_size])
    }

    fn layer_norms(&self, _: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((vec![1.0; self.config.hidden_size], vec![1.0; self.config.hidden_size]))
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let (in_features, out_features) = self.config.shape(projection);
        let mut random = self.stream(2 + 4 * layer + projection.index());
        let weight = self.weight(&mut random, in_features, out_features)?;
        // Nibbles 1 to 15: 0 would stand for −8, which no residual has.
        let nibbles = words(&mut random, in_features * (out_features / 8)).into_iter();
        let nibbles = nibbles.map(|w| w | (!(w | w >> 1 | w >> 2 | w >> 3) & 0x1111_1111)).collect();
        let scale = f16::from_f32(0.02 / (in_features as f32).sqrt());
        let residual = Residual::new(in_features, out_features, nibbles, vec![scale; out_features].into())?;
        let thresholds = Cow::Owned(heavy_tail(in_features));
        Ok(Linear { weight, bias: None, residual: Some(residual), thresholds: Some(thresholds) })
    }

    fn bits(&self, _: usize) -> Option<u32> {
        Some(self.bits)
    }
}

/// Magnitudes as activations have them, largest first: a few far above the rest (exponential distribution's
/// quantiles).
fn heavy_tail(len: usize) -> Vec<f32> {
    (0..len).map(|i| -((i as f32 + 0.5) / len as f32).ln()).collect()
}

fn words(random: &mut ChaCha8Rng, len: usize) -> Vec<u32> {
    let mut words = vec![0u32; len];
    random.fill_bytes(bytemuck::cast_slice_mut(&mut words));
    words
}

/// Uniform in `-size..size`.
fn uniform(random: &mut ChaCha8Rng, len: usize, size: f32) -> Vec<f16> {
    let mut values = vec![0u16; len];
    random.fill_bytes(bytemuck::cast_slice_mut(&mut values));
    values.into_iter().map(|v| f16::from_f32(size * (f32::from(v) / 32768.0 - 1.0))).collect()
}
