//! Models known by name, for what needs shapes and no files: sizes, profiles, benchmarks.

use serde_json::{Value, json};

use super::ModelConfig;

impl ModelConfig {
    /// The names that [`ModelConfig::preset`] knows.
    pub const PRESETS: [&'static str; 3] =
        ["Meta-Llama-3-8B-Instruct", "Meta-Llama-3-70B-Instruct", "Phi-3-medium-4k-instruct"];

    /// The model of that name; an organization before a slash is ignored.
    pub fn preset(name: &str) -> Option<Self> {
        let name = name.rsplit('/').next()?;
        let json = match Self::PRESETS.iter().position(|preset| *preset == name)? {
            0 => llama_3(32, 32, 4096, 14336),
            1 => llama_3(80, 64, 8192, 28672),
            _ => phi_3_medium(),
        };
        Some(Self::from_json(&json).expect("presets are read in a test"))
    }
}

fn llama_3(layers: usize, heads: usize, hidden: usize, intermediate: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_009],
    })
}

fn phi_3_medium() -> Value {
    json!({
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 32_064,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": 2047,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": [32_000, 32_001, 32_007],
    })
}
