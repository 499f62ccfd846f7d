//! Whole decoder layers of one token in one launch (`kernels-cuda/layers.cu`): which layers can be, and how.

use std::rc::Rc;

use anyhow::Result;
use half::f16;

use super::buffer::Buffer;
use super::driver::{Arguments, Launch};
use super::failure::Refused;
use super::kernel::Kernel;
use super::launch::{Tuning, unit};
use super::matrix::{Body, Format, Matrix, Plan};
use super::pack::TILE;
use super::sequence::Sequence;
use super::{Cuda, Scratch};
use crate::backend::{Activations, LayerOperands};
use crate::config::{Activation, Attention, LayerNorm, Op, Projection, Reads, Writes};
use crate::dec::CHUNK;

/// Most layers of one launch: their table lies in shared memory.
const MOST_LAYERS: usize = 40;

/// Words of 8 bytes of `struct Layer`, and the bytes of it.
const LAYER_WORDS: usize = 36;

/// Sets of vectors between blocks, which take turns from layer to layer: `layers.cu` says why so many.
const SETS: usize = 5;

/// Most channels of a product: in a selection that blocks make together, a channel has 16 bits.
const MOST_CHANNELS: usize = 1 << 16;

/// Bytes of weights on their way below which one launch for layers does not pay: with a ring of 97 KB memory idles while
/// blocks wait (H100, Llama-3-70B: 78 tokens/s where single operations make 80).
const PAYS: usize = 128 << 10;

/// What a launch needs to know of a model's shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shapes {
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Shapes {
    /// Numbers between the blocks of one layer: `WORDS` of `layers.cu`.
    fn flow_words(self, splits: usize, compensated: bool) -> usize {
        let [(_, qkv), (attended, h), (_, gu), (i, _)] = self.products();
        let shares = (splits * self.heads * (self.head_dim + 2)).next_multiple_of(4);
        qkv + attended + 2 * h + i / 2 + shares + if compensated { 2 * qkv + 4 * h + gu + i } else { 0 }
    }

    /// `(in_features, out_features)` of the four projections.
    fn products(self) -> [(usize, usize); 4] {
        let attended = self.heads * self.head_dim;
        let qkv = (self.heads + 2 * self.kv_heads) * self.head_dim;
        [
            (self.hidden, qkv),
            (attended, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]
    }
}

/// Fewest rows of a product that a compensating block takes: bulk copies are multiples of 16 bytes.
const STRIPE: usize = 32;

/// What of a layer is compensated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Compensated {
    /// Bytes of the longest selection.
    list: usize,
    /// Blocks that are to compensate instead of multiplying.
    n_tb: usize,
    /// Which of the four projections.
    products: [bool; 4],
}

/// The parts of a block's shared memory that depend on the launch, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LayersLaunch {
    pub(super) warps: usize,
    pub(super) stages: usize,
    pub(super) blocks: usize,
    /// Those of them that compensate instead of multiplying.
    pub(super) n_tb: usize,
    /// Blocks that share one key-value head's text.
    pub(super) splits: usize,
    /// Input of a product, and sums of its groups; or queries and partial results of attention.
    pub(super) xs: usize,
    /// Partial sums of the block's rows.
    pub(super) parts: usize,
    /// Codebooks of the block's tiles of one matrix.
    pub(super) books: usize,
    pub(super) shared: usize,
}

/// The launch of layers of these shapes, if a multiprocessor has room for it and it pays; where it need not pay, with
/// fewer warps where there is little room. Pure arithmetic.
///
/// `dec`: `None` if nothing is compensated.
pub(super) fn layers_launch(
    format: Format,
    shapes: Shapes,
    tuning: Tuning,
    dec: Option<Compensated>,
    multiprocessors: usize,
    most_shared: usize,
) -> Option<LayersLaunch> {
    let warps = tuning.layers;
    let of = |warps| launch_of_warps(format, shapes, (warps, dec), multiprocessors, most_shared);
    if tuning.layers_always {
        return [warps, warps * 3 / 4, warps / 2].into_iter().find_map(of);
    }
    // Where a row's units do not go round, some warps wait (H100, Phi-3-medium with 20 units for 16 warps: 317 tokens/s
    // where single operations make 331).
    let goes_round = shapes.hidden.is_multiple_of(unit(format, shapes.hidden).0 * warps);
    of(warps).filter(|launch| goes_round && launch.warps * launch.stages * slot(format, shapes.hidden) >= PAYS)
}

