//! Our own directory (spec §2.5): open, validate, memory-map, write.
//!
//! | file | holds |
//! |---|---|
//! | `config.json` | the Hugging Face fields and one object `decdec`, the [`Manifest`] |
//! | `model.safetensors` | embedding, head, norms, biases; codes and codebooks of the four fused projections |
//! | `residuals.safetensors` | what quantization lost, 4 bits, one scale per row; absent where the manifest has 0 bits |
//! | `thresholds.safetensors` | calibrated boundaries of `\|x\|` for bucket selection; absent likewise |
//! | `bitwidth_map.json` | `{layer: bits}`, where layers differ |
//! | `tokenizer.json` and its companions | how text becomes tokens |
//!
//! Tensors are named `model.layers.N.self_attn.qkv_proj` (`o_proj`, `mlp.gate_up_proj`, `mlp.down_proj`) with
//! the suffixes `.qweight` I32 `[bits, out, in/32]` and `.lut` F16 `[out, 2^bits]` (AnyPrec), or `.binary` I32
//! `[in/32, bits, out]`, `.alpha` F16 `[in/group, bits, out]` and `.q_bias` F16 `[in/group, out]` (LUT-GEMM);
//! `.bias` F32 `[out]` where there is one; `.residual` U32 `[in, out/8]`, `.scales` F16 `[out]`; `.thresholds`
//! F32 `[in]`.

mod manifest;
mod place;
mod tensors;
mod writer;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::Dtype;

use crate::config::{LayerNorm, ModelConfig, Projection, read_json};
use crate::format::{AnyPrec, Dense, Floats, LutGemm, Residual, threshold};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights, Weight};

pub use manifest::{BitWidth, FORMAT_VERSION, Manifest, WeightFormat};
use tensors::Tensors;
pub(crate) use tensors::header;
pub use writer::{CheckpointWriter, LayerFile, Unquantized};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const RESIDUALS: &str = "residuals.safetensors";
const THRESHOLDS: &str = "thresholds.safetensors";
const BITWIDTHS: &str = "bitwidth_map.json";

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "model.norm.weight";

/// A quantized model on disk, memory-mapped.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    manifest: Manifest,
    texts: TextFiles,
    bits: Vec<u32>, // of every layer
    model: Tensors,
    compensation: Option<[Tensors; 2]>, // residuals, thresholds
}

impl Checkpoint {
    /// True if `dir` holds a decdec checkpoint, of whatever version and in whatever state.
    pub fn is_at(dir: &Path) -> bool {
        read_json(&dir.join(CONFIG)).is_ok_and(|v| v.get("decdec").is_some())
    }

    /// Opens a directory and checks every name, shape and type in it.
    ///
    /// # Errors
    /// The first file or tensor that is missing, cut short, or not what `config.json` promises.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let json = read_json(&path)?;
        let in_config = || format!("in {}", path.display());
        let config = ModelConfig::from_json(&json).with_context(in_config)?;
        let manifest = Manifest::from_config(&json).with_context(in_config)?;
        let bits = layer_bits(dir, &manifest, config.layers.len())?;
        let open = |name| Tensors::open(&dir.join(name));
        let model = open(MODEL)?;
        let compensation = if manifest.has_residuals() { Some([open(RESIDUALS)?, open(THRESHOLDS)?]) } else { None };
        let texts = TextFiles::read(dir)?;
        let checkpoint = Self { config, manifest, bits, model, compensation, texts };
        checkpoint.validate().with_context(|| format!("{} is not usable", dir.display()))?;
        Ok(checkpoint)
    }

    /// How it was made.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Tokenizer, chat template, special tokens.
    pub fn texts(&self) -> &TextFiles {
        &self.texts
    }

    /// Names, shapes, types, and that the small numbers are finite; tables are looked through when they are used.
    fn validate(&self) -> Result<()> {
        self.table(EMBEDDING)?;
        if !self.config.tie_word_embeddings {
            self.table(HEAD)?;
        }
        self.final_norm()?;
        for layer in 0..self.config.layers.len() {
            for (norm, _) in self.config.layers[layer].norms(self.config.hidden_size) {
                self.norm(layer, norm)?;
            }
            for projection in Projection::ALL {
                let linear = self.projection(layer, projection)?;
                if let Some(thresholds) = &linear.thresholds {
                    threshold::validate(thresholds, linear.weight.in_features())
                        .with_context(|| prefix(layer, projection))?;
                }
            }
        }
        Ok(())
    }

    fn table(&self, name: &str) -> Result<Dense<'_>> {
        let (out_features, in_features) = (self.config.vocab_size, self.config.hidden_size);
        Ok(Dense { in_features, out_features, values: self.model.floats(name, &[out_features, in_features])? })
    }

    fn finite_table(&self, name: &str) -> Result<Dense<'_>> {
        let table = self.table(name)?;
        table.values.ensure_tensor_is_finite(name, &[table.out_features, table.in_features])?;
        Ok(table)
    }
}

impl ModelWeights for Checkpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.finite_table(EMBEDDING)
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        if self.config.tie_word_embeddings { Ok(None) } else { self.finite_table(HEAD).map(Some) }
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(finite_f32(&self.model, FINAL_NORM, self.config.hidden_size)?.to_vec())
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        read_norm(&self.model, layer, &self.config, norm)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let compensation = self.compensation.as_ref().map(|[residuals, thresholds]| [residuals, thresholds]);
        let stored = Stored { model: &self.model, compensation };
        stored.linear(layer, projection, &self.config, self.manifest.group_size, self.bits[layer])
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        Some(self.bits[layer])
    }
}

