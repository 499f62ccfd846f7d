//! Mistral 7B and Small: Llama with a window in all layers, or in none.

use anyhow::Result;
use serde_json::json;

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement};

pub(super) static FAMILY: Family = Family {
    name: "Mistral 7B, Nemo and Small",
    covers: "Mistral 7B, Nemo 12B, Small 3, 3.1 and 3.2 (text of the multimodal ones)",
    model_types: &[("mistral", "MistralForCausalLM")],
    // Its files go by the names of Llama and of Ministral 3: those of Llama with a window are Mistral's, and those of
    // Ministral 3 without queries that grow.
    gguf: &[],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "num_key_value_heads": 8, "sliding_window": 4096 }),
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    let attention = Attention { window: c.optional_dimension("sliding_window")?, ..c.attention(head_dim)? };
    let layer = LayerConfig {
        mixer: Mixer::Attention(attention),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &RopeRules::LLAMA)?])
}
