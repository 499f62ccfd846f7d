//! What a product is to be, in f64, how far off it may be, and matrices of every kind to try it on.

use decdec::backend::GemvBackend;
use decdec::backend::cuda::{Cuda, Dtype};
use decdec::format::{AnyPrec, Dense, Storage, bytes};
use decdec::random::RandomWeights;
use decdec::weights::{Linear, Weight};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::cuda_common::Noise;

fn round(value: f32, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Float16 => f16::from_f32(value).to_f64(),
        Dtype::Bfloat16 => bf16::from_f32(value).to_f64(),
        Dtype::Float32 => f64::from(value),
    }
}

/// What a product computes with: activations and weights. Codes of 3 and 4 bits (and 8 of LUT-GEMM) multiply fixed-point
/// numbers of 24 bits, those of other widths and everything with `--compile 0` go through the general kernel, whose
/// numbers are f32 but for a dense matrix's.
#[derive(Clone, Copy)]
pub(crate) struct Computes {
    pub(crate) x: Dtype,
    pub(crate) w: Dtype,
    /// Activations become fixed-point numbers.
    pub(crate) fixed: bool,
}

pub(crate) fn computes(linear: &Linear<'_>, dtype: Dtype, compile: u8) -> Computes {
    let packed = compile > 0
        && dtype != Dtype::Float32
        && match &linear.weight {
            Weight::AnyPrec(w) => matches!(w.bits(), 3 | 4),
            Weight::LutGemm(w) => matches!(w.bits(), 3 | 4 | 8),
            Weight::Dense(_) => true,
        };
    match &linear.weight {
        Weight::Dense(_) => Computes { x: if packed { dtype } else { Dtype::Float32 }, w: dtype, fixed: false },
        _ => Computes { x: Dtype::Float32, w: Dtype::Float32, fixed: packed },
    }
}

/// A row's sum in f64, on activations and weights as they are stored, and how far off a product may be.
struct Oracle {
    sum: f64,
    /// `Σ|w·x|`.
    size: f64,
    most: f64,
}

/// Of f32 sums of `depth` exact products the usual bound, doubled for the order of sums. Uniform groups add `step·code` and
/// `base·Σx`, each up to 2^bits times as large as the weights that they make. A fixed-point activation is off by half a
/// step, 2^-23 of the largest of its 256; a centroid of two bytes by half of one of its row's 32766 (65278) steps.
fn oracle(linear: &Linear<'_>, x: &[f32], computes: Computes) -> Vec<Oracle> {
    let (k, rows) = (linear.weight.in_features(), linear.weight.out_features());
    let steps: Vec<f64> = x
        .chunks(256)
        .flat_map(|unit| {
            let most = unit.iter().fold(0f32, |most, x| most.max(x.abs()));
            std::iter::repeat_n(f64::from(most) * 2f64.powi(-23), unit.len())
        })
        .collect();
    let two_bytes = computes.fixed
        && matches!(&linear.weight, Weight::AnyPrec(w) if !bytes::one_plane_is_exact(&w.lut().to_f32(), 1 << w.bits()));
    (0..rows)
        .into_par_iter()
        .map(|r| {
            let mut row = vec![0f32; k];
            linear.weight.row(r, &mut row);
            let bias = linear.bias.as_ref().map_or(0.0, |b| f64::from(b[r]));
            let (mut sum, mut size, mut most) = (bias, bias.abs(), 0.0);
            let bytes = if two_bytes { half_a_step(&linear.weight, r) } else { 0.0 };
            for ((&w, &x), &step) in row.iter().zip(x).zip(&steps) {
                let (w, x) = (round(w, computes.w), round(x, computes.x));
                sum += w * x;
                size += (w * x).abs();
                most += bytes * x.abs() + if computes.fixed { step * w.abs() } else { 0.0 };
            }
            let growth = match &linear.weight {
                Weight::LutGemm(w) => f64::from(1u32 << w.bits()),
                _ => 1.0,
            };
            Oracle { sum, size, most: most + 2.0 * k as f64 * 2f64.powi(-24) * size * growth }
        })
        .collect()
}

