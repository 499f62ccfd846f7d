//! The way out for everything that the program says. What cannot be written to stdout is an error like any other;
//! what cannot be written to stderr is lost, since there is nobody left to tell.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Result;

/// What a shell reports of a program that writes into a pipe without a reader: 128 and the number of SIGPIPE.
const CLOSED_PIPE: u8 = 141;

/// stdout takes no more.
#[derive(Debug)]
pub(crate) struct Unwritable(io::Error);

impl Unwritable {
    /// Where the reader of a pipe has had enough, as `head` has, there is nothing to tell: how the program ends.
    pub(crate) fn quiet_end(&self) -> Option<ExitCode> {
        (self.0.kind() == ErrorKind::BrokenPipe).then(|| CLOSED_PIPE.into())
    }
}

impl Display for Unwritable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot write to stdout: {}", self.0)
    }
}

impl std::error::Error for Unwritable {}

/// Writes `text` to stdout as it is, and sees it off.
///
/// # Errors
/// [`Unwritable`].
pub(crate) fn text(text: impl AsRef<[u8]>) -> Result<()> {
    sent(io::stdout().write_all(text.as_ref()))
}

/// Sees off what was written to stdout, by whomever.
///
/// # Errors
/// [`Unwritable`].
pub(crate) fn sent(written: io::Result<()>) -> Result<()> {
    Ok(written.and_then(|()| io::stdout().flush()).map_err(Unwritable)?)
}

/// Writes one line, or several, to stdout.
///
/// # Errors
/// [`Unwritable`].
pub(crate) fn line(line: impl Display) -> Result<()> {
    text(format!("{line}\n"))
}

/// Writes a line to stderr.
pub(crate) fn aside(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
