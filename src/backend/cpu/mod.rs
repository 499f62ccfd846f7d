//! The CPU backend: all cores, the default where there is no GPU.
//!
//! Quantized weights and activations are multiplied as whole numbers, exactly (`octets`), full precision in f32 (`dense`).
//! Several rows go through the weights together, and each is what it is alone, bit for bit. Operations run when they are called, so "queued" and "done" are the same here.

mod attention;
mod codes;
mod decode;
mod dense;
mod digits;
mod kernels;
mod octets;
mod remembered;
mod residual;
mod team;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub use decode::Cache;

use self::codes::{Codes, Operand};
use self::octets::ROWS;
use self::residual::Lines;
use self::team::Team;
use super::record::{ByClock, Clock};
use super::{DeviceInfo, GemvBackend};
use crate::dec::DecPlan;
use crate::format::{Floats, Residual};
use crate::processor::Path;
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

/// Numbers that are worth another thread.
const MIN_NUMBERS: usize = 1 << 13;

/// Weights that a piece of work has at least: below this, handing it to a thread costs more than it saves.
const MIN_WEIGHTS: usize = 1 << 16;

/// Rows of activations that a product takes together where there are many: so many are near in the cache.
const TILE: usize = 16;

/// Rows of a matrix that one piece of work has at most, where there are many activations: they stay near too.
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
    /// `y` if `add`. Weights are read once for all tokens, and a token's sums are those of it alone.
    fn product(
        &self,
        matrix: &Matrix,
        plan: Option<(&DecPlan, usize)>,
        x: &[f32],
        y: &mut [f32],
        tokens: usize,
        add: bool,
    ) {
        let (inner, outer) = (matrix.in_features, matrix.out_features);
        let operands = self.operands(matrix, plan, &x[..tokens * inner]);
        let least = (MIN_WEIGHTS / (inner * tokens)).max(1);
        let most = if tokens > TILE { PANEL } else { outer };
        let rows = outer.div_ceil(4 * self.team.size()).max(least).min(most).next_multiple_of(ROWS);
        let target = Shared(y[..tokens * outer].as_mut_ptr());
        self.team.run(outer.div_ceil(rows), &|piece| {
            let first = piece * rows;
            let rows = rows.min(outer - first);
            let mut made = vec![0.0; tokens.min(TILE) * rows];
            for (i, operands) in operands.chunks(TILE).enumerate() {
                let made = &mut made[..operands.len() * rows];
                for (lines, _) in operands.iter().filter_map(|operand| matrix.lines(first, &operand.selected)) {
                    lines.prefetch(rows);
                }
                matrix.multiply(self.path, first, operands, made);
                for (t, (operand, made)) in operands.iter().zip(made.chunks_exact_mut(rows)).enumerate() {
                    matrix.finish(self.path, first, &operand.selected, made);
                    let at = (i * TILE + t) * outer + first;
                    // SAFETY: these rows of this token belong to this piece alone and lie inside `y`, which is borrowed.
                    let y = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), rows) };
                    if add {
                        kernels::add(self.path, made, y);
                    } else {
                        y.copy_from_slice(made);
                    }
                }
            }
        });
    }

    /// Every row of `x` as products of `matrix` take it.
    fn operands<'a>(&self, matrix: &Matrix, plan: Option<(&DecPlan, usize)>, x: &'a [f32]) -> Vec<Operand<'a>> {
        let inner = matrix.in_features;
        let plan = |t: usize| plan.filter(|plan| t < plan.1).map(|plan| plan.0);
        let of = |x| Operand { x, digits: None, selected: Vec::new() };
        let mut operands: Vec<_> = x.chunks_exact(inner).map(of).collect();
        self.team.divide(&mut operands, 1, MIN_NUMBERS / inner, &|first, operands| {
            for (t, operand) in (first..).zip(operands) {
                if let Values::Codes(codes) = &matrix.values {
                    operand.digits = codes.digits(self.path, operand.x);
                }
                operand.selected = matrix.selected(self.path, plan(t), operand.x);
            }
        });
        operands
    }
}

impl Matrix {
    /// `y[t] = W·x[t]` for the rows from `first` (a multiple of 8) on that each operand has room for in `y`.
    fn multiply(&self, path: Path, first: usize, operands: &[Operand<'_>], y: &mut [f32]) {
        match &self.values {
            Values::Codes(codes) => codes.product(path, first, operands, y),
            Values::Dense(w) => {
                let x: Vec<_> = operands.iter().map(|operand| operand.x).collect();
                dense::products(path, w, first, &x, y);
            }
        }
    }

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
        if let Some((lines, scales)) = self.lines(first, selected) {
            lines.add_to(path, scales, y);
        }
    }

    /// The residual of the selected channels, if there are any, for the rows from `first` on; and their scales.
    fn lines<'a>(&'a self, first: usize, selected: &'a [(usize, f32)]) -> Option<(Lines<'a>, &'a [f32])> {
        let (residual, scales) = self.residual.as_ref().filter(|_| !selected.is_empty())?;
        let (words, stride) = (residual.words(), self.out_features / 8);
        Some((Lines { words, stride, first: first / 8, selected }, &scales[first..]))
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// The start of what pieces of work write to, each its own numbers.
struct Shared(*mut f32);

// SAFETY: the pieces of a product write disjoint rows.
unsafe impl Sync for Shared {}

impl Shared {
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
