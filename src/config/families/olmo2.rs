//! OLMo 2: norms behind attention and feed-forward only, and over the whole rows of queries and keys.

use anyhow::Result;
use serde_json::json;

use super::Family;
use crate::config::fields::{Fields, RopeRules};
use crate::config::{
    Activation, Attention, LayerConfig, LayerNorm, Mixer, ModelConfig, NormPlacement, Projection, QkNorm,
};

pub(super) static FAMILY: Family = Family {
    name: "OLMo 2",
    covers: "OLMo 2 1B, 7B, 13B and 32B",
    model_types: &[("olmo2", "Olmo2ForCausalLM")],
    gguf: &["olmo2"],
    norms: NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "rms_norm_eps": 1e-5 }),
    read,
};

pub(super) const NORMS: &[(LayerNorm, &str)] = &[
    (LayerNorm::Query, "self_attn.q_norm"),
    (LayerNorm::Key, "self_attn.k_norm"),
    (LayerNorm::AttentionOutput, "post_attention_layernorm"),
    (LayerNorm::FeedForwardOutput, "post_feedforward_layernorm"),
];

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    let layer = layer(c, head_dim)?;
    let mut model = c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &RopeRules::LLAMA)?])?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    Ok(model)
}

/// A layer that sees the whole text.
pub(super) fn layer(c: Fields<'_>, head_dim: usize) -> Result<LayerConfig> {
    let attention = Attention { qk_norm: Some(QkNorm::WholeRow), ..c.attention(head_dim)? };
    Ok(LayerConfig {
        mixer: Mixer::Attention(attention),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::After,
    })
}
