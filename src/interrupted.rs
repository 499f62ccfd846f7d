//! How a long job hears that it is to stop.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

/// The job was told to stop; what it finished is kept, and the same command goes on from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted, finished layers are kept: the same command goes on from there")
    }
}

impl std::error::Error for Interrupted {}

/// Fails once `stop` is set.
pub(crate) fn ensure_running(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(Interrupted.into()) } else { Ok(()) }
}
