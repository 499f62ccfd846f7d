//! The file that `generate --tuned` takes: what to compensate on one device, for one model and one target.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::backend::DeviceInfo;
use crate::dec::CHUNK;
use crate::files;

/// Version of the file's format.
const FORMAT: u32 = 1;

/// Bytes of a file of results; one takes some 700.
const MAX_BYTES: u64 = 1 << 20;

/// The device that a result was tuned on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// As `--device` takes it; empty if the profile does not say.
    pub id: String,
    /// What the vendor calls it; empty if the profile does not say.
    pub name: String,
    /// Version of its driver; empty if the profile does not say.
    pub driver: String,
}

/// One tuned result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// Version of this format.
    pub format: u32,
    /// The device.
    pub device: Device,
    /// The model's name.
    pub model: String,
    /// `sqllm` or `awq`.
    pub algo: String,
    /// Bits of a weight.
    pub bits: u32,
    /// `fp16`, `bf16` or `fp32`.
    pub fp_dtype: String,
    /// `(in_features, out_features)` of qkv, o, gu and d.
    pub shapes: [(usize, usize); 4],
    /// What took the times.
    pub clock: String,
    /// Slowdown asked for, per cent.
    pub target_slowdown: f64,
    /// Slowdown of the four projections expected, per cent; at most the target.
    pub slowdown: f64,
    /// Slowdown of whole tokens, per cent, where `tune --verify` measured it; at most the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub real_slowdown: Option<f64>,
    /// The four projections of a layer without compensation, µs.
    pub base_layer_us: f64,
    /// The same as tuned, µs.
    pub layer_us: f64,
    /// Thread blocks that compensate, for `--n-tbs`.
    pub n_tb: usize,
    /// Channels per chunk of qkv, o, gu and d, for `--k-chunks`.
    pub k_chunks: [usize; 4],
}

impl Tuned {
    /// Reads a file of one result, as [`super::Outcome::write`] wrote it, or of several, as [`Tuned::save`] did.
    ///
    /// # Errors
    /// A file that is missing, empty, of another version, or whose values are out of range.
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        let text = files::read_text(path, MAX_BYTES)
            .with_context(|| format!("cannot read {}: decdec tune writes such files", path.display()))?;
        let one = || serde_json::from_str(&text).map(|tuned| vec![tuned]);
        let several = text.trim_start().starts_with('[');
        let all: Vec<Self> = if several { serde_json::from_str(&text) } else { one() }
            .with_context(|| format!("{} is no tuned result", path.display()))?;
        ensure!(!all.is_empty(), "{} holds no tuned result", path.display());
        all.iter().try_for_each(Self::validate).with_context(|| path.display().to_string())?;
        Ok(all)
    }

    /// Puts this result among those of `tuned.json` in `checkpoint`, in place of an earlier one for the same device
    /// and width; returns the file.
    ///
    /// # Errors
    /// A file there that cannot be read, or what the file system says.
    pub fn save(&self, checkpoint: &Path) -> Result<PathBuf> {
        let path = checkpoint.join("tuned.json");
        let mut all = if path.exists() { Self::read(&path)? } else { Vec::new() };
        all.retain(|other| other.device.name != self.device.name || other.bits != self.bits);
        all.push(self.clone());
        super::replace(&path, |path| Ok(fs::write(path, json(&all)?)?))?;
        Ok(path)
    }

    fn validate(&self) -> Result<()> {
        ensure!(self.format == FORMAT, "format {}, this program reads {FORMAT}: tune again", self.format);
        ensure!(self.n_tb > 0, "n_tb is 0, at least 1 is expected");
        for k in self.k_chunks {
            ensure!(k <= CHUNK, "k_chunk is {k}, 0 to {CHUNK} are allowed");
        }
        Ok(())
    }

    /// Checks that the result holds for `device` and for a model of these shapes and bits.
    ///
    /// Another driver is a warning: times may have changed, nothing is wrong.
    ///
    /// # Errors
    /// Another device, other shapes or another width, with what is there and what was tuned.
    pub fn check(&self, device: &DeviceInfo, shapes: [(usize, usize); 4], bits: u32) -> Result<()> {
        let tuned = &self.device;
        ensure!(
            tuned.name.is_empty() || tuned.name == device.name,
            "tuned on {}, but this is {}: run decdec profile and decdec tune here",
            tuned.name,
            device.name
        );
        ensure!(
            self.shapes == shapes && self.bits == bits,
            "tuned for {} at {} bits with projections {:?}, but this model has {bits} bits and {shapes:?}: give its own file",
            self.model,
            self.bits,
            self.shapes
        );
        if !tuned.driver.is_empty() && tuned.driver != device.driver {
            tracing::warn!("tuned with driver {}, now {}: profile again if it got slower", tuned.driver, device.driver);
        }
        Ok(())
    }

    pub(super) const FORMAT: u32 = FORMAT;
}

/// As a text file.
pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}
