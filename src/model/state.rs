//! Texts in the making: what a model may do with each, and when.

use anyhow::{Context, Result, ensure};

use super::Model;
use crate::backend::{Activations, DECODE_ROWS, DecodeBackend, cached_positions, ensure_room, holds_no_text};
use crate::config::{Attention, ModelConfig, NormPlacement, Projection};
use crate::sampling::Sampling;

/// Texts in the making, each in a slot of its own, and the activations of the rows at hand.
pub struct State<B: DecodeBackend> {
    /// Keys and values, lengths, sampled tokens.
    pub(super) cache: B::Cache,
    pub(super) activations: Activations<B>,
    pub(super) last: B::Vector,   // [DECODE_ROWS, hidden_size]
    pub(super) logits: B::Vector, // [DECODE_ROWS, vocab_size]
    /// Recorded passes, and which plans of the model they point to.
    pub(super) graphs: Option<(u64, B::Graphs)>,
    pub(super) max_tokens: usize,
    model: u64,
    max_seq_len: usize,
    texts: Vec<Text>, // [slots]
    /// Tokens that each layer sees and has room for, where that is not a whole text; each pair once.
    rings: Vec<(usize, usize)>,
}

/// What is known of the text in a slot.
#[derive(Debug, Clone, Default)]
struct Text {
    len: usize,
    /// The most tokens that there were since the text last began empty: what is written over older tokens.
    reached: usize,
    chosen: usize,
    /// Tokens that may be chosen since the text began: as many as there are draws, or any number where none decides.
    draws: Option<usize>,
    begun: bool,
    /// False from when an operation begins until it has ended well.
    whole: bool,
}

