//! Which files of a repository this program reads.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::config::read_json;

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Everything but weights: of models as transformers, AutoAWQ and GPTQModel save them, and of our own checkpoints.
const SMALL: [&str; 12] = [
    "added_tokens.json",
    "bitwidth_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    INDEX,
    "quant_config.json",
    "quantize_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tuned.json",
];

/// What a checkpoint of ours has beside its weights.
const BESIDE: [&str; 2] = ["residuals.safetensors", "thresholds.safetensors"];

/// The files that say what a model is.
pub(super) fn small(listed: &BTreeSet<String>) -> Vec<String> {
    SMALL.iter().filter(|name| listed.contains(**name)).map(|&name| name.to_owned()).collect()
}

/// The files of weights, as a directory of them is read: the one of the usual name, else those that the index in `place`
/// names, else the only ones that there are.
///
/// # Errors
/// No safetensors files; an index without names, or with names that are not listed.
pub(super) fn weights(listed: &BTreeSet<String>, place: &Path) -> Result<Vec<String>> {
    if listed.contains(SINGLE) {
        let beside = BESIDE.iter().filter(|name| listed.contains(**name));
        return Ok([SINGLE].iter().chain(beside).map(|&name| name.to_owned()).collect());
    }
    if listed.contains(INDEX) {
        let index = read_json(&place.join(INDEX))?;
        let map = index.get("weight_map").and_then(Value::as_object).context("its index has no weight_map")?;
        let named: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
        let named = named.context("the weight_map of its index names no files")?;
        let missing = named.iter().find(|name| !listed.contains(**name));
        ensure!(missing.is_none(), "its index names {}, which is not there", missing.unwrap_or(&""));
        return Ok(named.into_iter().map(str::to_owned).collect());
    }
    let found: Vec<String> = listed.iter().filter(|name| name.ends_with(".safetensors")).cloned().collect();
    if found.is_empty() {
        let other = listed.iter().find(|name| [".gguf", ".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end)));
        match other {
            Some(other) => bail!("it has no safetensors files, but {other}: name the repository of the original model"),
            None => bail!("it has no safetensors files"),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn only_what_is_read_is_chosen() {
        let all =
            listed(&["README.md", "config.json", "tokenizer.json", "tokenizer.model", "pytorch_model.bin", INDEX]);
        assert_eq!(small(&all), ["config.json", INDEX, "tokenizer.json"]);
        let dir = tempfile::tempdir().unwrap();
        let chosen = |names: &[&str]| weights(&listed(names), dir.path()).map_err(|error| error.to_string());
        // As decdec and transformers: the single file counts, whatever the index beside it says.
        assert_eq!(chosen(&[SINGLE, INDEX, "consolidated.safetensors"]).unwrap(), [SINGLE]);
        assert_eq!(chosen(&[SINGLE, "residuals.safetensors", "thresholds.safetensors"]).unwrap().len(), 3);
        std::fs::write(dir.path().join(INDEX), r#"{"weight_map": {"x": "a-2", "y": "a-1", "z": "a-2"}}"#).unwrap();
        assert_eq!(chosen(&[INDEX, "a-1", "a-2", "a-3.safetensors"]).unwrap(), ["a-1", "a-2"]);
        assert_eq!(chosen(&[INDEX, "a-1"]).unwrap_err(), "its index names a-2, which is not there");
        std::fs::write(dir.path().join(INDEX), "{}").unwrap();
        assert!(chosen(&[INDEX]).unwrap_err().contains("no weight_map"));
        assert_eq!(chosen(&["gptq_4bit.safetensors", "x.bin"]).unwrap(), ["gptq_4bit.safetensors"]);
        assert!(chosen(&["a.gguf"]).unwrap_err().contains("but a.gguf: name the repository of the original"));
        assert_eq!(chosen(&["a.txt"]).unwrap_err(), "it has no safetensors files");
    }
}
