//! Runs of floating-point numbers, in the type in which they are stored.

use std::borrow::Cow;

use anyhow::{Result, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::tensor;

/// The same done to numbers of every type.
macro_rules! each {
    ($floats:expr, $values:ident => $made:expr) => {
        match $floats {
            Floats::F16($values) => Floats::F16($made),
            Floats::Bf16($values) => Floats::Bf16($made),
            Floats::F32($values) => Floats::F32($made),
        }
    };
}

/// What is made of numbers of whatever type.
macro_rules! whichever {
    ($floats:expr, $values:ident => $made:expr) => {
        match $floats {
            Floats::F16($values) => $made,
            Floats::Bf16($values) => $made,
            Floats::F32($values) => $made,
        }
    };
}

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

#[allow(clippy::useless_conversion, reason = "one text for three types")]
impl<'a> Floats<'a> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        whichever!(self, v => v.len())
    }

    /// True if there is not a single number.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number `i` as f32; panics when out of range, as a slice does.
    pub fn get(&self, i: usize) -> f32 {
        whichever!(self, v => f32::from(v[i]))
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
            Self::F32(v) => Cow::Borrowed(v),
            other => whichever!(other, v => v.iter().copied().map(f32::from).collect()),
        }
    }

    /// All numbers as f16, rounded to nearest even (borrowed when they are stored so).
    pub fn to_f16(&self) -> Cow<'_, [f16]> {
        match self {
            Self::F16(v) => Cow::Borrowed(v),
            other => whichever!(other, v => v.iter().copied().map(f32::from).map(f16::from_f32).collect()),
        }
    }

    /// The numbers `range`, as f32, written over `out` (same length).
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        whichever!(self, v => out.iter_mut().zip(&v[range]).for_each(|(o, &x)| *o = f32::from(x)));
    }

    /// The same numbers, owned.
    pub fn into_owned(self) -> Floats<'static> {
        each!(self, v => Cow::Owned(v.into_owned()))
    }

    /// The same numbers, borrowed.
    pub fn borrowed(&self) -> Floats<'_> {
        each!(self, v => Cow::Borrowed(&v[..]))
    }

    /// Numbers `[outer, rows, inner]` with row `order[r]` as row `r`.
    pub(super) fn reorder(&self, outer: usize, inner: usize, order: &[usize]) -> Floats<'static> {
        each!(self, v => Cow::Owned(tensor::reorder(v, outer, inner, order)))
    }

    /// The bytes, as they are stored.
    pub fn as_bytes(&self) -> &[u8] {
        whichever!(self, v => bytemuck::cast_slice(v))
    }

    /// All numbers as f32, as they are where they are stored so.
    pub(crate) fn into_f32(self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(v) => v,
            other => Cow::Owned(other.to_f32().into_owned()),
        }
    }

    /// Bytes that the numbers take as they are stored.
    pub fn bytes(&self) -> usize {
        self.as_bytes().len()
    }
}

/// Joins arrays `[outer, rows of the part …]` to `[outer, rows of all …]`, in their own type if all have the same, else in
/// f32.
pub(super) fn join<'a>(parts: Vec<Floats<'a>>, outer: usize) -> Floats<'a> {
    macro_rules! alike {
        ($kind:ident) => {
            if parts.iter().all(|part| matches!(part, Floats::$kind(_))) {
                let values = |part| if let Floats::$kind(values) = part { Some(values) } else { None };
                return Floats::$kind(tensor::join(parts.into_iter().filter_map(values).collect(), outer));
            }
        };
    }
    alike!(F16);
    alike!(Bf16);
    Floats::F32(tensor::join(parts.into_iter().map(Floats::into_f32).collect(), outer))
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
    let mut place = vec![0; shape.len()];
    for (at, size) in place.iter_mut().zip(shape).rev() {
        (*at, i) = (i % size, i / size);
    }
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
