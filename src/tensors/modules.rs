//! Which stored modules make a projection: Llama's come one by one, Phi-3's fused.

use super::Expected;
use crate::config::{ModelConfig, Projection};
use crate::format::{Size, Tensor};

/// A stored matrix, or rows of a fused one.
#[derive(Debug)]
pub(crate) struct Module {
    /// Without the names of its tensors: `.weight`, `.bias`, `.qweight` …
    pub(crate) name: String,
    pub(crate) rows: usize,
}

impl Module {
    /// The full name of one of the module's tensors.
    pub(crate) fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    /// What one of the module's tensors has to be, where the projection is of `size`.
    pub(crate) fn expected(&self, tensor: &Tensor, size: &Size) -> Expected {
        let size = Size { out_features: self.rows, ..*size };
        Expected { name: self.tensor(tensor.suffix), shape: tensor.shape(&size), kind: tensor.kind }
    }
}

/// The modules whose rows, one below the other, make `projection`. `is_stored` tells whether the fused one is there.
pub(crate) fn modules(
    config: &ModelConfig,
    layer: usize,
    projection: Projection,
    is_stored: impl FnOnce(&Module) -> bool,
) -> Vec<Module> {
    let attention = config.layers[layer].attention();
    let (q, kv) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
    let half = config.layers[layer].intermediate_size();
    let single: &[(&str, usize)] = match projection {
        Projection::Qkv => &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
        Projection::GateUp => &[("mlp.gate_proj", half), ("mlp.up_proj", half)],
        Projection::O | Projection::Down => &[],
    };
    let whole = Module { name: fused_module(layer, projection), rows: config.shape(layer, projection).1 };
    if single.is_empty() || is_stored(&whole) {
        return vec![whole];
    }
    single.iter().map(|&(name, rows)| Module { name: format!("model.layers.{layer}.{name}"), rows }).collect()
}

/// The name of the module that is all of `projection`, as our checkpoints have it.
pub(crate) fn fused_module(layer: usize, projection: Projection) -> String {
    let name = match projection {
        Projection::Qkv => "self_attn.qkv_proj",
        Projection::O => "self_attn.o_proj",
        Projection::GateUp => "mlp.gate_up_proj",
        Projection::Down => "mlp.down_proj",
    };
    format!("model.layers.{layer}.{name}")
}

/// The modules of `projection` as transformers stores a full-precision model of this family: the names of their
/// weights, and the rows of each, one below the other.
pub(crate) fn stored_modules(config: &ModelConfig, layer: usize, projection: Projection) -> Vec<(String, usize)> {
    let fused = config.family.fused.contains(&projection);
    let modules = modules(config, layer, projection, |_| fused);
    modules.iter().map(|module| (module.tensor("weight"), module.rows)).collect()
}