fn launch_of_warps(
    format: Format,
    shapes: Shapes,
    (warps, dec): (usize, Option<Compensated>),
    multiprocessors: usize,
    most_shared: usize,
) -> Option<LayersLaunch> {
    let products = shapes.products();
    let fits =
        |&(k, rows): &(usize, usize)| k.is_multiple_of(TILE) && k <= MOST_CHANNELS && rows.is_multiple_of(2 * TILE);
    if !products.iter().all(fits) {
        return None;
    }
    // A block without rows of a product would not take part in it, and others could be done with what it still reads.
    let n_tb = dec.map_or(0, |dec| {
        let rows = products.iter().zip(dec.products).filter(|&(_, taken)| taken).map(|(&(_, rows), _)| rows);
        rows.min().map_or(0, |rows| dec.n_tb.min(rows / STRIPE))
    });
    let list = dec.map_or(0, |dec| dec.list);
    // Gate and up stream apart and are summed up together.
    let tiles: [usize; 4] = std::array::from_fn(|i| products[i].1 / TILE / if i == 2 { 2 } else { 1 });
    // Every block that multiplies has a part of every product.
    let multiplying = multiprocessors.checked_sub(n_tb)?.min(*tiles.iter().min()?);
    // Selection goes by four warps together.
    if !warps.is_multiple_of(4) || multiplying == 0 {
        return None;
    }
    let units = |k: usize| k.div_ceil(unit(format, k).0);
    let halves = |k: usize| units(k) * unit(format, k).0 * 2;
    let (narrow, wide) = (shapes.hidden.max(products[1].0), shapes.intermediate);
    let sums = unit(format, narrow.max(wide)).2.next_multiple_of(4) * 4;
    // In compensating blocks, sums of a stripe lie here, barriers and stripes.
    let stripe = if dec.is_some() { 16 * 4 * (32 * warps + 2) + 64 * 8 + 4 * 8 } else { 0 };
    let xs = (halves(wide).max(halves(narrow)).max(stripe) + sums).next_multiple_of(16);
    // Beside compensation tiles may begin in one block and end in the next, but those of gate and up.
    let cut = usize::from(dec.is_some());
    let [qkv, o, pairs, down] = tiles.map(|tiles| tiles.div_ceil(multiplying) + cut);
    // A thread has one row at most, but of gate and up.
    if qkv.max(o).max(down) * TILE > 32 * warps {
        return None;
    }
    let parts = qkv.max(o).max(2 * pairs).max(down) * warps * TILE * 4;
    // Attention uses both while no product does. A warp keeps two queries at least.
    let group = shapes.heads / shapes.kv_heads;
    if group > 2 * warps {
        return None;
    }
    let attention = 4 * ((group.next_multiple_of(4) + 2) * shapes.head_dim + warps * 4 * (shapes.head_dim + 2));
    let parts = parts.max(attention.saturating_sub(xs)).next_multiple_of(16);
    // Codebooks come once for a matrix, other formats' numbers with every unit.
    let books = qkv.max(o).max(pairs).max(down) * (unit(format, narrow).1 - slot(format, narrow));
    let table = (MOST_LAYERS * LAYER_WORDS * 8).next_multiple_of(128);
    let fixed = 256 + 128 + 24 + 3 * books + table + xs + parts + list;
    let stage = warps * slot(format, narrow);
    let stages = most_shared.checked_sub(fixed)? / stage;
    if stages < 2 {
        return None;
    }
    let stages = stages.min(8);
    let shared = fixed + stages * stage;
    let splits = super::splits(multiplying, shapes.kv_heads);
    Some(LayersLaunch { warps, stages, blocks: multiplying + n_tb, n_tb, splits, xs, parts, books, shared })
}

