//! From the stored formats to what the kernels read: tiles of 16 rows, units of channels, 16 bytes per lane.
//!
//! The layouts are described where they are read, in `kernels-cuda/formats`. Pure; the bytes of
//! weights stay the same but for padding to whole tiles and units. A tile is packed by itself, straight into the
//! memory that it is sent from, so that all cores pack while earlier tiles are on their way.

use std::ops::Range;

use anyhow::{Context, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::matrix::Format;
use crate::backend::cuda::Dtype;
use crate::format::bytes::{MOST, OnePlane, TwoPlanes};
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
    /// One row after the other, as byte permutations take them.
    LookUp,
    /// In turns, so that each byte has a code of either row.
    Bytes,
}

impl Order {
    /// From four nibbles of either row, channel 0 lowest.
    fn word(self, low: u32, high: u32) -> u32 {
        match self {
            Self::LookUp => low | high << 16,
            Self::Bytes => apart(low) | apart(high) << 4,
        }
    }
}

/// Four nibbles, each in the low half of a byte.
fn apart(n: u32) -> u32 {
    let pairs = n & 0xff | (n & 0xff00) << 8;
    pairs & 0x000f_000f | (pairs & 0x00f0_00f0) << 4
}

/// How codebooks become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Planes {
    /// One byte a centroid says what it is.
    One,
    /// Two bytes, to 15 or 16 bits of the row's range.
    Two,
}

impl Planes {
    /// As many as say every codebook; `None` if some centroid is not finite.
    fn of(w: &AnyPrec<'_>) -> Option<Self> {
        let rows = (0..w.out_features()).into_par_iter().map(|row| {
            let book = centroids(w, row);
            let book = &book[..1 << w.bits()];
            match OnePlane::new(book) {
                Some(plane) if plane.exact => Some(Self::One),
                _ => TwoPlanes::new(book).map(|_| Self::Two),
            }
        });
        rows.try_reduce(|| Self::One, |a, b| Some(if a == Self::One { b } else { a }))
    }

    pub(super) fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }
}

/// The centroids of a row.
fn centroids(w: &AnyPrec<'_>, row: usize) -> [f32; MOST] {
    let mut book = [0f32; MOST];
    let size = 1 << w.bits();
    w.lut().read_f32(row * size, &mut book[..size]);
    book
}

/// A row's codebook as kernels look it up (`anyprec.cuh`).
struct Book {
    scale: f32,
    offset: f32,
    /// What the centroids are, plane by plane.
    bytes: [[i8; MOST]; 2],
}

impl Book {
    fn new(w: &AnyPrec<'_>, planes: Planes, row: usize) -> Option<Self> {
        let book = centroids(w, row);
        let size = 1 << w.bits();
        let mut bytes = [[0; MOST]; 2];
        let (scale, offset) = match planes {
            Planes::One => {
                let plane = OnePlane::new(&book[..size])?;
                // One less: what halves of a codebook add must have room.
                bytes[0] = plane.q.map(|q| q.wrapping_sub(1));
                (plane.scale, plane.offset + plane.scale)
            }
            Planes::Two => {
                let plane = TwoPlanes::new(&book[..size])?;
                let digits = |i: usize| {
                    let high = (plane.q(i) + 128).div_euclid(radix(w.bits()));
                    [high, plane.q(i) - radix(w.bits()) * high].map(|digit| digit as i8)
                };
                (0..size).for_each(|i| [bytes[0][i], bytes[1][i]] = digits(i));
                (plane.scale, plane.offset)
            }
        };
        if size == MOST {
            bytes.iter_mut().for_each(halves);
        }
        Some(Self { scale, offset, bytes })
    }
}

/// What a byte of the first plane counts in those of the second, `PLANE` of `anyprec.cuh`: halves of a codebook leave 255
/// values to a byte.
fn radix(bits: usize) -> i32 {
    if bits == 4 { 255 } else { 256 }
}

/// From sixteen entries to two halves, of which an entry is the sum: what one half has below zero gives −1 for the codes of
/// the other.
fn halves(bytes: &mut [i8; MOST]) {
    let (first, second) = bytes.split_at_mut(MOST / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let (x, y) = (i32::from(*a), i32::from(*b));
        // Of y = −1 and x = −1 one becomes 0.
        let below = i32::from(if x == -1 { y < -1 } else { y + i32::from(x < 0) < 0 });
        *a = (x + below) as i8;
        *b = (y + i32::from(x + below < 0)) as i8;
    }
}

/// A matrix on its way into a kernel's layout. Every tile has as many bytes of codes, and of what comes with them.
pub(super) enum Packing<'a> {
    /// 3 or 4 bits.
    AnyPrec(&'a AnyPrec<'a>, Dtype, Planes),
    /// 3, 4 or 8 bits, uniform.
    LutGemm(&'a LutGemm<'a>),
    /// 16-bit numbers.
    Dense(&'a Dense<'a>, Dtype),
}

impl<'a> Packing<'a> {
    /// How `weight` is packed; `None` for codes of widths that no packed layout has.
    pub(super) fn of(weight: &'a Weight<'a>, dtype: Dtype) -> Option<Self> {
        match weight {
            Weight::AnyPrec(w) if matches!(w.bits(), 3 | 4) => Some(Self::AnyPrec(w, dtype, Planes::of(w)?)),
            Weight::LutGemm(w) if matches!(w.bits(), 3 | 4 | 8) => Some(Self::LutGemm(w)),
            Weight::Dense(w) => Some(Self::Dense(w, dtype)),
            _ => None,
        }
    }

