//! LUT-GEMM: binary-coded weights in groups of channels (spec §2.2; Park et al., LUT-GEMM).
//!
//! `w[row, k] = q_bias[g, row] + Σ_b (2·bit_b − 1)·alpha[g, b, row]`, `g = ⌊k / group_size⌋`. Bit `i` of word
//! `w` is channel `32·w + i`; plane 0 is the **least** significant bit, the opposite of AnyPrec.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::packed::{Packed, ensure_bits, ensure_codes, packed};
use super::{Description, Dim, Floats, Kind, Numbers, Size, Tensor, bits};

pub(super) const DESCRIPTION: Description = Description {
    name: "lutgemm",
    about: "LUT-GEMM: binary-coded groups of channels",
    algo: "awq",
    gemv_kernel: "nqmv_bias",
    tensors: &[
        Tensor { suffix: "binary", kind: Kind::I32, dims: &[Dim::ChannelWords, Dim::Bits, Dim::Rows] },
        Tensor { suffix: "alpha", kind: Kind::Float, dims: &[Dim::Groups, Dim::Bits, Dim::Rows] },
        Tensor { suffix: "q_bias", kind: Kind::Float, dims: &[Dim::Groups, Dim::Rows] },
    ],
};

/// A binary-coded matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct LutGemm<'a>(pub(crate) Packed<'a>);

packed!(LutGemm);

/// Checks that groups of `group_size` channels tile `in_features`.
///
/// # Errors
/// A size that is not a multiple of 32 or does not divide `in_features`; the message names sizes that do.
pub fn ensure_group_size(in_features: usize, group_size: usize) -> Result<()> {
    let fits = |g: usize| g > 0 && g.is_multiple_of(32) && in_features.is_multiple_of(g);
    let allowed: Vec<_> = [32, 64, 128].into_iter().filter(|&g| fits(g)).map(|g| g.to_string()).collect();
    ensure!(
        fits(group_size),
        "group size {group_size} does not divide {in_features} input channels in multiples of 32, use --group-size {}",
        allowed.join(" or ")
    );
    Ok(())
}

impl<'a> LutGemm<'a> {
    /// Takes the three tensors as they are stored; their shapes are at the fields.
    ///
    /// # Errors
    /// `bits` outside 2..=8, shapes or a group size that do not tile, lengths that do not follow from them, or a
    /// number that is not finite.
    pub fn new(
        in_features: usize,
        out_features: usize,
        bits: usize,
        group_size: usize,
        binary: Cow<'a, [u32]>,
        alpha: Floats<'a>,
        q_bias: Floats<'a>,
    ) -> Result<Self> {
        let size = Size { in_features, out_features, bits, group_size: Some(group_size) };
        Self::from_tensors(size, vec![Numbers::Words(binary), Numbers::Floats(alpha), Numbers::Floats(q_bias)])
    }

    /// Takes the tensors of the format, in the order of their description.
    pub(crate) fn from_tensors(size: Size, tensors: Vec<Numbers<'a>>) -> Result<Self> {
        ensure_bits("lutgemm", size.bits)?;
        ensure_group_size(size.in_features, size.group_size.unwrap_or(0))?;
        Ok(Self(Packed::new("lutgemm", DESCRIPTION.tensors, size, tensors)?))
    }