/// How far a centroid of a row is off where one byte does not say the matrix's codebooks, and so two do.
fn half_a_step(weight: &Weight<'_>, row: usize) -> f64 {
    let Weight::AnyPrec(w) = weight else { return 0.0 };
    let mut book = vec![0f32; 1 << w.bits()];
    w.lut().read_f32(row << w.bits(), &mut book);
    let (least, most) = book.iter().fold((f32::MAX, f32::MIN), |(l, m), &c| (l.min(c), m.max(c)));
    f64::from(most - least) / if w.bits() == 4 { 32_766.0 } else { 65_278.0 }
}

pub(crate) fn check(cuda: &Cuda, linear: &Linear<'_>, x: &[f32], computes: Computes, what: &str) -> Vec<f32> {
    let matrix = cuda.matrix(linear).unwrap();
    let (mut from, mut to) = (cuda.vector(x.len()).unwrap(), cuda.vector(linear.weight.out_features()).unwrap());
    cuda.write(x, &mut from).unwrap();
    // Poison: every number must be overwritten.
    cuda.write(&vec![f32::NAN; linear.weight.out_features()], &mut to).unwrap();
    cuda.gemv(&matrix, &from, &mut to).unwrap();
    let mut got = vec![0f32; linear.weight.out_features()];
    cuda.read(&to, &mut got).unwrap();
    let want = oracle(linear, x, computes);
    for (r, (&got, Oracle { sum, most, .. })) in got.iter().zip(&want).enumerate() {
        assert!((f64::from(got) - sum).abs() <= *most, "{what}, row {r}: {got}, {sum} ± {most} expected");
    }
    // A bound that one wrong weight does not break would prove nothing.
    let worst = want.iter().map(|row| row.most).fold(0.0, f64::max);
    let mean = want.iter().map(|row| row.size).sum::<f64>() / want.len() as f64;
    assert!(worst < 0.2 * mean, "{what}: tolerance {worst} beside sums of {mean}");
    got
}

/// The same codes with centroids that are no bytes of a grid, as other programs make them.
pub(crate) fn any_codebooks(linear: &Linear<'_>, noise: &mut Noise) -> Linear<'static> {
    let Weight::AnyPrec(w) = &linear.weight else { unreachable!() };
    let (k, rows, bits) = (w.in_features(), w.out_features(), w.bits());
    let mut codes = vec![0u8; k * rows];
    codes.chunks_exact_mut(k).enumerate().for_each(|(r, codes)| w.codes(r, codes));
    let lut: Vec<f16> = (0..rows << bits).map(|_| f16::from_f32(0.02 * noise.normal())).collect();
    assert!(!bytes::one_plane_is_exact(&lut.iter().map(|c| c.to_f32()).collect::<Vec<_>>(), 1 << bits));
    Linear::plain(Weight::AnyPrec(AnyPrec::pack(k, rows, bits, &codes, lut.into()).unwrap()))
}

/// Every format and number of bits on a shape.
pub(crate) fn linears(k: usize, rows: usize, noise: &mut Noise) -> Vec<(String, Linear<'static>)> {
    let mut all = Vec::new();
    for bits in 2..=8 {
        let w = RandomWeights::single(k, rows, Storage::ANYPREC, bits, noise.next()).unwrap();
        if matches!(bits, 3 | 4) {
            all.push((format!("anyprec {bits} {k}x{rows}, codebooks of any numbers"), any_codebooks(&w, noise)));
        }
        all.push((format!("anyprec {bits} {k}x{rows}"), w));
        for group_size in [32, 64, 128] {
            if k.is_multiple_of(group_size) && (matches!(bits, 3 | 4 | 8) || group_size == 32) {
                let w = RandomWeights::single(k, rows, Storage::lutgemm(group_size), bits, noise.next());
                all.push((format!("lutgemm {bits} g{group_size} {k}x{rows}"), w.unwrap()));
            }
        }
    }
    let values: Vec<f16> = (0..k * rows).map(|_| f16::from_f32(noise.normal())).collect();
    let dense = Dense { in_features: k, out_features: rows, values: values.into() };
    let mut dense = Linear::plain(Weight::Dense(dense));
    dense.bias = Some((0..rows).map(|_| noise.normal()).collect());
    all.push((format!("dense {k}x{rows} with bias"), dense));
    all
}
