//! AnyPrec: one codebook per row, codes in bit planes (spec §2.1; the layout of the any-precision LLM kernels).
//!
//! `w[row, k] = lut[row, code(row, k)]`. Plane 0 holds the **most** significant bit. Inside a tile of 1024
//! channels the bits of a row are permuted so that one thread's word meets 16-byte pieces of `x`.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::Result;
use rayon::prelude::*;

use super::packed::{Packed, ensure_bits, ensure_codes, packed};
use super::{Description, Dim, Floats, Kind, Numbers, Size, Tensor, bits};

pub(super) const DESCRIPTION: Description = Description {
    name: "ap",
    about: "AnyPrec: one codebook per row",
    algo: "sqllm",
    gemv_kernel: "matmul_kbit_32",
    tensors: &[
        Tensor { suffix: "qweight", kind: Kind::I32, dims: &[Dim::Bits, Dim::Rows, Dim::ChannelWords] },
        Tensor { suffix: "lut", kind: Kind::Float, dims: &[Dim::Rows, Dim::Levels] },
    ],
};

/// Channels of a full tile.
const TILE: usize = 1024;

/// A quantized matrix with one codebook per row.
#[derive(Debug, Clone, PartialEq)]
pub struct AnyPrec<'a>(pub(crate) Packed<'a>);

packed!(AnyPrec);

/// Where channel `k` of a row with `in_features` channels is kept: (word, bit), bit 0 the least significant.
pub fn position(k: usize, in_features: usize) -> (usize, u32) {
    let start = k / TILE * TILE;
    let words = if start + TILE <= in_features { 32 } else { (in_features % TILE) / 32 };
    let c = k - start;
    let word = start / 32 + (c / 8) % words;
    let bit = 31 - 8 * ((c / 8) / words) - c % 8;
    (word, bit as u32)
}

impl<'a> AnyPrec<'a> {
    /// Takes `planes` `[bits, out_features, in_features / 32]` and `lut` `[out_features, 2^bits]`.
    ///
    /// # Errors
    /// `bits` outside 2..=8, `in_features` not a multiple of 32, `out_features` not a multiple of 8, lengths
    /// that do not follow from them, or a centroid that is not finite.
    pub fn new(
        in_features: usize,
        out_features: usize,
        bits: usize,
        planes: Cow<'a, [u32]>,
        lut: Floats<'a>,
    ) -> Result<Self> {
        let size = Size { in_features, out_features, bits, group_size: None };
        Self::from_tensors(size, vec![Numbers::Words(planes), Numbers::Floats(lut)])
    }

    /// Takes the tensors of the format, in the order of their description.
    pub(crate) fn from_tensors(size: Size, tensors: Vec<Numbers<'a>>) -> Result<Self> {
        ensure_bits("anyprec", size.bits)?;
        Ok(Self(Packed::new("anyprec", DESCRIPTION.tensors, size, tensors)?))
    }

    /// Packs `codes` `[out_features, in_features]`, each below `2^bits`.
    ///
    /// # Errors
    /// As [`AnyPrec::new`], and a code that has no centroid.
    pub fn pack(
        in_features: usize,
        out_features: usize,
        bits: usize,
        codes: &[u8],
        lut: Floats<'a>,
    ) -> Result<AnyPrec<'a>> {
        ensure_codes("anyprec", &Size { in_features, out_features, bits, group_size: None }, codes)?;
        let words = in_features / 32;
        let mut planes = vec![0u32; bits * out_features * words];
        planes.par_chunks_exact_mut(words).enumerate().for_each(|(i, plane)| {
            let (row, shift) = (i % out_features, bits - 1 - i / out_features);
            let codes = &codes[row * in_features..][..in_features];
            for (codes, plane) in codes.chunks(TILE).zip(plane.chunks_mut(TILE / 32)) {
                for (piece, codes) in codes.chunks_exact(8).enumerate() {
                    let byte = bits::gather_high_first(bits::eight(codes), shift);
                    let words = plane.len();
                    plane[piece % words] |= u32::from(byte) << (8 * (3 - piece / words));
                }
            }
        });
        Self::new(in_features, out_features, bits, Cow::Owned(planes), lut)
    }

    /// The codes of one row, written over `out` (`in_features` long).
    pub fn codes(&self, row: usize, out: &mut [u8]) {
        out.fill(0);
        self.pieces(row, |piece, byte| {
            let out = &mut out[8 * piece..8 * piece + 8];
            let codes = bits::eight(out) << 1 | bits::bytes_high_first(byte);
            out.copy_from_slice(&codes.to_le_bytes());
        });
    }

    /// The codes of `rows`, of at most 4 bits, eight to a word, the first channel lowest, written over `out`: each
    /// row's `in_features / 8` words, `stride` words from row to row.
    pub fn nibbles(&self, rows: Range<usize>, stride: usize, out: &mut [u32]) {
        for (row, out) in rows.zip(out.chunks_mut(stride)) {
            out[..self.in_features() / 8].fill(0);
            self.pieces(row, |piece, byte| out[piece] = out[piece] << 1 | bits::nibbles_high_first(byte));
        }
    }

    /// Every eight channels' bits of every plane, planes from the most significant down, first channel on top.
    #[inline(always)]
    fn pieces(&self, row: usize, mut each: impl FnMut(usize, u8)) {
        let words = self.in_features() / 32;
        let plane_len = self.out_features() * words;
        for plane in self.planes().chunks_exact(plane_len) {
            let plane = &plane[row * words..][..words];
            for (tile, words) in plane.chunks(TILE / 32).enumerate() {
                // Piece `piece` of eight channels is byte 3 - piece / words of its word.
                for quarter in 0..4 {
                    let first = tile * (TILE / 8) + quarter * words.len();
                    for (i, word) in words.iter().enumerate() {
                        each(first + i, (word >> (8 * (3 - quarter))) as u8);
                    }
                }
            }
        }
    }

    /// One row, dequantized, written over `out` (`in_features` long).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let mut codes = vec![0; self.in_features()];
        self.codes(row, &mut codes);
        let mut centroids = [0.0; 256];
        let centroids = &mut centroids[..1 << self.bits()];
        self.lut().read_f32(row << self.bits(), centroids);
        for (value, &code) in out.iter_mut().zip(&codes) {
            *value = centroids[usize::from(code)];
        }
    }

    /// Bit planes, `[bits, out_features, in_features / 32]`.
    pub fn planes(&self) -> &[u32] {
        self.0.words(0)
    }

    /// Codebooks, `[out_features, 2^bits]`.
    pub fn lut(&self) -> &Floats<'a> {
        self.0.floats(1)
    }
}
