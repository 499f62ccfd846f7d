//! decdec
fn main(){}
