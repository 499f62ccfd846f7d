//! Qwen3, the dense models: Llama with norms of queries and keys, and Qwen2's windows.

use anyhow::Result;
use serde_json::json;

use super::{Family, qwen2};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{
    Activation, Attention, LayerConfig, LayerNorm, Mixer, ModelConfig, NormPlacement, Projection, QkNorm,
};

pub(super) static FAMILY: Family = Family {
    name: "Qwen3",
    covers: "Qwen3 0.6B to 32B (dense); YaRN",
    model_types: &[("qwen3", "Qwen3ForCausalLM")],
    gguf: &["qwen3"],
    norms: &[
        (LayerNorm::AttentionInput, "input_layernorm"),
        (LayerNorm::Query, "self_attn.q_norm"),
        (LayerNorm::Key, "self_attn.k_norm"),
        (LayerNorm::FeedForwardInput, "post_attention_layernorm"),
    ],
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096 }),
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.dimension("head_dim")?;
    let attention = Attention { qk_norm: Some(QkNorm::PerHead), ..c.attention(head_dim)? };
    let feed_forward = c.dense("hidden_act", Activation::Silu)?;
    let layer = |window| LayerConfig {
        mixer: Mixer::Attention(Attention { window, ..attention.clone() }),
        feed_forward: feed_forward.clone(),
        norms: NormPlacement::Before,
    };
    let layers = qwen2::windows(c)?.into_iter().map(layer).collect();
    let mut model = c.model(&FAMILY, layers, vec![c.rope(head_dim, &RopeRules::LLAMA)?])?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    Ok(model)
}
