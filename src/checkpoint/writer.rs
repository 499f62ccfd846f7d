//! Writing a checkpoint: layer by layer into a directory beside the target, renamed into place at the end.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::place::{self, Place};
use super::tensors::{self, Named, write_error};
use super::{BITWIDTHS, CONFIG, Checkpoint, FILES, Manifest, file_of};
use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::files;
use crate::format::{Dense, Kind, Numbers, Storage};
use crate::tensors::{EMBEDDING, FINAL_NORM, HEAD, Layout, Shards, Stored, TensorSet, fused_module, norm_name};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights};

/// A checkpoint in the making: `OUT.partial` beside the target `OUT`, which stays as it is until
/// [`CheckpointWriter::finish`]. Finished layers survive an interruption.
#[derive(Debug)]
pub struct CheckpointWriter {
    place: Place,
}

impl CheckpointWriter {
    /// Checks that a checkpoint can be made at `out`, before anything is spent on it.
    ///
    /// # Errors
    /// `out` exists and `overwrite` is false, is something other than a checkpoint, holds what is not of one, or cannot
    /// be replaced because of what it is (the current directory, a mount point).
    pub fn ensure_free(out: &Path, overwrite: bool) -> Result<()> {
        place::ensure_free(out, overwrite)
    }

    /// Starts, or goes on, with a checkpoint at `out`, or where `out` leads if it is a link. `key` says everything that
    /// the result depends on: what an interrupted job with another key left is discarded.
    ///
    /// # Errors
    /// As [`CheckpointWriter::ensure_free`]; another process is at it.
    pub fn create(out: &Path, key: &str, overwrite: bool) -> Result<Self> {
        Ok(Self { place: Place::take(out, key, overwrite)? })
    }

    /// Keeps a file of the job beside the layers, atomically: what makes going on cheaper.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.place.keep(name, bytes)
    }

    /// What [`CheckpointWriter::write_file`] kept under that name; `None` if there is nothing.
    pub fn read_file(&self, name: &str) -> Option<Vec<u8>> {
        self.place.kept(name)
    }

    /// True if this layer is finished at this bit width.
    pub fn has_layer(&self, layer: usize, bits: u32) -> bool {
        self.shard(layer, bits).is_ok()
    }

    /// Keeps a finished layer, atomically: its norms in the order of [`LayerNorm::ALL`], empty where it has none, and its
    /// four projections in the order of [`Projection::ALL`], each with residual and thresholds, or all of them without.
    ///
    /// # Errors
    /// Whatever the disk says; a projection that is not quantized.
    pub fn write_layer(
        &self,
        config: &ModelConfig,
        (layer, bits): (usize, u32),
        norms: &[Vec<f32>; 6],
        linears: &[Linear<'_>; 4],
    ) -> Result<()> {
        let mut list = Vec::new();
        for (norm, values) in LayerNorm::ALL.into_iter().zip(norms).filter(|(_, values)| !values.is_empty()) {
            list.push(Named::list(norm_name(config, layer, norm)?, values));
        }
        for (projection, linear) in Projection::ALL.into_iter().zip(linears) {
            push_linear(&mut list, &fused_module(layer, projection), linear)?;
        }
        let path = self.layer_path(layer, bits);
        let new = path.with_extension("new");
        tensors::write(&new, list)?;
        self.place.name(&new, &path).map_err(|e| write_error(e, &path, 0))
    }

    /// A finished layer, as the checkpoint will hold it.
    ///
    /// # Errors
    /// The layer is not finished at this bit width.
    pub fn layer(&self, layer: usize, bits: u32) -> Result<LayerFile> {
        Ok(LayerFile { layer, bits, tensors: self.shard(layer, bits)? })
    }

    /// Puts the finished layers and the rest of the model together and renames the result to the target.
    /// `bits[layer]` chooses the width of every layer.
    ///
    /// # Errors
    /// A layer that is not finished, or whatever the disk says; the target is as it was then.
    pub fn finish(
        self,
        config: &ModelConfig,
        manifest: &Manifest,
        bits: &[u32],
        rest: &Unquantized<'_>,
        texts: &TextFiles,
    ) -> Result<()> {
        let dir = self.place.result()?;
        let layers =
            bits.iter().enumerate().map(|(layer, &bits)| self.shard(layer, bits)).collect::<Result<Vec<_>>>()?;
        let mut files = [rest.tensors(config), Vec::new(), Vec::new()];
        for layer in &layers {
            for (name, kind, shape) in layer.iter() {
                let file = file_of(&name);
                let numbers = match kind {
                    Kind::Float => Numbers::Floats(layer.floats(&name)?),
                    Kind::I32 | Kind::U32 => Numbers::Words(layer.words(&name)?),
                };
                files[file].push(Named::new(name, kind, &shape, numbers));
            }
        }
        let written = if manifest.has_residuals() { 3 } else { 1 };
        for (name, list) in FILES.into_iter().zip(files).take(written) {
            tensors::write(&dir.join(name), list)?;
        }
        let mut json = config.json.clone();
        json.as_object_mut().map(|fields| fields.remove("quantization_config"));
        json["decdec"] = serde_json::to_value(manifest)?;
        write_json(&dir.join(CONFIG), &json)?;
        if manifest.bits.is_mixed() {
            let map: serde_json::Map<_, _> =
                bits.iter().enumerate().map(|(layer, &bits)| (layer.to_string(), bits.into())).collect();
            write_json(&dir.join(BITWIDTHS), &map.into())?;
        }
        texts.write(&dir)?;
        Checkpoint::open(&dir).context("the finished checkpoint does not pass its own checks")?;
        self.place.put()
    }

    fn shard(&self, layer: usize, bits: u32) -> Result<Shards> {
        Shards::open(&[self.layer_path(layer, bits)])
    }

    fn layer_path(&self, layer: usize, bits: u32) -> PathBuf {
        self.place.file(&format!("layer-{layer:03}-{bits}bit.safetensors"))
    }
}

