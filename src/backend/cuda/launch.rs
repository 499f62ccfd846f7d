//! From a shape and the device's numbers to a launch: pure arithmetic.

use anyhow::Result;

use super::matrix::{Format, Matrix, Plan, dec_words};
use super::pack::{BYTE_UNIT, CODE_UNIT, DENSE_UNIT, TILE};
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
    /// Warps of a block where whole layers are one launch.
    pub layers: usize,
    /// Whole layers in one launch wherever that is possible, not only where it was measured to pay.
    pub layers_always: bool,
    /// When the next kernel may start: 0 at once, 1 when this one's input is there, 2 when its weights are read.
    pub trigger: usize,
    /// Residual lines that a compensating thread has in flight.
    pub dec_flight: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            warps: 16,
            stages: 2,
            beside_dec: (12, 3),
            dec_warps: 8,
            layers: 16,
            layers_always: false,
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
    pub(super) shared: usize,
}

/// Channels of a unit, bytes of a stage (codes and what comes with them), sums of x that are kept.
pub(super) fn unit(format: Format, in_features: usize) -> (usize, usize, usize) {
    let units = in_features.div_ceil(CODE_UNIT);
    match format {
        Format::AnyPrec { bits } => (CODE_UNIT, if bits == 3 { 1536 } else { 2048 } + (32 << bits), 0),
        Format::LutGemm { bits: 8, group } => {
            (BYTE_UNIT, 2048 + 16384 / group, in_features.div_ceil(BYTE_UNIT) * (BYTE_UNIT / group))
        }
        Format::LutGemm { bits, group } => {
            (CODE_UNIT, if bits == 3 { 1536 } else { 2048 } + 32768 / group, units * (CODE_UNIT / group))
        }
        Format::Dense => (DENSE_UNIT, 2048, 0),
    }
}

pub(super) fn gemv_launch(
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
pub(super) const STAGED: usize = 16384;

/// Whether compensating warps keep all activations: they must where they normalize them.
pub(super) fn is_staged(in_features: usize, input: u8, launch: GemvLaunch, most_shared: usize) -> bool {
    input == 1 || input != 3 && in_features <= STAGED && launch.shared + in_features * 4 + (64 << 10) <= most_shared
}

/// Shared memory of compensating warps: activations (all of them, or a chunk per warp), list, sums.
pub(super) fn dec_shared(plan: &Plan, threads: usize, staged: bool) -> usize {
    let x = if staged { 128 + plan.in_features.next_multiple_of(CHUNK) * 4 } else { threads / 32 * CHUNK * 4 };
    x + plan.list_chunks() * plan.k_chunk * 8 + 8 * dec_words(plan.out_features) * (threads + 1) * 4
}

/// File and entry points of a format: product, dequantization.
pub(super) fn entries(format: Format) -> (&'static str, &'static str, &'static str) {
    match format {
        Format::AnyPrec { .. } => ("gemv_anyprec.cu", "gemv_anyprec", "dequant_anyprec"),
        Format::LutGemm { bits: 8, .. } => ("gemv_uniform8.cu", "gemv_uniform8", "dequant_uniform8"),
        Format::LutGemm { .. } => ("gemv_lutgemm.cu", "gemv_lutgemm", "dequant_lutgemm"),
        Format::Dense => ("gemv_dense.cu", "gemv_dense", "dequant_dense"),
    }
}

pub(super) fn shape_defines(format: Format, matrix: &Matrix, launch: GemvLaunch) -> Vec<String> {
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

pub(super) fn gemv_defines(
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
