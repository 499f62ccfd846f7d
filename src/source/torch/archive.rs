//! The directory of a ZIP archive of stored entries, as `torch.save` writes it, ZIP64 included.
//!
//! Only what says where an entry's bytes lie is read, straight from the map, and every range is checked. The
//! layout is PKWARE's APPNOTE, sections 4.3.7 (local header), 4.3.12 (central header) and 4.3.14 to 4.3.16
//! (end records).

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

/// Entries of an archive; the largest published models have a few thousand tensors.
const MAX_ENTRIES: usize = 1 << 16;

/// The directory of those: some 100 bytes for each.
const MAX_DIRECTORY: u64 = 8 << 20;

const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const END64_LOCATOR: u32 = 0x0706_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// Where each entry of an archive lies in its file.
#[derive(Debug)]
pub(super) struct Archive {
    entries: HashMap<String, Range<usize>>,
    prefix: String,
}

/// Fixed-size little-endian fields of a record.
#[derive(Clone, Copy)]
struct Record<'a>(&'a [u8]);

impl<'a> Record<'a> {
    /// The `len` bytes at `at`, which must open with `signature`.
    fn at(file: &'a [u8], at: u64, len: usize, signature: u32, what: &str) -> Result<Self> {
        let bytes = usize::try_from(at).ok().and_then(|at| file.get(at..)?.get(..len));
        let size = file.len();
        let record = Self(bytes.with_context(|| {
            format!("zip: the {what} at byte {at} lies beyond the file's {size} bytes: is it truncated?")
        })?);
        let found = record.u32(0);
        ensure!(found == signature, "zip: {found:#010x} at byte {at}, a {what} ({signature:#010x}) is expected there");
        Ok(record)
    }

    fn u16(self, at: usize) -> usize {
        usize::from(u16::from_le_bytes([self.0[at], self.0[at + 1]]))
    }

    fn u32(self, at: usize) -> u32 {
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn u64(self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }
}

/// What the end records say: entries, and where the central directory lies.
pub(in crate::source) struct End {
    entries: u64,
    directory: Range<u64>,
}

impl Archive {
    /// Reads the directory of the archive `file`.
    pub(super) fn read(file: &[u8]) -> Result<Self> {
        let end = End::find(file)?;
        let mut entries = HashMap::new();
        let mut at = end.directory.start;
        for _ in 0..end.entries {
            let (name, range, next) = entry(file, at, end.directory.start)?;
            ensure!(next <= end.directory.end, "zip: the directory runs past its end at byte {}", end.directory.end);
            at = next;
            let before = entries.insert(name.to_owned(), range);
            ensure!(before.is_none(), "zip: two entries are called {name:?}");
        }
        ensure_disjoint(&entries)?;
        let mut roots = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
        let prefix = roots.next().context("zip: no data.pkl inside, so torch.save did not write this file")?.to_owned();
        ensure!(roots.next().is_none(), "zip: several data.pkl inside, one is expected");
        Ok(Self { entries, prefix })
    }

