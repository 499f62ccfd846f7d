//! Whole decoder layers of one token in one launch (`kernels-cuda/layers/layers.cu`): which layers can be, and how.

use std::rc::Rc;

use anyhow::Result;

use super::buffer::Buffer;
use super::driver::{Arguments, Launch};
use super::failure::Refused;
use super::matrix::{Body, Format, Matrix, Plan};
use super::sequence::Sequence;
use super::{Cuda, Scratch};
use crate::backend::{Activations, LayerOperands};
use crate::config::Attention;
use crate::dec::CHUNK;

mod plan;
mod program;
#[cfg(test)]
mod tests;

use plan::{Compensated, LAYER_WORDS, LayersLaunch, MOST_LAYERS, Shapes, layers_at_once, layers_launch};
use program::Program;

/// Sets of vectors between blocks, which take turns from layer to layer: `layers.cu` says why so many.
const SETS: usize = 5;

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
    grid: u64,
    stamps: u64,
    beyond: u64,
    count: i32,
    n_tb: i32,
    max_seq_len: i32,
    longest: i32,
}

/// Whether two layers' attention may be in one launch: what else differs stands in its table.
fn alike(a: &Attention, b: &Attention) -> bool {
    let shape = |a: &Attention| (a.num_heads, a.num_kv_heads, a.head_dim, a.qk_norm);
    shape(a) == shape(b)
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
        // Compensation within layers is fetched by the bulk copy engine.
        let compensates = first.plans.iter().flatten().any(|p| p.k_chunk > 0);
        let has_engine = self.driver.numbers().major >= 9;
        let possible = self.together.get() && self.options.compile > 0 && (has_engine || !compensates);
        if wanted.is_none() || !possible || Program::of(first.program).is_none() {
            return 0;
        }
        let plans = |layer: &LayerOperands<'_, Self>| layer.plans.map(|p| p.map(|p| (p.k_chunk, p.n_tb)));
        let shapes = |layer: &LayerOperands<'_, Self>| layer.matrices.map(|m| (m.in_features, m.out_features));
        let fits = |&(l, layer): &(usize, &LayerOperands<'_, Self>)| {
            format(layer) == wanted
                && plans(layer) == plans(first)
                && layer.program == first.program
                && shapes(layer) == shapes(first)
                && alike(sequence.cache.attention(number + l), attention)
        };
        layers_at_once(layers.iter().enumerate().take_while(fits).count())
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
        // Blocks that compensate are there as soon as there is a plan, even one that selects nothing.
        let plans = operands.plans;
        let compensates = plans.iter().any(Option::is_some);
        let tuning = self.options.tuning;
        let list = |p: &Plan| p.in_features.div_ceil(CHUNK) * p.k_chunk * 8;
        let longest = plans.iter().flatten().map(|p| list(p)).max().unwrap_or(0).next_multiple_of(16);
        let n_tb = plans.iter().flatten().map(|p| p.n_tb).max().unwrap_or(0);
        if plans.iter().flatten().any(|p| p.n_tb != n_tb) {
            return Ok(false);
        }
        let dec = compensates.then_some(Compensated {
            list: longest,
            n_tb,
            products: plans.map(|p| p.is_some_and(|p| p.k_chunk > 0)),
        });
        let launch = layers_launch(format, (shapes, layers.len()), tuning, dec, &self.room());
        let Some(launch) = launch else { return Ok(false) };
        let mut defines = self.layers_defines(format, shapes, launch, compensates);
        defines.extend(sequence.cache.defines(first, self.options.dtype, launch.splits));
        defines.extend(program_defines(sequence, first, layers));
        let kernel = self.kernel("layers.cu", "decode_layers", &defines)?;

        let table = self.layer_table(sequence, first, layers, launch.n_tb)?;
        let h = &mut activations.h;
        let argument = LayersArgument {
            layers: table.pointer(),
            h: h.at(),
            h_delta: h.delta(),
            flow: self.scratch(Scratch::Flow, 4 * SETS * shapes.flow_words(launch.splits, compensates))?.pointer(),
            list: self.scratch(Scratch::List, 4 * longest.max(8))?.pointer(),
            state: sequence.state.pointer(),
            grid: self.scratch(Scratch::Grid, 8)?.pointer(),
            stamps: self.stamps.borrow().as_ref().map_or(0, |s| s.pointer()),
            beyond: self.beyond.pointer(),
            count: layers.len() as i32,
            n_tb: launch.n_tb as i32,
            max_seq_len: sequence.max_seq_len as i32,
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

    /// The constants of `layers.cu` that matrices and the device decide.
    fn layers_defines(&self, format: Format, shapes: Shapes, launch: LayersLaunch, dec: bool) -> Vec<String> {
        let mut defines = match format {
            Format::LutGemm { bits, group } => {
                vec!["FORMAT=1".into(), format!("BITS={bits}"), format!("GROUP={group}")]
            }
            Format::AnyPrec { bits, planes } => {
                vec!["FORMAT=0".into(), format!("BITS={bits}"), format!("PLANES={planes}")]
            }
            Format::Dense => unreachable!("layers of full precision go operation by operation"),
        };
        defines.extend([
            format!("H={}", shapes.hidden),
            format!("I={}", shapes.intermediate),
            format!("WARPS={}", launch.warps),
            format!("STAGES={}", launch.stages),
            format!("BLOCKS={}", launch.blocks),
            format!("DEC={}", u8::from(dec)),
            format!("XS={}", launch.xs),
            format!("PARTS={}", launch.parts),
            format!("NARROW_PARTS={}", launch.narrow_parts),
            format!("BOOKS={}", launch.books),
            format!("TURNS={}", launch.turns),
            format!("LAYER_BYTES={}", LAYER_WORDS * 8),
            format!("SETS={SETS}"),
        ]);
        defines
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
        // Behind them may lie those of a longer launch before it.
        let older = stamps.windows(2).position(|pair| pair[1] < pair[0]);
        stamps.truncate(older.map_or(STAMPS, |last| last + 1));
        Ok(stamps)
    }
}

/// Room for the stamps of one launch.
const STAMPS: usize = MOST_LAYERS * 6 + 2;

/// The constants of `layers.cu` that the layers' program and numbers decide.
fn program_defines(sequence: &Sequence, first: usize, layers: &[LayerOperands<'_, Cuda>]) -> Vec<String> {
    let program = layers.first().and_then(|layer| Program::of(layer.program)).expect("layers that were looked at");
    let attentions = || (first..first + layers.len()).map(|layer| sequence.cache.attention(layer));
    let mut defines = program.defines().to_vec();
    defines.extend([
        format!("CAPPED={}", u8::from(attentions().any(|a| a.softcap.is_some()))),
        format!("GROWS={}", u8::from(attentions().any(|a| a.query_scaling.is_some()))),
    ]);
    defines
}

/// `struct Layer` of `layers.cu`: products, norms, where the cache and the angles are, numbers.
fn layer_words(sequence: &Sequence, index: usize, layer: &LayerOperands<'_, Cuda>, n_tb: usize) -> [u64; LAYER_WORDS] {
    let mut words = [0; LAYER_WORDS];
    for (i, (matrix, plan)) in layer.matrices.iter().zip(layer.plans).enumerate() {
        words[i * 8..][..8].copy_from_slice(&product_words(matrix, plan.filter(|p| p.k_chunk > 0), n_tb));
    }
    for (i, norm) in layer.norms.iter().enumerate() {
        let [gamma, eps] = norm.map_or([0; 2], |norm| [norm.gamma.at(), u64::from(norm.eps.to_bits())]);
        words[32 + 2 * i..][..2].copy_from_slice(&[gamma, eps]);
    }
    let (keys, values) = sequence.cache.places(index);
    words[44..47].copy_from_slice(&[keys, values, sequence.cache.angles(index)]);
    words[47..].copy_from_slice(&sequence.cache.numbers(index).words());
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
