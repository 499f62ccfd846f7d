//! What quantization asks of a GPU: products by cuBLAS, all else by the kernels of `kernels-cuda/quantize`.
//!
//! - `pool`: memory that is used again; `memory`: tensors and matrices in it; here: which kernel does what
//! - `attention`: over whole texts, forwards and backwards
//! - `entered`: what is learned of what enters a projection; `fit`: codes and parameters against its Hessian; `regress`: what the taken channels say of the others
//! - `trained`: projections whose codebooks are trained; `head`: what comes behind the last layer; `rates`: for estimates
//!
//! One stream, no atomic sums: the same device gives the same bits for the same work.

mod attention;
mod entered;
mod fit;
mod head;
mod memory;
mod pool;
mod rates;
mod regress;
mod trained;

use std::any::Any;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, Result};

use super::Cuda;
use super::blas::{Blas, Operand, Precision};
use super::driver::{Arguments, Launch};
use crate::backend::kernels;
use crate::config::{Activation, Attention, LayerConfig, ModelConfig, Projection};
use crate::quantize::compute::{Cache, Coded, Compute, Entered, Head, Matrix, Selected, Short, Tensor, Trained, Watch};
use crate::quantize::forward::{Affine, Ropes};
use crate::quantize::gpu::{SAMPLED_CACHE, USUAL, batch_tokens};
use crate::quantize::head::LmHead;
use memory::{Floats, Mask, Placed, Shorts, Stored};
use pool::{Pool, Room};

/// Bytes that a layer needs beside what stays of others, of any model up to 70B with windows of some thousand tokens.
const WORK: usize = 14_000_000_000;
/// Device memory that others may need meanwhile: the driver, cuBLAS, what draws the screen.
const SPARED: usize = 1 << 30;

/// A GPU that quantization computes on.
pub(crate) struct Quantizer<'c> {
    cuda: &'c Cuda,
    blas: &'c Blas,
    pool: Rc<Pool>,
    constants: RefCell<Vec<(Vec<f32>, Rc<Floats>)>>,
    projections: RefCell<HashMap<(usize, usize), Rc<trained::Kept>>>,
    /// Tokens that go through a layer at once.
    batch: usize,
    /// Bytes that trained projections may still take where they stay.
    kept: Cell<usize>,
    /// Work space for one matrix in f32.
    wide: RefCell<Option<Rc<Floats>>>,
}

fn wrap(floats: Floats) -> Tensor {
    Tensor::Device(Box::new(floats))
}

/// The numbers of a tensor of this device.
fn of(tensor: &Tensor) -> &Floats {
    let Tensor::Device(any) = tensor else { panic!("a tensor of this device is expected") };
    any.downcast_ref().expect("f32 numbers of this device")
}

fn mask(selected: &Selected) -> &Mask {
    let Selected::Device(any) = selected else { panic!("a selection of this device is expected") };
    any.downcast_ref().expect("a selection of this device")
}

/// Weights in all projections of a model.
fn weights_of(config: &ModelConfig) -> usize {
    (0..config.layers.len()).flat_map(|layer| config.shapes(layer)).map(|(n, m)| n * m).sum()
}

/// Whether any of `n` channels is taken.
fn takes(n: usize, k_chunk: usize) -> bool {
    let chunk = crate::dec::CHUNK;
    k_chunk * n.min(chunk) >= chunk
}

/// Blocks of 256 threads for one thread an element.
fn blocks(count: usize) -> (usize, usize) {
    (count.div_ceil(256), 256)
}

/// Threads for a row of so many numbers.
fn threads(width: usize) -> usize {
    width.next_multiple_of(32).clamp(32, 256)
}

