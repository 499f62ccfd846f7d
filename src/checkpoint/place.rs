//! Where a checkpoint is made, and how it takes the place of another: `OUT.partial` beside the target `OUT`.
//!
//! `OUT` is what it was, or what it is to be, at every moment: the two directories change places in one step. Only
//! files that this program writes are ever removed. Whatever else is in either directory is someone's, and is named
//! in a refusal before any work is done.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::tensors::write_error;
use super::{BITWIDTHS, CONFIG, Checkpoint, MODEL, RESIDUALS, THRESHOLDS};
use crate::files::{self, Lock};
use crate::tokenizer::TextFiles;

/// What the job is; the last file of a job that goes, since it says that the others are ours.
const KEY: &str = "job.txt";
/// In place of a key: nothing to go on with.
const NO_JOB: &str = "finished";
const LOCK: &str = "job.lock";
/// The finished checkpoint before it moves, and the one that it replaced after.
const RESULT: &str = "checkpoint";
/// The one that it replaced, where directories cannot change places.
const REPLACED: &str = "replaced";
/// What `decdec tune --save` leaves in a checkpoint; it is of the checkpoint that it was tuned for.
const TUNED: &str = "tuned.json";
/// What `decdec eval perplexity --write-weights` leaves there.
const KL_WEIGHTS: &str = "kl_weights.json";

/// The place of a checkpoint in the making; nobody else's while this value lives.
#[derive(Debug)]
pub(super) struct Place {
    out: PathBuf,
    partial: PathBuf,
    overwrite: bool,
    _lock: Lock,
}

/// Checks that a checkpoint can be made at `out`; `overwrite` allows to replace one.
///
/// # Errors
/// Something that is no checkpoint, or holds what is not of one; a place that cannot be moved to.
pub(super) fn ensure_free(out: &Path, overwrite: bool) -> Result<()> {
    let out = files::resolve(out)?;
    ensure_replaceable(&out, overwrite)?;
    let beside = parent(&out);
    ensure!(
        !beside.is_dir() || is_writable(&beside),
        "{} is not writable, but unfinished work is kept beside --out: choose another --out",
        beside.display()
    );
    Ok(())
}

impl Place {
    /// Takes the place beside `out`, with what an interrupted job of the same `key` has left there; what another one
    /// has left is discarded.
    ///
    /// # Errors
    /// As [`ensure_free`]; another process is at it.
    pub(super) fn take(out: &Path, key: &str, overwrite: bool) -> Result<Self> {
        let out = files::resolve(out)?;
        let name = out.file_name().with_context(|| format!("{} names no directory", out.display()))?;
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = out.with_file_name(partial);
        ensure_ours(&partial)?;
        // Under its lock if there has been work, so that nobody is moving either directory.
        let held = if partial.is_dir() { Some(lock(&partial)?) } else { None };
        bring_back(&partial, &out)?;
        ensure_replaceable(&out, overwrite)?;
        let held = match held {
            Some(held) => held,
            None => {
                files::make_directory(&partial)?;
                lock(&partial)?
            }
        };
        let place = Self { out, partial, overwrite, _lock: held };
        if let Some(found) = fs::read_to_string(place.file(KEY)).ok().filter(|found| found != key) {
            if found != NO_JOB {
                tracing::warn!("{} is from another job, it is discarded", place.partial.display());
            }
            place.clear()?;
        }
        place.keep("txt", key.as_bytes())?;
        Ok(place)
    }

