//! Quantized matrices as the CPU keeps them.
//!
//! Codes of up to 4 bits with a codebook, and codes of any width with even steps, are multiplied as whole numbers (see
//! [`super::octets`]). Others stay as they are stored and are dequantized row by row: they are there to be correct.

use rayon::prelude::*;

use super::dense::{Rows, products_of_rows};
use super::digits::Digits;
use super::kernels::look_up;
use super::octets::{Octets, ROWS, WholeRow};
use crate::format::{AnyPrec, Floats, LutGemm};
use crate::processor::{Path, on_every_path};
use crate::weights::Weight;

/// One row of activations, as products take it.
#[derive(Debug)]
pub(super) struct Operand<'a> {
    pub(super) x: &'a [f32],
    /// Where weights are whole and `x` is finite.
    pub(super) digits: Option<Digits>,
    /// The channels that are compensated, and their activations.
    pub(super) selected: Vec<(usize, f32)>,
}

/// A quantized matrix in host memory.
#[derive(Debug)]
pub(super) enum Codes {
    Octets(Octets),
    Wide(Weight<'static>),
}

impl Codes {
    pub(super) fn anyprec(w: &AnyPrec<'_>) -> Self {
        let (in_features, bits) = (w.in_features(), w.bits());
        let lut = w.lut().to_f32();
        let rows = |whole: fn(&[f32]) -> Option<WholeRow>| {
            lut.par_chunks_exact(1 << bits).map(whole).collect::<Option<Vec<_>>>()
        };
        if bits <= 4
            && let Some(rows) = rows(WholeRow::on_a_line).or_else(|| rows(WholeRow::new))
        {
            return Self::Octets(Octets::tabulated(in_features, bits, &rows, |row, codes| w.codes(row, codes)));
        }
        let (planes, lut) = (w.planes().to_vec().into(), w.lut().clone().into_owned());
        let wide = AnyPrec::new(in_features, w.out_features(), bits, planes, lut);
        Self::Wide(Weight::AnyPrec(wide.expect("already validated")))
    }

    pub(super) fn lutgemm(w: &LutGemm<'_>) -> Self {
        let (in_features, out_features, bits) = (w.in_features(), w.out_features(), w.bits());
        let groups = in_features / w.group_size();
        let (alpha, q_bias) = (w.alpha().to_f32(), w.q_bias().to_f32());
        let step = |row: usize, g: usize, b: usize| alpha[(g * bits + b) * out_features + row];
        let doubles = |i: usize| {
            let step = |b| step(i / groups, i % groups, b);
            (1..bits).all(|b| step(b) == 2.0 * step(b - 1))
        };
        if (0..out_features * groups).into_par_iter().all(doubles) {
            let factors = |row, g| [step(row, g, 0), q_bias[g * out_features + row]];
            let codes = |row: usize, codes: &mut [u8]| w.codes(row, codes);
            return Self::Octets(Octets::even((in_features, out_features), bits, w.group_size(), factors, codes));
        }
        let binary = w.binary().to_vec().into();
        let (alpha, q_bias) = (w.alpha().clone().into_owned(), w.q_bias().clone().into_owned());
        let wide = LutGemm::new(in_features, out_features, bits, w.group_size(), binary, alpha, q_bias);
        Self::Wide(Weight::LutGemm(wide.expect("already validated")))
    }

    /// What the products of a token need beside `x`: its digits, where weights are whole and `x` is finite.
    pub(super) fn digits(&self, path: Path, x: &[f32]) -> Option<Digits> {
        match self {
            Self::Octets(octets) => Digits::new(path, x, octets.segment),
            Self::Wide(_) => None,
        }
    }

    /// `y[t] = W·x[t]` for the rows from `first` (a multiple of 8) on that each of `x` has room for in `y` `[x.len(), rows]`.
    pub(super) fn product(&self, path: Path, first: usize, x: &[Operand<'_>], y: &mut [f32]) {
        let rows = y.len() / x.len();
        let digits: Option<Vec<_>> = x.iter().map(|x| x.digits.as_ref()).collect();
        if let (Self::Octets(octets), Some(digits)) = (self, &digits) {
            return octets.product(path, first / ROWS, digits, y);
        }
        // Infinity and NaN have no digits: they are multiplied by the weights themselves.
        if matches!(self, Self::Octets(_)) && x.len() > 1 {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
                self.product(path, first, std::slice::from_ref(x), y);
            }
            return;
        }
        let x: Vec<_> = x.iter().map(|x| x.x).collect();
        let (mut row, mut codes) = (vec![0.0; x[0].len()], vec![0; x[0].len()]);
        for i in 0..rows {
            self.dequantize(path, first + i, &mut codes, &mut row);
            products_of_rows(path, Rows::F32(&row), &x, &mut y[i..], rows);
        }
    }

    /// One row, dequantized, written over `out`; `codes` is scratch as long.
    pub(super) fn dequantize(&self, path: Path, row: usize, codes: &mut [u8], out: &mut [f32]) {
        let octets = match self {
            Self::Octets(octets) => octets,
            Self::Wide(w) => return w.row(row, out),
        };
        codes_of(path, octets, row, codes);
        let size = octets.group_size();
        for (g, (out, codes)) in out.chunks_mut(size).zip(codes.chunks(size)).enumerate() {
            if octets.bits() <= 4 {
                // Beyond the last code are values that no code asks for.
                look_up(path, &std::array::from_fn(|code| octets.value(row, g, code)), codes, out);
            } else {
                out.iter_mut().zip(codes).for_each(|(x, &code)| *x = octets.value(row, g, code.into()));
            }
        }
    }
}

on_every_path! {
    /// The codes of one row.
    fn codes_of(octets: &Octets, row: usize, codes: &mut [u8]) {
        octets.codes(row, codes);
    }
}

/// A dense matrix as the CPU keeps it: f16 as f16, everything else as f32.
pub(super) fn dense(values: &Floats<'_>) -> Floats<'static> {
    match values {
        Floats::F16(_) | Floats::F32(_) => values.clone().into_owned(),
        Floats::Bf16(_) => values.to_f32().into_owned().into(),
    }
}
