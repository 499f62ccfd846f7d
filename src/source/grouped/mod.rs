//! Hugging Face directories quantized with AWQ (AutoAWQ's `gemm` layout) or GPTQ (without act-order), read as LUT-GEMM
//! without any loss.
//!
//! `w[row, k] = scales[g, row]·(code − zero)`, `g = ⌊k / group_size⌋`; `scales` is `f16 [in/group_size, out]`, and how
//! `qweight` and `qzeros` hold codes and zeros is each layout's own.

mod awq;
mod gptq;
mod quantization;

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use self::quantization::Quantization;
use super::huggingface;
use crate::config::{ModelConfig, read_json};
use crate::format::{Floats, Format, Kind, LutGemm, Numbers, Size};
use crate::tensors::{EMBEDDING, Expected, HEAD, Layout, Module, Shards, StoredModel, TensorSet, is_stored_model};
use crate::tokenizer::TextFiles;

/// Bits of a code, as quantizers call it now and as AutoAWQ first did.
const BIT_KEYS: [&str; 2] = ["bits", "w_bit"];

/// How codes and zeros are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Awq,
    Gptq(gptq::Packing),
}

/// A checkpoint of AWQ or GPTQ, memory-mapped. It has no residuals: what was lost is not in it.
#[derive(Debug)]
pub struct Grouped(StoredModel);

is_stored_model!(Grouped, 0);

impl Grouped {
    /// True if the `config.json` in `dir`, or a file of an older quantizer beside it, says that AWQ or GPTQ made it.
    pub fn detect(dir: &Path) -> bool {
        let found = read_json(&dir.join("config.json")).and_then(|config| Quantization::find(dir, &config));
        found.is_ok_and(|found| found.is_some_and(|found| matches!(found.method.as_str(), "awq" | "gptq")))
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// Another width or layout, GPTQ's act-order; files that are truncated; missing or misshapen tensors, by name.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::read(dir).with_context(|| format!("cannot open the model {}", dir.display()))
    }

    fn read(dir: &Path) -> Result<Self> {
        let config_json = read_json(&dir.join("config.json"))?;
        let config = ModelConfig::from_json(&config_json)?;
        let shards = Shards::open(&huggingface::files(dir)?)?;
        let config = super::with_own_head(config, &shards)?;
        let quantization = Quantization::find(dir, &config_json)?;
        let quantization = quantization.context("quantization_config is missing: is the model quantized?")?;
        let (packing, group_size) = packing(&quantization).with_context(|| format!("in {}", quantization.place))?;
        let packed = Packed { shards, packing };
        packed.ensure_plain_tables()?;
        let (format, group_size) = (Some(Format::LutGemm), Some(group_size));
        let bits = vec![packed.bits(); config.layers.len()];
        let layout = Layout { format, group_size, own: false, compensated: false };
        let texts = TextFiles::read(dir)?;
        let model = StoredModel { tensors: Box::new(packed), config, texts, layout, bits };
        model.check(|_| None)?;
        Ok(Self(model))
    }
}

/// The files of a quantizer. Where a matrix of LUT-GEMM would have `binary`, there are `qweight`, `qzeros` and `scales`.
#[derive(Debug)]
struct Packed {
    shards: Shards,
    packing: Packing,
}

impl Packed {
    /// Bits of every code.
    fn bits(&self) -> u32 {
        match self.packing {
            Packing::Awq => awq::BITS,
            Packing::Gptq(packing) => packing.bits,
        }
    }

    fn ensure_plain_tables(&self) -> Result<()> {
        let tables = [EMBEDDING, HEAD].map(|table| table.replace(".weight", ".qweight"));
        match tables.iter().find(|table| self.shards.contains(table)) {
            Some(table) => {
                bail!("{table} is there: embedding and head are expected in full precision, only projections quantized")
            }
            None => Ok(()),
        }
    }
}

impl TensorSet for Packed {
    fn contains(&self, name: &str) -> bool {
        self.shards.contains(&name.replace(".binary", ".qweight"))
    }

    fn check(&self, expected: &Expected) -> Result<()> {
        self.shards.check(expected)
    }