    /// Converts a uniform quantizer `w = scale·(code − zero)` exactly: `alpha_b = scale·2^(b−1)`,
    /// `q_bias = Σ_b alpha_b − scale·zero`, in f32.
    ///
    /// `codes` is `[out_features, in_features]`, `scale` and `zero` are `[out_features, in_features / group_size]`.
    ///
    /// # Errors
    /// As [`LutGemm::new`], and a code of more than `bits` bits.
    pub fn from_uniform(
        in_features: usize,
        out_features: usize,
        bits: usize,
        group_size: usize,
        codes: &[u8],
        scale: &[f32],
        zero: &[f32],
    ) -> Result<LutGemm<'static>> {
        let size = Size { in_features, out_features, bits, group_size: Some(group_size) };
        ensure_codes("lutgemm", &size, codes)?;
        ensure_group_size(in_features, group_size)?;
        let groups = in_features / group_size;
        for (what, got) in [("scales", scale.len()), ("zeros", zero.len())] {
            let want = groups * out_features;
            ensure!(got == want, "lutgemm: {got} {what}, {want} expected");
        }
        let mut alpha = vec![0.0; groups * bits * out_features];
        let mut q_bias = vec![0.0; groups * out_features];
        let parts = alpha.par_chunks_exact_mut(bits * out_features).zip(q_bias.par_chunks_exact_mut(out_features));
        parts.enumerate().for_each(|(g, (alpha, q_bias))| {
            for (row, q_bias) in q_bias.iter_mut().enumerate() {
                let (scale, zero) = (scale[row * groups + g], zero[row * groups + g]);
                let mut sum = 0.0;
                for b in 0..bits {
                    let value = scale * (1u32 << b) as f32 / 2.0;
                    alpha[b * out_features + row] = value;
                    sum += value;
                }
                *q_bias = sum - scale * zero;
            }
        });
        let mut binary = vec![0u32; in_features / 32 * bits * out_features];
        binary.par_chunks_exact_mut(bits * out_features).enumerate().for_each(|(word, planes)| {
            for row in 0..out_features {
                for (byte, codes) in codes[row * in_features + 32 * word..][..32].chunks_exact(8).enumerate() {
                    let codes = bits::eight(codes);
                    for b in 0..bits {
                        planes[b * out_features + row] |= u32::from(bits::gather_low_first(codes, b)) << (8 * byte);
                    }
                }
            }
        });
        LutGemm::new(in_features, out_features, bits, group_size, Cow::Owned(binary), alpha.into(), q_bias.into())
    }

    /// The codes of one row, written over `out` (`in_features` long).
    pub fn codes(&self, row: usize, out: &mut [u8]) {
        let (binary, bits, rows) = (self.binary(), self.bits(), self.out_features());
        for (w, out) in out.chunks_exact_mut(32).enumerate() {
            let words = |b: usize| binary[(w * bits + b) * rows + row].to_le_bytes();
            let mut codes = [0u64; 4];
            for b in 0..bits {
                for (codes, byte) in codes.iter_mut().zip(words(b)) {
                    *codes |= bits::bytes_low_first(byte) << b;
                }
            }
            for (out, codes) in out.chunks_exact_mut(8).zip(codes) {
                out.copy_from_slice(&codes.to_le_bytes());
            }
        }
    }

    /// The codes of `rows`, of at most 4 bits, eight to a word, the first channel lowest, written over `out`: each
    /// row's `in_features / 8` words, `stride` words from row to row.
    pub fn nibbles(&self, rows: Range<usize>, stride: usize, out: &mut [u32]) {
        out.chunks_mut(stride).take(rows.len()).for_each(|out| out[..self.in_features() / 8].fill(0));
        // Rows lie side by side in a plane, so they are taken together.
        for (i, plane) in self.binary().chunks_exact(self.out_features()).enumerate() {
            let (word, b) = (i / self.bits(), i % self.bits());
            for (row, code) in plane[rows.clone()].iter().enumerate() {
                for (out, byte) in out[row * stride + 4 * word..][..4].iter_mut().zip(code.to_le_bytes()) {
                    *out |= bits::nibbles_low_first(byte) << b;
                }
            }
        }
    }

    /// The `2^bits` values that codes of `row` stand for in group `g`, written over `out`.
    ///
    /// The sum runs over planes upwards from `q_bias`, in f32; every backend that tabulates does the same.
    pub fn codebook(&self, row: usize, g: usize, out: &mut [f32]) {
        let (alpha, bits, rows) = (self.alpha(), self.bits(), self.out_features());
        let q_bias = self.q_bias().get(g * rows + row);
        for (code, value) in out.iter_mut().enumerate() {
            *value = (0..bits).fold(q_bias, |sum, b| {
                let alpha = alpha.get((g * bits + b) * rows + row);
                sum + if code >> b & 1 == 1 { alpha } else { -alpha }
            });
        }
    }

    /// One row, dequantized, written over `out` (`in_features` long).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let mut codes = vec![0; self.in_features()];
        self.codes(row, &mut codes);
        let mut centroids = [0.0; 256];
        let centroids = &mut centroids[..1 << self.bits()];
        for (g, (out, codes)) in out.chunks_mut(self.group_size()).zip(codes.chunks(self.group_size())).enumerate() {
            self.codebook(row, g, centroids);
            for (value, &code) in out.iter_mut().zip(codes) {
                *value = centroids[usize::from(code)];
            }
        }
    }

    /// Channels that share `alpha` and `q_bias`.
    pub fn group_size(&self) -> usize {
        self.size().group_size.unwrap_or(self.in_features())
    }

    /// Codes, `[in_features / 32, bits, out_features]`.
    pub fn binary(&self) -> &[u32] {
        self.0.words(0)
    }

    /// Step of each bit, `[in_features / group_size, bits, out_features]`.
    pub fn alpha(&self) -> &Floats<'a> {
        self.0.floats(1)
    }

    /// Centre of each group, `[in_features / group_size, out_features]`.
    pub fn q_bias(&self) -> &Floats<'a> {
        self.0.floats(2)
    }
}
