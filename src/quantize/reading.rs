//! Calibration text from files: plain text, and JSON lines with `text` or `messages`, in files and directories.
//!
//! Every file gives as many windows as the others, as far as it has them; what is left at the ends of files makes windows
//! together.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::calibration::Text;
use crate::tokenizer::{Message, TextReader, Tokenizer};

/// Directories inside each other, at most.
const DEEPEST: usize = 16;
/// Bytes of one line of JSON.
const LONGEST_LINE: usize = 64 << 20;

/// Reads `samples` windows of `seq_len` tokens from `paths`, files and directories: `.jsonl` files line by line, each an
/// object with the string `text` or the list `messages` (of `role` and `content`), all others as plain text. Of a
/// directory, files that are not UTF-8 and names that begin with a dot are passed over.
///
/// # Errors
/// No path, one that cannot be read or is not UTF-8, a directory without text, a line that is not such an object, a
/// conversation where the model has no chat template.
pub fn read_text(paths: &[PathBuf], tokenizer: &Tokenizer, seq_len: usize, samples: usize) -> Result<Text> {
    let (first, more) = paths.split_first().context("no calibration text is named")?;
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push((path.clone(), true));
            continue;
        }
        let before = files.len();
        walk(path, DEEPEST, &mut files)?;
        ensure!(files.len() > before, "the directory {} has no files, calibration text is expected", path.display());
    }
    // As many as each has to give if all give alike; all that may be wanted, if some have less.
    let mut texts = Vec::new();
    for windows in [samples.div_ceil(files.len()), samples] {
        texts = read(&files, tokenizer, windows.saturating_mul(seq_len))?;
        if texts.iter().map(|ids| ids.len() / seq_len.max(1)).sum::<usize>() >= samples {
            break;
        }
    }
    let shown = first.file_name().unwrap_or(first.as_os_str()).to_string_lossy();
    let name = if more.is_empty() { shown.into_owned() } else { format!("{shown} and {} more", more.len()) };
    Ok(Text { tokens: in_turns(&texts, seq_len, samples), samples, name })
}

/// The files of a directory, in the order of their names; `false` with each: it may be no text.
fn walk(directory: &Path, deep: usize, files: &mut Vec<(PathBuf, bool)>) -> Result<()> {
    let cannot = || format!("cannot read the directory {}", directory.display());
    ensure!(deep > 0, "{}: directories are nested too deep, {DEEPEST} are allowed", directory.display());
    let mut entries: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(cannot)?
        .map(|e| Ok(e?.path()))
        .collect::<Result<_>>()
        .with_context(cannot)?;
    entries.retain(|path| path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.')));
    entries.sort();
    for path in entries {
        if path.is_dir() {
            walk(&path, deep - 1, files)?;
        } else {
            files.push((path, false));
        }
    }
    Ok(())
}

/// The first `wanted` ids, or some more, of every file.
fn read(files: &[(PathBuf, bool)], tokenizer: &Tokenizer, wanted: usize) -> Result<Vec<Vec<u32>>> {
    let mut texts = Vec::new();
    for (path, named) in files {
        let is_lines = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
        let ids = File::open(path).map_err(anyhow::Error::from).and_then(|file| match is_lines {
            true => lines(&mut TextReader::new(file), tokenizer, wanted),
            false => tokenizer.encode_first(&mut TextReader::new(file), wanted),
        });
        match ids {
            Ok(ids) => texts.push(ids),
            Err(error) if !named && !is_lines => tracing::info!("{} is passed over: {error:#}", path.display()),
            Err(error) => return Err(error.context(format!("cannot read the text {}", path.display()))),
        }
    }
    ensure!(!texts.is_empty(), "none of {} files is text, calibration text is expected", files.len());
    Ok(texts)
}

/// The first `wanted` ids, or some more, of JSON lines.
fn lines(reader: &mut TextReader<File>, tokenizer: &Tokenizer, wanted: usize) -> Result<Vec<u32>> {
    let (mut ids, mut buffer, mut number, mut at_end) = (Vec::new(), String::new(), 0, false);
    while ids.len() < wanted && !(at_end && buffer.is_empty()) {
        let end = match buffer.find('\n') {
            Some(end) => end,
            None if at_end => buffer.len(),
            None => {
                ensure!(
                    buffer.len() <= LONGEST_LINE,
                    "line {}: {LONGEST_LINE} bytes are allowed in a line",
                    number + 1
                );
                at_end = !reader.read(&mut buffer)?;
                continue;
            }
        };
        number += 1;
        let line = buffer[..end].trim();
        if !line.is_empty() {
            ids.extend(document(line, tokenizer).with_context(|| format!("line {number}"))?);
        }
        buffer.drain(..(end + 1).min(buffer.len()));
    }
    Ok(ids)
}

/// The ids of one line, and an end of text.
fn document(line: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let object: Value = serde_json::from_str(line).map_err(|error| anyhow!("it is not JSON: {error}"))?;
    let mut ids = match (&object["text"], &object["messages"]) {
        (Value::String(text), _) => tokenizer.encode(text)?,
        (_, Value::Array(messages)) => {
            let messages: Vec<Message> = messages.iter().map(message).collect::<Result<_>>()?;
            return tokenizer.chat_ids(&messages, false);
        }
        _ => bail!("an object with the string \"text\" or the list \"messages\" is expected"),
    };
    ids.extend(tokenizer.end_of_text());
    Ok(ids)
}

fn message(value: &Value) -> Result<Message> {
    match (&value["role"], &value["content"]) {
        (Value::String(role), Value::String(content)) => Ok(Message::new(role, content)),
        _ => bail!("a message has no strings \"role\" and \"content\", both are expected"),
    }
}

/// `samples` windows of all texts in turns, then those that the ends of the texts make together.
fn in_turns(texts: &[Vec<u32>], seq_len: usize, samples: usize) -> Vec<u32> {
    let size = seq_len.max(1);
    let most = texts.iter().map(|ids| ids.len() / size).max().unwrap_or(0);
    let windows =
        (0..most).flat_map(|round| texts.iter().filter_map(move |ids| ids.get(round * size..(round + 1) * size)));
    let ends = texts.iter().flat_map(|ids| ids.chunks_exact(size).remainder());
    windows.take(samples).flatten().chain(ends).copied().take(samples.saturating_mul(size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_give_windows_in_turns_and_their_ends_together() {
        let texts = [vec![1; 7], vec![2; 3], (30..41).collect()];
        assert_eq!(in_turns(&texts, 3, 4), [1, 1, 1, 2, 2, 2, 30, 31, 32, 1, 1, 1]);
        // Three windows of the last text, two of the first, one of the second; ends of 1, 0 and 2 make a seventh.
        let all = in_turns(&texts, 3, 9);
        assert_eq!((all.len(), &all[18..]), (21, &[1, 39, 40][..]));
        assert_eq!(in_turns(&texts, 12, 9).len(), 21, "no file has a window, together they have one");
    }
}
