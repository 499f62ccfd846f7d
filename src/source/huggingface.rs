//! Directories as Hugging Face's transformers writes them: `config.json` and (sharded) safetensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

use super::{EMBEDDING, HEAD};
use crate::config::read_json;
use crate::format::Floats;
use crate::mapped::Mapped;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of one model.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<Shard>,
    /// Tensor to file.
    names: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    map: Mapped,
    header: Metadata,
    /// Where the tensors begin.
    data_start: usize,
}

/// A tensor as it lies in its file.
pub(super) struct Tensor<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl Shards {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let mut shards = Self { files: Vec::new(), names: BTreeMap::new() };
        let files: Vec<String> = file_names(directory)?.into_iter().collect();
        for (index, name) in files.iter().enumerate() {
            let shard = Shard::open(&directory.join(name)).with_context(|| format!("in {name}"))?;
            for tensor in shard.header.offset_keys() {
                if let Some(before) = shards.names.insert(tensor.clone(), index) {
                    bail!("tensor {tensor} is in {} and in {name}: which of them is meant?", files[before]);
                }
            }
            shards.files.push(shard);
        }
        Ok(shards)
    }

    pub(super) fn find(&self, name: &str) -> Result<Tensor<'_>> {
        let (name, &file) = self.stored(name).with_context(|| format!("tensor {name} is missing"))?;
        self.files[file].tensor(name)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.stored(name).is_some()
    }

    /// A tensor as the files name it, and which of them has it.
    fn stored(&self, name: &str) -> Option<(&String, &usize)> {
        spellings(name).find_map(|name| self.names.get_key_value(&name))
    }

    /// True if there is a head of other numbers than the embedding's, which then counts, whatever the configuration
    /// says of it.
    pub(super) fn has_own_head(&self) -> Result<bool> {
        if !self.contains(HEAD) {
            return Ok(false);
        }
        let (head, embedding) = (self.find(HEAD)?, self.find(EMBEDDING)?);
        Ok((head.dtype, head.shape, head.bytes) != (embedding.dtype, embedding.shape, embedding.bytes))
    }
}

/// What a tensor may be called: the decoder of a model that sees images is a part among others.
fn spellings(name: &str) -> impl Iterator<Item = String> {
    let inside = name.strip_prefix("model.").map(|rest| format!("model.language_model.{rest}"));
    [Some(name.to_owned()), Some(format!("language_model.{name}")), inside].into_iter().flatten()
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

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let (header, data_start) = crate::checkpoint::header(&map).context("truncated or no safetensors file")?;
        Ok(Self { map, header, data_start })
    }

    fn tensor<'a>(&'a self, name: &'a str) -> Result<Tensor<'a>> {
        let info = self.header.info(name).with_context(|| format!("tensor {name} is missing"))?;
        let (start, end) = info.data_offsets;
        let bytes = &self.map[self.data_start + start..self.data_start + end];
        Ok(Tensor { name, dtype: info.dtype, shape: &info.shape, bytes })
    }
}

impl<'a> Tensor<'a> {
    /// The shape of a tensor that can be read.
    pub(super) fn shape(&self) -> Result<Vec<usize>> {
        let known = matches!(self.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32);
        ensure!(known, "tensor {} has type {:?}, F16, BF16 or F32 is expected", self.name, self.dtype);
        Ok(self.shape.to_vec())
    }

    /// Its numbers, all of them finite.
    pub(super) fn read(&self) -> Result<Floats<'a>> {
        let values = match self.dtype {
            Dtype::F16 => Floats::F16(super::numbers(self.bytes)),
            Dtype::BF16 => Floats::Bf16(super::numbers(self.bytes)),
            Dtype::F32 => Floats::F32(super::numbers(self.bytes)),
            other => bail!("tensor {} has type {other:?}, F16, BF16 or F32 is expected", self.name),
        };
        values.ensure_tensor_is_finite(self.name, self.shape)?;
        Ok(values)
    }

    /// Shape and bits of an i32 tensor.
    pub(super) fn words(&self) -> Result<(&'a [usize], Cow<'a, [u32]>)> {
        ensure!(self.dtype == Dtype::I32, "tensor {} has type {:?}, I32 is expected", self.name, self.dtype);
        Ok((self.shape, super::numbers(self.bytes)))
    }
}
