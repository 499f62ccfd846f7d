//! The tokenizers crate panics on some damaged `tokenizer.json` (fuzzing found a decoder without a type, and more
//! where texts are encoded). A file must not end the program: such a panic becomes an error here.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use anyhow::{Result, anyhow};

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, which calls the tokenizers crate and changes nothing of ours.
pub(super) fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    guard_as("tokenizer.json is damaged or of an unknown kind", work)
}

/// Runs `work`, which calls a crate that may panic and changes nothing of ours; `what` says what a panic means.
pub(super) fn guard_as<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                others(info);
            }
        }));
    });
    let before = CAUGHT.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(before);
    result.unwrap_or_else(|panic| Err(anyhow!("{what}: {}", message(panic.as_ref()))))
}

/// What a panic said, in one line.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("the tokenizers crate gave up").lines().next().unwrap_or_default().to_owned()
}
