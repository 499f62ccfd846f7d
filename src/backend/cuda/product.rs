//! Products: which kernel, how many blocks, in how many steps.

use anyhow::Result;
use rayon::prelude::*;

use super::arguments::{AnyArgument, DecArgument, GemvArgument, PackedArgument};
use super::driver::{Arguments, Launch};
use super::kernel::Kernel;
use super::launch::{
    Beside, GemvLaunch, Input, Room, Tuning, dec_shared, entries, gemv_defines, gemv_launch, shape_defines, unit,
};
use super::matrix::{Body, Format, Matrix, Plan, dec_words};
use super::pack::TILE;
use super::vector::Vector;
use super::{Cuda, Dtype, Norm, Scratch};
use crate::backend::kernels;
use crate::config::Activation;
use crate::dec::CHUNK;

/// Tokens up to which a prompt is cheaper token by token than by dequantizing whole matrices.
const FEW_TOKENS: usize = 6;

/// What enters a product.
#[derive(Clone, Copy)]
pub(super) enum Feed<'a> {
    /// The activations as they are.
    Plain,
    /// Normalized.
    Norm(&'a Norm<Vector>),
    /// Gate and up, one behind the other: `activation(gate) ⊙ up`.
    Gated(Activation),
    /// The activations as they are, and where the selection among them is.
    Listed(u64),
}

