//! Directories as Hugging Face's transformers writes them: `config.json` and (sharded) safetensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

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

/// `config.json` of a model that is not quantized yet.
pub(super) fn config_json(directory: &Path) -> Result<Value> {
    let json = json_file(&directory.join("config.json"))?;
    if let Some(quantized) = json.get("quantization_config").filter(|v| !v.is_null()) {
        let method = quantized.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed method");
        bail!("the model is already quantized ({method}), full precision is expected");
    }
    Ok(json)
}

pub(super) fn json_file(path: &Path) -> Result<Value> {
    crate::config::read_json(path)
}

impl Shards {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let mut shards = Self { files: Vec::new(), names: BTreeMap::new() };
        for name in file_names(directory)? {
            let shard = Shard::open(&directory.join(&name)).with_context(|| format!("in {name}"))?;
            let tensors = shard.header.offset_keys();
            shards.names.extend(tensors.into_iter().map(|tensor| (tensor, shards.files.len())));
            shards.files.push(shard);
        }
        Ok(shards)
    }

    pub(super) fn find(&self, name: &str) -> Result<Tensor<'_>> {
        let (name, &file) = self.names.get_key_value(name).with_context(|| format!("tensor {name} is missing"))?;
        self.files[file].tensor(name)
    }
}

/// The safetensors files of the model, from the index if there is one.
fn file_names(directory: &Path) -> Result<BTreeSet<String>> {
    let index = directory.join(INDEX);
    if index.is_file() {
        let json = json_file(&index)?;
        let map = json.get("weight_map").and_then(Value::as_object).context("the index has no weight_map")?;
        let names: Option<BTreeSet<String>> = map.values().map(|v| v.as_str().map(str::to_owned)).collect();
        let names = names.context("the weight_map of the index names no files")?;
        for name in &names {
            let plain = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
            ensure!(plain, "the index names the file {name:?}, a name without directories is expected");
        }
        return Ok(names);
    }
    if directory.join(SINGLE).is_file() {
        return Ok(BTreeSet::from([SINGLE.to_owned()]));
    }
    if directory.join("pytorch_model.bin").is_file() || directory.join("pytorch_model.bin.index.json").is_file() {
        bail!("the weights are in pytorch_model.bin, save them as safetensors (save_pretrained does) and try again");
    }
    bail!("there is neither {SINGLE} nor {INDEX}")
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

    pub(super) fn read(&self) -> Result<Floats<'a>> {
        match self.dtype {
            Dtype::F16 => Ok(Floats::F16(super::numbers(self.bytes))),
            Dtype::BF16 => Ok(Floats::Bf16(super::numbers(self.bytes))),
            Dtype::F32 => Ok(Floats::F32(super::numbers(self.bytes))),
            other => bail!("tensor {} has type {other:?}, F16, BF16 or F32 is expected", self.name),
        }
    }

    /// Shape and bits of an i32 tensor.
    pub(super) fn words(&self) -> Result<(&'a [usize], Cow<'a, [u32]>)> {
        ensure!(self.dtype == Dtype::I32, "tensor {} has type {:?}, I32 is expected", self.name, self.dtype);
        Ok((self.shape, super::numbers(self.bytes)))
    }
}
