//! A model in files: one implementation of [`ModelWeights`] for all that can be opened.

use std::ops::Deref;

use anyhow::Result;
use serde_json::Value;

use super::{Expected, Layout, Stored, TensorSet};
use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::format::{Dense, Format, Kind};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights};

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const FINAL_NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// The tensor of one of a layer's norms.
///
/// # Errors
/// A norm that the family does not have.
pub(crate) fn norm_name(config: &ModelConfig, layer: usize, norm: LayerNorm) -> Result<String> {
    Ok(format!("model.layers.{layer}.{}.weight", config.family.norm(norm)?))
}

/// A model in files, memory-mapped: its tensors are read when they are asked for.
#[derive(Debug)]
pub struct StoredModel {
    pub(crate) tensors: Box<dyn TensorSet>,
    pub(crate) config: ModelConfig,
    pub(crate) texts: TextFiles,
    pub(crate) layout: Layout,
    /// Bits of a code in every layer; empty in full precision.
    pub(crate) bits: Vec<u32>,
}

/// Makes a type that has a stored model in its field one.
macro_rules! is_stored_model {
    ($name:ident, $field:tt) => {
        impl std::ops::Deref for $name {
            type Target = StoredModel;

            fn deref(&self) -> &StoredModel {
                &self.$field
            }
        }
    };
}
pub(crate) use is_stored_model;

impl StoredModel {
    /// The configuration in Hugging Face's spelling (made from the metadata of a GGUF).
    pub fn config_json(&self) -> &Value {
        &self.config.json
    }

    /// Tokenizer, chat template, special tokens.
    pub fn texts(&self) -> &TextFiles {
        &self.texts
    }

    /// How the codes are packed; `None` for full precision.
    pub fn format(&self) -> Option<Format> {
        self.layout.format
    }

    /// Channels of a group, where all projections have the same.
    pub fn group_size(&self) -> Option<usize> {
        self.layout.group_size
    }

    /// Bits of every layer, `[num_layers]`; they differ in mixed precision. Empty in full precision.
    pub fn layer_bits(&self) -> &[u32] {
        &self.bits
    }

    /// True if there are residuals and thresholds for every projection.
    pub fn has_residuals(&self) -> bool {
        self.layout.compensated
    }

    /// Checks that every tensor that the decoder needs is there, in the right shape and a type that can be read.
    /// `biased` tells whether a projection's bias has to be there, or must not.
    pub(crate) fn check(&self, biased: impl Fn(Projection) -> Option<bool>) -> Result<()> {
        let ModelConfig { vocab_size, hidden_size, .. } = self.config;
        let floats = |name: String, shape: &[usize]| Expected { name, shape: shape.to_vec(), kind: Kind::Float };
        let mut all =
            vec![floats(EMBEDDING.into(), &[vocab_size, hidden_size]), floats(FINAL_NORM.into(), &[hidden_size])];
        if !self.config.tie_word_embeddings {
            all.push(floats(HEAD.into(), &[vocab_size, hidden_size]));
        }
        for layer in 0..self.config.layers.len() {
            for (norm, len) in self.config.layers[layer].norms(hidden_size) {
                all.push(floats(norm_name(&self.config, layer, norm)?, &[len]));
            }
            for projection in Projection::ALL {
                all.extend(self.stored(layer, projection).expected(biased(projection))?);
            }
        }
        self.tensors.check_all(&all)
    }

    fn stored(&self, layer: usize, projection: Projection) -> Stored<'_, '_> {
        let Self { tensors, config, layout, bits, .. } = self;
        let bits = bits.get(layer).copied().unwrap_or(0);
        Stored { set: tensors.as_ref(), config, layout: *layout, layer, projection, bits }
    }

    fn table(&self, name: &str) -> Result<Dense<'_>> {
        let ModelConfig { vocab_size, hidden_size, .. } = self.config;
        Ok(Dense { in_features: hidden_size, out_features: vocab_size, values: self.tensors.floats(name)? })
    }

    /// γ of a norm, of a layer or the last.
    fn gamma(&self, name: &str, norm: Option<(usize, LayerNorm)>) -> Result<Vec<f32>> {
        let stored = self.tensors.floats(name)?.into_f32().into_owned();
        let as_is = self.layout.own || self.tensors.has_gammas();
        Ok(if as_is { stored } else { self.config.stored_gamma(norm, stored) })
    }
}

/// Whoever opens files checks them in his own way; what they hold is read in this one.
impl<T: Deref<Target = StoredModel> + Sync> ModelWeights for T {
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
        self.gamma(FINAL_NORM, None)
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.gamma(&norm_name(&self.config, layer, norm)?, Some((layer, norm)))
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        self.stored(layer, projection).linear()
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        self.bits.get(layer).copied()
    }
}
