//! The cache on disk, in the layout of Python's `huggingface_hub`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{ModelName, choice, name};
use crate::files::{self, Lock};

/// Bytes of a file that says which commit a revision is.
const MAX_REF: u64 = 200;

/// How often a file that another program downloads is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// The files of one model.
pub(super) struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, model: &ModelName) -> Self {
        let folder = format!("models--{}", model.repository().replace('/', "--"));
        Self { root: cache.join(&folder), locks: cache.join(".locks").join(folder) }
    }

    /// The directory of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Where contents lie.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Whether a file of a commit is there, and not only a link that leads nowhere.
    pub(super) fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).is_file()
    }

    /// The right to download these contents, as Python's library takes it too; waits for whoever has it.
    pub(super) fn lock(&self, etag: &str, file: &str) -> Result<Lock> {
        files::make_directory(&self.locks)?;
        files::make_directory(&self.root.join("blobs"))?;
        let path = self.locks.join(format!("{etag}.lock"));
        let mut told = false;
        loop {
            if let Some(lock) = Lock::take(&path)? {
                return Ok(lock);
            }
            if !told {
                tracing::info!("another program downloads {file}, waiting for it");
                told = true;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Lets a file of a commit have these contents.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let place = self.snapshot(commit);
        files::make_directory(&place)?;
        let link = place.join(file);
        let cannot = || format!("cannot create {}", link.display());
        // Whatever is there leads nowhere, or the file would not have been asked for.
        let aside = place.join(format!(".{file}.{}", std::process::id()));
        let _ = fs::remove_file(&aside);
        #[cfg(unix)]
        std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), &aside).with_context(cannot)?;
        #[cfg(not(unix))]
        fs::copy(self.blob(etag), &aside).map(drop).with_context(cannot)?;
        files::rename(&aside, &link).with_context(cannot)
    }

    /// Keeps which commit a revision is.
    pub(super) fn point(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|kept| kept == commit) {
            return Ok(());
        }
        files::make_directory(path.parent().context("a revision has a name")?)?;
        files::replace(&path, |aside| Ok(fs::write(aside, commit)?))
    }

    /// The directory of what is kept of a revision, if nothing that this program reads is missing.
    ///
    /// # Errors
    /// Nothing, or not everything, is kept.
    pub(super) fn whole(&self, model: &ModelName) -> Result<PathBuf> {
        let pointer = self.root.join("refs").join(model.revision());
        let commit = match files::read_if_there(&pointer, MAX_REF) {
            Ok(Some(commit)) => String::from_utf8_lossy(&commit).trim().to_owned(),
            _ => model.revision().to_owned(),
        };
        let place = self.snapshot(&commit);
        if !name::is_plain(&commit) || !place.is_dir() {
            bail!("{model} is not in the cache {}", self.root.parent().unwrap_or(&self.root).display());
        }
        let entries = fs::read_dir(&place).with_context(|| format!("cannot read {}", place.display()))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let listed: BTreeSet<String> = names.filter(|file| self.has(&commit, file)).collect();
        let incomplete = || format!("{model} is not whole in the cache");
        for file in ["config.json", "tokenizer.json"] {
            if !listed.contains(file) {
                bail!("{}: {file} is missing", incomplete());
            }
        }
        choice::weights(&listed, &place).with_context(incomplete)?;
        Ok(place)
    }
}
