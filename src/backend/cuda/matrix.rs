//! Linear layers on the device.

use std::cell::RefCell;

use anyhow::{Result, ensure};
use half::f16;
use rayon::prelude::*;

use super::driver::{Buffer, Kernel, Mapped};
use super::{Cuda, Dtype, Residuals, Tuning, pack};
use crate::dec::{BUCKETS, CHUNK, DecPlan, Selection};
use crate::format::{Dense, LutGemm, Residual};
use crate::weights::{Linear, Weight};

/// How a packed matrix is stored, and so which kernel multiplies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    AnyPrec { bits: usize },
    LutGemm { bits: usize, group: usize },
    Dense,
}

/// The matrix itself.
pub(super) enum Body {
    /// In the layout of `gemv_*.cu`.
    Packed { format: Format, codes: Buffer, aux: Buffer },
    /// In the layout of `gemv_any.cu`.
    Any { codes: Buffer, values: Buffer, centres: Buffer, bits: usize, kind: i32, group: usize },
}

/// Where the residual's words are.
pub(super) enum Words {
    Host(Mapped),
    Device(Buffer),
}

impl Words {
    pub(super) fn pointer(&self) -> u64 {
        match self {
            Self::Host(words) => words.pointer(),
            Self::Device(words) => words.pointer(),
        }
    }
}

/// What a compiled product depends on besides its shape.
pub(super) type Variant = (u8, bool, Tuning);

/// A linear layer on the device; its residual may be in mapped host memory.
pub struct Matrix {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) body: Body,
    pub(super) bias: Option<Buffer>,
    pub(super) residual: Option<(Words, Buffer)>,
    /// Compiled products by (input, compensates, launch parameters), made when first used.
    pub(super) kernels: RefCell<Vec<(Variant, Kernel)>>,
}

/// A compensation plan as the kernels take it.
pub struct Plan {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) k_chunk: usize,
    pub(super) n_tb: usize,
    pub(super) exact: bool,
    pub(super) edges: Buffer, // [BUCKETS] bit patterns
    pub(super) selected: usize,
}

impl Plan {
    /// Chunks whose selections fit 24 KB of shared memory together.
    pub(super) fn list_chunks(&self) -> usize {
        let chunks = self.in_features.div_ceil(CHUNK);
        (24 * 1024 / (8 * self.k_chunk.max(1))).clamp(1, chunks)
    }
}

/// Words that a compensating thread reads at once.
pub(super) fn dec_words(out_features: usize) -> usize {
    if out_features.is_multiple_of(16) { 2 } else { 1 }
}

pub(super) fn plan(cuda: &Cuda, matrix: &Matrix, plan: &DecPlan) -> Result<Plan> {
    let most = cuda.device.max_n_tb;
    ensure!(
        plan.n_tb() <= most,
        "n_tb is {}, 1 to {most} are allowed on {}, which has as many multiprocessors",
        plan.n_tb(),
        cuda.device.name
    );
    ensure!(
        matrix.residual.is_some() || plan.k_chunk() == 0,
        "k_chunk is {} for a matrix without residuals, only 0 is allowed",
        plan.k_chunk()
    );
    // Magnitudes are compared by their bits; an edge that rounding made negative is reached by all, as 0 is.
    let edges: [i32; BUCKETS] = plan.edges().map(|e| e.max(0.0).to_bits() as i32 & 0x7fff_ffff);
    Ok(Plan {
        in_features: plan.in_features(),
        out_features: plan.out_features(),
        k_chunk: plan.k_chunk(),
        n_tb: plan.n_tb(),
        exact: plan.selection() == Selection::Exact,
        edges: Buffer::of(&cuda.driver, &edges)?,
        selected: plan.selected(),
    })
}

pub(super) fn upload(cuda: &Cuda, linear: &Linear<'_>) -> Result<Matrix> {
    let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
    let body = body(cuda, &linear.weight)?;
    let bias = linear.bias.as_ref().map(|b| Buffer::of(&cuda.driver, b)).transpose()?;
    let residual = linear.residual.as_ref().map(|r| residual(cuda, r)).transpose()?;
    Ok(Matrix { in_features, out_features, body, bias, residual, kernels: RefCell::default() })
}