/// Bytes of a unit in the ring of `stream.cuh`: codebooks are not there.
fn slot(format: Format, in_features: usize) -> usize {
    let bytes = unit(format, in_features).1;
    match format {
        Format::AnyPrec { bits } => bytes - (32 << bits),
        _ => bytes,
    }
}

/// `struct Layers` of `layers.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct LayersArgument {
    layers: u64,
    h: u64,
    h_delta: u64,
    flow: u64,
    list: u64,
    state: u64,
    angles: u64,
    grid: u64,
    stamps: u64,
    beyond: u64,
    count: i32,
    n_tb: i32,
    max_seq_len: i32,
    capacity: i32,
    eps: f32,
    longest: i32,
}

/// Whether `layers.cu` computes this program with this attention: a Llama layer, whose window may be narrower.
fn takes(program: &[Op], attention: &Attention) -> bool {
    let project = |projection, reads, writes| Op::Project { projection, reads, writes };
    let llama = [
        project(Projection::Qkv, Reads::Stream(Some(LayerNorm::AttentionInput)), Writes::Qkv),
        Op::Attend,
        project(Projection::O, Reads::Attended, Writes::Stream),
        project(Projection::GateUp, Reads::Stream(Some(LayerNorm::FeedForwardInput)), Writes::GateUp),
        project(Projection::Down, Reads::Gated(Activation::Silu), Writes::Stream),
    ];
    // What the kernel divides scores by is √head_dim in f32.
    let divided = (attention.scale * (attention.head_dim as f64).sqrt() - 1.0).abs() < 1e-6;
    let plain = attention.softcap.is_none() && attention.query_scaling.is_none() && attention.rope.is_some();
    program == llama && divided && plain
}

/// The format that all four matrices share, if they do and it has fast kernels.
fn format(layer: &LayerOperands<'_, Cuda>) -> Option<Format> {
    let of = |m: &Matrix| match m.body {
        Body::Packed { format: Format::LutGemm { bits: 8, .. }, .. } => None,
        Body::Packed { format: format @ (Format::AnyPrec { .. } | Format::LutGemm { .. }), .. } => Some(format),
        _ => None,
    };
    let first = of(layer.matrices[0])?;
    layer.matrices.iter().all(|m| of(m) == Some(first)).then_some(first)
}

