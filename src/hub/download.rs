//! One file: what the hub says of it, and its bytes, which may come in several parts.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ring::digest;
use ureq::http::StatusCode;

use super::cache::Repository;
use super::http::{Answer, Client, Failure, TRIES};
use super::{ModelName, name};
use crate::files;
use crate::progress::Progress;

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// A file on the hub.
pub(super) struct Remote {
    pub(super) file: String,
    url: String,
    /// The name of its contents: the SHA-256 of a large file, another hash of a small one.
    pub(super) etag: String,
    /// Bytes, where the hub tells.
    pub(super) size: Option<u64>,
}

/// How an attempt ended.
enum End {
    Whole,
    /// The connection was lost; what has come stays.
    Cut(String),
}

impl Remote {
    /// Asks what a file is.
    pub(super) fn ask(client: &Client, model: &ModelName, file: &str, url: String) -> Result<Self> {
        let answer = client.head(&url, model)?;
        let linked = answer.header("x-linked-etag");
        let etag = linked.or(answer.header("etag")).unwrap_or_default();
        let etag = etag.trim().trim_start_matches("W/").trim_matches('"').to_owned();
        ensure!(
            name::is_plain(&etag),
            "{url} has no ETag that names its contents ({etag:?}), is HF_ENDPOINT the address of a hub?"
        );
        // Of a redirection, the length is that of its own text.
        let own = if answer.status.is_success() { answer.number("content-length") } else { None };
        let size = answer.number("x-linked-size").or(own);
        Ok(Self { file: file.to_owned(), url, etag, size })
    }

    /// The SHA-256 of its contents, where the hub tells.
    fn sha256(&self) -> Option<&str> {
        let is_hash = self.etag.len() == 64 && self.etag.bytes().all(|b| b.is_ascii_hexdigit());
        is_hash.then_some(self.etag.as_str())
    }

    /// Sees to it that its contents are in the cache, whole and right.
    pub(super) fn fetch(
        &self,
        client: &Client,
        model: &ModelName,
        kept: &Repository,
        progress: &dyn Progress,
    ) -> Result<()> {
        let _lock = kept.lock(&self.etag, &self.file)?;
        let blob = kept.blob(&self.etag);
        if blob.is_file() {
            progress.inc(self.size.unwrap_or(0));
            return Ok(());
        }
        let partial = blob.with_file_name(format!("{}.incomplete", self.etag));
        let mut download = Download::open(self, partial, progress)?;
        let resumed = download.length > 0;
        let mut right = download.download_rest(client, model)?;
        if !right && resumed {
            // What an earlier program left may be wrong where what comes now is right.
            tracing::warn!("what was there of {} is not what the hub has, downloading it anew", self.file);
            download.begin_anew()?;
            right = download.download_rest(client, model)?;
        }
        if !right {
            let found = hex(download.hash.clone().finish().as_ref());
            download.begin_anew()?;
            bail!(
                "{} of {model} came with sha256 {found}, {} is expected: try again, and if that does not help, another \
                 network",
                self.file,
                self.etag
            );
        }
        download.keep(&blob)
    }
}

/// A file in the coming.
struct Download<'a> {
    remote: &'a Remote,
    path: PathBuf,
    file: File,
    /// Bytes that are there, and the hash of them.
    length: u64,
    hash: digest::Context,
    progress: &'a dyn Progress,
}

