//! placeholder
/// e
#[derive(Debug)]
pub struct Estimate;
/// e
pub fn estimate() -> Estimate {
    Estimate
}
