//! Products: which kernel, how many blocks, in how many steps.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::driver::{Arguments, Kernel, Launch};
use super::matrix::{Body, Format, Matrix, Plan, dec_words};
use super::pack::{CODE_UNIT, DENSE_UNIT, TILE};
use super::vector::Vector;
use super::{Cuda, Dtype, Norm, Scratch};
use crate::dec::CHUNK;

/// Tokens up to which a prompt is cheaper token by token than by dequantizing whole matrices.
const FEW_TOKENS: usize = 6;

/// Launch parameters of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Warps of a block.
    pub warps: usize,
    /// Units of weights that a warp has room for; one less is in flight.
    pub stages: usize,
    /// The same two for kernels that compensate as well.
    pub beside_dec: (usize, usize),
    /// Warps that compensate, beside those, in the blocks that do.
    pub dec_warps: usize,
    /// When the next kernel may start: 0 at once, 1 when this one's input is there, 2 when its weights are read.
    pub trigger: usize,
    /// Residual lines that a compensating thread has in flight.
    pub dec_flight: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { warps: 16, stages: 2, beside_dec: (12, 3), dec_warps: 8, trigger: 0, dec_flight: 4 }
    }
}

impl Tuning {
    /// Warps and stages of a kernel that does or does not compensate.
    fn beside(&self, dec: bool) -> (usize, usize) {
        if dec { self.beside_dec } else { (self.warps, self.stages) }
    }
}

/// `struct Dec` of `dec.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DecArgument {
    residual: u64,
    scales: u64,
    edges: u64,
    in_features: i32,
    out_features: i32,
    k_chunk: i32,
    n_tb: i32,
    exact: i32,
    list_chunks: i32,
}

/// `struct Gemv` of `gemv.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct GemvArgument {
    codes: u64,
    aux: u64,
    bias: u64,
    x: u64,
    x_delta: u64,
    gamma: u64,
    y: u64,
    y_delta: u64,
    dec_out: u64,
    dec_list: u64,
    dec: DecArgument,
    eps: f32,
    add: i32,
    dec_shared: i32,
}

/// `struct Packed` of `dequant.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PackedArgument {
    codes: u64,
    aux: u64,
    out: u64,
}

/// `struct Any` of `gemv_any.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AnyArgument {
    codes: u64,
    values: u64,
    centres: u64,
    bias: u64,
    in_features: i32,
    out_features: i32,
    bits: i32,
    kind: i32,
    group: i32,
    add: i32,
}

/// What enters a product.
#[derive(Clone, Copy)]
pub(super) enum Feed<'a> {
    /// The activations as they are.
    Plain,
    /// Normalized.
    Norm(&'a Norm<Vector>),
    /// Gate and up, one behind the other: `silu(gate) ⊙ up`.
    Gated,
    /// The activations as they are, and where the selection among them is.
    Listed(u64),
}

impl Feed<'_> {
    /// `INPUT` of `gemv.cuh`.
    fn define(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Norm(_) => 1,
            Self::Gated => 2,
            Self::Listed(_) => 3,
        }
    }

    fn list(self) -> u64 {
        if let Self::Listed(list) = self { list } else { 0 }
    }

    fn gamma(self) -> u64 {
        if let Self::Norm(norm) = self { norm.gamma.at() } else { 0 }
    }

    fn eps(self) -> f32 {
        if let Self::Norm(norm) = self { norm.eps } else { 0.0 }
    }
}

/// What one product of a packed matrix reads and writes.
struct Token {
    x: u64,
    x_delta: u64,
    y: u64,
    y_delta: u64,
    dec_out: u64,
    add: bool,
}

/// A launch of `gemv_*.cu`: pure arithmetic on the shape and the device's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct GemvLaunch {
    blocks: usize,
    warps: usize,
    stages: usize,
    shared: usize,
}

/// Channels of a unit, bytes of a stage (codes and what comes with them), sums of x that are kept.
fn unit(format: Format, in_features: usize) -> (usize, usize, usize) {
    let units = in_features.div_ceil(CODE_UNIT);
    match format {
        Format::AnyPrec { bits } => (CODE_UNIT, if bits == 3 { 1536 } else { 2048 } + (32 << bits), 0),
        Format::LutGemm { bits, group } => {
            (CODE_UNIT, if bits == 3 { 1536 } else { 2048 } + 32768 / group, units * (CODE_UNIT / group))
        }
        Format::Dense => (DENSE_UNIT, 2048, 0),
    }
}