impl<B: DecodeBackend> Model<'_, B> {
    /// Room for `slots` texts of 1 to `max_seq_len` tokens each. The first begins empty and is made by greedy choices; the
    /// others take memory when they begin.
    ///
    /// # Errors
    /// No slots, no tokens, a context the model was not trained for, or no memory.
    pub fn state(&self, slots: usize, max_seq_len: usize) -> Result<State<B>> {
        let (c, b) = (&self.config, self.backend);
        let max = c.max_position_embeddings;
        ensure!(slots > 0, "a state without slots, at least 1 is needed");
        ensure!(max_seq_len > 0, "a text of 0 tokens is asked for, 1 to {max} are allowed");
        ensure!(max_seq_len <= max, "{max_seq_len} tokens are asked for, the model's context is {max}");
        let max_tokens = b.device().max_tokens.clamp(1, max_seq_len.max(slots));
        let attended = c.layers.iter().map(|l| l.attention().num_heads * l.attention().head_dim).max().unwrap_or(0);
        let branches = c.layers.iter().any(|layer| layer.norms != NormPlacement::Before);
        let mut state = State {
            cache: b.cache(c, slots, max_seq_len, self.kv_bits)?,
            activations: Activations {
                h: b.vector(max_tokens * c.hidden_size)?,
                qkv: b.vector(max_tokens * c.widest(Projection::Qkv))?,
                attended: b.vector(max_tokens * attended)?,
                gu: b.vector(max_tokens * c.widest(Projection::GateUp))?,
                branch: b.vector(if branches { max_tokens * c.hidden_size } else { 1 })?,
            },
            last: b.vector(DECODE_ROWS.min(max_tokens) * c.hidden_size)?,
            logits: b.vector(DECODE_ROWS.min(max_tokens) * c.vocab_size)?,
            graphs: None,
            max_tokens,
            model: self.id,
            max_seq_len,
            texts: vec![Text::default(); slots],
            rings: rings(c, max_seq_len),
        };
        self.begin(&mut state, 0, &Sampling::GREEDY, &[])?;
        Ok(state)
    }

    /// Starts over with an empty text in `slot`; `draws[i]` decides the `i`-th sampled token.
    ///
    /// # Errors
    /// A state of another model, no such slot, rules that say nothing ([`Sampling::validate`]), a draw outside `[0, 1)`,
    /// no memory for another text, or what the device says.
    pub fn begin(&self, state: &mut State<B>, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        self.own(state)?;
        sampling.validate()?;
        if let Some((i, draw)) = draws.iter().enumerate().find(|(_, draw)| !(0.0..1.0).contains(*draw)) {
            anyhow::bail!("draw {i} is {draw}, 0 to 1 without 1 is allowed");
        }
        crate::backend::ensure_slot(slot, state.texts.len())?;
        state.texts[slot].whole = false;
        self.backend.begin(&mut state.cache, slot, sampling, draws)?;
        let draws = (sampling.temperature > 0.0).then_some(draws.len());
        state.texts[slot] = Text { draws, begun: true, whole: true, ..Text::default() };
        Ok(())
    }

    /// Starts over with the first `kept` tokens of the text that `slot` holds, where [`State::keeps`] says that they
    /// are still there; the rest as [`Model::begin`].
    ///
    /// # Errors
    /// Those of [`Model::begin`], and tokens that are not there: the text is as it was then.
    pub fn resume(
        &self,
        state: &mut State<B>,
        slot: usize,
        kept: usize,
        sampling: &Sampling,
        draws: &[f32],
    ) -> Result<()> {
        self.own(state)?;
        ensure!(
            state.keeps(slot, kept),
            "the first {kept} tokens of a text of {} are asked for, they are not all there, begin it anew",
            state.len(slot)
        );
        let reached = state.texts.get(slot).map_or(0, |text| text.reached);
        self.begin(state, slot, sampling, draws)?;
        if kept > 0 {
            state.grow(&[(slot, kept, 0)], |state| self.backend.cut(&mut state.cache, slot, kept, 0))?;
            state.texts[slot].reached = reached;
        }
        Ok(())
    }

    /// Goes on from the first `tokens` of the text and the first `chosen` of the tokens chosen since it began, as if the
    /// others had not been: so guesses that were wrong are taken back.
    ///
    /// # Errors
    /// A state of another model; tokens that are not all there, as [`State::keeps`] says; what the device says.
    pub fn cut(&self, state: &mut State<B>, slot: usize, tokens: usize, chosen: usize) -> Result<()> {
        self.own(state)?;
        let has = (state.len(slot), state.chosen(slot));
        ensure!(
            state.keeps(slot, tokens) && chosen <= has.1,
            "the text is to be cut to {tokens} tokens, {chosen} of them chosen, it has {} and {}, begin it anew",
            has.0,
            has.1
        );
        state.grow(&[(slot, 0, 0)], |state| self.backend.cut(&mut state.cache, slot, tokens, chosen))?;
        (state.texts[slot].len, state.texts[slot].chosen) = (tokens, chosen);
        Ok(())
    }

    /// Waits for the `i`-th token chosen since the text began, and returns it.
    ///
    /// # Errors
    /// A state of another model; a token that was not asked for yet; one that there is none to choose for, because the
    /// largest logit is not a finite number; a failing device.
    pub fn sampled(&self, state: &State<B>, slot: usize, i: usize) -> Result<u32> {
        self.own(state)?;
        let chosen = state.chosen(slot);
        ensure!(i < chosen, "token {i} is asked for, {chosen} were chosen so far");
        self.backend.sampled(&state.cache, slot, i)
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
    /// How many texts there is room for.
    pub fn slots(&self) -> usize {
        self.texts.len()
    }

    /// Tokens read so far of the text in `slot`; none where there is no such slot.
    pub fn len(&self, slot: usize) -> usize {
        self.texts.get(slot).map_or(0, |text| text.len)
    }

    /// True before the first token.
    pub fn is_empty(&self, slot: usize) -> bool {
        self.len(slot) == 0
    }

    /// Tokens that there is still room for.
    pub fn room(&self, slot: usize) -> usize {
        self.max_seq_len - self.len(slot)
    }

    /// Tokens of the longest text.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// Whether the first `tokens` of the text are there to go on from. A layer with a window forgets tokens that are
    /// far behind the latest one, even if the text is cut to them later.
    pub fn keeps(&self, slot: usize, tokens: usize) -> bool {
        let Some(text) = self.texts.get(slot) else { return false };
        let seen = |&(window, capacity): &(usize, usize)| {
            (tokens + 1).saturating_sub(window) >= text.reached.saturating_sub(capacity)
        };
        tokens == 0 || text.whole && tokens <= text.len && self.rings.iter().all(seen)
    }

    /// The most tokens that one pass takes, of all texts together.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Whether a layer forgets what is far behind: then a text cannot be cut by more than a token once it is longer.
    pub fn forgets(&self) -> bool {
        !self.rings.is_empty()
    }

    /// Tokens chosen since the text began.
    pub fn chosen(&self, slot: usize) -> usize {
        self.texts.get(slot).map_or(0, |text| text.chosen)
    }

    fn text(&self, slot: usize) -> Result<&Text> {
        crate::backend::ensure_slot(slot, self.texts.len())?;
        Some(&self.texts[slot]).filter(|text| text.begun).with_context(|| holds_no_text(slot))
    }

    /// Fails if `tokens` more cannot be read: nothing is ever written behind the end of the cache.
    pub(super) fn takes(&self, slot: usize, tokens: usize) -> Result<()> {
        let text = self.text(slot)?;
        ensure!(text.whole, "an operation on this text has failed, begin it anew");
        ensure_room(text.len, tokens, self.max_seq_len)
    }

    /// Fails if `more` tokens cannot be chosen.
    pub(super) fn chooses(&self, slot: usize, more: usize) -> Result<()> {
        let text = self.text(slot)?;
        // One place for each token that was read, and one more.
        let most = text.draws.unwrap_or(usize::MAX).min(self.max_seq_len + 1);
        ensure!(
            more == 0 || text.chosen + more <= most,
            "{} tokens were chosen, there is no draw or no room for another",
            text.chosen
        );
        Ok(())
    }

    /// Fails if there is no token that was chosen last.
    pub(super) fn goes_on(&self, slot: usize) -> Result<()> {
        ensure!(self.chosen(slot) > 0, "no token was chosen yet, give the text a prompt first");
        Ok(())
    }

    /// Runs `work`, after which each of these slots has so many more tokens read and chosen.
    pub(super) fn grow(
        &mut self,
        grown: &[(usize, usize, usize)],
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        grown.iter().for_each(|&(slot, ..)| self.texts[slot].whole = false);
        work(self)?;
        for &(slot, read, chosen) in grown {
            let text = &mut self.texts[slot];
            text.whole = true;
            text.len += read;
            text.reached = text.reached.max(text.len);
            text.chosen += chosen;
        }
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
                    model.logits(state, 0, &[*token], false, &mut logits).unwrap();
                    logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                tokens.iter().map(each).last().unwrap()
            };
            let mut kept = 0;
            for cut in 1..=text.len() {
                let mut state = model.state(1, 64).unwrap();
                read(&mut state, &text);
                let keeps = state.keeps(0, cut);
                kept += usize::from(keeps);
                let resumed = model.resume(&mut state, 0, cut, &Sampling::GREEDY, &[]);
                assert_eq!(resumed.is_ok(), keeps, "{cut}");
                if !keeps {
                    assert_eq!(state.len(0), text.len(), "a refused cut changes nothing");
                    cpu.cut(&mut state.cache, 0, cut, 0).unwrap();
                    state.texts[0].len = cut;
                }
                let mut fresh = model.state(1, 64).unwrap();
                read(&mut fresh, &text[..cut]);
                assert_eq!(read(&mut state, &[31]) == read(&mut fresh, &[31]), keeps, "cut to {cut}");
            }
            assert_eq!(kept, 2, "a window's cache has room for what the next token sees, and that is all but one");
        }
    }
}
