//! `config.json` to [`ModelConfig`], in both spellings of RoPE that are about (`rope_theta` beside
//! `rope_scaling`, and `rope_parameters`). What the decoder cannot compute is refused by name.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Architecture, ModelConfig, Projection, RopeScaling};
use crate::files;

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

impl ModelConfig {
    /// Reads the fields of a Hugging Face `config.json`.
    ///
    /// # Errors
    /// A missing or impossible field; an architecture, activation or RoPE type that the decoder lacks.
    pub fn from_json(json: &Value) -> Result<Self> {
        ensure!(json.is_object(), "the configuration is not a JSON object");
        let architecture = architecture(json)?;
        let num_heads = dimension(json, "num_attention_heads")?;
        let hidden_size = dimension(json, "hidden_size")?;
        let num_layers = dimension(json, "num_hidden_layers")?;
        ensure!(num_layers <= MOST_LAYERS, "num_hidden_layers is {num_layers}, 1 to {MOST_LAYERS} is expected");
        let head_dim = match optional_dimension(json, "head_dim")? {
            Some(head_dim) => head_dim,
            None => {
                ensure!(
                    hidden_size.is_multiple_of(num_heads),
                    "hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and there is no head_dim"
                );
                hidden_size / num_heads
            }
        };
        let (rope_theta, rope_scaling) = rope(json)?;
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: dimension(json, "intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads: optional_dimension(json, "num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            vocab_size: dimension(json, "vocab_size")?,
            rms_norm_eps: positive(json, "rms_norm_eps")?.context("rms_norm_eps is missing")? as f32,
            rope_theta,
            rope_scaling,
            sliding_window: sliding_window(json, architecture, num_layers)?,
            max_position_embeddings: dimension(json, "max_position_embeddings")?,
            tie_word_embeddings: boolean(json, "tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: token_ids(json, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(json, "eos_token_id")?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what no single field shows.
    fn validate(&self) -> Result<()> {
        let Self { num_heads, num_kv_heads, head_dim, .. } = self;
        ensure!(
            num_heads.is_multiple_of(*num_kv_heads),
            "num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        );
        ensure!(head_dim.is_multiple_of(2), "head_dim is {head_dim}, an even number is expected");
        Ok(())
    }
}

fn architecture(json: &Value) -> Result<Architecture> {
    let name = text(json, "model_type")?.context("model_type is missing, llama, mistral, phi3 or qwen2 is expected")?;
    let found = Architecture::ALL.into_iter().find(|architecture| architecture.names().0 == name);
    let Some(architecture) = found else {
        bail!("model_type {name:?} is unknown, llama, mistral, phi3 or qwen2 is expected");
    };
    if let Some(classes) = present(json, "architectures") {
        let class = architecture.names().1;
        let listed = classes.as_array().is_some_and(|classes| classes.iter().any(|name| name == class));
        ensure!(listed, "architectures is {classes}, {class} is expected where model_type is {name:?}");
    }
    if let Some(activation) = text(json, "hidden_act")? {
        ensure!(matches!(activation, "silu" | "swish"), "hidden_act {activation:?} is unknown, silu is expected");
    }
    Ok(architecture)
}

/// Where RoPE's constants are: in objects of the newer and the older spelling, either or both.
const ROPE_OBJECTS: [&str; 2] = ["rope_parameters", "rope_scaling"];

/// `(rope_theta, scaling)`. What is said twice must be the same.
fn rope(json: &Value) -> Result<(f64, RopeScaling)> {
    let mut thetas = vec![positive(json, "rope_theta")?];
    let mut scalings = Vec::new();
    for (name, object) in ROPE_OBJECTS.into_iter().filter_map(|name| Some((name, present(json, name)?))) {
        let fields =
            object.as_object().with_context(|| format!("{name} is {object}, an object or null is expected"))?;
        if fields.is_empty() {
            continue;
        }
        thetas.push(positive(object, "rope_theta")?);
        scalings.push(scaling(object).with_context(|| name)?);
    }
    let thetas: Vec<f64> = thetas.into_iter().flatten().collect();
    let theta = thetas.first().copied().unwrap_or(10_000.0);
    if let Some(other) = thetas.iter().find(|&&other| other != theta) {
        bail!("rope_theta is {theta} in one place and {other} in another, leave one out");
    }
    if let [one, other] = &scalings[..] {
        ensure!(one == other, "rope_parameters is {one:?}, but rope_scaling is {other:?}, leave one out");
    }
    let rotated = positive(json, "partial_rotary_factor")?.unwrap_or(1.0);
    ensure!(rotated == 1.0, "partial_rotary_factor is {rotated}, only 1 is supported");
    Ok((theta, scalings.into_iter().next().unwrap_or(RopeScaling::None)))
}

/// What may stand in such an object. Others change what a type computes, or belong to types that are refused.
const ROPE_KEYS: [&str; 9] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "finetuned",
];

/// How one object says that frequencies are scaled.
fn scaling(object: &Value) -> Result<RopeScaling> {
    let rotated = positive(object, "partial_rotary_factor")?.unwrap_or(1.0);
    ensure!(rotated == 1.0, "partial_rotary_factor is {rotated}, only 1 is supported");
    let number = |key: &str| positive(object, key)?.with_context(|| format!("the RoPE scaling has no {key}"));
    let kind = rope_type(object)?;
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => match number("factor")? {
            1.0 => RopeScaling::None,
            factor => RopeScaling::Linear { factor },
        },
        "llama3" => {
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            ensure!(low < high, "low_freq_factor {low} is not below high_freq_factor {high}");
            RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            }
        }
        other => bail!("RoPE type {other:?} is unknown, default, linear or llama3 is expected"),
    };
    let fields = object.as_object().into_iter().flatten();
    let mut unknown = fields.filter(|(key, value)| !value.is_null() && !ROPE_KEYS.contains(&key.as_str()));
    if let Some((key, value)) = unknown.next() {
        bail!("{key} is {value}, which is not known for the RoPE type {kind:?}: leave it out if it changes nothing");
    }
    Ok(scaling)
}

/// The type of scaling, under the newer name or the older one. Versions of transformers differ in which of them counts.
fn rope_type(object: &Value) -> Result<&str> {
    let plain = |key: &String| matches!(key.as_str(), "rope_theta" | "partial_rotary_factor");
    match (text(object, "rope_type")?, text(object, "type")?) {
        (Some(new), Some(old)) if new != old => {
            bail!("rope_type is {new:?}, but type is {old:?}, leave one out")
        }
        (Some(kind), _) | (None, Some(kind)) => Ok(kind),
        (None, None) if object.as_object().is_some_and(|object| object.keys().all(plain)) => Ok("default"),
        (None, None) => bail!("the RoPE scaling {object} has no rope_type, default, linear or llama3 is expected"),
    }
}

/// Whether the class of the model has a bias in `projection`. GGUF does not say.
pub(crate) fn is_biased(json: &Value, architecture: Architecture, projection: Projection) -> Result<bool> {
    let key = match (architecture, projection) {
        (Architecture::Qwen2, _) => return Ok(projection == Projection::Qkv),
        (Architecture::Mistral | Architecture::Phi3, _) => return Ok(false),
        (Architecture::Llama, Projection::Qkv | Projection::O) => "attention_bias",
        (Architecture::Llama, Projection::GateUp | Projection::Down) => "mlp_bias",
    };
    Ok(boolean(json, key)?.unwrap_or(false))
}

/// One window for all layers, or none: the decoder has no layers of different reach.
fn sliding_window(json: &Value, architecture: Architecture, num_layers: usize) -> Result<Option<usize>> {
    let window = match architecture {
        Architecture::Llama => None,
        Architecture::Qwen2 if !boolean(json, "use_sliding_window")?.unwrap_or(false) => None,
        _ => optional_dimension(json, "sliding_window")?,
    };
    let sliding = match present(json, "layer_types") {
        Some(types) => {
            let types = types.as_array().with_context(|| format!("layer_types is {types}, a list is expected"))?;
            types.iter().filter(|t| *t == "sliding_attention").count()
        }
        // Qwen2 counts the other way round: its first `max_window_layers` layers see everything.
        None if architecture == Architecture::Qwen2 && window.is_some() => {
            let full = integer(json, "max_window_layers")?.context("max_window_layers is missing")?;
            num_layers - num_layers.min(full as usize)
        }
        None => num_layers,
    };
    match window {
        Some(_) if sliding == 0 => Ok(None),
        Some(_) if sliding != num_layers => {
            bail!("a sliding window in {sliding} of {num_layers} layers is not supported, all or none is expected")
        }
        window => Ok(window),
    }
}

/// The value of `key`; none when it is null or missing.
fn present<'a>(json: &'a Value, key: &str) -> Option<&'a Value> {
    json.get(key).filter(|v| !v.is_null())
}

