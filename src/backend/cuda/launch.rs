//! From a shape and the device's numbers to a launch: pure arithmetic.

use super::matrix::{Format, Matrix, Plan, dec_words};
use super::pack::{CODE_UNIT, DENSE_UNIT, TILE, book_bytes, code_unit};
use crate::dec::CHUNK;

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
    /// Warps of a block where whole layers are one launch; `None`: as many as go with the shape.
    pub layers: Option<usize>,
    /// Whole layers in one launch: wherever that is possible, never, or (`None`) where it pays.
    pub one_launch: Option<bool>,
    /// When the next kernel may start: 0 at once, 1 when this one's input is there, 2 when its weights are read.
    pub trigger: usize,
    /// Residual lines that a compensating thread has in flight.
    pub dec_flight: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            warps: 20,
            stages: 2,
            beside_dec: (12, 3),
            dec_warps: 8,
            layers: None,
            one_launch: None,
            trigger: 0,
            dec_flight: 4,
        }
    }
}

impl Tuning {
    /// Warps and stages of a kernel that does or does not compensate.
    pub(super) fn beside(&self, dec: bool) -> (usize, usize) {
        if dec { self.beside_dec } else { (self.warps, self.stages) }
    }
}

/// A launch of `gemv_*.cu`: pure arithmetic on the shape and the device's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GemvLaunch {
    pub(super) blocks: usize,
    pub(super) warps: usize,
    pub(super) stages: usize,
    /// Shared memory, bytes; that of the warps that compensate begins at `dec_at`.
    pub(super) shared: usize,
    pub(super) dec_at: usize,
    /// Warps that compensate.
    pub(super) dec_warps: usize,
    /// Whether they keep all activations in shared memory, instead of a chunk each.
    pub(super) dec_staged: bool,
}

/// The numbers of a device that launches depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) multiprocessors: usize,
    /// Shared memory that a block may have, bytes.
    pub(super) shared: usize,
    /// Bytes a second that memory is made for.
    pub(super) memory_rate: f64,
}

#[cfg(test)]
impl Room {
    /// An H200, a card that is like it in all but these two, and a GeForce RTX 4090.
    pub(super) const fn h200(multiprocessors: usize, shared: usize) -> Self {
        Self { multiprocessors, shared, memory_rate: 4.9e12 }
    }
    pub(super) const RTX_4090: Self = Self { multiprocessors: 128, shared: 101_376, memory_rate: 1.008e12 };
}

/// `INPUT` and `ACTIVATION` of `gemv.cuh`.
pub(super) type Input = (u8, Option<u32>);

/// A compensation beside a product, as far as launches depend on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside {
    /// `INPUT` of `gemv.cuh`.
    pub(super) input: u8,
    /// Bytes of the list of selected channels.
    pub(super) list: usize,
}

impl Beside {
    pub(super) fn new(input: u8, plan: &Plan) -> Self {
        Self { input, list: plan.list_bytes() }
    }
}

/// Channels of a unit, and bytes of a stage: codes and what comes with them.
pub(super) fn unit(format: Format) -> (usize, usize) {
    match format {
        Format::AnyPrec { bits, planes } => (CODE_UNIT, TILE * CODE_UNIT * bits / 8 + book_bytes(bits, planes)),
        Format::LutGemm { bits, group } => {
            let channels = code_unit(bits);
            (channels, TILE * (channels * bits / 8 + channels / group * 8))
        }
        Format::Dense => (DENSE_UNIT, 2048),
    }
}

/// Channels of a span, `SPAN` of `sums.cuh`: they share a step, and what they add to a row is one number.
pub(super) const SPAN: usize = 256;

/// Chains in which a row's spans are summed, `CHAINS` of `sums.cuh`.
pub(super) const CHAINS: usize = 16;

/// Bytes of a channel of a product's input, and groups of channels of a span whose sums are kept.
fn operand_of(format: Format) -> (usize, usize) {
    match format {
        Format::Dense => (2, 0),
        Format::AnyPrec { .. } => (DIGITS, 1),
        Format::LutGemm { group, .. } => (DIGITS, SPAN / group),
    }
}

/// Bytes of a fixed-point activation, `DIGITS` of `operand.cuh`.
const DIGITS: usize = 3;

