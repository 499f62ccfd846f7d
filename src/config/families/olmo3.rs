//! OLMo 3: OLMo 2 with a window in three of four layers, and YaRN in the others.

use anyhow::Result;
use serde_json::json;

use super::{Family, olmo2};
use crate::config::fields::{Fields, RopeRules};
use crate::config::{Attention, LayerConfig, Mixer, ModelConfig, Projection};

pub(super) static FAMILY: Family = Family {
    name: "OLMo 3",
    covers: "OLMo 3 7B and 32B",
    model_types: &[("olmo3", "Olmo3ForCausalLM")],
    // Its files go by the name of OLMo 2; those with a window are OLMo 3's.
    gguf: &[],
    norms: olmo2::NORMS,
    unit_offset: false,
    fused: &[],
    defaults: || json!({ "rms_norm_eps": 1e-5, "sliding_window": 4096 }),
    read,
};

const ROPE: RopeRules = RopeRules { theta: 500_000.0, ..RopeRules::LLAMA };

fn read(c: Fields<'_>) -> Result<ModelConfig> {
    let head_dim = c.head_dim()?;
    let window = c.optional_dimension("sliding_window")?;
    let full = olmo2::layer(c, head_dim)?;
    let layer = |slides: bool| LayerConfig {
        mixer: Mixer::Attention(Attention {
            rope: Some(usize::from(slides)),
            window: window.filter(|_| slides),
            ..full.attention().clone()
        }),
        ..full.clone()
    };
    let sliding = c.sliding(c.num_layers()?, |layer| !(layer + 1).is_multiple_of(4))?;
    // In the older spelling `rope_theta` is the base of the layers without a window; the others have the class's own.
    let ropes = c.ropes_of_layer_types(head_dim, &ROPE, &ROPE, None)?;
    let mut model = c.model(&FAMILY, sliding.into_iter().map(layer).collect(), ropes.into())?;
    model.biased.extend(c.biased("attention_bias", &[Projection::Qkv, Projection::O])?);
    Ok(model)
}
