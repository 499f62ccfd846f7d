//! What is stored: pure packing, unpacking and dequantization, one file per format.
//!
//! Every type here borrows from a memory map where it can ([`Cow`]), is validated when it is made and
//! never again, and knows nothing of files or devices.

pub mod anyprec;
mod bits;
pub mod lutgemm;
pub mod residual;
pub mod threshold;

use std::borrow::Cow;

use anyhow::{Result, bail};
use half::{bf16, f16};
use rayon::prelude::*;

pub use anyprec::AnyPrec;
pub use lutgemm::LutGemm;
pub use residual::Residual;

/// A run of floating-point numbers in the type in which they are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Floats<'a> {
    /// IEEE half precision.
    F16(Cow<'a, [f16]>),
    /// bfloat16.
    Bf16(Cow<'a, [bf16]>),
    /// IEEE single precision.
    F32(Cow<'a, [f32]>),
}

impl<'a> Floats<'a> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
            Self::F32(v) => v.len(),
        }
    }

    /// True if there is not a single number.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number `i` as f32; panics when out of range, as a slice does.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F16(v) => v[i].to_f32(),
            Self::Bf16(v) => v[i].to_f32(),
            Self::F32(v) => v[i],
        }
    }

    /// Checks that every number is finite: one NaN in a scale spoils every token.
    ///
    /// # Errors
    /// The first that is not; `what` names them.
    pub fn ensure_finite(&self, what: &str) -> Result<()> {
        match self.first_not_finite() {
            Some(i) => bail!("{what} {i} is {}, finite numbers are expected", self.get(i)),
            None => Ok(()),
        }
    }

    /// The same for the stored tensor `name` of this shape.
    ///
    /// # Errors
    /// The first number that is not finite, with the tensor's name and the number's place in it.
    pub(crate) fn ensure_tensor_is_finite(&self, name: &str, shape: &[usize]) -> Result<()> {
        let Some(i) = self.first_not_finite() else { return Ok(()) };
        let place = if shape.len() > 1 { format!(" (at {:?})", place(i, shape)) } else { String::new() };
        bail!(
            "tensor {name}: number {i} is {}{place}, finite numbers are expected: get the file again, or another \
             version of the model",
            self.get(i)
        )
    }

    /// The first number that is NaN or infinite, which is one whose exponent is all ones. Read at the speed of memory.
    fn first_not_finite(&self) -> Option<usize> {
        match self {
            Self::F16(v) => first(v, |x| x.to_bits() & 0x7c00 == 0x7c00),
            Self::Bf16(v) => first(v, |x| x.to_bits() & 0x7f80 == 0x7f80),
            Self::F32(v) => first(v, |x| x.to_bits() & 0x7f80_0000 == 0x7f80_0000),
        }
    }

    /// All numbers as f32 (exact; borrowed when they are stored so).
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match self {
            Self::F16(v) => Cow::Owned(v.iter().map(|x| x.to_f32()).collect()),
            Self::Bf16(v) => Cow::Owned(v.iter().map(|x| x.to_f32()).collect()),
            Self::F32(v) => Cow::Borrowed(v),
        }
    }

    /// All numbers as f16, rounded to nearest even (borrowed when they are stored so).
    pub fn to_f16(&self) -> Cow<'_, [f16]> {
        match self {
            Self::F16(v) => Cow::Borrowed(v),
            Self::Bf16(v) => Cow::Owned(v.iter().map(|x| f16::from_f32(x.to_f32())).collect()),
            Self::F32(v) => Cow::Owned(v.iter().map(|&x| f16::from_f32(x)).collect()),
        }
    }

    /// The numbers `range`, as f32, written over `out` (same length).
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, x)| *o = x.to_f32()),
            Self::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, x)| *o = x.to_f32()),
            Self::F32(v) => out.copy_from_slice(&v[range]),
        }
    }

    /// The same numbers, owned.
    pub fn into_owned(self) -> Floats<'static> {
        match self {
            Self::F16(v) => Floats::F16(Cow::Owned(v.into_owned())),
            Self::Bf16(v) => Floats::Bf16(Cow::Owned(v.into_owned())),
            Self::F32(v) => Floats::F32(Cow::Owned(v.into_owned())),
        }
    }

    /// A matrix's rows of `columns` numbers, in another order: `order` has for each row the one that comes there.
    pub(crate) fn rows_in_order(&self, columns: usize, order: &[usize]) -> Floats<'static> {
        fn moved<T: Copy>(values: &[T], columns: usize, order: &[usize]) -> Cow<'static, [T]> {
            order.iter().flat_map(|row| &values[row * columns..(row + 1) * columns]).copied().collect()
        }
        match self {
            Self::F16(v) => Floats::F16(moved(v, columns, order)),
            Self::Bf16(v) => Floats::Bf16(moved(v, columns, order)),
            Self::F32(v) => Floats::F32(moved(v, columns, order)),
        }
    }

    /// Bytes that the numbers take as they are stored.
    pub fn bytes(&self) -> usize {
        self.len() * if matches!(self, Self::F32(_)) { 4 } else { 2 }
    }
}

