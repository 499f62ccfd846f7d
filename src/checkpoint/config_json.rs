//! [`ModelConfig`] in the words of a Hugging Face `config.json`.

use serde_json::{Value, json};

use crate::config::{Architecture, ModelConfig, RopeScaling};

/// The object that transformers and [`ModelConfig::from_json`] read back as `config`.
pub(super) fn write(config: &ModelConfig) -> Value {
    let (model_type, class) = config.architecture.names();
    // The shortest decimal that reads back as the same f32.
    let eps: f64 = config.rms_norm_eps.to_string().parse().unwrap_or(f64::from(config.rms_norm_eps));
    let mut object = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling(&config.rope_scaling),
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids,
    });
    if config.architecture == Architecture::Qwen2 {
        object["use_sliding_window"] = config.sliding_window.is_some().into();
        object["max_window_layers"] = 0.into();
    }
    object
}

fn rope_scaling(scaling: &RopeScaling) -> Value {
    match *scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}
