//! Writing to disk so that nobody ever sees half of it: not a reader, not a second writer, not the next run after a
//! kill or a power cut.
//!
//! Every change goes through a function of this file, so that tests can end the program between any two of them.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Links that are followed before a path is taken for a circle.
const MOST_LINKS: usize = 40;

/// The place that `path` stands for: links are followed, also one whose target does not exist yet.
///
/// # Errors
/// Links in a circle, or a place that cannot be looked at.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf> {
    let cannot = || format!("cannot find {}", path.display());
    let mut place = std::path::absolute(path).with_context(cannot)?;
    for _ in 0..MOST_LINKS {
        match fs::canonicalize(&place) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            found => return found.with_context(cannot),
        }
        match (fs::read_link(&place), place.parent()) {
            (Ok(target), Some(parent)) => place = parent.join(target),
            _ => return Ok(place),
        }
    }
    bail!("{} is a link that leads nowhere", path.display())
}

/// Lets `write` make a file aside, under a name of its own, and gives it the name `path` once the disk has it. What
/// was there is replaced as a whole or not at all; where `path` is a link, what it leads to is.
///
/// # Errors
/// What `write` says, and the disk.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let path = resolve(path)?;
    let directory = path.parent().with_context(cannot)?;
    let suffix = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    let mut aside = tempfile::Builder::new();
    aside.prefix(".decdec-").suffix(&suffix);
    #[cfg(unix)]
    aside.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as of any new file
    let aside = aside.tempfile_in(directory).with_context(cannot)?;
    write(aside.path()).with_context(cannot)?;
    aside.as_file().sync_all().with_context(cannot)?;
    step();
    aside.persist(&path).with_context(cannot)?;
    sync_directory(directory).with_context(cannot)
}

/// Makes a file of these bytes and waits until the disk has them.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    step();
    let mut file = File::create(path)?;
    let (first, second) = bytes.split_at(bytes.len() / 2);
    file.write_all(first)?;
    step();
    file.write_all(second)?;
    file.sync_all()
}

/// Waits until the disk has the names that are in a directory.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    if cfg!(windows) {
        return Ok(()); // directories are not files there
    }
    match File::open(directory)?.sync_all() {
        // Some network file systems cannot, and have no way to.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

/// Waits until the disk has the files in `directory`, and their names.
pub(crate) fn sync_all(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        File::open(entry?.path())?.sync_all()?;
    }
    sync_directory(directory)
}

/// Makes a directory and those above it.
pub(crate) fn make_directory(directory: &Path) -> Result<()> {
    step();
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

/// Gives `from` the name `to`, in one step.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step();
    fs::rename(from, to)
}

/// Lets two directories change places in one step, where the system and its file system can; false where not.
pub(crate) fn exchange(a: &Path, b: &Path) -> bool {
    step();
    #[cfg(test)]
    if kills::NO_EXCHANGE.get() {
        return false;
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        false
    }
}

/// The names in `directory` that are not `ours`, in order; none where there is no such directory.
///
/// # Errors
/// A directory that cannot be read.
pub(crate) fn strangers(directory: &Path, ours: impl Fn(&str, bool) -> bool) -> Result<Vec<String>> {
    let entries = entries(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let strange = |(entry, is_directory): (fs::DirEntry, bool)| {
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| ours(name, is_directory));
        (!is_ours).then(|| name.to_string_lossy().into_owned())
    };
    let mut strangers: Vec<_> = entries.into_iter().flatten().filter_map(strange).collect();
    strangers.sort_unstable();
    Ok(strangers)
}

/// What a directory holds, each with whether it is a directory itself; none where there is no such directory.
fn entries(directory: &Path) -> io::Result<Option<Vec<(fs::DirEntry, bool)>>> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let told = entries.map(|entry| entry.and_then(|entry| Ok((entry.file_type()?.is_dir(), entry))));
    told.map(|told| told.map(|(is_directory, entry)| (entry, is_directory))).collect::<io::Result<_>>().map(Some)
}

/// The first of `names`, for a message.
pub(crate) fn some_of(names: &[String]) -> String {
    const MOST: usize = 5;
    let more = names.len().saturating_sub(MOST);
    let shown = names[..names.len() - more].join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// Removes the files in `directory` that are `ours`, links but not what they lead to, and then the directory, unless
/// someone else's are left; true if it is gone.
pub(crate) fn remove_ours(directory: &Path, ours: impl Fn(&str, bool) -> bool) -> Result<bool> {
    let cannot = || format!("cannot empty {}", directory.display());
    let Some(entries) = entries(directory).with_context(cannot)? else { return Ok(true) };
    for (entry, is_directory) in entries {
        if !is_directory && entry.file_name().to_str().is_some_and(|name| ours(name, false)) {
            remove_file(&entry.path()).with_context(cannot)?;
        }
    }
    step();
    match fs::remove_dir(directory) {
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => Ok(false),
        result => result.map(|()| true).with_context(cannot),
    }
}

/// Removes a file, or a link without what it leads to.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    step();
    fs::remove_file(path)
}

/// Gives `to` the permissions of `from`.
pub(crate) fn copy_permissions(from: &Path, to: &Path) -> io::Result<()> {
    let permissions: Permissions = fs::metadata(from)?.permissions();
    fs::set_permissions(to, permissions)
}

