//! Texts on an engine: all slots in one pass, and one by one those whose tokens are chosen here.

use super::texts::{Choose, Chosen, Reading, Texts};
use crate::backend::DECODE_ROWS;
use crate::dec::Selection;
use crate::engine::{Engine, Error, ErrorKind, Result};
use crate::model::{Compensation, LayerCompensation, Part};
use crate::sampling::Sampling;

/// The slots of an engine.
pub struct Slots<'e, 'd> {
    engine: &'e Engine<'d>,
    slots: Vec<Slot>,
}

struct Slot {
    /// The engine's number of it.
    number: usize,
    /// Tokens that were chosen in it on the device since its text began.
    chosen: usize,
}

impl<'e, 'd> Slots<'e, 'd> {
    /// `count` empty texts, and what their first tokens need.
    ///
    /// # Errors
    /// No slots, or more than the engine has or than there is memory for: the message says how many there are.
    pub fn new(engine: &'e Engine<'d>, count: usize) -> Result<Self> {
        let mut slots = Vec::new();
        for i in 0..count {
            let number = engine.runner.borrow_mut().open().map_err(|error| {
                let (error, tokens) = (Error::from(error), engine.max_seq_len());
                let said = format!(
                    "{count} slots are asked for, there is room for {i} texts of {tokens} tokens, take fewer: {error}"
                );
                Error::new(if i == 0 { error.kind() } else { ErrorKind::Input }, said)
            })?;
            slots.push(Slot { number, chosen: 0 });
        }
        let Some(first) = slots.first() else {
            return Err(Error::new(ErrorKind::Input, "there are no slots, ask for at least one".into()));
        };
        engine.runner.borrow_mut().prepare(first.number, engine.max_tokens(), false)?;
        Ok(Self { engine, slots })
    }

    /// One pass of readings that need no logits here; their results at their places.
    fn pass(
        &mut self,
        readings: &[Reading<'_>],
        which: &[usize],
        results: &mut [Option<Result<Chosen>>],
    ) -> Result<()> {
        let part = |&i: &usize| {
            let reading = &readings[i];
            let slot = &self.slots[reading.slot];
            // What was chosen on the device is read from there.
            let tokens = (reading.choose != Choose::Token || slot.chosen == 0).then_some(reading.tokens);
            let choices = usize::from(reading.choose == Choose::Token);
            Part { slot: slot.number, tokens, choices, compensated: reading.compensated }
        };
        let parts: Vec<_> = which.iter().map(part).collect();
        let done = self.engine.runner.borrow_mut().pass(&parts).map_err(Error::from);
        if let Err(error) = done {
            if error.kind() == ErrorKind::DeviceLost {
                return Err(error);
            }
            let said = error.to_string();
            which.iter().for_each(|&i| results[i] = Some(Err(Error::new(error.kind(), said.clone()))));
            return Ok(());
        }
        for &i in which {
            let chosen = match readings[i].choose {
                Choose::Token => self.sampled(readings[i].slot).map(Chosen::Token),
                Choose::Nothing | Choose::Logits | Choose::AllLogits => Ok(Chosen::Nothing),
            };
            match chosen {
                Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
                chosen => results[i] = Some(chosen),
            }
        }
        Ok(())
    }

    /// Waits for the token that was chosen last in a slot.
    fn sampled(&mut self, slot: usize) -> Result<u32> {
        let slot = &mut self.slots[slot];
        slot.chosen += 1;
        Ok(self.engine.runner.borrow().sampled(slot.number, slot.chosen - 1)?)
    }

    /// Logits behind the last of a reading's tokens, or behind all of them.
    fn logits(&mut self, reading: &Reading<'_>) -> Result<Chosen> {
        let mut logits = Vec::new();
        let (number, vocab) = (self.slots[reading.slot].number, self.engine.config().vocab_size);
        let mut runner = self.engine.runner.borrow_mut();
        let tokens = match reading.choose {
            // Of a prompt's tokens all but the last need no logits.
            Choose::Logits if reading.tokens.len() > 1 => {
                let (last, before) = reading.tokens.split_last().expect("more than one");
                let compensated = reading.compensated;
                runner.pass(&[Part { slot: number, tokens: Some(before), choices: 0, compensated }])?;
                std::slice::from_ref(last)
            }
            _ => reading.tokens,
        };
        runner.logits(number, tokens, reading.compensated, &mut logits)?;
        debug_assert_eq!(logits.len(), tokens.len() * vocab);
        Ok(Chosen::Logits(logits))
    }
}

/// What is said where logits choose nothing.
pub(super) fn no_token() -> Error {
    let said =
        "no token can be chosen, the largest logit is not a finite number: check the checkpoint with decdec eval";
    Error::new(ErrorKind::Other, said.into())
}

impl Texts for Slots<'_, '_> {
    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn max_seq_len(&self) -> usize {
        self.engine.max_seq_len()
    }

    fn max_tokens(&self) -> usize {
        self.engine.max_tokens()
    }

    fn begin(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<usize> {
        let slot = &mut self.slots[slot];
        let mut runner = self.engine.runner.borrow_mut();
        let kept = if kept > 0 && runner.keeps(slot.number, kept) { kept } else { 0 };
        runner.resume(slot.number, kept, sampling, draws)?;
        slot.chosen = 0;
        Ok(kept)
    }

    fn step(&mut self, readings: &[Reading<'_>]) -> Result<Vec<Result<Chosen>>> {
        let mut results: Vec<_> = readings.iter().map(|_| None).collect();
        let (mut which, mut rows, mut choices) = (Vec::new(), 0, 0);
        for (i, reading) in readings.iter().enumerate() {
            match reading.choose {
                Choose::Logits | Choose::AllLogits => match self.logits(reading) {
                    Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
                    result => results[i] = Some(result),
                },
                choose => {
                    let chooses = usize::from(choose == Choose::Token);
                    if rows + reading.tokens.len() > self.max_tokens() || choices + chooses > DECODE_ROWS {
                        self.pass(readings, &which, &mut results)?;
                        (rows, choices) = (0, 0);
                        which.clear();
                    }
                    which.push(i);
                    (rows, choices) = (rows + reading.tokens.len(), choices + chooses);
                }
            }
        }
        if !which.is_empty() {
            self.pass(readings, &which, &mut results)?;
        }
        Ok(results.into_iter().map(|result| result.unwrap_or(Ok(Chosen::Nothing))).collect())
    }

    fn is_compensated(&self) -> bool {
        self.engine.is_compensated()
    }

    fn fetched(&self) -> usize {
        self.engine.fetched()
    }

    fn compensation(&self) -> Vec<LayerCompensation> {
        self.engine.compensation().map(|compensation| compensation.by_bits).unwrap_or_default()
    }

    fn compensate(&mut self, sets: &[LayerCompensation]) -> Result<()> {
        let selection = self.engine.compensation().map_or(Selection::Bucket, |compensation| compensation.selection);
        let compensation = Compensation { by_bits: sets.to_vec(), selection };
        self.engine.compensate((!sets.is_empty()).then_some(&compensation))
    }
}

impl Drop for Slots<'_, '_> {
    fn drop(&mut self) {
        let mut runner = self.engine.runner.borrow_mut();
        self.slots.iter().for_each(|slot| runner.close(slot.number));
    }
}
