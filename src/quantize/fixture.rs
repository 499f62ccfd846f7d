//! A small layer for tests.

use serde_json::json;

use super::forward::{Affine, Layer, norms};
use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::sampling;

/// A model of one layer; two queries share a key.
pub(crate) fn config() -> ModelConfig {
    ModelConfig::from_json(&json!({
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "use_sliding_window": true,
        "max_window_layers": 0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": true,
    }))
    .expect("a small configuration")
}

/// Numbers between `-amplitude` and `amplitude`; the same seed gives the same.
pub(super) fn numbers(seed: u64, len: usize, amplitude: f32) -> Vec<f32> {
    sampling::draws(seed, len).iter().map(|x| (2.0 * x - 1.0) * amplitude).collect()
}

/// Weights up to `amplitude`, norms around 1, a bias on qkv.
pub(super) fn layer(config: &ModelConfig, amplitude: f32) -> Layer {
    let linears = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(0, p);
        let bias = (p == Projection::Qkv).then(|| numbers(9, out_features, 0.5));
        let weight = numbers(p.index() as u64 + 1, in_features * out_features, amplitude);
        Affine { in_features, out_features, weight, bias }
    });
    let layer = config.layers[0].clone();
    let norms = norms(&layer, config.hidden_size, |norm, len| {
        let seed = if norm == LayerNorm::AttentionInput { 5 } else { 6 };
        numbers(seed, len, 0.5).iter().map(|x| 1.0 + x).collect()
    });
    Layer { config: layer, norms, linears }
}
