//! What goes wrong in an engine, so that a caller can tell it apart.

use std::fmt;

use crate::backend::{DeviceLost, Interrupted};

/// What a caller does about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The text is longer than the context: shorten it, or open the engine with a larger `max_seq_len`.
    ContextFull,
    /// The engine makes as many texts already as it was opened for: end one, or open it with more `slots`.
    NoSlot,
    /// The interruption came that the device was opened with. What was read is kept.
    Stopped,
    /// The device answers this process no more: end it.
    DeviceLost,
    /// What was asked for makes no sense: an unknown device, a damaged file, an empty text, a token that there is not.
    Input,
    /// Anything else, such as too little memory. The session begins its next text anew.
    Other,
}

/// All slots, so many, have a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoSlot(pub(super) usize);

impl fmt::Display for NoSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} texts are in the making, which is all that the engine has slots for, end one first", self.0)
    }
}

impl std::error::Error for NoSlot {}

/// What went wrong: what to do about it, and what to say.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    cause: anyhow::Error,
}

impl Error {
    pub(super) fn input(cause: anyhow::Error) -> Self {
        Self { kind: ErrorKind::Input, cause }
    }

    pub(crate) fn new(kind: ErrorKind, said: String) -> Self {
        Self { kind, cause: anyhow::Error::msg(said) }
    }

    /// What to do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

/// What a model or a device says.
impl From<anyhow::Error> for Error {
    fn from(cause: anyhow::Error) -> Self {
        let kind = if cause.is::<NoSlot>() {
            ErrorKind::NoSlot
        } else if cause.is::<DeviceLost>() {
            ErrorKind::DeviceLost
        } else if cause.is::<Interrupted>() {
            ErrorKind::Stopped
        } else {
            ErrorKind::Other
        };
        Self { kind, cause }
    }
}

/// One line, with all that led to it.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.cause)
    }
}

impl std::error::Error for Error {}
