//! Text as it is made: whole characters only, ending before a stop text.

use anyhow::Result;

use crate::tokenizer::TextStream;

/// A text in the making.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    stream: Option<TextStream<'a>>, // none where there is no tokenizer: there is no text then
    stops: Vec<String>,
    text: String,
    shown: usize, // bytes
    stopped: Option<String>,
}

impl<'a> Answer<'a> {
    /// A text that ends before the first of `stops`; empty ones never stop it.
    pub(crate) fn new(stream: Option<TextStream<'a>>, stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stream, stops, text: String::new(), shown: 0, stopped: None }
    }

    /// A stop text has come.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// The stop text that has come.
    #[cfg(feature = "serve")]
    pub(crate) fn stopped_by(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// Takes the next token; what can be shown now.
    pub(crate) fn push(&mut self, id: u32) -> Result<&str> {
        let piece = self.stream.as_mut().map(|stream| stream.push(id)).transpose()?.flatten();
        if let Some(piece) = piece {
            self.append(&piece);
        }
        let held = if self.is_stopped() { 0 } else { self.may_become_stop() };
        Ok(self.show(self.text.len() - held))
    }

    /// What was held back, when no token comes any more.
    pub(crate) fn flush(&mut self) -> Result<&str> {
        let rest = self.stream.as_mut().map(|stream| stream.flush()).transpose()?.flatten();
        if let Some(rest) = rest {
            self.append(&rest);
        }
        Ok(self.show(self.text.len()))
    }

    fn append(&mut self, piece: &str) {
        if self.is_stopped() {
            return;
        }
        // A stop text may have begun in what is there already.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.text.len().saturating_sub(longest);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| Some((self.text[from..].find(stop.as_str())?, stop))).min();
        if let Some((at, stop)) = found {
            self.stopped = Some(stop.clone());
            self.text.truncate(from + at);
        }
    }

    /// Bytes at the end of the text with which a stop text may begin.
    fn may_become_stop(&self) -> usize {
        let begins = |stop: &String| {
            (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && self.text.ends_with(&stop[..n])).unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }

    fn show(&mut self, end: usize) -> &str {
        let from = self.shown;
        self.shown = from.max(end);
        &self.text[from..self.shown]
    }
}