    /// A file of the job.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Keeps `job.NAME`, atomically.
    pub(super) fn keep(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, new) = (self.file(&format!("job.{name}")), self.file(&format!("job.{name}.new")));
        let written = files::write(&new, bytes).and_then(|()| self.name(&new, &path));
        written.map_err(|e| write_error(e, &path, bytes.len()))
    }

    /// What [`Place::keep`] kept under that name.
    pub(super) fn kept(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.file(&format!("job.{name}"))).ok()
    }

    /// Gives a file that is on the disk its name, and waits until the disk knows it.
    pub(super) fn name(&self, new: &Path, path: &Path) -> std::io::Result<()> {
        files::rename(new, path)?;
        files::sync_directory(&self.partial)
    }

    /// An empty directory for the finished checkpoint.
    pub(super) fn result(&self) -> Result<PathBuf> {
        let dir = self.file(RESULT);
        discard(&dir)?;
        files::make_directory(&dir)?;
        Ok(dir)
    }

    /// Moves the finished checkpoint to the target, and removes the job.
    pub(super) fn put(self) -> Result<()> {
        let new = self.file(RESULT);
        files::sync_all(&new).with_context(|| format!("cannot write {}", new.display()))?;
        // It may have changed since the job began.
        ensure_replaceable(&self.out, self.overwrite)?;
        self.replace(&new)?;
        for directory in [&self.partial, &parent(&self.out)] {
            files::sync_directory(directory).with_context(|| format!("cannot write {}", directory.display()))?;
        }
        let partial = self.partial.clone();
        // The checkpoint is in its place: whatever stays behind is no reason to call it failed.
        match self.remove() {
            Ok(true) => {}
            Ok(false) => tracing::warn!("{} is done with, but holds something else: it stays", partial.display()),
            Err(error) => tracing::warn!("the checkpoint is in its place, but {error:#}"),
        }
        Ok(())
    }

    /// Removes the directory of the job; false if someone else's files are in it.
    fn remove(self) -> Result<bool> {
        self.clear()?;
        let Self { partial, _lock, .. } = self;
        drop(_lock);
        files::remove_ours(&partial, is_of_job)
    }

    /// Renames `new` to the target. What was there changes places with it, so that at no time nothing is there; on file
    /// systems that cannot do that, it is moved away first, and comes back if the program is killed then and run again.
    fn replace(&self, new: &Path) -> Result<()> {
        let context = || format!("cannot rename {} to {}", new.display(), self.out.display());
        if !self.out.exists() {
            return files::rename(new, &self.out).with_context(context);
        }
        files::copy_permissions(&self.out, new).with_context(context)?;
        if files::exchange(new, &self.out) {
            return Ok(());
        }
        let old = self.file(REPLACED);
        discard(&old)?;
        files::rename(&self.out, &old).with_context(|| format!("cannot move {} away", self.out.display()))?;
        files::rename(new, &self.out).or_else(|e| files::rename(&old, &self.out).and(Err(e))).with_context(context)
    }

    /// Empties the directory of the job, the lock excepted. The key goes last, and is no job's key until then: a program
    /// that is killed here leaves nothing that another one would go on with.
    fn clear(&self) -> Result<()> {
        self.keep("txt", NO_JOB.as_bytes())?;
        discard(&self.file(RESULT))?;
        discard(&self.file(REPLACED))?;
        let remove = || -> std::io::Result<()> {
            for entry in fs::read_dir(&self.partial)? {
                let entry = entry?;
                let name = entry.file_name();
                let ours = name.to_str().is_some_and(|name| is_of_job(name, entry.path().is_dir()));
                if ours && name != LOCK && name != KEY {
                    files::remove_file(&entry.path())?;
                }
            }
            files::remove_file(&self.file(KEY))
        };
        remove().with_context(|| format!("cannot empty {}", self.partial.display()))
    }
}

/// The files of a checkpoint.
fn is_of_checkpoint(name: &str, is_directory: bool) -> bool {
    let own = [CONFIG, MODEL, RESIDUALS, THRESHOLDS, BITWIDTHS, TUNED, KL_WEIGHTS];
    !is_directory && (own.contains(&name) || TextFiles::NAMES.contains(&name))
}

/// What a job leaves while it is on its way.
fn is_of_job(name: &str, is_directory: bool) -> bool {
    match is_directory {
        true => [RESULT, REPLACED].contains(&name),
        false => name.starts_with("job.") || name.starts_with("layer-"),
    }
}

