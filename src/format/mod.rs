//! What is stored: pure packing, unpacking and dequantization, one file per format.
//!
//! A format is described once: its names, and its tensors with suffix, type and shape ([`Tensor`]). Checkpoints are
//! read, checked and written by that. Every type here borrows from a memory map where it can ([`Cow`]), is validated
//! when it is made and never again, and knows nothing of files or devices.
//!
//! [`Cow`]: std::borrow::Cow

pub mod anyprec;
mod bits;
pub mod bytes;
mod floats;
pub mod lutgemm;
mod packed;
pub mod residual;
mod tensor;
pub mod threshold;

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use anyprec::AnyPrec;
pub use floats::Floats;
pub use lutgemm::LutGemm;
pub use packed::Packed;
pub use residual::Residual;
pub use tensor::{Dim, Kind, Numbers, Size, Tensor};

/// How quantized weights are stored: what `--backend` chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum Format {
    /// One codebook per row.
    AnyPrec,
    /// Binary-coded, in groups of channels.
    LutGemm,
}

/// What there is to say of a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Description {
    name: &'static str,
    about: &'static str,
    /// The quantizer that the reference makes this format with: `--algo`.
    algo: &'static str,
    /// What the reference's profiles call its product.
    gemv_kernel: &'static str,
    tensors: &'static [Tensor],
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::AnyPrec, Self::LutGemm];

    const fn description(self) -> &'static Description {
        match self {
            Self::AnyPrec => &anyprec::DESCRIPTION,
            Self::LutGemm => &lutgemm::DESCRIPTION,
        }
    }

    /// `ap` or `lutgemm`, as `--backend` and checkpoints say.
    pub const fn name(self) -> &'static str {
        self.description().name
    }

    /// What it is, for the help of `--backend`.
    pub const fn about(self) -> &'static str {
        self.description().about
    }

    /// `sqllm` or `awq`: the quantizer that makes it, as `--algo` and the files of profiles say.
    pub const fn algo(self) -> &'static str {
        self.description().algo
    }

    /// The base GEMV's name in the files of profiles.
    pub const fn gemv_kernel(self) -> &'static str {
        self.description().gemv_kernel
    }

    /// The tensors of a matrix.
    pub const fn tensors(self) -> &'static [Tensor] {
        self.description().tensors
    }

    /// True if channels are quantized in groups, whose size is then a part of what is stored.
    pub fn is_grouped(self) -> bool {
        self.tensors().iter().any(|tensor| tensor.dims.contains(&Dim::Groups))
    }

    /// The format that this quantizer makes.
    ///
    /// # Errors
    /// Another name than `sqllm` and `awq`.
    pub fn of_algo(algo: &str) -> Result<Self> {
        Self::find(algo, Self::algo)
    }

    fn find(text: &str, name: fn(Self) -> &'static str) -> Result<Self> {
        let names = Self::ALL.map(name).join(" or ");
        let found = Self::ALL.into_iter().find(|&format| name(format) == text);
        found.with_context(|| format!("{text:?}, {names} is expected"))
    }
}

impl FromStr for Format {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::find(name, Self::name)
    }
}

impl TryFrom<String> for Format {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<Format> for &'static str {
    fn from(format: Format) -> Self {
        format.name()
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A format with what it leaves open, bits excepted: a model is stored in one, its layers may differ in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Storage {
    /// The format.
    pub format: Format,
    /// Channels of a group, in formats that have groups.
    pub group_size: Option<usize>,
}

impl Storage {
    /// AnyPrec leaves nothing open.
    pub const ANYPREC: Self = Self { format: Format::AnyPrec, group_size: None };

    /// LUT-GEMM in groups of `group_size` channels.
    pub const fn lutgemm(group_size: usize) -> Self {
        Self { format: Format::LutGemm, group_size: Some(group_size) }
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