fn gemv_launch(
    format: Format,
    in_features: usize,
    out_features: usize,
    (warps, most_stages): (usize, usize),
    multiprocessors: usize,
    most_shared: usize,
) -> Result<GemvLaunch> {
    let (channels, stage, sums) = unit(format, in_features);
    let tiles = out_features.div_ceil(TILE);
    let blocks = tiles.min(multiprocessors);
    let fixed = 128
        + in_features.div_ceil(channels) * channels * 2
        + sums.next_multiple_of(4) * 4
        + tiles.div_ceil(blocks) * warps * TILE * 4;
    let shared = |stages: usize| fixed + warps * stages * stage;
    let stages = (2..=most_stages).rev().find(|&s| shared(s) <= most_shared);
    let Some(stages) = stages else {
        anyhow::bail!(
            "cuda: a row of {in_features} channels needs {} bytes of shared memory, {most_shared} are there",
            shared(2)
        );
    };
    // More than half of a multiprocessor's shared memory, so that each gets one block (`gemv.cuh` says why).
    Ok(GemvLaunch { blocks, warps, stages, shared: shared(stages).max(most_shared / 2 + 1024).next_multiple_of(128) })
}

/// Channels up to which compensating warps keep all activations in shared memory, instead of a chunk each.
const STAGED: usize = 16384;

/// Whether compensating warps keep all activations: they must where they normalize them.
fn is_staged(in_features: usize, input: u8, launch: GemvLaunch, most_shared: usize) -> bool {
    input == 1 || input != 3 && in_features <= STAGED && launch.shared + in_features * 4 + (64 << 10) <= most_shared
}

/// Shared memory of compensating warps: activations (all of them, or a chunk per warp), list, sums.
fn dec_shared(plan: &Plan, threads: usize, staged: bool) -> usize {
    let x = if staged { 128 + plan.in_features.next_multiple_of(CHUNK) * 4 } else { threads / 32 * CHUNK * 4 };
    x + plan.list_chunks() * plan.k_chunk * 8 + 8 * dec_words(plan.out_features) * (threads + 1) * 4
}

impl Cuda {
    /// Compiles what products of `matrices` need under each of `tunings`, on all cores, ahead of their first use.
    ///
    /// `norm` and `dec`: whether they normalize, whether they compensate.
    ///
    /// # Errors
    /// The compiler's messages.
    pub fn compile_ahead(&self, matrices: &[&Matrix], tunings: &[Tuning], norm: bool, dec: bool) -> Result<()> {
        let numbers = self.driver.numbers();
        let mut jobs = Vec::new();
        for &matrix in matrices {
            let Body::Packed { format, .. } = matrix.body else { continue };
            for &tuning in tunings {
                let (k, r) = (matrix.in_features, matrix.out_features);
                let launch =
                    gemv_launch(format, k, r, tuning.beside(dec), numbers.multiprocessors, numbers.shared_per_block)?;
                let mut defines = vec![format!("DTYPE={}", self.options.dtype as u8)];
                defines.extend(gemv_defines(
                    format,
                    matrix,
                    launch,
                    tuning,
                    u8::from(norm),
                    dec,
                    numbers.shared_per_block,
                ));
                jobs.push((entries(format).0, defines));
            }
        }
        let compiler = &self.compiler;
        jobs.par_iter().try_for_each(|(file, defines)| compiler.cubin(file, defines).map(|_| ()))
    }

    /// Uses other launch parameters from now on.
    pub fn retune(&mut self, tuning: Tuning) {
        self.options.tuning = tuning;
    }

