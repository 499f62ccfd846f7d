//! Ctrl-C: at once where a job keeps nothing, and soon where it wants to end well.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
pub(crate) use decdec::backend::Interrupted;

/// What a shell reports of a program that Ctrl-C ended.
pub(crate) const EXIT_CODE: u8 = 130;

/// How long a job that was told to stop may take to do so before it is ended.
const GRACE: Duration = Duration::from_millis(500);

static STOP: AtomicBool = AtomicBool::new(false);
/// Ctrl-C stops what is being done, and nothing else.
static ANSWERING: AtomicBool = AtomicBool::new(false);
/// Between answers Ctrl-C is a key like others.
static PROMPTING: AtomicBool = AtomicBool::new(false);
/// What is said where a job is ended before it has stopped; empty until a job wants to stop by itself.
static LAST_WORDS: OnceLock<String> = OnceLock::new();

/// Listens for Ctrl-C from now on. It ends the program at once, whatever that waits for, unless a job has asked for
/// [`stop_flag`].
pub(crate) fn listen() -> Result<()> {
    let heard = || {
        // A second one, before the first was heeded, ends the program.
        let answering = ANSWERING.load(Ordering::SeqCst);
        if answering && !STOP.swap(true, Ordering::SeqCst) || !answering && PROMPTING.load(Ordering::SeqCst) {
            return;
        }
        if let Some(words) = LAST_WORDS.get() {
            STOP.store(true, Ordering::SeqCst);
            std::thread::sleep(GRACE);
            // From a thread of its own: who holds stderr may wait for a reader that never comes.
            std::thread::spawn(move || (!words.is_empty()).then(|| tracing::info!("{words}")));
            std::thread::sleep(GRACE / 10);
        }
        decdec::backend::exit_at_once(EXIT_CODE.into());
    };
    ctrlc::set_handler(heard).context("cannot listen for ctrl-c")
}

/// A flag that Ctrl-C sets, for a job that has something to save. It gets [`GRACE`] for that: a job that waits, for a
/// device or a long product, does not hear. `last_words` are said where it was ended before it could say so itself.
pub(crate) fn stop_flag(last_words: impl std::fmt::Display) -> &'static AtomicBool {
    LAST_WORDS.get_or_init(|| last_words.to_string());
    &STOP
}

/// While this value lives, Ctrl-C sets the flag and ends nothing; then the flag is taken back.
pub(crate) struct Answering(());

impl Answering {
    pub(crate) fn begin() -> Self {
        STOP.store(false, Ordering::SeqCst);
        ANSWERING.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        ANSWERING.store(false, Ordering::SeqCst);
        STOP.store(false, Ordering::SeqCst);
    }
}

/// From now on Ctrl-C ends nothing but answers: what reads lines from a terminal hears it as a key, and one that comes
/// just before it listens must not end the program.
pub(crate) fn prompts() {
    PROMPTING.store(true, Ordering::SeqCst);
}

/// The same flag, for what a job waits for: it is set only where one has asked for it.
pub(crate) fn heard() -> &'static AtomicBool {
    &STOP
}
