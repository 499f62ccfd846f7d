//! LUT-GEMM codes: uniform steps per group of channels, after AWQ's scaling and clipping (Lin et al. 2023, §3.2;
//! the conversion to binary coding is spec §2.2).
//!
//! A channel that carries much is multiplied by `s > 1` in the matrix and divided by it in whatever feeds the
//! matrix, so that its weights lose less. `s = mean|x|^ratio`, one ratio per projection, the one with the least
//! squared output error on a sample of tokens. Then each group of each row gets the range with the least error in
//! what it adds to the output, over all tokens.
//!
//! Steps and centres are chosen as they are stored, in f16: `alpha_0 = step / 2` is rounded first, the others are
//! exact multiples of it by powers of two, and codes are taken against these.

use anyhow::Result;
use half::f16;
use rayon::prelude::*;

use super::compute::Curvature;
use super::forward::{Affine, Inputs, Layer};
use super::product::{Strided, Threads, multiply, product};
use super::refine::{AnyGrid, Effort, Groups};
use crate::config::{Attention, LayerConfig, Projection, Reads};
use crate::format::LutGemm;
use crate::weights::Weight;

/// Ratios `0, 1/20 .. 19/20` are tried.
const RATIOS: usize = 20;
/// Tokens on which they are compared.
const SAMPLE_TOKENS: usize = 512;
/// Ranges tried: all of it, and down to half of it in steps of 1/20.
const RANGES: usize = 11;
/// Rows whose errors are computed at once.
const ROW_BLOCK: usize = 1024;

/// Scales the channels of the projections, folds the inverse into what feeds them, and changes `inputs` to what they
/// are now. The layer computes the same function as before. Where the residual stream enters a projection without a
/// norm, nothing can take the inverse, and it is left as it is.
pub(crate) fn scale(layer: &mut Layer, inputs: &mut Inputs, bits: usize, group_size: usize) {
    // Folding changes rows of qkv (for o) and of gate-up (for down): those come after what they feed.
    for projection in [Projection::O, Projection::Down, Projection::Qkv, Projection::GateUp] {
        if layer.config.reads(projection) == Reads::Stream(None) {
            continue;
        }
        let x = &mut inputs[projection.index()];
        let linear = &layer.linears[projection.index()];
        let scales = search(linear, x, &magnitudes(&layer.config, projection, x, linear.in_features), bits, group_size);
        apply(layer, projection, &scales, x);
    }
}

/// Multiplies the channels of `projection` by `scales`, divides what enters it, `x`, and folds the inverse into what
/// feeds it. The layer computes the same function as before.
pub(crate) fn apply(layer: &mut Layer, projection: Projection, scales: &[f32], x: &mut [f32]) {
    let multiply = |row: &mut [f32]| row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
    layer.linears[projection.index()].weight.par_chunks_exact_mut(scales.len()).for_each(multiply);
    let divide = |row: &mut [f32]| row.iter_mut().zip(scales).for_each(|(x, s)| *x /= s);
    x.par_chunks_exact_mut(scales.len()).for_each(divide);
    fold(layer, projection, scales);
}

/// Divides the output channels of what feeds `projection`, which is more than the residual stream, by `scales`.
fn fold(layer: &mut Layer, projection: Projection, scales: &[f32]) {
    let divide = |values: &mut [f32]| values.iter_mut().zip(scales).for_each(|(v, s)| *v /= s);
    match layer.config.reads(projection) {
        Reads::Stream(None) => {}
        Reads::Stream(Some(norm)) => divide(&mut layer.norms[norm.index()]),
        // Up is a factor of what enters down, whatever gate goes through.
        Reads::Gated(_) => {
            let first = layer.config.intermediate_size();
            divide_rows(&mut layer.linears[Projection::GateUp.index()], first, scales);
        }
        // What attention puts out is a mean of values, whatever weighs them.
        Reads::Attended => {
            let Attention { num_heads, num_kv_heads, head_dim: d, .. } = *layer.config.attention();
            let shared = num_heads / num_kv_heads;
            let by_value: Vec<f32> = (0..num_kv_heads * d).map(|v| scales[v / d * shared * d + v % d]).collect();
            let first = (num_heads + num_kv_heads) * d;
            divide_rows(&mut layer.linears[Projection::Qkv.index()], first, &by_value);
        }
    }
}