    /// `y (+)= W·x + bias` for `tokens` tokens; `x` is where the activations and what is to be added to them are.
    #[allow(clippy::too_many_arguments, reason = "everything that a product can ask for")]
    pub(super) fn product(
        &self,
        feed: Feed<'_>,
        matrix: &Matrix,
        plan: Option<&Plan>,
        x: (u64, u64),
        y: &mut Vector,
        tokens: usize,
        add: bool,
    ) -> Result<()> {
        let plan = plan.filter(|p| p.k_chunk > 0);
        let by_token = tokens == 1 || tokens <= FEW_TOKENS || self.blas.is_none();
        match &matrix.body {
            Body::Packed { format, .. } if tokens == 1 => {
                let (place, dec_out) = if plan.is_some() { y.free_place()? } else { (0, 0) };
                let token = Token { x: x.0, x_delta: x.1, y: y.at(), y_delta: y.delta(), dec_out, add };
                self.packed(*format, feed, matrix, plan, &token)?;
                y.settle();
                if plan.is_some() {
                    y.leave(place);
                }
                Ok(())
            }
            Body::Packed { format, .. } if by_token => {
                let width = matrix.in_features as u64 * if matches!(feed, Feed::Gated) { 8 } else { 4 };
                for t in 0..tokens as u64 {
                    let (x, at) = (x.0 + t * width, y.at() + t * matrix.out_features as u64 * 4);
                    let token = Token { x, x_delta: 0, y: at, y_delta: 0, dec_out: 0, add };
                    self.packed(*format, feed, matrix, None, &token)?;
                }
                // A compensation left beside y by an earlier token is no part of what was just written.
                if !add {
                    y.settle();
                }
                self.compensate(feed, matrix, plan, x.0, y.at(), tokens)
            }
            Body::Any { .. } if by_token => {
                let staged = self.stage(feed, x, matrix.in_features, tokens, Dtype::Float32)?;
                for t in 0..tokens as u64 {
                    let (x, at) =
                        (staged + t * matrix.in_features as u64 * 4, y.at() + t * matrix.out_features as u64 * 4);
                    self.any(matrix, x, at, add)?;
                }
                if !add {
                    y.settle();
                }
                self.dec(matrix, plan, staged, y.at(), tokens)
            }
            _ => {
                self.many(feed, matrix, x.0, y.at(), tokens, add)?;
                if !add {
                    y.settle();
                }
                self.compensate(feed, matrix, plan, x.0, y.at(), tokens)
            }
        }
    }

    /// `y += W·(silu(gate) ⊙ up) + bias`.
    pub(super) fn swiglu_product(
        &self,
        matrix: &Matrix,
        plan: Option<&Plan>,
        gu: &Vector,
        y: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        let features = matrix.in_features;
        let plan = plan.filter(|p| p.k_chunk > 0);
        // Every block of the product would have to read a compensation beside gate and up: that costs more than
        // a kernel for it. And with a kernel for it, that can select as well, a chunk per block.
        if tokens > 1 || (gu.delta() == 0 && plan.is_none()) || !matches!(matrix.body, Body::Packed { .. }) {
            return self.product(Feed::Gated, matrix, plan, (gu.at(), gu.delta()), y, tokens, true);
        }
        if let Some(plan) = plan {
            let x = self.scratch(Scratch::X, features * 4)?.pointer();
            let list = self.scratch(Scratch::List, features * 8)?.pointer();
            let argument = DecArgument::new(matrix, plan)?;
            let (at, delta) = (gu.at(), gu.delta());
            self.driver.launch(
                &self.kernel("dec.cu", "swiglu_select", &[format!("DEC_WORDS={}", dec_words(plan.out_features))])?,
                Launch::new(features.div_ceil(CHUNK), 256),
                &mut Arguments::new().with(&argument).with(&at).with(&delta).with(&x).with(&list),
            )?;
            return self.product(Feed::Listed(list), matrix, Some(plan), (x, 0), y, 1, true);
        }
        let out = self.scratch(Scratch::X, features * 4)?.pointer();
        let (at, delta, count) = (gu.at(), gu.delta(), features as i32);
        self.driver.launch(
            &self.kernel("rows.cu", "swiglu", &[])?,
            Launch::new(features.div_ceil(1024), 256),
            &mut Arguments::new().with(&at).with(&delta).with(&count).with(&out),
        )?;
        self.product(Feed::Plain, matrix, plan, (out, 0), y, 1, true)
    }

