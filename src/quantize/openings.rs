//! How texts begin that a model writes by itself, and how they go on where one ends.
//!
//! One kind of text alone serves its own kind best; four kinds together serve what is none of them. Chats are those of
//! Magpie (Xu et al. 2024): of the conversation only what the template puts before the user's words is given, the model
//! writes question and answer.

use std::collections::VecDeque;

use crate::config::ModelConfig;
use crate::tokenizer::{TextFiles, Tokenizer, Turns};

/// What a text that the model writes begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A beginning of text.
    Begin,
    /// An end of text, as between two texts of those that the model was trained on.
    End,
    /// A word at random.
    Word,
    /// The chat template's words before the user's.
    Chat,
}

/// The tokens that the four kinds need.
#[derive(Debug, Clone)]
pub(super) struct Openings {
    begin: u32,
    end: u32,
    words: Vec<u32>,
    turns: Option<Turns>,
    /// Tokens that end a text or a turn.
    ends: Vec<u32>,
}

impl Openings {
    /// Those of a model. Without a tokenizer that can be read, every id is a word; without a chat template, or with one
    /// that changes what messages say, there are no chats, and a note says so.
    pub(super) fn new(texts: &TextFiles, config: &ModelConfig) -> Self {
        let tokenizer = Tokenizer::new(texts, config).map_err(|error| tracing::debug!("no tokenizer: {error:#}")).ok();
        let mut ends = config.eos_token_ids.clone();
        ends.extend(tokenizer.iter().flat_map(Tokenizer::stop_ids));
        let bos = config.bos_token_id.or_else(|| tokenizer.as_ref()?.bos());
        let begin = bos.or(ends.first().copied()).unwrap_or(0);
        let end = tokenizer.as_ref().and_then(Tokenizer::end_of_text).or(ends.first().copied()).unwrap_or(begin);
        let words = tokenizer.as_ref().map_or_else(Vec::new, Tokenizer::words);
        let words = if words.is_empty() { (0..config.vocab_size as u32).collect() } else { words };
        let turns = tokenizer.filter(Tokenizer::has_chat).and_then(|tokenizer| {
            let turns =
                tokenizer.turns().map_err(|error| tracing::warn!("no chats in the calibration text: {error:#}"));
            turns.ok().filter(|turns| !turns.before.is_empty())
        });
        ends.push(end);
        Self { begin, end, words, turns, ends }
    }

    /// The kinds of text that can be begun.
    pub(super) fn kinds(&self) -> &'static [Kind] {
        let all = &[Kind::Begin, Kind::End, Kind::Word, Kind::Chat];
        if self.turns.is_some() { all } else { &all[..3] }
    }

    /// A text of `kind`.
    pub(super) fn text(&self, kind: Kind) -> OwnText<'_> {
        OwnText { openings: self, kind, waiting: VecDeque::new(), asks: true, begun: false }
    }
}

/// A text on its way.
#[derive(Debug)]
pub(super) struct OwnText<'a> {
    openings: &'a Openings,
    kind: Kind,
    /// Tokens that come next, whatever the model says.
    waiting: VecDeque<u32>,
    /// In a chat, true while it is the user's turn.
    asks: bool,
    begun: bool,
}

impl OwnText<'_> {
    /// The next token, where the model says `said`; `draw`, uniform in `[0, 1)`, chooses the word that opens a text.
    pub(super) fn next(&mut self, said: u32, draw: f32) -> u32 {
        if let Some(next) = self.waiting.pop_front() {
            return next;
        }
        if self.begun && !self.openings.ends.contains(&said) {
            return said;
        }
        let opens = !std::mem::replace(&mut self.begun, true);
        let Openings { begin, end, words, turns, .. } = self.openings;
        match (self.kind, turns) {
            (Kind::Begin, _) => *begin,
            (Kind::End, _) => *end,
            (Kind::Chat, Some(turns)) => {
                let ids = match (opens, self.asks) {
                    (true, _) => &turns.before,
                    (false, true) => &turns.to_assistant,
                    (false, false) => &turns.to_user,
                };
                self.asks = opens || !self.asks;
                self.waiting.extend(ids);
                self.waiting.pop_front().unwrap_or(said)
            }
            (Kind::Word | Kind::Chat, _) => words[((draw * words.len() as f32) as usize).min(words.len() - 1)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn openings(turns: bool) -> Openings {
        let turns = turns.then(|| Turns { before: vec![1, 4], to_assistant: vec![2, 5], to_user: vec![2, 6] });
        Openings { begin: 1, end: 0, words: (10..20).collect(), turns, ends: vec![2, 0] }
    }

    /// What is written where the model says `said`, one token after the other.
    fn written(kind: Kind, said: &[u32]) -> Vec<u32> {
        let openings = openings(true);
        let mut text = openings.text(kind);
        said.iter().map(|&said| text.next(said, 0.45)).collect()
    }

    #[test]
    fn texts_begin_and_go_on_as_their_kind_says() {
        assert_eq!(written(Kind::Begin, &[7, 8, 9, 2, 7]), [1, 8, 9, 1, 7]);
        assert_eq!(written(Kind::End, &[7, 8, 2, 7]), [0, 8, 0, 7]);
        assert_eq!(written(Kind::Word, &[7, 8, 0, 7]), [14, 8, 14, 7]);
        // What the model says while the template speaks is not heard.
        let chat = written(Kind::Chat, &[7, 7, 11, 12, 2, 7, 13, 0, 2, 14]);
        assert_eq!(chat, [1, 4, 11, 12, 2, 5, 13, 2, 6, 14]);
    }

    #[test]
    fn every_word_can_open_a_text_and_no_other() {
        let openings = openings(false);
        assert_eq!(openings.kinds(), [Kind::Begin, Kind::End, Kind::Word]);
        let word = |draw| openings.text(Kind::Word).next(7, draw);
        assert_eq!([0.0, 0.099, 0.1, 0.999_999_9].map(word), [10, 10, 11, 19]);
    }
}
