//! The CPU backend: all cores, the default where there is no GPU.
//!
//! Quantized weights and activations are multiplied as whole numbers, exactly (`octets`); full precision, and prompts,
//! in f32. Operations run when they are called, so "queued" and "done" are the same here.

mod attention;
mod codes;
mod decode;
mod digits;
mod kernels;
mod octets;
mod path;
mod team;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub use decode::Cache;

use self::codes::Codes;
use self::octets::ROWS;
use self::path::Path;
use self::team::Team;
use super::record::{ByClock, Clock};
use super::{DeviceInfo, GemvBackend};
use crate::dec::DecPlan;
use crate::format::{Floats, Residual};
use crate::weights::{Linear, Weight};

/// The processor, all of its cores.
#[derive(Debug)]
pub struct Cpu {
    info: DeviceInfo,
    path: Path,
    team: Team,
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

/// Weights that a piece of work has at least: below this, handing it to a thread costs more than it saves.
const MIN_WEIGHTS: usize = 1 << 16;

/// Tokens from which on a product dequantizes weights once for all of them.
const MANY: usize = 6;

/// Rows that are dequantized together before a product with many tokens.
const PANEL: usize = 64;

impl Cpu {
    /// The processor.
    ///
    /// # Panics
    /// `DECDEC_CPU` names instructions that it has not.
    pub fn new() -> Self {
        let (path, team) = (Path::detect(), Team::new(rayon::current_num_threads()));
        let info = DeviceInfo {
            id: "cpu".into(),
            name: format!("{} threads, {path}", team.size()),
            driver: String::new(),
            max_n_tb: 64,
            max_tokens: 512,
            lookahead: 0,
        };
        Self { info, path, team }
    }

    /// The processor as a device that takes `max_tokens` in one operation and gets `lookahead` tokens ahead: for tests of
    /// what is above it.
    #[doc(hidden)]
    pub fn that_takes(max_tokens: usize, lookahead: usize) -> Self {
        let Self { info, path, team } = Self::new();
        Self { info: DeviceInfo { max_tokens, lookahead, ..info }, path, team }
    }

    /// `y[tokens, out] = x[tokens, in] · Wᵀ + bias`, the first tokens compensated if there is a plan for so many; added to
    /// `y` if `add`.
    fn product(
        &self,
        matrix: &Matrix,
        plan: Option<(&DecPlan, usize)>,
        x: &[f32],
        y: &mut [f32],
        tokens: usize,
        add: bool,
    ) {
        let (x, y) = (&x[..tokens * matrix.in_features], &mut y[..tokens * matrix.out_features]);
        let each = x.chunks_exact(matrix.in_features).zip(y.chunks_exact_mut(matrix.out_features));
        if tokens < MANY {
            for (t, (x, y)) in each.enumerate() {
                self.product_of_one(matrix, plan.filter(|plan| t < plan.1).map(|plan| plan.0), x, y, add);
            }
            return;
        }
        let before = add.then(|| y.to_vec());
        self.product_of_many(matrix, x, y, tokens);
        self.finish_many(matrix, plan, x, y, before.as_deref());
    }

    /// Bias, compensation and what `y` is added to, token by token.
    fn finish_many(
        &self,
        matrix: &Matrix,
        plan: Option<(&DecPlan, usize)>,
        x: &[f32],
        y: &mut [f32],
        before: Option<&[f32]>,
    ) {
        let (inner, outer) = (matrix.in_features, matrix.out_features);
        if matrix.bias.is_none() && plan.is_none() && before.is_none() {
            return;
        }
        self.team.divide(y, outer, 1, &|first, y| {
            for (t, y) in (first / outer..).zip(y.chunks_exact_mut(outer)) {
                let plan = plan.filter(|plan| t < plan.1).map(|plan| plan.0);
                let selected = matrix.selected(self.path, plan, &x[t * inner..][..inner]);
                matrix.finish(self.path, 0, &selected, y);
                if let Some(before) = before {
                    kernels::add(self.path, &before[t * outer..][..outer], y);
                }
            }
        });
    }

