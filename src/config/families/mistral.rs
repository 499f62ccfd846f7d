//! Mistral 7B: Llama with a window in all layers, or in none.

use anyhow::Result;

use super::{Family, PRE_NORMS};
use crate::config::fields::Fields;
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement};

pub(super) static FAMILY: Family = Family {
    name: "Mistral 7B",
    model_types: &[("mistral", "MistralForCausalLM")],
    // Its window tells it from Llama.
    gguf: &[],
    norms: PRE_NORMS,
    fused: &[],
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
