//! decdec

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod dec;
pub mod eval;
pub mod format;
pub mod generate;
pub mod model;
pub mod open;
pub mod quantize;
pub mod random;
pub mod sampling;
pub mod source;
pub mod tokenizer;
pub mod weights;
