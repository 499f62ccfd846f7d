//! The fields of a `config.json`, each checked as it is read.

mod rope;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Activation, Attention, Family, FeedForward, LayerConfig, ModelConfig, Projection, Rope};
use crate::files;

pub(super) use rope::{Kind, RopeRules};

/// No dimension of a model is larger; products of two of them fit 64 bits.
const LARGEST: u64 = 1 << 24;

/// No model has more layers; those of 405 billion weights have 126.
const MOST_LAYERS: usize = 1 << 12;

/// Bytes of a JSON file about a model; the index of a large one has 100,000. Parsed, they take up to 16 times as
/// much.
const MAX_JSON: u64 = 1 << 20;

/// Reads a JSON file about a model, of bounded size.
///
/// # Errors
/// A file that cannot be read, is too large, or is no JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = files::read(path, MAX_JSON).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not valid JSON", path.display()))
}

/// `json` with the fields of the object `changes` in place of its own.
pub(super) fn merged(mut json: Value, changes: &Value) -> Value {
    for (key, value) in changes.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

/// A `config.json`, or an object in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a> {
    json: &'a Value,
}

impl<'a> Fields<'a> {
    pub(super) fn new(json: &'a Value) -> Self {
        Self { json }
    }

    /// The value of `key`; none when it is null or missing.
    pub(super) fn present(self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// A field that `read` makes something of; `wanted` says what is expected.
    fn read<T>(self, key: &str, wanted: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        read(value).map(Some).with_context(|| format!("{key} is {value}, {wanted} is expected"))
    }

    pub(super) fn text(self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    pub(super) fn boolean(self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn integer(self, key: &str) -> Result<Option<u64>> {
        self.read(key, "a whole number", Value::as_u64)
    }

    pub(super) fn positive(self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number above 0", |value| value.as_f64().filter(|n| *n > 0.0))
    }

    pub(super) fn not_negative(self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number of 0 or more", |value| value.as_f64().filter(|n| *n >= 0.0))
    }

    pub(super) fn optional_dimension(self, key: &str) -> Result<Option<usize>> {
        let Some(n) = self.integer(key)? else { return Ok(None) };
        ensure!((1..=LARGEST).contains(&n), "{key} is {n}, 1 to {LARGEST} is expected");
        Ok(Some(n as usize))
    }

    pub(super) fn dimension(self, key: &str) -> Result<usize> {
        self.optional_dimension(key)?.with_context(|| format!("{key} is missing"))
    }

    /// How many layers there are.
    pub(super) fn num_layers(self) -> Result<usize> {
        let layers = self.dimension("num_hidden_layers")?;
        ensure!(layers <= MOST_LAYERS, "num_hidden_layers is {layers}, 1 to {MOST_LAYERS} is expected");
        Ok(layers)
    }

    /// Width of a head; where it is not said, that of `hidden_size` divided among the heads.
    pub(super) fn head_dim(self) -> Result<usize> {
        if let Some(head_dim) = self.optional_dimension("head_dim")? {
            return Ok(head_dim);
        }
        let (hidden, heads) = (self.dimension("hidden_size")?, self.dimension("num_attention_heads")?);
        ensure!(
            hidden.is_multiple_of(heads),
            "hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
        );
        Ok(hidden / heads)
    }

    /// Attention as Llama has it: all tokens, one rotation, scores divided by the root of `head_dim`.
    pub(super) fn attention(self, head_dim: usize) -> Result<Attention> {
        let num_heads = self.dimension("num_attention_heads")?;
        Ok(Attention {
            num_heads,
            num_kv_heads: self.optional_dimension("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            rope: Some(0),
            window: None,
            qk_norm: None,
            scale: (head_dim as f64).powf(-0.5),
            softcap: None,
            query_scaling: None,
        })
    }

    /// Which layers slide a window over the text: as `layer_types` says, or as `otherwise` does where there is none.
    pub(super) fn sliding(self, layers: usize, otherwise: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let slides = |value: &Value| match value.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => bail!("layer_types has {value}, \"full_attention\" or \"sliding_attention\" is expected"),
        };
        Ok(self.of_layers("layer_types", layers, slides)?.unwrap_or_else(|| (0..layers).map(otherwise).collect()))
    }

    /// A list with one entry for each of `layers`, each read by `entry`; none where `key` is null or missing.
    pub(super) fn of_layers<T>(
        self,
        key: &str,
        layers: usize,
        entry: impl Fn(&Value) -> Result<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(list) = self.present(key) else { return Ok(None) };
        let entries = list.as_array().with_context(|| format!("{key} is {list}, a list is expected"))?;
        let count = entries.len();
        ensure!(count == layers, "{key} has {count} entries, as many as num_hidden_layers, {layers}, are expected");
        entries.iter().map(entry).collect::<Result<_>>().map(Some)
    }

    /// A feed-forward part of `intermediate_size`, gated through `expected`, which `key` has to name if it is there.
    pub(super) fn dense(self, key: &str, expected: Activation) -> Result<FeedForward> {
        let (names, name): (&[&str], _) = match expected {
            Activation::Silu => (&["silu", "swish"], "silu"),
            Activation::GeluTanh => (&["gelu_pytorch_tanh"], "gelu_pytorch_tanh"),
        };
        if let Some(found) = self.text(key)? {
            ensure!(names.contains(&found), "{key} {found:?} is unknown, {name} is expected");
        }
        Ok(FeedForward::Dense { intermediate_size: self.dimension("intermediate_size")?, activation: expected })
    }

    /// The projections that have a bias: these if `key` is true, none otherwise.
    pub(super) fn biased(self, key: &str, projections: &[Projection]) -> Result<Vec<Projection>> {
        Ok(if self.boolean(key)?.unwrap_or(false) { projections.to_vec() } else { Vec::new() })
    }

    /// Refuses attention that looks ahead, as Gemma's classes call it.
    pub(super) fn ensure_not_bidirectional(self) -> Result<()> {
        let ahead = self.boolean("use_bidirectional_attention")?.unwrap_or(false);
        ensure!(!ahead, "use_bidirectional_attention is true, only false is supported: tokens see none after them");
        Ok(())
    }

    /// Refuses it as transformers takes it of any class: `is_causal`, where null counts as false.
    fn ensure_is_causal(self) -> Result<()> {
        let Some(causal) = self.json.get("is_causal") else { return Ok(()) };
        ensure!(*causal == true, "is_causal is {causal}, only true is supported: tokens see none after them");
        Ok(())
    }

    /// The longest text that a model with these rotations is meant for. YaRN's recipes often leave
    /// `max_position_embeddings` at what it was before frequencies were stretched.
    fn context(self, ropes: &[Rope]) -> Result<usize> {
        let said = self.dimension("max_position_embeddings")?;
        let stretched = ropes.iter().filter_map(rope::stretched).fold(0.0, f64::max);
        ensure!(
            stretched <= LARGEST as f64,
            "factor times original_max_position_embeddings is {stretched}, {LARGEST} tokens at most are expected"
        );
        Ok(said.max(stretched as usize))
    }

    /// A model of these layers; what a family does differently it changes afterwards.
    pub(super) fn model(
        self,
        family: &'static Family,
        layers: Vec<LayerConfig>,
        ropes: Vec<Rope>,
    ) -> Result<ModelConfig> {
        self.ensure_is_causal()?;
        Ok(ModelConfig {
            family,
            json: Value::Null,
            hidden_size: self.dimension("hidden_size")?,
            vocab_size: self.dimension("vocab_size")?,
            rms_norm_eps: self.positive("rms_norm_eps")?.context("rms_norm_eps is missing")? as f32,
            max_position_embeddings: self.context(&ropes)?,
            layers,
            ropes,
            biased: Vec::new(),
            embedding_scale: 1.0,
            residual_multiplier: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            tie_word_embeddings: self.boolean("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: token_ids(self.json, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(self.json, "eos_token_id")?,
        })
    }
}

/// One id, a list of them, or none.
pub(crate) fn token_ids(json: &Value, key: &str) -> Result<Vec<u32>> {
    let Some(value) = Fields::new(json).present(key) else { return Ok(Vec::new()) };
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    list.iter().map(id).collect::<Option<_>>().with_context(|| format!("{key} is {value}, token ids are expected"))
}
