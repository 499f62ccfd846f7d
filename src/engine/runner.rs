//! What sessions ask of a model, whatever backend it is on. Each session has a slot: one text in the making.

use anyhow::{Context, Result};

use super::error::NoSlot;
use crate::backend::DecodeBackend;
use crate::backend::record::Clock;
use crate::model::{Compensation, Model, Part, State};
use crate::sampling::Sampling;
use crate::timeline::{self, Timeline};
use crate::weights::ModelWeights;

/// A model on a device, and the texts that it makes, whatever the backend.
pub(crate) trait Runner {
    /// A slot with an empty text.
    ///
    /// # Errors
    /// [`NoSlot`], or no memory for another text.
    fn open(&mut self) -> Result<usize>;
    /// The slot is free again.
    fn close(&mut self, slot: usize);
    /// [`Model::prepare`]
    fn prepare(&mut self, slot: usize, prompt: usize, compensated: bool) -> Result<()>;
    /// [`State::keeps`]
    fn keeps(&self, slot: usize, tokens: usize) -> bool;
    /// How many tokens are worth asking for before the first of them has come.
    fn lookahead(&self) -> usize;
    /// [`Model::resume`]
    fn resume(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<()>;
    /// [`Model::pass`]
    fn pass(&mut self, parts: &[Part<'_>]) -> Result<()>;
    /// [`Model::cut`]
    fn cut(&mut self, slot: usize, tokens: usize, chosen: usize) -> Result<()>;
    /// [`State::forgets`]
    fn forgets(&self) -> bool;
    /// [`State::max_tokens`]
    fn max_tokens(&self) -> usize;
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

/// A model and its texts.
pub(super) struct OnDevice<'b, B: DecodeBackend> {
    model: Model<'b, B>,
    max_seq_len: usize,
    /// Made when the first slot opens.
    state: Option<State<B>>,
    is_open: Vec<bool>, // [slots]
    logits: Option<B::Vector>,
}

impl<'b, B: DecodeBackend> OnDevice<'b, B> {
    pub(super) fn new(model: Model<'b, B>, slots: usize, max_seq_len: usize) -> Self {
        Self { model, max_seq_len, state: None, is_open: vec![false; slots], logits: None }
    }

    fn parts(&mut self) -> Result<(&Model<'b, B>, &mut State<B>)> {
        Ok((&self.model, self.state.as_mut().context(NO_STATE)?))
    }
}

/// Whoever has a slot has opened it.
const NO_STATE: &str = "no slot is open";

impl<B: DecodeBackend> Runner for OnDevice<'_, B> {
    fn open(&mut self) -> Result<usize> {
        let slots = self.is_open.len();
        let slot = self.is_open.iter().position(|open| !open).ok_or(NoSlot(slots))?;
        if self.state.is_none() {
            self.state = Some(self.model.state(slots, self.max_seq_len)?);
        }
        let (model, state) = self.parts()?;
        model.begin(state, slot, &Sampling::GREEDY, &[])?;
        self.is_open[slot] = true;
        Ok(slot)
    }

    fn close(&mut self, slot: usize) {
        self.is_open[slot] = false;
    }

    fn prepare(&mut self, slot: usize, prompt: usize, compensated: bool) -> Result<()> {
        let (model, state) = self.parts()?;
        model.prepare(state, slot, prompt, compensated)
    }

    fn keeps(&self, slot: usize, tokens: usize) -> bool {
        self.state.as_ref().is_some_and(|state| state.keeps(slot, tokens))
    }

    fn lookahead(&self) -> usize {
        let most = self.model.backend().device().lookahead;
        // What a text is read past its end, a layer with a window pays with what the next prompt could go on from.
        if self.forgets() { most.min(1) } else { most }
    }

    fn resume(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        let (model, state) = self.parts()?;
        model.resume(state, slot, kept, sampling, draws)
    }

    fn pass(&mut self, parts: &[Part<'_>]) -> Result<()> {
        let (model, state) = self.parts()?;
        model.pass(state, parts)
    }

    fn cut(&mut self, slot: usize, tokens: usize, chosen: usize) -> Result<()> {
        let (model, state) = self.parts()?;
        model.cut(state, slot, tokens, chosen)
    }

    fn max_tokens(&self) -> usize {
        self.state.as_ref().map_or(1, State::max_tokens)
    }

    fn forgets(&self) -> bool {
        self.state.as_ref().is_some_and(State::forgets)
    }

    fn sampled(&self, slot: usize, i: usize) -> Result<u32> {
        self.model.sampled(self.state.as_ref().context(NO_STATE)?, slot, i)
    }

    fn logits(&mut self, slot: usize, tokens: &[u32], compensated: bool, out: &mut Vec<f32>) -> Result<()> {
        let (backend, len) = (self.model.backend(), tokens.len() * self.model.config().vocab_size);
        let vector = match self.logits.take() {
            Some(vector) if backend.room(&vector) >= len => vector,
            _ => backend.vector(len)?,
        };
        let vector = self.logits.insert(vector);
        let state = self.state.as_mut().context(NO_STATE)?;
        self.model.logits(state, slot, tokens, compensated, vector)?;
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
