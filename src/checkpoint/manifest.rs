//! What a checkpoint says of itself: the object `decdec` of its `config.json`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::config::Projection;
use crate::format::{Format, Storage};
use crate::weights::ModelWeights;

/// The version of the directory's layout that this program writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Bits of a weight: `3` is 3 in every layer, `3.5` is 3 in half of the layers and 4 in the others, `3.25` is 4 in a quarter
/// of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct BitWidth {
    low: u32,
    /// How many of a hundred layers have one bit more.
    more: u32,
}

impl BitWidth {
    /// The bits of a model whose layers have `bits`.
    ///
    /// # Errors
    /// No layers, or a width that there is not.
    pub fn of_layers(bits: &[u32]) -> Result<Self> {
        let low = bits.iter().copied().min().context("the model has no layers")?;
        let (layers, raised) = (bits.len(), bits.iter().filter(|&&bits| bits != low).count());
        // Of all widths that lead to so many layers, the roundest.
        let hundredths = [0, 50, 25, 75].into_iter().chain(1..100);
        let of_so_many = |more: &u32| Self { low, more: *more }.raised(layers) == raised;
        let more = hundredths.into_iter().find(of_so_many).unwrap_or(99);
        Self::try_from(f64::from(low) + f64::from(more) / 100.0)
    }

    /// How many of `layers` have one bit more; in a mixed model one at least has, if there are two.
    pub fn raised(self, layers: usize) -> usize {
        let least = usize::from(self.is_mixed() && layers > 1);
        (layers * self.more as usize / 100).max(least)
    }

    /// The bits of every layer, or of those with fewer.
    pub fn low(self) -> u32 {
        self.low
    }

    /// The bits of every layer, or of those with more.
    pub fn high(self) -> u32 {
        self.low + u32::from(self.is_mixed())
    }

    /// True if the layers differ.
    pub fn is_mixed(self) -> bool {
        self.more > 0
    }
}

impl TryFrom<f64> for BitWidth {
    type Error = anyhow::Error;

    fn try_from(bits: f64) -> Result<Self> {
        let hundredths = (bits * 100.0).round();
        ensure!(
            (bits * 100.0 - hundredths).abs() < 1e-6 && (200.0..=800.0).contains(&hundredths),
            "bit width {bits:?}, 2 to 8 in steps of 0.01 are allowed, for example 3, 3.25, 3.5 or 4"
        );
        Ok(Self { low: hundredths as u32 / 100, more: hundredths as u32 % 100 })
    }
}

impl From<BitWidth> for f64 {
    fn from(bits: BitWidth) -> Self {
        f64::from(bits.low * 100 + bits.more) / 100.0
    }
}

impl FromStr for BitWidth {
    type Err = anyhow::Error;

    fn from_str(s: &str) -> Result<Self> {
        let bits: f64 = s.parse().map_err(|_| anyhow!("bit width {s:?}, a number such as 3, 3.5 or 4 is expected"))?;
        bits.try_into()
    }
}

impl fmt::Display for BitWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f64::from(*self).fmt(f)
    }
}

/// How a checkpoint was made, and whether it can be compensated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub version: u32,
    /// How weights are stored.
    pub backend: Format,
    /// Bits of a weight.
    pub bits: BitWidth,
    /// Channels of a group; only for [`Format::LutGemm`].
    pub group_size: Option<usize>,
    /// Bits of a residual: 4, or 0 where there are none.
    pub residual_bits: u32,
    /// What it was made from.
    pub source: String,
    /// What it was calibrated on.
    pub calibration: String,
}

impl Manifest {
    /// What a checkpoint of the quantized model `weights` says of itself; `source` and `calibration` are for the
    /// record.
    ///
    /// # Errors
    /// A model that is not quantized, or whose layers differ by more than one bit.
    pub fn describe(weights: &dyn ModelWeights, source: String, calibration: String) -> Result<Self> {
        let bits: Option<Vec<u32>> = (0..weights.config().layers.len()).map(|layer| weights.bits(layer)).collect();
        let bits = bits.context("the model is full precision, quantize it first")?;
        let (low, high) = bits.iter().fold((u32::MAX, 0), |(low, high), &bits| (low.min(bits), high.max(bits)));
        ensure!(
            high.saturating_sub(low) <= 1,
            "the layers have {low} to {high} bits, a checkpoint holds one bit width or two that are neighbours"
        );
        let first = weights.projection(0, Projection::Qkv)?;
        let storage = first.weight.storage().context("the model is full precision, quantize it first")?;
        Ok(Self {
            version: FORMAT_VERSION,
            backend: storage.format,
            bits: BitWidth::of_layers(&bits)?,
            group_size: storage.group_size,
            residual_bits: if first.residual.is_some() { 4 } else { 0 },
            source,
            calibration,
        })
    }

