//! What sessions ask of a model, whatever backend it is on. Each session has a slot: one text in the making.

use anyhow::{Context, Result};

use crate::backend::DecodeBackend;
use crate::backend::record::Clock;
use crate::model::{Compensation, Model, State};
use crate::sampling::Sampling;
use crate::timeline::{self, Timeline};
use crate::weights::ModelWeights;

/// A model on a device, and the texts that it makes. All that sessions do goes through here: a runner that makes
/// several texts in one pass takes the place of this one, and sessions stay as they are.
pub(super) trait Runner {
    /// An empty slot.
    fn open(&mut self) -> Result<usize>;
    /// The slot is free again.
    fn close(&mut self, slot: usize);
    /// [`Model::prepare`]
    fn prepare(&mut self, slot: usize, prompt: usize, compensated: bool) -> Result<()>;
    /// [`State::keeps`]
    fn keeps(&self, slot: usize, tokens: usize) -> bool;
    /// How many tokens are worth asking for before the first of them has come.
    fn lookahead(&self, slot: usize) -> usize;
    /// [`Model::resume`]
    fn resume(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<()>;
    /// [`Model::extend`]
    fn extend(&mut self, slot: usize, tokens: &[u32], compensated: bool) -> Result<()>;
    /// [`Model::prompt`]
    fn prompt(&mut self, slot: usize, tokens: &[u32], compensated: bool) -> Result<()>;
    /// [`Model::step`]
    fn step(&mut self, slot: usize) -> Result<()>;
    /// [`Model::sampled`]
    fn sampled(&self, slot: usize, i: usize) -> Result<u32>;
    /// [`Model::logits`], in host memory: `out` becomes `[tokens, vocab_size]`.
    fn logits(&mut self, slot: usize, tokens: &[u32], compensated: bool, out: &mut Vec<f32>) -> Result<()>;
    /// [`Model::layer_bits`]
    fn layer_bits(&self) -> Vec<Option<u32>>;
    /// [`timeline::measure`]
    fn timeline(
        &self,
        weights: &dyn ModelWeights,
        head_bytes: Option<usize>,
        compensation: Option<&Compensation>,
        context: usize,
    ) -> Result<Timeline>;
    /// [`Model::is_compensated`]
    fn is_compensated(&self) -> bool;
    /// [`Model::compensate`]
    fn compensate(&mut self, compensation: Option<&Compensation>) -> Result<()>;
}

/// One text a slot, one pass a text.
pub(super) struct OneByOne<'b, B: DecodeBackend> {
    model: Model<'b, B>,
    max_seq_len: usize,
    slots: Vec<Option<State<B>>>,
    logits: Option<B::Vector>,
}

impl<'b, B: DecodeBackend> OneByOne<'b, B> {
    pub(super) fn new(model: Model<'b, B>, max_seq_len: usize) -> Self {
        Self { model, max_seq_len, slots: Vec::new(), logits: None }
    }

    fn parts(&mut self, slot: usize) -> Result<(&Model<'b, B>, &mut State<B>)> {
        Ok((&self.model, self.slots[slot].as_mut().context(CLOSED)?))
    }
}

/// A session closes its slot when it goes, and not before.
const CLOSED: &str = "the slot is closed";

impl<B: DecodeBackend> Runner for OneByOne<'_, B> {
    fn open(&mut self) -> Result<usize> {
        let state = self.model.state(self.max_seq_len)?;
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(state);
        Ok(slot)
    }

    fn close(&mut self, slot: usize) {
        self.slots[slot] = None;
    }

    fn prepare(&mut self, slot: usize, prompt: usize, compensated: bool) -> Result<()> {
        let (model, state) = self.parts(slot)?;
        model.prepare(state, prompt, compensated)
    }

    fn keeps(&self, slot: usize, tokens: usize) -> bool {
        self.slots[slot].as_ref().is_some_and(|state| state.keeps(tokens))
    }

    fn lookahead(&self, slot: usize) -> usize {
        let most = self.model.backend().device().lookahead;
        // What a text is read past its end, a layer with a window pays with what the next prompt could go on from.
        let forgets = self.slots[slot].as_ref().is_some_and(State::forgets);
        if forgets { most.min(1) } else { most }
    }

    fn resume(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        let (model, state) = self.parts(slot)?;
        model.resume(state, kept, sampling, draws)
    }

    fn extend(&mut self, slot: usize, tokens: &[u32], compensated: bool) -> Result<()> {
        let (model, state) = self.parts(slot)?;
        model.extend(state, tokens, compensated)
    }

    fn prompt(&mut self, slot: usize, tokens: &[u32], compensated: bool) -> Result<()> {
        let (model, state) = self.parts(slot)?;
        model.prompt(state, tokens, compensated)
    }

    fn step(&mut self, slot: usize) -> Result<()> {
        let (model, state) = self.parts(slot)?;
        model.step(state)
    }

    fn sampled(&self, slot: usize, i: usize) -> Result<u32> {
        self.model.sampled(self.slots[slot].as_ref().context(CLOSED)?, i)
    }

    fn logits(&mut self, slot: usize, tokens: &[u32], compensated: bool, out: &mut Vec<f32>) -> Result<()> {
        let (backend, len) = (self.model.backend(), tokens.len() * self.model.config().vocab_size);
        let vector = match self.logits.take() {
            Some(vector) if backend.room(&vector) >= len => vector,
            _ => backend.vector(len)?,
        };
        let vector = self.logits.insert(vector);
        let state = self.slots[slot].as_mut().context(CLOSED)?;
        self.model.logits(state, tokens, compensated, vector)?;
        out.resize(len, 0.0);
        backend.read(vector, out)
    }

    fn layer_bits(&self) -> Vec<Option<u32>> {
        self.model.layer_bits().collect()
    }

    fn timeline(
        &self,
        weights: &dyn ModelWeights,
        head_bytes: Option<usize>,
        compensation: Option<&Compensation>,
        context: usize,
    ) -> Result<Timeline> {
        let mut recorder = self.model.backend().recorder(Clock::Auto)?;
        timeline::measure(&self.model, &mut recorder, (weights, head_bytes), compensation, context)
    }

    fn is_compensated(&self) -> bool {
        self.model.is_compensated()
    }

    fn compensate(&mut self, compensation: Option<&Compensation>) -> Result<()> {
        self.model.compensate(compensation)
    }
}
