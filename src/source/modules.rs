//! Which stored modules make a projection: Llama's come one by one, Phi-3's fused.

use crate::config::{ModelConfig, Projection};

/// A stored matrix, or rows of a fused one.
pub(super) struct Part {
    /// Without the names of its tensors: `.weight`, `.bias`, `.qweight` …
    pub(super) name: String,
    pub(super) rows: usize,
}

impl Part {
    /// The full name of one of the module's tensors.
    pub(super) fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }
}

/// The modules whose rows, one below the other, make `projection`. `is_stored` tells whether the fused one is there.
pub(super) fn parts(
    config: &ModelConfig,
    layer: usize,
    projection: Projection,
    is_stored: impl FnOnce(&Part) -> bool,
) -> Vec<Part> {
    let attention = config.layers[layer].attention();
    let (q, kv) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
    let half = config.layers[layer].intermediate_size();
    let (fused, single): (_, &[(&str, usize)]) = match projection {
        Projection::Qkv => {
            ("self_attn.qkv_proj", &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)])
        }
        Projection::O => ("self_attn.o_proj", &[]),
        Projection::GateUp => ("mlp.gate_up_proj", &[("mlp.gate_proj", half), ("mlp.up_proj", half)]),
        Projection::Down => ("mlp.down_proj", &[]),
    };
    let part = |module: &str, rows| Part { name: format!("model.layers.{layer}.{module}"), rows };
    let whole = part(fused, config.shape(layer, projection).1);
    if single.is_empty() || is_stored(&whole) {
        return vec![whole];
    }
    single.iter().map(|&(module, rows)| part(module, rows)).collect()
}

/// The modules of `projection` as transformers stores a full-precision model of this architecture: the names of
/// their weights, and the rows of each, one below the other.
pub(crate) fn stored_modules(config: &ModelConfig, layer: usize, projection: Projection) -> Vec<(String, usize)> {
    let fused = config.family.fused.contains(&projection);
    let parts = parts(config, layer, projection, |_| fused);
    parts.iter().map(|part| (part.tensor("weight"), part.rows)).collect()
}