/// Divides the rows from `first` on, and their biases, by `scales`.
fn divide_rows(linear: &mut Affine, first: usize, scales: &[f32]) {
    let rows = linear.weight.chunks_exact_mut(linear.in_features).skip(first);
    rows.zip(scales).for_each(|(row, s)| row.iter_mut().for_each(|w| *w /= s));
    if let Some(bias) = &mut linear.bias {
        bias[first..].iter_mut().zip(scales).for_each(|(b, s)| *b /= s);
    }
}

/// The scales with the least output error, one per input channel, for channels of these `magnitudes`.
pub(crate) fn search(linear: &Affine, x: &[f32], magnitudes: &[f32], bits: usize, group_size: usize) -> Vec<f32> {
    let inputs = linear.in_features;
    let tokens = x.len() / inputs;
    let sampled = tokens.min(SAMPLE_TOKENS);
    let sample: Vec<f32> = (0..sampled).flat_map(|i| &x[i * tokens / sampled * inputs..][..inputs]).copied().collect();
    let mut delta = vec![0.0; linear.weight.len()];
    let mut output = vec![0.0; sampled * linear.out_features];
    let mut best = (f64::INFINITY, vec![1.0; inputs]);
    for ratio in 0..RATIOS {
        let scales = normalized(magnitudes, ratio as f32 / RATIOS as f32);
        delta.par_chunks_exact_mut(inputs).enumerate().for_each(|(row, delta)| {
            rounding_error(linear.row(row), &scales, bits, group_size, delta);
        });
        product(&sample, &delta, inputs, &mut output);
        let rows: Vec<f64> = output.par_chunks(linear.out_features).map(squares).collect();
        let error: f64 = rows.iter().sum();
        if error < best.0 {
            best = (error, scales);
        }
    }
    best.1
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// Mean `|x|` of every channel; one mean for channels that must share a scale, because one value channel feeds
/// them through several query heads.
fn magnitudes(layer: &LayerConfig, projection: Projection, x: &[f32], inputs: usize) -> Vec<f32> {
    let tokens = (x.len() / inputs) as f64;
    let mut sums = vec![0f64; inputs];
    for x in x.chunks_exact(inputs) {
        sums.iter_mut().zip(x).for_each(|(s, x)| *s += f64::from(x.abs()));
    }
    if projection == Projection::O {
        let Attention { num_heads, num_kv_heads, head_dim: d, .. } = *layer.attention();
        let shared = num_heads / num_kv_heads;
        for heads in sums.chunks_exact_mut(shared * d) {
            for i in 0..d {
                let mean = heads.iter().skip(i).step_by(d).sum::<f64>() / shared as f64;
                heads.iter_mut().skip(i).step_by(d).for_each(|s| *s = mean);
            }
        }
    }
    sums.iter().map(|s| (s / tokens) as f32).collect()
}

/// `magnitude^ratio`, with the largest and the smallest equally far from 1.
fn normalized(magnitudes: &[f32], ratio: f32) -> Vec<f32> {
    let scales: Vec<f32> = magnitudes.iter().map(|m| m.max(1e-4).powf(ratio)).collect();
    let max = scales.iter().fold(f32::MIN_POSITIVE, |a, &b| a.max(b));
    let min = scales.iter().fold(f32::MAX, |a, &b| a.min(b));
    let centre = (max * min).sqrt();
    scales.iter().map(|s| s / centre).collect()
}

/// Overwrites `delta` with what plain rounding of `row · scales` does to `row`.
fn rounding_error(row: &[f32], scales: &[f32], bits: usize, group_size: usize, delta: &mut [f32]) {
    let groups = row.chunks_exact(group_size).zip(scales.chunks_exact(group_size));
    for ((row, scales), delta) in groups.zip(delta.chunks_exact_mut(group_size)) {
        delta.iter_mut().zip(row).zip(scales).for_each(|((d, w), s)| *d = w * s);
        let grid = Grid::over(range(delta), bits);
        for ((d, w), s) in delta.iter_mut().zip(row).zip(scales) {
            *d = grid.nearest(*d) / s - w;
        }
    }
}

/// Smallest and largest value.
fn range(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &v| (min.min(v), max.max(v)))
}