    fn floats(&self, name: &str) -> Result<Floats<'_>> {
        self.shards.floats(name)
    }

    fn words(&self, name: &str) -> Result<Cow<'_, [u32]>> {
        self.shards.words(name)
    }

    /// Codes and zeros as the layout has them, and scales.
    fn expected(&self, module: &Module, _format: Option<Format>, size: &Size) -> Result<Vec<Expected>> {
        let (name, rows, channels) = (&module.name, module.rows, size.in_features);
        let (group_size, [qweight, qzeros, scales]) =
            (group_size(size), ["qweight", "qzeros", "scales"].map(|suffix| module.tensor(suffix)));
        let groups = channels / group_size;
        ensure!(
            self.shards.contains(&qweight) || !self.shards.contains(&module.tensor("weight")),
            "{name} is not quantized (modules_to_not_convert): every projection of every layer is expected to be"
        );
        let whole = match self.packing {
            Packing::Awq => 8,
            Packing::Gptq(_) => 32,
        };
        ensure!(rows.is_multiple_of(whole), "{name} has {rows} rows, a multiple of {whole} is expected");
        let (weights, zeros) = match self.packing {
            Packing::Awq => ([channels, rows / 8], [groups, rows / 8]),
            Packing::Gptq(packing) => packing.shapes(channels, groups, rows),
        };
        let all = [(qweight, weights, Kind::I32), (qzeros, zeros, Kind::I32), (scales, [groups, rows], Kind::Float)];
        let all = all.map(|(name, shape, kind)| Expected { name, shape: shape.into(), kind });
        all[..2].iter().try_for_each(|expected| self.check(expected))?;
        if let Packing::Gptq(packing) = self.packing {
            let order = module.tensor("g_idx");
            let order = self.contains(&order).then(|| self.words(&order)).transpose()?;
            packing.ensure_in_order(order, channels, group_size).with_context(|| name.clone())?;
        }
        Ok(all.into())
    }

    /// A uniform quantizer, binary-coded without any loss.
    fn weight(&self, module: &Module, _format: Option<Format>, size: &Size) -> Result<Vec<Numbers<'_>>> {
        let (rows, channels, group_size) = (module.rows, size.in_features, group_size(size));
        let groups = channels / group_size;
        let [qweight, qzeros] = ["qweight", "qzeros"].map(|suffix| self.words(&module.tensor(suffix)));
        let (qweight, qzeros) = (qweight?, qzeros?);
        let (codes, zeros) = match self.packing {
            Packing::Awq => (awq::codes(&qweight, rows, channels), awq::codes(&qzeros, rows, groups)),
            Packing::Gptq(packing) => (packing.codes(&qweight, rows, channels), packing.zeros(&qzeros, rows, groups)),
        };
        let zeros: Vec<f32> = zeros.into_iter().map(f32::from).collect();
        let stored = self.floats(&module.tensor("scales"))?.into_f32();
        let scales: Vec<f32> = (0..rows * groups).map(|i| stored[i % groups * rows + i / groups]).collect();
        let weight = LutGemm::from_uniform(channels, rows, size.bits, group_size, &codes, &scales, &zeros)?;
        Ok(weight.0.tensors)
    }
}

/// Channels that share a scale.
fn group_size(size: &Size) -> usize {
    size.group_size.unwrap_or(size.in_features)
}

/// The packing and the group size, once everything else about the quantization is known to be understood.
fn packing(quantization: &Quantization) -> Result<(Packing, usize)> {
    let packing = match quantization.method.as_str() {
        "awq" => awq::understood(quantization).map(|()| Packing::Awq)?,
        "gptq" => Packing::Gptq(gptq::Packing::understood(quantization)?),
        other => bail!("quant_method is {other:?}, \"awq\" or \"gptq\" is expected"),
    };
    let head = quantization.field(&["lm_head"])?;
    ensure!(head != true, "lm_head is true: a quantized head is not read, one in full precision is expected");
    let group_size = quantization.field(&["group_size", "q_group_size"])?;
    if group_size.is_null() {
        return Ok((packing, 128));
    }
    let size = group_size.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
    let size = size.with_context(|| {
        format!("group_size is {group_size}, a multiple of 32 is expected: quantize it again in groups of channels")
    })?;
    Ok((packing, size))
}

/// Checks that nothing in `dir`, whose `config.json` is `config`, says that its model is quantized.
pub(super) fn ensure_full_precision(dir: &Path, config: &Value) -> Result<()> {
    let Some(quantization) = Quantization::find(dir, config)? else { return Ok(()) };
    let method = match quantization.method.as_str() {
        "" => "quant_method is missing",
        method => method,
    };
    bail!("the model is already quantized ({method}), full precision is expected: give the model that it was made from")
}