/// The right to write to a place, for as long as this value lives; the program's end gives it back, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock that is the file `path`; `None` if another process has it. Its directory must exist.
    ///
    /// # Errors
    /// A file that cannot be made.
    pub(crate) fn take(path: &Path) -> Result<Option<Self>> {
        let cannot = || format!("cannot create {}", path.display());
        loop {
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).with_context(cannot)?;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Ok(None),
                // A file system without locks: nobody else can be told apart, so nobody is kept out.
                Ok(()) | Err(TryLockError::Error(_)) => {}
            }
            // Whoever had it before may have removed the file in between; a third one could lock the next.
            if is_at(&file, path) {
                return Ok(Some(Self { path: path.to_owned(), _file: file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // one that stays locks nobody out
    }
}

/// True if `path` still is that open file.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let of = |m: io::Result<fs::Metadata>| m.map(|m| (m.dev(), m.ino())).ok();
        of(file.metadata()) == of(fs::metadata(path))
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

/// Stands before every change on disk; in tests, the program may end here.
#[cfg(not(test))]
pub(crate) fn step() {}

#[cfg(test)]
pub(crate) use kills::step;

/// A program that is killed between two changes on disk.
#[cfg(test)]
pub(crate) mod kills {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        /// A file system on which directories cannot change places.
        pub(crate) static NO_EXCHANGE: Cell<bool> = const { Cell::new(false) };
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    struct Killed;

    /// Counts one change; the one that was told is not made, nor any after it.
    pub(crate) fn step() {
        LEFT.with(|left| match left.get() {
            Some(0) => resume_unwind(Box::new(Killed)),
            Some(n) => left.set(Some(n - 1)),
            None => {}
        });
    }

    /// Runs `program` and kills it before change `n` (from 0) of this thread; `None` if it was.
    pub(crate) fn killed_at<T>(n: usize, program: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(n));
        let result = catch_unwind(AssertUnwindSafe(program));
        LEFT.set(None);
        match result {
            Ok(value) => Some(value),
            Err(killed) if killed.is::<Killed>() => None,
            Err(panic) => resume_unwind(panic),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        strangers(directory, |_, _| false).unwrap()
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_stays_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        replace(&path, |aside| Ok(fs::write(aside, "one")?)).unwrap();
        // Two writers at once: each has a name of its own, the last one stays.
        replace(&path, |mine| {
            replace(&path, |other| {
                assert!(mine != other && other.extension().is_some_and(|e| e == "json"));
                Ok(fs::write(other, "two")?)
            })?;
            Ok(fs::write(mine, "three")?)
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        let error = replace(&path, |aside| {
            fs::write(aside, "half")?;
            bail!("the disk is full")
        });
        assert!(format!("{:#}", error.unwrap_err()).contains("a.json: the disk is full"));
        assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"three".to_vec(), vec!["a.json".to_owned()]));
        let killed = kills::killed_at(0, || replace(&path, |aside| Ok(fs::write(aside, "late")?)));
        assert!(killed.is_none());
        assert_eq!(fs::read(&path).unwrap(), b"three");
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("far")).unwrap();
        symlink("far/real", at("one")).unwrap();
        symlink("one", at("two")).unwrap();
        let real = fs::canonicalize(at("far")).unwrap().join("real");
        for round in ["new", "old"] {
            assert_eq!(resolve(&at("two")).unwrap(), real, "{round}");
            replace(&at("two"), |aside| Ok(fs::write(aside, round)?)).unwrap();
            assert_eq!(fs::read_to_string(&real).unwrap(), round);
            assert!(fs::symlink_metadata(at("two")).unwrap().is_symlink());
        }
        fs::write(at("plain"), "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&real), mode(&at("plain")), "readable for whom any new file is");
        symlink("round", at("round")).unwrap();
        assert!(resolve(&at("round")).is_err());
        assert_eq!(resolve(&at("none")).unwrap().file_name().unwrap(), "none");
    }

    #[test]
    fn a_lock_keeps_others_out_until_it_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = Lock::take(&path).unwrap().unwrap();
        assert!(Lock::take(&path).unwrap().is_none());
        drop(held);
        assert!(!path.exists());
        // Left by a program that was killed.
        fs::write(&path, "").unwrap();
        assert!(Lock::take(&path).unwrap().is_some());
    }

    #[test]
    fn only_ours_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("d");
        let ours = |name: &str, directory: bool| name.starts_with("our") && !directory;
        fs::create_dir_all(inside.join("ours.git")).unwrap();
        for name in ["ours", "theirs", "our.bin"] {
            fs::write(inside.join(name), "").unwrap();
        }
        assert!(!remove_ours(&inside, ours).unwrap());
        assert_eq!(names(&inside), ["ours.git", "theirs"]);
        assert_eq!(strangers(&inside, ours).unwrap(), ["ours.git", "theirs"]);
        fs::remove_dir(inside.join("ours.git")).unwrap();
        fs::remove_file(inside.join("theirs")).unwrap();
        assert!(remove_ours(&inside, ours).unwrap() && !inside.exists());
        assert_eq!(some_of(&["a", "b", "c", "d", "e", "f", "g"].map(String::from)), "a, b, c, d, e and 2 more");
    }
}
