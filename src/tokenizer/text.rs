//! Long texts: read as they are needed, and tokenized in pieces.

use std::io::Read;

use anyhow::{Context, Result, anyhow};

use super::Tokenizer;

/// Bytes of text that are tokenized at once.
const PIECE: usize = 64 << 10;

/// Bytes on either side of a cut that decide whether it changes tokens.
const AROUND: usize = 256;

/// Places that are tried for a cut before the piece is made longer.
const TRIES: usize = 16;

/// A text that is read as it is needed: UTF-8, each line ending as `\n` wherever it was saved, without the byte
/// order marks that editors put first.
#[derive(Debug)]
pub struct TextReader<R> {
    source: R,
    /// What was read and is not yet text: the start of a character, or a line ending that may go on.
    bytes: Vec<u8>,
    has_started: bool,
}

impl<R: Read> TextReader<R> {
    /// The text in `source`.
    pub fn new(source: R) -> Self {
        Self { source, bytes: Vec::new(), has_started: false }
    }

    /// Appends some more to `text`; false when there is no more.
    ///
    /// # Errors
    /// What the source says, or bytes that are not UTF-8.
    pub fn read(&mut self, text: &mut String) -> Result<bool> {
        let before = self.bytes.len();
        let read = (&mut self.source).take(PIECE as u64).read_to_end(&mut self.bytes)?;
        let is_last = read == 0;
        let mut ready = match std::str::from_utf8(&self.bytes) {
            Ok(_) => self.bytes.len(),
            Err(e) if e.error_len().is_none() && !is_last => e.valid_up_to(),
            Err(_) => return Err(anyhow!("it is not UTF-8")),
        };
        if !is_last && self.bytes[..ready].ends_with(b"\r") {
            ready -= 1;
        }
        let rest = self.bytes.split_off(ready);
        let piece = String::from_utf8(std::mem::replace(&mut self.bytes, rest))?;
        let mut piece = piece.as_str();
        if !self.has_started {
            piece = piece.trim_start_matches('\u{feff}');
            self.has_started = !piece.is_empty();
        }
        text.push_str(&piece.replace("\r\n", "\n").replace('\r', "\n"));
        Ok(!is_last || before > 0)
    }

    /// All that is left.
    ///
    /// # Errors
    /// As [`TextReader::read`].
    pub fn read_all(&mut self) -> Result<String> {
        let mut text = String::new();
        while self.read(&mut text)? {}
        Ok(text)
    }
}

impl Tokenizer {
    /// The first `wanted` ids, or somewhat more, of what [`Tokenizer::encode`] makes of the whole text. It is read and
    /// tokenized in pieces until there are enough.
    ///
    /// # Errors
    /// As [`TextReader::read`] and [`Tokenizer::encode`].
    pub fn encode_first(&self, text: &mut TextReader<impl Read>, wanted: usize) -> Result<Vec<u32>> {
        self.encode_pieces(|piece| text.read(piece), wanted, PIECE)
    }

    /// As [`Tokenizer::encode_first`], in pieces of about `size` bytes of what `more` appends.
    fn encode_pieces(
        &self,
        mut more: impl FnMut(&mut String) -> Result<bool>,
        wanted: usize,
        size: usize,
    ) -> Result<Vec<u32>> {
        let (mut ids, after) = self.frame()?;
        let first = ids.len();
        let (mut text, mut at_end, mut length) = (String::new(), false, size);
        while ids.len() <= wanted {
            while !at_end && text.len() < length + AROUND {
                at_end = !more(&mut text)?;
            }
            if at_end && text.len() < length + AROUND {
                ids.extend(self.encode_chat(&text)?);
                ids.extend(after);
                break;
            }
            match self.cut(&text, length)? {
                Some((end, next)) => {
                    ids.extend(self.encode_chat(&text[..end])?);
                    text.drain(..next);
                    length = size;
                }
                None => length *= 2,
            }
        }
        // As `encode`: a text that starts with BOS gets no other.
        let twice = first > 0 && ids.len() > 1 && ids[..2].iter().all(|&id| Some(id) == self.bos);
        ids.drain(..usize::from(twice));
        Ok(ids)
    }

    /// What the tokenizer adds before and after a text.
    fn frame(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let encoding = self.encode_with("a", true)?;
        let (ids, added) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        let own = |&added: &u32| added == 0;
        let first = added.iter().position(own).context("the tokenizer makes no tokens of a text")?;
        let last = added.iter().rposition(own).unwrap_or(first);
        Ok((ids[..first].to_vec(), ids[last + 1..].to_vec()))
    }

    /// Where the first `length` bytes of `text`, or somewhat fewer, can be cut off without other tokens: where they
    /// end, and where what is tokenized next begins. Some tokenizers put a space before every text; for those the
    /// space at the cut goes.
    ///
    /// Tokens depend on what is near only. So tokens around the cut are compared with those of its two sides.
    fn cut(&self, text: &str, length: usize) -> Result<Option<(usize, usize)>> {
        let near = |at: usize| (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        let (low, high) = (near(length / 2), near(length));
        let is_place = |&(at, c): &(usize, char)| {
            let (mut before, mut after) = (text[..at].chars(), text[at + c.len_utf8()..].chars());
            let visible = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
            matches!(c, ' ' | '\n') && visible(before.next_back()) && visible(after.next())
        };
        let places = text[low..high].char_indices().rev().map(|(at, c)| (low + at, c));
        for (at, c) in places.filter(is_place).take(TRIES) {
            let (from, to) = (near(at.saturating_sub(AROUND)), near(at + AROUND));
            let together = self.encode_chat(&text[from..to])?;
            let splits: &[(usize, usize)] = match c {
                ' ' => &[(at, at), (at, at + 1)],
                _ => &[(at + 1, at + 1)],
            };
            for &(end, next) in splits {
                let apart = [self.encode_chat(&text[from..end])?, self.encode_chat(&text[next..to])?].concat();
                if apart == together {
                    return Ok(Some((end, next)));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
