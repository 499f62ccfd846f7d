//! One safetensors file: read from a memory map, written in one pass.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, ensure};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use crate::files;
use crate::format::Floats;
use crate::mapped::{self, Mapped};

/// Bytes of a header; that of a model with 10,000 tensors has 1.5 MB. Parsed, they take up to 12 times as much.
const MAX_HEADER: u64 = 4 << 20;

/// The header of a safetensors file and the byte at which its tensors begin.
///
/// # Errors
/// A header that is too long, is no JSON, or promises other tensors than the file has bytes for.
pub(crate) fn header(file: &[u8]) -> Result<(Metadata, usize)> {
    if let Some(len) = file.first_chunk::<8>() {
        let len = u64::from_le_bytes(*len);
        ensure!(len <= MAX_HEADER, "a header of {len} bytes, at most {MAX_HEADER} are expected");
    }
    let (len, header) = SafeTensors::read_metadata(file)?;
    Ok((header, len + size_of::<u64>()))
}

/// A memory-mapped safetensors file; every read is checked against the header.
#[derive(Debug)]
pub(crate) struct Tensors {
    path: PathBuf,
    map: Mapped,
    header: Metadata,
    data: usize, // byte at which the tensors begin
}

impl Tensors {
    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// A file that is missing, truncated, or no safetensors file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let (header, data) =
            header(&map).map_err(|e| anyhow!("{} is damaged or cut short ({e}), make it again", path.display()))?;
        Ok(Self { path: path.to_owned(), map, header, data })
    }

    /// True if there is a tensor of this name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// All tensors in the order in which they are stored, as they would be written again.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.header.offset_keys().into_iter().filter_map(|name| {
            let info = self.header.info(&name)?;
            let (start, end) = info.data_offsets;
            let bytes = Cow::Borrowed(&self.map[self.data + start..self.data + end]);
            Some(Tensor { name, dtype: info.dtype, shape: info.shape.clone(), bytes })
        })
    }

    /// Numbers of the type `dtype` and of this shape.
    fn typed<T: bytemuck::AnyBitPattern>(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[T]> {
        let info = self.header.info(name).ok_or_else(|| self.missing(name))?;
        ensure!(
            info.dtype == dtype && info.shape == shape,
            "{}: {name} is {:?} {:?}, {dtype:?} {shape:?} is expected",
            self.path.display(),
            info.dtype,
            info.shape
        );
        let (start, end) = info.data_offsets;
        bytemuck::try_cast_slice(&self.map[self.data + start..self.data + end])
            .map_err(|_| anyhow!("{}: {name} is not aligned to its type, make the file again", self.path.display()))
    }

    /// Bit patterns, stored as `dtype` (I32 or U32).
    pub(crate) fn words(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u32]> {
        self.typed(name, dtype, shape)
    }

    /// Single-precision numbers.
    pub(crate) fn f32(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        self.typed(name, Dtype::F32, shape)
    }

    /// Floating-point numbers in whatever type they are stored.
    pub(crate) fn floats(&self, name: &str, shape: &[usize]) -> Result<Floats<'_>> {
        match self.header.info(name).map(|info| info.dtype) {
            Some(Dtype::F16) => {
                let bits: &[u16] = self.typed(name, Dtype::F16, shape)?;
                Ok(Floats::F16(Cow::Borrowed(bits.reinterpret_cast())))
            }
            Some(Dtype::BF16) => {
                let bits: &[u16] = self.typed(name, Dtype::BF16, shape)?;
                Ok(Floats::Bf16(Cow::Borrowed(bits.reinterpret_cast())))
            }
            _ => self.f32(name, shape).map(|v| Floats::F32(Cow::Borrowed(v))),
        }
    }

    fn missing(&self, name: &str) -> anyhow::Error {
        anyhow!("{}: there is no {name}, make the checkpoint again", self.path.display())
    }
}