fn body(cuda: &Cuda, weight: &Weight<'_>) -> Result<Body> {
    let driver = &cuda.driver;
    // float32, and generic kernels, take every matrix in the plain layout.
    let plain = cuda.options.dtype == Dtype::Float32 || cuda.options.compile == 0;
    match weight {
        Weight::AnyPrec(w) if !plain && matches!(w.bits(), 3 | 4) => {
            let packed = pack::anyprec(w, cuda.options.dtype);
            packed_body(cuda, Format::AnyPrec { bits: w.bits() }, &packed)
        }
        Weight::LutGemm(w) if !plain && tuned(w) => {
            let packed = pack::lutgemm(w);
            packed_body(cuda, Format::LutGemm { bits: w.bits(), group: w.group_size() }, &packed)
        }
        Weight::Dense(w) if !plain => {
            let codes = Buffer::of(driver, &pack::dense(w, cuda.options.dtype))?;
            Ok(Body::Packed { format: Format::Dense, codes, aux: Buffer::new(driver, 0)? })
        }
        Weight::AnyPrec(w) => {
            let codes = pack::bytes(w.in_features(), w.out_features(), |row, out| w.codes(row, out));
            any_body(cuda, &codes, &w.lut().to_f32(), &[], w.bits(), 0, 1)
        }
        Weight::LutGemm(w) => {
            let codes = pack::bytes(w.in_features(), w.out_features(), |row, out| w.codes(row, out));
            let alpha = pack::by_row(w.alpha(), w.bits(), w.out_features());
            let centres = pack::by_row(w.q_bias(), 1, w.out_features());
            any_body(cuda, &codes, &alpha, &centres, w.bits(), 1, w.group_size())
        }
        Weight::Dense(w) => any_body(cuda, &[], &dense_values(cuda, w), &[], 0, 2, 1),
    }
}

fn tuned(w: &LutGemm<'_>) -> bool {
    matches!(w.bits(), 3 | 4) && matches!(w.group_size(), 32 | 64 | 128) && pack::is_uniform(w)
}

/// Dense numbers as f32, rounded to the backend's type.
fn dense_values(cuda: &Cuda, w: &Dense<'_>) -> Vec<f32> {
    let dtype = cuda.options.dtype;
    let values = w.values.to_f32();
    match dtype {
        Dtype::Float32 => values.into_owned(),
        Dtype::Float16 => values.par_iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
        Dtype::Bfloat16 => values.par_iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect(),
    }
}

fn packed_body(cuda: &Cuda, format: Format, packed: &pack::Packed) -> Result<Body> {
    let codes = Buffer::of(&cuda.driver, &packed.codes)?;
    Ok(Body::Packed { format, codes, aux: Buffer::of(&cuda.driver, &packed.aux)? })
}

fn any_body(
    cuda: &Cuda,
    codes: &[u8],
    values: &[f32],
    centres: &[f32],
    bits: usize,
    kind: i32,
    group: usize,
) -> Result<Body> {
    let driver = &cuda.driver;
    Ok(Body::Any {
        codes: Buffer::of(driver, codes)?,
        values: Buffer::of(driver, values)?,
        centres: Buffer::of(driver, centres)?,
        bits,
        kind,
        group,
    })
}

fn residual(cuda: &Cuda, residual: &Residual<'_>) -> Result<(Words, Buffer)> {
    let words = match cuda.options.residuals {
        Residuals::Device => Words::Device(Buffer::of(&cuda.driver, residual.words())?),
        Residuals::Host => {
            let words = Mapped::new(&cuda.driver, residual.words().len() * 4)?;
            words.write(residual.words());
            Words::Host(words)
        }
    };
    Ok((words, Buffer::of(&cuda.driver, &residual.scales().to_f32())?))
}
