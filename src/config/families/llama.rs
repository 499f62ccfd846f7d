//! Llama 2 and 3, SmolLM2, and models made of them.

use anyhow::Result;
use serde_json::json;

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Llama 2 and 3, SmolLM2",
    covers: "Llama 2, 3, 3.1, 3.2 and 3.3, SmolLM2, and models made of them; YaRN",
    model_types: &[("llama", "LlamaForCausalLM")],
    gguf: &["llama"],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({}),
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    let layer = LayerConfig {
        mixer: Mixer::Attention(c.attention(head_dim)?),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    let mut model = c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &RopeRules::LLAMA)?])?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    model.biased.extend(c.biased("mlp_bias", &[Projection::GateUp, Projection::Down])?);
    Ok(model)
}