/// The values that the codes of one group of one row stand for: `first + step · code`.
#[derive(Debug, Clone, Copy)]
struct Grid {
    centre: f16, // q_bias
    step: f32,
    first: f32,
    last_code: f32,
}

impl Grid {
    /// `2^bits` values from `min` to `max`, as near as f16 allows.
    fn over((min, max): (f32, f32), bits: usize) -> Self {
        let last_code = ((1u32 << bits) - 1) as f32;
        let half_step = f16::from_f32((max - min) / last_code / 2.0).max(f16::MIN_POSITIVE_SUBNORMAL);
        Self::new(f16::from_f32(min / 2.0 + max / 2.0), half_step, bits)
    }

    /// `2^bits` values around `centre`, `2 · half_step` apart.
    fn new(centre: f16, half_step: f16, bits: usize) -> Self {
        let last_code = ((1u32 << bits) - 1) as f32;
        let step = 2.0 * half_step.to_f32();
        Self { centre, step, first: centre.to_f32() - half_step.to_f32() * last_code, last_code }
    }

    fn code(&self, w: f32) -> u8 {
        // Adding 2^23 rounds to a whole number, which is then in the lowest bits.
        let code = ((w - self.first) / self.step).clamp(0.0, self.last_code);
        (code + 8_388_608.0).to_bits() as u8
    }

    fn nearest(&self, w: f32) -> f32 {
        self.first + self.step * f32::from(self.code(w))
    }

    /// The zero of `w = step · (code − zero)`.
    fn zero(&self) -> f32 {
        -self.first / self.step
    }
}

/// Rounds every row to `bits`, with clipping if there are `inputs` `[tokens, in_features]` to judge it by.
pub(crate) fn quantize(
    linear: &Affine,
    bits: usize,
    group_size: usize,
    inputs: Option<&[f32]>,
) -> Result<Weight<'static>> {
    let grids = grids(linear, bits, group_size, inputs);
    let codes = codes(linear, group_size, &grids);
    pack(linear, bits, group_size, &codes, &grids)
}

/// The same against a whole Hessian: codes and grids of [`quantize`] are where [`super::refine`] begins.
pub(crate) fn refined(
    linear: &Affine,
    bits: usize,
    group_size: usize,
    inputs: Option<&[f32]>,
    hessian: &dyn Curvature,
    effort: Effort,
) -> Result<Weight<'static>> {
    let mut grids = grids(linear, bits, group_size, inputs);
    let mut codes = codes(linear, group_size, &grids);
    let mut parameters: Vec<f32> = grids.iter().flat_map(|g| [g.centre.to_f32(), g.step / 2.0]).collect();
    let groups = Groups { bits, group_size, groups: linear.in_features / group_size };
    hessian.refine(AnyGrid::Groups(groups), &linear.weight, &mut codes, &mut parameters, effort)?;
    for (grid, parameters) in grids.iter_mut().zip(parameters.chunks_exact(2)) {
        *grid = Grid::new(f16::from_f32(parameters[0]), f16::from_f32(parameters[1]), bits);
    }
    pack(linear, bits, group_size, &codes, &grids)
}

/// The grid of every group, `[out_features, in_features / group_size]`.
fn grids(linear: &Affine, bits: usize, group_size: usize, inputs: Option<&[f32]>) -> Vec<Grid> {
    let (rows, groups) = (linear.out_features, linear.in_features / group_size);
    let by_group: Vec<Vec<Grid>> = (0..groups)
        .into_par_iter()
        .map(|g| match inputs {
            Some(x) => clipped(linear, g, bits, group_size, x),
            None => {
                (0..rows).map(|row| Grid::over(range(&linear.row(row)[g * group_size..][..group_size]), bits)).collect()
            }
        })
        .collect();
    (0..rows * groups).map(|i| by_group[i % groups][i / groups]).collect()
}

