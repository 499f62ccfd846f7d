//! The engine's side of a server: which text reads how much in the next step.
//!
//! A text that has its prompt behind it reads its latest token in every step. Prompts are read in parts between them,
//! the oldest first, as many tokens a step as the model reads in the time that other texts may have to wait. A slot
//! keeps the prompt that was read in it: the next prompt that begins alike reads the rest.
//!
//! Answers do not depend on what slots held: what was made is compensated and prompts are not, so of an answer that
//! comes back in the next prompt nothing is kept, unless both are read in the same way.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use super::active::{Active, Step};
use super::job::{Event, Finish, Job};
use super::line::{GIVEN_UP, Line, SlotView};
use super::texts::{Reading, Texts};
use crate::engine::{ErrorKind, Result};
use crate::tokenizer::Tokenizer;

/// Tokens that a step reads of prompts before it is known how fast that is, and the fewest that it reads.
const FIRST: usize = 32;
const FEWEST: usize = 8;

/// Makes the texts of a [`Line`].
pub struct Scheduler<'t, T> {
    texts: T,
    line: &'t Line,
    tokenizer: &'t Tokenizer,
    slots: Vec<Slot<'t>>,
    /// How long a step may read prompts, and how many tokens it reads in that time.
    patience: Duration,
    tokens: usize,
    /// [`Texts::fetched`], which changes only with the compensation.
    fetched: usize,
}

struct Slot<'t> {
    /// What the next prompt may go on from, and whether it is compensated.
    held: Vec<u32>,
    compensated: bool,
    used: Instant,
    active: Option<Active<'t>>,
}

impl<'t, T: Texts> Scheduler<'t, T> {
    /// Steps in which prompts take about `patience`, so that texts in the making wait no longer.
    pub fn new(texts: T, line: &'t Line, tokenizer: &'t Tokenizer, patience: Duration) -> Self {
        let now = Instant::now();
        let slot = |_| Slot { held: Vec::new(), compensated: false, used: now, active: None };
        let slots = (0..texts.slots()).map(slot).collect();
        line.metrics.capacity.set(texts.slots() * texts.max_seq_len());
        line.set_compensation(texts.compensation());
        let fetched = texts.fetched();
        Self { texts, line, tokenizer, slots, patience, tokens: FIRST, fetched }
    }

    /// Takes texts from the line until that is drained.
    ///
    /// # Errors
    /// A device that is lost. Whoever waits has heard of it then, as of a panic.
    pub fn run(&mut self) -> Result<()> {
        let _told = Told(self.line);
        self.line.open();
        loop {
            self.obey();
            self.give_up();
            self.leave_gone();
            self.admit();
            if self.slots.iter().any(|slot| slot.active.is_some()) {
                self.step()?;
            } else {
                self.show();
                if !self.line.wait() {
                    return Ok(());
                }
            }
        }
    }

    /// Does what was ordered between steps.
    fn obey(&mut self) {
        for (sets, said) in self.line.orders() {
            let result = self.texts.compensate(&sets).map_err(|error| error.to_string());
            if result.is_ok() {
                self.fetched = self.texts.fetched();
                self.line.set_compensation(self.texts.compensation());
                self.slots.iter_mut().filter(|slot| slot.compensated).for_each(|slot| slot.held.clear());
                self.slots.iter_mut().filter_map(|slot| slot.active.as_mut()).for_each(Active::mix);
            }
            let _ = said.send(result);
        }
    }

    /// Leaves all texts where the server may wait no longer; who listens to them is told.
    fn give_up(&mut self) {
        if !self.line.is_given_up() {
            return;
        }
        for i in 0..self.slots.len() {
            if self.slots[i].active.is_some() {
                self.fail(i, GIVEN_UP);
            }
        }
    }

    /// Leaves texts that nobody listens to any more.
    fn leave_gone(&mut self) {
        for i in 0..self.slots.len() {
            if self.slots[i].active.as_ref().is_some_and(Active::is_gone) {
                self.line.metrics.cancelled.inc();
                self.free(i);
            }
        }
    }

    /// Frees a slot; what it has read is kept for the next prompt.
    fn free(&mut self, i: usize) {
        let uniform = !self.texts.is_compensated();
        let slot = &mut self.slots[i];
        if let Some(active) = slot.active.take() {
            (slot.held, slot.compensated) = active.held(uniform);
            slot.used = Instant::now();
        }
    }

    /// Gives free slots to those who wait.
    fn admit(&mut self) {
        let line = self.line;
        let mut begun = Vec::new();
        line.take(|job| {
            let compensated = job.rules.compensate_prompt;
            let Some((slot, common)) = self.place(&job, compensated, &begun) else { return Some(job) };
            begun.push(slot);
            line.metrics.looked_up.add(job.prompt.len());
            line.metrics.prompt_tokens.add(job.prompt.len());
            line.metrics.queued.add(job.since.elapsed());
            let mut active = Active::new(job, self.texts.max_seq_len(), self.tokenizer);
            let (sampling, draws) = active.rules();
            self.slots[slot].held.clear();
            match self.texts.begin(slot, common, sampling, draws) {
                Ok(kept) => {
                    line.metrics.found.add(kept);
                    active.begin(kept);
                    self.slots[slot].active = Some(active);
                }
                Err(error) => {
                    line.metrics.failed.inc();
                    active.say(Event::Failed(error.to_string()));
                }
            }
            None
        });
    }

