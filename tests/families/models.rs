//! The tiny models of `tests/data/models`, and the tokenizers that go with some of them.

use std::fs;
use std::path::{Path, PathBuf};

use decdec::config::ModelConfig;
use decdec::source::Source;
use serde_json::{Value, json};

/// A model with a GGUF and a tokenizer of its family's kind (`tests/data/tokenizers`).
pub(crate) struct Complete {
    pub(crate) model: &'static str,
    pub(crate) tokenizer: &'static str,
    /// Its chat template (`tests/data/chat`).
    pub(crate) template: &'static str,
    /// The tokens that end a text.
    pub(crate) ends: &'static [u32],
}

const fn complete(
    model: &'static str,
    tokenizer: &'static str,
    template: &'static str,
    ends: &'static [u32],
) -> Complete {
    Complete { model, tokenizer, template, ends }
}

/// All of those.
pub(crate) const COMPLETE: [Complete; 16] = [
    complete("gemma-2", "gemma", "gemma-2", &[1, 5]),
    complete("gemma-3-1b", "gemma", "gemma-3", &[1, 5]),
    complete("gemma-3-4b", "gemma", "gemma-3", &[1, 5]),
    complete("glm-4-9b", "glm-4", "glm-4", &[296, 298]),
    complete("granite-3.3", "granite", "granite-3.3", &[296]),
    complete("llama-3-yarn", "llama-3", "llama-3", &[297, 300]),
    complete("ministral-3", "tekken", "mistral-small-3.1", &[2]),
    complete("mistral-small-3.1", "tekken", "mistral-small-3.1", &[2]),
    complete("olmo-2", "olmo", "olmo-2", &[296, 299]),
    complete("olmo-3", "olmo", "olmo-3", &[296, 299]),
    complete("phi-3-mini-128k", "phi-3", "phi-3-mini-4k", &[300, 303]),
    complete("phi-4", "phi-4", "phi-4", &[298]),
    complete("phi-4-mini", "phi-4-mini", "phi-4-mini", &[296, 297]),
    complete("qwen2.5-yarn", "qwen", "qwen2.5", &[297]),
    complete("qwen3", "qwen", "qwen3", &[297]),
    complete("smollm3", "smollm3", "smollm3", &[298]),
];

/// A place in `tests/data`.
pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

pub(crate) fn read_json(path: &str) -> Value {
    serde_json::from_slice(&fs::read(data(path)).expect("readable")).expect("JSON")
}

/// A file of a model.
pub(crate) fn file(model: &str, name: &str) -> PathBuf {
    data("models").join(model).join(name)
}

/// A model's configuration, `published.json` in its publisher's spelling or `config.json` as transformers 5 writes it.
pub(crate) fn config(model: &str, spelling: &str) -> Value {
    read_json(&format!("models/{model}/{spelling}"))
}

/// What the family of a model is called.
fn family(model: &str) -> &'static str {
    let config = ModelConfig::from_json(&config(model, "published.json")).unwrap_or_else(|e| panic!("{model}: {e:#}"));
    config.family.model_types[0].0
}

/// All models, by name.
pub(crate) fn all() -> Vec<String> {
    let entries = fs::read_dir(data("models")).expect("readable").map(|entry| entry.expect("an entry"));
    let directories = entries.filter(|entry| entry.path().join("config.json").exists());
    let mut names: Vec<_> = directories.map(|entry| entry.file_name().into_string().expect("text")).collect();
    names.sort_unstable();
    names
}

/// The models of a family; it has some.
pub(crate) fn of(family: &str) -> Vec<String> {
    let models: Vec<_> = all().into_iter().filter(|model| self::family(model) == family).collect();
    assert!(!models.is_empty(), "{family} has no model in tests/data/models");
    models
}

/// Those with a tokenizer and a GGUF; there are some.
pub(crate) fn complete_of(family: &str) -> Vec<&'static Complete> {
    let models: Vec<_> = COMPLETE.iter().filter(|complete| self::family(complete.model) == family).collect();
    assert!(!models.is_empty(), "{family} has no model with a tokenizer and a GGUF in tests/data/models");
    models
}

/// A tokenizer that nothing is asked of.
const NO_TOKENIZER: &str =
    r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;

/// The model with this configuration, and without a tokenizer.
pub(crate) fn open(model: &str, config: &Value) -> anyhow::Result<Source> {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("config.json"), config.to_string()).expect("writable");
    fs::write(dir.path().join("tokenizer.json"), NO_TOKENIZER).expect("writable");
    fs::copy(file(model, "model.safetensors"), dir.path().join("model.safetensors")).expect("copied");
    Source::open(dir.path())
}

impl Complete {
    /// Writes what belongs to texts and chats into a directory.
    pub(crate) fn write_texts(&self, dir: &Path) {
        let family = &read_json("chat/renderings.json")["families"][self.template];
        let tokens = json!({ "bos_token": family["bos_token"], "eos_token": family["eos_token"] });
        fs::copy(data(&format!("tokenizers/{}.json", self.tokenizer)), dir.join("tokenizer.json")).expect("copied");
        fs::copy(data(&format!("chat/{}.jinja", self.template)), dir.join("chat_template.jinja")).expect("copied");
        fs::write(dir.join("tokenizer_config.json"), tokens.to_string()).expect("writable");
    }

    /// Writes the whole model, as it is published, into a new directory.
    pub(crate) fn write(&self, dir: &Path) {
        fs::create_dir(dir).expect("made");
        self.write_texts(dir);
        fs::write(dir.join("config.json"), config(self.model, "published.json").to_string()).expect("writable");
        fs::copy(file(self.model, "model.safetensors"), dir.join("model.safetensors")).expect("copied");
    }
}

#[test]
fn no_model_is_left_out() {
    let there: Vec<_> = all().into_iter().filter(|model| file(model, "model.gguf").exists()).collect();
    assert_eq!(there, COMPLETE.map(|complete| complete.model), "models with a GGUF");
    let known = read_json("tokenizers/known.json");
    for (name, wanted) in known["tokenizers"].as_object().expect("an object") {
        for template in wanted["chats"].as_object().expect("an object").keys() {
            let found = COMPLETE.iter().any(|c| (c.tokenizer, c.template) == (name, template));
            assert!(found, "no model has tokenizer {name} and chat template {template}");
        }
    }
    let overlooked = read_json("models/overlooked.json");
    let named: Vec<_> = overlooked.as_object().expect("an object").keys().cloned().collect();
    assert_eq!(
        all(),
        {
            let mut named = named;
            named.sort_unstable();
            named
        },
        "models in overlooked.json"
    );
}