/// The nearest codes, `[out_features, in_features]`.
fn codes(linear: &Affine, group_size: usize, grids: &[Grid]) -> Vec<u8> {
    let mut codes = vec![0; linear.weight.len()];
    let groups = codes.par_chunks_exact_mut(group_size).zip(linear.weight.par_chunks_exact(group_size)).zip(grids);
    groups.for_each(|((codes, weights), grid)| {
        codes.iter_mut().zip(weights).for_each(|(code, &w)| *code = grid.code(w));
    });
    codes
}

fn pack(linear: &Affine, bits: usize, group_size: usize, codes: &[u8], grids: &[Grid]) -> Result<Weight<'static>> {
    let (depth, rows) = (linear.in_features, linear.out_features);
    let groups = depth / group_size;
    let steps: Vec<f32> = grids.iter().map(|grid| grid.step).collect();
    let zeros: Vec<f32> = grids.iter().map(Grid::zero).collect();
    let exact = LutGemm::from_uniform(depth, rows, bits, group_size, codes, &steps, &zeros)?;
    // Both conversions only undo what f32 arithmetic added: the grids were made of these very f16 numbers.
    let centres: Vec<f16> = (0..groups * rows).map(|i| grids[i % rows * groups + i / rows].centre).collect();
    let alphas: Vec<f16> = exact.alpha().to_f16().into_owned();
    let binary = exact.binary().to_vec().into();
    Ok(Weight::LutGemm(LutGemm::new(depth, rows, bits, group_size, binary, alphas.into(), centres.into())?))
}

/// For group `g` of every row, the range with the least squared error of the output over all tokens.
fn clipped(linear: &Affine, g: usize, bits: usize, group_size: usize, x: &[f32]) -> Vec<Grid> {
    let depth = linear.in_features;
    let tokens = x.len() / depth;
    let x = &x[g * group_size..];
    let transposed = Strided { values: x, row: 1, column: depth };
    let plain = Strided { values: x, row: depth, column: 1 };
    let mut gram = vec![0.0; group_size * group_size];
    multiply([group_size, group_size, tokens], transposed, plain, &mut gram, Threads::One);
    let gram = Strided { values: &gram, row: group_size, column: 1 };
    let mut grids = Vec::with_capacity(linear.out_features);
    for first in (0..linear.out_features).step_by(ROW_BLOCK) {
        let rows: Vec<&[f32]> = (first..linear.out_features.min(first + ROW_BLOCK))
            .map(|row| &linear.row(row)[g * group_size..][..group_size])
            .collect();
        let mut best: Vec<(f32, Grid)> = rows.iter().map(|row| (f32::INFINITY, Grid::over(range(row), bits))).collect();
        let mut delta = vec![0.0; rows.len() * group_size];
        let mut through = vec![0.0; delta.len()];
        for candidate in 0..RANGES {
            let shrink = 1.0 - candidate as f32 / 20.0;
            let grid = |row: &[f32]| {
                let (min, max) = range(row);
                Grid::over((min * shrink, max * shrink), bits)
            };
            for (row, delta) in rows.iter().zip(delta.chunks_exact_mut(group_size)) {
                let grid = grid(row);
                delta.iter_mut().zip(*row).for_each(|(d, &w)| *d = grid.nearest(w) - w);
            }
            let errors = Strided { values: &delta, row: group_size, column: 1 };
            multiply([rows.len(), group_size, group_size], errors, gram, &mut through, Threads::One);
            let errors = delta.chunks_exact(group_size).zip(through.chunks_exact(group_size));
            for ((best, row), (delta, through)) in best.iter_mut().zip(&rows).zip(errors) {
                let error: f32 = delta.iter().zip(through).map(|(d, t)| d * t).sum();
                if error < best.0 {
                    *best = (error, grid(row));
                }
            }
        }
        grids.extend(best.into_iter().map(|(_, grid)| grid));
    }
    grids
}

#[cfg(test)]
mod tests;
