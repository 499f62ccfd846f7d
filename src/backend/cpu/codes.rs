//! Quantized matrices as the CPU keeps them.
//!
//! Codes of up to 4 bits are repacked into nibbles: in a block of 64 channels, nibble `j` of lane `l` is
//! channel `8·j + l`, so that eight lanes shifted by `4·j` bits are eight consecutive channels. Wider codes
//! stay as they are stored and are dequantized row by row: they are there to be correct.

use rayon::prelude::*;

use super::kernels::{CodeRow, Isa, dot};
use crate::format::{AnyPrec, Floats, LutGemm};
use crate::weights::Weight;

/// A quantized matrix in host memory.
#[derive(Debug)]
pub(super) enum Codes {
    Nibbles(Nibbles),
    Wide(Weight<'static>),
}

/// Codes of 2 to 4 bits.
#[derive(Debug)]
pub(super) struct Nibbles {
    in_features: usize,
    words: Vec<u32>,  // [out_features, in_features / 64 rounded up, 8]
    tables: Vec<f32>, // [out_features, groups, 16] or, binary, [out_features, groups, 1 + bits]
    row_words: usize,
    row_tables: usize,
    group_size: usize,
    bits: usize,
    binary: bool,
}

impl Codes {
    pub(super) fn anyprec(w: &AnyPrec<'_>) -> Self {
        if w.bits() > 4 {
            let planes = w.planes().to_vec().into();
            let lut = w.lut().clone().into_owned();
            let wide = AnyPrec::new(w.in_features(), w.out_features(), w.bits(), planes, lut);
            return Self::Wide(Weight::AnyPrec(wide.expect("already validated")));
        }
        let lut = w.lut().to_f32();
        // Repeated to 16, a shorter codebook needs no masked codes.
        let tables = lut.chunks_exact(1 << w.bits()).flat_map(|book| book.iter().cycle().take(16).copied()).collect();
        Self::Nibbles(Nibbles {
            in_features: w.in_features(),
            words: pack(w.in_features(), w.out_features(), |row, codes| w.codes(row, codes)),
            tables,
            row_words: w.in_features().div_ceil(64) * 8,
            row_tables: 16,
            group_size: w.in_features(),
            bits: w.bits(),
            binary: false,
        })
    }

    pub(super) fn lutgemm(w: &LutGemm<'_>) -> Self {
        let (in_features, out_features, bits) = (w.in_features(), w.out_features(), w.bits());
        if bits > 4 {
            let binary = w.binary().to_vec().into();
            let (alpha, q_bias) = (w.alpha().clone().into_owned(), w.q_bias().clone().into_owned());
            let wide = LutGemm::new(in_features, out_features, bits, w.group_size(), binary, alpha, q_bias);
            return Self::Wide(Weight::LutGemm(wide.expect("already validated")));
        }
        let groups = in_features / w.group_size();
        let (alpha, q_bias) = (w.alpha().to_f32(), w.q_bias().to_f32());
        let mut tables = Vec::with_capacity(out_features * groups * (1 + bits));
        for row in 0..out_features {
            for g in 0..groups {
                tables.push(q_bias[g * out_features + row]);
                tables.extend((0..bits).map(|b| alpha[(g * bits + b) * out_features + row]));
            }
        }
        Self::Nibbles(Nibbles {
            in_features,
            words: pack(in_features, out_features, |row, codes| w.codes(row, codes)),
            tables,
            row_words: in_features.div_ceil(64) * 8,
            row_tables: groups * (1 + bits),
            group_size: w.group_size(),
            bits,
            binary: true,
        })
    }

    /// `Σ w·x` of one row.
    pub(super) fn dot(&self, isa: Isa, row: usize, x: &[f32]) -> f32 {
        match self {
            Self::Nibbles(n) => n.row(row).dot(isa, &x[..n.in_features]),
            Self::Wide(w) => {
                let mut values = vec![0.0; w.in_features()];
                w.row(row, &mut values);
                dot(isa, &values, x)
            }
        }
    }

    /// One row, dequantized, written over `out`.
    pub(super) fn dequantize(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Nibbles(n) => n.row(row).dequantize(out),
            Self::Wide(w) => w.row(row, out),
        }
    }
}

impl Nibbles {
    fn row(&self, row: usize) -> CodeRow<'_> {
        CodeRow {
            words: &self.words[row * self.row_words..][..self.row_words],
            tables: &self.tables[row * self.row_tables..][..self.row_tables],
            group_size: self.group_size,
            bits: self.bits,
            binary: self.binary,
        }
    }
}

fn pack(in_features: usize, out_features: usize, codes_of: impl Fn(usize, &mut [u8]) + Sync) -> Vec<u32> {
    let row_words = in_features.div_ceil(64) * 8;
    let mut words = vec![0u32; out_features * row_words];
    words.par_chunks_exact_mut(row_words).enumerate().for_each_init(
        || vec![0u8; in_features],
        |codes, (row, words)| {
            codes_of(row, codes);
            for (words, codes) in words.chunks_exact_mut(8).zip(codes.chunks(64)) {
                for (k, &code) in codes.iter().enumerate() {
                    words[k % 8] |= u32::from(code) << (4 * (k / 8));
                }
            }
        },
    );
    words
}

/// A dense matrix as the CPU keeps it: f16 as f16, everything else as f32.
pub(super) fn dense(values: &Floats<'_>) -> Floats<'static> {
    match values {
        Floats::F16(_) | Floats::F32(_) => values.clone().into_owned(),
        Floats::Bf16(_) => values.to_f32().into_owned().into(),
    }
}