    /// The free slot that holds the most of a job's prompt, the one that was used longest ago among equals, and how
    /// many tokens that are. The last token is always read. A slot of which three quarters would be lost is as good as
    /// any other.
    fn place(&self, job: &Job, compensated: bool, taken: &[usize]) -> Option<(usize, usize)> {
        let most = if job.rules.scores_prompt { 0 } else { job.prompt.len() - 1 };
        let same_way = |slot: &Slot<'_>| !self.texts.is_compensated() || slot.compensated == compensated;
        let common = |slot: &Slot<'_>| match same_way(slot) {
            true => slot.held.iter().zip(&job.prompt[..most]).take_while(|(a, b)| a == b).count(),
            false => 0,
        };
        let free = self.slots.iter().enumerate().filter(|(i, slot)| slot.active.is_none() && !taken.contains(i));
        let rated = free.map(|(i, slot)| {
            let common = common(slot);
            let worth = if 4 * common >= slot.held.len() { common } else { 0 };
            ((worth, Reverse(slot.used), Reverse(i)), (i, common))
        });
        rated.max_by_key(|&(rate, _)| rate).map(|(_, place)| place)
    }

    /// One step of every text.
    fn step(&mut self) -> Result<()> {
        self.line.step();
        let most = self.texts.max_tokens();
        let goes_on = self.slots.iter().filter(|slot| slot.active.as_ref().is_some_and(Active::goes_on)).count();
        // One pass takes the tokens of all texts and those of prompts.
        let given = self.tokens.min(most.saturating_sub(goes_on)).max(1);
        let mut room = given;
        // The oldest prompt first.
        let mut order: Vec<usize> = (0..self.slots.len()).collect();
        order.sort_by_key(|&i| self.slots[i].active.as_ref().map(Active::since));
        let mut steps: Vec<(usize, Step)> = Vec::new();
        for i in order {
            let Some(active) = &self.slots[i].active else { continue };
            let step = active.next_step(room.min(most));
            if let Some(step) = step {
                room -= if step.is_prompt { step.tokens.len() } else { 0 };
                steps.push((i, step));
            }
        }
        let readings: Vec<Reading<'_>> = steps.iter().map(|(slot, step)| step.reading(*slot)).collect();
        let started = Instant::now();
        let results = self.texts.step(&readings);
        let took = started.elapsed();
        self.line.metrics.step.add(took);
        self.adapt(given - room, took);
        let results = match results {
            Ok(results) => results,
            Err(error) if error.kind() == ErrorKind::DeviceLost => {
                steps.iter().for_each(|(slot, _)| self.fail(*slot, &error.to_string()));
                return Err(error);
            }
            Err(error) => {
                steps.iter().for_each(|(slot, _)| self.fail(*slot, &error.to_string()));
                return Ok(());
            }
        };
        for ((slot, step), result) in steps.iter().zip(results) {
            let Some(active) = &mut self.slots[*slot].active else { continue };
            self.line.metrics.fetched.add(step.compensated() * self.fetched);
            match result.and_then(|chosen| active.took(step, chosen, &self.line.metrics)) {
                Ok(None) => {}
                Ok(Some(finish)) => self.end(*slot, finish),
                Err(error) => self.fail(*slot, &error.to_string()),
            }
        }
        self.show();
        Ok(())
    }

    /// Reads more of prompts in a step if there was time to spare, less if it took too long.
    fn adapt(&mut self, tokens: usize, took: Duration) {
        if tokens >= FEWEST {
            let fits = tokens as f64 * self.patience.as_secs_f64() / took.as_secs_f64().max(1e-6);
            let next = (self.tokens as f64 + fits.min(2.0 * self.tokens as f64)) / 2.0;
            // A single slow step says little; twice as long is too long.
            let next = if took > 2 * self.patience { fits } else { next };
            self.tokens = (next as usize).clamp(FEWEST, self.texts.max_tokens().max(FEWEST));
        }
    }

    fn end(&mut self, slot: usize, finish: Finish) {
        let metrics = &self.line.metrics;
        match finish {
            Finish::Length => metrics.full.inc(),
            Finish::Stop | Finish::Token(_) | Finish::Text(_) => metrics.stopped.inc(),
        }
        if let Some(active) = &self.slots[slot].active {
            metrics.whole.add(active.since().elapsed());
            active.say(Event::End(active.end(finish)));
        }
        self.free(slot);
    }

    fn fail(&mut self, slot: usize, said: &str) {
        self.line.metrics.failed.inc();
        tracing::warn!("a text ends in slot {slot}: {said}");
        if let Some(active) = self.slots[slot].active.take() {
            active.say(Event::Failed(said.to_owned()));
        }
        self.slots[slot].held.clear();
    }

    fn show(&self) {
        let view = |(id, slot): (usize, &Slot<'_>)| {
            let idle = SlotView { id, held: slot.held.len(), ..SlotView::default() };
            slot.active.as_ref().map_or(idle, |active| active.view(id))
        };
        let views: Vec<_> = self.slots.iter().enumerate().map(view).collect();
        self.line.metrics.running.set(views.iter().filter(|view| view.is_processing).count());
        self.line.metrics.held.set(views.iter().map(|view| view.held).sum());
        self.line.show(views);
    }
}

/// Tells those who wait that the engine has ended, in whatever way it did.
struct Told<'t>(&'t Line);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
