//! The file that `generate --tuned` takes: what to compensate on one device, for one model and one target.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::backend::DeviceInfo;
use crate::config::read_json;
use crate::dec::CHUNK;
use crate::files;

/// Version of the file's format.
pub(crate) const FORMAT: u32 = 1;

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
    /// What was made the most of, `k` or `kl`, where the file says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// Thread blocks that compensate, for `--n-tbs`.
    pub n_tb: usize,
    /// Channels per chunk of qkv, o, gu and d, for `--k-chunks`.
    pub k_chunks: [usize; 4],
}

impl Tuned {
    /// Reads a file of one result, as the tuner wrote it, or of several, as [`Tuned::save`] did.
    ///
    /// # Errors
    /// A file that is missing, empty, of another version, or whose values are out of range.
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        let no_result = || format!("{} is no tuned result: decdec tune writes such files", path.display());
        let json = read_json(path).with_context(no_result)?;
        let several = if json.is_array() { json } else { serde_json::Value::Array(vec![json]) };
        let all: Vec<Self> = serde_json::from_value(several).with_context(no_result)?;
        ensure!(!all.is_empty(), "{} holds no tuned result", path.display());
        all.iter().try_for_each(Self::validate).with_context(|| path.display().to_string())?;
        Ok(all)
    }

    /// Of `all`, the results for a model of these shapes on `device`: one for each of `widths`, in their order.
    ///
    /// # Errors
    /// A width without a result, with why what is there does not fit.
    pub fn choose(all: &[Self], device: &DeviceInfo, shapes: [(usize, usize); 4], widths: &[u32]) -> Result<Vec<Self>> {
        let here: Vec<&Self> = all.iter().filter(|tuned| tuned.check_device(device).is_ok()).collect();
        if here.is_empty() {
            all.iter().try_for_each(|tuned| tuned.check_device(device))?;
        }
        let choose = |&bits: &u32| {
            let Some(tuned) = here.iter().find(|tuned| tuned.check(device, shapes, bits).is_ok()) else {
                here.iter().try_for_each(|tuned| tuned.check(device, shapes, bits))?;
                bail!("there is no tuned result");
            };
            tuned.warn_of_driver(device);
            Ok((*tuned).clone())
        };
        widths.iter().map(choose).collect()
    }

    /// Puts this result among those of `tuned.json` in `checkpoint`, in place of an earlier one for the same device
    /// and width; returns the file.
    ///
    /// # Errors
    /// A file there that cannot be read, or what the file system says.
    pub fn save(&self, checkpoint: &Path) -> Result<PathBuf> {
        let path = checkpoint.join("tuned.json");
        // One at a time: another result may be on its way into the same file. Where directories cannot be locked, it is
        // the last one that stays.
        let directory = fs::File::open(checkpoint);
        let _held = directory.as_ref().is_ok_and(|directory| directory.lock().is_ok());
        let mut all = if path.exists() { Self::read(&path)? } else { Vec::new() };
        all.retain(|other| other.device.name != self.device.name || other.bits != self.bits);
        all.push(self.clone());
        files::replace(&path, |path| Ok(fs::write(path, json(&all)?)?))?;
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

    /// Checks that the result holds for `device` and for layers of these shapes and bits.
    ///
    /// # Errors
    /// Another device, other shapes or another width, with what is there and what was tuned.
    pub fn check(&self, device: &DeviceInfo, shapes: [(usize, usize); 4], bits: u32) -> Result<()> {
        self.check_device(device)?;
        ensure!(
            self.shapes == shapes,
            "tuned for {} with projections {:?}, but this model has {shapes:?}: give its own file",
            self.model,
            self.shapes
        );
        ensure!(
            self.bits == bits,
            "tuned for {} at {} bits, but this model has layers of {bits} bits: run decdec profile and decdec tune --save \
             with --bitwidth {bits}, or give its own file",
            self.model,
            self.bits
        );
        Ok(())
    }

    fn check_device(&self, device: &DeviceInfo) -> Result<()> {
        ensure!(
            self.device.name.is_empty() || self.device.name == device.name,
            "tuned on {}, but this is {}: run decdec profile and decdec tune here",
            self.device.name,
            device.name
        );
        Ok(())
    }

    /// Another driver: times may have changed, nothing is wrong.
    fn warn_of_driver(&self, device: &DeviceInfo) {
        let tuned = &self.device.driver;
        if !tuned.is_empty() && *tuned != device.driver {
            tracing::warn!("tuned with driver {tuned}, now {}: profile again if it got slower", device.driver);
        }
    }
}

/// What a unit of each projection's `k_chunk` is worth, measured with the model's own weights: a file of a checkpoint,
/// beside `tuned.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlWeights {
    /// Version of the file's format.
    pub format: u32,
    /// Nats of the divergence from the source that a unit of `k_chunk` gives back: qkv, o, gu and d.
    pub per_k_chunk: [f64; 4],
    /// The `k_chunk` that it was measured at.
    pub k_chunk: usize,
    /// Divergence without compensation, nats.
    pub uncompensated: f64,
    /// Tokens that it was measured on.
    pub tokens: usize,
}

impl KlWeights {
    /// The version of the format.
    pub const FORMAT: u32 = 1;
    /// The file's name.
    pub const FILE: &str = "kl_weights.json";

    /// Reads the weights of `checkpoint`; `None` where it has none.
    ///
    /// # Errors
    /// A damaged file, one of another version, weights that are no numbers of at least 0 or all 0.
    pub fn read(checkpoint: &Path) -> Result<Option<Self>> {
        let path = checkpoint.join(Self::FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let no_weights =
            || format!("{} holds no weights: decdec eval perplexity --write-weights writes them", path.display());
        let read: Self = serde_json::from_value(read_json(&path).with_context(no_weights)?).with_context(no_weights)?;
        ensure!(
            read.format == Self::FORMAT,
            "{}: format {}, this program reads {}: measure again",
            path.display(),
            read.format,
            Self::FORMAT
        );
        let sound = read.per_k_chunk.iter().all(|w| w.is_finite() && *w >= 0.0) && read.per_k_chunk != [0.0; 4];
        ensure!(
            sound,
            "{}: weights {:?}, numbers of at least 0 are expected, not all 0",
            path.display(),
            read.per_k_chunk
        );
        Ok(Some(read))
    }

    /// Puts the file into `checkpoint`; returns its path.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, checkpoint: &Path) -> Result<PathBuf> {
        let path = checkpoint.join(Self::FILE);
        files::replace(&path, |path| Ok(fs::write(path, json(self)?)?))?;
        Ok(path)
    }
}

/// As a text file.
pub(crate) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}