    /// The bytes of entry `name`, below the archive's one folder.
    pub(super) fn find(&self, name: &str) -> Option<Range<usize>> {
        self.entries.get(&format!("{}/{name}", self.prefix)).cloned()
    }
}

impl End {
    /// Its place is checked, and that reading it takes no more memory than a directory of weights does.
    pub(in crate::source) fn find(file: &[u8]) -> Result<Self> {
        ensure!(
            file.starts_with(b"PK"),
            "not a zip archive, which torch.save writes since PyTorch 1.6: save the file again with a newer PyTorch"
        );
        // The record is the last thing in the file but for a comment, whose length it holds.
        let last = file.len().checked_sub(22).context("zip: 22 bytes at least are expected: is the file truncated?")?;
        let at = (last.saturating_sub(usize::from(u16::MAX))..=last).rev().find(|&at| {
            file[at..].starts_with(&END.to_le_bytes()) && Record(&file[at..]).u16(20) == file.len() - at - 22
        });
        let at = at.context("zip: no end of the directory found: is the file truncated?")?;
        let end = Record(&file[at..]);
        let locator = at.checked_sub(20).filter(|&at| file[at..].starts_with(&END64_LOCATOR.to_le_bytes()));
        let (entries, size, start, before) = if let Some(locator) = locator {
            let at = Record(&file[locator..]).u64(8);
            let end = Record::at(file, at, 56, END64, "zip64 end record")?;
            (end.u64(32), end.u64(40), end.u64(48), at)
        } else {
            (end.u16(10) as u64, u64::from(end.u32(12)), u64::from(end.u32(16)), at as u64)
        };
        let stop = start.checked_add(size).filter(|&stop| stop <= before);
        let stop = stop.with_context(|| {
            format!(
                "zip: a directory of {size} bytes at byte {start} does not end before its end record at byte {before}"
            )
        })?;
        ensure!(entries <= MAX_ENTRIES as u64, "zip: {entries} entries, at most {MAX_ENTRIES} are allowed");
        ensure!(size <= MAX_DIRECTORY, "zip: a directory of {size} bytes, at most {MAX_DIRECTORY} are allowed");
        Ok(Self { entries, directory: start..stop })
    }
}

/// The entry whose central header is at `at`: its name, its bytes, and where the next header starts.
fn entry(file: &[u8], at: u64, directory: u64) -> Result<(&str, Range<usize>, u64)> {
    let header = Record::at(file, at, 46, CENTRAL, "directory entry")?;
    let (name_len, extra_len, comment_len) = (header.u16(28), header.u16(30), header.u16(32));
    let variable = &file[at as usize + 46..];
    let (Some(name), Some(extra)) = (variable.get(..name_len), variable.get(name_len..name_len + extra_len)) else {
        bail!("zip: the directory entry at byte {at} is truncated");
    };
    let name = str::from_utf8(name).with_context(|| format!("zip: the name at byte {at} is not UTF-8"))?;
    ensure!(header.u16(8) & 1 == 0, "zip: entry {name:?} is encrypted");
    let method = header.u16(10);
    ensure!(method == 0, "zip: entry {name:?} is compressed (method {method}), torch.save stores entries as they are");
    let wide = Wide::read(header, extra).with_context(|| format!("zip: entry {name:?}"))?;
    ensure!(
        wide.size == wide.stored,
        "zip: entry {name:?} is stored in {} bytes but says it has {}",
        wide.stored,
        wide.size
    );
    let local = Record::at(file, wide.offset, 30, LOCAL, "local header")?;
    let local_name = file[wide.offset as usize + 30..].get(..local.u16(26));
    ensure!(local_name == Some(name.as_bytes()), "zip: entry {name:?} has another name in its local header");
    let start = wide.offset + 30 + (local.u16(26) + local.u16(28)) as u64;
    let stop = start.checked_add(wide.size).filter(|&stop| stop <= directory);
    let stop = stop.with_context(|| {
        format!("zip: entry {name:?}, {} bytes at byte {start}, runs into the directory at byte {directory}", wide.size)
    })?;
    Ok((name, start as usize..stop as usize, at + 46 + (name_len + extra_len + comment_len) as u64))
}

/// The three fields that move to a ZIP64 extra field when they do not fit 32 bits.
struct Wide {
    size: u64,
    stored: u64,
    offset: u64,
}

impl Wide {
    fn read(header: Record<'_>, extra: &[u8]) -> Result<Self> {
        let mut extra = zip64_extra(extra);
        let mut field = |at| match header.u32(at) {
            u32::MAX => {
                let (value, rest) = extra.split_at_checked(8).context("its zip64 field is missing or too short")?;
                extra = rest;
                Ok(Record(value).u64(0))
            }
            value => anyhow::Ok(u64::from(value)),
        };
        // This order is the extra field's.
        let (size, stored, offset) = (field(24)?, field(20)?, field(42)?);
        Ok(Self { size, stored, offset })
    }
}

/// The content of the ZIP64 extra field among `extra`, empty if there is none.
fn zip64_extra(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let (id, len) = (Record(head).u16(0), Record(head).u16(2));
        let Some((content, rest)) = rest.split_at_checked(len) else { break };
        if id == 1 {
            return content;
        }
        extra = rest;
    }
    &[]
}

/// Two entries over the same bytes are a trick, never what a writer of weights does.
fn ensure_disjoint(entries: &HashMap<String, Range<usize>>) -> Result<()> {
    let mut sorted: Vec<_> = entries.iter().filter(|(_, range)| !range.is_empty()).collect();
    sorted.sort_by_key(|(_, range)| range.start);
    for pair in sorted.windows(2) {
        let [(a, first), (b, second)] = pair else { continue };
        ensure!(
            first.end <= second.start,
            "zip: entries {a:?} and {b:?} overlap at byte {}, every entry has its own bytes",
            second.start
        );
    }
    Ok(())
}