impl Cuda {
    /// How many of `layers`, of which the first is layer `number` of the model, one launch takes; 0 if they have to go
    /// operation by operation.
    pub(super) fn run_of_layers(
        &self,
        sequence: &Sequence,
        number: usize,
        layers: &[LayerOperands<'_, Self>],
    ) -> usize {
        let Some(first) = layers.first() else { return 0 };
        let (wanted, attention) = (format(first), sequence.cache.attention(number));
        let possible = self.together.get() && self.driver.numbers().major >= 9 && self.options.compile > 0;
        if wanted.is_none() || !possible || !takes(first.program, attention) {
            return 0;
        }
        let plans = |layer: &LayerOperands<'_, Self>| layer.plans.map(|p| p.map(|p| (p.k_chunk, p.n_tb)));
        let alike = |&(l, layer): &(usize, &LayerOperands<'_, Self>)| {
            format(layer) == wanted
                && plans(layer) == plans(first)
                && layer.program == first.program
                && sequence.cache.attention(number + l) == attention
                && layer.norms.iter().flatten().all(|n| n.eps == first.norm(LayerNorm::AttentionInput).eps)
        };
        layers.iter().enumerate().take(MOST_LAYERS).take_while(alike).count()
    }

    /// Queues `layers` as one launch; false if the device has no room for it, by its numbers or by what the driver says.
    pub(super) fn fused_layers(
        &self,
        sequence: &Sequence,
        first: usize,
        layers: &[LayerOperands<'_, Self>],
        activations: &mut Activations<Self>,
    ) -> Result<bool> {
        let (Some(format), Some(operands)) = (layers.first().and_then(format), layers.first()) else {
            return Ok(false);
        };
        let Attention { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *sequence.cache.attention(first);
        let (hidden, intermediate) = (operands.matrices[1].out_features, operands.matrices[3].in_features);
        let shapes = Shapes { hidden, intermediate, heads, kv_heads, head_dim };
        let plans = operands.plans.map(|p| p.filter(|p| p.k_chunk > 0));
        let compensates = plans.iter().any(Option::is_some);
        let tuning = self.options.tuning;
        let list = |p: &Plan| p.in_features.div_ceil(CHUNK) * p.k_chunk * 8;
        let longest = plans.iter().flatten().map(|p| list(p)).max().unwrap_or(0).next_multiple_of(16);
        let n_tb = plans.iter().flatten().map(|p| p.n_tb).max().unwrap_or(0);
        if plans.iter().flatten().any(|p| p.n_tb != n_tb) {
            return Ok(false);
        }
        let dec = compensates.then_some(Compensated { list: longest, n_tb, products: plans.map(|p| p.is_some()) });
        let numbers = self.driver.numbers();
        let launch = layers_launch(format, shapes, tuning, dec, numbers.multiprocessors, numbers.shared_per_block);
        let Some(launch) = launch else { return Ok(false) };
        // √H·|γ| bounds what is normalized.
        let most = layers.iter().flat_map(|l| l.norms).flatten().map(|norm| norm.gamma.largest()).fold(0.0, f32::max);
        let loud = most * (shapes.hidden as f32).sqrt() > f16::MAX.to_f32();
        let kernel = self.layers_kernel(format, shapes, launch, (sequence, first), (compensates, loud))?;

        let table = self.layer_table(sequence, first, layers, launch.n_tb)?;
        let h = &mut activations.h;
        let argument = LayersArgument {
            layers: table.pointer(),
            h: h.at(),
            h_delta: h.delta(),
            flow: self.scratch(Scratch::Flow, 4 * SETS * shapes.flow_words(launch.splits, compensates))?.pointer(),
            list: self.scratch(Scratch::List, 4 * longest.max(8))?.pointer(),
            state: sequence.state.pointer(),
            angles: sequence.cache.angles(first),
            grid: self.scratch(Scratch::Grid, 8)?.pointer(),
            stamps: self.stamps.borrow().as_ref().map_or(0, |s| s.pointer()),
            beyond: self.beyond.pointer(),
            count: layers.len() as i32,
            n_tb: launch.n_tb as i32,
            max_seq_len: sequence.max_seq_len as i32,
            capacity: sequence.cache.capacity(first) as i32,
            eps: operands.norm(LayerNorm::AttentionInput).eps,
            longest: (longest / 8) as i32,
        };
        let threads = 32 * launch.warps;
        let launch =
            Launch { shared: launch.shared, overlap: false, together: true, ..Launch::new(launch.blocks, threads) };
        match self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument)) {
            Err(error) if error.is::<Refused>() => {
                self.go_one_by_one(&error);
                return Ok(false);
            }
            launched => launched?,
        }
        h.settle();
        Ok(true)
    }

    /// From now on no launch needs all its blocks to be there at once, since `refused` was.
    pub(super) fn go_one_by_one(&self, refused: &anyhow::Error) {
        if self.together.replace(false) {
            tracing::warn!(
                "{refused:#}; something else holds part of {}: layers go operation by operation, more slowly",
                self.device.name
            );
        }
    }

    fn layers_kernel(
        &self,
        format: Format,
        shapes: Shapes,
        launch: LayersLaunch,
        (sequence, first): (&Sequence, usize),
        (dec, loud): (bool, bool),
    ) -> Result<Kernel> {
        let mut defines = sequence.cache.defines(first, self.options.dtype, launch.splits);
        let (kind, bits, group) = match format {
            Format::LutGemm { bits, group } => (1, bits, Some(group)),
            Format::AnyPrec { bits } => (0, bits, None),
            Format::Dense => anyhow::bail!("cuda: layers of full precision go operation by operation"),
        };
        defines.extend(group.map(|g| format!("GROUP={g}")));
        defines.extend([
            format!("FORMAT={kind}"),
            format!("BITS={bits}"),
            format!("H={}", shapes.hidden),
            format!("I={}", shapes.intermediate),
            format!("WINDOW={}", sequence.cache.window(first)),
            format!("WARPS={}", launch.warps),
            format!("STAGES={}", launch.stages),
            format!("BLOCKS={}", launch.blocks),
            format!("DEC={}", u8::from(dec)),
            format!("XS={}", launch.xs),
            format!("PARTS={}", launch.parts),
            format!("BOOKS={}", launch.books),
            format!("MOST_LAYERS={MOST_LAYERS}"),
            format!("SETS={SETS}"),
            format!("LOUD={}", u8::from(loud)),
        ]);
        self.kernel("layers.cu", "decode_layers", &defines)
    }

    /// The layers' pointers in device memory; the same ones stay where they are, since recorded graphs point to them.
    fn layer_table(
        &self,
        sequence: &Sequence,
        first: usize,
        layers: &[LayerOperands<'_, Self>],
        n_tb: usize,
    ) -> Result<Rc<Buffer>> {
        let words: Vec<u64> =
            layers.iter().enumerate().flat_map(|(l, layer)| layer_words(sequence, first + l, layer, n_tb)).collect();
        let mut tables = self.tables.borrow_mut();
        if let Some((_, buffer)) = tables.iter().find(|(w, _)| *w == words) {
            return Ok(Rc::clone(buffer));
        }
        let buffer = Rc::new(Buffer::of(&self.driver, &words)?);
        tables.push((words, Rc::clone(&buffer)));
        Ok(buffer)
    }

    /// From now on layers note when each operation has its input, for [`Cuda::timeline`].
    ///
    /// # Errors
    /// No memory.
    pub fn watch_layers(&mut self) -> Result<()> {
        *self.stamps.borrow_mut() = Some(Rc::new(Buffer::new(&self.driver, STAMPS * 8)?));
        Ok(())
    }

    /// When the last launch of layers started and its operations had their inputs, nanoseconds of the device's clock, in
    /// order.
    ///
    /// # Errors
    /// A lost device.
    pub fn timeline(&self) -> Result<Vec<u64>> {
        let mut stamps = vec![0u64; STAMPS];
        if let Some(buffer) = self.stamps.borrow().as_ref() {
            buffer.read(&mut stamps)?;
        }
        stamps.retain(|&s| s > 0);
        Ok(stamps)
    }
}

/// Room for the stamps of one launch.
const STAMPS: usize = MOST_LAYERS * 6 + 2;

/// `struct Layer` of `layers.cu`.
fn layer_words(sequence: &Sequence, index: usize, layer: &LayerOperands<'_, Cuda>, n_tb: usize) -> [u64; LAYER_WORDS] {
    let mut words = [0; LAYER_WORDS];
    for (i, (matrix, plan)) in layer.matrices.iter().zip(layer.plans).enumerate() {
        words[i * 8..][..8].copy_from_slice(&product_words(matrix, plan.filter(|p| p.k_chunk > 0), n_tb));
    }
    let (keys, values) = sequence.cache.places(index);
    let [attention, feed_forward] =
        [LayerNorm::AttentionInput, LayerNorm::FeedForwardInput].map(|norm| layer.norm(norm).gamma.at());
    words[32..].copy_from_slice(&[attention, feed_forward, keys, values]);
    words
}

/// `struct Product` of `layers.cu`.
fn product_words(matrix: &Matrix, plan: Option<&Plan>, n_tb: usize) -> [u64; 8] {
    let (codes, aux) = match &matrix.body {
        Body::Packed { codes, aux, .. } => (codes.pointer(), aux.pointer()),
        Body::Any { .. } => (0, 0),
    };
    let bias = matrix.bias.as_ref().map_or(0, |b| b.pointer());
    let (residual, scales) = matrix.residual.as_ref().map_or((0, 0), |(w, s)| (w.pointer(), s.pointer()));
    let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
    let [edges, how_many, which] = plan
        .map_or([0; 3], |p| [p.edges.pointer(), pair(p.k_chunk, n_tb), pair(usize::from(p.exact), p.list_chunks())]);
    [codes, aux, bias, residual, scales, edges, how_many, which]
}

#[cfg(test)]
mod tests;
