//! Models known by name, for what needs shapes and no files: sizes, profiles, benchmarks.

use serde_json::{Value, json};

use super::ModelConfig;
use super::fields::merged;

/// A name, and what makes the `config.json`.
type Preset = (&'static str, fn() -> Value);

/// The presets, as the `config.json` of each says them.
const ALL: [Preset; 11] = [
    ("Meta-Llama-3-8B-Instruct", || llama_3(32, 32, 4096, 14336)),
    ("Meta-Llama-3-70B-Instruct", || llama_3(80, 64, 8192, 28672)),
    ("Phi-3-medium-4k-instruct", phi_3_medium),
    ("Llama-3.2-1B-Instruct", || llama_3_2(16, 32, 2048, 64)),
    ("Llama-3.2-3B-Instruct", || llama_3_2(28, 24, 3072, 128)),
    ("Qwen2.5-7B-Instruct", qwen_2_5),
    ("Qwen3-8B", || qwen_3(36, 32, 4096, 12288)),
    ("Qwen3-14B", || qwen_3(40, 40, 5120, 17408)),
    ("phi-4", phi_4),
    ("gemma-3-12b-it", gemma_3_12b),
    ("Mistral-Small-3.1-24B-Instruct-2503", mistral_small),
];

impl ModelConfig {
    /// The names that [`ModelConfig::preset`] knows.
    pub const PRESETS: [&'static str; ALL.len()] = {
        let mut names = [""; ALL.len()];
        let mut i = 0;
        while i < names.len() {
            names[i] = ALL[i].0;
            i += 1;
        }
        names
    };

    /// The model of that name; an organization before a slash is ignored.
    pub fn preset(name: &str) -> Option<Self> {
        let name = name.rsplit('/').next()?;
        let (_, json) = ALL.iter().find(|(preset, _)| *preset == name)?;
        Some(Self::from_json(&json()).expect("presets are read in a test"))
    }
}

/// A decoder of `[layers, heads, heads of keys and values, hidden size, intermediate size]`, with `more` fields.
fn decoder(class: &str, model_type: &str, sizes: [usize; 5], more: &Value) -> Value {
    let [layers, heads, kv_heads, hidden, intermediate] = sizes;
    let common = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    });
    merged(common, more)
}

fn llama_3(layers: usize, heads: usize, hidden: usize, intermediate: usize) -> Value {
    let more = json!({
        "vocab_size": 128_256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_009],
    });
    decoder("LlamaForCausalLM", "llama", [layers, heads, 8, hidden, intermediate], &more)
}

fn llama_3_2(layers: usize, heads: usize, hidden: usize, head_dim: usize) -> Value {
    let changes = json!({
        "head_dim": head_dim,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": true,
        "eos_token_id": [128_001, 128_008, 128_009],
    });
    merged(llama_3(layers, heads, hidden, 8192), &changes)
}

fn qwen_2_5() -> Value {
    let more = json!({
        "vocab_size": 152_064,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": false,
        "max_position_embeddings": 32_768,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    });
    decoder("Qwen2ForCausalLM", "qwen2", [28, 28, 4, 3584, 18_944], &more)
}

fn qwen_3(layers: usize, heads: usize, hidden: usize, intermediate: usize) -> Value {
    let more = json!({
        "head_dim": 128,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": false,
        "max_position_embeddings": 40_960,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    });
    decoder("Qwen3ForCausalLM", "qwen3", [layers, heads, 8, hidden, intermediate], &more)
}

fn phi_3_medium() -> Value {
    let more = json!({
        "vocab_size": 32_064,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": 2047,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": [32_000, 32_001, 32_007],
    });
    decoder("Phi3ForCausalLM", "phi3", [40, 40, 10, 5120, 17_920], &more)
}

fn phi_4() -> Value {
    let changes = json!({
        "vocab_size": 100_352,
        "rope_theta": 250_000.0,
        "sliding_window": null,
        "max_position_embeddings": 16_384,
        "original_max_position_embeddings": 16_384,
        "bos_token_id": 100_257,
        "eos_token_id": 100_265,
    });
    merged(phi_3_medium(), &changes)
}

fn gemma_3_12b() -> Value {
    json!({
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
            "sliding_window": 1024,
        },
    })
}

fn mistral_small() -> Value {
    json!({
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        // Nothing is said of it; the head is stored beside the embedding.
        "tie_word_embeddings": false,
        "text_config": {
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 5120,
            "intermediate_size": 32_768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000_000.0,
            "sliding_window": null,
            "max_position_embeddings": 131_072,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    })
}