/// A finished layer of a checkpoint in the making, memory-mapped.
#[derive(Debug)]
pub struct LayerFile {
    layer: usize,
    bits: u32,
    tensors: Shards,
}

impl LayerFile {
    /// Which layer it is.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The norms in the order of [`LayerNorm::ALL`], empty where there is none.
    ///
    /// # Errors
    /// As when a checkpoint is opened.
    pub fn norms(&self, config: &ModelConfig) -> Result<[Vec<f32>; 6]> {
        let mut norms = [const { Vec::new() }; 6];
        for (norm, _) in config.layers[self.layer].norms(config.hidden_size) {
            norms[norm.index()] = self.tensors.floats(&norm_name(config, self.layer, norm)?)?.into_f32().into_owned();
        }
        Ok(norms)
    }

    /// One projection of a layer with residuals, stored as the [`Manifest`] says.
    ///
    /// # Errors
    /// As when a checkpoint is opened.
    pub fn projection(&self, projection: Projection, config: &ModelConfig, storage: Storage) -> Result<Linear<'_>> {
        let (layout, Self { layer, bits, tensors }) = (Layout::of_checkpoint(storage, true), self);
        Stored { set: tensors, config, layout, layer: *layer, projection, bits: *bits }.linear()
    }
}

/// What a checkpoint holds in full precision.
#[derive(Debug)]
pub struct Unquantized<'a> {
    /// `[vocab_size, hidden_size]`
    pub embedding: Dense<'a>,
    /// `[vocab_size, hidden_size]`; `None` when it is the embedding.
    pub head: Option<Dense<'a>>,
    /// γ of the last norm, `[hidden_size]`
    pub final_norm: Vec<f32>,
}

impl<'a> Unquantized<'a> {
    /// What `weights` has beside its projections, as it is.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub fn of(weights: &'a dyn ModelWeights) -> Result<Self> {
        Ok(Self { embedding: weights.embedding()?, head: weights.head()?, final_norm: weights.final_norm()? })
    }

    fn tensors(&self, config: &ModelConfig) -> Vec<Named<'_>> {
        let shape = [config.vocab_size, config.hidden_size];
        let mut list = vec![
            Named::floats(EMBEDDING.into(), &shape, &self.embedding.values),
            Named::list(FINAL_NORM.into(), &self.final_norm),
        ];
        list.extend(self.head.as_ref().map(|head| Named::floats(HEAD.into(), &shape, &head.values)));
        list
    }
}

fn push_linear<'a>(list: &mut Vec<Named<'a>>, prefix: &str, linear: &'a Linear<'_>) -> Result<()> {
    ensure!(linear.weight.format().is_some(), "{prefix} is not quantized");
    ensure!(linear.residual.is_none() || linear.thresholds.is_some(), "{prefix} has no thresholds");
    let size = linear.weight.size();
    let tensors = linear.tensors().into_iter();
    list.extend(tensors.map(|(tensor, numbers)| {
        Named::new(format!("{prefix}.{}", tensor.suffix), tensor.kind, &tensor.shape(&size), numbers)
    }));
    Ok(())
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(json)?;
    files::write(path, &text).map_err(|e| write_error(e, path, text.len()))
}
