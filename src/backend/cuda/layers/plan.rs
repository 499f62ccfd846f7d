//! The launch of whole layers, from their shapes and the device's numbers: pure arithmetic.

use std::cmp::Reverse;
use std::ops::RangeInclusive;

use super::super::attention::attend_shared;
use super::super::launch::{Room, Tuning, operand_bytes, unit};
use super::super::matrix::Format;
use super::super::pack::{CODE_UNIT, TILE, book_bytes};

/// Most layers of one launch: where the table in shared memory has all of them, there is room for no more.
pub(super) const MOST_LAYERS: usize = 40;

/// Layers that the table has, in turn, where a warp's ring holds no more than a layer: the one before the current one, that
/// one, the two that the stream may have come to.
const TURNS: usize = 4;

/// Words of 8 bytes of `struct Layer` of `layers.cu`.
pub(super) const LAYER_WORDS: usize = 50;

/// Most channels of a product: in a selection that blocks make together, a channel has 16 bits.
const MOST_CHANNELS: usize = 1 << 16;

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
    pub(super) fn flow_words(self, splits: usize, compensated: bool) -> usize {
        let [(_, qkv), (attended, h), (_, gu), (i, _)] = self.products();
        let shares = (splits * self.heads * (self.head_dim + 2)).next_multiple_of(4);
        qkv + attended + 2 * h + i / 2 + shares + if compensated { 2 * qkv + 4 * h + gu + i } else { 0 }
    }

    /// `(in_features, out_features)` of the four projections.
    pub(super) fn products(self) -> [(usize, usize); 4] {
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

/// Most units of a warp on their way: more than a ring of 200 KB has room for.
pub(super) const MOST_STAGES: usize = 16;

/// Warps that select in a chunk together.
const SELECTORS: usize = 4;

/// Fewest rows of a product that a compensating block takes: bulk copies are multiples of 16 bytes.
pub(super) const STRIPE: usize = 32;

/// What of a layer is compensated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Compensated {
    /// Bytes of the longest selection.
    pub(super) list: usize,
    /// Blocks that are to compensate instead of multiplying.
    pub(super) n_tb: usize,
    /// Which of the four projections.
    pub(super) products: [bool; 4],
}

/// The parts of a block's shared memory that depend on the launch, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LayersLaunch {
    pub(super) warps: usize,
    pub(super) stages: usize,
    /// Layers that the table in shared memory has room for: all, or [`TURNS`].
    pub(super) turns: usize,
    pub(super) blocks: usize,
    /// Those of them that compensate instead of multiplying.
    pub(super) n_tb: usize,
    /// Blocks that share one key-value head's text.
    pub(super) splits: usize,
    /// Input of a product, and sums of its groups; or queries and partial results of attention.
    pub(super) xs: usize,
    /// Partial sums of the block's rows, of qkv or gate and up; and those of o or down.
    pub(super) parts: usize,
    pub(super) narrow_parts: usize,
    /// Codebooks of the block's tiles of one matrix.
    pub(super) books: usize,
    pub(super) shared: usize,
}

/// How much of memory's time a ring has to cover, seconds, so that one launch pays: with less, memory idles while blocks wait
/// for each other. (A ring of 74 KB covers 2 µs of an H200 and pays: Llama-3-70B, 106 tokens/s, 92 operation by operation.)
const COVERED: f64 = 1.3e-6;

/// Whether a ring of `warps` times `stages` units covers so much.
fn covers(format: Format, warps: usize, stages: usize, room: &Room) -> bool {
    let needed = room.memory_rate / room.multiprocessors as f64 * COVERED;
    (warps * stages * slot(format)) as f64 >= needed
}

/// Whether one launch is faster than the operations one by one. Decided here alone: by what was measured, and by whether
/// three of four multiprocessors have work, since each block has a part of the narrowest product.
fn pays(format: Format, launch: &LayersLaunch, room: &Room) -> bool {
    covers(format, launch.warps, launch.stages, room) && 4 * launch.blocks >= 3 * room.multiprocessors
}

/// Warps of a block: fewer leave a multiprocessor's schedulers without work, more leave a thread fewer than 128 registers.
const WARPS: RangeInclusive<usize> = 8..=16;

/// Numbers of warps, the best first: those that leave none idle when the units of a row go round them, then as many as
/// possible. A row of 20 units takes 10, one of 15 takes 15, one of 8 takes 16, two rows at a time.
fn warps_for(units: usize) -> Vec<usize> {
    // Thousandths of the places of a round in which there is no unit.
    let idle = |warps: usize| {
        let (places, used) =
            if units < warps { (warps, warps / units * units) } else { (units.next_multiple_of(warps), units) };
        (places - used) * 1000 / places
    };
    let mut all: Vec<_> = WARPS.collect();
    all.sort_by_key(|&warps| (idle(warps), Reverse(warps)));
    all
}

/// How many of `count` layers go in the next launch: as many as in those after it, so that one kernel is for all.
pub(super) fn layers_at_once(count: usize) -> usize {
    count.div_ceil(count.div_ceil(MOST_LAYERS).max(1))
}