    /// The layout, if there is a kernel for it: groups of usual sizes, steps that are powers of two apart.
    pub(super) fn format(&self) -> Option<Format> {
        match self {
            Self::AnyPrec(w, _, planes) => Some(Format::AnyPrec { bits: w.bits(), planes: planes.count() }),
            Self::LutGemm(w) => {
                let (bits, group) = (w.bits(), w.group_size());
                (matches!(group, 32 | 64 | 128) && is_uniform(w)).then_some(Format::LutGemm { bits, group })
            }
            Self::Dense(..) => Some(Format::Dense),
        }
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            Self::AnyPrec(w, ..) => (w.in_features(), w.out_features()),
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
            Self::AnyPrec(w, ..) => units * unit_words(w.bits()) * 4,
            Self::LutGemm(w) if w.bits() == 8 => w.in_features().next_multiple_of(BYTE_UNIT) * TILE,
            Self::LutGemm(w) => units * unit_words(w.bits()) * 4,
            Self::Dense(w, _) => w.in_features.div_ceil(DENSE_UNIT) * TILE * DENSE_UNIT * 2,
        }
    }

    /// Bytes of a tile's codebooks or steps.
    pub(super) fn aux_bytes(&self) -> usize {
        match self {
            Self::AnyPrec(w, _, planes) => book_bytes(w.bits(), planes.count()),
            Self::LutGemm(w) => groups(w) * TILE * 8,
            Self::Dense(..) => 0,
        }
    }

    /// Bytes of a tile's codebooks as 16-bit numbers, for products of many tokens.
    pub(super) fn lut_bytes(&self) -> usize {
        match self {
            Self::AnyPrec(w, ..) => (TILE * 2) << w.bits(),
            _ => 0,
        }
    }

    /// Overwrites `out` with the codebooks of `tile` as 16-bit numbers.
    pub(super) fn lut(&self, tile: usize, out: &mut [u8]) {
        let Self::AnyPrec(w, dtype, _) = self else { return };
        out.fill(0);
        let books: &mut [u16] = bytemuck::cast_slice_mut(out);
        for (row, out) in (tile * TILE..w.out_features()).zip(books.chunks_exact_mut(1 << w.bits())) {
            out.iter_mut().zip(centroids(w, row)).for_each(|(out, centroid)| *out = narrow(centroid, *dtype));
        }
    }

    /// Overwrites `out` with the codes or numbers of `tile`.
    pub(super) fn codes(&self, tile: usize, out: &mut [u8]) {
        let (in_features, rows) = self.shape();
        let rows = tile * TILE..rows.min((tile + 1) * TILE);
        match self {
            Self::AnyPrec(w, ..) => codes(in_features, rows.clone(), w.bits(), Order::LookUp, out, |stride, out| {
                w.nibbles(rows.clone(), stride, out);
            }),
            Self::LutGemm(w) if w.bits() == 8 => byte_codes(w, rows, out),
            Self::LutGemm(w) => codes(in_features, rows.clone(), w.bits(), Order::Bytes, out, |stride, out| {
                w.nibbles(rows.clone(), stride, out);
            }),
            Self::Dense(w, dtype) => numbers(w, *dtype, rows, bytemuck::cast_slice_mut(out)),
        }
    }

    /// Overwrites `out` with the codebooks or steps of `tile`.
    pub(super) fn aux(&self, tile: usize, out: &mut [u8]) {
        match self {
            Self::AnyPrec(w, _, planes) => books(w, *planes, tile, out),
            Self::LutGemm(w) => steps(w, tile, bytemuck::cast_slice_mut(out)),
            Self::Dense(..) => {}
        }
    }
}

/// Bytes of a tile's codebooks, scales and offsets.
pub(super) fn book_bytes(bits: usize, planes: usize) -> usize {
    ((planes * TILE) << bits) + TILE * 8
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

/// Packs the codes of the rows of a tile: `nibbles(stride, out)` writes them eight to a word.
fn codes(
    in_features: usize,
    tile: Range<usize>,
    bits: usize,
    order: Order,
    out: &mut [u8],
    nibbles: impl Fn(usize, &mut [u32]),
) {
    let width = in_features.div_ceil(CODE_UNIT) * (CODE_UNIT / 8);
    let mut rows = vec![0u32; TILE * width];
    nibbles(width, &mut rows[..tile.len() * width]);
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

/// A tile's codebooks as bytes, plane after plane, and each row's scale and offset.
fn books(w: &AnyPrec<'_>, planes: Planes, tile: usize, out: &mut [u8]) {
    let size = 1usize << w.bits();
    out.fill(0);
    let (bytes, scales) = out.split_at_mut(planes.count() * TILE * size);
    let scales: &mut [[f32; 2]] = bytemuck::cast_slice_mut(scales);
    for (r, row) in (tile * TILE..w.out_features()).take(TILE).enumerate() {
        let book = Book::new(w, planes, row).expect("finite, as Planes::of found");
        scales[r] = [book.scale, book.offset];
        for (plane, own) in bytes.chunks_exact_mut(TILE * size).zip(&book.bytes) {
            plane[r * size..(r + 1) * size].copy_from_slice(bytemuck::cast_slice(&own[..size]));
        }
    }
}

/// Groups of a row, whole units of them.
fn groups(w: &LutGemm<'_>) -> usize {
    w.in_features().next_multiple_of(code_unit(w.bits())) / w.group_size()
}

/// A tile's steps and what code 0 is worth, `[groups, 16, 2]`.
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
            out[1] = q_bias[r] - alpha[r] * ((1 << bits) - 1) as f32;
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
