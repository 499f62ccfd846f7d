//! A small layer for tests.

use serde_json::json;

use super::attention::KvCache;
use super::compute::{Cache, Compute, Tensor};
use super::forward::{Affine, Inputs, Layer, Placed, Ropes, norms};
use super::host::Host;
use crate::config::{
    Activation, Attention, FeedForward, LayerNorm, Mixer, ModelConfig, NormPlacement, Projection, QkNorm, QueryScaling,
    RopeScaling,
};
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

/// What families do differently from Llama: one thing at a time, and together as some of them do.
pub(crate) fn variants(base: &ModelConfig) -> Vec<(&'static str, ModelConfig)> {
    type Change = fn(&mut ModelConfig);
    let changes: [(&'static str, Change); 18] = [
        ("plain", |_| {}),
        ("window", |c| attention(c).window = Some(3)),
        ("norms of heads", |c| attention(c).qk_norm = Some(QkNorm::PerHead)),
        ("norms of rows", |c| attention(c).qk_norm = Some(QkNorm::WholeRow)),
        ("norms after", |c| c.layers[0].norms = NormPlacement::After),
        ("norms before and after", |c| c.layers[0].norms = NormPlacement::Both),
        ("GELU", gelu),
        ("capped scores", |c| attention(c).softcap = Some(0.7)),
        ("scale", |c| attention(c).scale = 0.9),
        ("queries that grow", |c| attention(c).query_scaling = Some(QueryScaling { beta: 0.6, original: 2 })),
        ("YaRN", yarn),
        ("partial rotation", |c| c.ropes[0].rotary_dim /= 2),
        ("no rotation", |c| attention(c).rope = None),
        ("divided stream", |c| (c.residual_multiplier, c.rms_norm_eps) = (0.22, 0.01)),
        ("Gemma 2", |c| {
            gelu(c);
            c.layers[0].norms = NormPlacement::Both;
            let attention = attention(c);
            (attention.softcap, attention.scale, attention.window) = (Some(0.5), 0.4, Some(4));
        }),
        ("OLMo 3", |c| {
            yarn(c);
            c.layers[0].norms = NormPlacement::After;
            let attention = attention(c);
            (attention.qk_norm, attention.window) = (Some(QkNorm::WholeRow), Some(4));
        }),
        ("Ministral 3", |c| {
            yarn(c);
            attention(c).query_scaling = Some(QueryScaling { beta: 0.4, original: 3 });
        }),
        ("GLM-4", |c| {
            c.layers[0].norms = NormPlacement::Both;
            c.ropes[0].rotary_dim /= 2;
        }),
    ];
    let changed = |(name, change): (_, Change)| {
        let mut config = base.clone();
        change(&mut config);
        (name, config)
    };
    changes.into_iter().map(changed).collect()
}

fn attention(config: &mut ModelConfig) -> &mut Attention {
    let Mixer::Attention(attention) = &mut config.layers[0].mixer;
    attention
}

fn gelu(config: &mut ModelConfig) {
    let FeedForward::Dense { activation, .. } = &mut config.layers[0].feed_forward;
    *activation = Activation::GeluTanh;
}

fn yarn(config: &mut ModelConfig) {
    config.ropes[0].scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 16.0,
        beta_fast: 2.0,
        beta_slow: 0.2,
        truncate: false,
        attention_factor: 1.3,
    };
}

/// Numbers between `-amplitude` and `amplitude`; the same seed gives the same.
pub(crate) fn numbers(seed: u64, len: usize, amplitude: f32) -> Vec<f32> {
    sampling::draws(seed, len).iter().map(|x| (2.0 * x - 1.0) * amplitude).collect()
}

/// Weights up to `amplitude`, norms around 1, a bias on qkv.
pub(crate) fn layer(config: &ModelConfig, amplitude: f32) -> Layer {
    let linears = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(0, p);
        let bias = (p == Projection::Qkv).then(|| numbers(9, out_features, 0.5));
        let weight = numbers(p.index() as u64 + 1, in_features * out_features, amplitude);
        Affine { in_features, out_features, weight, bias }
    });
    let layer = config.layers[0].clone();
    let norms = norms(&layer, config.hidden_size, |norm, len| {
        let seed = match norm {
            LayerNorm::AttentionInput => 5,
            LayerNorm::FeedForwardInput => 6,
            other => 40 + other.index() as u64,
        };
        numbers(seed, len, 0.5).iter().map(|x| 1.0 + x).collect()
    });
    Layer { config: layer, norms, linears }
}

/// Takes `h` `[texts, tokens, hidden_size]` through a layer on this machine's cores, behind what `cache` holds, and returns
/// what entered its projections.
pub(crate) fn forward(
    config: &ModelConfig,
    layer: &Layer,
    ropes: &Ropes,
    cache: &mut Cache,
    texts: usize,
    h: &mut [f32],
) -> Inputs {
    let mut stream = Tensor::F32(h.to_vec());
    let placed = Placed::new(&Host, layer).unwrap();
    let inputs = placed.forward(&Host, config, ropes, cache, texts, &mut stream).unwrap();
    h.copy_from_slice(stream.host());
    inputs.map(|x| Host.take(x).unwrap())
}

/// Room for texts on this machine.
pub(crate) fn cache(layer: &Layer, texts: usize, capacity: usize) -> Cache {
    Cache::Host(KvCache::new(&layer.config, texts, capacity))
}