impl Cuda {
    /// This device, to quantize models of `config`; `limit` bytes of memory at most, where there is one.
    ///
    /// # Errors
    /// No cuBLAS, with the way to get it; a lost device.
    pub(crate) fn quantizer(&self, config: &ModelConfig, limit: Option<usize>) -> Result<Quantizer<'_>> {
        let blas = self.blas.as_ref().context(
            "cuda: quantization multiplies with cuBLAS, which does not start here: install the CUDA toolkit or the Python \
             package nvidia-cublas and name its directory in DECDEC_CUDA_LIBRARIES, or use --device cpu",
        )?;
        let free = self.driver.memory()?.0.saturating_sub(SPARED);
        let most = limit.unwrap_or(free).min(free);
        // In training every layer is needed twice a step: codes, and what compensated channels are multiplied by.
        let kept = 5 * weights_of(config);
        let all = kept + WORK <= most;
        let kept = if all { kept } else { USUAL.min(most).saturating_sub(WORK) };
        Ok(Quantizer {
            cuda: self,
            blas,
            pool: Pool::new(&self.driver, [if all { most } else { USUAL.min(most) }, most]),
            batch: batch_tokens(config),
            kept: Cell::new(kept),
            constants: RefCell::default(),
            projections: RefCell::default(),
            wide: RefCell::default(),
        })
    }
}

impl Quantizer<'_> {
    /// The most device memory that was held at once, bytes.
    pub(crate) fn peak(&self) -> usize {
        self.pool.most()
    }

    /// Queues a kernel of so many blocks and threads.
    fn launch(
        &self,
        file: &str,
        entry: &str,
        defines: &[String],
        (blocks, threads): (usize, usize),
        arguments: Arguments<'_>,
    ) -> Result<()> {
        self.launch_shaped(file, entry, defines, (blocks, 1), threads, 0, arguments)
    }

    /// The same with a grid of two dimensions and shared memory.
    #[allow(clippy::too_many_arguments, reason = "a launch has as many")]
    fn launch_shaped(
        &self,
        file: &str,
        entry: &str,
        defines: &[String],
        grid: (usize, usize),
        threads: usize,
        shared: usize,
        mut arguments: Arguments<'_>,
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let kernel = self.cuda.kernel(file, entry, defines)?;
        // Kernels of quantization begin when the one before has ended.
        let launch = Launch { grid: (grid.0, grid.1, 1), shared, overlap: false, ..Launch::new(1, threads) };
        self.cuda.driver.launch(&kernel, launch, &mut arguments)
    }

    fn multiply(
        &self,
        sizes: [usize; 3],
        operands: [Operand; 3],
        factors: (f32, f32),
        count: usize,
        precision: Precision,
    ) -> Result<()> {
        self.blas.multiply(sizes, operands, factors, count, precision)
    }

    /// `[tokens, rows]` with `bias` in every row, to which a product is added; any numbers without one, and the factor by
    /// which they count in the product that comes.
    fn begun(&self, tokens: usize, rows: usize, bias: Option<&Floats>) -> Result<(Floats, f32)> {
        let y = self.floats(tokens * rows)?;
        let Some(bias) = bias else { return Ok((y, 0.0)) };
        let (to, from, features, all) = (y.at(), bias.at(), rows as i32, y.len as i64);
        let arguments = Arguments::new().with(&to).with(&from).with(&features).with(&all);
        self.launch("elements.cu", "spread", &[], blocks(y.len), arguments)?;
        Ok((y, 1.0))
    }

    /// RMSNorm of pieces of γ's length from one address to another: `[rows, pieces in a row, numbers of a row, the first's
    /// place]`.
    fn norm_pieces(&self, from: u64, to: u64, gamma: &[f32], eps: f32, view: [usize; 4]) -> Result<()> {
        let gamma = self.constant(gamma)?;
        let [rows, per, stride, offset] = view;
        let (of, width) = (gamma.at(), gamma.len as i32);
        let numbers = [per, stride, offset].map(|n| n as i32);
        let arguments = Arguments::new().with(&from).with(&to).with(&of).with(&eps).with(&width);
        let arguments = numbers.iter().fold(arguments, |arguments, number| arguments.with(number));
        self.launch("elements.cu", "norm_rows", &[], (rows * per, threads(gamma.len)), arguments)
    }

    /// Its derivative by what is at `from`, from that by what it puts out; added to what is at `to` where `keep` says so.
    #[allow(clippy::too_many_arguments, reason = "a norm, its derivatives and where they are")]
    fn norm_pieces_back(
        &self,
        from: u64,
        gamma: &[f32],
        eps: f32,
        by: u64,
        to: u64,
        keep: bool,
        [rows, per, stride, offset]: [usize; 4],
    ) -> Result<()> {
        let gamma = self.constant(gamma)?;
        let of = gamma.at();
        let numbers = [usize::from(keep), gamma.len, per, stride, offset].map(|n| n as i32);
        let arguments = Arguments::new().with(&from).with(&of).with(&eps).with(&by).with(&to);
        let arguments = numbers.iter().fold(arguments, |arguments, number| arguments.with(number));
        self.launch("elements.cu", "norm_back", &[], (rows * per, threads(gamma.len)), arguments)
    }

    /// Queries and keys as pieces: γ, and the view of [`Quantizer::norm_pieces`].
    fn views<'g>(attention: &Attention, gammas: [&'g [f32]; 2], len: usize) -> [(&'g [f32], [usize; 4]); 2] {
        let width = attention.qkv_rows();
        let (queries, keys) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
        let [query, key] = gammas;
        [
            (query, [len / width, queries / query.len(), width, 0]),
            (key, [len / width, keys / key.len(), width, queries]),
        ]
    }

    /// Channels taken and the rest, where asked for.
    fn split(&self, x: &Floats, bits: &Room, taken: Option<&Floats>, rest: Option<&Floats>) -> Result<()> {
        let (from, bits, all) = (x.at(), bits.at(), x.len as i64);
        let [taken, rest] = [taken, rest].map(|floats| floats.map_or(0u64, Floats::at));
        let arguments = Arguments::new().with(&from).with(&bits).with(&taken).with(&rest).with(&all);
        self.launch("watch.cu", "split", &[], blocks(x.len), arguments)
    }

    /// The channels that are taken of `x`, `[tokens, n]`.
    fn mask_of(&self, x: &Floats, n: usize, k_chunk: usize) -> Result<Mask> {
        if !takes(n, k_chunk) {
            return Ok(Mask { bits: None });
        }
        let chunk = crate::dec::CHUNK;
        let tokens = x.len / n;
        let bits = self.pool.room(x.len / 8)?;
        let (from, to, width, k) = (x.at(), bits.at(), n as i32, k_chunk as i32);
        // Grids have at most 65535 rows.
        const MOST: usize = 32768;
        for first in (0..tokens).step_by(MOST) {
            let (from, to) = (from + (4 * first * n) as u64, to + (first * n / 8) as u64);
            let arguments = Arguments::new().with(&from).with(&to).with(&width).with(&k);
            let grid = (n.div_ceil(chunk), MOST.min(tokens - first));
            self.launch_shaped("watch.cu", "select", &[], grid, 256, 0, arguments)?;
        }
        Ok(Mask { bits: Some(bits) })
    }
}

