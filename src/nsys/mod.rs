//! The two files of a profile (spec §4.1): a trace that says what every kernel was launched for, and a SQLite
//! file in the export schema of Nsight Systems that says when it ran.
//!
//! - [`trace`]: the lines of the trace;
//! - [`TokenTime`]: what whole tokens took, in a table of our own beside the kernels;
//! - [`Writer`]: both files, one transaction per configuration, resumable;
//! - [`read`]: both files, of ours or of a real Nsight Systems;
//! - [`adopt`]: a profile whose times are replaced by those of a real Nsight Systems.

pub mod trace;

mod adopt;
mod reader;
mod rows;
mod tokens;
mod writer;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use crate::config::Projection;
use crate::format::Format;

pub use crate::backend::record::KernelRecord;
pub use adopt::adopt;
pub(crate) use reader::capture;
pub use reader::{Profile, read};
pub use tokens::TokenTime;
pub use writer::Writer;

/// The compensation kernel's name in both files.
pub const DEC_KERNEL: &str = "fused_dec_kernel";

/// The type that a backend computes with, as the reference's flags name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// IEEE half precision.
    Fp16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    Fp32,
}

impl Precision {
    /// `fp16`, `bf16` or `fp32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Fp32 => "fp32",
        }
    }
}

impl FromStr for Precision {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::Fp16, Self::Bf16, Self::Fp32];
        let found = all.into_iter().find(|precision| precision.name() == name);
        found.with_context(|| format!("{name:?}, fp16, bf16 or fp32 is expected"))
    }
}

/// What a profile is of, and so what its files are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Chosen by the user to tell runs apart.
    pub prefix: String,
    /// The model's name.
    pub model: String,
    /// Computation type.
    pub precision: Precision,
    /// How the weights are stored; `--algo` names it by its quantizer.
    pub format: Format,
    /// Bits of a weight.
    pub bits: u32,
}

impl Identity {
    /// Checks that the names can be part of a file's name.
    ///
    /// # Errors
    /// An empty name, one with a path separator or a leading dot, or bits outside 2..=8.
    pub fn validate(&self) -> Result<()> {
        for (what, name) in [("prefix", &self.prefix), ("model name", &self.model)] {
            let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0', '\n']);
            ensure!(plain, "the {what} {name:?} becomes part of a file name: use one without / and leading dot");
        }
        ensure!((2..=8).contains(&self.bits), "bit width {}, 2 to 8 are allowed", self.bits);
        Ok(())
    }

    /// `PREFIX_MODEL_FP_ALGO_BITS`, the common part of every file name.
    pub fn stem(&self) -> String {
        let Self { prefix, model, precision, format, bits } = self;
        format!("{prefix}_{model}_{}_{}_{bits}", precision.name(), format.algo())
    }

    /// The trace in `dir`.
    pub fn trace(&self, dir: &Path) -> PathBuf {
        dir.join(self.stem() + ".trace")
    }

    /// The kernel times in `dir`.
    pub fn sqlite(&self, dir: &Path) -> PathBuf {
        dir.join(self.stem() + ".sqlite")
    }
}

/// The version of what a profile of ours says of itself. Version 1 knew single products only and did not say so.
const FORMAT: usize = 2;

/// What a profile's times are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Single products, each with its compensation, one launch behind the other.
    Products,
    /// Whole tokens, as they are decoded; the rows of a product are its stretch of a token.
    Tokens,
}

impl Kind {
    /// `products` or `tokens`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Products => "products",
            Self::Tokens => "tokens",
        }
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = [Self::Products, Self::Tokens].into_iter().find(|kind| kind.name() == name);
        found.with_context(|| format!("{name:?}, products or tokens is expected"))
    }
}

/// How and on what a profile was taken; kept in `META_DATA_CAPTURE`.
#[derive(Debug, Clone, PartialEq)]
pub struct Capture {
    /// What was measured.
    pub kind: Kind,
    /// What the profile is of.
    pub identity: Identity,
    /// `(in_features, out_features)` of the four projections.
    pub shapes: [(usize, usize); 4],
    /// Where the weights came from.
    pub weights: String,
    /// What tells the layers that were measured from any others.
    pub fingerprint: String,
    /// What took the times: `CUPTI`, `Nsight Systems 2025.1`, `host clock`.
    pub clock: String,
    /// The device as `--device` takes it.
    pub device: String,
    /// What the vendor calls it.
    pub device_name: String,
    /// Version of its driver, empty where there is none.
    pub driver: String,
    /// Tokens measured per configuration.
    pub tokens: usize,
    /// Layers of a token; of single products, layers that take turns, so that caches do not serve the weights.
    pub layers: usize,
    /// What all layers of a token without compensation take, ns; 0 where products were measured.
    pub layers_ns: u64,
    /// Bytes per second of device memory, measured.
    pub device_memory: f64,
    /// Bytes per second of the host link, measured.
    pub host_link: f64,
    /// Swept numbers of thread blocks, ascending.
    pub n_tbs: Vec<usize>,
    /// Swept `k_chunk`, ascending, without 0.
    pub k_chunks: Vec<usize>,
}

