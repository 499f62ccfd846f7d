//! Gemma 3: Gemma 2 with norms of queries and keys in place of the cap of scores, five layers with a window to one that
//! sees the whole text, and a rotation for each kind of layer.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Family;
use crate::config::fields::{Fields, RopeRules};
use crate::config::{
    Activation, Attention, LayerConfig, LayerNorm, Mixer, ModelConfig, NormPlacement, Projection, QkNorm,
};

pub(super) static FAMILY: Family = Family {
    name: "Gemma 3",
    covers: "Gemma 3 270M, 1B, 4B, 12B and 27B (text of the multimodal ones)",
    model_types: &[("gemma3_text", "Gemma3ForCausalLM")],
    gguf: &["gemma3"],
    norms: &[
        (LayerNorm::AttentionInput, "input_layernorm"),
        (LayerNorm::Query, "self_attn.q_norm"),
        (LayerNorm::Key, "self_attn.k_norm"),
        (LayerNorm::AttentionOutput, "post_attention_layernorm"),
        (LayerNorm::FeedForwardInput, "pre_feedforward_layernorm"),
        (LayerNorm::FeedForwardOutput, "post_feedforward_layernorm"),
    ],
    unit_offset: true,
    fused: &[],
    defaults,
    read,
};

const FULL: RopeRules = RopeRules { theta: 1_000_000.0, ..RopeRules::LLAMA };

/// Published files of the larger models leave most of these out.
pub(super) fn defaults() -> Value {
    json!({
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": true,
        "vocab_size": 262_208,
    })
}

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    c.ensure_not_bidirectional()?;
    let head_dim = c.dimension("head_dim")?;
    let window = c.optional_dimension("sliding_window")?;
    let attention = Attention { qk_norm: Some(QkNorm::PerHead), scale: scale(c)?, ..c.attention(head_dim)? };
    let feed_forward = c.dense("hidden_activation", Activation::GeluTanh)?;
    let layer = |slides: bool| LayerConfig {
        mixer: Mixer::Attention(Attention {
            rope: Some(usize::from(slides)),
            window: window.filter(|_| slides),
            ..attention.clone()
        }),
        feed_forward: feed_forward.clone(),
        norms: NormPlacement::Both,
    };
    let pattern = c.dimension("sliding_window_pattern")?;
    let sliding = c.sliding(c.num_layers()?, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let ropes = c.ropes_of_layer_types(head_dim, &FULL, &RopeRules::LLAMA, Some("rope_local_base_freq"))?;
    let mut model = c.model(&FAMILY, sliding.into_iter().map(layer).collect(), ropes.into())?;
    model.embedding_scale = (model.hidden_size as f64).sqrt();
    model.logit_softcap = c.positive("final_logit_softcapping")?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    Ok(model)
}

/// What scores are multiplied by.
pub(super) fn scale(c: Fields<'_>) -> Result<f64> {
    let scalar = c.positive("query_pre_attn_scalar")?.context("query_pre_attn_scalar is missing")?;
    Ok(scalar.powf(-0.5))
}
