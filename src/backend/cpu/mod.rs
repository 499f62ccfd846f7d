//! The CPU backend: f32 sums, all cores, the default where there is no GPU.
//!
//! Operations run when they are called, so "queued" and "done" are the same here.

mod attention;
mod codes;
mod decode;
mod kernels;

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rayon::prelude::*;

pub use decode::Sequence;

use self::codes::Codes;
use self::kernels::Isa;
use super::record::{ByClock, Clock};
use super::{DeviceInfo, GemvBackend};
use crate::dec::DecPlan;
use crate::format::{Floats, Residual};
use crate::weights::{Linear, Weight};

/// The processor, all of its cores.
#[derive(Debug)]
pub struct Cpu {
    info: DeviceInfo,
    isa: Isa,
}

/// A linear layer in host memory.
#[derive(Debug)]
pub struct Matrix {
    in_features: usize,
    out_features: usize,
    values: Values,
    bias: Option<Vec<f32>>, // [out_features]
    residual: Option<(Residual<'static>, Vec<f32>)>,
}

#[derive(Debug)]
enum Values {
    Dense(Floats<'static>),
    Codes(Codes),
}

/// Rows that one task takes at least: below this, waking a thread costs more than it saves.
const MIN_ROWS: usize = 32;

/// Words of residuals that are worth more than one thread, for the same reason.
const MIN_RESIDUAL_WORDS: usize = 20_000;

/// Rows that are dequantized together before a product with many tokens.
const PANEL: usize = 64;

impl Cpu {
    /// The processor.
    pub fn new() -> Self {
        let isa = Isa::detect();
        let cores = rayon::current_num_threads();
        let info = DeviceInfo {
            id: "cpu".into(),
            name: format!("{cores} threads, {}", isa.name()),
            driver: String::new(),
            max_n_tb: 64,
            max_tokens: 512,
            lookahead: 0,
        };
        Self { info, isa }
    }

    /// `y[tokens, out] = x[tokens, in] · Wᵀ + bias`, compensated if there is a plan.
    fn product(&self, matrix: &Matrix, plan: Option<&DecPlan>, x: &[f32], y: &mut [f32], tokens: usize) {
        let (x, y) = (&x[..tokens * matrix.in_features], &mut y[..tokens * matrix.out_features]);
        if tokens == 1 {
            self.product_of_one(matrix, x, y);
        } else {
            self.product_of_many(matrix, x, y, tokens);
        }
        if let Some(bias) = &matrix.bias {
            for y in y.chunks_exact_mut(matrix.out_features) {
                kernels::add_scaled(self.isa, 1.0, bias, y);
            }
        }
        match plan {
            None => {}
            Some(plan) if tokens == 1 => self.compensate(matrix, plan, x, y),
            Some(plan) => {
                let rows = x.par_chunks_exact(matrix.in_features).zip(y.par_chunks_exact_mut(matrix.out_features));
                rows.for_each(|(x, y)| self.compensate(matrix, plan, x, y));
            }
        }
    }

    fn product_of_one(&self, matrix: &Matrix, x: &[f32], y: &mut [f32]) {
        let rows = matrix.out_features.div_ceil(4 * rayon::current_num_threads()).max(MIN_ROWS);
        y.par_chunks_mut(rows).enumerate().for_each(|(task, y)| {
            for (i, y) in y.iter_mut().enumerate() {
                *y = matrix.values.dot(self.isa, task * rows + i, x);
            }
        });
    }

