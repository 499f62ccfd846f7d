//! The model families: one file each maps a `config.json`, in its own names, to [`ModelConfig`].

mod llama;
mod mistral;
mod phi3;
mod qwen2;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::fields::Fields;
use super::{LayerNorm, ModelConfig, Projection};

/// A model family.
#[derive(Debug)]
pub struct Family {
    /// What the table of models calls it.
    pub name: &'static str,
    /// What `config.json` calls it, and the only class in `architectures` that is understood with it.
    pub model_types: &'static [(&'static str, &'static str)],
    /// What a GGUF calls it (`general.architecture`).
    pub gguf: &'static [&'static str],
    /// The modules of a layer's norms, behind `model.layers.N.`, without `.weight`.
    pub norms: &'static [(LayerNorm, &'static str)],
    /// Projections that are stored as one matrix; of others, the parts are.
    pub fused: &'static [Projection],
    /// Reads a `config.json`.
    read: fn(Fields<'_>) -> Result<ModelConfig>,
}

/// All families.
pub static ALL: [&Family; 4] = [&llama::FAMILY, &mistral::FAMILY, &phi3::FAMILY, &qwen2::FAMILY];

/// The norms of a layer that has one before attention and one before feed-forward.
const PRE_NORMS: &[(LayerNorm, &str)] =
    &[(LayerNorm::AttentionInput, "input_layernorm"), (LayerNorm::FeedForwardInput, "post_attention_layernorm")];

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Family {
    /// The module of one of a layer's norms, behind `model.layers.N.`.
    ///
    /// # Errors
    /// A norm that the family does not have.
    pub(crate) fn norm(&self, norm: LayerNorm) -> Result<&'static str> {
        let found = self.norms.iter().find(|(own, _)| *own == norm);
        Ok(found.with_context(|| format!("{} has no norm {norm:?}", self.name))?.1)
    }
}

/// Reads a `config.json` as its family does.
pub(super) fn read(json: &Value) -> Result<ModelConfig> {
    ensure!(json.is_object(), "the configuration is not a JSON object");
    let fields = Fields::new(json);
    let known = || ALL.iter().flat_map(|family| family.model_types.iter().map(|(name, _)| *name)).collect::<Vec<_>>();
    let name = fields
        .text("model_type")?
        .with_context(|| format!("model_type is missing, {} is expected", listed(&known())))?;
    let found = ALL.iter().find_map(|family| {
        let class = family.model_types.iter().find(|(model_type, _)| *model_type == name)?.1;
        Some((*family, class))
    });
    let Some((family, class)) = found else {
        bail!("model_type {name:?} is unknown, {} is expected", listed(&known()));
    };
    if let Some(classes) = fields.present("architectures") {
        let listed = classes.as_array().is_some_and(|classes| classes.iter().any(|name| name == class));
        ensure!(listed, "architectures is {classes}, {class} is expected where model_type is {name:?}");
    }
    (family.read)(fields)
}

/// `a, b or c`.
fn listed(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}