    /// One token through a packed matrix, compensated in the same launch.
    fn packed(
        &self,
        format: Format,
        feed: Feed<'_>,
        matrix: &Matrix,
        plan: Option<&Plan>,
        token: &Token,
    ) -> Result<()> {
        let Body::Packed { codes, aux, .. } = &matrix.body else {
            anyhow::bail!("cuda: not a packed matrix");
        };
        let numbers = self.driver.numbers();
        let launch = gemv_launch(
            format,
            matrix.in_features,
            matrix.out_features,
            self.options.tuning.beside(plan.is_some()),
            numbers.multiprocessors,
            numbers.shared_per_block,
        )?;
        let kernel = self.gemv_kernel(format, matrix, launch, feed.define(), plan.is_some())?;
        let dec_warps = if plan.is_some() { self.options.tuning.dec_warps } else { 0 };
        let staged = is_staged(matrix.in_features, feed.define(), launch, numbers.shared_per_block);
        let dec_shared = plan.map_or(0, |p| dec_shared(p, dec_warps * 32, staged));
        let argument = GemvArgument {
            codes: codes.pointer(),
            aux: aux.pointer(),
            bias: matrix.bias.as_ref().map_or(0, |b| b.pointer()),
            x: token.x,
            x_delta: token.x_delta,
            gamma: feed.gamma(),
            y: token.y,
            y_delta: token.y_delta,
            dec_out: token.dec_out,
            dec_list: feed.list(),
            dec: plan.map_or(Ok(DecArgument::NONE), |p| DecArgument::new(matrix, p))?,
            eps: feed.eps(),
            add: i32::from(token.add),
            dec_shared: launch.shared as i32,
        };
        let blocks = launch.blocks.max(plan.map_or(0, |p| p.n_tb));
        let (block, shared) = ((launch.warps + dec_warps) * 32, launch.shared + dec_shared);
        let launch = Launch { grid: (blocks, 1, 1), block, shared, overlap: true };
        self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument))
    }

    /// The product's kernel for a matrix, compiled once per shape.
    fn gemv_kernel(&self, format: Format, matrix: &Matrix, launch: GemvLaunch, input: u8, dec: bool) -> Result<Kernel> {
        let key = (input, dec, self.options.tuning);
        if let Some((_, kernel)) = matrix.kernels.borrow().iter().find(|(k, _)| *k == key) {
            return Ok(kernel.clone());
        }
        let defines = gemv_defines(
            format,
            matrix,
            launch,
            self.options.tuning,
            input,
            dec,
            self.driver.numbers().shared_per_block,
        );
        let (file, gemv, _) = entries(format);
        let kernel = self.kernel(file, gemv, &defines)?;
        matrix.kernels.borrow_mut().push((key, kernel.clone()));
        Ok(kernel)
    }

    /// One token through a matrix in the plain layout; `x` is staged f32.
    fn any(&self, matrix: &Matrix, x: u64, y: u64, add: bool) -> Result<()> {
        let argument = AnyArgument::new(matrix, add)?;
        self.driver.launch(
            &self.kernel("gemv_any.cu", "gemv_any", &[])?,
            Launch::new(matrix.out_features.div_ceil(8), 256),
            &mut Arguments::new().with(&argument).with(&x).with(&y),
        )
    }

    /// Activations, normalized or gated, written to work space; returns where.
    fn stage(&self, feed: Feed<'_>, x: (u64, u64), features: usize, tokens: usize, dtype: Dtype) -> Result<u64> {
        let (what, size, kind) = if dtype == Dtype::Float32 { (Scratch::X, 4, 2i32) } else { (Scratch::Half, 2, 0) };
        let out = self.scratch(what, tokens * features * size)?.pointer();
        let (gamma, eps) = (feed.gamma(), feed.eps());
        let (swiglu, features) = (i32::from(matches!(feed, Feed::Gated)), features as i32);
        self.driver.launch(
            &self.kernel("rows.cu", "stage", &[])?,
            Launch::new(tokens, 256),
            &mut Arguments::new()
                .with(&x.0)
                .with(&x.1)
                .with(&gamma)
                .with(&eps)
                .with(&swiglu)
                .with(&features)
                .with(&kind)
                .with(&out),
        )?;
        Ok(out)
    }

    /// Many tokens: the matrix is dequantized into work space and multiplied by cuBLAS.
    #[allow(clippy::too_many_arguments, reason = "everything that a product of many tokens can ask for")]
    fn many(&self, feed: Feed<'_>, matrix: &Matrix, x: u64, y: u64, tokens: usize, add: bool) -> Result<()> {
        let dtype = self.options.dtype;
        let (rows, k) = (matrix.out_features, matrix.in_features);
        // In float32 activations that are plain already are used where they are.
        let staged = if dtype == Dtype::Float32 && matches!(feed, Feed::Plain | Feed::Listed(_)) {
            x
        } else {
            self.stage(feed, (x, 0), k, tokens, dtype)?
        };
        let weights = self.dequantize(matrix)?;
        let Some(blas) = &self.blas else {
            anyhow::bail!("cuda: cuBLAS is not there");
        };
        blas.product(dtype, weights, staged, y, rows, k, tokens, add)?;
        let Some(bias) = &matrix.bias else {
            return Ok(());
        };
        let (bias, features) = (bias.pointer(), rows as i32);
        let launch = Launch { grid: (rows.div_ceil(256), tokens, 1), block: 256, shared: 0, overlap: true };
        self.driver.launch(
            &self.kernel("rows.cu", "add_bias", &[])?,
            launch,
            &mut Arguments::new().with(&y).with(&bias).with(&features),
        )
    }

    /// The matrix as rows of the backend's type, in work space; returns where.
    fn dequantize(&self, matrix: &Matrix) -> Result<u64> {
        let (rows, k) = (matrix.out_features, matrix.in_features);
        let size = if self.options.dtype == Dtype::Float32 { 4 } else { 2 };
        let out = self.scratch(Scratch::Weights, rows * k * size)?.pointer();
        match &matrix.body {
            Body::Any { .. } => {
                let argument = AnyArgument::new(matrix, false)?;
                let kernel = self.kernel("gemv_any.cu", "dequant_any", &[])?;
                let launch = Launch { overlap: false, ..Launch::new(rows, 256) };
                self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument).with(&out))?;
            }
            Body::Packed { format, codes, aux } => {
                let launch = GemvLaunch { blocks: 1, warps: 8, stages: 2, shared: 0 };
                let mut defines = shape_defines(*format, matrix, launch);
                defines.extend(["INPUT=0".to_owned(), "DEC=0".to_owned()]);
                let (file, _, dequant) = entries(*format);
                let argument = PackedArgument { codes: codes.pointer(), aux: aux.pointer(), out };
                let units = rows.div_ceil(TILE) * k.div_ceil(unit(*format, k).0);
                let kernel = self.kernel(file, dequant, &defines)?;
                let launch = Launch { overlap: false, ..Launch::new(units.div_ceil(8), 256) };
                self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument))?;
            }
        }
        Ok(out)
    }

    /// Adds the compensation of every token of a prompt.
    fn compensate(
        &self,
        feed: Feed<'_>,
        matrix: &Matrix,
        plan: Option<&Plan>,
        x: u64,
        y: u64,
        tokens: usize,
    ) -> Result<()> {
        if plan.is_none() {
            return Ok(());
        }
        let staged = match feed {
            Feed::Plain | Feed::Listed(_) => x,
            _ => self.stage(feed, (x, 0), matrix.in_features, tokens, Dtype::Float32)?,
        };
        self.dec(matrix, plan, staged, y, tokens)
    }

    /// `y += s·Σ q·x`, token by token; `x` is staged f32.
    fn dec(&self, matrix: &Matrix, plan: Option<&Plan>, x: u64, y: u64, tokens: usize) -> Result<()> {
        let Some(plan) = plan else {
            return Ok(());
        };
        let argument = DecArgument::new(matrix, plan)?;
        let kernel = self.kernel("dec.cu", "dec", &[format!("DEC_WORDS={}", dec_words(plan.out_features))])?;
        let shared = dec_shared(plan, 256, false);
        for t in 0..tokens as u64 {
            let (x, y) = (x + t * matrix.in_features as u64 * 4, y + t * matrix.out_features as u64 * 4);
            let launch = Launch { grid: (plan.n_tb, 1, 1), block: 256, shared, overlap: true };
            self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument).with(&x).with(&y))?;
        }
        Ok(())
    }

    /// The channels that a plan selects for `x`, ascending.
    pub(super) fn selected_channels(&self, plan: &Plan, x: &Vector) -> Result<Vec<u32>> {
        let launch = Launch { shared: 8 * CHUNK * 4, ..Launch::new(1, 256) };
        let list = super::Buffer::new(&self.driver, plan.selected.max(1) * 8)?;
        let chunks = plan.in_features.div_ceil(CHUNK) as i32;
        let argument = DecArgument { list_chunks: chunks, ..DecArgument::without_matrix(plan) };
        let (x_at, delta, to) = (x.at(), x.delta(), list.pointer());
        self.driver.launch(
            &self.kernel("dec.cu", "select_channels", &[format!("DEC_WORDS={}", dec_words(plan.out_features))])?,
            launch,
            &mut Arguments::new().with(&argument).with(&x_at).with(&delta).with(&to),
        )?;
        let mut pairs = vec![[0u32; 2]; plan.selected];
        list.read(&mut pairs)?;
        Ok(pairs.iter().map(|pair| pair[0]).collect())
    }
}

