//! A backend that records a token as CUDA does, on any other: what it records is replayed without a look at what the
//! model would queue now, and it notes where that is not the same any more.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use decdec::backend::record::{ByClock, Clock};
use decdec::backend::{DecodeBackend, DeviceInfo, Feed, GemvBackend, Input, KvBits, Norm, Product, Rows, count};
use decdec::config::ModelConfig;
use decdec::dec::DecPlan;
use decdec::sampling::Sampling;
use decdec::weights::Linear;

use crate::UnderTest;

/// Another backend, watched.
pub(crate) struct Recording<'a, B> {
    inner: &'a B,
    plans: Cell<usize>,
    /// What is queued while a token is recorded or replayed: operation, tokens, plan.
    queued: RefCell<Vec<Queued>>,
    replayed: Cell<usize>,
    wrong: RefCell<Vec<String>>,
    /// The next product fails.
    pub(crate) fails: Cell<bool>,
}

type Queued = (&'static str, usize, Option<usize>);

/// A plan that is told from every other.
pub(crate) struct Plan<P> {
    inner: P,
    id: usize,
}

impl<'a, B> Recording<'a, B> {
    pub(crate) fn new(inner: &'a B) -> Self {
        let (plans, replayed, fails) = Default::default();
        Self { inner, plans, queued: RefCell::default(), replayed, wrong: RefCell::default(), fails }
    }

    /// Fails if a replayed token was not what the model would have queued, or if none was replayed.
    pub(crate) fn check(&self) {
        assert!(self.wrong.borrow().is_empty(), "{:#?}", self.wrong.borrow());
        assert!(self.replayed.get() > 0, "nothing was replayed");
    }

    fn queue<P>(&self, what: &'static str, tokens: usize, plan: Option<&Plan<P>>) -> Result<()> {
        self.queued.borrow_mut().push((what, tokens, plan.map(|plan| plan.id)));
        ensure!(!self.fails.replace(false), "the device fails");
        Ok(())
    }
}

impl<B: UnderTest> UnderTest for Recording<'_, B> {
    const ROUNDING: f64 = B::ROUNDING;
    const SMALLEST: f64 = B::SMALLEST;
    const CASES: usize = B::CASES;
}

impl<B: GemvBackend> GemvBackend for Recording<'_, B> {
    type Vector = B::Vector;
    type Matrix = B::Matrix;
    type Plan = Plan<B::Plan>;
    type Recorder = ByClock;

    fn device(&self) -> &DeviceInfo {
        self.inner.device()
    }

    fn vector(&self, len: usize) -> Result<B::Vector> {
        self.inner.vector(len)
    }

    fn room(&self, vector: &B::Vector) -> usize {
        self.inner.room(vector)
    }

    fn write(&self, values: &[f32], to: &mut B::Vector) -> Result<()> {
        self.inner.write(values, to)
    }

    fn read(&self, from: &B::Vector, out: &mut [f32]) -> Result<()> {
        self.inner.read(from, out)
    }

    fn matrix(&self, linear: &Linear<'_>) -> Result<B::Matrix> {
        self.inner.matrix(linear)
    }

    fn plan(&self, matrix: &B::Matrix, plan: &DecPlan) -> Result<Plan<B::Plan>> {
        self.plans.set(self.plans.get() + 1);
        Ok(Plan { inner: self.inner.plan(matrix, plan)?, id: self.plans.get() })
    }

    fn gemv(&self, matrix: &B::Matrix, x: &B::Vector, y: &mut B::Vector) -> Result<()> {
        self.inner.gemv(matrix, x, y)
    }

    fn dec_gemv(&self, matrix: &B::Matrix, plan: &Self::Plan, x: &B::Vector, y: &mut B::Vector) -> Result<()> {
        self.inner.dec_gemv(matrix, &plan.inner, x, y)
    }

    fn select(&self, plan: &Self::Plan, x: &B::Vector) -> Result<Vec<u32>> {
        self.inner.select(&plan.inner, x)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.inner.time(work)
    }

    fn recorder(&self, _: Clock) -> Result<ByClock> {
        Ok(ByClock::default())
    }
}

