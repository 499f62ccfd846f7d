//! Directories as Hugging Face's transformers writes them: `config.json` and (sharded) safetensors.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::config::read_json;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of the model in `directory`.
pub(super) fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    Ok(file_names(directory)?.iter().map(|name| directory.join(name)).collect())
}

/// The safetensors files of the model: one of the usual name, those of the index, or the only one that there is.
fn file_names(directory: &Path) -> Result<BTreeSet<String>> {
    let (single, index) = (directory.join(SINGLE), directory.join(INDEX));
    if single.exists() {
        if index.exists() {
            // The same choice as transformers makes.
            tracing::warn!("{SINGLE} is read, {INDEX} beside it is left aside with the files that it names");
        }
        return Ok(BTreeSet::from([SINGLE.to_owned()]));
    }
    if index.exists() {
        return indexed(&index);
    }
    let others = others(directory)?;
    match &others[..] {
        [adapter] if adapter.starts_with("adapter_") => {
            bail!("there is only {adapter}, which changes another model: merge it into that model first")
        }
        // Older quantizers put bits and groups into the name.
        [only] => return Ok(BTreeSet::from([only.clone()])),
        [] => {}
        [first, ..] => bail!(
            "there is neither {SINGLE} nor {INDEX}, but {first} and {} more: the index is missing",
            others.len() - 1
        ),
    }
    if directory.join("pytorch_model.bin").exists() || directory.join("pytorch_model.bin.index.json").exists() {
        bail!("the weights are in pytorch_model.bin, save them as safetensors (save_pretrained does) and try again");
    }
    bail!("there is neither {SINGLE} nor {INDEX}")
}

/// The files that an index names.
fn indexed(index: &Path) -> Result<BTreeSet<String>> {
    let json = read_json(index)?;
    let map = json.get("weight_map").and_then(Value::as_object).context("the index has no weight_map")?;
    let names: Option<BTreeSet<String>> = map.values().map(|v| v.as_str().map(str::to_owned)).collect();
    let names = names.context("the weight_map of the index names no files")?;
    for name in &names {
        let plain = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
        ensure!(plain, "the index names the file {name:?}, a name without directories is expected");
    }
    Ok(names)
}

/// All safetensors files, by name.
fn others(directory: &Path) -> Result<Vec<String>> {
    let cannot = || format!("cannot read {}", directory.display());
    let mut names = Vec::new();
    for entry in directory.read_dir().with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}