/// File and entry points of a format: product, dequantization.
fn entries(format: Format) -> (&'static str, &'static str, &'static str) {
    match format {
        Format::AnyPrec { .. } => ("gemv_anyprec.cu", "gemv_anyprec", "dequant_anyprec"),
        Format::LutGemm { .. } => ("gemv_lutgemm.cu", "gemv_lutgemm", "dequant_lutgemm"),
        Format::Dense => ("gemv_dense.cu", "gemv_dense", "dequant_dense"),
    }
}

fn shape_defines(format: Format, matrix: &Matrix, launch: GemvLaunch) -> Vec<String> {
    let mut defines = vec![
        format!("K={}", matrix.in_features),
        format!("R={}", matrix.out_features),
        format!("WARPS={}", launch.warps),
        format!("STAGES={}", launch.stages),
    ];
    match format {
        Format::AnyPrec { bits } => defines.push(format!("BITS={bits}")),
        Format::LutGemm { bits, group } => defines.extend([format!("BITS={bits}"), format!("GROUP={group}")]),
        Format::Dense => {}
    }
    defines
}

fn gemv_defines(
    format: Format,
    matrix: &Matrix,
    launch: GemvLaunch,
    tuning: Tuning,
    input: u8,
    dec: bool,
    most_shared: usize,
) -> Vec<String> {
    let mut defines = shape_defines(format, matrix, launch);
    let Tuning { trigger, dec_flight, dec_warps, .. } = tuning;
    defines.push(format!("INPUT={input}"));
    defines.push(format!("DEC={}", u8::from(dec)));
    defines.push(format!("TRIGGER={trigger}"));
    if dec {
        defines.push(format!("DEC_WORDS={}", dec_words(matrix.out_features)));
        defines.push(format!("DEC_FLIGHT={dec_flight}"));
        defines.push(format!("DEC_WARPS={dec_warps}"));
        let staged = is_staged(matrix.in_features, input, launch, most_shared);
        defines.push(format!("DEC_STAGED={}", u8::from(staged)));
    }
    defines
}