impl<B: DecodeBackend> DecodeBackend for Recording<'_, B> {
    type Cache = B::Cache;
    type Graphs = HashMap<Vec<usize>, Option<Vec<Queued>>>;

    fn cache(&self, config: &ModelConfig, slots: usize, max_seq_len: usize, bits: KvBits) -> Result<B::Cache> {
        self.inner.cache(config, slots, max_seq_len, bits)
    }

    fn begin(&self, cache: &mut B::Cache, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        self.inner.begin(cache, slot, sampling, draws)
    }

    fn cut(&self, cache: &mut B::Cache, slot: usize, tokens: usize, sampled: usize) -> Result<()> {
        self.inner.cut(cache, slot, tokens, sampled)
    }

    fn embed(
        &self,
        cache: &B::Cache,
        rows: &[Rows],
        table: (&B::Matrix, f32),
        input: Input<'_>,
        h: &mut B::Vector,
    ) -> Result<()> {
        self.queue::<B::Plan>("embed", count(rows), None)?;
        self.inner.embed(cache, rows, table, input, h)
    }

    fn project(&self, product: &Product<'_, Self>, x: &B::Vector, y: &mut B::Vector, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, compensated, add } = *product;
        let what = match feed {
            Feed::Plain => "project",
            Feed::Norm(_) => "project what is normalized",
            Feed::Gated(_) => "project what is gated",
        };
        self.queue(what, tokens, plan)?;
        let plan = plan.map(|plan| &plan.inner);
        self.inner.project(&Product { feed, matrix, plan, compensated, add }, x, y, tokens)
    }

    fn norm_qk(
        &self,
        cache: &B::Cache,
        layer: usize,
        norms: [&Norm<B::Vector>; 2],
        qkv: &mut B::Vector,
        tokens: usize,
    ) -> Result<()> {
        self.queue::<B::Plan>("norm_qk", tokens, None)?;
        self.inner.norm_qk(cache, layer, norms, qkv, tokens)
    }

    fn add_norm(&self, norm: &Norm<B::Vector>, branch: &B::Vector, h: &mut B::Vector, tokens: usize) -> Result<()> {
        self.queue::<B::Plan>("add_norm", tokens, None)?;
        self.inner.add_norm(norm, branch, h, tokens)
    }

    fn softcap(&self, cap: f32, logits: &mut B::Vector, count: usize) -> Result<()> {
        self.queue::<B::Plan>("softcap", count, None)?;
        self.inner.softcap(cap, logits, count)
    }

    fn attend(
        &self,
        cache: &mut B::Cache,
        layer: usize,
        rows: &[Rows],
        qkv: &B::Vector,
        out: &mut B::Vector,
    ) -> Result<()> {
        self.queue::<B::Plan>("attend", count(rows), None)?;
        self.inner.attend(cache, layer, rows, qkv, out)
    }

    fn advance(&self, cache: &mut B::Cache, rows: &[Rows]) -> Result<()> {
        self.queue::<B::Plan>("advance", count(rows), None)?;
        self.inner.advance(cache, rows)
    }

    fn gather(&self, from: &B::Vector, len: usize, which: &[usize], to: &mut B::Vector) -> Result<()> {
        self.queue::<B::Plan>("gather", which.len(), None)?;
        self.inner.gather(from, len, which, to)
    }

    fn sample(&self, cache: &mut B::Cache, slots: &[usize], logits: &B::Vector) -> Result<()> {
        self.queue::<B::Plan>("sample", slots.len(), None)?;
        self.inner.sample(cache, slots, logits)
    }

    fn sampled(&self, cache: &B::Cache, slot: usize, i: usize) -> Result<u32> {
        self.inner.sampled(cache, slot, i)
    }

    fn prepare(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.inner.prepare(work)
    }

    /// First runs, then records, then replays: as on a GPU, nothing that is wrong with a replayed token stops it.
    fn replay(&self, graphs: &mut Self::Graphs, rows: &[Rows], work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.queued.borrow_mut().clear();
        let done = work();
        let queued = self.queued.take();
        let slots = rows.iter().map(|rows| rows.slot).collect();
        match graphs.get_mut(&slots) {
            None => {
                graphs.insert(slots, None);
            }
            Some(recorded @ None) => *recorded = Some(queued),
            Some(Some(recorded)) => {
                self.replayed.set(self.replayed.get() + 1);
                if *recorded != queued {
                    self.wrong.borrow_mut().push(format!("{recorded:?} was replayed, {queued:?} was meant"));
                }
                if let Err(error) = done {
                    self.wrong.borrow_mut().push(format!("replayed where it should have failed: {error:#}"));
                }
                return Ok(());
            }
        }
        done
    }
}
