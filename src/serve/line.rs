//! Texts that wait for a slot, and what both sides know of each other: those who ask, and the engine's thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::job::{Event, Job};
use super::metrics::Metrics;
use crate::model::LayerCompensation;

/// A step takes less; an engine that is busy and says nothing for so long is not well.
const STUCK: Duration = Duration::from_secs(120);

/// How often a thread without work looks whether those who wait are still there.
const GLANCE: Duration = Duration::from_millis(200);

/// What those hear who wait when the engine ends.
pub(super) const ENDED: &str = "the engine has ended";

/// What those hear whose texts took longer than a server waits for at its end.
pub(super) const GIVEN_UP: &str = "the server ends and waits no longer for this text, ask another one";

/// Why a text is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// So many wait already.
    Full(usize),
    /// The model is still being loaded.
    Loading,
    /// No new texts are taken: the server is about to end.
    Draining,
    /// The engine has ended.
    Dead,
}

/// What the engine does between two steps, and where it says what came of it.
pub(super) type Order = (Vec<LayerCompensation>, oneshot::Sender<Result<(), String>>);

/// The queue and what is known of the engine.
#[derive(Debug)]
pub struct Line {
    state: Mutex<State>,
    arrived: Condvar,
    limit: usize,
    started: Instant,
    /// Milliseconds from `started` to the last step.
    stepped: AtomicU64,
    busy: AtomicBool,
    given_up: AtomicBool,
    pub(super) metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    orders: Vec<Order>,
    phase: Phase,
    compensation: Vec<LayerCompensation>,
    slots: Vec<SlotView>,
}

/// One slot, for those who look.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub(super) struct SlotView {
    /// Its number.
    pub(super) id: usize,
    /// A text is being made in it.
    pub(super) is_processing: bool,
    /// Tokens of that text's prompt, and how many of them are read.
    pub(super) prompt_tokens: usize,
    pub(super) read: usize,
    /// Tokens made of it.
    pub(super) made: usize,
    /// Tokens that it holds.
    pub(super) held: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Loading,
    Running,
    /// Texts are taken as ever; who looks is told to ask elsewhere.
    Leaving,
    Draining,
    Dead,
}

impl State {
    /// Leaves texts that nobody waits for; how many there were.
    fn leave_gone(&mut self) -> usize {
        let before = self.waiting.len();
        self.waiting.retain(|job| !job.events.is_closed());
        before - self.waiting.len()
    }

    /// Nobody waits any more: why.
    fn tell_all(&mut self, why: &str) {
        self.waiting.drain(..).for_each(|job| job.say(Event::Failed(why.into())));
    }
}

impl Line {
    /// An empty line in which at most `limit` texts wait.
    pub fn new(limit: usize) -> Self {
        Self {
            state: Mutex::default(),
            arrived: Condvar::new(),
            limit,
            started: Instant::now(),
            stepped: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            metrics: Metrics::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is inside is whole between any two statements, whoever panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues all of `jobs` or none.
    pub(super) fn submit(&self, jobs: Vec<Job>) -> Result<(), Refusal> {
        let mut state = self.state();
        match state.phase {
            Phase::Running | Phase::Leaving => {}
            Phase::Loading => return Err(Refusal::Loading),
            Phase::Draining => return Err(Refusal::Draining),
            Phase::Dead => return Err(Refusal::Dead),
        }
        self.metrics.cancelled.add(state.leave_gone());
        // A request for several texts finds room where one text does.
        if state.waiting.len() >= self.limit {
            return Err(Refusal::Full(state.waiting.len()));
        }
        state.waiting.extend(jobs);
        self.arrived.notify_one();
        Ok(())
    }

    /// Compensates otherwise between two steps.
    pub(super) fn order(&self, sets: Vec<LayerCompensation>) -> oneshot::Receiver<Result<(), String>> {
        let (said, heard) = oneshot::channel();
        self.state().orders.push((sets, said));
        self.arrived.notify_one();
        heard
    }

    /// The engine takes texts from now on.
    pub(super) fn open(&self) {
        let mut state = self.state();
        if state.phase == Phase::Loading {
            state.phase = Phase::Running;
        }
    }

    /// Tells routers to send new texts elsewhere; those that come anyway are made.
    pub fn leave(&self) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Loading | Phase::Running) {
            state.phase = Phase::Leaving;
        }
    }

