//! How a long job says how far it is.

/// Hears how far a long job is. Every method may be left as it is.
pub trait Progress: Sync {
    /// There are so many steps.
    fn set_length(&self, _steps: u64) {}
    /// What is done from now on.
    fn set_message(&self, _what: &str) {}
    /// So many steps more are done.
    fn inc(&self, _steps: u64) {}
    /// What was done so far took no time: it says nothing of the time that is left.
    fn reset_eta(&self) {}
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}
