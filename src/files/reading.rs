//! Files of a model from elsewhere, opened and read without trusting them.
//!
//! What a downloaded directory has under a name may be a device that never ends, a pipe that nobody writes to, or a
//! text of gigabytes where a few lines are expected. Only regular files are opened, and the small ones are read
//! through a limit.

use std::fs::{self, File, FileType};
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Opens a regular file, or a link to one.
///
/// # Errors
/// A directory, a pipe, a device or a socket, by what it is; whatever the file system says.
pub fn open(path: &Path) -> Result<File> {
    // Asked before the file is opened: opening a pipe waits for somebody to write into it.
    ensure_regular(fs::metadata(path)?.file_type())?;
    let file = File::open(path)?;
    ensure_regular(file.metadata()?.file_type())?;
    Ok(file)
}

/// The bytes of a regular file, at most `max` of them.
///
/// # Errors
/// As [`open`], and a file that is longer.
pub fn read(path: &Path, max: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let size = file.metadata()?.len();
    let too_long = |size: String| Error::other(format!("it has {size} bytes, at most {max} are expected"));
    if size > max {
        return Err(too_long(size.to_string()));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // Some files (those of /proc, one that still grows) are longer than they say.
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(too_long(format!("more than {max}")));
    }
    Ok(bytes)
}

/// The same as text.
///
/// # Errors
/// As [`read`], and bytes that are not UTF-8.
pub fn read_text(path: &Path, max: u64) -> Result<String> {
    String::from_utf8(read(path, max)?).map_err(|_| Error::other("it is not UTF-8"))
}

/// The bytes of a regular file, at most `max` of them; none if there is nothing at `path`.
///
/// # Errors
/// As [`read`].
pub fn read_if_there(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    match read(path, max) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn ensure_regular(kind: FileType) -> Result<()> {
    if kind.is_file() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidInput, format!("it is {}, a regular file is expected", name(kind))))
}

/// What something that is no regular file is.
fn name(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let is_device = kind.is_char_device() || kind.is_block_device();
        let kinds = [(kind.is_fifo(), "a pipe"), (kind.is_socket(), "a socket"), (is_device, "a device")];
        if let Some((_, name)) = kinds.into_iter().find(|(is_it, _)| *is_it) {
            return name;
        }
    }
    if kind.is_dir() { "a directory" } else { "no file" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_not_beyond() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [7; 100]).unwrap();
        for (max, whole) in [(0, false), (1, false), (99, false), (100, true), (101, true), (u64::MAX, true)] {
            match read(&path, max) {
                Ok(bytes) => assert!(whole && bytes == [7; 100], "{max}"),
                Err(error) => {
                    let wanted = format!("it has 100 bytes, at most {max} are expected");
                    assert!(!whole && error.to_string() == wanted, "{max}: {error}");
                }
            }
        }
        assert_eq!(read_if_there(&dir.path().join("nothing"), 9).unwrap(), None);
        assert_eq!(read(&dir.path().join("nothing"), 9).unwrap_err().kind(), ErrorKind::NotFound);
        fs::write(&path, [0xff]).unwrap();
        assert_eq!(read_text(&path, 9).unwrap_err().to_string(), "it is not UTF-8");
        let error = read(dir.path(), 9).unwrap_err().to_string();
        assert_eq!(error, "it is a directory, a regular file is expected");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_never_ends_or_never_begins_is_named() {
        use std::os::unix::fs::symlink;
        use std::os::unix::net::UnixListener;

        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        symlink("/dev/zero", at("zero")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        let _listener = UnixListener::bind(at("socket")).unwrap();
        for (file, what) in [("zero", "a device"), ("pipe", "a pipe"), ("socket", "a socket")] {
            let wanted = format!("it is {what}, a regular file is expected");
            assert_eq!(read(&at(file), 1 << 20).unwrap_err().to_string(), wanted);
            assert_eq!(read_if_there(&at(file), 1 << 20).unwrap_err().to_string(), wanted);
            assert_eq!(open(&at(file)).unwrap_err().to_string(), wanted);
        }
        // A link to a regular file is one; a regular file that says it is empty is read all the same.
        fs::write(at("file"), "abc").unwrap();
        symlink(at("file"), at("link")).unwrap();
        assert_eq!(read_text(&at("link"), 3).unwrap(), "abc");
        let error = read(Path::new("/proc/self/status"), 10).unwrap_err().to_string();
        assert_eq!(error, "it has more than 10 bytes, at most 10 are expected");
    }
}