/// Bytes of a product's input in shared memory: `OperandOf` of `operand.cuh`.
pub(super) fn operand_bytes(format: Format, in_features: usize) -> usize {
    let (spans, (channel, groups)) = (in_features.div_ceil(SPAN), operand_of(format));
    let steps = if groups > 0 { spans.next_multiple_of(4) + (spans * groups).next_multiple_of(4) } else { 0 };
    spans * SPAN * channel + steps * 4
}

/// Bytes of the input of eight tokens and a span: `EIGHT_BYTES` of `operand.cuh`.
fn eight_bytes(format: Format) -> usize {
    let (channel, groups) = operand_of(format);
    8 * SPAN * channel + if groups > 0 { (2 + groups) * 32 } else { 0 }
}

/// A launch of `tokens_*.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TokensLaunch {
    /// Tokens of a block, in eights.
    pub(super) eights: usize,
    /// Parts of a row's spans, each of other blocks.
    pub(super) slices: usize,
    /// Tiles whose rows are finished together.
    pub(super) batch: usize,
    pub(super) warps: usize,
    pub(super) stages: usize,
    /// Tiles of tokens, and blocks that share the tiles of rows of each.
    pub(super) token_tiles: usize,
    pub(super) blocks: usize,
    /// Shared memory, bytes.
    pub(super) shared: usize,
}

impl TokensLaunch {
    /// Bytes of all tokens' input in device memory.
    pub(super) fn operand(&self, format: Format, in_features: usize) -> usize {
        self.token_tiles * self.eights * in_features.div_ceil(SPAN) * eight_bytes(format)
    }

    /// Bytes of what slices leave of the rows of `tokens`.
    pub(super) fn parts(&self, out_features: usize, tokens: usize) -> usize {
        if self.slices == 1 { 0 } else { self.slices * tokens * out_features * 4 }
    }
}

/// Bytes of weights that should be on their way to a multiprocessor.
const IN_FLIGHT: usize = 32 << 10;

/// Tiles of a block where many tokens give every multiprocessor several blocks: its input is read once for as many.
const TILES_OF_MANY: usize = 48;

/// The launch of a product of `tokens` tokens, or `None` if its input has no room even in the smallest slices.
///
/// As few slices as leave room for enough weights on their way to as many warps as there may be; else those that leave room
/// for most. Pure arithmetic.
pub(super) fn tokens_launch(
    format: Format,
    (in_features, out_features): (usize, usize),
    tokens: usize,
    room: Room,
) -> Option<TokensLaunch> {
    let (_, stage) = unit(format);
    let (spans, tiles) = (in_features.div_ceil(SPAN), out_features.div_ceil(TILE));
    let chains = spans.min(CHAINS);
    // Sixteen tokens of codebooks of two bytes, or of short groups, take more registers than sixteen warps have.
    let most_warps = |eights: usize| match format {
        Format::AnyPrec { planes: 2, .. } | Format::LutGemm { group: ..128, .. } if eights > 1 => 12,
        _ => 16,
    };
    let of = |eights: usize, slices: usize, warps: usize, rounds: usize| {
        let own_chains = chains.div_ceil(slices);
        let batch = (rounds * warps).div_ceil(own_chains);
        let x = spans.div_ceil(slices) * eights * eight_bytes(format);
        let sums = 2 * batch * own_chains * 8 * eights * TILE * 4;
        // `X` of `tokens.cuh`: what blocks keep of tokens and of tiles.
        let fixed = 640 + x + sums;
        let stages = (room.shared.checked_sub(fixed)? / (warps * stage)).min(6);
        let token_tiles = tokens.div_ceil(8 * eights);
        let blocks = if token_tiles == 1 {
            room.multiprocessors / slices
        } else {
            let twice = (2 * room.multiprocessors).div_ceil(token_tiles * slices);
            tiles.div_ceil(TILES_OF_MANY).max(twice)
        };
        let shared = fixed + stages * warps * stage;
        let blocks = blocks.clamp(1, tiles);
        (stages >= 2).then_some(TokensLaunch { eights, slices, batch, warps, stages, token_tiles, blocks, shared })
    };
    let in_flight = |launch: &TokensLaunch| (launch.stages - 1) * launch.warps * stage;
    let eights: &[usize] = if tokens <= 8 { &[1] } else { &[2, 1] };
    let mut all = Vec::new();
    for &eights in eights {
        for slices in [1, 2, 4, 8, 16].into_iter().filter(|&slices| slices <= chains) {
            for (warps, rounds) in [(most_warps(eights), 2), (most_warps(eights), 1), (8, 1), (4, 1)] {
                all.extend(of(eights, slices, warps, rounds));
            }
        }
    }
    let enough = |launch: &&TokensLaunch| launch.warps == most_warps(launch.eights) && in_flight(launch) >= IN_FLIGHT;
    all.iter().find(enough).or_else(|| all.iter().max_by_key(|launch| (launch.warps, in_flight(launch)))).copied()
}

