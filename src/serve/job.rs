//! One text that is asked for, and what is heard of it.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::guide::Guide;
use crate::sampling::Sampling;

/// How one text is made.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// How tokens are chosen.
    pub(super) sampling: Sampling,
    /// Decides every choice, with `sampling`.
    pub(super) seed: u64,
    /// The most tokens to make, as far as the context has room for them.
    pub(super) max_tokens: usize,
    /// Tokens before which nothing ends the text.
    pub(super) min_tokens: usize,
    /// Texts before the first of which the text ends.
    pub(super) stop: Vec<String>,
    /// Tokens that end the text, besides the model's own.
    pub(super) stop_ids: Vec<u32>,
    /// Go on after the model's own.
    pub(super) ignore_eos: bool,
    /// What tokens that were there before cost.
    pub(super) penalties: Penalties,
    /// What is added to the logits of single tokens.
    pub(super) bias: Vec<(u32, f32)>,
    /// How many of the most probable tokens are told beside each token; none where no probabilities are asked for.
    pub(super) logprobs: Option<usize>,
    /// The prompt's tokens are told with their probabilities, too.
    pub(super) scores_prompt: bool,
    /// What the text has to look like.
    pub(super) guide: Option<Guide>,
    /// Special tokens are told as text.
    pub(super) special_text: bool,
    /// The prompt is compensated, too.
    pub(super) compensate_prompt: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            sampling: Sampling::GREEDY,
            seed: 0,
            max_tokens: usize::MAX,
            min_tokens: 0,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            penalties: Penalties::NONE,
            bias: Vec::new(),
            logprobs: None,
            scores_prompt: false,
            guide: None,
            special_text: false,
            compensate_prompt: false,
        }
    }
}

/// What tokens that were there before cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Penalties {
    /// Divides positive logits of tokens that the prompt or the text has, multiplies negative ones.
    pub(super) repetition: f32,
    /// Taken from the logit of each token that was made.
    pub(super) presence: f32,
    /// The same, as often as it was made.
    pub(super) frequency: f32,
}

impl Penalties {
    /// Nothing.
    pub(super) const NONE: Self = Self { repetition: 1.0, presence: 0.0, frequency: 0.0 };
}

/// A text that waits for its turn.
#[derive(Debug)]
pub(super) struct Job {
    /// Tokens to go on from.
    pub(super) prompt: Vec<u32>,
    /// How it is made.
    pub(super) rules: Rules,
    /// Which of the texts it is that its listener asked for.
    pub(super) index: usize,
    /// Who listens; a text that nobody listens to any more is left within one step.
    pub(super) events: UnboundedSender<(usize, Event)>,
    /// When it was asked for.
    pub(super) since: Instant,
}

impl Job {
    /// Tells whoever listens; who has gone is noticed elsewhere.
    pub(super) fn say(&self, event: Event) {
        let _ = self.events.send((self.index, event));
    }
}

/// What is heard of a text.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Event {
    /// It has a slot, in which so many tokens of the prompt were there already.
    Begun {
        /// Tokens that are not read again.
        cached: usize,
    },
    /// The prompt's next tokens, where their probabilities were asked for; the first has none.
    Prompt(Vec<Scored>),
    /// A token was made.
    Made {
        /// Text that is certain now: whole characters, nothing that may become a stop text. May be empty.
        text: String,
        /// The token, unless only held text comes out.
        token: Option<Scored>,
    },
    /// It has ended.
    End(End),
    /// It ends here: what went wrong.
    Failed(String),
}

/// A token and its probability among others.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scored {
    /// The token.
    pub(super) id: u32,
    /// Natural logarithm of its probability, before temperature and rules; none where it was not asked for.
    pub(super) logprob: Option<f32>,
    /// The most probable tokens, most probable first.
    pub(super) top: Vec<(u32, f32)>,
}

/// Why and with what a text ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct End {
    /// Why.
    pub(super) finish: Finish,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: usize,
    /// Those that were there already.
    pub(super) cached: usize,
    /// Tokens made, the one that ended it among them.
    pub(super) made: usize,
    /// In the queue.
    pub(super) waited: Duration,
    /// From there to the first token.
    pub(super) prompt_time: Duration,
    /// From the first token to the last.
    pub(super) decode_time: Duration,
}

/// Why a text ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Finish {
    /// A token that ends texts, or what was asked for is complete.
    Stop,
    /// A token that was asked for as an end.
    Token(u32),
    /// A stop text.
    Text(String),
    /// The most tokens asked for, or the context is full.
    Length,
}

impl Finish {
    /// OpenAI's word for it.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Stop | Self::Token(_) | Self::Text(_) => "stop",
            Self::Length => "length",
        }
    }
}
