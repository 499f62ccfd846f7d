//! From a shape and the device's numbers to a launch: pure arithmetic.

use anyhow::{Result, ensure};

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
    /// Bytes that fixed-point activations have.
    pub(super) digits: usize,
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

/// Bytes of a product's input in shared memory, in so many digits: `OperandOf` of `operand.cuh`.
pub(super) fn operand_bytes(format: Format, in_features: usize, digits: usize) -> usize {
    let blocks = in_features.div_ceil(OPERAND_BLOCK);
    let groups = match format {
        Format::Dense => return blocks * OPERAND_BLOCK * 2,
        Format::AnyPrec { .. } => blocks,
        Format::LutGemm { group, .. } => blocks * OPERAND_BLOCK / group,
    };
    blocks * OPERAND_BLOCK * digits + (blocks.next_multiple_of(4) + groups.next_multiple_of(4)) * 4
}

/// Channels whose fixed-point numbers share a step.
pub(super) const OPERAND_BLOCK: usize = 256;

/// The launch of a product; with fewer warps than `tuning` asks for where a block's shared memory has no room for them.
///
/// # Errors
/// A row that is too long for the device.
pub(super) fn gemv_launch(
    format: Format,
    (in_features, out_features): (usize, usize),
    tuning: Tuning,
    dec: Option<Beside>,
    room: Room,
) -> Result<GemvLaunch> {
    let (_, stage) = unit(format);
    let tiles = out_features.div_ceil(TILE);
    let blocks = tiles.min(room.multiprocessors);
    let (most_warps, most_stages) = tuning.beside(dec.is_some());
    let product = |warps: usize, stages: usize, digits: usize| {
        let x = operand_bytes(format, in_features, digits);
        let parts = tiles.div_ceil(blocks) * warps * TILE * 4;
        (128 + x + parts + warps * stages * stage).next_multiple_of(128)
    };
    let launch = |warps: usize, stages: usize, dec_warps: usize, digits: usize| {
        let dec_at = product(warps, stages, digits);
        // Warps that normalize must have all activations at hand; otherwise that is only faster.
        let dec_staged = dec.is_some_and(|dec| {
            let fits = in_features <= STAGED && dec_at + in_features * 4 + (64 << 10) <= room.shared;
            dec.input == 1 || dec.input != 3 && fits
        });
        let beside = dec.map_or(0, |dec| dec_shared(in_features, out_features, dec.list, dec_warps * 32, dec_staged));
        // More than half of a multiprocessor's shared memory, so that each gets one block (`gemv.cuh` says why).
        let shared = (dec_at + beside).max(room.shared / 2 + 1024).next_multiple_of(128);
        let dec_warps = if dec.is_some() { dec_warps } else { 0 };
        GemvLaunch { blocks, warps, stages, shared, dec_at, dec_warps, dec_staged, digits }
    };
    let fits = |l: &GemvLaunch| l.shared <= room.shared;
    // Fewer digits where there is no room for a long row of 24 bits.
    for digits in [3, 2] {
        for warps in (4..=most_warps).rev().filter(|&n| n == most_warps || n.is_multiple_of(4)) {
            for dec_warps in [tuning.dec_warps, tuning.dec_warps.div_ceil(2)] {
                let found = (2..=most_stages).rev().map(|stages| launch(warps, stages, dec_warps, digits)).find(fits);
                if let Some(found) = found {
                    return Ok(found);
                }
            }
        }
    }
    let smallest = launch(2, 2, 1, 2);
    ensure!(
        fits(&smallest),
        "cuda: a row of {in_features} channels needs {} bytes of shared memory, {} are there",
        smallest.shared,
        room.shared
    );
    Ok(smallest)
}

/// Channels up to which compensating warps keep all activations in shared memory, instead of a chunk each.
pub(super) const STAGED: usize = 16384;

/// Shared memory of compensating warps: activations (all of them, or a chunk per warp), list, sums.
pub(super) fn dec_shared(in_features: usize, out_features: usize, list: usize, threads: usize, staged: bool) -> usize {
    let x = if staged { 128 + in_features.next_multiple_of(CHUNK) * 4 } else { threads / 32 * CHUNK * 4 };
    x + list + 8 * dec_words(out_features) * (threads + 1) * 4
}

/// File and entry points of a format: product, dequantization.
pub(super) fn entries(format: Format) -> (&'static str, &'static str, &'static str) {
    match format {
        Format::AnyPrec { .. } => ("gemv_anyprec.cu", "gemv_anyprec", "dequant_anyprec"),
        Format::LutGemm { .. } => ("gemv_lutgemm.cu", "gemv_lutgemm", "dequant_lutgemm"),
        Format::Dense => ("gemv_dense.cu", "gemv_dense", "dequant_dense"),
    }
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
    defines.extend([format!("INPUT={input}"), format!("DIGITS={}", launch.digits)]);
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
                        let launch = gemv_launch(format, shape, Tuning::default(), dec, room);
                        let launch = launch.unwrap_or_else(|e| panic!("{format:?} {shape:?} {dec:?} {room:?}: {e:#}"));
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
    fn a_row_that_is_too_long_is_named() {
        let room = Room::h200(20, 49_152);
        let error = gemv_launch(FORMATS[0], (65_536, 4096), Tuning::default(), None, room).unwrap_err().to_string();
        assert!(error.contains("65536 channels") && error.contains("49152"), "{error}");
    }
}
