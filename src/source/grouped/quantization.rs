//! What a directory says of its quantization: in `config.json`, or in a file of its own as older quantizers wrote it.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::config::read_json;

/// Files of AutoGPTQ and AutoAWQ beside a `config.json` that says nothing, and the method that they stand for.
const FILES: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

/// The fields, and where they were found.
#[derive(Debug)]
pub(super) struct Quantization {
    pub(super) place: &'static str,
    /// In lower case; empty if none is named.
    pub(super) method: String,
    fields: Value,
}

impl Quantization {
    /// What `config`, the `config.json` of `dir`, says, or a file beside it; none for full precision.
    ///
    /// # Errors
    /// A file that cannot be read, or fields that are no object.
    pub(super) fn find(dir: &Path, config: &Value) -> Result<Option<Self>> {
        if let Some(fields) = config.get("quantization_config").filter(|fields| !fields.is_null()) {
            return Self::new("quantization_config", "", fields.clone()).map(Some);
        }
        match FILES.into_iter().find(|(name, _)| dir.join(name).exists()) {
            Some((name, method)) => Self::new(name, method, read_json(&dir.join(name))?).map(Some),
            None => Ok(None),
        }
    }

    fn new(place: &'static str, method: &str, fields: Value) -> Result<Self> {
        if !fields.is_object() {
            bail!("{place} is {fields}, an object is expected");
        }
        let method = fields.get("quant_method").and_then(Value::as_str).unwrap_or(method).to_lowercase();
        Ok(Self { place, method, fields })
    }

    /// The value under any of `spellings`; null if there is none. Texts are in lower case, numbers in quotes numbers.
    ///
    /// # Errors
    /// Two spellings that say different things.
    pub(super) fn field(&self, spellings: &[&str]) -> Result<Value> {
        let stored = spellings.iter().filter_map(|&key| Some((key, plain(self.fields.get(key)?))));
        let mut stored = stored.filter(|(_, value)| !value.is_null());
        let Some((key, value)) = stored.next() else { return Ok(Value::Null) };
        if let Some((other, theirs)) = stored.find(|(_, theirs)| *theirs != value) {
            bail!("{key} is {value}, but {other} is {theirs}: which of them is meant?");
        }
        Ok(value)
    }
}

fn plain(value: &Value) -> Value {
    let Some(text) = value.as_str() else { return value.clone() };
    text.parse::<i64>().map_or_else(|_| text.to_lowercase().into(), Into::into)
}
