//! Foreign files end here: what other programs write, read into this crate's types.

pub mod reference;
pub mod torch;
