//! From kernel times to one number per module and configuration.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::search::{Module, Timings, Token};
use crate::backend::record::median;
use crate::config::Projection;
use crate::nsys::trace::{Kernel, Role};
use crate::nsys::{KernelRecord, Profile, TokenTime};

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
        let modules = modules.map(|(shape, curves)| {
            let base_us = base.next().map_or(0.0, |sample| sample.decdec_us);
            Module::new(shape, base_us, curves)
        });
        Timings { modules, token: None }
    }

    /// What the search works on where whole tokens were measured: every time is a token's, divided by its `layers`.
    /// A module's own part of a token without compensation is its stretch of it.
    ///
    /// # Errors
    /// No token for an `n_tb` at which nothing was selected.
    pub fn token_timings(
        &self,
        shapes: [(usize, usize); 4],
        tokens: &[TokenTime],
        (layers, layers_ns): (usize, u64),
    ) -> Result<Timings> {
        let mut bases: Vec<f64> = tokens.iter().map(|token| token.base_ns as f64 / 1e3).collect();
        let layer_us = median(&mut bases) / layers.max(1) as f64;
        ensure!(layer_us > 0.0, "the profile has no whole tokens: take it again");
        // Products that were timed one by one may take longer than a token has room for.
        let stretches = self.base.each_ref().map(|sample| sample.decdec_us);
        let most = (layers_ns as f64 / 1e3 / layers.max(1) as f64).clamp(0.0, layer_us);
        let fit = (most / stretches.iter().sum::<f64>()).min(1.0);
        let base_us = stretches.map(|us| us * fit);
        // Held against tokens that were measured beside them, so that a clock that drifts moves both.
        // Compensation makes no token faster: what is below the base is noise.
        let us = |token: &TokenTime| (token.token_ns as f64 / token.base_ns as f64).max(1.0) * layer_us;
        let of = |token: &TokenTime| token.k_chunks.iter().filter(|&&k| k > 0).count();
        let nothing: BTreeMap<usize, f64> =
            tokens.iter().filter(|token| of(token) == 0).map(|token| (token.n_tb, us(token))).collect();
        let mut added = [const { BTreeMap::<usize, Vec<(usize, f64)>>::new() }; 4];
        for token in tokens.iter().filter(|token| of(token) == 1) {
            let ready = nothing.get(&token.n_tb);
            let ready =
                ready.with_context(|| format!("no token was measured at n_tb {} with k_chunk 0", token.n_tb))?;
            let i = token.k_chunks.iter().position(|&k| k > 0).unwrap_or(0);
            added[i].entry(token.n_tb).or_default().push((token.k_chunks[i], (us(token) - ready).max(0.0)));
        }
        for (&n_tb, &ready) in &nothing {
            let mixes = tokens.iter().filter(|token| token.n_tb == n_tb && of(token) > 1);
            let factor = together(&added, n_tb, mixes.map(|token| (token.k_chunks, us(token) - ready)));
            added.iter_mut().filter_map(|curves| curves.get_mut(&n_tb)).flatten().for_each(|(_, us)| *us *= factor);
        }
        let module = |i: usize| {
            let curves = std::mem::take(&mut added[i]).into_iter();
            let from_base = |(n_tb, curve): (usize, Vec<(usize, f64)>)| {
                (n_tb, curve.into_iter().map(|(k, us)| (k, base_us[i] + us)).collect())
            };
            Module::new(shapes[i], base_us[i], curves.map(from_base).collect())
        };
        let modules = [0, 1, 2, 3].map(module);
        let ready_us = nothing.iter().map(|(&n_tb, us)| (n_tb, (us - layer_us).max(0.0))).collect();
        let measured = tokens.iter().filter(|token| of(token) > 0).map(|token| (token.n_tb, token.k_chunks, us(token)));
        let token = Token {
            rest_us: layer_us - base_us.iter().sum::<f64>(),
            outside_us: layer_us - most,
            ready_us,
            measured: measured.collect(),
        };
        Ok(Timings { modules, token: Some(token) })
    }
}

/// What several modules' compensation costs for each µs that each by itself adds: the median over the `mixes` (`k_chunk`
/// of each module, what they added together) of one `n_tb`; 1 where none says.
fn together(
    added: &[BTreeMap<usize, Vec<(usize, f64)>>; 4],
    n_tb: usize,
    mixes: impl Iterator<Item = ([usize; 4], f64)>,
) -> f64 {
    let price = |i: usize, k_chunk: usize| match k_chunk {
        0 => Some(0.0),
        _ => added[i].get(&n_tb)?.iter().find(|(k, _)| *k == k_chunk).map(|(_, us)| *us),
    };
    let factor = |(k_chunks, us): ([usize; 4], f64)| {
        let alone = (0..4).map(|i| price(i, k_chunks[i])).sum::<Option<f64>>()?;
        // Of almost nothing, noise would make anything.
        (alone > 0.05).then(|| (us / alone).clamp(0.25, 4.0))
    };
    let mut factors: Vec<f64> = mixes.filter_map(factor).collect();
    if factors.is_empty() { 1.0 } else { median(&mut factors) }
}
