//! decdec

pub mod backend;
pub mod config;
pub mod dec;
pub mod format;
pub mod sampling;
pub mod source;
pub mod weights;
