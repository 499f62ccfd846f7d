//! What a model is: shapes, constants and layers, read from a Hugging Face `config.json`.

pub mod families;
mod fields;
mod layer;
mod preset;
mod rope;
#[cfg(test)]
mod tests;

use std::fmt;

use anyhow::{Result, ensure};
use serde_json::Value;

pub use families::Family;
pub(crate) use fields::{read_json, token_ids};
pub use layer::{
    Activation, Attention, FeedForward, LayerConfig, LayerNorm, Mixer, NormPlacement, Op, QkNorm, QueryScaling, Reads,
    Writes,
};
pub use rope::{Pairing, Rope, RopeScaling};

/// One of the four projections of a decoder layer, as the tuner and the command line name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Query, key and value, fused: rows of q, then k, then v.
    Qkv,
    /// Attention output.
    O,
    /// Gate and up, fused: rows of gate, then up.
    GateUp,
    /// Down.
    Down,
}

impl Projection {
    /// All four, in the order in which the command line and the reports give them.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// `qkv`, `o`, `gu` or `d`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::GateUp => "gu",
            Self::Down => "d",
        }
    }

    /// What `make` makes for each, in the order of [`Projection::ALL`].
    ///
    /// # Errors
    /// The first one of `make`.
    pub fn each<T>(make: impl FnMut(Self) -> Result<T>) -> Result<[T; 4]> {
        let [qkv, o, gate_up, down] = Self::ALL.map(make);
        Ok([qkv?, o?, gate_up?, down?])
    }

    /// Position in [`Projection::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The shapes and constants of one decoder-only model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub family: &'static Family,
    /// The `config.json` that all this was read from; of a multimodal model, the part about text.
    pub json: Value,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// ε of norms as `config.json` says it; norms of the residual stream have [`ModelConfig::stream_eps`].
    pub rms_norm_eps: f32,
    /// The layers, first to last.
    pub layers: Vec<LayerConfig>,
    /// The rotations that layers choose from.
    pub ropes: Vec<Rope>,
    /// The projections that have a bias in every layer.
    pub biased: Vec<Projection>,
    /// What the embedding is multiplied by (Granite, and Gemma, whose `√hidden_size` transformers rounds to the type that
    /// it computes in: here that is f32, whatever the weights are stored in).
    pub embedding_scale: f64,
    /// What layers add to the residual stream is multiplied by this (Granite).
    ///
    /// No operation does it: the stream is kept divided by it, so that the embedding is multiplied by
    /// `embedding_scale / residual_multiplier` and norms of the stream, which take any factor out, have
    /// [`ModelConfig::stream_eps`].
    pub residual_multiplier: f64,
    /// What logits are multiplied by; the last norm's γ takes it in.
    pub logit_scale: f64,
    /// Logits `z` become `cap · tanh(z / cap)`.
    pub logit_softcap: Option<f64>,
    /// The longest context the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token a text starts with, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// An unknown family; a missing or impossible field; something that the decoder lacks.
    pub fn from_json(json: &Value) -> Result<Self> {
        let config = families::read(json)?;
        config.validate()?;
        Ok(config)
    }

    /// The same with some fields of `config.json` changed: `null` takes one out.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn with(&self, changes: Value) -> Result<Self> {
        Self::from_json(&fields::merged(self.json.clone(), &changes))
    }

    /// `(in_features, out_features)` of a projection of one layer.
    pub fn shape(&self, layer: usize, projection: Projection) -> (usize, usize) {
        let layer = &self.layers[layer];
        let attention = layer.attention();
        let attended = attention.num_heads * attention.head_dim;
        match projection {
            Projection::Qkv => (self.hidden_size, attention.qkv_rows()),
            Projection::O => (attended, self.hidden_size),
            Projection::GateUp => (self.hidden_size, 2 * layer.intermediate_size()),
            Projection::Down => (layer.intermediate_size(), self.hidden_size),
        }
    }

    /// The shapes of a layer's projections, in the order of [`Projection::ALL`].
    pub fn shapes(&self, layer: usize) -> [(usize, usize); 4] {
        Projection::ALL.map(|projection| self.shape(layer, projection))
    }

    /// Every projection of every layer, in order.
    pub(crate) fn projections(&self) -> impl Iterator<Item = (usize, Projection)> {
        (0..self.layers.len()).flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
    }

    /// The most rows that a projection has in any layer.
    pub fn widest(&self, projection: Projection) -> usize {
        (0..self.layers.len()).map(|layer| self.shape(layer, projection).1).max().unwrap_or(0)
    }

    /// ε of the norms of the residual stream, which is kept divided by
    /// [`residual_multiplier`](ModelConfig::residual_multiplier).
    pub fn stream_eps(&self) -> f32 {
        (f64::from(self.rms_norm_eps) / self.residual_multiplier.powi(2)) as f32
    }

    /// ε of a norm of a layer; of one that reads the residual stream, [`stream_eps`](ModelConfig::stream_eps).
    pub fn norm_eps(&self, norm: LayerNorm) -> f32 {
        match norm {
            LayerNorm::AttentionInput | LayerNorm::FeedForwardInput => self.stream_eps(),
            _ => self.rms_norm_eps,
        }
    }

    /// What rows of the embedding are multiplied by on their way into the residual stream.
    pub(crate) fn embedding_factor(&self) -> f32 {
        (self.embedding_scale / self.residual_multiplier) as f32
    }

    /// For each of a projection's rows as it is kept, the row as it is stored; `None` where none moves. Only rows of
    /// queries and keys do, within their heads, and biases with them. A source that pairs channels in its own way says
    /// how in `pairing`.
    pub(crate) fn row_order(
        &self,
        layer: usize,
        projection: Projection,
        pairing: Option<Pairing>,
    ) -> Option<Vec<usize>> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *self.layers[layer].attention();
        let head = self.head_order(layer, pairing).filter(|_| projection == Projection::Qkv)?;
        let turning = num_heads + num_kv_heads;
        let values = turning * head_dim..(turning + num_kv_heads) * head_dim;
        Some((0..turning).flat_map(|i| head.iter().map(move |row| i * head_dim + row)).chain(values).collect())
    }

    /// γ of a norm, of a layer or the last, from the numbers that transformers stores: one more where the family
    /// multiplies by `1 + w`, and in the order in which rows of queries and keys are kept.
    pub(crate) fn stored_gamma(&self, norm: Option<(usize, LayerNorm)>, mut stored: Vec<f32>) -> Vec<f32> {
        if self.family.unit_offset {
            stored.iter_mut().for_each(|w| *w += 1.0);
        }
        let order = match norm {
            Some((layer, LayerNorm::Query | LayerNorm::Key)) => self.head_order(layer, None),
            _ => None,
        };
        let Some(head) = order else { return stored };
        stored.chunks_exact(head.len()).flat_map(|gamma| head.iter().map(|&i| gamma[i])).collect()
    }

    /// For each channel of a head of queries or keys as it is kept, the channel as it is stored.
    fn head_order(&self, layer: usize, pairing: Option<Pairing>) -> Option<Vec<usize>> {
        // A source that pairs channels in its own way stores layers that rotate nothing like the others.
        let rope = self.layers[layer].attention().rope.or(pairing.map(|_| 0));
        let rope = self.ropes.get(rope?)?;
        Rope { pairing: pairing.unwrap_or(rope.pairing), ..rope.clone() }.order()
    }

    /// Checks what no single field shows.
    fn validate(&self) -> Result<()> {
        for layer in &self.layers {
            let Attention { num_heads, num_kv_heads, head_dim, window, .. } = *layer.attention();
            ensure!(
                num_heads.is_multiple_of(num_kv_heads),
                "num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            );
            ensure!(head_dim.is_multiple_of(2), "head_dim is {head_dim}, an even number is expected");
            ensure!(window != Some(0), "sliding_window is 0, 1 or more tokens are expected");
        }
        Ok(())
    }
}
