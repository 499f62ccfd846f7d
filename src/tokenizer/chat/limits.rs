//! What a chat template may take. It comes with the model, from whoever made that: it may neither run for ever, nor
//! fill the memory, nor nest values so deeply that they exhaust the stack.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State};

use crate::tokenizer::guard::guard_as;

/// Bytes of a text, be it one value or all that is written: a million tokens.
pub(super) const MAX_TEXT: usize = 4 << 20;

/// Bytes that are written in all, counting what is kept in variables.
const MAX_WRITTEN: usize = 64 << 20;

/// Levels of lists in lists.
const MAX_DEPTH: usize = 64;

/// Instructions: thousands for each of a thousand messages.
const MAX_STEPS: u64 = 10_000_000;

/// Bytes that instructions may write between them, each the longest plain text of the template.
const MAX_PLAIN: u64 = 1 << 30;

/// Time that a rendering may take.
pub(super) const MAX_TIME: Duration = Duration::from_secs(60);

/// Bytes of stack for a rendering: macros call each other a hundred levels deep.
const STACK: usize = 64 << 20;

/// Instructions for a template with a plain text of `longest` bytes.
pub(super) fn steps(longest: usize) -> u64 {
    (MAX_PLAIN / longest.max(1) as u64).min(MAX_STEPS)
}

/// What `work` returns, if it does so within `limit`, on a stack that deep macros do not exhaust; a panic becomes an
/// error. Work that takes longer is left behind: it ends when it ends, or with the program.
pub(super) fn bounded<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        // Nobody listens any more when it took too long.
        let _ = sender.send(guard_as("the chat template fails", work));
    };
    let worker = thread::Builder::new().name("chat template".into()).stack_size(STACK);
    worker.spawn(work).context("cannot start a thread for the chat template")?;
    let late = || anyhow!("the chat template takes more than {} s", limit.as_secs_f64());
    receiver.recv_timeout(limit).unwrap_or_else(|_| Err(late()))
}

/// What a template may not do.
pub(super) fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn too_large() -> Error {
    refused(format!("a value takes more than {MAX_TEXT} bytes"))
}

/// Bytes of a value written out, about.
///
/// # Errors
/// More than [`MAX_TEXT`], or lists nested deeper than [`MAX_DEPTH`].
pub(super) fn size(value: &Value) -> Result<usize, Error> {
    let mut left = MAX_TEXT;
    measure(value, &mut left, 0)?;
    Ok(MAX_TEXT - left)
}

fn measure(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(refused(format!("a value nests deeper than {MAX_DEPTH} levels")));
    }
    let own = value.as_str().map_or(1, str::len);
    *left = left.checked_sub(own).ok_or_else(too_large)?;
    let Some(object) = value.as_object() else { return Ok(()) };
    match value.kind() {
        ValueKind::Map => {
            for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                measure(&key, left, depth + 1)?;
                measure(&value, left, depth + 1)?;
            }
        }
        // What has no length may be read once only, and is not written out either.
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            for item in object.try_iter().into_iter().flatten() {
                measure(&item, left, depth + 1)?;
            }
        }
        _ => (),
    }
    Ok(())
}

/// The filter behind each operand: hands on what is not too large.
pub(super) fn operand(value: &Value) -> Result<Value, Error> {
    size(value)?;
    Ok(value.clone())
}

/// Refuses `value`, `count` times over, if that is too large.
pub(super) fn repeated(value: &Value, count: usize) -> Result<(), Error> {
    if size(value)?.saturating_mul(count) > MAX_TEXT { Err(too_large()) } else { Ok(()) }
}

/// What expressions have written so far.
struct Written(usize);

/// Writes the value of an expression.
pub(super) fn write(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let size = size(value)?;
    let written = state.get_or_insert_extension(Written(0));
    written.0 += size;
    if written.0 > MAX_WRITTEN {
        return Err(refused(format!("expressions write more than {MAX_WRITTEN} bytes")));
    }
    minijinja::escape_formatter(out, state, value)
}

/// Refuses a call of a filter or method whose result could be too large; `args` starts with what it is called on.
pub(super) fn call(name: &str, args: &[Value]) -> Result<(), Error> {
    let sizes: Vec<usize> = args.iter().map(size).collect::<Result<_, _>>()?;
    let all = sizes.iter().fold(0, |sum: usize, &size| sum.saturating_add(size));
    let text = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or_default();
    // A number among the arguments, whether it is named or not.
    let number = || {
        let named = args.iter().filter_map(|arg| arg.as_object()).filter(|arg| arg.try_iter_pairs().is_some());
        let named = named.flat_map(|arg| arg.try_iter_pairs().into_iter().flatten().map(|(_, value)| value));
        args[1..].iter().cloned().chain(named).filter_map(|arg| i64::try_from(arg).ok()).max().unwrap_or(0)
    };
    let most = match name {
        "replace" => text(0).matches(text(1)).count().saturating_mul(text(2).len()),
        // One of the two is the list, the other stands between its items; a filter's may be called `d`.
        "join" => {
            let items = args.iter().filter(|arg| arg.as_str().is_none()).filter_map(Value::len).max();
            let between = sizes.iter().zip(args).filter(|(_, arg)| arg.as_str().is_some() || arg.is_kwargs());
            items.unwrap_or(text(0).len()).saturating_mul(between.map(|(&size, _)| size).max().unwrap_or(0))
        }
        "indent" => (text(0).matches('\n').count() + 1).saturating_mul(usize::try_from(number()).unwrap_or(0)),
        "batch" | "slice" | "ljust" | "rjust" | "center" | "zfill" => usize::try_from(number()).unwrap_or(0),
        "format" | "percent" => {
            let fields = text(0).matches(['%', '{']).count();
            let widths = text(0).split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
            let widths = widths.map(|digits| digits.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
            fields.saturating_mul(all - sizes[0]).saturating_add(widths)
        }
        _ => 0,
    };
    if all.saturating_add(most) > MAX_TEXT { Err(too_large()) } else { Ok(()) }
}

/// Takes what a template writes, up to [`MAX_TEXT`].
#[derive(Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT {
            return Err(io::Error::other(format!("the chat template writes more than {MAX_TEXT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
