//! What a format stores, described: its tensors by suffix, type and shape, and the numbers in them.
//!
//! Readers, writers and checks follow the descriptions, so that a format is spelled out in one place.

use std::borrow::Cow;

use super::{Floats, floats};

/// The size of a tensor along one of its dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// Input channels.
    Channels,
    /// Words of 32 input channels.
    ChannelWords,
    /// Groups of input channels.
    Groups,
    /// Output rows.
    Rows,
    /// Words of 8 output rows.
    RowWords,
    /// Bits of a code.
    Bits,
    /// What the codes of a row stand for: `2^bits` numbers.
    Levels,
}

impl Dim {
    fn of(self, size: &Size) -> usize {
        match self {
            Self::Channels => size.in_features,
            Self::ChannelWords => size.in_features / 32,
            Self::Groups => size.group_size.map_or(1, |group| size.in_features / group.max(1)),
            Self::Rows => size.out_features,
            Self::RowWords => size.out_features / 8,
            Self::Bits => size.bits,
            Self::Levels => 1 << size.bits,
        }
    }
}

/// What the shapes of a matrix's tensors follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Input channels.
    pub in_features: usize,
    /// Output rows.
    pub out_features: usize,
    /// Bits of a code; 0 in full precision.
    pub bits: usize,
    /// Channels of a group, in formats that have groups.
    pub group_size: Option<usize>,
}

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bit patterns, called `I32` in files.
    I32,
    /// Bit patterns, called `U32` in files.
    U32,
    /// Floating-point numbers: `F16`, `BF16` or `F32`.
    Float,
}

/// One tensor of a module, described.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// What follows the module's name and a point: `qweight`, `bias` …
    pub suffix: &'static str,
    /// How its numbers are stored.
    pub kind: Kind,
    /// Its dimensions, slowest first.
    pub dims: &'static [Dim],
}

impl Tensor {
    /// A full-precision matrix.
    pub const WEIGHT: Self = Self { suffix: "weight", kind: Kind::Float, dims: &[Dim::Rows, Dim::Channels] };
    /// What is added to a product.
    pub const BIAS: Self = Self { suffix: "bias", kind: Kind::Float, dims: &[Dim::Rows] };
    /// Nibbles of a residual.
    pub const RESIDUAL: Self = Self { suffix: "residual", kind: Kind::U32, dims: &[Dim::Channels, Dim::RowWords] };
    /// Scales of a residual.
    pub const SCALES: Self = Self { suffix: "scales", kind: Kind::Float, dims: &[Dim::Rows] };
    /// Calibrated boundaries of `|x|`.
    pub const THRESHOLDS: Self = Self { suffix: "thresholds", kind: Kind::Float, dims: &[Dim::Channels] };

    /// Its shape in a matrix of this size.
    pub fn shape(&self, size: &Size) -> Vec<usize> {
        self.dims.iter().map(|dim| dim.of(size)).collect()
    }

    /// Joins the numbers of modules whose rows stand below each other in one matrix of `size`.
    pub(crate) fn join<'a>(&self, size: &Size, parts: Vec<Numbers<'a>>) -> Numbers<'a> {
        let (outer, _) = self.around_rows(size);
        match self.kind {
            Kind::Float => Numbers::Floats(floats::join(parts.into_iter().map(Numbers::into_floats).collect(), outer)),
            _ => Numbers::Words(join(parts.into_iter().map(Numbers::into_words).collect(), outer)),
        }
    }

    /// The same numbers with row `order[r]` as row `r`.
    pub(crate) fn reorder(&self, size: &Size, numbers: &Numbers<'_>, order: &[usize]) -> Numbers<'static> {
        let (outer, inner) = self.around_rows(size);
        match numbers {
            Numbers::Floats(v) => Numbers::Floats(v.reorder(outer, inner, order)),
            Numbers::Words(v) if self.dims.contains(&Dim::RowWords) => {
                Numbers::Words(reorder_nibbles(v, outer, order).into())
            }
            Numbers::Words(v) => Numbers::Words(reorder(v, outer, inner, order).into()),
        }
    }

    /// How many numbers there are before and behind the dimension of rows.
    pub(crate) fn around_rows(&self, size: &Size) -> (usize, usize) {
        let rows = |dim: &Dim| matches!(dim, Dim::Rows | Dim::RowWords);
        let at = self.dims.iter().position(rows).unwrap_or(self.dims.len());
        let product = |dims: &[Dim]| dims.iter().map(|dim| dim.of(size)).product();
        (product(&self.dims[..at]), product(self.dims.get(at + 1..).unwrap_or_default()))
    }
}

/// The numbers of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers<'a> {
    /// Bit patterns.
    Words(Cow<'a, [u32]>),
    /// Floating-point numbers in the type in which they are stored.
    Floats(Floats<'a>),
}

impl<'a> Numbers<'a> {
    /// Bytes that they take as they are stored.
    pub fn bytes(&self) -> usize {
        self.as_bytes().len()
    }

    /// The bytes of all numbers, as they are stored.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Words(v) => bytemuck::cast_slice(v),
            Self::Floats(v) => v.as_bytes(),
        }
    }

    /// How many numbers there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Words(v) => v.len(),
            Self::Floats(v) => v.len(),
        }
    }

    /// The same numbers, borrowed.
    pub fn borrowed(&self) -> Numbers<'_> {
        match self {
            Self::Words(v) => Numbers::Words(Cow::Borrowed(v)),
            Self::Floats(v) => Numbers::Floats(v.borrowed()),
        }
    }

    /// The bit patterns, where numbers are known to be such.
    pub(crate) fn into_words(self) -> Cow<'a, [u32]> {
        match self {
            Self::Words(v) => v,
            Self::Floats(_) => unreachable!("bit patterns by their description"),
        }
    }

    /// The floating-point numbers, where numbers are known to be such.
    pub(crate) fn into_floats(self) -> Floats<'a> {
        match self {
            Self::Floats(v) => v,
            Self::Words(_) => unreachable!("floating-point numbers by their description"),
        }
    }
}

