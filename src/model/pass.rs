//! Passes: rows of one or several texts go through the model together.

use anyhow::{Result, bail, ensure};

use super::{Model, State};
use crate::backend::{DECODE_ROWS, DecodeBackend, Feed, Input, Pass, Product, Rows, count};
use crate::sampling::Sampling;

/// What one text does in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<'a> {
    /// Which text.
    pub slot: usize,
    /// The tokens that are read behind it; `None` is the one that was chosen last, wherever it is.
    pub tokens: Option<&'a [u32]>,
    /// After how many of these rows, the last ones, a token is chosen: none, the next token after the last row, or one
    /// after each of several rows, each with a draw of its own.
    pub choices: usize,
    /// The rows are compensated.
    pub compensated: bool,
}

impl Part<'_> {
    /// The token chosen last is read, and the next one chosen.
    pub fn next(slot: usize) -> Self {
        Self { slot, tokens: None, choices: 1, compensated: true }
    }

    /// How many rows it has.
    pub fn rows(&self) -> usize {
        self.tokens.map_or(1, <[u32]>::len)
    }
}

impl<B: DecodeBackend> Model<'_, B> {
    /// Makes ready what a prompt of `prompt` tokens and the tokens after it need; what the slot holds is lost.
    ///
    /// # Errors
    /// A state of another model, a prompt that it has no room for, or a device that cannot, for instance because a
    /// kernel does not compile.
    pub fn prepare(&self, state: &mut State<B>, slot: usize, prompt: usize, compensated: bool) -> Result<()> {
        self.begin(state, slot, &Sampling::GREEDY, &[])?;
        state.takes(slot, prompt)?;
        let most = state.max_tokens;
        // The passes of a long prompt are alike but for the last.
        let passes = if prompt > most { [most, prompt % most] } else { [prompt, 0] };
        // Without effect on the device: the text stays empty.
        state.grow(&[(slot, 0, 0)], |state| {
            self.backend.prepare(&mut || {
                for count in passes.into_iter().filter(|&tokens| tokens > 0) {
                    let rows = [Rows { slot, position: 0, count }];
                    let pass = Pass { rows: &rows, compensated: if compensated { count } else { 0 } };
                    self.run(state, Input::Tokens(&vec![0; count]), pass, (&[count - 1], &[slot]))?;
                }
                let rows = [Rows { slot, position: 0, count: 1 }];
                self.run(state, Input::Sampled, Pass { rows: &rows, compensated: 1 }, (&[0], &[slot]))
            })
        })
    }

    /// Reads `tokens` behind the text, and chooses none after them.
    ///
    /// # Errors
    /// A state of another model or a text on which an operation has failed, no tokens, an id outside the vocabulary, or
    /// no room: nothing was read then. Or what the device says.
    pub fn extend(&self, state: &mut State<B>, slot: usize, tokens: &[u32], compensated: bool) -> Result<()> {
        self.admit(state, &[Part { slot, tokens: Some(tokens), choices: 0, compensated }], usize::MAX)?;
        let mut passes = tokens.chunks(state.max_tokens);
        passes.try_for_each(|tokens| self.pass(state, &[Part { slot, tokens: Some(tokens), choices: 0, compensated }]))
    }

    /// Reads `tokens`, and chooses the first token after them.
    ///
    /// # Errors
    /// A state of another model or a text on which an operation has failed, no tokens, an id outside the vocabulary, no
    /// room, no draw for the choice: nothing was read then. Or what the device says.
    pub fn prompt(&self, state: &mut State<B>, slot: usize, tokens: &[u32], compensated: bool) -> Result<()> {
        self.admit(state, &[Part { slot, tokens: Some(tokens), choices: 1, compensated }], usize::MAX)?;
        let last = (tokens.len() - 1) / state.max_tokens * state.max_tokens;
        let (before, tokens) = tokens.split_at(last);
        if !before.is_empty() {
            self.extend(state, slot, before, compensated)?;
        }
        self.pass(state, &[Part { slot, tokens: Some(tokens), choices: 1, compensated }])
    }

    /// Reads the token chosen last in each of `slots`, and chooses the next one.
    ///
    /// # Errors
    /// Those of [`Model::pass`].
    pub fn step(&self, state: &mut State<B>, slots: &[usize]) -> Result<()> {
        let parts: Vec<_> = slots.iter().map(|&slot| Part::next(slot)).collect();
        self.pass(state, &parts)
    }

    /// One pass over the rows of all `parts`, each of another text. What comes of a text does not depend on the others.
    ///
    /// # Errors
    /// A state of another model, a slot twice, no rows, more than [`State::max_tokens`], or more than 16 choices; a text on
    /// which an operation has failed, that no token was chosen for yet, without room, or without a draw for a choice; an
    /// id outside the vocabulary: nothing was read then. Or what the device says: the texts of this pass have failed then.
    pub fn pass(&self, state: &mut State<B>, parts: &[Part<'_>]) -> Result<()> {
        self.admit(state, parts, state.max_tokens)?;
        // Rows that are compensated come first.
        let mut parts = parts.to_vec();
        parts.sort_by_key(|part| !part.compensated);
        let rows: Vec<_> = parts
            .iter()
            .map(|part| Rows { slot: part.slot, position: state.len(part.slot), count: part.rows() })
            .collect();
        let compensated = parts.iter().filter(|part| part.compensated).map(Part::rows).sum();
        let pass = Pass { rows: &rows, compensated };
        let grown: Vec<_> = parts.iter().map(|part| (part.slot, part.rows(), part.choices)).collect();
        if parts.iter().all(|&part| part == Part::next(part.slot)) {
            return self.replay(state, pass, &grown);
        }
        let mut tokens = Vec::with_capacity(pass.count());
        let (mut which, mut slots) = (Vec::new(), Vec::new());
        for part in &parts {
            match part.tokens {
                Some(own) => tokens.extend(own),
                None => tokens.push(self.sampled(state, part.slot, state.chosen(part.slot) - 1)?),
            }
            which.extend(tokens.len() - part.choices..tokens.len());
            slots.extend(std::iter::repeat_n(part.slot, part.choices));
        }
        state.grow(&grown, |state| self.run(state, Input::Tokens(&tokens), pass, (&which, &slots)))
    }

    /// A pass of tokens that were chosen last, one a text.
    fn replay(&self, state: &mut State<B>, pass: Pass<'_>, grown: &[(usize, usize, usize)]) -> Result<()> {
        let slots: Vec<_> = pass.rows.iter().map(|rows| rows.slot).collect();
        let which: Vec<_> = (0..slots.len()).collect();
        // Passes recorded with other plans point to what is no longer there.
        let recorded = state.graphs.take().filter(|(planned, _)| *planned == self.planned);
        let mut graphs = recorded.map(|(_, graphs)| graphs).unwrap_or_default();
        // Recorded passes run nothing of this again: whatever has to be checked was checked before.
        state.grow(grown, |state| {
            let mut work = || self.run(state, Input::Sampled, pass, (&which, &slots));
            self.backend.replay(&mut graphs, pass.rows, &mut work)
        })?;
        state.graphs = Some((self.planned, graphs));
        Ok(())
    }

    /// Reads `tokens` behind the text and overwrites `logits` `[tokens, vocab_size]` with what follows each.
    ///
    /// # Errors
    /// A state of another model or a text on which an operation has failed, no tokens, more than [`State::max_tokens`],
    /// an id outside the vocabulary, no room, or too small a vector: nothing was read then. Or what the device says.
    pub fn logits(
        &self,
        state: &mut State<B>,
        slot: usize,
        tokens: &[u32],
        compensated: bool,
        logits: &mut B::Vector,
    ) -> Result<()> {
        self.admit(state, &[Part { slot, tokens: Some(tokens), choices: 0, compensated }], state.max_tokens)?;
        let count = tokens.len();
        let (room, needed) = (self.backend.room(logits), count * self.config.vocab_size);
        ensure!(room >= needed, "a vector of {room} numbers for the logits of {count} tokens, {needed} are needed");
        let rows = [Rows { slot, position: state.len(slot), count }];
        let pass = Pass { rows: &rows, compensated: if compensated { count } else { 0 } };
        state.grow(&[(slot, count, 0)], |state| {
            self.layers(state, Input::Tokens(tokens), pass)?;
            self.say(&state.activations.h, logits, count)
        })
    }

    /// Fails if `parts` cannot go through a pass of at most `most` rows.
    fn admit(&self, state: &State<B>, parts: &[Part<'_>], most: usize) -> Result<()> {
        self.own(state)?;
        let vocab = self.config.vocab_size;
        for (i, part) in parts.iter().enumerate() {
            let Part { slot, tokens, choices, .. } = *part;
            ensure!(parts[..i].iter().all(|other| other.slot != slot), "slot {slot} comes twice in a pass");
            ensure!(part.rows() > 0, "the prompt is empty, give at least one token");
            ensure!(choices <= part.rows(), "{choices} tokens to be chosen after {} rows", part.rows());
            state.takes(slot, part.rows())?;
            match tokens {
                None => state.goes_on(slot)?,
                Some(tokens) => {
                    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
                        bail!("token id {id}, the vocabulary ends at {}", vocab - 1);
                    }
                }
            }
            state.chooses(slot, choices)?;
        }
        let (rows, choices) = parts.iter().fold((0, 0), |(r, c), part| (r + part.rows(), c + part.choices));
        ensure!(rows > 0, "a pass of no texts, give at least one");
        ensure!(rows <= most, "{rows} tokens at once, 1 to {most} are allowed, read them in parts");
        ensure!(choices <= DECODE_ROWS, "{choices} tokens to be chosen in one pass, {DECODE_ROWS} are allowed");
        Ok(())
    }

    /// The operations of a pass: the model, and a choice after rows `which` of it, each for the text of its slot.
    pub(super) fn run(
        &self,
        state: &mut State<B>,
        input: Input<'_>,
        pass: Pass<'_>,
        (which, slots): (&[usize], &[usize]),
    ) -> Result<()> {
        self.layers(state, input, pass)?;
        if which.is_empty() {
            return Ok(());
        }
        let State { cache, activations, last, logits, .. } = state;
        if which.len() == pass.count() {
            self.say(&activations.h, logits, which.len())?;
        } else {
            self.backend.gather(&activations.h, self.config.hidden_size, which, last)?;
            self.say(last, logits, which.len())?;
        }
        self.backend.sample(cache, slots, logits)
    }

    /// The last norm and the head: `logits` `[rows, vocab_size]` of `h` `[rows, hidden_size]`.
    pub(super) fn say(&self, h: &B::Vector, logits: &mut B::Vector, rows: usize) -> Result<()> {
        let matrix = self.head.as_ref().unwrap_or(&self.embedding);
        let feed = Feed::Norm(&self.final_norm);
        let product = Product { feed, matrix, plan: None, compensated: 0, add: false };
        self.backend.project(&product, h, logits, rows)?;
        match self.config.logit_softcap {
            Some(cap) => self.backend.softcap(cap as f32, logits, rows * self.config.vocab_size),
            None => Ok(()),
        }
    }

    /// Embeds and runs all layers over a pass.
    fn layers(&self, state: &mut State<B>, input: Input<'_>, pass: Pass<'_>) -> Result<()> {
        let (b, State { cache, activations, .. }) = (self.backend, state);
        debug_assert!(count(pass.rows) > 0, "a pass has rows");
        b.embed(cache, pass.rows, (&self.embedding, self.embedding_scale), input, &mut activations.h)?;
        let layers: Vec<_> = self.layers.iter().map(|layer| layer.operands(pass.compensated > 0)).collect();
        b.layers(cache, pass, 0, &layers, activations)?;
        b.advance(cache, pass.rows)
    }
}
