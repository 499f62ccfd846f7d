//! Models of random numbers, for measuring speed where no weights can be had.
//!
//! Shapes, formats and bytes are those of a real model, and the numbers are scaled so that activations stay
//! near 1 from layer to layer; what comes out is noise. A few layers are drawn and used in turn.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::format::{Dense, Floats, Format, Numbers, Residual, Size, Storage, bytes};
use crate::weights::{Linear, ModelWeights, Weight};

/// Layers that differ; the others repeat them.
const DISTINCT: usize = 2;

/// Random numbers that long tensors are filled with, again and again from another place.
const POOL: usize = 1 << 20;

/// A model of random numbers, in memory.
#[derive(Debug)]
pub struct RandomWeights {
    config: ModelConfig,
    bits: usize,
    layers: Vec<[Linear<'static>; 4]>,
    embedding: Vec<f16>,
    head: Option<Vec<f16>>,
}

impl RandomWeights {
    /// Draws a model of the shapes of `config` with weights of `bits` bits and residuals.
    ///
    /// # Errors
    /// Shapes or bits that the format does not take.
    pub fn new(config: ModelConfig, storage: Storage, bits: usize, seed: u64) -> Result<Self> {
        ensure!((2..=8).contains(&bits), "--bitwidth is {bits}, 2 to 8 are allowed for a random model");
        let pool = Pool::new(seed);
        let layers = (0..DISTINCT.min(config.layers.len()))
            .map(|layer| {
                let [qkv, o, gu, d] = Projection::ALL.map(|p| {
                    let (in_features, out_features) = config.shape(layer, p);
                    linear(&pool, layer * 4 + p.index(), in_features, out_features, storage, bits)
                });
                Ok([qkv?, o?, gu?, d?])
            })
            .collect::<Result<_>>()?;
        let table = |salt| pool.halves(config.vocab_size * config.hidden_size, salt, 1.0);
        let embedding = table(1000);
        let scale = 3.0 / (config.hidden_size as f32).sqrt();
        let head =
            (!config.tie_word_embeddings).then(|| pool.halves(config.vocab_size * config.hidden_size, 2000, scale));
        Ok(Self { config, bits, layers, embedding, head })
    }

    /// One projection by itself, for measuring products.
    ///
    /// # Errors
    /// Shapes or bits that the format does not take.
    pub fn single(
        in_features: usize,
        out_features: usize,
        storage: Storage,
        bits: usize,
        seed: u64,
    ) -> Result<Linear<'static>> {
        linear(&Pool::new(seed), 0, in_features, out_features, storage, bits)
    }

    fn dense<'a>(&self, values: &'a [f16]) -> Dense<'a> {
        Dense {
            in_features: self.config.hidden_size,
            out_features: self.config.vocab_size,
            values: Floats::F16(Cow::Borrowed(values)),
        }
    }
}

impl ModelWeights for RandomWeights {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        Ok(self.dense(&self.embedding))
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        Ok(self.head.as_ref().map(|values| self.dense(values)))
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(vec![1.0; self.config.hidden_size])
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        Ok(vec![1.0; self.config.layers[layer].norm_len(norm, self.config.hidden_size)])
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        Ok(self.layers[layer % self.layers.len()][projection.index()].borrowed())
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        Some(self.bits as u32)
    }
}