/// The launch of a product of one token; with fewer warps than `tuning` asks for where a block's shared memory has no room
/// for them, and `None` where it has none for the input.
pub(super) fn gemv_launch(
    format: Format,
    (in_features, out_features): (usize, usize),
    tuning: Tuning,
    dec: Option<Beside>,
    room: Room,
) -> Option<GemvLaunch> {
    let (_, stage) = unit(format);
    let tiles = out_features.div_ceil(TILE);
    let blocks = tiles.min(room.multiprocessors);
    let (most_warps, most_stages) = tuning.beside(dec.is_some());
    let spans = in_features.div_ceil(SPAN);
    let product = |warps: usize, stages: usize| {
        let x = operand_bytes(format, in_features);
        let parts = tiles.div_ceil(blocks) * spans.min(CHAINS) * TILE * 4;
        ((spans * 4).next_multiple_of(128) + x + parts + warps * stages * stage).next_multiple_of(128)
    };
    let launch = |warps: usize, stages: usize, dec_warps: usize| {
        let dec_at = product(warps, stages);
        // Warps that normalize must have all activations at hand; otherwise that is only faster.
        let dec_staged = dec.is_some_and(|dec| {
            let fits = in_features <= STAGED && dec_at + in_features * 4 + (64 << 10) <= room.shared;
            dec.input == 1 || dec.input != 3 && fits
        });
        let beside = dec.map_or(0, |dec| dec_shared(in_features, out_features, dec.list, dec_warps * 32, dec_staged));
        // More than half of a multiprocessor's shared memory, so that each gets one block (`gemv.cuh` says why).
        let shared = (dec_at + beside).max(room.shared / 2 + 1024).next_multiple_of(128);
        let dec_warps = if dec.is_some() { dec_warps } else { 0 };
        GemvLaunch { blocks, warps, stages, shared, dec_at, dec_warps, dec_staged }
    };
    let fits = |l: &GemvLaunch| l.shared <= room.shared;
    for warps in (4..=most_warps).rev().filter(|&n| n == most_warps || n.is_multiple_of(4)) {
        for dec_warps in [tuning.dec_warps, tuning.dec_warps.div_ceil(2)] {
            let found = (2..=most_stages).rev().map(|stages| launch(warps, stages, dec_warps)).find(fits);
            if found.is_some() {
                return found;
            }
        }
    }
    None
}

/// Channels up to which compensating warps keep all activations in shared memory, instead of a chunk each.
pub(super) const STAGED: usize = 16384;

/// Shared memory of compensating warps: activations (all of them, or a chunk per warp), list, sums.
pub(super) fn dec_shared(in_features: usize, out_features: usize, list: usize, threads: usize, staged: bool) -> usize {
    let squares = (in_features.div_ceil(SPAN) * 4).next_multiple_of(128);
    let x = if staged { squares + in_features.next_multiple_of(CHUNK) * 4 } else { threads / 32 * CHUNK * 4 };
    x + list + 8 * dec_words(out_features) * (threads + 1) * 4
}

/// File and entry point of a format's product of one token.
pub(super) fn gemv_entry(format: Format) -> (&'static str, &'static str) {
    match format {
        Format::AnyPrec { .. } => ("gemv_anyprec.cu", "gemv_anyprec"),
        Format::LutGemm { .. } => ("gemv_lutgemm.cu", "gemv_lutgemm"),
        Format::Dense => ("gemv_dense.cu", "gemv_dense"),
    }
}

