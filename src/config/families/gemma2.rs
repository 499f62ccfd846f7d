//! Gemma 2: four norms by 1 + w, a scaled embedding, GELU, windows in every other layer, capped scores and logits.

use anyhow::Result;
use serde_json::json;

use super::{Family, gemma3};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, LayerNorm, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Gemma 2",
    covers: "Gemma 2 2B, 9B and 27B",
    model_types: &[("gemma2", "Gemma2ForCausalLM")],
    gguf: &["gemma2"],
    norms: &[
        (LayerNorm::AttentionInput, "input_layernorm"),
        (LayerNorm::AttentionOutput, "post_attention_layernorm"),
        (LayerNorm::FeedForwardInput, "pre_feedforward_layernorm"),
        (LayerNorm::FeedForwardOutput, "post_feedforward_layernorm"),
    ],
    unit_offset: true,
    fused: &[],
    defaults: || {
        let mut defaults = gemma3::defaults();
        defaults["vocab_size"] = json!(256_000);
        defaults["max_position_embeddings"] = json!(8192);
        defaults["attn_logit_softcapping"] = json!(50.0);
        defaults["final_logit_softcapping"] = json!(30.0);
        defaults
    },
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    c.ensure_not_bidirectional()?;
    let head_dim = c.dimension("head_dim")?;
    let window = c.optional_dimension("sliding_window")?;
    let attention = Attention {
        scale: gemma3::scale(c)?,
        softcap: c.positive("attn_logit_softcapping")?,
        ..c.attention(head_dim)?
    };
    let feed_forward = c.dense("hidden_activation", Activation::GeluTanh)?;
    let layer = |slides| LayerConfig {
        mixer: Mixer::Attention(Attention { window: window.filter(|_| slides), ..attention.clone() }),
        feed_forward: feed_forward.clone(),
        norms: NormPlacement::Both,
    };
    let layers = c.sliding(c.num_layers()?, |layer| layer.is_multiple_of(2))?.into_iter().map(layer).collect();
    let mut model = c.model(&FAMILY, layers, vec![c.rope(head_dim, &RopeRules::LLAMA)?])?;
    model.embedding_scale = (model.hidden_size as f64).sqrt();
    model.logit_softcap = c.positive("final_logit_softcapping")?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    Ok(model)
}