impl DecArgument {
    const NONE: Self = Self {
        residual: 0,
        scales: 0,
        edges: 0,
        in_features: 0,
        out_features: 0,
        k_chunk: 0,
        n_tb: 0,
        exact: 0,
        list_chunks: 0,
    };

    fn without_matrix(plan: &Plan) -> Self {
        Self {
            residual: 0,
            scales: 0,
            edges: plan.edges.pointer(),
            in_features: plan.in_features as i32,
            out_features: plan.out_features as i32,
            k_chunk: plan.k_chunk as i32,
            n_tb: plan.n_tb as i32,
            exact: i32::from(plan.exact),
            list_chunks: plan.list_chunks() as i32,
        }
    }

    fn new(matrix: &Matrix, plan: &Plan) -> Result<Self> {
        ensure!(matrix.residual.is_some(), "cuda: a matrix without residuals cannot be compensated");
        let (residual, scales) = matrix.residual.as_ref().map_or((0, 0), |(w, s)| (w.pointer(), s.pointer()));
        Ok(Self { residual, scales, ..Self::without_matrix(plan) })
    }
}

impl AnyArgument {
    fn new(matrix: &Matrix, add: bool) -> Result<Self> {
        let Body::Any { codes, values, centres, bits, kind, group } = &matrix.body else {
            anyhow::bail!("cuda: not a matrix in the plain layout");
        };
        Ok(Self {
            codes: codes.pointer(),
            values: values.pointer(),
            centres: centres.pointer(),
            bias: matrix.bias.as_ref().map_or(0, |b| b.pointer()),
            in_features: matrix.in_features as i32,
            out_features: matrix.out_features as i32,
            bits: *bits as i32,
            kind: *kind,
            group: *group as i32,
            add: i32::from(add),
        })
    }
}
