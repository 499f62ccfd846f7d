//! The files that carry a model's tokenizer, in a Hugging Face directory or a checkpoint of ours.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::merge::{Beside, SpecialTokens, merge};
use crate::config::token_ids;
use crate::files;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const GENERATION: &str = "generation_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// Bytes of a file that describes tokens. A vocabulary of 262,144 tokens takes 33 MB of `tokenizer.json`; where
/// 65,536 of them are added, as in models that speak, `tokenizer_config.json` takes 12 MB.
const MAX_TOKENS: u64 = 64 << 20;

/// Bytes of a template or of a JSON file without tokens.
const MAX_TEXT: u64 = 2 << 20;

/// Everything about text that a checkpoint has to carry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TextFiles {
    /// `tokenizer.json`, with the tokens that the files beside it add.
    pub tokenizer_json: Vec<u8>,
    /// The Jinja template of a conversation (`chat_template.jinja`, or in `tokenizer_config.json`).
    pub chat_template: Option<String>,
    /// The special tokens that have a name (`bos_token`, `eos_token`, `unk_token`, ...); none where a file says that
    /// there is none. A template sees them under these names.
    pub special_tokens: SpecialTokens,
    /// Ids that end a text (`generation_config.json`), besides those of the model's configuration.
    pub eos_token_ids: Vec<u32>,
}

impl TextFiles {
    /// The files that [`TextFiles::write`] makes.
    pub(crate) const NAMES: [&str; 4] = [TOKENIZER, CONFIG, TEMPLATE, GENERATION];

    /// Reads `tokenizer.json`, and what else there is, from a directory.
    ///
    /// # Errors
    /// No `tokenizer.json`, a file that cannot be read or is not what its name says, or files that give a token
    /// different ids.
    pub fn read(directory: &Path) -> Result<Self> {
        let Some(tokenizer_json) = read(&directory.join(TOKENIZER), MAX_TOKENS)? else {
            let old = directory.join("tokenizer.model").exists();
            let hint =
                if old { "; tokenizer.model is there: transformers converts it when it saves the model" } else { "" };
            bail!("{TOKENIZER} is missing in {}{hint}", directory.display());
        };
        let json = |name: &str, max: u64| read_json(&directory.join(name), max);
        let generation = json(GENERATION, MAX_TEXT)?;
        let beside = Beside {
            config: json(CONFIG, MAX_TOKENS)?,
            special_tokens_map: json(SPECIAL, MAX_TOKENS)?,
            added_tokens: json(ADDED, MAX_TOKENS)?,
        };
        let template = match read(&directory.join(TEMPLATE), MAX_TEXT)? {
            Some(bytes) => Some(String::from_utf8(bytes).with_context(|| format!("{TEMPLATE} is not UTF-8"))?),
            None => template(&beside.config).with_context(|| format!("in {CONFIG}"))?,
        };
        let (tokenizer_json, special_tokens) = merge(tokenizer_json, &beside)?;
        Ok(Self {
            tokenizer_json,
            chat_template: template,
            special_tokens,
            eos_token_ids: token_ids(&generation, "eos_token_id").with_context(|| format!("in {GENERATION}"))?,
        })
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` if there is a template, and
    /// `generation_config.json` into a directory; other tools read them too.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let write = |name: &str, bytes: &[u8]| {
            let path = directory.join(name);
            fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
        };
        let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false });
        for (name, token) in &self.special_tokens {
            config[name] = json!(token);
        }
        write(TOKENIZER, &self.tokenizer_json)?;
        write(CONFIG, &serde_json::to_vec_pretty(&config)?)?;
        write(GENERATION, &serde_json::to_vec_pretty(&json!({ "eos_token_id": self.eos_token_ids }))?)?;
        self.chat_template.iter().try_for_each(|template| write(TEMPLATE, template.as_bytes()))
    }
}

/// The bytes of a file, at most `max`; none if there is no such file.
fn read(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    files::read_if_there(path, max).with_context(|| format!("cannot read {}", path.display()))
}

/// A JSON file; null if there is no such file.
fn read_json(path: &Path, max: u64) -> Result<Value> {
    let Some(bytes) = read(path, max)? else { return Ok(Value::Null) };
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not valid JSON", path.display()))
}

/// The one template, or of several the one called `default`.
fn template(config: &Value) -> Result<Option<String>> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
            Ok(default.map(str::to_owned))
        }
        Some(Value::Object(named)) => Ok(named.get("default").and_then(Value::as_str).map(str::to_owned)),
        Some(other) => bail!("chat_template is {other}, a string or a list of named strings is expected"),
    }
}
