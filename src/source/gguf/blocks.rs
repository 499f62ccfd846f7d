//! Number formats of GGUF: three plain ones, and blocks of 32 or 256 numbers that share scales.
//!
//! `d`, `m` are f16; in K formats, 6-bit scales of groups of 16 or 32 are themselves scaled by `d` (and
//! minima by `m`). Values are computed in f32.

use half::f16;
use rayon::prelude::*;

use crate::format::Floats;
use crate::tensors::numbers;

/// A number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Numbers in a block of the older formats.
const SMALL: usize = 32;
/// Numbers in a block of the K formats.
const LARGE: usize = 256;

impl Kind {
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    pub(super) fn names() -> &'static str {
        "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K"
    }

    /// `(numbers, bytes)` of one block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (SMALL, 2 + 16),
            Self::Q4_1 => (SMALL, 4 + 16),
            Self::Q5_0 => (SMALL, 2 + 4 + 16),
            Self::Q5_1 => (SMALL, 4 + 4 + 16),
            Self::Q8_0 => (SMALL, 2 + 32),
            Self::Q4K => (LARGE, 4 + 12 + 128),
            Self::Q5K => (LARGE, 4 + 12 + 32 + 128),
            Self::Q6K => (LARGE, 128 + 64 + 16 + 2),
        }
    }

    /// The numbers in `bytes`, whole blocks: as they are stored if they are plain, else in f32.
    pub(super) fn read(self, bytes: &[u8]) -> Floats<'_> {
        let dequantize: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => return Floats::F32(numbers(bytes)),
            Self::F16 => return Floats::F16(numbers(bytes)),
            Self::Bf16 => return Floats::Bf16(numbers(bytes)),
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q4K => q4_k,
            Self::Q5K => q5_k,
            Self::Q6K => q6_k,
        };
        let (numbers, block_bytes) = self.block();
        let mut out = vec![0.0; bytes.len() / block_bytes * numbers];
        let blocks = bytes.par_chunks_exact(block_bytes).with_min_len(256);
        let outs = out.par_chunks_exact_mut(numbers).with_min_len(256);
        outs.zip(blocks).for_each(|(out, block)| dequantize(block, out));
        out.into()
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `out[i] = value(code i)` for 16 bytes: low nibbles first, then high ones.
fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(usize, u8) -> f32) {
    for (i, &byte) in bytes.iter().enumerate() {
        out[i] = value(i, byte & 15);
        out[i + bytes.len()] = value(i + bytes.len(), byte >> 4);
    }
}

/// `d·(q − 8)`; d, 16 bytes of codes.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    nibbles(&block[2..], out, |_, q| d * (f32::from(q) - 8.0));
}

/// `d·q + m`; d, m, 16 bytes of codes.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    nibbles(&block[4..], out, |_, q| d * f32::from(q) + m);
}

/// Code with its fifth bit, which is bit `i` of `high`.
fn fifth(high: u32, i: usize, low: u8) -> f32 {
    f32::from(low | ((high >> i & 1) as u8) << 4)
}

fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// `d·(q − 16)`; d, a word of fifth bits, 16 bytes of low bits.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, high) = (half(block, 0), word(block, 2));
    nibbles(&block[6..], out, |i, q| d * (fifth(high, i, q) - 16.0));
}

/// `d·q + m`; d, m, a word of fifth bits, 16 bytes of low bits.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, high) = (half(block, 0), half(block, 2), word(block, 4));
    nibbles(&block[8..], out, |i, q| d * fifth(high, i, q) + m);
}

/// `d·q`; d, 32 signed bytes.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(out, &q)| *out = d * f32::from(q as i8));
}

/// `(d·scale, m·min)` of group `g` of 8; scales and minima have 6 bits each, in 12 bytes.
fn group(block: &[u8], g: usize) -> (f32, f32) {
    let s = &block[4..16];
    let (scale, min) = if g < 4 {
        (s[g] & 63, s[g + 4] & 63)
    } else {
        (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4)
    };
    (half(block, 0) * f32::from(scale), half(block, 2) * f32::from(min))
}

/// `d·scale·q − m·min` in 8 groups of 32; d, m, scales and minima, 128 bytes of codes, two groups in 32.
fn q4_k(block: &[u8], out: &mut [f32]) {
    for (pair, bytes) in block[16..].chunks_exact(32).enumerate() {
        let groups = [group(block, 2 * pair), group(block, 2 * pair + 1)];
        nibbles(bytes, &mut out[64 * pair..64 * (pair + 1)], |i, q| {
            let (scale, min) = groups[i / 32];
            scale * f32::from(q) - min
        });
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits before the codes: bit `g` of byte `l` is number `l` of group `g`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let high = &block[16..48];
    for (pair, bytes) in block[48..].chunks_exact(32).enumerate() {
        let groups = [group(block, 2 * pair), group(block, 2 * pair + 1)];
        nibbles(bytes, &mut out[64 * pair..64 * (pair + 1)], |i, q| {
            let (scale, min) = groups[i / 32];
            scale * fifth(high[i % 32].into(), 2 * pair + i / 32, q) - min
        });
    }
}

/// `d·scale·(q − 32)` in 16 groups of 16, in two halves; 128 bytes of low nibbles, 64 of upper bit pairs, 16
/// signed scales, d. In a half, 64 bytes of nibbles hold 128 codes, low nibbles first; bits `2p, 2p + 1` of
/// byte `l` of the upper pairs belong to number `32p + l`.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half(block, 208);
    for part in 0..2 {
        let upper = &block[128 + 32 * part..][..32];
        let scales = &block[192 + 8 * part..][..8];
        nibbles(&block[64 * part..][..64], &mut out[128 * part..][..128], |i, q| {
            let code = q | (upper[i % 32] >> (2 * (i / 32)) & 3) << 4;
            d * f32::from(scales[i / 16] as i8) * (f32::from(code) - 32.0)
        });
    }
}