    /// The format with the size of groups.
    pub fn storage(&self) -> Storage {
        Storage { format: self.backend, group_size: self.group_size }
    }

    /// True if there are residuals and thresholds.
    pub fn has_residuals(&self) -> bool {
        self.residual_bits > 0
    }

    /// Takes the object `decdec` out of a parsed `config.json`.
    ///
    /// # Errors
    /// No such object, another version, or fields that contradict each other.
    pub(super) fn from_config(config: &serde_json::Value) -> Result<Self> {
        let object = config
            .get("decdec")
            .context("no object \"decdec\": this is not a decdec checkpoint, make one with `decdec quantize`")?;
        let version = object.get("version").and_then(serde_json::Value::as_u64);
        ensure!(
            version == Some(u64::from(FORMAT_VERSION)),
            "checkpoint version {}, version {FORMAT_VERSION} is supported: quantize the model again",
            version.map_or("missing".to_owned(), |v| v.to_string())
        );
        let manifest: Self = serde_json::from_value(object.clone()).context("object \"decdec\"")?;
        ensure!(
            matches!(manifest.residual_bits, 0 | 4),
            "residuals of {} bits, 4 are supported, 0 says that there are none",
            manifest.residual_bits
        );
        ensure!(
            manifest.group_size.is_some() == manifest.backend.is_grouped(),
            "object \"decdec\": backend {} with group_size {:?}, lutgemm has a group size and ap has none",
            manifest.backend,
            manifest.group_size
        );
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_widths_are_between_2_and_8() {
        for (text, low, high) in
            [("3", 3, 3), ("3.5", 3, 4), ("3.25", 3, 4), ("3.01", 3, 4), ("4.0", 4, 4), ("8", 8, 8), ("7.5", 7, 8)]
        {
            let bits: BitWidth = text.parse().unwrap();
            assert_eq!((bits.low(), bits.high()), (low, high));
            assert_eq!(bits.is_mixed(), low != high);
        }
        assert_eq!("3.5".parse::<BitWidth>().unwrap().to_string(), "3.5");
        assert_eq!("4".parse::<BitWidth>().unwrap().to_string(), "4");
        assert_eq!(
            ["3.25", "3.1", "2.99"].map(|text| text.parse::<BitWidth>().unwrap().to_string()),
            ["3.25", "3.1", "2.99"]
        );
        for text in ["1", "1.5", "8.5", "3.255", "9", "-3", "nan", "inf", "three", ""] {
            let message = text.parse::<BitWidth>().unwrap_err().to_string();
            assert!(message.contains("3.5"), "{message}");
        }
    }

    #[test]
    fn widths_say_how_many_layers_have_more_bits_and_those_say_the_width() {
        let width = |text: &str| text.parse::<BitWidth>().unwrap();
        let raised = |text: &str, layers| width(text).raised(layers);
        assert_eq!([raised("3", 30), raised("3.5", 30), raised("3.5", 31), raised("3.25", 30)], [0, 15, 15, 7]);
        assert_eq!([raised("3.01", 30), raised("3.99", 30), raised("3.5", 1)], [1, 29, 0]);
        for (text, layers) in [("3", 5), ("3.5", 5), ("3.5", 32), ("3.25", 32), ("3.75", 32), ("4.5", 2)] {
            let more = width(text).raised(layers);
            let bits: Vec<u32> = (0..layers).map(|i| width(text).low() + u32::from(i < more)).collect();
            assert_eq!(BitWidth::of_layers(&bits).unwrap(), width(text), "{text} of {layers} layers");
        }
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        let good = serde_json::json!({"decdec": {
            "version": 1, "backend": "lutgemm", "bits": 3.5, "group_size": 64, "residual_bits": 4,
            "source": "a", "calibration": "b",
        }});
        let manifest = Manifest::from_config(&good).unwrap();
        assert_eq!((manifest.backend, manifest.bits.to_string()), (Format::LutGemm, "3.5".into()));
        for (field, value) in [
            ("version", serde_json::json!(2)),
            ("backend", serde_json::json!("ap")),
            ("backend", serde_json::json!("awq")),
            ("bits", serde_json::json!(3.333)),
            ("group_size", serde_json::Value::Null),
            ("residual_bits", serde_json::json!(8)),
        ] {
            let mut bad = good.clone();
            bad["decdec"][field] = value;
            assert!(Manifest::from_config(&bad).is_err(), "{field}");
        }
        assert!(Manifest::from_config(&serde_json::json!({})).is_err());
    }
}
