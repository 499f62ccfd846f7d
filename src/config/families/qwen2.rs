//! Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and a window in the layers from `max_window_layers` on.

use anyhow::{Context, Result};

use super::{Family, PRE_NORMS};
use crate::config::fields::Fields;
use crate::config::{Activation, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "Qwen2 and Qwen2.5",
    model_types: &[("qwen2", "Qwen2ForCausalLM")],
    gguf: &["qwen2"],
    norms: PRE_NORMS,
    fused: &[],
    read,
};

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let (head_dim, layers) = (c.head_dim(None)?, c.num_layers()?);
    let slides = c.boolean("use_sliding_window")?.unwrap_or(false);
    let window = if slides { c.optional_dimension("sliding_window")? } else { None };
    let layer = |slides| {
        let mut attention = c.attention(head_dim)?;
        attention.window = window.filter(|_| slides);
        Ok(LayerConfig {
            mixer: Mixer::Attention(attention),
            feed_forward: c.dense("hidden_act", Activation::Silu)?,
            norms: NormPlacement::Before,
        })
    };
    let full = match c.integer("max_window_layers")? {
        _ if window.is_none() || c.present("layer_types").is_some() => 0,
        full => full.context("max_window_layers is missing")? as usize,
    };
    let sliding = c.sliding(layers, |layer| layer >= full)?;
    let layers = sliding.into_iter().map(layer).collect::<Result<_>>()?;
    let mut model = c.model(&FAMILY, layers, vec![c.rope(head_dim)?])?;
    model.biased.push(Projection::Qkv);
    Ok(model)
}