/// The same of many.
pub(super) fn tokens_entry(format: Format) -> (&'static str, &'static str) {
    match format {
        Format::AnyPrec { .. } => ("tokens_anyprec.cu", "tokens_anyprec"),
        Format::LutGemm { .. } => ("tokens_lutgemm.cu", "tokens_lutgemm"),
        Format::Dense => ("tokens_dense.cu", "tokens_dense"),
    }
}

/// The entry point, in the file of `gemv_entry`, that turns a matrix back into rows.
pub(super) fn dequant_entry(format: Format) -> &'static str {
    match format {
        Format::AnyPrec { .. } => "dequant_anyprec",
        Format::LutGemm { .. } => "dequant_lutgemm",
        Format::Dense => "dequant_dense",
    }
}

/// The constants of `digits.cu`.
pub(super) fn digits_defines(format: Format, launch: TokensLaunch) -> Vec<String> {
    let (_, groups) = operand_of(format);
    let mut defines = vec![format!("INTEGERS={}", u8::from(groups > 0)), format!("EIGHTS={}", launch.eights)];
    defines.extend(SPAN.checked_div(groups).map(|group| format!("GROUP={group}")));
    defines
}

/// The constants of `tokens.cuh`.
pub(super) fn tokens_defines(format: Format, matrix: &Matrix, launch: TokensLaunch) -> Vec<String> {
    let mut defines = shape_defines(format, matrix, launch.warps, launch.stages);
    let TokensLaunch { eights, slices, batch, .. } = launch;
    defines.extend([format!("EIGHTS={eights}"), format!("SLICES={slices}"), format!("BATCH={batch}")]);
    defines
}

pub(super) fn shape_defines(format: Format, matrix: &Matrix, warps: usize, stages: usize) -> Vec<String> {
    let mut defines = vec![
        format!("K={}", matrix.in_features),
        format!("R={}", matrix.out_features),
        format!("WARPS={warps}"),
        format!("STAGES={stages}"),
    ];
    match format {
        Format::AnyPrec { bits, planes } => {
            defines.extend([format!("BITS={bits}"), format!("PLANES={planes}")]);
        }
        Format::LutGemm { bits, group } => defines.extend([format!("BITS={bits}"), format!("GROUP={group}")]),
        Format::Dense => {}
    }
    defines
}