    fn product_of_one(&self, matrix: &Matrix, plan: Option<&DecPlan>, x: &[f32], y: &mut [f32], add: bool) {
        let digits = match &matrix.values {
            Values::Codes(codes) => codes.digits(self.path, x),
            Values::Dense(_) => None,
        };
        let selected = matrix.selected(self.path, plan, x);
        let least = MIN_WEIGHTS / matrix.in_features;
        self.team.divide(y, ROWS, least, &|first, y| {
            let mut made = if add { vec![0.0; y.len()] } else { Vec::new() };
            let target = if add { &mut made[..] } else { &mut *y };
            match &matrix.values {
                Values::Codes(codes) => codes.product(self.path, first, x, digits.as_ref(), target),
                Values::Dense(w) => multiply_dense(self.path, w, first, x, target),
            }
            matrix.finish(self.path, first, &selected, target);
            if add {
                kernels::add(self.path, &made, y);
            }
        });
    }

    fn product_of_many(&self, matrix: &Matrix, x: &[f32], y: &mut [f32], tokens: usize) {
        let (inner, outer) = (matrix.in_features, matrix.out_features);
        let target = SharedRows(y.as_mut_ptr());
        self.team.run(outer.div_ceil(PANEL), &|p| {
            let first = p * PANEL;
            let rows = PANEL.min(outer - first);
            let (mut panel, mut codes) = (vec![0.0; rows * inner], vec![0; inner]);
            for (i, row) in panel.chunks_exact_mut(inner).enumerate() {
                matrix.values.dequantize(self.path, first + i, &mut codes, row);
            }
            // SAFETY: y[t, first..first + rows] of all tokens belongs to this panel alone and lies inside `y`; x is
            // [tokens, inner] and panel [rows, inner], with the strides given.
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
        });
    }
}

/// `y = W·x` for the rows from `first` on that `y` has room for.
fn multiply_dense(path: Path, w: &Floats<'_>, first: usize, x: &[f32], y: &mut [f32]) {
    let n = x.len();
    let rows = first * n..(first + y.len()) * n;
    match w {
        Floats::F32(w) => kernels::dots(path, &w[rows], n, x, y),
        Floats::F16(w) => {
            y.iter_mut().zip(w[rows].chunks_exact(n)).for_each(|(y, row)| *y = kernels::dot_f16(path, row, x));
        }
        Floats::Bf16(_) => unreachable!("made f32 when uploaded"),
    }
}

impl Matrix {
    /// The channels that are compensated, and their activations.
    fn selected(&self, path: Path, plan: Option<&DecPlan>, x: &[f32]) -> Vec<(usize, f32)> {
        let (Some(plan), Some(_)) = (plan, &self.residual) else { return Vec::new() };
        let mut selected = Vec::with_capacity(plan.selected());
        kernels::select(path, plan, x, &mut selected);
        selected.into_iter().map(|k| (k as usize, x[k as usize])).collect()
    }

    /// `y += bias + s · Σ q·x` over the selected channels, for the rows from `first` on (a multiple of 8) that `y` has.
    fn finish(&self, path: Path, first: usize, selected: &[(usize, f32)], y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            kernels::add(path, &bias[first..first + y.len()], y);
        }
        let Some((residual, scales)) = self.residual.as_ref().filter(|_| !selected.is_empty()) else { return };
        let mut sums = vec![0.0; y.len()];
        for &(k, x) in selected {
            let words = &residual.words()[k * (self.out_features / 8)..][first / 8..(first + y.len()) / 8];
            kernels::add_residual(path, words, x, &mut sums);
        }
        for ((y, s), sum) in y.iter_mut().zip(&scales[first..]).zip(&sums) {
            *y += s * sum;
        }
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Rows of one matrix that pieces write to, each its own columns.
struct SharedRows(*mut f32);

// SAFETY: the pieces of `product_of_many` write disjoint columns.
unsafe impl Sync for SharedRows {}

impl SharedRows {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

impl Values {
    /// One row, dequantized, written over `out`; `codes` is scratch as long.
    fn dequantize(&self, path: Path, row: usize, codes: &mut [u8], out: &mut [f32]) {
        match self {
            Self::Dense(w) => w.read_f32(row * out.len(), out),
            Self::Codes(w) => w.dequantize(path, row, codes, out),
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
        self.product(matrix, None, x, y, 1, false);
        Ok(())
    }

    fn dec_gemv(&self, matrix: &Matrix, plan: &DecPlan, x: &Vec<f32>, y: &mut Vec<f32>) -> Result<()> {
        self.product(matrix, Some((plan, 1)), x, y, 1, false);
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
