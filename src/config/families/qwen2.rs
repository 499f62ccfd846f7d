//! Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and a window in the layers from `max_window_layers` on.

use anyhow::Result;
use serde_json::json;

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Qwen2 and Qwen2.5",
    covers: "Qwen2 and Qwen2.5, 0.5B to 72B, QwQ; YaRN",
    model_types: &[("qwen2", "Qwen2ForCausalLM")],
    gguf: &["qwen2"],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "num_key_value_heads": 32, "sliding_window": 4096 }),
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    let attention = c.attention(head_dim)?;
    let feed_forward = c.dense("hidden_act", Activation::Silu)?;
    let layer = |window| LayerConfig {
        mixer: Mixer::Attention(Attention { window, ..attention.clone() }),
        feed_forward: feed_forward.clone(),
        norms: NormPlacement::Before,
    };
    let layers = windows(c)?.into_iter().map(layer).collect();
    let mut model = c.model(&FAMILY, layers, vec![c.rope(head_dim, &RopeRules::LLAMA)?])?;
    model.biased.push(Projection::Qkv);
    Ok(model)
}

/// The window of each layer.
pub(super) fn windows(c: Fields<'_>) -> Result<Vec<Option<usize>>> {
    let slides = c.boolean("use_sliding_window")?.unwrap_or(false);
    let window = if slides { c.optional_dimension("sliding_window")? } else { None };
    let full = c.integer("max_window_layers")?.unwrap_or(28);
    let sliding = c.sliding(c.num_layers()?, |layer| layer as u64 >= full)?;
    Ok(sliding.into_iter().map(|slides| window.filter(|_| slides)).collect())
}