/// The first of `values` that is `wanted`.
fn first<T: Sync>(values: &[T], wanted: impl Fn(&T) -> bool + Sync) -> Option<usize> {
    const RUN: usize = 1 << 16;
    values.par_chunks(RUN).enumerate().find_map_first(|(run, values)| {
        // All of a run is looked at, without leaving early: that is what vectorizes.
        let any = values.iter().fold(false, |any, value| any | wanted(value));
        any.then(|| values.iter().position(&wanted)).flatten().map(|i| run * RUN + i)
    })
}

/// Where number `i` of a tensor of this shape is, slowest dimension first.
fn place(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut place: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let at = i % size;
            i /= size;
            at
        })
        .collect();
    place.reverse();
    place
}

impl From<Vec<f32>> for Floats<'_> {
    fn from(v: Vec<f32>) -> Self {
        Self::F32(Cow::Owned(v))
    }
}

impl From<Vec<f16>> for Floats<'_> {
    fn from(v: Vec<f16>) -> Self {
        Self::F16(Cow::Owned(v))
    }
}

/// A dense matrix: `y[out] = W[out, in] · x[in]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense<'a> {
    /// Input channels.
    pub in_features: usize,
    /// Output rows.
    pub out_features: usize,
    /// `[out_features, in_features]`
    pub values: Floats<'a>,
}

/// Checks what every packed format asks of a matrix: whole words along both sides.
fn ensure_shape(in_features: usize, out_features: usize) -> anyhow::Result<()> {
    anyhow::ensure!(
        in_features > 0 && in_features.is_multiple_of(32),
        "{in_features} input channels, a multiple of 32 is expected"
    );
    anyhow::ensure!(
        out_features > 0 && out_features.is_multiple_of(8),
        "{out_features} output rows, a multiple of 8 is expected"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bit pattern of the 16-bit types, and the ends of every range of f32.
    #[test]
    fn what_is_not_finite_is_found_wherever_it_is() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert_eq!(Floats::from(vec![half]).first_not_finite().is_none(), half.is_finite(), "{bits:#x}");
            let brains = Floats::Bf16(Cow::Owned(vec![brain]));
            assert_eq!(brains.first_not_finite().is_none(), brain.is_finite(), "{bits:#x}");
        }
        for value in [0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, f32::INFINITY, f32::NAN, -f32::NAN] {
            assert_eq!(Floats::from(vec![value]).first_not_finite().is_none(), value.is_finite(), "{value}");
        }
        // Long enough for several runs; the first is meant.
        let mut values = vec![1f32; 200_003];
        for at in [200_002, 131_072, 131_071, 65_536, 65_535, 7, 0] {
            values[at] = f32::NAN;
            assert_eq!(Floats::F32(Cow::Borrowed(&values)).first_not_finite(), Some(at));
        }
    }

    #[test]
    fn a_tensor_is_named_with_the_place_in_it() {
        let mut values = vec![1f32; 2 * 3 * 4];
        values[17] = f32::NEG_INFINITY;
        let message = |shape: &[usize]| {
            Floats::F32(Cow::Borrowed(&values)).ensure_tensor_is_finite("t", shape).unwrap_err().to_string()
        };
        let rest = "finite numbers are expected: get the file again, or another version of the model";
        assert_eq!(message(&[24]), format!("tensor t: number 17 is -inf, {rest}"));
        assert_eq!(message(&[6, 4]), format!("tensor t: number 17 is -inf (at [4, 1]), {rest}"));
        assert_eq!(message(&[2, 3, 4]), format!("tensor t: number 17 is -inf (at [1, 1, 1]), {rest}"));
    }
}
