//! decdec

pub mod backend;
pub mod config;
pub mod dec;
pub mod format;
pub mod model;
pub mod sampling;
pub mod weights;
