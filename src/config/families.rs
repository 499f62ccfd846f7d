//! The model families: one file each maps a `config.json`, in its own names, to [`ModelConfig`].

mod gemma2;
mod gemma3;
mod glm4;
mod granite;
mod llama;
mod ministral3;
mod mistral;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;
mod unsupported;

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::fields::{Fields, merged};
use super::{LayerNorm, ModelConfig, Projection};

pub(crate) use unsupported::lacking;
pub use unsupported::unsupported;

/// A model family.
pub struct Family {
    /// What the table of models calls it.
    pub name: &'static str,
    /// The published models that are of this family, for the table of models.
    pub covers: &'static str,
    /// Its `model_type` in `config.json`, each with the only class in `architectures` that is understood with it.
    pub model_types: &'static [(&'static str, &'static str)],
    /// What a GGUF calls it (`general.architecture`); empty where its files go by the name of another family.
    pub gguf: &'static [&'static str],
    /// The modules of a layer's norms, behind `model.layers.N.`, without `.weight`.
    pub norms: &'static [(LayerNorm, &'static str)],
    /// Norms multiply by `1 + w`, where `w` is what transformers stores. Kept is `1 + w`.
    pub unit_offset: bool,
    /// Projections that are stored as one matrix; of others, the parts are.
    pub fused: &'static [Projection],
    /// What the class in transformers assumes where a `config.json` does not have a field at all.
    defaults: fn() -> Value,
    /// Reads a `config.json`.
    read: fn(Fields<'_>) -> Result<ModelConfig>,
}

/// By name: addresses of functions differ from run to run, and what a model is told from others by must not.
impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// All families.
pub static ALL: [&Family; 13] = [
    &llama::FAMILY,
    &mistral::FAMILY,
    &ministral3::FAMILY,
    &phi3::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &smollm3::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &olmo2::FAMILY,
    &olmo3::FAMILY,
    &granite::FAMILY,
    &glm4::FAMILY,
];

/// Models that see images too, of which the part about text (`text_config`) is read: what `config.json` calls them,
/// their class, and the types of text models inside.
pub const MULTIMODAL: [(&str, &str, &[&str]); 2] = [
    ("mistral3", "Mistral3ForConditionalGeneration", &["mistral", "ministral3"]),
    ("gemma3", "Gemma3ForConditionalGeneration", &["gemma3_text"]),
];

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

    /// The family whose models come in GGUFs of this architecture; some come in those of another family, told apart
    /// by what is in the file.
    pub(crate) fn of_gguf(architecture: &str) -> Option<&'static Self> {
        ALL.into_iter().find(|family| family.gguf.contains(&architecture))
    }
}

/// Reads a `config.json` as its family does.
pub(super) fn read(json: &Value) -> Result<ModelConfig> {
    ensure!(json.is_object(), "the configuration is not a JSON object");
    let fields = Fields::new(json);
    let types = || ALL.iter().flat_map(|family| family.model_types.iter().copied());
    let known = || types().map(|(name, _)| name).chain(MULTIMODAL.map(|(name, ..)| name)).collect::<Vec<_>>();
    let name = fields
        .text("model_type")?
        .with_context(|| format!("model_type is missing, {} is expected", listed(&known())))?;
    if let Some((_, class, inside)) = MULTIMODAL.into_iter().find(|(own, ..)| *own == name) {
        ensure_class(fields, name, class)?;
        let text = text_part(json, inside[0])?;
        let found = Fields::new(&text).text("model_type")?.unwrap_or_default();
        if !inside.contains(&found) && lacking(found).is_none() {
            bail!("text_config: model_type is {found:?}, {} is expected inside {name}", listed(inside));
        }
        return read(&text).context("text_config");
    }
    let Some(family) = ALL.into_iter().find(|family| family.model_types.iter().any(|(own, _)| *own == name)) else {
        match lacking(name) {
            Some(lacks) => bail!(
                "model_type {name:?} is not supported, the decoder lacks {lacks}: a dense model of type {} is expected",
                listed(&known())
            ),
            None => bail!("model_type {name:?} is unknown, {} is expected", listed(&known())),
        }
    };
    let (_, class) = types().find(|(own, _)| *own == name).context("no class")?;
    ensure_class(fields, name, class)?;
    let complete = merged((family.defaults)(), json);
    Ok(ModelConfig { json: json.clone(), ..(family.read)(Fields::new(&complete))? })
}

fn ensure_class(fields: Fields<'_>, name: &str, class: &str) -> Result<()> {
    let Some(classes) = fields.present("architectures") else { return Ok(()) };
    let listed = classes.as_array().is_some_and(|classes| classes.iter().any(|name| name == class));
    ensure!(listed, "architectures is {classes}, {class} is expected where model_type is {name:?}");
    Ok(())
}

/// The part about text of a model that sees images too, as the `config.json` of a model of its own. Outside of it stand
/// the special tokens, and whether the head is the embedding, which it is where nothing is said.
fn text_part(json: &Value, default_type: &str) -> Result<Value> {
    let text = json.get("text_config").filter(|text| text.is_object());
    let mut text = text.context("text_config is missing: the part about text is expected in it")?.clone();
    let outer = json.as_object().into_iter().flatten();
    for (key, value) in outer.filter(|(key, value)| OUTSIDE.contains(&key.as_str()) && !value.is_null()) {
        text[key] = value.clone();
    }
    if json.get("tie_word_embeddings").is_none_or(Value::is_null) {
        text["tie_word_embeddings"] = true.into();
    }
    if text.get("model_type").is_none_or(Value::is_null) {
        text["model_type"] = default_type.into();
    }
    text["architectures"] = json!(null);
    Ok(text)
}

/// What a model that sees images says of its text outside of `text_config`.
const OUTSIDE: [&str; 6] =
    ["bos_token_id", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype"];

/// `a, b or c`.
pub(crate) fn listed(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}