    fn product_of_many(&self, matrix: &Matrix, x: &[f32], y: &mut [f32], tokens: usize) {
        let (inner, outer) = (matrix.in_features, matrix.out_features);
        let target = SharedRows(y.as_mut_ptr());
        (0..outer.div_ceil(PANEL)).into_par_iter().for_each_init(
            || vec![0.0; PANEL * inner],
            |panel, p| {
                let first = p * PANEL;
                let rows = PANEL.min(outer - first);
                for (i, row) in panel.chunks_exact_mut(inner).take(rows).enumerate() {
                    matrix.values.dequantize(first + i, row);
                }
                // SAFETY: y[t, first..first + rows] of all tokens belongs to this panel alone and lies inside
                // `y`; x is [tokens, inner] and panel [PANEL, inner], with the strides given.
                unsafe {
                    gemm::gemm(
                        tokens,
                        rows,
                        inner,
                        target.get().add(first),
                        1,
                        outer as isize,
                        false,
                        x.as_ptr(),
                        1,
                        inner as isize,
                        panel.as_ptr(),
                        inner as isize,
                        1,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
            },
        );
    }

    /// `y += s · Σ q·x` over the selected channels.
    fn compensate(&self, matrix: &Matrix, plan: &DecPlan, x: &[f32], y: &mut [f32]) {
        let Some((residual, scales)) = &matrix.residual else { return };
        let mut selected = Vec::with_capacity(plan.selected());
        plan.select(x, &mut selected);
        if selected.is_empty() {
            return;
        }
        let row_words = matrix.out_features / 8;
        let add = |(stripe, y, scales): (Range<usize>, &mut [f32], &[f32])| {
            let mut sums = vec![0.0; y.len()];
            for &k in &selected {
                let words = &residual.words()[k as usize * row_words..][stripe.clone()];
                kernels::add_residual(self.isa, words, x[k as usize], &mut sums);
            }
            for ((y, s), sum) in y.iter_mut().zip(scales).zip(&sums) {
                *y += s * sum;
            }
        };
        if selected.len() * row_words < MIN_RESIDUAL_WORDS {
            return add((0..row_words, y, scales));
        }
        let mut rest = (y, scales.as_slice());
        let mut stripes = Vec::with_capacity(plan.n_tb());
        for stripe in plan.stripes() {
            let (y, scales) = (rest.0.split_at_mut(8 * stripe.len()), rest.1.split_at(8 * stripe.len()));
            stripes.push((stripe, y.0, scales.0));
            rest = (y.1, scales.1);
        }
        stripes.into_par_iter().for_each(add);
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Rows of one matrix that tasks write to, each its own columns.
struct SharedRows(*mut f32);

// SAFETY: the tasks of `product_of_many` write disjoint columns.
unsafe impl Sync for SharedRows {}

impl SharedRows {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

impl Values {
    fn dot(&self, isa: Isa, row: usize, x: &[f32]) -> f32 {
        let n = x.len();
        match self {
            Self::Dense(Floats::F32(w)) => kernels::dot(isa, &w[row * n..][..n], x),
            Self::Dense(Floats::F16(w)) => kernels::dot_f16(isa, &w[row * n..][..n], x),
            Self::Dense(Floats::Bf16(_)) => unreachable!("made f32 when uploaded"),
            Self::Codes(codes) => codes.dot(isa, row, x),
        }
    }

    fn dequantize(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Dense(w) => w.read_f32(row * out.len(), out),
            Self::Codes(codes) => codes.dequantize(row, out),
        }
    }
}

impl GemvBackend for Cpu {
    type Vector = Vec<f32>;
    type Matrix = Matrix;
    type Plan = DecPlan;
    type Recorder = ByClock;

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn vector(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn room(&self, vector: &Vec<f32>) -> usize {
        vector.len()
    }

    fn write(&self, values: &[f32], to: &mut Vec<f32>) -> Result<()> {
        to[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&self, from: &Vec<f32>, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&from[..out.len()]);
        Ok(())
    }

    fn matrix(&self, linear: &Linear<'_>) -> Result<Matrix> {
        let values = match &linear.weight {
            Weight::Dense(w) => Values::Dense(codes::dense(&w.values)),
            Weight::AnyPrec(w) => Values::Codes(Codes::anyprec(w)),
            Weight::LutGemm(w) => Values::Codes(Codes::lutgemm(w)),
        };
        let residual = linear.residual.as_ref().map(|r| {
            let (words, scales) = (r.words().to_vec().into(), r.scales().to_f32().into_owned());
            let owned = Residual::new(r.in_features(), r.out_features(), words, scales.clone().into());
            (owned.expect("already validated"), scales)
        });
        Ok(Matrix {
            in_features: linear.weight.in_features(),
            out_features: linear.weight.out_features(),
            values,
            bias: linear.bias.as_ref().map(|b| b.to_vec()),
            residual,
        })
    }

    fn plan(&self, matrix: &Matrix, plan: &DecPlan) -> Result<DecPlan> {
        let max = self.info.max_n_tb;
        ensure!(plan.n_tb() <= max, "n_tb is {}, at most {max} are allowed on {}", plan.n_tb(), self.info.id);
        ensure!(matrix.residual.is_some(), "this matrix has no residual, use k_chunk 0");
        Ok(plan.clone())
    }

    fn gemv(&self, matrix: &Matrix, x: &Vec<f32>, y: &mut Vec<f32>) -> Result<()> {
        self.product(matrix, None, x, y, 1);
        Ok(())
    }

    fn dec_gemv(&self, matrix: &Matrix, plan: &DecPlan, x: &Vec<f32>, y: &mut Vec<f32>) -> Result<()> {
        self.product(matrix, Some(plan), x, y, 1);
        Ok(())
    }

    fn select(&self, plan: &DecPlan, x: &Vec<f32>) -> Result<Vec<u32>> {
        let mut selected = Vec::new();
        plan.select(&x[..plan.in_features()], &mut selected);
        Ok(selected)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }

    fn recorder(&self, _: Clock) -> Result<ByClock> {
        Ok(ByClock::default())
    }
}