fn text<'a>(json: &'a Value, key: &str) -> Result<Option<&'a str>> {
    present(json, key).map(|v| v.as_str().with_context(|| format!("{key} is {v}, a string is expected"))).transpose()
}

fn boolean(json: &Value, key: &str) -> Result<Option<bool>> {
    present(json, key)
        .map(|v| v.as_bool().with_context(|| format!("{key} is {v}, true or false is expected")))
        .transpose()
}

fn integer(json: &Value, key: &str) -> Result<Option<u64>> {
    present(json, key)
        .map(|v| v.as_u64().with_context(|| format!("{key} is {v}, a whole number is expected")))
        .transpose()
}

fn positive(json: &Value, key: &str) -> Result<Option<f64>> {
    let Some(value) = present(json, key) else { return Ok(None) };
    let number = value.as_f64().filter(|n| *n > 0.0);
    number.map(Some).with_context(|| format!("{key} is {value}, a number above 0 is expected"))
}

fn optional_dimension(json: &Value, key: &str) -> Result<Option<usize>> {
    let Some(n) = integer(json, key)? else { return Ok(None) };
    ensure!((1..=LARGEST).contains(&n), "{key} is {n}, 1 to {LARGEST} is expected");
    Ok(Some(n as usize))
}

fn dimension(json: &Value, key: &str) -> Result<usize> {
    optional_dimension(json, key)?.with_context(|| format!("{key} is missing"))
}

/// One id, a list of them, or none.
pub(crate) fn token_ids(json: &Value, key: &str) -> Result<Vec<u32>> {
    let Some(value) = present(json, key) else { return Ok(Vec::new()) };
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    list.iter().map(id).collect::<Option<_>>().with_context(|| format!("{key} is {value}, token ids are expected"))
}

#[cfg(test)]
mod tests;
