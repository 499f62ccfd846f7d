//! Safetensors files, one or several, memory-mapped.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::{EMBEDDING, Expected, HEAD, TensorSet};
use crate::format::{Floats, Kind};
use crate::mapped::Mapped;

/// Bytes of a header; that of a model with 10,000 tensors has 1.5 MB. Parsed, they take up to 12 times as much.
const MAX_HEADER: u64 = 4 << 20;

/// Safetensors files of one model.
#[derive(Debug)]
pub(crate) struct Shards {
    files: Vec<Shard>,
    /// Tensor to file.
    names: BTreeMap<String, usize>,
    /// Written by this program.
    own: bool,
}

#[derive(Debug)]
struct Shard {
    map: Mapped,
    header: Metadata,
    /// Where the tensors begin.
    data_start: usize,
}

impl Shards {
    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// A file that is missing, truncated, or no safetensors file; a tensor that is in two of them.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self> {
        let name = |file: usize| paths[file].file_name().unwrap_or_default().to_string_lossy();
        let mut shards = Self { files: Vec::new(), names: BTreeMap::new(), own: false };
        for (index, path) in paths.iter().enumerate() {
            let shard = Shard::open(path)?;
            for tensor in shard.header.offset_keys() {
                if let Some(before) = shards.names.insert(tensor.clone(), index) {
                    bail!("tensor {tensor} is in {} and in {}: which of them is meant?", name(before), name(index));
                }
            }
            shards.files.push(shard);
        }
        Ok(shards)
    }

    /// The same of the files of our own checkpoint; `belongs` says which of them a tensor is looked for in.
    ///
    /// # Errors
    /// A file that is missing, truncated, or no safetensors file.
    pub(crate) fn open_own(paths: &[PathBuf], belongs: fn(&str) -> usize) -> Result<Self> {
        let files: Vec<Shard> = paths.iter().map(|path| Shard::open(path)).collect::<Result<_>>()?;
        let names =
            files.iter().enumerate().flat_map(|(i, file)| file.header.offset_keys().into_iter().map(move |n| (n, i)));
        let names = names.filter(|(name, i)| *i == belongs(name)).collect();
        Ok(Self { files, names, own: true })
    }

    /// Everything, in the order in which it is stored: name, kind, shape.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (String, Kind, Vec<usize>)> {
        self.files.iter().flat_map(|file| {
            file.header.offset_keys().into_iter().filter_map(|name| {
                let info = file.header.info(&name)?;
                let kind = match info.dtype {
                    Dtype::I32 => Kind::I32,
                    Dtype::U32 => Kind::U32,
                    _ => Kind::Float,
                };
                Some((name, kind, info.shape.clone()))
            })
        })
    }

    /// True if there is a head of other numbers than the embedding's, which then counts, whatever the configuration
    /// says of it.
    pub(crate) fn has_own_head(&self) -> Result<bool> {
        if !self.contains(HEAD) {
            return Ok(false);
        }
        let [(_, head, head_bytes), (_, embedding, embedding_bytes)] = [self.find(HEAD)?, self.find(EMBEDDING)?];
        Ok((head.dtype, &head.shape, head_bytes) != (embedding.dtype, &embedding.shape, embedding_bytes))
    }

    /// A tensor as the files name it, and which of them has it.
    fn stored(&self, name: &str) -> Option<(&String, &usize)> {
        spellings(name).find_map(|name| self.names.get_key_value(&name))
    }

    fn find(&self, name: &str) -> Result<(&str, &TensorInfo, &[u8])> {
        let missing = || format!("tensor {name} is missing");
        let (name, &file) = self.stored(name).with_context(missing)?;
        let file = &self.files[file];
        let info = file.header.info(name).with_context(missing)?;
        let (start, end) = info.data_offsets;
        Ok((name, info, &file.map[file.data_start + start..file.data_start + end]))
    }
}

impl TensorSet for Shards {
    fn contains(&self, name: &str) -> bool {
        self.stored(name).is_some()
    }

    fn check(&self, Expected { name, shape, kind }: &Expected) -> Result<()> {
        let (name, info, _) = self.find(name)?;
        let (dtype, found) = (info.dtype, &info.shape);
        if self.own {
            let wanted = if *kind == Kind::Float { format!("{dtype:?}") } else { format!("{kind:?}") };
            ensure!(found == shape, "{name} is {dtype:?} {found:?}, {wanted} {shape:?} is expected, make it again");
        }
        ensure_kind(name, info, *kind)?;
        ensure!(found == shape, "tensor {name} has shape {found:?}, {shape:?} is expected");
        Ok(())
    }

    fn floats(&self, name: &str) -> Result<Floats<'_>> {
        let (name, info, _) = self.find(name)?;
        let values = self.thresholds(name)?;
        values.ensure_tensor_is_finite(name, &info.shape)?;
        Ok(values)
    }

    fn thresholds(&self, name: &str) -> Result<Floats<'_>> {
        let (name, info, bytes) = self.find(name)?;
        ensure_kind(name, info, Kind::Float)?;
        Ok(match info.dtype {
            Dtype::F16 => Floats::F16(numbers(bytes)),
            Dtype::BF16 => Floats::Bf16(numbers(bytes)),
            _ => Floats::F32(numbers(bytes)),
        })
    }

    fn words(&self, name: &str) -> Result<Cow<'_, [u32]>> {
        let (name, info, bytes) = self.find(name)?;
        ensure!(
            matches!(info.dtype, Dtype::I32 | Dtype::U32),
            "tensor {name} has type {:?}, I32 or U32 is expected",
            info.dtype
        );
        Ok(numbers(bytes))
    }
}

fn ensure_kind(name: &str, info: &TensorInfo, kind: Kind) -> Result<()> {
    let (fits, expected) = match kind {
        Kind::I32 => (info.dtype == Dtype::I32, "I32"),
        Kind::U32 => (info.dtype == Dtype::U32, "U32"),
        Kind::Float => (matches!(info.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32), "F16, BF16 or F32"),
    };
    ensure!(fits, "tensor {name} has type {:?}, {expected} is expected", info.dtype);
    Ok(())
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let damaged = || format!("{}: truncated or no safetensors file, get or make it again", path.display());
        let (header, data_start) = header(&map).with_context(damaged)?;
        Ok(Self { map, header, data_start })
    }
}

/// What a tensor may be called: the decoder of a model that sees images is a part among others.
fn spellings(name: &str) -> impl Iterator<Item = String> {
    let inside = name.strip_prefix("model.").map(|rest| format!("model.language_model.{rest}"));
    [Some(name.to_owned()), Some(format!("language_model.{name}")), inside].into_iter().flatten()
}

/// The header of a safetensors file and the byte at which its tensors begin.
fn header(file: &[u8]) -> Result<(Metadata, usize)> {
    if let Some(len) = file.first_chunk::<8>() {
        let len = u64::from_le_bytes(*len);
        ensure!(len <= MAX_HEADER, "a header of {len} bytes, at most {MAX_HEADER} are expected");
    }
    let (len, header) = SafeTensors::read_metadata(file)?;
    Ok((header, len + size_of::<u64>()))
}

/// Little-endian bytes as numbers: borrowed where their place in the file allows, else copied.
pub(crate) fn numbers<T: bytemuck::Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(values) => Cow::Borrowed(values),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}