    /// No new texts: those that are here are made to their end.
    pub fn drain(&self) {
        let mut state = self.state();
        if state.phase != Phase::Dead {
            state.phase = Phase::Draining;
        }
        self.arrived.notify_one();
    }

    /// Texts that are not made by now are left: whoever waits hears it, the others do before the next step.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
        self.state().tell_all(GIVEN_UP);
    }

    /// No text is worth another step.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// The engine has ended: whoever waits hears it.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.phase = Phase::Dead;
        self.busy.store(false, Ordering::Relaxed);
        state.tell_all(ENDED);
        state.orders.clear();
    }

    /// Why no text would be taken now; none where one would.
    pub(super) fn ready(&self) -> Result<(), &'static str> {
        match self.state().phase {
            Phase::Loading => return Err("the model is being loaded"),
            Phase::Leaving | Phase::Draining => return Err("the server is draining"),
            Phase::Dead => return Err(ENDED),
            Phase::Running => {}
        }
        let since = self.started.elapsed().saturating_sub(Duration::from_millis(self.stepped.load(Ordering::Relaxed)));
        match self.busy.load(Ordering::Relaxed) && since > STUCK {
            true => Err("the engine is stuck"),
            false => Ok(()),
        }
    }

    /// Texts that wait.
    pub(super) fn waiting(&self) -> usize {
        self.state().waiting.iter().filter(|job| !job.events.is_closed()).count()
    }

    /// Tokens that wait to be read.
    pub(super) fn waiting_tokens(&self) -> usize {
        self.state().waiting.iter().map(|job| job.prompt.len()).sum()
    }

    /// Takes texts out of the line until `take` gives one back; those that nobody waits for any more are dropped.
    pub(super) fn take(&self, mut take: impl FnMut(Job) -> Option<Job>) {
        let mut state = self.state();
        while let Some(job) = state.waiting.pop_front() {
            if job.events.is_closed() {
                self.metrics.cancelled.inc();
                continue;
            }
            if let Some(job) = take(job) {
                state.waiting.push_front(job);
                break;
            }
        }
    }

    /// What is to be done between two steps.
    pub(super) fn orders(&self) -> Vec<Order> {
        std::mem::take(&mut self.state().orders)
    }

    /// Waits for a text or an order; false when there will be none any more.
    pub(super) fn wait(&self) -> bool {
        let mut state = self.state();
        self.busy.store(false, Ordering::Relaxed);
        loop {
            self.metrics.cancelled.add(state.leave_gone());
            if !state.waiting.is_empty() || !state.orders.is_empty() {
                return true;
            }
            if matches!(state.phase, Phase::Draining | Phase::Dead) {
                return false;
            }
            state = self.arrived.wait_timeout(state, GLANCE).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A step begins.
    pub(super) fn step(&self) {
        self.stepped.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.busy.store(true, Ordering::Relaxed);
    }

    /// Shows what the engine is doing.
    pub(super) fn show(&self, slots: Vec<SlotView>) {
        self.state().slots = slots;
    }

    /// What the engine was doing at the last step.
    pub(super) fn slots(&self) -> Vec<SlotView> {
        self.state().slots.clone()
    }

    /// Notes how the model is compensated.
    pub(super) fn set_compensation(&self, sets: Vec<LayerCompensation>) {
        self.state().compensation = sets;
    }

    /// How the model is compensated.
    pub(super) fn compensation(&self) -> Vec<LayerCompensation> {
        self.state().compensation.clone()
    }
}
