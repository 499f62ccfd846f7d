//! GLM-4-0414: norms before and behind attention and feed-forward, and half of each head rotated, neighbouring channels
//! together.

use anyhow::Result;
use serde_json::json;

use super::Family;
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, LayerConfig, LayerNorm, Mixer, ModelConfig, NormPlacement, Pairing, Projection};

pub(super) static FAMILY: Family = Family {
    name: "GLM-4-0414",
    covers: "GLM-4-0414 9B and 32B, GLM-Z1",
    model_types: &[("glm4", "Glm4ForCausalLM")],
    gguf: &["glm4"],
    norms: &[
        (LayerNorm::AttentionInput, "input_layernorm"),
        (LayerNorm::AttentionOutput, "post_self_attn_layernorm"),
        (LayerNorm::FeedForwardInput, "post_attention_layernorm"),
        (LayerNorm::FeedForwardOutput, "post_mlp_layernorm"),
    ],
    unit_offset: false,
    fused: &[Projection::GateUp],
    defaults: || json!({ "attention_bias": true, "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7 }),
    read,
};

const ROPE: RopeRules = RopeRules { rotated: Some(0.5), pairing: Pairing::Neighbours, ..RopeRules::LLAMA };

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.dimension("head_dim")?;
    let layer = LayerConfig {
        mixer: Mixer::Attention(c.attention(head_dim)?),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Both,
    };
    let mut model = c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &ROPE)?])?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv])?);
    Ok(model)
}
