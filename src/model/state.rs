//! One text in the making: what a model may do with it, and when.

use anyhow::{Result, ensure};

use super::Model;
use crate::backend::{Activations, DecodeBackend, cached_positions, ensure_room};
use crate::config::{Attention, ModelConfig, NormPlacement, Projection};
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
    /// The most tokens that there were since the text last began empty: what is written over older tokens.
    reached: usize,
    /// Tokens that each layer sees and has room for, where that is not a whole text; each pair once.
    rings: Vec<(usize, usize)>,
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
            reached: 0,
            rings: rings(c, max_seq_len),
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
        (state.len, state.reached, state.chosen) = (0, 0, 0);
        state.draws = (sampling.temperature > 0.0).then_some(draws.len());
        state.whole = true;
        Ok(())
    }

    /// Starts over with the first `kept` tokens of the text that `state` holds, where [`State::keeps`] says that they
    /// are still there; the rest as [`Model::begin`].
    ///
    /// # Errors
    /// Those of [`Model::begin`], and tokens that are not there: the text is as it was then.
    pub fn resume(&self, state: &mut State<B>, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        self.own(state)?;
        ensure!(
            state.keeps(kept),
            "the first {kept} tokens of a text of {} are asked for, they are not all there, begin it anew",
            state.len
        );
        let reached = state.reached;
        self.begin(state, sampling, draws)?;
        if kept > 0 {
            state.grow(kept, 0, |state| self.backend.recall(&mut state.sequence, kept))?;
            state.reached = reached;
        }
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

    /// Whether the first `tokens` of the text are there to go on from. A layer with a window forgets tokens that are
    /// far behind the latest one, even if the text is cut to them later.
    pub fn keeps(&self, tokens: usize) -> bool {
        let seen = |&(window, capacity): &(usize, usize)| {
            (tokens + 1).saturating_sub(window) >= self.reached.saturating_sub(capacity)
        };
        tokens == 0 || self.whole && tokens <= self.len && self.rings.iter().all(seen)
    }

    /// The most tokens that one pass takes.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Whether a layer forgets what is far behind: then the text cannot be cut by more than a token once it is longer.
    pub fn forgets(&self) -> bool {
        !self.rings.is_empty()
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
        self.reached = self.reached.max(self.len);
        self.chosen += chosen;
        Ok(())
    }
}

/// Window and room of the layers whose cache has no room for a text of `max_seq_len` tokens.
fn rings(config: &ModelConfig, max_seq_len: usize) -> Vec<(usize, usize)> {
    let attentions = config.layers.iter().map(|layer| layer.attention());
    let of = |attention: &Attention| Some((attention.window?, cached_positions(attention, max_seq_len)));
    let mut rings: Vec<_> = attentions.filter_map(of).filter(|&(_, capacity)| capacity < max_seq_len).collect();
    rings.sort_unstable();
    rings.dedup();
    rings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::GemvBackend;
    use crate::backend::cpu::Cpu;
    use crate::format::Storage;
    use crate::random::RandomWeights;

    /// What [`State::keeps`] says of each cut of a text with a window is what its next logits say: those of the text
    /// read from its beginning where it says yes, bit for bit, and others where it says no.
    #[test]
    fn a_cut_text_is_there_or_not() {
        let config = ModelConfig::from_json(&serde_json::json!({
            "model_type": "mistral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32, "rms_norm_eps": 1e-5,
            "sliding_window": 5, "max_position_embeddings": 64, "tie_word_embeddings": true,
        }));
        let weights = RandomWeights::new(config.unwrap(), Storage::ANYPREC, 3, 1).unwrap();
        let text: Vec<u32> = (0..30).map(|i| i * 7 % 32).collect();
        for passes in [1, 4] {
            let cpu = Cpu::that_takes(passes, 0);
            let model = Model::load(&cpu, &weights, |_| ()).unwrap();
            let mut logits = cpu.vector(32).unwrap();
            // Token by token: a row does not depend on the rows that it is read with.
            let mut read = |state: &mut State<Cpu>, tokens: &[u32]| {
                let each = |token: &u32| {
                    model.logits(state, &[*token], false, &mut logits).unwrap();
                    logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                tokens.iter().map(each).last().unwrap()
            };
            let mut kept = 0;
            for cut in 1..=text.len() {
                let mut state = model.state(64).unwrap();
                read(&mut state, &text);
                let keeps = state.keeps(cut);
                kept += usize::from(keeps);
                let resumed = model.resume(&mut state, cut, &Sampling::GREEDY, &[]);
                assert_eq!(resumed.is_ok(), keeps, "{cut}");
                if !keeps {
                    assert_eq!(state.len(), text.len(), "a refused cut changes nothing");
                    cpu.recall(&mut state.sequence, cut).unwrap();
                    state.len = cut;
                }
                let mut fresh = model.state(64).unwrap();
                read(&mut fresh, &text[..cut]);
                assert_eq!(read(&mut state, &[31]) == read(&mut fresh, &[31]), keeps, "cut to {cut}");
            }
            assert_eq!(kept, 2, "a window's cache has room for what the next token sees, and that is all but one");
        }
    }
}
