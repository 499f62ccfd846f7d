//! Files in memory: mapped, only read, and named when one is cut short in use.
//!
//! A page that a file no longer has is a signal, which ends the program with two words. [`exit_when_a_file_shrinks`]
//! ends it with a line that names the file. Going on is no choice: what was there is lost, and zeros in its place would
//! be a model that nobody made.
//!
//! Maps are read while a model is loaded, quantized or converted. A model that is on a device, the CPU included, has
//! copies of everything, and reads no map again: it goes on generating whatever happens to its files.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;

use crate::files;

/// How a file begins that stands for another, which git-lfs has not fetched.
const GIT_LFS: &[u8] = b"version https://git-lfs";

/// A whole file.
#[derive(Debug)]
pub(crate) struct Mapped {
    #[cfg(unix)]
    _listed: Option<lost::Listed>, // goes before the map does
    map: Mmap,
}

impl Mapped {
    /// Maps the file `path`.
    ///
    /// # Errors
    /// What cannot be opened, is no file, or only stands for one that git-lfs has not fetched.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = files::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let map = Self::of(&file, &path.display().to_string());
        let map = map.with_context(|| format!("cannot map {}", path.display()))?;
        ensure!(
            !map.starts_with(GIT_LFS),
            "{} is a pointer of git-lfs, not the file itself: git lfs pull fetches it",
            path.display()
        );
        Ok(map)
    }

    /// Maps an open file that is called `name` where it has to be named.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn of(file: &File, name: &str) -> Result<Self> {
        // SAFETY: the map is read-only and private to this process. Finished files of ours are never written in place,
        // only replaced by renaming, which leaves the map its own file. Someone else who writes into a mapped file
        // changes numbers, as with every mapped model; one who cuts it short ends the program, as described above.
        let map = unsafe { Mmap::map(file) }?;
        #[cfg(not(unix))]
        let _ = name;
        Ok(Self {
            #[cfg(unix)]
            _listed: lost::Listed::new(&map, name),
            map,
        })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// To be called where the system refused to read `bytes` for us: it takes a page that a file has lost for a wrong
/// address. Read here, the file is named.
pub(crate) fn name_what_is_lost<'a>(error: &io::Error, bytes: impl Iterator<Item = &'a [u8]>) {
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::EFAULT) {
        const PAGE: usize = 4096; // or a multiple of it
        let sum =
            bytes.flat_map(|bytes| bytes.iter().step_by(PAGE).chain(bytes.last())).fold(0, |sum, byte| sum ^ byte);
        std::hint::black_box(sum);
    }
    #[cfg(not(unix))]
    let _ = (error, bytes);
}

/// From now on, a mapped file that shrinks ends this process with exit code 1 and a line on stderr that names it. For
/// programs, not for libraries: it is the process's one handler of SIGBUS.
pub fn exit_when_a_file_shrinks() {
    #[cfg(unix)]
    lost::listen();
}

