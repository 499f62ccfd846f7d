//! Granite 3: Llama with multipliers of the embedding, of scores, of what layers add, and a divisor of logits.

use anyhow::Result;
use serde_json::json;

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Granite 3",
    covers: "Granite 3.0 to 3.3, 2B and 8B (dense)",
    model_types: &[("granite", "GraniteForCausalLM")],
    gguf: &["granite"],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({}),
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let multiplier = |key: &str| anyhow::Ok(c.positive(key)?.unwrap_or(1.0));
    let head_dim = c.head_dim()?;
    let attention = Attention { scale: multiplier("attention_multiplier")?, ..c.attention(head_dim)? };
    let layer = LayerConfig {
        mixer: Mixer::Attention(attention),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    let mut model = c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &RopeRules::LLAMA)?])?;
    model.embedding_scale = multiplier("embedding_multiplier")?;
    model.residual_multiplier = multiplier("residual_multiplier")?;
    model.logit_scale = 1.0 / multiplier("logits_scaling")?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    model.biased.extend(c.biased("mlp_bias", &[Projection::GateUp, Projection::Down])?);
    Ok(model)
}
