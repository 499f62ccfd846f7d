//! From kernel times to one number per module and configuration.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::search::{Module, Timings};
use crate::backend::record::median;
use crate::config::Projection;
use crate::nsys::trace::{Kernel, Role};
use crate::nsys::{KernelRecord, Profile};

/// The times of one configuration of one module, in µs: medians over its tokens and layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// From the first kernel's start to the last one's end.
    pub decdec_us: f64,
    /// The base product.
    pub gemv_us: f64,
    /// The compensation; 0 where there is none.
    pub dec_us: f64,
    /// How often the kernels started and ended in which order: `g`, `d` for starts, `G`, `D` for ends of base
    /// product and compensation.
    pub orderings: String,
}

/// Everything that a profile says of the four modules.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Base products alone.
    pub base: [Sample; 4],
    /// By module, `n_tb` and `k_chunk`.
    pub pairs: BTreeMap<(usize, usize, usize), Sample>,
}

#[derive(Default)]
struct Runs {
    decdec: Vec<f64>,
    gemv: Vec<f64>,
    dec: Vec<f64>,
    orderings: BTreeMap<String, usize>,
}

impl Runs {
    /// Adds one launch; `before` is when the launch before it ended.
    ///
    /// Where launches overlap (one starts while its predecessor drains, and waits), a launch counts from its
    /// predecessor's end: only so do launches add up to the time of a layer.
    fn add(&mut self, gemv: &KernelRecord, dec: Option<&KernelRecord>, before: u64) {
        let us = |start: u64, end: u64| (end - start) as f64 / 1e3;
        let start = dec.map_or(gemv.start_ns, |dec| dec.start_ns.min(gemv.start_ns));
        let end = dec.map_or(gemv.end_ns, |dec| dec.end_ns.max(gemv.end_ns));
        let start = if before < end { start.max(before) } else { start };
        self.decdec.push(us(start, end));
        self.gemv.push(us(gemv.start_ns, gemv.end_ns));
        self.dec.push(dec.map_or(0.0, |dec| us(dec.start_ns, dec.end_ns)));
        let mut events = vec![(gemv.start_ns, 'g'), (gemv.end_ns, 'G')];
        events.extend(dec.into_iter().flat_map(|dec| [(dec.start_ns, 'd'), (dec.end_ns, 'D')]));
        events.sort_by_key(|&(at, _)| at);
        *self.orderings.entry(events.into_iter().map(|(_, event)| event).collect()).or_default() += 1;
    }

    fn sample(mut self) -> Sample {
        let orderings: Vec<_> = self.orderings.iter().map(|(order, count)| format!("{order}:{count}")).collect();
        Sample {
            decdec_us: median(&mut self.decdec),
            gemv_us: median(&mut self.gemv),
            dec_us: median(&mut self.dec),
            orderings: orderings.join(" "),
        }
    }
}

impl Table {
    /// Pairs up the kernels of a profile. A compensation's `n_tb` is the first side of its grid.
    ///
    /// # Errors
    /// A module whose base product is missing.
    pub fn new(profile: &Profile) -> Result<Self> {
        let mut base: [Runs; 4] = Default::default();
        let mut grouped: BTreeMap<_, Runs> = BTreeMap::new();
        let mut waiting: BTreeMap<usize, (Kernel, &KernelRecord)> = BTreeMap::new();
        // When everything launched so far had ended, a pair's own first kernel not counted.
        let mut before = 0;
        for (line, record) in &profile.kernels {
            match (line.role, line.kernel) {
                (Role::Standalone, Kernel::Gemv(projection)) => base[projection.index()].add(record, None, before),
                (Role::Concurrent(pair), kernel) => {
                    let Some(other) = waiting.remove(&pair) else {
                        waiting.insert(pair, (kernel, record));
                        continue;
                    };
                    let (gemv, dec) = match (other, kernel) {
                        ((Kernel::Gemv(projection), gemv), Kernel::Dec(k_chunk)) => {
                            ((projection, gemv), (k_chunk, record))
                        }
                        ((Kernel::Dec(k_chunk), dec), Kernel::Gemv(projection)) => {
                            ((projection, record), (k_chunk, dec))
                        }
                        _ => anyhow::bail!("pair {pair} is not a base product and its compensation"),
                    };
                    let n_tb = dec.1.grid[0] as usize;
                    ensure!(n_tb > 0, "the compensation of pair {pair} ran on 0 thread blocks, at least 1 is expected");
                    grouped.entry((gemv.0.index(), n_tb, dec.0)).or_default().add(gemv.1, Some(dec.1), before);
                    before = before.max(other.1.end_ns);
                }
                _ => {}
            }
            before = before.max(record.end_ns);
        }
        if let Some(pair) = waiting.keys().next() {
            anyhow::bail!("pair {pair} is not a base product and its compensation");
        }
        for (projection, runs) in Projection::ALL.into_iter().zip(&base) {
            ensure!(
                !runs.gemv.is_empty(),
                "the trace has no standalone kernel of {projection}: take the profile again"
            );
        }
        let base = base.map(Runs::sample);
        for (projection, sample) in Projection::ALL.into_iter().zip(&base) {
            // Every result is a ratio to these.
            ensure!(
                sample.decdec_us > 0.0,
                "the standalone kernels of {projection} took no time by this trace: take the profile again"
            );
        }
        let pairs = grouped.into_iter().map(|(key, runs)| (key, runs.sample())).collect();
        Ok(Self { base, pairs })
    }

    /// What the search works on.
    pub fn timings(&self, shapes: [(usize, usize); 4]) -> Timings {
        let mut modules = shapes.map(|shape| (shape, BTreeMap::<usize, Vec<(usize, f64)>>::new()));
        for (&(module, n_tb, k_chunk), sample) in &self.pairs {
            modules[module].1.entry(n_tb).or_default().push((k_chunk, sample.decdec_us));
        }
        let mut base = self.base.iter();
        Timings(modules.map(|(shape, curves)| {
            let base_us = base.next().map_or(0.0, |sample| sample.decdec_us);
            Module::new(shape, base_us, curves)
        }))
    }
}
