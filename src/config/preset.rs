//! Models known by name, for what needs shapes and no files: sizes, profiles, benchmarks.

use super::{Architecture, ModelConfig, RopeScaling};

impl ModelConfig {
    /// The names that [`ModelConfig::preset`] knows.
    pub const PRESETS: [&'static str; 3] =
        ["Meta-Llama-3-8B-Instruct", "Meta-Llama-3-70B-Instruct", "Phi-3-medium-4k-instruct"];

    /// The model of that name; an organization before a slash is ignored.
    pub fn preset(name: &str) -> Option<Self> {
        let name = name.rsplit('/').next()?;
        match Self::PRESETS.iter().position(|preset| *preset == name)? {
            0 => Some(llama_3(32, 32, 4096, 14336)),
            1 => Some(llama_3(80, 64, 8192, 28672)),
            _ => Some(phi_3_medium()),
        }
    }
}

fn llama_3(num_layers: usize, num_heads: usize, hidden_size: usize, intermediate_size: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads: 8,
        head_dim: 128,
        vocab_size: 128_256,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        max_position_embeddings: 8192,
        tie_word_embeddings: false,
        bos_token_id: Some(128_000),
        eos_token_ids: vec![128_001, 128_009],
    }
}

fn phi_3_medium() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Phi3,
        hidden_size: 5120,
        intermediate_size: 17920,
        num_layers: 40,
        num_heads: 40,
        num_kv_heads: 10,
        head_dim: 128,
        vocab_size: 32_064,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: Some(2047),
        max_position_embeddings: 4096,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![32_000, 32_001, 32_007],
    }
}
