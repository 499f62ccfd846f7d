//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with fused matrices, a window in all layers, and LongRoPE, which older
//! files call by other names.

use anyhow::Result;
use serde_json::json;

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, Kind, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Phi-3, Phi-4 and Phi-4-mini",
    covers: "Phi-3 and Phi-3.5 mini, Phi-3 medium (4k and 128k), Phi-4, Phi-4-mini",
    model_types: &[("phi3", "Phi3ForCausalLM")],
    gguf: &["phi3"],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[Projection::Qkv, Projection::GateUp],
    defaults: || json!({ "original_max_position_embeddings": 4096 }),
    read,
};

const ROPE: RopeRules = RopeRules {
    rotated: Some(1.0),
    types: &[
        ("default", Kind::Default),
        ("longrope", Kind::LongRope),
        ("su", Kind::LongRope),
        ("yarn", Kind::LongRope),
    ],
    ..RopeRules::LLAMA
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    let attention = Attention { window: c.optional_dimension("sliding_window")?, ..c.attention(head_dim)? };
    let layer = LayerConfig {
        mixer: Mixer::Attention(attention),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &ROPE)?])
}
