//! Phi-3: Llama with fused matrices and a window in all layers.

use anyhow::Result;

use super::{Family, PRE_NORMS};
use crate::config::fields::Fields;
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Phi-3",
    model_types: &[("phi3", "Phi3ForCausalLM")],
    gguf: &["phi3"],
    norms: PRE_NORMS,
    fused: &[Projection::Qkv, Projection::GateUp],
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim(None)?;
    let attention = Attention { window: c.optional_dimension("sliding_window")?, ..c.attention(head_dim)? };
    let layer = LayerConfig {
        mixer: Mixer::Attention(attention),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim)?])
}