/// One tensor on its way into a file.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl<'a> Tensor<'a> {
    /// Bit patterns, stored as `dtype` (I32 or U32).
    pub(crate) fn words(name: String, dtype: Dtype, shape: &[usize], words: &'a [u32]) -> Self {
        Self { name, dtype, shape: shape.to_vec(), bytes: Cow::Borrowed(bytemuck::cast_slice(words)) }
    }

    /// Single-precision numbers.
    pub(crate) fn f32(name: String, shape: &[usize], values: &'a [f32]) -> Self {
        Self { name, dtype: Dtype::F32, shape: shape.to_vec(), bytes: Cow::Borrowed(bytemuck::cast_slice(values)) }
    }

    /// Floating-point numbers in the type that they have.
    pub(crate) fn floats(name: String, shape: &[usize], values: &'a Floats<'_>) -> Self {
        let (dtype, bytes) = match values {
            Floats::F16(v) => (Dtype::F16, bytemuck::cast_slice(v.reinterpret_cast())),
            Floats::Bf16(v) => (Dtype::BF16, bytemuck::cast_slice(v.reinterpret_cast())),
            Floats::F32(v) => (Dtype::F32, bytemuck::cast_slice(v)),
        };
        Self { name, dtype, shape: shape.to_vec(), bytes: Cow::Borrowed(bytes) }
    }
}

/// Writes `tensors` to `path` and waits until the disk has them.
///
/// # Errors
/// Whatever the disk says; a full one is named as such, with the bytes that were wanted.
pub(crate) fn write(path: &Path, mut tensors: Vec<Tensor<'_>>) -> Result<()> {
    // Widest type first, then by name: every tensor starts at a multiple of its type, and the same tensors
    // always give the same file.
    tensors.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for tensor in &tensors {
        let start = end;
        end += tensor.bytes.len();
        let entry = serde_json::json!({
            "dtype": format!("{:?}", tensor.dtype), "shape": tensor.shape, "data_offsets": [start, end],
        });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let bytes = 8 + header.len() + end;
    let write = || -> std::io::Result<()> {
        files::step();
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for tensor in &tensors {
            file.write_all(&tensor.bytes)?;
        }
        file.into_inner()?.sync_all()
    };
    write().map_err(|e| {
        mapped::name_what_is_lost(&e, tensors.iter().map(|tensor| &*tensor.bytes));
        write_error(e, path, bytes)
    })
}

/// What to say when `path`, `bytes` long, could not be written.
pub(crate) fn write_error(error: std::io::Error, path: &Path, bytes: usize) -> anyhow::Error {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let full = matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge);
    let what = format!("cannot write {} ({:.1} MiB)", path.display(), bytes as f64 / f64::from(1 << 20));
    match full {
        true => anyhow!("{what}: {error}; free some space or choose another --out, the same command goes on from here"),
        false => anyhow!("{what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let (words, values) = ([1u32, u32::MAX, 3], [0.5f32, -0.0]);
        let halves = Floats::from(vec![half::f16::ONE; 3]);
        let tensors = vec![
            Tensor::floats("h".into(), &[3], &halves),
            Tensor::words("w".into(), Dtype::I32, &[3, 1], &words),
            Tensor::f32("f".into(), &[2], &values),
        ];
        write(&path, tensors).unwrap();
        let read = Tensors::open(&path).unwrap();
        assert_eq!(read.words("w", Dtype::I32, &[3, 1]).unwrap(), words);
        assert_eq!(read.f32("f", &[2]).unwrap(), values);
        assert_eq!(read.floats("h", &[3]).unwrap(), halves);
        assert_eq!(read.iter().count(), 3);
        assert!(read.words("w", Dtype::U32, &[3, 1]).unwrap_err().to_string().contains("U32 [3, 1] is expected"));
        assert!(read.f32("f", &[3]).is_err() && read.f32("g", &[2]).is_err());
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 7, 40, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            let message = format!("{:#}", Tensors::open(&path).unwrap_err());
            assert!(message.contains("t.safetensors"), "{message}");
        }
    }

    #[test]
    fn a_full_disk_is_named() {
        let error = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let message = write_error(error, Path::new("m"), 3 << 20).to_string();
        assert!(message.contains("3.0 MiB") && message.contains("--out"), "{message}");
    }
}
