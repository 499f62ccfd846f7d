//! From the stored formats to what the kernels read: tiles of 16 rows, units of channels, 16 bytes per lane.
//!
//! The layouts are described where they are read, at the top of `kernels-cuda/gemv_*.cu`. Pure; the bytes of
//! weights stay the same but for padding to whole tiles and units. A tile is packed by itself, straight into the
//! memory that it is sent from, so that all cores pack while earlier tiles are on their way.

use std::ops::Range;

use anyhow::{Context, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::matrix::Format;
use crate::backend::cuda::Dtype;
use crate::format::{AnyPrec, Dense, Floats, LutGemm};
use crate::weights::Weight;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Channels of a unit of codes.
pub(super) const CODE_UNIT: usize = 256;

/// Channels of a unit of codes of a byte each.
pub(super) const BYTE_UNIT: usize = 128;

/// Channels of a unit of 16-bit numbers.
pub(super) const DENSE_UNIT: usize = 64;

/// How the eight codes of a lane and product are put into a word: channels 0 to 3 of rows g and g + 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// One after the other, as byte permutations take them.
    LookUp,
    /// Pairs of channels 16 bits apart, so that two of them become integers together.
    Integers,
}

impl Order {
    /// From four nibbles of either row, channel 0 lowest.
    fn word(self, low: u32, high: u32) -> u32 {
        match self {
            Self::LookUp => low | high << 16,
            Self::Integers => apart(low) | apart(high) << 8,
        }
    }
}

/// Four nibbles, the even ones in the low half, the odd ones in the high half.
fn apart(n: u32) -> u32 {
    n & 0xf | n >> 4 & 0xf0 | (n & 0xf0) << 12 | (n & 0xf000) << 8
}

/// A matrix on its way into a kernel's layout. Every tile has as many bytes of codes, and of what comes with them.
pub(super) enum Packing<'a> {
    /// 3 or 4 bits.
    AnyPrec(&'a AnyPrec<'a>, Dtype),
    /// 3, 4 or 8 bits, uniform.
    LutGemm(&'a LutGemm<'a>),
    /// 16-bit numbers.
    Dense(&'a Dense<'a>, Dtype),
}

impl<'a> Packing<'a> {
    /// How `weight` is packed; `None` for codes of widths that no packed layout has.
    pub(super) fn of(weight: &'a Weight<'a>, dtype: Dtype) -> Option<Self> {
        match weight {
            Weight::AnyPrec(w) if matches!(w.bits(), 3 | 4) => Some(Self::AnyPrec(w, dtype)),
            Weight::LutGemm(w) if matches!(w.bits(), 3 | 4 | 8) => Some(Self::LutGemm(w)),
            Weight::Dense(w) => Some(Self::Dense(w, dtype)),
            _ => None,
        }
    }

    /// The layout, if there is a kernel for it: groups of usual sizes, steps that are powers of two apart.
    pub(super) fn format(&self) -> Option<Format> {
        match self {
            Self::AnyPrec(w, _) => Some(Format::AnyPrec { bits: w.bits() }),
            Self::LutGemm(w) => {
                let (bits, group) = (w.bits(), w.group_size());
                (matches!(group, 32 | 64 | 128) && is_uniform(w)).then_some(Format::LutGemm { bits, group })
            }
            Self::Dense(..) => Some(Format::Dense),
        }
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            Self::AnyPrec(w, _) => (w.in_features(), w.out_features()),
            Self::LutGemm(w) => (w.in_features(), w.out_features()),
            Self::Dense(w, _) => (w.in_features, w.out_features),
        }
    }

    /// Tiles of 16 rows.
    pub(super) fn tiles(&self) -> usize {
        self.shape().1.div_ceil(TILE)
    }

    /// Bytes of a tile's codes or numbers.
    pub(super) fn code_bytes(&self) -> usize {
        let units = self.shape().0.div_ceil(CODE_UNIT);
        match self {
            Self::AnyPrec(w, _) => units * unit_words(w.bits()) * 4,
            Self::LutGemm(w) if w.bits() == 8 => w.in_features().next_multiple_of(BYTE_UNIT) * TILE,
            Self::LutGemm(w) => units * unit_words(w.bits()) * 4,
            Self::Dense(w, _) => w.in_features.div_ceil(DENSE_UNIT) * TILE * DENSE_UNIT * 2,
        }
    }

    /// Bytes of a tile's codebooks or steps.
    pub(super) fn aux_bytes(&self) -> usize {
        match self {
            Self::AnyPrec(w, _) => (TILE * 2) << w.bits(),
            Self::LutGemm(w) => groups(w) * TILE * 8,
            Self::Dense(..) => 0,
        }
    }

    /// Overwrites `out` with the codes or numbers of `tile`.
    pub(super) fn codes(&self, tile: usize, out: &mut [u8]) {
        let (in_features, rows) = self.shape();
        let rows = tile * TILE..rows.min((tile + 1) * TILE);
        match self {
            Self::AnyPrec(w, _) => {
                codes(
                    in_features,
                    rows,
                    w.bits(),
                    Order::LookUp,
                    |rows, stride, out| w.nibbles(rows, stride, out),
                    out,
                );
            }
            Self::LutGemm(w) if w.bits() == 8 => byte_codes(w, rows, out),
            Self::LutGemm(w) => {
                codes(
                    in_features,
                    rows,
                    w.bits(),
                    Order::Integers,
                    |rows, stride, out| w.nibbles(rows, stride, out),
                    out,
                );
            }
            Self::Dense(w, dtype) => numbers(w, *dtype, rows, bytemuck::cast_slice_mut(out)),
        }
    }

    /// Overwrites `out` with the codebooks or steps of `tile`.
    pub(super) fn aux(&self, tile: usize, out: &mut [u8]) {
        match self {
            Self::AnyPrec(w, dtype) => codebooks(w, *dtype, tile, out),
            Self::LutGemm(w) => steps(w, tile, bytemuck::cast_slice_mut(out)),
            Self::Dense(..) => {}
        }
    }
}

