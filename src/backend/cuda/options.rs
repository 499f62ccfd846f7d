//! How the backend is set up.

use std::str::FromStr;

use anyhow::{Result, bail};

use super::{Card, Tuning};

/// The type that weights and activations are multiplied in; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Dtype {
    /// IEEE half precision.
    #[default]
    Float16 = 0,
    /// bfloat16.
    Bfloat16 = 1,
    /// IEEE single precision: reproduces the CPU's texts, at the speed of plain kernels.
    Float32 = 2,
}

impl FromStr for Dtype {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "float16" => Self::Float16,
            "bfloat16" => Self::Bfloat16,
            "float32" => Self::Float32,
            _ => bail!("{name:?}, float16, bfloat16 or float32 is expected"),
        })
    }
}

/// Where residuals are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residuals {
    /// Pinned host memory, read in place over the host link.
    #[default]
    Host,
    /// Device memory, for cards with room.
    Device,
}

impl FromStr for Residuals {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "host" => Self::Host,
            "device" => Self::Device,
            _ => bail!("{name:?}, host or device is expected"),
        })
    }
}

/// How the backend is set up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// The type of products.
    pub dtype: Dtype,
    /// Where residuals are kept.
    pub residuals: Residuals,
    /// 0: plain kernels, launched one by one; 1: kernels made for each shape; 2: these, and one graph per token.
    pub compile: u8,
    /// Launch parameters of the products.
    pub tuning: Tuning,
    /// The device acts as this one.
    pub card: Option<Card>,
}

impl Default for Options {
    fn default() -> Self {
        Self { dtype: Dtype::Float16, residuals: Residuals::Host, compile: 2, tuning: Tuning::default(), card: None }
    }
}