/// Where the tensors of a projection are; one file for all three while a checkpoint is in the making.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored<'a> {
    model: &'a Tensors,
    compensation: Option<[&'a Tensors; 2]>, // residuals, thresholds
}

impl<'a> Stored<'a> {
    fn linear(
        self,
        layer: usize,
        projection: Projection,
        config: &ModelConfig,
        group_size: Option<usize>, // only LUT-GEMM has groups
        bits: u32,
    ) -> Result<Linear<'a>> {
        let (inputs, outputs) = config.shape(layer, projection);
        let name = |suffix: &str| format!("{}.{suffix}", prefix(layer, projection));
        let words = |suffix: &str, shape: &[usize]| self.model.words(&name(suffix), Dtype::I32, shape);
        let floats = |suffix: &str, shape: &[usize]| finite(self.model, &name(suffix), shape);
        let in_projection = || prefix(layer, projection);
        let bits = bits as usize;
        let weight = match group_size {
            None => {
                let planes = Cow::Borrowed(words("qweight", &[bits, outputs, inputs / 32])?);
                let lut = floats("lut", &[outputs, 1 << bits])?;
                Weight::AnyPrec(AnyPrec::new(inputs, outputs, bits, planes, lut).with_context(in_projection)?)
            }
            Some(group) => {
                crate::format::lutgemm::ensure_group_size(inputs, group)?;
                let binary = Cow::Borrowed(words("binary", &[inputs / 32, bits, outputs])?);
                let alpha = floats("alpha", &[inputs / group, bits, outputs])?;
                let q_bias = floats("q_bias", &[inputs / group, outputs])?;
                let weight = LutGemm::new(inputs, outputs, bits, group, binary, alpha, q_bias);
                Weight::LutGemm(weight.with_context(in_projection)?)
            }
        };
        let bias = match self.model.contains(&name("bias")) {
            true => Some(Cow::Borrowed(finite_f32(self.model, &name("bias"), outputs)?)),
            false => None,
        };
        let Some([residuals, thresholds]) = self.compensation else {
            return Ok(Linear { bias, ..Linear::plain(weight) });
        };
        let words = residuals.words(&name("residual"), Dtype::U32, &[inputs, outputs / 8])?;
        let scales = finite(residuals, &name("scales"), &[outputs])?;
        let residual = Residual::new(inputs, outputs, Cow::Borrowed(words), scales).with_context(in_projection)?;
        let thresholds = Some(Cow::Borrowed(thresholds.f32(&name("thresholds"), &[inputs])?));
        Ok(Linear { weight, bias, residual: Some(residual), thresholds })
    }
}

fn read_norm(model: &Tensors, layer: usize, config: &ModelConfig, norm: LayerNorm) -> Result<Vec<f32>> {
    let len = config.layers[layer].norm_len(norm, config.hidden_size);
    Ok(finite_f32(model, &norm_name(config, layer, norm)?, len)?.to_vec())
}

fn norm_name(config: &ModelConfig, layer: usize, norm: LayerNorm) -> Result<String> {
    Ok(format!("{}.{}.weight", layer_prefix(layer), config.family.norm(norm)?))
}

/// Numbers in whatever type they are stored, all of them finite.
fn finite<'a>(tensors: &'a Tensors, name: &str, shape: &[usize]) -> Result<Floats<'a>> {
    let values = tensors.floats(name, shape)?;
    values.ensure_tensor_is_finite(name, shape)?;
    Ok(values)
}

/// `len` single-precision numbers, all of them finite.
fn finite_f32<'a>(tensors: &'a Tensors, name: &str, len: usize) -> Result<&'a [f32]> {
    let values = tensors.f32(name, &[len])?;
    Floats::F32(Cow::Borrowed(values)).ensure_tensor_is_finite(name, &[len])?;
    Ok(values)
}

fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}")
}

fn prefix(layer: usize, projection: Projection) -> String {
    let module = match projection {
        Projection::Qkv => "self_attn.qkv_proj",
        Projection::O => "self_attn.o_proj",
        Projection::GateUp => "mlp.gate_up_proj",
        Projection::Down => "mlp.down_proj",
    };
    format!("{}.{module}", layer_prefix(layer))
}

/// Bits of every layer: all the same, or as `bitwidth_map.json` says.
fn layer_bits(dir: &Path, manifest: &Manifest, layers: usize) -> Result<Vec<u32>> {
    if !manifest.bits.is_mixed() {
        return Ok(vec![manifest.bits.low(); layers]);
    }
    let path = dir.join(BITWIDTHS);
    let in_map = || format!("in {}", path.display());
    let map: BTreeMap<String, u32> = serde_json::from_value(read_json(&path)?).with_context(in_map)?;
    ensure!(map.len() == layers, "{}: {} layers, the model has {layers}", path.display(), map.len());
    let (low, high) = (manifest.bits.low(), manifest.bits.high());
    (0..layers)
        .map(|layer| match map.get(&layer.to_string()) {
            Some(&bits) if bits == low || bits == high => Ok(bits),
            Some(bits) => bail!("layer {layer} has {bits} bits, {low} or {high} are expected"),
            None => bail!("layer {layer} is missing"),
        })
        .collect::<Result<_>>()
        .with_context(in_map)
}
