//! Files on disk: read without trusting them, written so that nobody ever sees half of one.

mod cache;
mod reading;
mod writing;

pub use cache::cache_directory;
pub use reading::{open, read, read_if_there, read_text};
pub(crate) use writing::*;