/// The list of maps that the handler looks through.
#[cfg(unix)]
mod lost {
    use std::ptr;
    use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::SeqCst};

    /// Maps that are listed at once; the largest models have some 200 files. Any more are lost without a name.
    const MOST: usize = 1024;

    /// Where a map is, and what to say when its file is lost; nothing where `start` is 0.
    struct Entry {
        start: AtomicUsize,
        len: AtomicUsize,
        line: AtomicPtr<u8>,
        line_len: AtomicUsize,
    }

    static LIST: [Entry; MOST] = [const {
        Entry {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            line: AtomicPtr::new(ptr::null_mut()),
            line_len: AtomicUsize::new(0),
        }
    }; MOST];

    /// Stands in `start` while an entry is filled in; no map begins there.
    const TAKEN: usize = usize::MAX;

    /// A map that is in the list while this value lives.
    #[derive(Debug)]
    pub(super) struct Listed {
        entry: usize,
        _line: Box<[u8]>,
    }

    impl Listed {
        pub(super) fn new(map: &[u8], name: &str) -> Option<Self> {
            let line = format!(
                "error: {name} was cut short while it was read, it had {} bytes: copy or download it again\n",
                map.len()
            );
            let line = line.into_bytes().into_boxed_slice();
            let free = |entry: &Entry| entry.start.compare_exchange(0, TAKEN, SeqCst, SeqCst).is_ok();
            let entry = LIST.iter().position(free)?;
            let slot = &LIST[entry];
            slot.len.store(map.len(), SeqCst);
            slot.line.store(line.as_ptr().cast_mut(), SeqCst);
            slot.line_len.store(line.len(), SeqCst);
            slot.start.store(map.as_ptr() as usize, SeqCst);
            Some(Self { entry, _line: line })
        }
    }

    impl Drop for Listed {
        fn drop(&mut self) {
            LIST[self.entry].start.store(0, SeqCst);
        }
    }

    pub(super) fn listen() {
        // SAFETY: all zeros is a valid `sigaction`: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler does only what a handler may, and lives as long as the process.
        unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
    }

    /// Says which file is lost and ends the process; any other bus error ends it as without this handler.
    extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the system hands a handler of SA_SIGINFO a valid `siginfo_t`.
        let at = unsafe { (*info).si_addr() } as usize;
        for entry in &LIST {
            let start = entry.start.load(SeqCst);
            if start != 0 && start != TAKEN && at.wrapping_sub(start) < entry.len.load(SeqCst) {
                // SAFETY: whoever read here borrows the map, so the entry and its line are still there; `write` and
                // `_exit` are allowed in a handler.
                unsafe {
                    libc::write(libc::STDERR_FILENO, entry.line.load(SeqCst).cast(), entry.line_len.load(SeqCst));
                    libc::_exit(1);
                }
            }
        }
        // SAFETY: allowed in a handler. The access that failed is made again on return, and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs as the child of the test below, which says what is to happen.
    #[test]
    fn child() {
        let Ok(what) = std::env::var("DECDEC_TEST_MAPPED") else { return };
        let (path, what) = what.split_once(':').unwrap();
        let others: Vec<_> = (0..3).map(|_| Mapped::open(Path::new("Cargo.toml")).unwrap()).collect();
        let map = Mapped::open(Path::new(path)).unwrap();
        exit_when_a_file_shrinks();
        drop(others);
        let sum = |map: &[u8]| map.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        assert_eq!(sum(&map), 7 << 20);
        match what {
            "shrinks" => File::options().write(true).open(path).unwrap().set_len(4096).unwrap(),
            "is written" => {
                File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
                let error = std::fs::write(Path::new(path).with_extension("copy"), &*map).unwrap_err();
                name_what_is_lost(&error, [&map[..]].into_iter());
            }
            "is removed" => std::fs::remove_file(path).unwrap(),
            _ => {
                // A bus error that has nothing to do with a file of ours.
                unlisted(path);
            }
        }
        assert_eq!(sum(&map), 7 << 20);
    }

    /// Reads behind the end of a file that is mapped without being listed.
    fn unlisted(path: &str) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        // SAFETY: what comes of it is what is tested.
        let map = unsafe { Mmap::map(&file) }.unwrap();
        file.set_len(0).unwrap();
        assert_ne!(map[0], map[1], "not reached");
    }

    #[test]
    fn a_file_that_shrinks_is_named_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let child = |what: &str| {
            std::fs::write(&path, vec![7; 1 << 20]).unwrap();
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "mapped::tests::child", "--nocapture"]);
            child.env("DECDEC_TEST_MAPPED", format!("{}:{what}", path.display())).output().unwrap()
        };
        // Read by the program, and by the system for it.
        for what in ["shrinks", "is written"] {
            let out = child(what);
            let said = String::from_utf8(out.stderr).unwrap();
            assert_eq!(out.status.code(), Some(1), "{what}: {said}");
            let line = said.lines().last().unwrap_or_default();
            assert!(line.starts_with("error: ") && line.contains("model.safetensors was cut short"), "{said}");
            assert!(line.contains("it had 1048576 bytes"), "{said}");
        }
        assert!(child("is removed").status.success(), "a file that is gone is still there for who has it");
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child("is another").status.signal(), Some(libc::SIGBUS));
    }
}
