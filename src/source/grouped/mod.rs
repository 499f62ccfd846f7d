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
use super::huggingface::Shards;
use super::modules::{Part, parts};
use super::{EMBEDDING, FINAL_NORM, HEAD, norm_name};
use crate::config::{LayerNorm, ModelConfig, Projection, read_json};
use crate::format::{Dense, Floats, LutGemm};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights, Weight};

/// Bits of a code, as quantizers call it now and as AutoAWQ first did.
const BIT_KEYS: [&str; 2] = ["bits", "w_bit"];

/// How codes and zeros are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Awq,
    Gptq(gptq::Packing),
}

/// A checkpoint of AWQ or GPTQ, memory-mapped. It has no residuals: what was lost is not in it.
#[derive(Debug)]
pub struct Grouped {
    shards: Shards,
    config: ModelConfig,
    config_json: Value,
    texts: TextFiles,
    group_size: usize,
    layout: Layout,
}

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
        let quantization = Quantization::find(dir, &config_json)?;
        let quantization = quantization.context("quantization_config is missing: is the model quantized?")?;
        let (layout, group_size) = layout(&quantization).with_context(|| format!("in {}", quantization.place))?;
        let (shards, texts) = (Shards::open(dir)?, TextFiles::read(dir)?);
        let model = Self { shards, config, config_json, texts, group_size, layout };
        model.check()?;
        Ok(model)
    }

    /// `config.json` as it is.
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// Tokenizer, chat template, special tokens.
    pub fn texts(&self) -> &TextFiles {
        &self.texts
    }

    /// Bits of every code.
    pub fn code_bits(&self) -> u32 {
        match self.layout {
            Layout::Awq => awq::BITS,
            Layout::Gptq(packing) => packing.bits,
        }
    }

    /// Channels that share a scale.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    fn parts(&self, layer: usize, projection: Projection) -> Vec<Part> {
        parts(&self.config, layer, projection, |part| self.shards.contains(&part.tensor("qweight")))
    }

    /// Every tensor is there, in its shape.
    fn check(&self) -> Result<()> {
        let ModelConfig { vocab_size, hidden_size, .. } = self.config;
        for table in [EMBEDDING, HEAD] {
            let quantized = table.replace(".weight", ".qweight");
            ensure!(
                !self.shards.contains(&quantized),
                "{quantized} is there: embedding and head are expected in full precision, only projections quantized"
            );
        }
        self.check_floats(EMBEDDING, &[vocab_size, hidden_size])?;
        self.check_floats(FINAL_NORM, &[hidden_size])?;
        if !self.config.tie_word_embeddings {
            self.check_floats(HEAD, &[vocab_size, hidden_size])?;
        }
        for layer in 0..self.config.layers.len() {
            for (norm, len) in self.config.layers[layer].norms(hidden_size) {
                self.check_floats(&norm_name(&self.config, layer, norm)?, &[len])?;
            }
            for projection in Projection::ALL {
                let channels = self.config.shape(layer, projection).0;
                crate::format::lutgemm::ensure_group_size(channels, self.group_size)?;
                let groups = channels / self.group_size;
                for part in self.parts(layer, projection) {
                    self.check_packed(&part, channels, groups)?;
                    self.check_floats(&part.tensor("scales"), &[groups, part.rows])?;
                    if self.shards.contains(&part.tensor("bias")) {
                        self.check_floats(&part.tensor("bias"), &[part.rows])?;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_floats(&self, name: &str, shape: &[usize]) -> Result<()> {
        let stored = self.shards.find(name)?.shape()?;
        ensure!(stored == shape, "tensor {name} has shape {stored:?}, {shape:?} is expected");
        Ok(())
    }

    /// Codes and zeros are there as the layout has them.
    fn check_packed(&self, part: &Part, channels: usize, groups: usize) -> Result<()> {
        let (name, rows) = (&part.name, part.rows);
        ensure!(
            self.shards.contains(&part.tensor("qweight")) || !self.shards.contains(&part.tensor("weight")),
            "{name} is not quantized (modules_to_not_convert): every projection of every layer is expected to be"
        );
        let whole = match self.layout {
            Layout::Awq => 8,
            Layout::Gptq(_) => 32,
        };
        ensure!(rows.is_multiple_of(whole), "{name} has {rows} rows, a multiple of {whole} is expected");
        let (weights, zeros) = match self.layout {
            Layout::Awq => ([channels, rows / 8], [groups, rows / 8]),
            Layout::Gptq(packing) => packing.shapes(channels, groups, rows),
        };
        self.check_words(&part.tensor("qweight"), &weights)?;
        self.check_words(&part.tensor("qzeros"), &zeros)?;
        if let Layout::Gptq(packing) = self.layout {
            let order = self.shards.find(&part.tensor("g_idx")).ok().map(|order| order.words()).transpose()?;
            packing
                .ensure_in_order(order.map(|(_, order)| order), channels, self.group_size)
                .with_context(|| name.clone())?;
        }
        Ok(())
    }

    fn check_words(&self, name: &str, shape: &[usize]) -> Result<()> {
        let (stored, _) = self.shards.find(name)?.words()?;
        ensure!(stored == shape, "tensor {name} has shape {stored:?}, {shape:?} is expected");
        Ok(())
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.shards.find(name)?.read()?.to_f32().into_owned())
    }

    /// The table `[vocab_size, hidden_size]`.
    fn table(&self, name: &str) -> Result<Dense<'_>> {
        let ModelConfig { vocab_size, hidden_size, .. } = self.config;
        let values: Floats<'_> = self.shards.find(name)?.read()?;
        Ok(Dense { in_features: hidden_size, out_features: vocab_size, values })
    }

    /// Codes, scales and zeros of a projection, all `[out_features, …]`, in the order in which they are fused.
    fn weight(&self, layer: usize, projection: Projection) -> Result<Weight<'_>> {
        let (channels, rows) = self.config.shape(layer, projection);
        let groups = channels / self.group_size;
        let (mut codes, mut zeros, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        codes.reserve_exact(rows * channels);
        for part in self.parts(layer, projection) {
            let words = |name| self.shards.find(&part.tensor(name))?.words().map(|(_, words)| words);
            let (qweight, qzeros) = (words("qweight")?, words("qzeros")?);
            match self.layout {
                Layout::Awq => {
                    awq::append(&qweight, part.rows, channels, &mut codes);
                    awq::append(&qzeros, part.rows, groups, &mut zeros);
                }
                Layout::Gptq(packing) => {
                    packing.append_codes(&qweight, part.rows, channels, &mut codes);
                    packing.append_zeros(&qzeros, part.rows, groups, &mut zeros);
                }
            }
            let stored = self.floats(&part.tensor("scales"))?;
            scales.extend(
                (0..part.rows)
                    .flat_map(|row| (0..groups).map(move |g| (g, row)))
                    .map(|(g, row)| stored[g * part.rows + row]),
            );
        }
        let zeros: Vec<f32> = zeros.into_iter().map(f32::from).collect();
        let bits = self.code_bits() as usize;
        Ok(Weight::LutGemm(LutGemm::from_uniform(channels, rows, bits, self.group_size, &codes, &scales, &zeros)?))
    }

    /// The biases of all parts; zeros where only some have one.
    fn bias(&self, layer: usize, projection: Projection) -> Result<Option<Cow<'_, [f32]>>> {
        let parts = self.parts(layer, projection);
        let is_stored = |part: &Part| self.shards.contains(&part.tensor("bias"));
        if !parts.iter().any(is_stored) {
            return Ok(None);
        }
        let mut bias = Vec::new();
        for part in &parts {
            if is_stored(part) {
                bias.extend(self.floats(&part.tensor("bias"))?);
            } else {
                bias.resize(bias.len() + part.rows, 0.0);
            }
        }
        Ok(Some(Cow::Owned(bias)))
    }
}

impl ModelWeights for Grouped {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.table(EMBEDDING)
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        if self.config.tie_word_embeddings { Ok(None) } else { self.table(HEAD).map(Some) }
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.floats(FINAL_NORM)
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.floats(&norm_name(&self.config, layer, norm)?)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let bias = self.bias(layer, projection)?;
        Ok(Linear { bias, ..Linear::plain(self.weight(layer, projection)?) })
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        Some(self.code_bits())
    }
}

/// The layout and the group size, once everything else about the quantization is known to be understood.
fn layout(quantization: &Quantization) -> Result<(Layout, usize)> {
    let layout = match quantization.method.as_str() {
        "awq" => awq::understood(quantization).map(|()| Layout::Awq)?,
        "gptq" => Layout::Gptq(gptq::Packing::understood(quantization)?),
        other => bail!("quant_method is {other:?}, \"awq\" or \"gptq\" is expected"),
    };
    let head = quantization.field(&["lm_head"])?;
    ensure!(head != true, "lm_head is true: a quantized head is not read, one in full precision is expected");
    let group_size = quantization.field(&["group_size", "q_group_size"])?;
    if group_size.is_null() {
        return Ok((layout, 128));
    }
    let size = group_size.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
    let size = size.with_context(|| {
        format!("group_size is {group_size}, a multiple of 32 is expected: quantize it again in groups of channels")
    })?;
    Ok((layout, size))
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
