//! Linear layers on the device.

use std::cell::RefCell;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use half::{bf16, f16};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::host::{Mapped, Registered, Sent, Staging};
use super::kernel::Kernel;
use super::launch::Input;
use super::pack::Packing;
use super::plain;
use super::{Cuda, Dtype, Residuals, Tuning};
use crate::dec::{BUCKETS, CHUNK, DecPlan, Selection};
use crate::format::{Floats, Residual};
use crate::weights::{Linear, Weight};

/// How a packed matrix is stored, and so which kernel multiplies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    AnyPrec { bits: usize, planes: usize },
    LutGemm { bits: usize, group: usize },
    Dense,
}

/// The matrix itself.
pub(super) enum Body {
    /// In the layout of `gemv_*.cu`; `lut`, which few products read, as 16-bit numbers.
    Packed { format: Format, codes: Buffer, aux: Buffer, lut: Buffer },
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

/// What a compiled product depends on besides its shape: its input, how it was tuned, warps and stages, warps that
/// compensate and whether they keep all activations, bytes of an activation.
pub(super) type Variant = (Input, Tuning, (usize, usize), (usize, bool, usize));

/// A linear layer on the device; its residual may be in mapped host memory.
pub struct Matrix {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) body: Body,
    pub(super) bias: Option<Buffer>,
    pub(super) residual: Option<(Words, Buffer)>,
    /// Compiled products, made when first used.
    pub(super) kernels: RefCell<Vec<(Variant, Kernel)>>,
}

/// Where a chunk's first selection begins to look: as calibration has it, few channels reach the edge of this bucket, and
/// enough do. What selections find stays beside the edges.
const HINT: i32 = 17;

/// A compensation plan as the kernels take it.
pub struct Plan {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) k_chunk: usize,
    pub(super) n_tb: usize,
    pub(super) exact: bool,
    pub(super) edges: Buffer, // [BUCKETS] bit patterns, then a hint for each chunk (`stripe.cuh`)
    pub(super) selected: usize,
}

impl Plan {
    /// Chunks whose selections fit 16 KB of shared memory together.
    pub(super) fn list_chunks(&self) -> usize {
        let chunks = self.in_features.div_ceil(CHUNK);
        (16 * 1024 / (8 * self.k_chunk.max(1))).clamp(1, chunks)
    }

    /// Bytes that their list takes.
    pub(super) fn list_bytes(&self) -> usize {
        self.list_chunks() * self.k_chunk * 8
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
    let mut edges = plan.edges().map(|e| e.max(0.0).to_bits() as i32 & 0x7fff_ffff).to_vec();
    edges.resize(BUCKETS + plan.in_features().div_ceil(CHUNK), HINT);
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

/// Where the time of all uploads went.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Uploads {
    sent: Sent,
    /// Residuals in pinned memory, bytes, and the time until they were there, beside everything else.
    pinned: usize,
    pinning: Duration,
    /// What of that was not hidden behind everything else.
    for_pinned: Duration,
}

impl fmt::Display for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sent, pinned, pinning, for_pinned } = self;
        write!(
            f,
            "{} MiB to the device: packing {:.2} s, waiting for copies {:.2} s; {} MiB pinned in {:.2} s, of which {:.2} s \
             were waited for",
            sent.bytes >> 20,
            sent.filling.as_secs_f64(),
            sent.waiting.as_secs_f64(),
            pinned >> 20,
            pinning.as_secs_f64(),
            for_pinned.as_secs_f64()
        )
    }
}

/// Sends a matrix to the device; its residual is copied and pinned at the same time.
pub(super) fn upload(cuda: &Cuda, linear: &Linear<'_>) -> Result<Matrix> {
    let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
    ensure_holds(cuda.options.dtype, &linear.weight)?;
    let context = cuda.driver.context();
    let on_host = linear.residual.as_ref().filter(|_| cuda.options.residuals == Residuals::Host);
    let words = on_host.map(Residual::words);
    let (body, pinned) = thread::scope(|scope| {
        let pinned = words.map(|words| {
            scope.spawn(move || {
                let start = Instant::now();
                (Registered::copy_of(context, words), start.elapsed())
            })
        });
        let body = body(cuda, &linear.weight);
        let start = Instant::now();
        let pinned = pinned.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let mut uploads = cuda.uploads.borrow_mut();
        uploads.for_pinned += start.elapsed();
        if let (Some(words), Some((_, time))) = (words, &pinned) {
            uploads.pinned += size_of_val(words);
            uploads.pinning += *time;
        }
        (body, pinned.map(|(registered, _)| registered))
    });
    let body = body?;
    let bias = linear.bias.as_ref().map(|b| Buffer::of(&cuda.driver, b)).transpose()?;
    let mut residual = None;
    if let Some(r) = &linear.residual {
        let words = match pinned {
            Some(registered) => Words::Host(Mapped::adopt(&cuda.driver, registered, r.words())?),
            None => Words::Device(sent_residual(cuda, r)?),
        };
        residual = Some((words, Buffer::of(&cuda.driver, &r.scales().to_f32())?));
    }
    Ok(Matrix { in_features, out_features, body, bias, residual, kernels: RefCell::default() })
}