impl Capture {
    /// As rows of `META_DATA_CAPTURE`.
    fn rows(&self) -> Vec<(String, String)> {
        let id = &self.identity;
        let list = |v: &[usize]| v.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
        let mut rows = vec![
            ("FORMAT", FORMAT.to_string()),
            ("KIND", self.kind.name().into()),
            ("PREFIX", id.prefix.clone()),
            ("MODEL", id.model.clone()),
            ("FP_DTYPE", id.precision.name().into()),
            ("ALGO", id.format.algo().into()),
            ("BITWIDTH", id.bits.to_string()),
            ("WEIGHTS", self.weights.clone()),
            ("FINGERPRINT", self.fingerprint.clone()),
            ("CLOCK", self.clock.clone()),
            ("DEVICE", self.device.clone()),
            ("DEVICE_NAME", self.device_name.clone()),
            ("DRIVER", self.driver.clone()),
            ("TOKENS", self.tokens.to_string()),
            ("LAYERS", self.layers.to_string()),
            ("LAYERS_NS", self.layers_ns.to_string()),
            ("DEVICE_MEMORY_BYTES_PER_SECOND", self.device_memory.to_string()),
            ("HOST_LINK_BYTES_PER_SECOND", self.host_link.to_string()),
            ("N_TBS", list(&self.n_tbs)),
            ("K_CHUNKS", list(&self.k_chunks)),
        ];
        for (projection, (inputs, outputs)) in Projection::ALL.into_iter().zip(self.shapes) {
            rows.push((SHAPE_ROWS[projection.index()], format!("{inputs} {outputs}")));
        }
        rows.into_iter().map(|(name, value)| (format!("{PREFIX}{name}"), value)).collect()
    }

    /// From rows of `META_DATA_CAPTURE`; `None` if they are not of our writing.
    fn from_rows(rows: &[(String, String)]) -> Result<Option<Self>> {
        if !rows.iter().any(|(name, _)| name.starts_with(PREFIX)) {
            return Ok(None);
        }
        let text = |name: &str| {
            let found = rows.iter().find(|(n, _)| n.strip_prefix(PREFIX) == Some(name));
            found.map(|(_, value)| value.as_str()).with_context(|| format!("META_DATA_CAPTURE lacks {PREFIX}{name}"))
        };
        let numbers = |name: &str| -> Result<Vec<usize>> {
            let value = text(name)?;
            let parsed: Result<_, _> = value.split_whitespace().map(str::parse).collect();
            parsed.with_context(|| format!("META_DATA_CAPTURE: {PREFIX}{name} is {value:?}, numbers are expected"))
        };
        let number = |name: &str| numbers(name)?.first().copied().with_context(|| format!("{PREFIX}{name} is empty"));
        let speed = |name: &str| -> Result<f64> { text(name)?.parse().with_context(|| format!("{PREFIX}{name}")) };
        let format = if text("FORMAT").is_ok() { number("FORMAT")? } else { 1 };
        ensure!(
            format == FORMAT,
            "a profile of format {format}, this program reads {FORMAT}: take it again with decdec profile --overwrite"
        );
        let mut shapes = [(0, 0); 4];
        for (shape, name) in shapes.iter_mut().zip(SHAPE_ROWS) {
            let [inputs, outputs] = numbers(name)?[..] else {
                anyhow::bail!("META_DATA_CAPTURE: {PREFIX}{name} is {:?}, two numbers are expected", text(name)?);
            };
            *shape = (inputs, outputs);
        }
        let choice = |name: &str| format!("META_DATA_CAPTURE: {PREFIX}{name} is not one that we know");
        Ok(Some(Self {
            kind: text("KIND")?.parse().with_context(|| choice("KIND"))?,
            identity: Identity {
                prefix: text("PREFIX")?.into(),
                model: text("MODEL")?.into(),
                precision: text("FP_DTYPE")?.parse().with_context(|| choice("FP_DTYPE"))?,
                format: Format::of_algo(text("ALGO")?).with_context(|| choice("ALGO"))?,
                bits: u32::try_from(number("BITWIDTH")?)?,
            },
            shapes,
            weights: text("WEIGHTS")?.into(),
            fingerprint: text("FINGERPRINT")?.into(),
            clock: text("CLOCK")?.into(),
            device: text("DEVICE")?.into(),
            device_name: text("DEVICE_NAME")?.into(),
            driver: text("DRIVER")?.into(),
            tokens: number("TOKENS")?,
            layers: number("LAYERS")?,
            layers_ns: number("LAYERS_NS")? as u64,
            device_memory: speed("DEVICE_MEMORY_BYTES_PER_SECOND")?,
            host_link: speed("HOST_LINK_BYTES_PER_SECOND")?,
            n_tbs: numbers("N_TBS")?,
            k_chunks: numbers("K_CHUNKS")?,
        }))
    }
}

/// What our rows of `META_DATA_CAPTURE` start with, so that they cannot be taken for Nsight's.
const PREFIX: &str = "DECDEC_";

const SHAPE_ROWS: [&str; 4] = ["SHAPE_QKV", "SHAPE_O", "SHAPE_GU", "SHAPE_D"];
