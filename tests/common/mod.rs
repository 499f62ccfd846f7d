//! What tests of several backends share: inputs, the f64 oracle, the tolerance.

#![allow(dead_code, reason = "each test program uses a part of it")]

#[path = "../devices/mod.rs"]
pub(crate) mod devices;
pub(crate) mod oracle;

use std::borrow::Cow;

use decdec::format::{AnyPrec, Dense, Floats, LutGemm, Residual};
use decdec::sampling::draws;
use decdec::weights::{Linear, Weight};
use half::{bf16, f16};

/// How far a sum may be off: `depth` f32 additions and products of terms whose magnitudes sum to `magnitude`,
/// stored with relative error `rounding` (0 for f32, 2^-11 for f16).
pub(crate) fn tolerance(rounding: f64, want: f64, depth: usize, magnitude: f64) -> f64 {
    rounding * want.abs() + 2.0 * depth as f64 * 2f64.powi(-24) * magnitude
}

/// How far a sum in half precision may be off, as the reference makes it: `terms` products whose squares sum to
/// `squares` are rounded, scaled and added up, which rounds a partial sum every time. With terms of random sign a
/// partial sum is in the mean square no larger than `√squares`, even where the largest term comes first. A rounding is
/// at most 2^-11 of what it rounds, the mean of its square a third of that one's, and squares of independent roundings
/// add up: one standard deviation. Five are allowed, which one number in two million exceeds.
pub(crate) fn half_tolerance(terms: usize, squares: f64) -> f64 {
    5.0 * 2f64.powi(-11) * ((terms + 2) as f64 / 3.0 * squares).sqrt()
}

/// Where `got` first leaves its tolerance, with what was wanted; `None` when it never does. NaN never fits.
pub(crate) fn misfit(got: &[f32], want: &[f64], tolerance: impl Fn(usize) -> f64) -> Option<String> {
    assert_eq!(got.len(), want.len());
    (0..got.len()).find_map(|i| {
        let off = (f64::from(got[i]) - want[i]).abs();
        let fits = off <= tolerance(i);
        (!fits).then(|| format!("number {i} is {}, {} expected within {:e}", got[i], want[i], tolerance(i)))
    })
}

/// `len` numbers in `[-1, 1)`, the same for the same seed, exact in f16.
pub(crate) fn uniform(seed: u64, len: usize) -> Vec<f32> {
    draws(seed, len).into_iter().map(|u| f16::from_f32(2.0 * u - 1.0).to_f32()).collect()
}

/// `len` numbers, a few of them far larger than the rest, as activations are; exact in f16.
pub(crate) fn heavy_tailed(seed: u64, len: usize) -> Vec<f32> {
    let u = uniform(seed, 2 * len);
    u.chunks_exact(2).map(|u| f16::from_f32(u[0] / (1.02 + u[1])).to_f32()).collect()
}

/// Types of a stored table.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stored {
    F16,
    Bf16,
    F32,
}

impl Stored {
    pub(crate) const ALL: [Self; 3] = [Self::F16, Self::Bf16, Self::F32];

    /// `values`, rounded to this type.
    pub(crate) fn table(self, values: &[f32]) -> Floats<'static> {
        match self {
            Self::F16 => Floats::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            Self::Bf16 => Floats::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            Self::F32 => Floats::F32(Cow::Owned(values.to_vec())),
        }
    }
}

/// Codes of `bits` bits.
pub(crate) fn codes(seed: u64, len: usize, bits: usize) -> Vec<u8> {
    draws(seed, len).into_iter().map(|u| (u * (1u32 << bits) as f32) as u8).collect()
}

/// A dense matrix of random numbers.
pub(crate) fn dense(seed: u64, in_features: usize, out_features: usize, stored: Stored) -> Weight<'static> {
    let values = stored.table(&uniform(seed, in_features * out_features));
    Weight::Dense(Dense { in_features, out_features, values })
}

/// The identity, `features` wide.
pub(crate) fn identity(features: usize) -> Weight<'static> {
    let values = (0..features * features).map(|i| if i / features == i % features { 1.0 } else { 0.0 }).collect();
    Weight::Dense(Dense { in_features: features, out_features: features, values: Floats::F32(values) })
}

/// An AnyPrec matrix of random codes and codebooks.
pub(crate) fn anyprec(
    seed: u64,
    in_features: usize,
    out_features: usize,
    bits: usize,
    stored: Stored,
) -> Weight<'static> {
    let lut = stored.table(&uniform(seed, out_features << bits));
    let codes = codes(seed + 1, in_features * out_features, bits);
    Weight::AnyPrec(AnyPrec::pack(in_features, out_features, bits, &codes, lut).unwrap())
}

/// A LUT-GEMM matrix of random codes, steps and centres.
pub(crate) fn lutgemm(
    seed: u64,
    in_features: usize,
    out_features: usize,
    bits: usize,
    group_size: usize,
    stored: Stored,
) -> Weight<'static> {
    let groups = in_features / group_size;
    let alpha = stored.table(&uniform(seed, groups * bits * out_features));
    let q_bias = stored.table(&uniform(seed + 1, groups * out_features));
    let words = uniform(seed + 2, 2 * (in_features / 32 * bits * out_features));
    let binary = words.chunks_exact(2).map(|w| w[0].to_bits().rotate_left(13) ^ w[1].to_bits().swap_bytes()).collect();
    Weight::LutGemm(
        LutGemm::new(in_features, out_features, bits, group_size, Cow::Owned(binary), alpha, q_bias).unwrap(),
    )
}

/// A residual of random nibbles and scales.
pub(crate) fn residual(seed: u64, in_features: usize, out_features: usize, stored: Stored) -> Residual<'static> {
    let nibbles = draws(seed, in_features * out_features);
    let word = |n: &[f32]| n.iter().rev().fold(0u32, |word, u| word << 4 | (1 + (u * 15.0) as u32));
    let words = nibbles.chunks_exact(8).map(word).collect();
    let scales = uniform(seed + 1, out_features).iter().map(|s| s.abs() / 16.0).collect::<Vec<_>>();
    Residual::new(in_features, out_features, words, stored.table(&scales)).unwrap()
}

/// Thresholds as calibration on a few activations finds them.
pub(crate) fn thresholds(seed: u64, in_features: usize) -> Vec<f32> {
    let mut thresholds = vec![0.0; in_features];
    let mut scratch = vec![0.0; in_features];
    for token in 0..4 {
        let x = heavy_tailed(seed + token, in_features);
        decdec::format::threshold::update(&mut thresholds, &x, &mut scratch);
    }
    thresholds
}

/// `weight` with a residual of its shape and thresholds.
pub(crate) fn compensable(seed: u64, weight: Weight<'static>) -> Linear<'static> {
    let (in_features, out_features) = (weight.in_features(), weight.out_features());
    Linear {
        residual: Some(residual(seed, in_features, out_features, Stored::F16)),
        thresholds: Some(thresholds(seed + 2, in_features).into()),
        ..Linear::plain(weight)
    }
}
