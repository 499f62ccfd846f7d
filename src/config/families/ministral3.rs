//! Ministral 3 and Devstral 2: Mistral with YaRN, and queries that grow with their position.

use anyhow::{Context, Result};
use serde_json::json;

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement, QueryScaling};

pub(super) static FAMILY: Family = Family {
    name: "Ministral 3, Devstral 2",
    covers: "Ministral 3 3B, 8B and 14B, Devstral 2 (text of the multimodal ones)",
    model_types: &[("ministral3", "Ministral3ForCausalLM")],
    gguf: &["mistral3"],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "head_dim": 128, "num_key_value_heads": 8 }),
    read,
};

const BETA: &str = "llama_4_scaling_beta";
const ORIGINAL: &str = "original_max_position_embeddings";
const ROPE: RopeRules = RopeRules { others: &[BETA, "max_position_embeddings"], ..RopeRules::LLAMA };

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    // As for YaRN, what stands beside the object about RoPE counts more than what is in it.
    let original = match c.positive(ORIGINAL)?.or(c.in_rope(ORIGINAL)?) {
        Some(original) => original as usize,
        None => c.dimension("max_position_embeddings")?,
    };
    let beta = c.in_rope(BETA)?.with_context(|| format!("{BETA} is missing in rope_parameters"))?;
    let attention = Attention {
        window: c.optional_dimension("sliding_window")?,
        query_scaling: Some(QueryScaling { beta, original: original.max(1) }),
        ..c.attention(head_dim)?
    };
    let layer = LayerConfig {
        mixer: Mixer::Attention(attention),
        feed_forward: c.dense("hidden_act", Activation::Silu)?,
        norms: NormPlacement::Before,
    };
    c.model(&FAMILY, vec![layer; c.num_layers()?], vec![c.rope(head_dim, &ROPE)?])
}
