//! A model in several files, `NAME-00001-of-00003.gguf` and so on: the first has the metadata, all have tensors.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::file::File;
use crate::source::archive;

/// Files of one model; those of 405 billion weights have some 20.
const MAX_FILES: u64 = 1 << 10;

/// Opens a model's file, and those that belong to it.
pub(super) fn open(path: &Path) -> Result<Vec<File>> {
    let first = File::parse(archive::open(path)?)?;
    let Some(count) = first.integer("split.count")?.filter(|&count| count > 1) else { return Ok(vec![first]) };
    ensure!(count <= MAX_FILES, "split.count is {count}, at most {MAX_FILES} files are expected");
    let number = first.integer("split.no")?.unwrap_or(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let end = |number: u64| format!("-{:05}-of-{count:05}.gguf", number + 1);
    let Some(stem) = name.strip_suffix(&end(number)) else {
        bail!("it is file {} of the {count} of a model, a name that ends in {} is expected", number + 1, end(number));
    };
    ensure!(number == 0, "it is file {} of the {count} of a model: give the first, {stem}{}", number + 1, end(0));
    let tensors = first.integer("split.tensors.count")?;
    let mut files = vec![first];
    for number in 1..count {
        let name = format!("{stem}{}", end(number));
        let file = archive::open(&path.with_file_name(&name)).and_then(File::parse);
        let file = file.with_context(|| format!("file {} of {count}, {name}", number + 1))?;
        let (own, of) = (file.integer("split.no")?, file.integer("split.count")?);
        ensure!(
            (own, of) == (Some(number), Some(count)),
            "{name} has split.no {} and split.count {}, {number} and {count} are expected: it is of another model",
            own.map_or("missing".into(), |own| own.to_string()),
            of.map_or("missing".into(), |of| of.to_string())
        );
        if let Some(twice) = file.names().find(|name| files.iter().any(|other: &File| other.tensor(name).is_some())) {
            bail!("tensor {twice} is in {name} and in a file before it");
        }
        files.push(file);
    }
    let found: usize = files.iter().map(|file| file.names().count()).sum();
    if let Some(tensors) = tensors.filter(|&tensors| tensors != found as u64) {
        bail!("the {count} files have {found} tensors, split.tensors.count says {tensors}");
    }
    Ok(files)
}
