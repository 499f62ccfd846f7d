//! `config.json` to [`ModelConfig`], in both spellings of RoPE that are about (`rope_theta` beside
//! `rope_scaling`, and `rope_parameters`). What the decoder cannot compute is refused by name.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Architecture, ModelConfig, RopeScaling};

/// No dimension of a model is larger; products of two of them fit 64 bits.
const LARGEST: u64 = 1 << 24;

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
    let architecture = match name {
        "llama" => Architecture::Llama,
        "mistral" => Architecture::Mistral,
        "phi3" => Architecture::Phi3,
        "qwen2" => Architecture::Qwen2,
        other => bail!("model_type {other:?} is unknown, llama, mistral, phi3 or qwen2 is expected"),
    };
    if let Some(activation) = text(json, "hidden_act")? {
        ensure!(matches!(activation, "silu" | "swish"), "hidden_act {activation:?} is unknown, silu is expected");
    }
    Ok(architecture)
}

/// `(rope_theta, scaling)`.
fn rope(json: &Value) -> Result<(f64, RopeScaling)> {
    let nothing = Value::Null;
    let parameters = present(json, "rope_parameters");
    let scaling = parameters.or(present(json, "rope_scaling")).unwrap_or(&nothing);
    ensure!(scaling.is_null() || scaling.is_object(), "rope_scaling is {scaling}, an object or null is expected");

    let theta = positive(scaling, "rope_theta")?.or(positive(json, "rope_theta")?).unwrap_or(10_000.0);
    for object in [json, scaling] {
        let rotated = positive(object, "partial_rotary_factor")?.unwrap_or(1.0);
        ensure!(rotated == 1.0, "partial_rotary_factor is {rotated}, only 1 is supported");
    }
    let number = |key: &str| positive(scaling, key)?.with_context(|| format!("the RoPE scaling has no {key}"));
    let kind = match text(scaling, "rope_type")?.or(text(scaling, "type")?) {
        Some(kind) => kind,
        None if scaling.is_null() => "default",
        None => bail!("the RoPE scaling {scaling} has no rope_type, default, linear or llama3 is expected"),
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
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
    Ok((theta, scaling))
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
mod tests {
    use serde_json::{Value, json};

    use crate::config::{Architecture, ModelConfig, RopeScaling};

    /// A small configuration with some fields changed; "absent" takes one out.
    fn with(changes: Value) -> Value {
        let mut json = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 128, "hidden_act": "silu",
        });
        for (key, value) in changes.as_object().expect("an object") {
            json[key] = value.clone();
        }
        json.as_object_mut().expect("an object").retain(|_, value| *value != json!("absent"));
        json
    }

    fn read(changes: Value) -> ModelConfig {
        ModelConfig::from_json(&with(changes)).expect("a good configuration")
    }

    fn refusal(changes: Value) -> String {
        format!("{:#}", ModelConfig::from_json(&with(changes)).expect_err("a bad configuration"))
    }

    #[test]
    fn every_architecture() {
        let all = [
            ("llama", Architecture::Llama, None),
            ("mistral", Architecture::Mistral, Some(32)),
            ("phi3", Architecture::Phi3, Some(32)),
            ("qwen2", Architecture::Qwen2, None),
        ];
        for (name, architecture, sliding_window) in all {
            let config = read(json!({ "model_type": name, "sliding_window": 32 }));
            assert_eq!((config.architecture, config.sliding_window), (architecture, sliding_window));
        }
        let expected = ModelConfig {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 96,
            num_layers: 3,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vocab_size: 500,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            max_position_embeddings: 128,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![],
        };
        assert_eq!(read(json!({})), expected);
    }

    #[test]
    fn fields_that_may_be_absent_null_or_lists() {
        assert_eq!(read(json!({ "head_dim": null })).head_dim, 16);
        assert_eq!(read(json!({ "head_dim": 24, "hidden_size": 63 })).head_dim, 24);
        assert_eq!(read(json!({ "num_key_value_heads": null })).num_kv_heads, 4);
        assert_eq!(read(json!({ "eos_token_id": 7, "bos_token_id": 0 })).eos_token_ids, [7]);
        assert_eq!(read(json!({ "eos_token_id": [7, 9], "bos_token_id": 0 })).bos_token_id, Some(0));
        assert!(read(json!({ "eos_token_id": null, "hidden_act": "absent" })).eos_token_ids.is_empty());
        assert!(read(json!({ "tie_word_embeddings": true })).tie_word_embeddings);
    }

    #[test]
    fn both_spellings_of_rope() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(500000.0);
        let old = read(json!({ "rope_theta": 500000.0, "rope_scaling": scaling }));
        assert_eq!(old, read(json!({ "rope_parameters": parameters })));
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        assert_eq!((old.rope_theta, old.rope_scaling), (500000.0, expected));
        let linear = read(json!({ "rope_scaling": { "type": "linear", "factor": 2 } }));
        assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 2.0 });
        let plain =
            read(json!({ "rope_scaling": null, "rope_parameters": { "rope_theta": 5, "rope_type": "default" } }));
        assert_eq!((plain.rope_theta, plain.rope_scaling), (5.0, RopeScaling::None));
    }

    #[test]
    fn windows_of_some_layers() {
        let qwen = |changes: Value| {
            let mut json = json!({ "model_type": "qwen2", "sliding_window": 32, "use_sliding_window": true });
            for (key, value) in changes.as_object().expect("an object") {
                json[key] = value.clone();
            }
            json
        };
        assert_eq!(read(qwen(json!({ "max_window_layers": 0 }))).sliding_window, Some(32));
        assert_eq!(read(qwen(json!({ "max_window_layers": 28 }))).sliding_window, None);
        assert!(refusal(qwen(json!({ "max_window_layers": 1 }))).contains("a sliding window in 2 of 3 layers"));
        let (slides, full) = ("sliding_attention", "full_attention");
        assert_eq!(read(qwen(json!({ "layer_types": [slides, slides, slides] }))).sliding_window, Some(32));
        assert_eq!(read(qwen(json!({ "layer_types": [full, full, full] }))).sliding_window, None);
        assert!(refusal(qwen(json!({ "layer_types": [slides, full, full] }))).contains("in 1 of 3 layers"));
    }

    #[test]
    fn refusals_name_what_is_wrong() {
        let cases = [
            (json!({ "model_type": "gemma" }), "model_type \"gemma\" is unknown, llama, mistral, phi3 or qwen2"),
            (json!({ "model_type": "absent" }), "model_type is missing"),
            (json!({ "hidden_act": "gelu" }), "hidden_act \"gelu\" is unknown, silu is expected"),
            (json!({ "rope_scaling": { "type": "longrope" } }), "RoPE type \"longrope\" is unknown"),
            (json!({ "rope_scaling": { "factor": 2 } }), "has no rope_type"),
            (json!({ "rope_scaling": { "type": "linear" } }), "has no factor"),
            (json!({ "partial_rotary_factor": 0.75 }), "partial_rotary_factor is 0.75, only 1"),
            (json!({ "rope_theta": -1 }), "rope_theta is -1, a number above 0"),
            (json!({ "hidden_size": "absent" }), "hidden_size is missing"),
            (json!({ "hidden_size": 0 }), "hidden_size is 0, 1 to"),
            (json!({ "vocab_size": 1.5 }), "vocab_size is 1.5, a whole number"),
            (json!({ "num_hidden_layers": u64::MAX }), "num_hidden_layers is 18446744073709551615, 1 to"),
            (json!({ "hidden_size": 65 }), "hidden_size 65 is no multiple of num_attention_heads 4"),
            (json!({ "num_key_value_heads": 3 }), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
            (json!({ "head_dim": 15 }), "head_dim is 15, an even number"),
            (json!({ "eos_token_id": "</s>" }), "eos_token_id is \"</s>\", token ids"),
            (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings is 1, true or false"),
        ];
        for (changes, expected) in cases {
            let message = refusal(changes);
            assert!(message.contains(expected) && !message.contains('\n'), "{expected:?} is not in {message:?}");
        }
        assert!(ModelConfig::from_json(&json!([])).is_err());
    }

    #[test]
    fn presets() {
        let shapes = |name: &str| {
            let config = ModelConfig::preset(name).expect(name);
            (config.num_layers, crate::config::Projection::ALL.map(|projection| config.shape(projection)))
        };
        let llama = (32, [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]);
        assert_eq!(shapes("Meta-Llama-3-8B-Instruct"), llama);
        assert_eq!(shapes("meta-llama/Meta-Llama-3-8B-Instruct"), llama);
        let large = (80, [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)]);
        assert_eq!(shapes("Meta-Llama-3-70B-Instruct"), large);
        let phi = (40, [(5120, 7680), (5120, 5120), (5120, 35840), (17920, 5120)]);
        assert_eq!(shapes("Phi-3-medium-4k-instruct"), phi);
        assert_eq!(ModelConfig::preset("Phi-3"), None);
    }
}
