//! One text in the making: what a model may do with it, and when.

use anyhow::{Result, ensure};

use super::Model;
use crate::backend::{Activations, DecodeBackend, ensure_room};
use crate::config::{NormPlacement, Projection};
use crate::sampling::Sampling;

/// One text in the making, and the activations of the tokens at hand.
pub struct State<B: DecodeBackend> {
    /// Key-value cache, length, sampled tokens.
    pub(super) sequence: B::Sequence,
    pub(super) activations: Activations<B>,
    pub(super) last: B::Vector,   // [hidden_size]
    pub(super) logits: B::Vector, // [vocab_size]
    /// A recorded token, and which plans of the model it points to.
    pub(super) graph: Option<(u64, B::Graph)>,
    pub(super) max_tokens: usize,
    model: u64,
    max_seq_len: usize,
    len: usize,
    chosen: usize,
    /// Tokens that may be chosen since the text began: as many as there are draws, or any number where none decides.
    draws: Option<usize>,
    /// False from when an operation begins until it has ended well.
    whole: bool,
}

impl<B: DecodeBackend> Model<'_, B> {
    /// Room for one text of 1 to `max_seq_len` tokens, which begins empty and is made by greedy choices.
    ///
    /// # Errors
    /// No tokens, a context the model was not trained for, or no memory.
    pub fn state(&self, max_seq_len: usize) -> Result<State<B>> {
        let (c, b) = (&self.config, self.backend);
        let max = c.max_position_embeddings;
        ensure!(max_seq_len > 0, "a text of 0 tokens is asked for, 1 to {max} are allowed");
        ensure!(max_seq_len <= max, "{max_seq_len} tokens are asked for, the model's context is {max}");
        let max_tokens = b.device().max_tokens.clamp(1, max_seq_len);
        let attended = c.layers.iter().map(|l| l.attention().num_heads * l.attention().head_dim).max().unwrap_or(0);
        let branches = c.layers.iter().any(|layer| layer.norms != NormPlacement::Before);
        let mut state = State {
            sequence: b.sequence(c, max_seq_len)?,
            activations: Activations {
                h: b.vector(max_tokens * c.hidden_size)?,
                qkv: b.vector(max_tokens * c.widest(Projection::Qkv))?,
                attended: b.vector(max_tokens * attended)?,
                gu: b.vector(max_tokens * c.widest(Projection::GateUp))?,
                branch: b.vector(if branches { max_tokens * c.hidden_size } else { 1 })?,
            },
            last: b.vector(c.hidden_size)?,
            logits: b.vector(c.vocab_size)?,
            graph: None,
            max_tokens,
            model: self.id,
            max_seq_len,
            len: 0,
            chosen: 0,
            draws: None,
            whole: true,
        };
        self.begin(&mut state, &Sampling::GREEDY, &[])?;
        Ok(state)
    }

    /// Starts over with an empty text; `draws[i]` decides the `i`-th sampled token.
    ///
    /// # Errors
    /// A state of another model, rules that say nothing ([`Sampling::validate`]), a draw outside `[0, 1)`, or what the
    /// device says.
    pub fn begin(&self, state: &mut State<B>, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        self.own(state)?;
        sampling.validate()?;
        if let Some((i, draw)) = draws.iter().enumerate().find(|(_, draw)| !(0.0..1.0).contains(*draw)) {
            anyhow::bail!("draw {i} is {draw}, 0 to 1 without 1 is allowed");
        }
        state.graph = None;
        state.whole = false;
        self.backend.begin(&mut state.sequence, sampling, draws)?;
        (state.len, state.chosen) = (0, 0);
        state.draws = (sampling.temperature > 0.0).then_some(draws.len());
        state.whole = true;
        Ok(())
    }

    /// Waits for the `i`-th token chosen since the text began, and returns it.
    ///
    /// # Errors
    /// A state of another model; a token that was not asked for yet; one that there is none to choose for, because the
    /// largest logit is not a finite number; a failing device.
    pub fn sampled(&self, state: &State<B>, i: usize) -> Result<u32> {
        self.own(state)?;
        ensure!(i < state.chosen, "token {i} is asked for, {} were chosen so far", state.chosen);
        self.backend.sampled(&state.sequence, i)
    }

    /// Fails for what another model has made: its buffers have other sizes, or lie on another device.
    pub(super) fn own(&self, state: &State<B>) -> Result<()> {
        ensure!(
            state.model == self.id,
            "the state was made by another model, make one with the state() of the model that it is used with"
        );
        Ok(())
    }
}

impl<B: DecodeBackend> State<B> {
    /// Tokens read so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that there is still room for.
    pub fn room(&self) -> usize {
        self.max_seq_len - self.len
    }

    /// Tokens of the longest text.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// The most tokens that one pass takes.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Fails if `tokens` more cannot be read: nothing is ever written behind the end of the cache.
    pub(super) fn takes(&self, tokens: usize) -> Result<()> {
        ensure!(self.whole, "an operation on this text has failed, begin it anew");
        ensure_room(self.len, tokens, self.max_seq_len)
    }

    /// Fails if another token cannot be chosen.
    pub(super) fn chooses(&self) -> Result<()> {
        // One place for each token that was read, and one more.
        let most = self.draws.unwrap_or(usize::MAX).min(self.max_seq_len + 1);
        ensure!(self.chosen < most, "{} tokens were chosen, there is no draw or no room for another", self.chosen);
        Ok(())
    }

    /// Fails if there is no token that was chosen last.
    pub(super) fn goes_on(&self) -> Result<()> {
        ensure!(self.chosen > 0, "no token was chosen yet, give the text a prompt first");
        Ok(())
    }

    /// Runs `work`, after which so many more tokens are read and chosen.
    pub(super) fn grow(
        &mut self,
        read: usize,
        chosen: usize,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.whole = false;
        work(self)?;
        self.whole = true;
        self.len += read;
        self.chosen += chosen;
        Ok(())
    }
}