/// Draws one projection of a random model: weights, residuals, thresholds. `salt` tells projections apart.
///
/// # Errors
/// Shapes or bits that the format does not take.
fn linear(
    pool: &Pool,
    salt: usize,
    in_features: usize,
    out_features: usize,
    storage: Storage,
    bits: usize,
) -> Result<Linear<'static>> {
    let spread = 1.0 / (in_features as f32).sqrt();
    let levels = 1usize << bits;
    // Evenly spaced levels of standard deviation `spread`.
    let step = spread * 12f32.sqrt() / levels as f32;
    let words = pool.words(in_features / 32 * bits * out_features, salt * 8);
    let jitter = |count: usize| pool.floats(count, salt * 8 + 1);
    let tables: Vec<Floats<'_>> = match storage.format {
        Format::AnyPrec => {
            let mut lut = jitter(out_features * levels);
            lut.par_chunks_exact_mut(levels).for_each(|row| {
                for (i, c) in row.iter_mut().enumerate() {
                    *c = step * (i as f32 - (levels - 1) as f32 / 2.0 + 0.3 * *c);
                }
                // As quantization stores them.
                bytes::round(row);
            });
            vec![lut.into_iter().map(f16::from_f32).collect::<Vec<f16>>().into()]
        }
        Format::LutGemm => {
            let groups = in_features / storage.group_size.context("LUT-GEMM needs a group size")?;
            let jitter = jitter(groups * out_features);
            let scale = |g: usize, row: usize| step * (1.0 + 0.2 * jitter[g * out_features + row]);
            let alpha: Vec<f32> = (0..groups * bits * out_features)
                .into_par_iter()
                .map(|i| {
                    let (g, b, row) = (i / (bits * out_features), i / out_features % bits, i % out_features);
                    scale(g, row) * (1u32 << b) as f32 / 2.0
                })
                .collect();
            let q_bias: Vec<f32> = jitter.iter().map(|j| step * 0.1 * j).collect();
            vec![alpha.into(), q_bias.into()]
        }
    };
    let size = Size { in_features, out_features, bits, group_size: storage.group_size };
    let tensors = std::iter::once(Numbers::Words(words.into())).chain(tables.into_iter().map(Numbers::Floats));
    let weight = Weight::from_tensors(Some(storage.format), size, tensors.collect())?;
    let mut nibbles = pool.words(in_features * (out_features / 8), salt * 8 + 2);
    // −8 is no residual: nibbles of 0 become 1.
    nibbles.par_iter_mut().for_each(|w| *w |= !(*w | *w >> 1 | *w >> 2 | *w >> 3) & 0x1111_1111);
    let scales: Vec<f16> = (0..out_features).map(|_| f16::from_f32(step / 14.0)).collect();
    let residual = Residual::new(in_features, out_features, Cow::Owned(nibbles), scales.into())?;
    // The order statistics of a normal distribution, roughly.
    let thresholds = (0..in_features).map(|r| (2.0 * (in_features as f32 / (r + 1) as f32).ln()).sqrt()).collect();
    Ok(Linear { weight, bias: None, residual: Some(residual), thresholds: Some(Cow::Owned(thresholds)) })
}

/// Random words; long tensors are runs of them.
struct Pool(Vec<u32>);

impl Pool {
    fn new(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        Self((0..POOL).map(|_| random.next_u32()).collect())
    }

    /// `len` words, starting somewhere that depends on `salt`.
    fn words(&self, len: usize, salt: usize) -> Vec<u32> {
        let mut words = vec![0; len];
        words.par_chunks_mut(POOL / 4).enumerate().for_each(|(i, out)| {
            let start = (salt * 7919 + i * 104_729) % (POOL - POOL / 4);
            out.copy_from_slice(&self.0[start..start + out.len()]);
        });
        words
    }

    /// `len` numbers, uniform in `[-1, 1)`.
    fn floats(&self, len: usize, salt: usize) -> Vec<f32> {
        self.words(len, salt).par_iter().map(|&w| (w >> 8) as f32 / (1u32 << 23) as f32 - 1.0).collect()
    }

    /// `len` numbers, uniform in `[-scale, scale)`, as f16.
    fn halves(&self, len: usize, salt: usize, scale: f32) -> Vec<f16> {
        let pool: Vec<f16> = self.floats(POOL, salt).iter().map(|v| f16::from_f32(v * scale)).collect();
        let mut values = vec![f16::ZERO; len];
        values.par_chunks_mut(POOL / 4).enumerate().for_each(|(i, out)| {
            let start = (i * 104_729) % (POOL - POOL / 4);
            out.copy_from_slice(&pool[start..start + out.len()]);
        });
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Benchmarks multiply by what quantization stores.
    #[test]
    fn codebooks_are_bytes() {
        for (bits, bytes) in [(3, true), (4, true), (5, false)] {
            let linear = RandomWeights::single(64, 256, Storage::ANYPREC, bits, 7).unwrap();
            let Weight::AnyPrec(weight) = linear.weight else { panic!("AnyPrec is asked for") };
            let lut = weight.lut().to_f32();
            assert_eq!(bytes::one_plane_is_exact(&lut, 1 << bits), bytes, "{bits} bits");
            // Rows differ, and centroids of a row do.
            let rows: Vec<&[f32]> = lut.chunks_exact(1 << bits).collect();
            assert!(rows.windows(2).all(|pair| pair[0] != pair[1] && pair[0][0] != pair[0][1]), "{bits} bits");
        }
    }
}
