//! The tensors of a reference directory under one roof: every file's, by name.
//!
//! Residuals and thresholds come in lists with an entry for each layer; they are filed beside the weights they
//! belong to: `model.layers.0.self_attn.q_proj.cheatsheet`, `….reordered_scales`, `….thresholds`.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use crate::format::Floats;
use crate::source::torch::{DType, Id, Tensor, TorchFile, Value};

/// Names in a message about keys; the rest are counted.
const NAMED: usize = 6;

#[derive(Debug, Default)]
pub(super) struct Tensors {
    files: Vec<TorchFile>,
    names: HashMap<String, (usize, Id)>,
}

/// What a tensor has to be.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) shape: Vec<usize>,
    pub(super) words: bool,
}

impl Tensors {
    /// Adds a state dict: `pytorch_model.bin`, or the shards that `pytorch_model.bin.index.json` lists.
    pub(super) fn add_weights(&mut self, dir: &Path) -> Result<()> {
        let index = dir.join(super::INDEX);
        let mut shards = BTreeSet::from([super::WEIGHTS.to_owned()]);
        if !dir.join(super::WEIGHTS).exists() {
            let json = json(&index)?;
            let map = json.get("weight_map").and_then(Json::as_object);
            let map = map.with_context(|| format!("{}: no object weight_map in it", index.display()))?;
            shards =
                map.values().map(shard_name).collect::<Result<_>>().with_context(|| index.display().to_string())?;
        }
        for shard in shards {
            self.add(&dir.join(shard), |root| {
                let tensors = root.entries()?.into_iter();
                Ok(tensors.map(|(name, value)| (name.to_owned(), value)).collect())
            })?;
        }
        Ok(())
    }

    /// Adds `cheatsheet.pt`: for each layer `{module: {cheatsheet, reordered_scales}}`.
    pub(super) fn add_residuals(&mut self, path: &Path) -> Result<()> {
        self.add(path, |root| {
            let mut tensors = Vec::new();
            for (layer, modules) in root.items()?.enumerate() {
                for (module, parts) in modules.entries()? {
                    for (part, value) in parts.entries()? {
                        tensors.push((format!("model.layers.{layer}.{module}.{part}"), value));
                    }
                }
            }
            Ok(tensors)
        })
    }

    /// Adds `thresholds.pt`: for each layer `{module: thresholds}`.
    pub(super) fn add_thresholds(&mut self, path: &Path) -> Result<()> {
        self.add(path, |root| {
            let mut tensors = Vec::new();
            for (layer, modules) in root.items()?.enumerate() {
                for (module, value) in modules.entries()? {
                    tensors.push((format!("model.layers.{layer}.{module}.thresholds"), value));
                }
            }
            Ok(tensors)
        })
    }

    fn add(&mut self, path: &Path, list: impl FnOnce(Value<'_>) -> Result<Vec<(String, Value<'_>)>>) -> Result<()> {
        let file = TorchFile::open(path)?;
        let index = self.files.len();
        for (name, value) in list(file.root()).with_context(|| path.display().to_string())? {
            // A state dict may carry more than tensors; what is expected and no tensor is reported as missing.
            if value.tensor().is_ok() && self.names.insert(name.clone(), (index, value.id())).is_some() {
                bail!("{}: {name} is also in another file", path.display());
            }
        }
        self.files.push(file);
        Ok(())
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    pub(super) fn find(&self, name: &str) -> Result<Tensor<'_>> {
        let &(file, id) = self.names.get(name).with_context(|| format!("tensor {name} is missing"))?;
        self.files[file].value(id).tensor()
    }

    /// The bits of an i32 tensor.
    pub(super) fn words(&self, name: &str) -> Result<Cow<'_, [u32]>> {
        self.find(name)?.words().with_context(|| name.to_owned())
    }

    /// The numbers of a tensor, all of them finite.
    pub(super) fn floats(&self, name: &str) -> Result<Floats<'_>> {
        let tensor = self.find(name)?;
        let floats = tensor.floats().with_context(|| name.to_owned())?;
        floats.ensure_tensor_is_finite(name, tensor.shape())?;
        Ok(floats)
    }

    /// Checks that exactly the `expected` tensors are there, in their shapes, or others that `tolerated` accepts.
    pub(super) fn check(&self, expected: &HashMap<String, Expected>, tolerated: impl Fn(&str) -> bool) -> Result<()> {
        let missing: BTreeSet<_> = expected.keys().map(String::as_str).filter(|name| !self.contains(name)).collect();
        ensure!(missing.is_empty(), "missing in the directory: {}", listed(&missing));
        let extra: BTreeSet<_> =
            self.names().filter(|name| !expected.contains_key(*name) && !tolerated(name)).collect();
        ensure!(extra.is_empty(), "not understood in the directory: {}", listed(&extra));
        for (name, Expected { shape, words }) in expected {
            let tensor = self.find(name)?;
            let found = tensor.shape();
            ensure!(found == shape, "{name} has shape {found:?}, {shape:?} is expected");
            let float = matches!(tensor.dtype(), DType::F16 | DType::Bf16 | DType::F32 | DType::F64);
            let fits = if *words { tensor.dtype() == DType::I32 } else { float };
            let wanted = if *words { "i32" } else { "floating-point numbers" };
            ensure!(fits, "{name} is a tensor of {}, {wanted} are expected", tensor.dtype());
        }
        Ok(())
    }
}

/// The file name of a shard: of this directory, never a path out of it.
fn shard_name(file: &Json) -> Result<String> {
    let name = file.as_str().with_context(|| format!("shard {file} is not a text"))?;
    ensure!(Path::new(name).file_name().is_some_and(|own| own == name), "shard {name:?} is not a plain file name");
    Ok(name.to_owned())
}

/// A JSON file of bounded size.
pub(super) fn json(path: &Path) -> Result<Json> {
    crate::config::read_json(path)
}

fn listed(names: &BTreeSet<&str>) -> String {
    let mut list = names.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
    if names.len() > NAMED {
        list += &format!(" and {} more", names.len() - NAMED);
    }
    list
}
