//! From the stored formats to what `kernels-cuda/product/gemv_any.cu` reads: a byte per code, row by row, and f32.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Dtype;
use crate::format::{Dense, Floats};

/// Codes, a byte each, `[out_features, in_features]`.
pub(super) fn bytes(in_features: usize, out_features: usize, codes: impl Fn(usize, &mut [u8]) + Sync) -> Vec<u8> {
    let mut all = vec![0u8; in_features * out_features];
    all.par_chunks_exact_mut(in_features).enumerate().for_each(|(row, out)| codes(row, out));
    all
}

/// `[groups, planes, rows]` as `[rows, groups, planes]`.
pub(super) fn by_row(values: &Floats<'_>, planes: usize, rows: usize) -> Vec<f32> {
    let values = values.to_f32();
    let groups = values.len() / (planes * rows);
    let mut all = vec![0f32; values.len()];
    all.par_chunks_exact_mut(groups * planes).enumerate().for_each(|(row, out)| {
        for (i, out) in out.iter_mut().enumerate() {
            *out = values[i * rows + row];
        }
    });
    all
}

/// Dense numbers as f32, rounded to the backend's type.
pub(super) fn numbers(w: &Dense<'_>, dtype: Dtype) -> Vec<f32> {
    let values = w.values.to_f32();
    match dtype {
        Dtype::Float32 => values.into_owned(),
        Dtype::Float16 => values.par_iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
        Dtype::Bfloat16 => values.par_iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
    }
}
