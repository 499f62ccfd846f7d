//! SmolLM3: Llama without rotation in some layers, every fourth unless a list says which.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::{Family, PRE_NORMS};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Activation, Attention, LayerConfig, Mixer, ModelConfig, NormPlacement, Projection};

pub(super) static FAMILY: Family = Family {
    name: "SmolLM3",
    covers: "SmolLM3 3B",
    model_types: &[("smollm3", "SmolLM3ForCausalLM")],
    gguf: &["smollm3"],
    norms: PRE_NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "num_key_value_heads": 4, "no_rope_layer_interval": 4, "tie_word_embeddings": true }),
    read,
};

const ROPE: RopeRules = RopeRules { theta: 2_000_000.0, ..RopeRules::LLAMA };

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let (head_dim, layers) = (c.head_dim()?, c.num_layers()?);
    let attention = c.attention(head_dim)?;
    let feed_forward = c.dense("hidden_act", Activation::Silu)?;
    let slides = c.boolean("use_sliding_window")?.unwrap_or(false);
    let window = if slides { c.optional_dimension("sliding_window")? } else { None };
    let rotated = rotated(c, layers)?;
    // Where nothing else is said, the layers that slide are those without rotation.
    let sliding = c.sliding(layers, |layer| !rotated[layer])?;
    let layer = |(rotated, slides): (bool, bool)| LayerConfig {
        mixer: Mixer::Attention(Attention {
            rope: rotated.then_some(0),
            window: window.filter(|_| slides),
            ..attention.clone()
        }),
        feed_forward: feed_forward.clone(),
        norms: NormPlacement::Before,
    };
    let layers = rotated.iter().copied().zip(sliding).map(layer).collect();
    let mut model = c.model(&FAMILY, layers, vec![c.rope(head_dim, &ROPE)?])?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    model.biased.extend(c.biased("mlp_bias", &[Projection::GateUp, Projection::Down])?);
    Ok(model)
}

/// Which layers rotate: those with a 1 in `no_rope_layers`, in spite of its name.
fn rotated(c: Fields<'_>, layers: usize) -> Result<Vec<bool>> {
    let rotates = |value: &Value| match value.as_u64() {
        Some(rotates @ 0..=1) => Ok(rotates == 1),
        _ => bail!("no_rope_layers has {value}, 1 (rotated) or 0 (not rotated) is expected"),
    };
    if let Some(listed) = c.of_layers("no_rope_layers", layers, rotates)? {
        return Ok(listed);
    }
    let interval = c.dimension("no_rope_layer_interval")?;
    Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect())
}