/// The words that `weight` is sent to the device as, tile by tile; for measuring how long packing takes, without a device.
///
/// # Errors
/// Codes of other widths than those that are packed: they are sent as they are stored.
pub fn packed(weight: &Weight<'_>, dtype: Dtype) -> Result<Vec<u32>> {
    let packing =
        Packing::of(weight, dtype).context("codes of other than 3 or 4 bits (8 of LUT-GEMM) are not packed")?;
    let (codes, aux) = (packing.code_bytes(), packing.aux_bytes());
    let mut words = vec![0u32; packing.tiles() * (codes + aux) / 4];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    bytes.par_chunks_exact_mut(codes + aux).enumerate().for_each(|(tile, out)| {
        packing.codes(tile, &mut out[..codes]);
        packing.aux(tile, &mut out[codes..]);
    });
    Ok(words)
}

/// Channels of a unit of codes, by their bits.
pub(super) fn code_unit(bits: usize) -> usize {
    if bits == 8 { BYTE_UNIT } else { CODE_UNIT }
}

/// Words of a unit of codes.
fn unit_words(bits: usize) -> usize {
    if bits == 3 { 384 } else { 512 }
}

/// Packs the codes of the rows of a tile: `nibbles(rows, stride, out)` writes them eight to a word.
fn codes(
    in_features: usize,
    tile: Range<usize>,
    bits: usize,
    order: Order,
    nibbles: impl Fn(Range<usize>, usize, &mut [u32]),
    out: &mut [u8],
) {
    let width = in_features.div_ceil(CODE_UNIT) * (CODE_UNIT / 8);
    let mut rows = vec![0u32; TILE * width];
    nibbles(tile, width, &mut rows);
    let words: &mut [[u32; 4]] = bytemuck::cast_slice_mut(out);
    for (u, unit) in words.chunks_exact_mut(unit_words(bits) / 4).enumerate() {
        for lane in 0..32 {
            // Products 2p and 2p + 1 are the halves of eight channels, 32 channels from pair to pair.
            let at = |p: usize| lane / 4 * width + u * (CODE_UNIT / 8) + p * 4 + lane % 4;
            let pair = |p: usize| {
                let (low, high) = (rows[at(p)], rows[8 * width + at(p)]);
                [order.word(low & 0xffff, high & 0xffff), order.word(low >> 16, high >> 16)]
            };
            let group = |g: usize| {
                let ([a, b], [c, d]) = (pair(2 * g), pair(2 * g + 1));
                [a, b, c, d]
            };
            if bits == 3 {
                // Every fourth word goes into the spare bits of the three before it.
                let groups = [0, 1, 2, 3].map(|g| spare(group(g)));
                for v in 0..3 {
                    unit[v * 32 + lane] = groups.map(|g| g[v]);
                }
            } else {
                for g in 0..4 {
                    unit[g * 32 + lane] = group(g);
                }
            }
        }
    }
}

fn spare([a, b, c, d]: [u32; 4]) -> [u32; 3] {
    let bit = |i: u32| (d >> i & 0x1111_1111) << 3;
    [a | bit(0), b | bit(1), c | bit(2)]
}

/// One 16-bit number.
fn narrow(value: f32, dtype: Dtype) -> u16 {
    match dtype {
        Dtype::Bfloat16 => bf16::from_f32(value).to_bits(),
        Dtype::Float16 | Dtype::Float32 => f16::from_f32(value).to_bits(),
    }
}