/// Checks that the type of products holds every weight: a number that float16 took for its last, 65504, would be a wrong
/// one, and of weights there is no telling how wrong.
fn ensure_holds(dtype: Dtype, weight: &Weight<'_>) -> Result<()> {
    if dtype != Dtype::Float16 {
        return Ok(());
    }
    let most = match weight {
        Weight::AnyPrec(w) => largest(w.lut()),
        Weight::LutGemm(w) => largest(w.q_bias()) + w.bits() as f32 * largest(w.alpha()),
        Weight::Dense(w) => largest(&w.values),
    };
    ensure!(most <= f16::MAX.to_f32(), "a weight of {most:e}, float16 holds up to {}, use --dtype bfloat16", f16::MAX);
    Ok(())
}

/// The largest size of numbers, NaN above all; 0 where they are float16 already.
fn largest(values: &Floats<'_>) -> f32 {
    // Sizes compare as their bits do.
    match values {
        Floats::F16(_) => 0.0,
        Floats::Bf16(v) => bf16::from_bits(v.par_iter().map(|v| v.to_bits() & 0x7fff).max().unwrap_or(0)).to_f32(),
        Floats::F32(v) => f32::from_bits(v.par_iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0)),
    }
}

fn body(cuda: &Cuda, weight: &Weight<'_>) -> Result<Body> {
    let dtype = cuda.options.dtype;
    // float32, and generic kernels, take every matrix in the plain layout.
    let generic = dtype == Dtype::Float32 || cuda.options.compile == 0;
    let packing = Packing::of(weight, dtype).filter(|_| !generic);
    if let Some((format, packing)) = packing.and_then(|packing| Some((packing.format()?, packing))) {
        return packed_body(cuda, format, &packing);
    }
    match weight {
        Weight::AnyPrec(w) => {
            let codes = plain::bytes(w.in_features(), w.out_features(), |row, out| w.codes(row, out));
            any_body(cuda, &codes, &w.lut().to_f32(), &[], w.bits(), 0, 1)
        }
        Weight::LutGemm(w) => {
            let codes = plain::bytes(w.in_features(), w.out_features(), |row, out| w.codes(row, out));
            let alpha = plain::by_row(w.alpha(), w.bits(), w.out_features());
            let centres = plain::by_row(w.q_bias(), 1, w.out_features());
            any_body(cuda, &codes, &alpha, &centres, w.bits(), 1, w.group_size())
        }
        Weight::Dense(w) => any_body(cuda, &[], &plain::numbers(w, dtype), &[], 0, 2, 1),
    }
}

fn packed_body(cuda: &Cuda, format: Format, packing: &Packing<'_>) -> Result<Body> {
    let tiles = packing.tiles();
    let codes = Buffer::new(&cuda.driver, tiles * packing.code_bytes())?;
    let aux = Buffer::new(&cuda.driver, tiles * packing.aux_bytes())?;
    let lut = Buffer::new(&cuda.driver, tiles * packing.lut_bytes())?;
    send(cuda, &codes, packing.code_bytes(), tiles, |tile, out| packing.codes(tile, out))?;
    if packing.aux_bytes() > 0 {
        send(cuda, &aux, packing.aux_bytes(), tiles, |tile, out| packing.aux(tile, out))?;
    }
    if packing.lut_bytes() > 0 {
        send(cuda, &lut, packing.lut_bytes(), tiles, |tile, out| packing.lut(tile, out))?;
    }
    Ok(Body::Packed { format, codes, aux, lut })
}

/// Through the staging buffers, which the first upload allocates.
fn send(cuda: &Cuda, to: &Buffer, piece: usize, count: usize, fill: impl Fn(usize, &mut [u8]) + Sync) -> Result<()> {
    if cuda.staging.get().is_none() {
        let _ = cuda.staging.set(Staging::new(&cuda.driver)?);
    }
    let sent = cuda.staging.get().expect("set above").send(to, piece, count, fill)?;
    let total = &mut cuda.uploads.borrow_mut().sent;
    total.bytes += sent.bytes;
    total.filling += sent.filling;
    total.waiting += sent.waiting;
    Ok(())
}

/// A residual in device memory, a channel's line at a time.
fn sent_residual(cuda: &Cuda, residual: &Residual<'_>) -> Result<Buffer> {
    let words = residual.words();
    let line = residual.out_features() / 2;
    let to = Buffer::new(&cuda.driver, size_of_val(words))?;
    send(cuda, &to, line, residual.in_features(), |k, out| {
        out.copy_from_slice(&bytemuck::cast_slice(words)[k * line..(k + 1) * line]);
    })?;
    Ok(to)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Dense;

    #[test]
    fn weights_beyond_float16_are_refused() {
        let weight = |values| Weight::Dense(Dense { in_features: 4, out_features: 1, values });
        let bits = |value: f32| Floats::Bf16(vec![bf16::from_f32(value); 4].into());
        for value in [65280.0, -65280.0, 0.0] {
            ensure_holds(Dtype::Float16, &weight(bits(value))).unwrap();
        }
        ensure_holds(Dtype::Float16, &weight(vec![0.0, 1.0, -65504.0, 3.0].into())).unwrap();
        for values in [bits(-65536.0), vec![0.0, 65505.0, 1.0, 2.0].into(), vec![0.0, 1.0, f32::NAN, 2.0].into()] {
            let error = ensure_holds(Dtype::Float16, &weight(values.clone())).unwrap_err().to_string();
            assert!(error.contains("65504") && error.contains("--dtype bfloat16"), "{error}");
            ensure_holds(Dtype::Bfloat16, &weight(values)).unwrap();
        }
    }
}