/// Joins arrays `[outer, rows of the part …]` to `[outer, rows of all …]`; a single part stays as it is.
pub(super) fn join<'a, T: Copy>(mut parts: Vec<Cow<'a, [T]>>, outer: usize) -> Cow<'a, [T]> {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let mut joined = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
    for o in 0..outer {
        for part in &parts {
            let len = part.len() / outer;
            joined.extend_from_slice(&part[o * len..][..len]);
        }
    }
    Cow::Owned(joined)
}

/// An array `[outer, rows, inner]` with row `order[r]` as row `r`.
pub(super) fn reorder<T: Copy>(values: &[T], outer: usize, inner: usize, order: &[usize]) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for o in 0..outer {
        let rows = &values[o * order.len() * inner..][..order.len() * inner];
        order.iter().for_each(|&row| out.extend_from_slice(&rows[row * inner..][..inner]));
    }
    out
}

/// The same of nibbles `[outer, rows / 8]`, eight rows to a word.
fn reorder_nibbles(words: &[u32], outer: usize, order: &[usize]) -> Vec<u32> {
    let line = order.len() / 8;
    let nibble = |o: usize, row: usize| words[o * line + row / 8] >> (4 * (row % 8)) & 15;
    let word = |o: usize, rows: &[usize]| rows.iter().rev().fold(0, |word, &row| word << 4 | nibble(o, row));
    (0..outer).flat_map(|o| order.chunks_exact(8).map(move |rows| word(o, rows))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn spelled(dim: &Dim) -> &'static str {
        match dim {
            Dim::Channels => "in",
            Dim::ChannelWords => "in/32",
            Dim::Groups => "in/group",
            Dim::Rows => "out",
            Dim::RowWords => "out/8",
            Dim::Bits => "bits",
            Dim::Levels => "2^bits",
        }
    }

    /// The module of checkpoints documents every tensor as it is described.
    #[test]
    fn documentation_says_what_is_described() {
        let text = include_str!("../checkpoint/mod.rs").replace("\n//!", "");
        const BESIDE: [Tensor; 4] = [Tensor::BIAS, Tensor::RESIDUAL, Tensor::SCALES, Tensor::THRESHOLDS];
        for tensor in Format::ALL.into_iter().flat_map(Format::tensors).chain(&BESIDE) {
            let dims = tensor.dims.iter().map(spelled).collect::<Vec<_>>().join(", ");
            let says = |kind: &str| text.contains(&format!("`.{}` {kind} `[{dims}]`", tensor.suffix));
            let known = match tensor.kind {
                Kind::I32 => says("I32"),
                Kind::U32 => says("U32"),
                Kind::Float => says("F16") || says("F32"),
            };
            assert!(known, "{tensor:?}");
            assert!(!says("F64"), "the comparison sees the type");
        }
        let size = Size { in_features: 96, out_features: 16, bits: 3, group_size: Some(32) };
        let shapes: Vec<_> = Format::LutGemm.tensors().iter().map(|tensor| tensor.shape(&size)).collect();
        assert_eq!(shapes, [vec![3, 3, 16], vec![3, 3, 16], vec![3, 16]]);
    }

    #[test]
    fn rows_are_joined_and_reordered_wherever_their_dimension_is() {
        let size = Size { in_features: 2, out_features: 16, bits: 0, group_size: None };
        // Row r of channel k is r + k, modulo 16: what nibbles can say.
        let words = |rows: std::ops::Range<u32>| -> Vec<u32> {
            let word = |k: u32, first: u32| (0..8).fold(0, |word, i| word | ((first + i + k) % 16) << (4 * i));
            (0..2).flat_map(|k| rows.clone().step_by(8).map(move |first| word(k, first))).collect()
        };
        let parts = [0..8, 8..16].map(|rows| Numbers::Words(words(rows).into()));
        let joined = Tensor::RESIDUAL.join(&size, parts.into());
        assert_eq!(joined, Numbers::Words(words(0..16).into()));
        let order: Vec<usize> = (0..16).map(|row| row * 5 % 16).collect();
        let Numbers::Words(moved) = Tensor::RESIDUAL.reorder(&size, &joined, &order) else { panic!("words") };
        for (k, row) in (0..2).flat_map(|k| (0..16).map(move |row| (k, row))) {
            let nibble = moved[k * 2 + row / 8] >> (4 * (row % 8)) & 15;
            assert_eq!(nibble as usize, (order[row] + k) % 16, "channel {k}, row {row}");
        }
        let weight: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let moved = Tensor::WEIGHT.reorder(&size, &Numbers::Floats(weight.into()), &order).into_floats();
        assert!((0..32).all(|i| moved.get(i) == (order[i / 2] * 2 + i % 2) as f32));
    }
}