pub(super) fn gemv_defines(
    format: Format,
    matrix: &Matrix,
    launch: GemvLaunch,
    tuning: Tuning,
    (input, activation): Input,
) -> Vec<String> {
    let dec = launch.dec_warps > 0;
    let mut defines = shape_defines(format, matrix, launch.warps, launch.stages);
    defines.push(format!("INPUT={input}"));
    defines.extend(activation.map(|activation| format!("ACTIVATION={activation}")));
    defines.push(format!("DEC={}", u8::from(dec)));
    defines.push(format!("TRIGGER={}", tuning.trigger));
    if dec {
        defines.push(format!("DEC_WORDS={}", dec_words(matrix.out_features)));
        defines.push(format!("DEC_FLIGHT={}", tuning.dec_flight));
        defines.push(format!("DEC_WARPS={}", launch.dec_warps));
        defines.push(format!("DEC_STAGED={}", u8::from(launch.dec_staged)));
    }
    defines
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [Format; 5] = [
        Format::AnyPrec { bits: 3, planes: 1 },
        Format::AnyPrec { bits: 4, planes: 2 },
        Format::LutGemm { bits: 3, group: 128 },
        Format::LutGemm { bits: 4, group: 32 },
        Format::Dense,
    ];

    /// Llama-3-8B's and 70B's projections.
    const SHAPES: [(usize, usize); 8] = [
        (4096, 6144),
        (4096, 4096),
        (4096, 28672),
        (14336, 4096),
        (8192, 10240),
        (8192, 8192),
        (8192, 57344),
        (28672, 8192),
    ];

    #[test]
    fn every_product_fits_cards_with_little_shared_memory() {
        for (multiprocessors, shared) in [(132, 232_448), (108, 166_912), (128, 101_376), (46, 101_376), (20, 101_376)]
        {
            for format in FORMATS {
                for shape in SHAPES {
                    for dec in [None, Some(Beside { input: 1, list: 4096 }), Some(Beside { input: 3, list: 16 << 10 })]
                    {
                        // Only what follows a norm is normalized; down's channels come selected on large cards.
                        if dec.is_some_and(|dec| dec.input == 1) && shape.0 > 8192 {
                            continue;
                        }
                        let room = Room::h200(multiprocessors, shared);
                        let Some(launch) = gemv_launch(format, shape, Tuning::default(), dec, room) else {
                            // A long row, or many rows of one multiprocessor: what takes many tokens takes slices.
                            assert!(shared == 101_376, "{format:?} {shape:?} {dec:?} {room:?}");
                            assert!(tokens_launch(format, shape, 1, room).is_some(), "{format:?} {shape:?} {room:?}");
                            continue;
                        };
                        assert!(launch.shared <= shared && launch.dec_at <= launch.shared, "{launch:?}");
                        assert_eq!(launch.dec_warps > 0, dec.is_some(), "{launch:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn large_cards_take_what_was_tuned() {
        let tuning = Tuning::default();
        let room = Room::h200(132, 232_448);
        for format in &FORMATS[..4] {
            for shape in &SHAPES[..4] {
                let plain = gemv_launch(*format, *shape, tuning, None, room).unwrap();
                assert_eq!((plain.warps, plain.stages), (tuning.warps, tuning.stages), "{format:?} {shape:?}");
                let beside = gemv_launch(*format, *shape, tuning, Some(Beside { input: 3, list: 896 }), room).unwrap();
                assert_eq!((beside.warps, beside.dec_warps), (tuning.beside_dec.0, tuning.dec_warps), "{format:?}");
            }
        }
    }

    #[test]
    fn products_of_many_tokens_fit_cards_with_little_shared_memory() {
        for (multiprocessors, shared) in [(132, 232_448), (108, 166_912), (128, 101_376), (20, 101_376)] {
            let room = Room::h200(multiprocessors, shared);
            for format in FORMATS {
                for shape in SHAPES.into_iter().chain([(32, 8), (576, 72), (1536, 576), (2080, 136), (36_864, 4608)]) {
                    for tokens in [1, 2, 7, 8, 9, 16, 17, 100, 512] {
                        let launch = tokens_launch(format, shape, tokens, room);
                        let launch = launch.unwrap_or_else(|| panic!("{format:?} {shape:?} {tokens} {room:?}"));
                        let what = format!("{format:?} {shape:?} {tokens} {room:?}: {launch:?}");
                        assert!(launch.shared <= shared && launch.stages >= 2, "{what}");
                        assert!(launch.token_tiles * launch.eights * 8 >= tokens, "{what}");
                        assert!(launch.slices <= shape.0.div_ceil(SPAN).min(CHAINS), "{what}");
                        assert!((1..=shape.1.div_ceil(TILE)).contains(&launch.blocks), "{what}");
                        let one_wave = launch.blocks * launch.slices <= multiprocessors;
                        assert!(launch.token_tiles > 1 || one_wave || launch.blocks == 1, "{what}");
                    }
                }
            }
        }
        let room = Room::h200(20, 49_152);
        assert_eq!(tokens_launch(FORMATS[0], (1 << 18, 4096), 8, room), None);
    }

    /// Of Llama-3-8B on a card with 132 multiprocessors: sixteen warps, as few slices as there is room for.
    #[test]
    fn slices_follow_from_the_length_of_rows() {
        let room = Room::h200(132, 232_448);
        let of = |shape, tokens| {
            let launch = tokens_launch(FORMATS[0], shape, tokens, room).unwrap();
            assert_eq!(launch.warps, 16, "{launch:?}");
            (launch.eights, launch.slices, launch.blocks)
        };
        assert_eq!(of((4096, 6144), 2), (1, 1, 132));
        assert_eq!(of((4096, 28672), 8), (1, 1, 132));
        assert_eq!(of((14336, 4096), 8), (1, 4, 33));
        assert_eq!(of((4096, 4096), 16), (2, 2, 66));
        assert_eq!(of((14336, 4096), 16), (2, 8, 16));
    }
}
