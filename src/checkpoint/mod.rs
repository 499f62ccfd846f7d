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
//! Tensors are named `model.layers.N.self_attn.qkv_proj` (`o_proj`, `mlp.gate_up_proj`, `mlp.down_proj`) with the
//! suffixes, types and shapes that [`Format::tensors`](crate::format::Format::tensors) describes:
//! `.qweight` I32 `[bits, out, in/32]` and `.lut` F16 `[out, 2^bits]` (AnyPrec), or `.binary` I32
//! `[in/32, bits, out]`, `.alpha` F16 `[in/group, bits, out]` and `.q_bias` F16 `[in/group, out]` (LUT-GEMM);
//! `.bias` F32 `[out]` where there is one; `.residual` U32 `[in, out/8]`, `.scales` F16 `[out]`; `.thresholds`
//! F32 `[in]`.

mod manifest;
mod place;
mod tensors;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::config::{ModelConfig, Projection, read_json};
use crate::tensors::{Layout, Shards, StoredModel, is_stored_model};
use crate::tokenizer::TextFiles;
use crate::weights::ModelWeights;

pub use manifest::{BitWidth, FORMAT_VERSION, Manifest};
pub use writer::{CheckpointWriter, LayerFile, Unquantized};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const RESIDUALS: &str = "residuals.safetensors";
const THRESHOLDS: &str = "thresholds.safetensors";
/// What tensors are in.
const FILES: [&str; 3] = [MODEL, RESIDUALS, THRESHOLDS];
const BITWIDTHS: &str = "bitwidth_map.json";

/// A quantized model on disk, memory-mapped.
#[derive(Debug)]
pub struct Checkpoint {
    model: StoredModel,
    manifest: Manifest,
}

is_stored_model!(Checkpoint, model);

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
        let mut json = read_json(&path)?;
        let in_config = || format!("in {}", path.display());
        let manifest = Manifest::from_config(&json).with_context(in_config)?;
        // What is left is the model's own.
        json.as_object_mut().map(|fields| fields.remove("decdec"));
        let config = ModelConfig::from_json(&json).with_context(in_config)?;
        let bits = layer_bits(dir, &manifest, config.layers.len())?;
        let count = if manifest.has_residuals() { FILES.len() } else { 1 };
        let files: Vec<_> = FILES[..count].iter().map(|name| dir.join(name)).collect();
        let shards = Shards::open_own(&files, file_of)?;
        let model = StoredModel {
            tensors: Box::new(shards),
            config,
            texts: TextFiles::read(dir)?,
            layout: Layout::of_checkpoint(manifest.storage(), manifest.has_residuals()),
            bits,
        };
        let checkpoint = Self { model, manifest };
        checkpoint.validate().with_context(|| format!("{} is not usable", dir.display()))?;
        Ok(checkpoint)
    }

    /// How it was made.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Names, shapes, types, and that the small numbers are finite; tables are looked through when they are used.
    fn validate(&self) -> Result<()> {
        self.check(|_| None)?;
        self.final_norm()?;
        for layer in 0..self.config().layers.len() {
            (self as &dyn ModelWeights).norms(layer)?;
            Projection::ALL.into_iter().try_for_each(|projection| self.projection(layer, projection).map(drop))?;
        }
        Ok(())
    }
}

/// The index in [`FILES`] of the file that a tensor belongs into.
fn file_of(tensor: &str) -> usize {
    match tensor.rsplit('.').next() {
        Some("residual" | "scales") => 1,
        Some("thresholds") => 2,
        _ => 0,
    }
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
