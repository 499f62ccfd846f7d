//! What a session is told to make, and what it made.

use std::time::Duration;

use super::Speculate;
use crate::sampling::Sampling;

/// How a session makes what comes next. The default is greedy and ends where the model does.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Decides every choice, with `sampling`: the same on every machine.
    pub seed: u64,
    /// The most tokens to make, as far as the context has room for them.
    pub max_new_tokens: usize,
    /// Texts before the first of which the text ends.
    pub stop: Vec<String>,
    /// Tokens that end the text, besides those that the model's files name.
    pub stop_ids: Vec<u32>,
    /// Go on after the tokens that the model's files name.
    pub ignore_eos: bool,
    /// Compensate what is given too, as is done for every token that is made.
    pub compensate_prompt: bool,
    /// Guess tokens ahead. The text is the same; a layer with a window that is full makes none.
    pub speculate: Speculate,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sampling: Sampling::GREEDY,
            seed: 0,
            max_new_tokens: usize::MAX,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            compensate_prompt: false,
            speculate: Speculate::Off,
        }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// One of the tokens that end a text.
    Stop,
    /// The most tokens asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller had enough: a stop text, or [`Session::stop`](super::Session::stop).
    Caller,
}

/// What one step of a session makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The token; none where the text has ended and only held text comes out.
    pub token: Option<u32>,
    /// What can be shown now: whole characters, and nothing that may become a stop text. May be empty.
    pub text: String,
}

/// What was made of one prompt, so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generated {
    /// Tokens made, the one that ended the text not among them.
    pub tokens: Vec<u32>,
    /// Their text, as far as it is certain; empty without a tokenizer.
    pub text: String,
    /// Why it ended; none before it has.
    pub finish: Option<Finish>,
    /// Tokens of the prompt that were there already.
    pub kept: usize,
    /// From the first operation to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
    /// Tokens decoded in `decode_time`: all but the first, the one that ended the text among them.
    pub decoded: usize,
    /// Passes that they took: as many, or fewer where guesses were right.
    pub passes: usize,
    /// Tokens that were guessed, and how many of them were right.
    pub guessed: usize,
    /// See `guessed`.
    pub right: usize,
}

impl Generated {
    /// Tokens made each second, the prompt's time included, as the reference counts.
    pub fn tokens_per_second(&self) -> f64 {
        per_second(self.tokens.len(), self.prompt_time + self.decode_time)
    }

    /// Tokens decoded in a pass; 0 where there was none.
    pub fn tokens_per_pass(&self) -> f64 {
        if self.passes == 0 { 0.0 } else { self.decoded as f64 / self.passes as f64 }
    }

    /// Tokens decoded each second, the prompt left out; 0 when there was at most one.
    pub fn decode_per_second(&self) -> f64 {
        per_second(self.decoded, self.decode_time)
    }
}

/// `count / time`; 0 where no time has passed, so that it is a number whatever was asked for.
pub fn per_second(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}