impl Feed<'_> {
    /// `INPUT` of `gemv.cuh`.
    fn define(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Norm(_) => 1,
            Self::Gated(_) => 2,
            Self::Listed(_) => 3,
        }
    }

    /// What gate goes through, if there is one, as kernels number it.
    fn activation(self) -> Option<u32> {
        if let Self::Gated(activation) = self { Some(kernels::activation(activation)) } else { None }
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

impl Cuda {
    /// Compiles what products of `matrices` need under each of `tunings`, on all cores, ahead of their first use.
    ///
    /// `norm` and `dec`: whether they normalize, whether they compensate.
    ///
    /// # Errors
    /// The compiler's messages.
    pub fn compile_ahead(&self, matrices: &[&Matrix], tunings: &[Tuning], norm: bool, dec: bool) -> Result<()> {
        let mut jobs = Vec::new();
        for &matrix in matrices {
            let Body::Packed { format, .. } = matrix.body else { continue };
            for &tuning in tunings {
                let shape = (matrix.in_features, matrix.out_features);
                let input = u8::from(norm);
                // A short list: where there is room for any, the launch does not depend on it.
                let launch =
                    gemv_launch(format, shape, tuning, dec.then_some(Beside { input, list: 1024 }), self.room())?;
                let mut defines = vec![format!("DTYPE={}", self.options.dtype as u8)];
                defines.extend(gemv_defines(format, matrix, launch, tuning, (input, None)));
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

    /// `y (+)= W·x + bias` for `tokens` tokens, the first ones compensated if there is a plan for so many; `x` is where the
    /// activations and what is to be added to them are.
    #[allow(clippy::too_many_arguments, reason = "everything that a product can ask for")]
    pub(super) fn product(
        &self,
        feed: Feed<'_>,
        matrix: &Matrix,
        plan: Option<(&Plan, usize)>,
        x: (u64, u64),
        y: &mut Vector,
        tokens: usize,
        add: bool,
    ) -> Result<()> {
        let (plan, compensated) = plan.filter(|(p, _)| p.k_chunk > 0).unzip();
        let compensated = compensated.unwrap_or(0);
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
                let width = matrix.in_features as u64 * if matches!(feed, Feed::Gated(_)) { 8 } else { 4 };
                for t in 0..tokens as u64 {
                    let (x, at) = (x.0 + t * width, y.at() + t * matrix.out_features as u64 * 4);
                    let token = Token { x, x_delta: 0, y: at, y_delta: 0, dec_out: 0, add };
                    self.packed(*format, feed, matrix, None, &token)?;
                }
                // A compensation left beside y by an earlier token is no part of what was just written.
                if !add {
                    y.settle();
                }
                self.compensate(feed, matrix, plan, x.0, y.at(), compensated)
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
                self.dec(matrix, plan, staged, y.at(), compensated)
            }
            _ => {
                self.many(feed, matrix, x.0, y.at(), tokens, add)?;
                if !add {
                    y.settle();
                }
                self.compensate(feed, matrix, plan, x.0, y.at(), compensated)
            }
        }
    }

    /// `y (+)= W·(activation(gate) ⊙ up) + bias`.
    #[allow(clippy::too_many_arguments, reason = "everything that a product can ask for")]
    pub(super) fn gated_product(
        &self,
        activation: Activation,
        matrix: &Matrix,
        plan: Option<(&Plan, usize)>,
        gu: &Vector,
        y: &mut Vector,
        tokens: usize,
        add: bool,
    ) -> Result<()> {
        let features = matrix.in_features;
        let plan = plan.filter(|(p, _)| p.k_chunk > 0);
        // Every block of the product would have to read a compensation beside gate and up: that costs more than
        // a kernel for it. And with a kernel for it, that can select as well, a chunk per block.
        if tokens > 1 || (gu.delta() == 0 && plan.is_none()) || !matches!(matrix.body, Body::Packed { .. }) {
            return self.product(Feed::Gated(activation), matrix, plan, (gu.at(), gu.delta()), y, tokens, add);
        }
        let (at, delta, kind) = (gu.at(), gu.delta(), kernels::activation(activation));
        if let Some((plan, _)) = plan {
            let x = self.scratch(Scratch::X, features * 4)?.pointer();
            let list = self.scratch(Scratch::List, features * 8)?.pointer();
            let argument = DecArgument::new(matrix, plan)?;
            self.driver.launch(
                &self.kernel("dec.cu", "gated_select", &[format!("DEC_WORDS={}", dec_words(plan.out_features))])?,
                Launch::new(features.div_ceil(CHUNK), 256),
                &mut Arguments::new().with(&argument).with(&at).with(&delta).with(&kind).with(&x).with(&list),
            )?;
            return self.product(Feed::Listed(list), matrix, Some((plan, 1)), (x, 0), y, 1, add);
        }
        let out = self.scratch(Scratch::X, features * 4)?.pointer();
        let count = features as i32;
        self.driver.launch(
            &self.kernel("rows.cu", "gated", &[])?,
            Launch::new(features.div_ceil(1024), 256),
            &mut Arguments::new().with(&at).with(&delta).with(&kind).with(&count).with(&out),
        )?;
        self.product(Feed::Plain, matrix, plan, (out, 0), y, 1, add)
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
        let shape = (matrix.in_features, matrix.out_features);
        let dec = plan.map(|p| Beside::new(feed.define(), p));
        let launch = gemv_launch(format, shape, self.options.tuning, dec, self.room())?;
        let kernel = self.gemv_kernel(format, matrix, launch, (feed.define(), feed.activation()))?;
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
            beyond: self.beyond.pointer(),
            dec: plan.map_or(Ok(DecArgument::NONE), |p| DecArgument::new(matrix, p))?,
            eps: feed.eps(),
            add: i32::from(token.add),
            dec_shared: launch.dec_at as i32,
        };
        let blocks = launch.blocks.max(plan.map_or(0, |p| p.n_tb));
        let block = (launch.warps + launch.dec_warps) * 32;
        let launch = Launch { grid: (blocks, 1, 1), block, shared: launch.shared, ..Launch::new(1, 1) };
        self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument))
    }

    pub(super) fn room(&self) -> Room {
        let numbers = self.driver.numbers();
        Room {
            multiprocessors: numbers.multiprocessors,
            shared: numbers.shared_per_block,
            memory_rate: numbers.memory_rate,
        }
    }

    /// The product's kernel for a matrix, compiled once per shape.
    fn gemv_kernel(&self, format: Format, matrix: &Matrix, launch: GemvLaunch, input: Input) -> Result<Kernel> {
        let tuning = self.options.tuning;
        let key = (input, tuning, (launch.warps, launch.stages), (launch.dec_warps, launch.dec_staged, launch.digits));
        if let Some((_, kernel)) = matrix.kernels.borrow().iter().find(|(k, _)| *k == key) {
            return Ok(kernel.clone());
        }
        let defines = gemv_defines(format, matrix, launch, tuning, input);
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
        let (activation, features) = (feed.activation().map_or(-1, |kind| kind as i32), features as i32);
        let beyond = self.beyond.pointer();
        self.driver.launch(
            &self.kernel("rows.cu", "stage", &[])?,
            Launch::new(tokens, 256),
            &mut Arguments::new()
                .with(&x.0)
                .with(&x.1)
                .with(&gamma)
                .with(&eps)
                .with(&activation)
                .with(&features)
                .with(&kind)
                .with(&out)
                .with(&beyond),
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
        let launch = Launch { grid: (rows.div_ceil(256), tokens, 1), ..Launch::new(1, 256) };
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
            Body::Packed { format, codes, aux, lut } => {
                let mut defines = shape_defines(*format, matrix, 8, 2);
                defines.extend(["INPUT=0".to_owned(), "DEC=0".to_owned()]);
                let (file, _, dequant) = entries(*format);
                let argument = PackedArgument { codes: codes.pointer(), aux: aux.pointer(), lut: lut.pointer(), out };
                let units = rows.div_ceil(TILE) * k.div_ceil(unit(*format).0);
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
    pub(super) fn dec(&self, matrix: &Matrix, plan: Option<&Plan>, x: u64, y: u64, tokens: usize) -> Result<()> {
        let Some(plan) = plan else {
            return Ok(());
        };
        let argument = DecArgument::new(matrix, plan)?;
        let kernel = self.kernel("dec.cu", "dec", &[format!("DEC_WORDS={}", dec_words(plan.out_features))])?;
        let shared = dec_shared(plan.in_features, plan.out_features, plan.list_bytes(), 256, false);
        for t in 0..tokens as u64 {
            let (x, y) = (x + t * matrix.in_features as u64 * 4, y + t * matrix.out_features as u64 * 4);
            let launch = Launch { grid: (plan.n_tb, 1, 1), shared, ..Launch::new(1, 256) };
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