/// The launch of `count` layers of these shapes, if a multiprocessor has room for it and it pays or is asked for wherever it is
/// possible. Pure arithmetic.
///
/// `dec`: `None` if nothing is compensated.
pub(super) fn layers_launch(
    format: Format,
    (shapes, count): (Shapes, usize),
    tuning: Tuning,
    dec: Option<Compensated>,
    room: &Room,
) -> Option<LayersLaunch> {
    let units = shapes.hidden.div_ceil(CODE_UNIT);
    let warps = tuning.layers.map_or_else(|| warps_for(units), |warps| vec![warps]);
    let of = |warps| launch_of_warps(format, (shapes, count), (warps, dec), room);
    let pays = |launch: &LayersLaunch| pays(format, launch, room);
    warps.into_iter().find_map(of).filter(|launch| tuning.one_launch.unwrap_or_else(|| pays(launch)))
}

fn launch_of_warps(
    format: Format,
    (shapes, count): (Shapes, usize),
    (warps, dec): (usize, Option<Compensated>),
    room: &Room,
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
        rows.min().map_or(dec.n_tb, |rows| dec.n_tb.min(rows / STRIPE))
    });
    let list = dec.map_or(0, |dec| dec.list);
    // Gate and up stream apart and are summed up together.
    let tiles: [usize; 4] = std::array::from_fn(|i| products[i].1 / TILE / if i == 2 { 2 } else { 1 });
    // Every block that multiplies has a part of every product.
    let multiplying = room.multiprocessors.checked_sub(n_tb)?.min(*tiles.iter().min()?);
    // Selection goes by four warps together; what four do not go into does not select.
    if multiplying == 0 || dec.is_some() && warps < SELECTORS {
        return None;
    }
    let (narrow, wide) = (shapes.hidden.max(products[1].0), shapes.intermediate);
    // In compensating blocks, sums of a stripe lie here, barriers and stripes.
    let stripe = if dec.is_some() { 16 * 4 * (32 * warps + 2) + 64 * 8 + 4 * 8 } else { 0 };
    let xs = operand_bytes(format, wide, 3).max(operand_bytes(format, narrow, 3)).max(stripe).next_multiple_of(16);
    // Beside compensation tiles may begin in one block and end in the next, but those of gate and up.
    let cut = usize::from(dec.is_some());
    let [qkv, o, pairs, down] = tiles.map(|tiles| tiles.div_ceil(multiplying) + cut);
    // A thread has one row at most, but of gate and up.
    if qkv.max(o).max(down) * TILE > 32 * warps {
        return None;
    }
    let parts = qkv.max(2 * pairs) * warps * TILE * 4;
    let narrow_parts = o.max(down) * warps * TILE * 4;
    // Attention uses both while no product does.
    let attention = attend_shared(shapes.heads / shapes.kv_heads, shapes.head_dim, 32 * warps)?;
    let parts = parts.max(attention.saturating_sub(xs)).next_multiple_of(16);
    // Codebooks come once for a matrix, other formats' numbers with every unit.
    let books = qkv.max(o).max(pairs).max(down) * (unit(format).1 - slot(format));
    let stream = shapes.hidden.next_multiple_of(CODE_UNIT) * 4;
    let fixed = 384 + 128 + 24 + 3 * books + stream + xs + parts + narrow_parts + list;
    let stage = warps * slot(format);
    let with_table = |turns: usize| {
        let fixed = fixed + (turns * LAYER_WORDS * 8).next_multiple_of(128);
        let stages = (room.shared.checked_sub(fixed)? / stage).min(MOST_STAGES);
        (stages >= 2).then_some((turns, stages, fixed + stages * stage))
    };
    // Units of a layer that each warp has at least.
    let fewest: usize = products
        .iter()
        .zip(tiles)
        .enumerate()
        .map(|(i, (&(k, _), tiles))| {
            let units = k.div_ceil(CODE_UNIT);
            let of_block = if cut > 0 && i != 2 { tiles * units / multiplying } else { tiles / multiplying * units };
            of_block / warps * if i == 2 { 2 } else { 1 }
        })
        .sum();
    // Runs of a few layers more or less have one kernel. Where all of them leave too little room for the ring, a few in turn.
    let all = with_table(count.next_multiple_of(8).min(MOST_LAYERS));
    let in_turn = || with_table(TURNS).filter(|&(_, stages, _)| stages <= fewest && count > TURNS);
    let (turns, stages, shared) =
        all.filter(|&(_, stages, _)| covers(format, warps, stages, room)).or_else(in_turn).or(all)?;
    let splits = crate::backend::cuda::splits(multiplying, shapes.kv_heads);
    Some(LayersLaunch {
        warps,
        stages,
        turns,
        blocks: multiplying + n_tb,
        n_tb,
        splits,
        xs,
        parts,
        narrow_parts,
        books,
        shared,
    })
}

/// Bytes of a unit in the ring of `stream.cuh`: codebooks are not there.
fn slot(format: Format) -> usize {
    let bytes = unit(format).1;
    match format {
        Format::AnyPrec { bits, planes } => bytes - book_bytes(bits, planes),
        _ => bytes,
    }
}
