//! Llama 2 and 3, SmolLM2, and models made of them.

use anyhow::Result;

use super::{Family, PRE_NORMS};
use crate::config::fields::Fields;
use crate::config::{Activation, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Llama 2 and 3, SmolLM2",
    model_types: &[("llama", "LlamaForCausalLM")],
    gguf: &["llama"],
    norms: PRE_NORMS,
    fused: &[],
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim(None)?;
    let layer = LayerConfig {
        mixer: Mixer::Attention(c.attention(head_dim)?),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    let mut model = c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim)?])?;
    if c.boolean("attention_bias")?.unwrap_or(false) {
        model.biased.extend([Projection::Qkv, Projection::O]);
    }
    if c.boolean("mlp_bias")?.unwrap_or(false) {
        model.biased.extend([Projection::GateUp, Projection::Down]);
    }
    Ok(model)
}
