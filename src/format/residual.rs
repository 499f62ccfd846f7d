//! Residuals: what quantization lost, itself in 4 bits with one scale per row (spec §2.3; DecDEC §4).
//!
//! Nibble `i` of word `c` of a channel is row `8·c + i`, so one channel's correction of all rows is one
//! contiguous line: that line is what crosses the host link.

use std::borrow::Cow;

use anyhow::{Result, ensure};
use half::f16;
use rayon::prelude::*;

use super::packed::{Packed, ensure_shape, packed};
use super::{Floats, Numbers, Size, Tensor};

/// Candidate scales of a row are `max|R| / 7 · j / 32`, `j = 1..=32`.
const CANDIDATES: usize = 32;

/// The quantized residual of one matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Residual<'a>(pub(crate) Packed<'a>);

packed!(Residual);

impl<'a> Residual<'a> {
    /// Takes `words` `[in_features, out_features / 8]` and `scales` `[out_features]` in row order.
    ///
    /// # Errors
    /// Shapes that do not tile, lengths that do not follow from them, or a scale that is not finite.
    pub fn new(in_features: usize, out_features: usize, words: Cow<'a, [u32]>, scales: Floats<'a>) -> Result<Self> {
        let size = Size { in_features, out_features, bits: 4, group_size: None };
        let tensors = vec![Numbers::Words(words), Numbers::Floats(scales)];
        Ok(Self(Packed::new("residual", &[Tensor::RESIDUAL, Tensor::SCALES], size, tensors)?))
    }

    /// Quantizes a residual `[out_features, in_features]`, f32: per row the candidate scale with the least
    /// squared error, used as it will be stored (f16).
    ///
    /// A row that is zero, or so small that its scale vanishes in f16, gets zeros and scale 0.
    ///
    /// # Errors
    /// Shapes that do not tile, or a value that is not finite.
    pub fn quantize(in_features: usize, out_features: usize, residual: &[f32]) -> Result<Residual<'static>> {
        Self::quantize_weighted(in_features, out_features, residual, &vec![1.0; in_features])
    }

    /// The same where an error in channel `k` counts `importance[k]` times its square.
    ///
    /// # Errors
    /// As [`Residual::quantize`]; `importance` is not `in_features` long.
    pub fn quantize_weighted(
        in_features: usize,
        out_features: usize,
        residual: &[f32],
        importance: &[f32],
    ) -> Result<Residual<'static>> {
        ensure_shape(in_features, out_features)?;
        let want = in_features * out_features;
        ensure!(residual.len() == want, "residual: {} values, {want} expected", residual.len());
        ensure!(importance.len() == in_features, "residual: {} weights, {in_features} expected", importance.len());
        if let Some(i) = residual.iter().position(|r| !r.is_finite()) {
            anyhow::bail!("residual: {} in row {}, finite values are expected", residual[i], i / in_features);
        }
        let scales: Vec<f16> = residual.par_chunks_exact(in_features).map(|row| row_scale(row, importance)).collect();
        let mut words = vec![0u32; in_features * (out_features / 8)];
        words.par_chunks_exact_mut(out_features / 8).enumerate().for_each(|(k, words)| {
            for (c, word) in words.iter_mut().enumerate() {
                for i in 0..8 {
                    let row = 8 * c + i;
                    let q = nibble(residual[row * in_features + k], scales[row].to_f32());
                    *word |= ((q + 8) as u32) << (4 * i);
                }
            }
        });
        Residual::new(in_features, out_features, Cow::Owned(words), scales.into())
    }

    /// Value −7 to 7 of channel `k`, row `row`, without its scale.
    pub fn nibble(&self, k: usize, row: usize) -> i32 {
        let word = self.words()[k * (self.out_features() / 8) + row / 8];
        (word >> (4 * (row % 8)) & 15) as i32 - 8
    }

    /// Row `row`, dequantized, written over `out` (`in_features` long).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let scale = self.scales().get(row);
        for (k, value) in out.iter_mut().enumerate() {
            *value = scale * self.nibble(k, row) as f32;
        }
    }

    /// Nibbles, `[in_features, out_features / 8]`.
    pub fn words(&self) -> &[u32] {
        self.0.words(0)
    }

    /// Scales in row order, `[out_features]`.
    pub fn scales(&self) -> &Floats<'a> {
        self.0.floats(1)
    }
}

fn nibble(value: f32, scale: f32) -> i32 {
    if scale == 0.0 { 0 } else { (value / scale).round_ties_even().clamp(-7.0, 7.0) as i32 }
}

/// The stored scale with the least squared error over a row, weighted.
fn row_scale(row: &[f32], importance: &[f32]) -> f16 {
    let max = row.iter().fold(0f32, |m, r| m.max(r.abs()));
    let mut best = (f32::INFINITY, f16::ZERO);
    for j in 1..=CANDIDATES {
        let stored = f16::from_f32(max / 7.0 * j as f32 / CANDIDATES as f32);
        let scale = stored.to_f32();
        if scale == 0.0 || !scale.is_finite() {
            continue;
        }
        let error = squared_error(row, importance, scale);
        if error < best.0 {
            best = (error, stored);
        }
    }
    best.1
}

/// Σ h·(r − q·scale)² with the nearest `q`. Eight sums side by side, and rounding by an addition, let it vectorize:
/// this runs once for every candidate and weight.
fn squared_error(row: &[f32], importance: &[f32], scale: f32) -> f32 {
    /// 1.5 · 2^23: a sum with it has no bits left behind the point, and ties go to even.
    const WHOLE: f32 = 12_582_912.0;
    let inverse = 1.0 / scale;
    let mut sums = [0f32; 8];
    for (row, importance) in row.chunks_exact(8).zip(importance.chunks_exact(8)) {
        for ((sum, &r), &h) in sums.iter_mut().zip(row).zip(importance) {
            let q = ((r * inverse).clamp(-7.0, 7.0) + WHOLE) - WHOLE;
            *sum += h * (r - q * scale) * (r - q * scale);
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_follow_the_channels_that_count() {
        // One channel is eight times as large as the others, and does not count.
        let row: Vec<f32> = (0..32).map(|k| if k == 5 { 8.0 } else { 0.3 + 0.02 * k as f32 }).collect();
        let residual = row.repeat(8);
        let importance: Vec<f32> = (0..32).map(|k| if k == 5 { 0.0 } else { 1.0 }).collect();
        let error = |quantized: &Residual<'_>| -> f32 {
            let mut got = vec![0.0; 32];
            quantized.row(3, &mut got);
            (0..32).map(|k| importance[k] * (row[k] - got[k]).powi(2)).sum()
        };
        let plain = error(&Residual::quantize(32, 8, &residual).unwrap());
        let weighted = error(&Residual::quantize_weighted(32, 8, &residual, &importance).unwrap());
        assert!(weighted < 0.2 * plain, "{weighted}, {plain}");
        assert!(Residual::quantize_weighted(32, 8, &residual, &importance[1..]).is_err());
    }
}
