//! decdec
fn main() {}
