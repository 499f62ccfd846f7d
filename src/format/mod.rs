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

use half::{bf16, f16};

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

    /// Bytes that the numbers take as they are stored.
    pub fn bytes(&self) -> usize {
        self.len() * if matches!(self, Self::F32(_)) { 4 } else { 2 }
    }
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