/// A tile's codebooks as bytes, low ones before high ones.
fn codebooks(w: &AnyPrec<'_>, dtype: Dtype, tile: usize, out: &mut [u8]) {
    let size = 1usize << w.bits();
    let mut centroids = [0f32; 16];
    let centroids = &mut centroids[..size];
    out.fill(0);
    for (row, book) in (tile * TILE..w.out_features()).zip(out.chunks_exact_mut(2 * size)) {
        w.lut().read_f32(row * size, centroids);
        for (i, &centroid) in centroids.iter().enumerate() {
            let [low, high] = narrow(centroid, dtype).to_le_bytes();
            book[i] = low;
            book[size + i] = high;
        }
    }
}

/// Groups of a row, whole units of them.
fn groups(w: &LutGemm<'_>) -> usize {
    w.in_features().next_multiple_of(code_unit(w.bits())) / w.group_size()
}

/// A tile's steps and centres, `[groups, 16, 2]`.
fn steps(w: &LutGemm<'_>, tile: usize, out: &mut [f32]) {
    let (bits, rows) = (w.bits(), w.out_features());
    let first = tile * TILE;
    let count = TILE.min(rows - first);
    let (mut alpha, mut q_bias) = ([0f32; TILE], [0f32; TILE]);
    out.fill(0.0);
    for (g, out) in out.chunks_exact_mut(TILE * 2).take(w.in_features() / w.group_size()).enumerate() {
        w.alpha().read_f32(g * bits * rows + first, &mut alpha[..count]);
        w.q_bias().read_f32(g * rows + first, &mut q_bias[..count]);
        for (r, out) in out.chunks_exact_mut(2).take(count).enumerate() {
            out[0] = 2.0 * alpha[r];
            out[1] = q_bias[r] + alpha[r];
        }
    }
}

/// The codes of the rows of a tile, a byte each, in the order in which lanes take them.
fn byte_codes(w: &LutGemm<'_>, rows: Range<usize>, out: &mut [u8]) {
    let mut row = vec![0u8; w.in_features().next_multiple_of(BYTE_UNIT)];
    if rows.len() < TILE {
        out.fill(0);
    }
    for (r, number) in rows.enumerate() {
        w.codes(number, &mut row[..w.in_features()]);
        for (piece, codes) in row.chunks_exact(8).enumerate() {
            let (p, t) = (piece / 4, piece % 4);
            let at = ((p * 32 + r % 8 * 4 + t) * 2 + r / 8) * 8;
            out[at..at + 8].copy_from_slice(codes);
        }
    }
}

/// The 16-bit numbers of the rows of a tile in the order in which lanes take them.
fn numbers(w: &Dense<'_>, dtype: Dtype, rows: Range<usize>, out: &mut [u16]) {
    let width = w.in_features;
    let mut row = vec![0u16; width.next_multiple_of(DENSE_UNIT)];
    if rows.len() < TILE {
        out.fill(0);
    }
    for (r, number) in rows.enumerate() {
        narrow_row(w, dtype, number, &mut row[..width]);
        for (piece, values) in row.chunks_exact(8).enumerate() {
            let (u, p, t) = (piece / 8, piece / 4 % 2, piece % 4);
            let at = ((u * 4 + p * 2 + r / 8) * 32 + r % 8 * 4 + t) * 8;
            out[at..at + 8].copy_from_slice(values);
        }
    }
}

/// One row as bits of `dtype`; as it is if that is the type it is stored in.
fn narrow_row(w: &Dense<'_>, dtype: Dtype, row: usize, out: &mut [u16]) {
    let range = row * w.in_features..(row + 1) * w.in_features;
    match (&w.values, dtype) {
        (Floats::F16(v), Dtype::Float16) => out.copy_from_slice(v[range].reinterpret_cast()),
        (Floats::Bf16(v), Dtype::Bfloat16) => out.copy_from_slice(v[range].reinterpret_cast()),
        (values, _) => {
            let mut numbers = vec![0f32; range.len()];
            values.read_f32(range.start, &mut numbers);
            out.iter_mut().zip(numbers).for_each(|(out, value)| *out = narrow(value, dtype));
        }
    }
}

/// True if the steps of every group are powers of two apart, as a uniform quantizer makes them.
pub(super) fn is_uniform(w: &LutGemm<'_>) -> bool {
    let (rows, bits) = (w.out_features(), w.bits());
    (0..w.in_features() / w.group_size()).into_par_iter().all(|g| {
        let plane = |b: usize, out: &mut [f32]| w.alpha().read_f32((g * bits + b) * rows, out);
        let (mut first, mut other) = (vec![0f32; rows], vec![0f32; rows]);
        plane(0, &mut first);
        (1..bits).all(|b| {
            plane(b, &mut other);
            other.iter().zip(&first).all(|(a, first)| *a == first * (1u32 << b) as f32)
        })
    })
}

#[cfg(test)]
mod tests;