/// Only a checkpoint of ours and nothing else, or nothing, is ever replaced.
fn ensure_replaceable(out: &Path, overwrite: bool) -> Result<()> {
    let Ok(existing) = fs::symlink_metadata(out) else { return Ok(()) };
    let at = out.display();
    let empty = existing.is_dir() && fs::read_dir(out).is_ok_and(|mut files| files.next().is_none());
    ensure!(
        empty || Checkpoint::is_at(out),
        "{at} exists and is not a decdec checkpoint, it will not be replaced: choose another --out"
    );
    ensure!(empty || overwrite, "{at} exists, use --overwrite to replace it, or choose another --out");
    let strangers = files::strangers(out, is_of_checkpoint)?;
    ensure!(
        strangers.is_empty(),
        "{at} holds what decdec did not write ({}), replacing the checkpoint would remove it: move it away or choose \
         another --out",
        files::some_of(&strangers)
    );
    let here = std::env::current_dir().and_then(fs::canonicalize);
    ensure!(
        !here.is_ok_and(|here| here == out),
        "{at} is the current directory, which cannot change places with the finished one: run decdec from elsewhere or \
         choose another --out"
    );
    ensure!(
        !is_mount_point(out),
        "{at} is a mount point, which cannot change places with the finished one: choose a directory in it, such as \
         --out {}",
        out.join("model").display()
    );
    ensure!(
        is_writable(out),
        "{at} is not writable, so it cannot be replaced: change its permissions or choose another --out"
    );
    Ok(())
}

/// False if the system says that nothing can be made in `directory`.
fn is_writable(directory: &Path) -> bool {
    #[cfg(target_os = "linux")]
    return rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_ok();
    #[cfg(not(target_os = "linux"))]
    {
        let _ = directory;
        true
    }
}

/// True if another file system, or another part of one, begins at `directory`.
fn is_mount_point(directory: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        if let Ok(found) = statx(CWD, directory, AtFlags::empty(), StatxFlags::BASIC_STATS) {
            return found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        }
    }
    device(directory) != device(&parent(directory))
}

/// The file system of a place, if the system tells.
fn device(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    return fs::metadata(path).ok().map(|m| std::os::unix::fs::MetadataExt::dev(&m));
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap_or(path).to_owned()
}

/// The directory of a job is emptied in the end, and what is made in it is moved: it must not be one that someone else
/// has put something into, nor be somewhere else.
fn ensure_ours(partial: &Path) -> Result<()> {
    let elsewhere = partial.is_symlink() || partial.is_dir() && is_mount_point(partial);
    ensure!(
        !elsewhere,
        "{} is needed for unfinished work, but leads to another place: move it away or choose another --out",
        partial.display()
    );
    let strangers = files::strangers(partial, is_of_job)?;
    ensure!(
        strangers.is_empty(),
        "{} is needed for unfinished work, but holds something else ({}): move it away or choose another --out",
        partial.display(),
        files::some_of(&strangers)
    );
    Ok(())
}

fn lock(partial: &Path) -> Result<Lock> {
    Lock::take(&partial.join(LOCK))?.with_context(|| {
        format!("another process is writing {}, wait for it or choose another --out", partial.display())
    })
}

/// Removes a checkpoint of ours, if there is one. What else is in it came while it was replaced, and is named.
fn discard(checkpoint: &Path) -> Result<()> {
    if files::remove_ours(checkpoint, is_of_checkpoint)? {
        return Ok(());
    }
    let strangers = files::strangers(checkpoint, is_of_checkpoint)?;
    bail!(
        "{} was replaced, but now holds {}: move that to where it belongs",
        checkpoint.display(),
        files::some_of(&strangers)
    )
}

/// Brings back what a program was killed while replacing.
fn bring_back(partial: &Path, out: &Path) -> Result<()> {
    let old = partial.join(REPLACED);
    if !out.exists() && Checkpoint::is_at(&old) {
        let cannot = || format!("cannot move {} back to {}", old.display(), out.display());
        files::rename(&old, out).with_context(cannot)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
