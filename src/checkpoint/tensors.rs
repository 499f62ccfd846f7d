//! One safetensors file, written in one pass.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Result, anyhow};
use safetensors::tensor::Dtype;

use crate::files;
use crate::format::{Floats, Kind, Numbers};
use crate::mapped;

/// One tensor on its way into a file.
#[derive(Debug)]
pub(super) struct Named<'a> {
    pub(super) name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    numbers: Numbers<'a>,
}

impl<'a> Named<'a> {
    /// Numbers in the type that they have.
    pub(super) fn new(name: String, kind: Kind, shape: &[usize], numbers: Numbers<'a>) -> Self {
        let dtype = match (&numbers, kind) {
            (Numbers::Words(_), Kind::U32) => Dtype::U32,
            (Numbers::Words(_), _) => Dtype::I32,
            (Numbers::Floats(Floats::F16(_)), _) => Dtype::F16,
            (Numbers::Floats(Floats::Bf16(_)), _) => Dtype::BF16,
            (Numbers::Floats(Floats::F32(_)), _) => Dtype::F32,
        };
        Self { name, dtype, shape: shape.to_vec(), numbers }
    }

    /// Floating-point numbers.
    pub(super) fn floats(name: String, shape: &[usize], values: &'a Floats<'_>) -> Self {
        Self::new(name, Kind::Float, shape, Numbers::Floats(values.borrowed()))
    }

    /// A list of single-precision numbers.
    pub(super) fn list(name: String, values: &'a [f32]) -> Self {
        Self::new(name, Kind::Float, &[values.len()], Numbers::Floats(Floats::F32(Cow::Borrowed(values))))
    }
}

/// Writes `tensors` to `path` and waits until the disk has them.
///
/// # Errors
/// Whatever the disk says; a full one is named as such, with the bytes that were wanted.
pub(super) fn write(path: &Path, mut tensors: Vec<Named<'_>>) -> Result<()> {
    // Widest type first, then by name: every tensor starts at a multiple of its type, and the same tensors
    // always give the same file.
    tensors.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for tensor in &tensors {
        let start = end;
        end += tensor.numbers.as_bytes().len();
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
            file.write_all(tensor.numbers.as_bytes())?;
        }
        file.into_inner()?.sync_all()
    };
    write().map_err(|e| {
        mapped::name_what_is_lost(&e, tensors.iter().map(|tensor| tensor.numbers.as_bytes()));
        write_error(e, path, bytes)
    })
}

/// What to say when `path`, `bytes` long, could not be written.
pub(super) fn write_error(error: std::io::Error, path: &Path, bytes: usize) -> anyhow::Error {
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
    use crate::tensors::{Expected, Shards, TensorSet};

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let (words, values) = ([1u32, u32::MAX, 3], [0.5f32, -0.0]);
        let halves = Floats::from(vec![half::f16::ONE; 3]);
        let tensors = vec![
            Named::floats("h".into(), &[3], &halves),
            Named::new("w".into(), Kind::I32, &[3, 1], Numbers::Words(Cow::Borrowed(&words))),
            Named::list("f".into(), &values),
        ];
        write(&path, tensors).unwrap();
        let open = || Shards::open(std::slice::from_ref(&path));
        let read = open().unwrap();
        assert_eq!(*read.words("w").unwrap(), words);
        assert_eq!(*read.floats("f").unwrap().to_f32(), values);
        assert_eq!(read.floats("h").unwrap(), halves);
        assert_eq!(read.iter().count(), 3);
        let check = |name: &str, shape: &[usize], kind| {
            read.check(&Expected { name: name.into(), shape: shape.to_vec(), kind }).map_err(|e| e.to_string())
        };
        check("w", &[3, 1], Kind::I32).unwrap();
        assert!(check("w", &[3, 1], Kind::U32).unwrap_err().contains("type I32, U32 is expected"));
        assert!(check("f", &[3], Kind::Float).unwrap_err().contains("shape [2], [3] is expected"));
        assert!(check("g", &[2], Kind::Float).unwrap_err().contains("g is missing"));
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 7, 40, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            let message = format!("{:#}", open().unwrap_err());
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