impl<'a> Download<'a> {
    /// Goes on with what is at `path`, or begins.
    fn open(remote: &'a Remote, path: PathBuf, progress: &'a dyn Progress) -> Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(cannot)?;
        let hash = digest::Context::new(&digest::SHA256);
        let mut new = Self { remote, path: path.clone(), file, length: 0, hash, progress };
        let there = new.file.metadata().with_context(cannot)?.len();
        if remote.size.is_some_and(|size| there > size) {
            new.begin_anew()?;
        } else if there > 0 {
            new.take_in().with_context(cannot)?;
            progress.inc(new.length);
            progress.reset_eta();
        }
        Ok(new)
    }

    /// Reads what is there.
    fn take_in(&mut self) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            let read = self.file.read(&mut piece)?;
            if read == 0 {
                return Ok(());
            }
            self.hash.update(&piece[..read]);
            self.length += read as u64;
        }
    }

    /// Forgets what is there.
    fn begin_anew(&mut self) -> Result<()> {
        let cannot = || format!("cannot write {}", self.path.display());
        self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0))).with_context(cannot)?;
        self.length = 0;
        self.hash = digest::Context::new(&digest::SHA256);
        Ok(())
    }

    /// Downloads what is missing, over as many connections as that takes; false if what is there then has another hash
    /// than the hub says.
    fn download_rest(&mut self, client: &Client, model: &ModelName) -> Result<bool> {
        let (mut failed, mut pause) = (0, client.pause);
        while Some(self.length) != self.remote.size {
            let before = self.length;
            let why = match self.part(client, model)? {
                End::Whole => break,
                End::Cut(why) => why,
            };
            if self.length > before {
                (failed, pause) = (0, client.pause);
            }
            failed += 1;
            let at = format!("{} was cut at {} bytes", self.remote.file, self.length);
            ensure!(failed < TRIES, "{at} ({why}): try again, it goes on from there");
            tracing::warn!("{at} ({why}), going on in {:.1} s", pause.as_secs_f64());
            std::thread::sleep(pause);
            pause *= 2;
        }
        Ok(self.is_right())
    }

    /// Whether what is there has the hash that the hub says; anything has where it says none.
    fn is_right(&self) -> bool {
        let size = self.remote.size.is_none_or(|size| size == self.length);
        let found = || hex(self.hash.clone().finish().as_ref());
        size && self.remote.sha256().is_none_or(|wanted| wanted.eq_ignore_ascii_case(&found()))
    }

    /// One request for the rest.
    fn part(&mut self, client: &Client, model: &ModelName) -> Result<End> {
        let answer = match client.bytes(&self.remote.url, self.length, model) {
            Ok(answer) => answer,
            Err(Failure::Unreachable(why) | Failure::Away(why)) => {
                bail!("cannot download {}: {why}: try again", self.remote.file)
            }
            Err(Failure::Refused(error)) => return Err(error),
        };
        if !self.goes_on(&answer)? {
            self.begin_anew()?;
            if answer.status != StatusCode::OK {
                return Ok(End::Cut("the hub has no more bytes there".into()));
            }
        }
        let mut body = answer.body.into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            let read = match body.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(End::Cut(error.to_string())),
            };
            self.file.write_all(&piece[..read]).with_context(|| {
                format!("cannot write {}, is the disk full? HF_HUB_CACHE names another place", self.path.display())
            })?;
            self.hash.update(&piece[..read]);
            self.length += read as u64;
            self.progress.inc(read as u64);
        }
        match self.remote.size {
            Some(size) if self.length < size => Ok(End::Cut(format!("{size} bytes are expected"))),
            Some(size) if self.length > size => {
                bail!("{} has {} bytes, the hub has said {size}: try again", self.remote.file, self.length)
            }
            _ => Ok(End::Whole),
        }
    }

    /// Whether an answer begins where what is there ends; not where the host knows no parts.
    fn goes_on(&self, answer: &Answer) -> Result<bool> {
        match answer.status {
            StatusCode::OK => Ok(self.length == 0),
            StatusCode::PARTIAL_CONTENT => {
                let range = answer.header("content-range").unwrap_or_default();
                let start = range.strip_prefix("bytes ").and_then(|range| range.split('-').next()?.parse().ok());
                Ok(start == Some(self.length))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(false),
            status => Err(anyhow!("{} is answered with {status}, 200 is expected: try again", self.remote.file)),
        }
    }

    /// Gives what is there the name of its contents.
    fn keep(self, blob: &Path) -> Result<()> {
        let cannot = || format!("cannot write {}", blob.display());
        self.file.sync_all().with_context(cannot)?;
        drop(self.file);
        files::rename(&self.path, blob).with_context(cannot)
    }
}

/// Bytes as hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
