//! What a model reads while it is watched: a text that is given, text that it writes itself, or both.

use anyhow::{Result, ensure};

use crate::config::ModelConfig;

/// Calibration text, in windows of equal length.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Tokens of a window.
    pub seq_len: usize,
    /// A text that is given.
    pub text: Option<Text>,
    /// Text that the model writes.
    pub own: Option<Own>,
}

/// The first windows of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    /// The text's ids.
    pub tokens: Vec<u32>,
    /// Windows, if the text has so many.
    pub samples: usize,
    /// The text's name, for the record.
    pub name: String,
}

/// Text that the model writes: from a beginning of text, from an end of text, from a random token, and as a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    /// Windows, of each kind as many as of the others.
    pub samples: usize,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Calibration {
    /// Tokens of a window, unless something else is asked for.
    pub const SEQ_LEN: usize = 512;
    /// Windows, unless something else is asked for: as many as SmolLM2-135M has time for in five minutes on two cores.
    pub const SAMPLES: usize = 32;
    /// The same where a GPU quantizes: 200,704 tokens.
    pub const SAMPLES_OF_A_GPU: usize = 392;
    /// The share of windows that the model writes beside a text that is given, unless something else is asked for.
    pub const OWN_SHARE: f64 = 0.5;
    /// Tokens that all windows may have together: sizes in bytes that follow from them do not overflow.
    pub const MOST_TOKENS: usize = 1 << 32;

    /// The first `samples` windows of a text.
    pub fn of_text(tokens: Vec<u32>, seq_len: usize, samples: usize, name: &str) -> Self {
        Self { seq_len, text: Some(Text { tokens, samples, name: name.to_owned() }), own: None }
    }

    /// Windows that the model writes.
    pub fn of_own(seq_len: usize, samples: usize, seed: u64) -> Self {
        Self { seq_len, text: None, own: Some(Own { samples, seed }) }
    }

    /// Windows that there will be: those of the text, if more are asked for, and those that the model writes.
    pub fn samples(&self) -> usize {
        self.given().saturating_add(self.own.map_or(0, |own| own.samples))
    }

    /// Windows of the text that is given.
    pub(super) fn given(&self) -> usize {
        let of_text = |text: &Text| text.samples.min(text.tokens.len() / self.seq_len.max(1));
        self.text.as_ref().map_or(0, of_text)
    }

    /// Tokens of all windows.
    pub(super) fn tokens(&self) -> usize {
        self.samples() * self.seq_len
    }

    /// For the record.
    pub(super) fn describe(&self) -> String {
        let size = |windows| format!("{windows} x {} tokens", self.seq_len);
        let text = self.text.as_ref().map(|text| format!("{}, {}", text.name, size(self.given())));
        let own = self.own.map(|own| format!("the model's own text, {}, seed {}", size(own.samples), own.seed));
        text.into_iter().chain(own).collect::<Vec<_>>().join("; ")
    }

    pub(super) fn validate(&self, config: &ModelConfig) -> Result<()> {
        let (seq_len, context) = (self.seq_len, config.max_position_embeddings);
        ensure!(
            (1..=context).contains(&seq_len),
            "windows of {seq_len} tokens, 1 to {context} (the model's context) are allowed, use --seq-len"
        );
        if let Some(Text { tokens, samples, .. }) = &self.text {
            let found = tokens.len();
            ensure!(
                *samples == 0 || found >= seq_len,
                "the calibration text has {found} tokens, at least one window of {seq_len} is needed: give more text, a \
                 smaller --seq-len, or no --calib, and the model writes its own"
            );
        }
        let samples = self.samples();
        ensure!(samples > 0, "0 windows of calibration text, at least 1 is needed, use --samples");
        ensure!(
            samples.checked_mul(seq_len).is_some_and(|tokens| tokens <= Self::MOST_TOKENS),
            "{samples} windows of {seq_len} tokens, {} tokens in all are allowed, use fewer --samples",
            Self::MOST_TOKENS
        );
        Ok(())
    }
}
