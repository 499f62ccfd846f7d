//! A small layer for tests.

use super::forward::{Affine, Layer};
use crate::config::{Architecture, ModelConfig, Projection, RopeScaling};
use crate::sampling;

/// A model of one layer; two queries share a key.
pub(crate) fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen2,
        hidden_size: 64,
        intermediate_size: 96,
        num_layers: 1,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 8,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        max_position_embeddings: 256,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

/// Numbers between `-amplitude` and `amplitude`; the same seed gives the same.
pub(super) fn numbers(seed: u64, len: usize, amplitude: f32) -> Vec<f32> {
    sampling::draws(seed, len).iter().map(|x| (2.0 * x - 1.0) * amplitude).collect()
}

/// Weights up to `amplitude`, norms around 1, a bias on qkv.
pub(super) fn layer(config: &ModelConfig, amplitude: f32) -> Layer {
    let linears = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(p);
        let bias = (p == Projection::Qkv).then(|| numbers(9, out_features, 0.5));
        let weight = numbers(p.index() as u64 + 1, in_features * out_features, amplitude);
        Affine { in_features, out_features, weight, bias }
    });
    let gamma = |seed| numbers(seed, config.hidden_size, 0.5).iter().map(|x| 1.0 + x).collect();
    Layer { input_norm: gamma(5), post_norm: gamma(6), linears }
}