impl Compute for Quantizer<'_> {
    fn batch_tokens(&self) -> usize {
        self.batch
    }

    fn holds_layers(&self, config: &ModelConfig) -> bool {
        2 * weights_of(config) + SAMPLED_CACHE + WORK <= self.pool.left()
    }

    fn texts_at_once(&self, config: &ModelConfig, tokens: usize) -> usize {
        let of = |layer: &LayerConfig| layer.attention().num_kv_heads * layer.attention().head_dim;
        let text = 2 * 4 * tokens * config.layers.iter().map(of).sum::<usize>();
        (SAMPLED_CACHE / text.max(1)).max(1)
    }

    fn put(&self, values: Vec<f32>) -> Result<Tensor> {
        Ok(wrap(self.sent(&values)?))
    }

    fn take(&self, tensor: Tensor) -> Result<Vec<f32>> {
        self.read(of(&tensor))
    }

    fn copy(&self, tensor: &Tensor) -> Result<Tensor> {
        let from = of(tensor);
        let to = self.floats(from.len)?;
        let (x, out, kind, all) = (from.at(), to.at(), 2i32, from.len as i64);
        let arguments = Arguments::new().with(&x).with(&out).with(&kind).with(&all);
        self.launch("elements.cu", "lengthen", &[], blocks(from.len), arguments)?;
        Ok(wrap(to))
    }

    fn shorten(&self, tensor: &Tensor, kind: Short) -> Result<Tensor> {
        let from = of(tensor);
        let kind = i32::from(kind == Short::Bf16);
        let short = Shorts { room: self.pool.room(2 * from.len)?, len: from.len, kind };
        let (x, out, all) = (from.at(), short.room.at(), from.len as i64);
        let arguments = Arguments::new().with(&x).with(&out).with(&kind).with(&all);
        self.launch("elements.cu", "shorten", &[], blocks(from.len), arguments)?;
        Ok(Tensor::Device(Box::new(short)))
    }

    fn lengthen(&self, tensor: &Tensor) -> Result<Tensor> {
        let Tensor::Device(any) = tensor else { panic!("a tensor of this device is expected") };
        let short: &Shorts = any.downcast_ref().expect("16-bit numbers of this device");
        let to = self.floats(short.len)?;
        let (x, out, all) = (short.room.at(), to.at(), short.len as i64);
        let arguments = Arguments::new().with(&x).with(&out).with(&short.kind).with(&all);
        self.launch("elements.cu", "lengthen", &[], blocks(short.len), arguments)?;
        Ok(wrap(to))
    }

    fn matrix<'a>(&self, linear: Cow<'a, Affine>) -> Result<Matrix<'a>> {
        let weight = self.stored(&linear.weight, linear.in_features)?;
        let bias = linear.bias.as_deref().map(|bias| self.constant(bias)).transpose()?;
        Ok(Matrix::Device(Box::new(Placed { weight, bias })))
    }

    fn product(&self, matrix: &Matrix<'_>, x: &Tensor) -> Result<Tensor> {
        let Matrix::Device(any) = matrix else { panic!("a matrix of this device is expected") };
        let Placed { weight, bias } = any.downcast_ref::<Placed>().expect("a matrix of this device");
        let (x, n, m) = (of(x), weight.columns, weight.rows);
        let tokens = x.len / n;
        let (y, keep) = self.begun(tokens, m, bias.as_deref())?;
        let wide = self.widened(weight, 0, m)?;
        let operands = [Operand::rows(x.at(), n), Operand::rows(wide.at(), n).across(), Operand::rows(y.at(), m)];
        self.multiply([tokens, m, n], operands, (1.0, keep), 1, Precision::Full)?;
        Ok(wrap(y))
    }

    fn norm(&self, h: &Tensor, gamma: &[f32], eps: f32) -> Result<Tensor> {
        let h = of(h);
        let out = self.floats(h.len)?;
        self.norm_pieces(h.at(), out.at(), gamma, eps, [h.len / gamma.len(), 1, gamma.len(), 0])?;
        Ok(wrap(out))
    }

    fn norm_qk(&self, attention: &Attention, gammas: [&[f32]; 2], eps: f32, qkv: &mut Tensor) -> Result<()> {
        let qkv = of(qkv);
        let views = Self::views(attention, gammas, qkv.len);
        views.into_iter().try_for_each(|(gamma, view)| self.norm_pieces(qkv.at(), qkv.at(), gamma, eps, view))
    }

    fn add(&self, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let (y, x) = (of(y), of(x));
        let (to, from, all) = (y.at(), x.at(), y.len as i64);
        let arguments = Arguments::new().with(&to).with(&from).with(&all);
        self.launch("elements.cu", "add_to", &[], blocks(y.len), arguments)
    }

    fn gated(&self, activation: Activation, gate_up: &Tensor, intermediate: usize) -> Result<Tensor> {
        let gate_up = of(gate_up);
        let out = self.floats(gate_up.len / 2)?;
        let (from, to, width) = (gate_up.at(), out.at(), intermediate as i32);
        let (activation, all) = (kernels::activation(activation) as i32, out.len as i64);
        let arguments = Arguments::new().with(&from).with(&to).with(&activation).with(&width).with(&all);
        self.launch("elements.cu", "gated", &[], blocks(out.len), arguments)?;
        Ok(wrap(out))
    }

    fn cache(&self, layer: &LayerConfig, texts: usize, capacity: usize) -> Result<Cache> {
        self.kept(layer, texts, capacity)
    }

    fn rotate(&self, attention: &Attention, ropes: &Ropes, tokens: usize, qkv: &mut Tensor) -> Result<()> {
        self.turn(attention, ropes, (0, tokens), false, of(qkv))
    }

    fn attend(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        cache: &mut Cache,
        texts: usize,
        qkv: Tensor,
    ) -> Result<Tensor> {
        self.attended(attention, ropes, cache, texts, &qkv)
    }

    fn norm_back(&self, h: &Tensor, gamma: &[f32], eps: f32, d_out: &Tensor, d: &mut Tensor) -> Result<()> {
        let (h, d_out, d) = (of(h), of(d_out), of(d));
        self.norm_pieces_back(h.at(), gamma, eps, d_out.at(), d.at(), true, [h.len / gamma.len(), 1, gamma.len(), 0])
    }

    fn norm_derivative(&self, h: &Tensor, gamma: &[f32], eps: f32, d_out: &Tensor) -> Result<Tensor> {
        let (h, d_out) = (of(h), of(d_out));
        let d = self.floats(h.len)?;
        self.norm_pieces_back(h.at(), gamma, eps, d_out.at(), d.at(), false, [h.len / gamma.len(), 1, gamma.len(), 0])?;
        Ok(wrap(d))
    }

    fn norm_qk_back(
        &self,
        attention: &Attention,
        gammas: [&[f32]; 2],
        eps: f32,
        qkv: &Tensor,
        d: &mut Tensor,
    ) -> Result<()> {
        let (qkv, d) = (of(qkv), of(d));
        let views = Self::views(attention, gammas, qkv.len);
        let (x, d) = (qkv.at(), d.at());
        views.into_iter().try_for_each(|(gamma, view)| self.norm_pieces_back(x, gamma, eps, d, d, false, view))
    }

    fn gated_back(&self, activation: Activation, gate_up: &Tensor, d: &Tensor, intermediate: usize) -> Result<Tensor> {
        let (gate_up, d) = (of(gate_up), of(d));
        let out = self.floats(gate_up.len)?;
        let (from, by, to, width) = (gate_up.at(), d.at(), out.at(), intermediate as i32);
        let (activation, all) = (kernels::activation(activation) as i32, d.len as i64);
        let arguments = Arguments::new().with(&from).with(&by).with(&to).with(&activation).with(&width).with(&all);
        self.launch("elements.cu", "gated_back", &[], blocks(d.len), arguments)?;
        Ok(wrap(out))
    }

    fn attend_back(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        texts: usize,
        qkv: &Tensor,
        d_out: &Tensor,
    ) -> Result<Tensor> {
        self.attended_back(attention, ropes, texts, of(qkv), of(d_out))
    }

    fn select(&self, x: &Tensor, in_features: usize, k_chunk: usize) -> Result<Selected> {
        Ok(Selected::Device(Box::new(self.mask_of(of(x), in_features, k_chunk)?)))
    }

    fn trained(
        &self,
        place: (usize, Projection),
        codebook: &[f32],
        read: &mut dyn FnMut() -> Result<Coded>,
    ) -> Result<Trained> {
        Ok(Trained::Device(Box::new(self.trained_at(place, codebook, read)?) as Box<dyn Any>))
    }

    fn output(&self, projection: &Trained, x: &Tensor, taken: &Selected) -> Result<Tensor> {
        Ok(wrap(self.output_of(trained::of(projection), of(x), mask(taken))?))
    }

    fn derive(&self, projection: &Trained, x: Tensor, taken: &Selected, d: &Tensor) -> Result<(Tensor, Tensor)> {
        let (d_x, d_w) = self.derivatives_of(trained::of(projection), of(&x), mask(taken), of(d))?;
        Ok((wrap(d_x), wrap(d_w)))
    }

    fn slopes(&self, projection: &Trained, levels: usize, gradient: &Tensor) -> Result<Vec<f32>> {
        self.slopes_of(trained::of(projection), levels, of(gradient))
    }

    fn entered(&self, in_features: usize, watch: &Watch) -> Result<Box<dyn Entered + '_>> {
        Ok(Box::new(entered::Watched::new(self, in_features, watch)?))
    }

    fn head<'a>(&'a self, head: &'a LmHead<'a>) -> Result<Box<dyn Head + 'a>> {
        Ok(Box::new(head::OnDevice::new(self, head)?))
    }
}

#[cfg(test)]
mod tests;
