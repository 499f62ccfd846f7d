//! The search (spec §4.2; DecDEC §6): pure arithmetic on a table of times.
//!
//! Of single products: first one `k_chunk` for all modules, then single modules raised while the layer fits its target.
//! Of whole tokens, whose prices are more than the modules' ([`Token`]), and where channels are worth more in one module
//! than in another: the best of all choices ([`weighted`](Timings::search_weighted)). Times are smoothed first: in
//! `k_chunk` they can only grow, so that what shrinks is noise.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::record::median;
use crate::config::Projection;

/// The times of one module at one `n_tb`: `(k_chunk, µs)`, both ascending, starting with the base at 0.
pub type Curve = Vec<(usize, f64)>;

/// What is known of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// `(in_features, out_features)`
    pub shape: (usize, usize),
    /// The base product alone, µs.
    pub base_us: f64,
    /// By `n_tb`; smoothed.
    pub curves: BTreeMap<usize, Curve>,
}

/// What is known of a layer. Where whole tokens were measured, a layer's time is a token's, divided by its layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Timings {
    /// In the order of [`Projection::ALL`].
    pub modules: [Module; 4],
    /// Where whole tokens were measured: what a layer takes besides the four modules.
    pub token: Option<Token>,
}

/// What a layer of a token takes besides the four modules, and what was measured of it as a whole.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Token {
    /// Whatever is compensated, µs: attention, and a layer's part of what comes before and after all layers.
    pub rest_us: f64,
    /// The latter of the two, µs.
    pub outside_us: f64,
    /// What being ready to compensate adds, by `n_tb`, µs: blocks that compensate are missing elsewhere. Nothing is
    /// compensated without it.
    pub ready_us: BTreeMap<usize, f64>,
    /// Choices that were measured as they are: `n_tb`, `k_chunk` of each module, time of the layer, µs.
    pub measured: Vec<(usize, [usize; 4], f64)>,
}

/// One way to run a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Most thread blocks that compensate.
    pub n_tb: usize,
    /// What each module makes of it.
    pub modules: [Chosen; 4],
    /// What the layer takes besides, µs; see [`Token`].
    pub besides_us: f64,
}

/// One way to run a module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chosen {
    /// Its largest measured `n_tb` that is not above the most.
    pub n_tb: usize,
    /// Channels per chunk.
    pub k_chunk: usize,
    /// Time of the pair.
    pub us: f64,
}

/// What the search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// One `k_chunk` for every module that is not excluded.
    pub global: Choice,
    /// The same with single modules raised.
    pub fine: Choice,
    /// Modules that the first phase had to leave uncompensated.
    pub excluded: Vec<Projection>,
    /// The second phase did not start from `global` but from a smaller common `k_chunk`, to reach a larger sum.
    pub uneven: bool,
    /// Modules that ended at the largest `k_chunk` measured: more may fit.
    pub clamped: Vec<Projection>,
}

impl Module {
    /// Takes measured times by `n_tb` as `(k_chunk, µs)`, in any order; `k_chunk` 0 is always the base.
    pub fn new(shape: (usize, usize), base_us: f64, measured: BTreeMap<usize, Vec<(usize, f64)>>) -> Self {
        let curves = measured.into_iter().map(|(n_tb, mut times)| {
            times.retain(|&(k_chunk, _)| k_chunk > 0);
            times.sort_by_key(|&(k_chunk, _)| k_chunk);
            let smooth = isotonic(times.iter().map(|&(_, us)| us));
            let points = times.iter().zip(smooth).map(|(&(k_chunk, _), us)| (k_chunk, us.max(base_us)));
            (n_tb, std::iter::once((0, base_us)).chain(points).collect())
        });
        Self { shape, base_us, curves: curves.collect() }
    }

    /// The curve at the largest measured `n_tb` that is not above `most`.
    pub(super) fn at(&self, most: usize) -> Option<(usize, &Curve)> {
        self.curves.range(..=most).next_back().map(|(&n_tb, curve)| (n_tb, curve))
    }
}

/// The closest sequence that never decreases (least absolute error; pool adjacent violators by their medians,
/// so that a single spike is overruled by its neighbours instead of lifting all that follow).
fn isotonic(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut pools: Vec<(f64, Vec<f64>)> = Vec::new(); // median, values
    for value in values {
        let mut pool = (value, vec![value]);
        while let Some((_, before)) = pools.pop_if(|(median, _)| *median > pool.0) {
            pool.1.extend(before);
            pool.0 = median(&mut pool.1);
        }
        pools.push(pool);
    }
    pools.iter().flat_map(|(median, values)| std::iter::repeat_n(*median, values.len())).collect()
}

impl Choice {
    /// Time of the layer, µs.
    pub fn us(&self) -> f64 {
        self.modules.iter().map(|m| m.us).sum::<f64>() + self.besides_us
    }

    /// What the choice is worth: Σ `k_chunk`, weighted.
    pub fn worth(&self, weights: [f64; 4]) -> f64 {
        self.modules.iter().zip(weights).map(|(m, weight)| m.k_chunk as f64 * weight).sum()
    }

    /// Whether both are the same way to run a layer, whatever was expected of it.
    pub fn is_same(&self, other: &Self) -> bool {
        let none = self.sum_k() == 0 && other.sum_k() == 0;
        none || self.n_tb == other.n_tb && self.k_chunks() == other.k_chunks()
    }

    /// Σ `k_chunk`.
    pub fn sum_k(&self) -> usize {
        self.modules.iter().map(|m| m.k_chunk).sum()
    }

    /// `k_chunk` of each module.
    pub fn k_chunks(&self) -> [usize; 4] {
        self.modules.map(|m| m.k_chunk)
    }
}

impl Timings {
    /// Time of the layer without compensation, µs.
    pub fn base_us(&self) -> f64 {
        self.modules.iter().map(|m| m.base_us).sum::<f64>() + self.besides_us(0, false)
    }

    /// What a layer takes besides its modules, µs.
    pub(super) fn besides_us(&self, n_tb: usize, compensated: bool) -> f64 {
        let Some(token) = &self.token else { return 0.0 };
        // Tokens were measured at every n_tb that there is a curve for.
        let ready = token.ready_us.range(..=n_tb).next_back().map_or(0.0, |(_, us)| *us);
        token.rest_us + if compensated { ready } else { 0.0 }
    }

    /// Time of the layer at these values, µs; `None` where one of them was not measured.
    pub fn layer_us(&self, n_tb: usize, k_chunks: [usize; 4]) -> Option<f64> {
        let of_module = |(module, k_chunk): (&Module, usize)| {
            if k_chunk == 0 {
                return Some(module.base_us);
            }
            let (_, curve) = module.at(n_tb)?;
            curve.iter().find(|&&(k, _)| k == k_chunk).map(|&(_, us)| us)
        };
        let whole = self.token.iter().flat_map(|token| &token.measured);
        if let Some((.., us)) = whole.into_iter().find(|(n, k, _)| *n == n_tb && *k == k_chunks) {
            return Some(*us);
        }
        let besides_us = self.besides_us(n_tb, k_chunks != [0; 4]);
        self.modules.iter().zip(k_chunks).map(of_module).sum::<Option<f64>>().map(|us| us + besides_us)
    }

    /// Every `n_tb` that was measured, ascending.
    pub fn n_tbs(&self) -> Vec<usize> {
        let all: BTreeSet<usize> = self.modules.iter().flat_map(|m| m.curves.keys().copied()).collect();
        all.into_iter().collect()
    }

    /// All modules at the base, with at most `n_tb` thread blocks.
    pub(super) fn at_base(&self, n_tb: usize) -> Choice {
        let chosen = |m: &Module| Chosen { n_tb: m.at(n_tb).map_or(n_tb, |(n, _)| n), k_chunk: 0, us: m.base_us };
        Choice { n_tb, modules: self.modules.each_ref().map(chosen), besides_us: self.besides_us(n_tb, false) }
    }

    /// The search of both phases, for a layer of at most `budget_us`.
    ///
    /// Where a smaller budget ends at a larger sum (its smaller common `k_chunk` leaves more to raise), that
    /// result is taken: a larger budget never gives a smaller sum.
    pub fn search(&self, budget_us: f64) -> Found {
        let (excluded, global, mut fine) = self.both_phases(budget_us);
        let mut lower = global.clone();
        let mut uneven = false;
        while lower.sum_k() > 0 {
            // The largest budget that does not reach this common k_chunk.
            let (_, next, other) = self.both_phases(lower.us().next_down());
            if other.sum_k() > fine.sum_k() {
                (fine, uneven) = (other, true);
            }
            lower = next;
        }
        Found { clamped: self.clamped(&fine), global, fine, excluded, uneven }
    }

    /// Modules that end at the largest `k_chunk` measured.
    pub(super) fn clamped(&self, fine: &Choice) -> Vec<Projection> {
        let clamped = Projection::ALL.into_iter().filter(|p| {
            let chosen = fine.modules[p.index()];
            let curve = self.modules[p.index()].curves.get(&chosen.n_tb);
            chosen.k_chunk > 0 && curve.and_then(|c| c.last()).is_some_and(|&(last, _)| last == chosen.k_chunk)
        });
        clamped.collect()
    }

    /// Modules excluded, the first phase's result and the second's.
    ///
    /// The second phase starts from every `n_tb` that reaches the common `k_chunk` of the first, and the largest
    /// sum is kept: the quickest start often leaves least to raise.
    fn both_phases(&self, budget_us: f64) -> (Vec<Projection>, Choice, Choice) {
        let (excluded, starts) = self.all_starts(budget_us);
        let quicker = |a: &Choice, b: &Choice| a.us().total_cmp(&b.us());
        let global = starts.iter().min_by(|a, b| quicker(a, b)).cloned();
        let global = global.unwrap_or_else(|| self.at_base(1));
        let ends = starts.into_iter().map(|start| self.fine(start, budget_us));
        let best = ends.max_by(|a, b| a.sum_k().cmp(&b.sum_k()).then_with(|| quicker(b, a)));
        let fine = best.unwrap_or_else(|| global.clone());
        (excluded, global, fine)
    }

    /// The first phase: modules excluded, and one way for every `n_tb` that reaches the largest common `k_chunk`.
    pub(super) fn all_starts(&self, budget_us: f64) -> (Vec<Projection>, Vec<Choice>) {
        let mut excluded = Vec::new();
        let mut included: Vec<_> = Projection::ALL.to_vec();
        included.sort_by_key(|p| self.modules[p.index()].shape.0 * self.modules[p.index()].shape.1);
        let starts = loop {
            if included.is_empty() {
                // Single modules may still fit, if not the largest.
                break self.n_tbs().into_iter().map(|n_tb| self.at_base(n_tb)).collect();
            }
            let starts = self.starts(&included, budget_us);
            if !starts.is_empty() {
                break starts;
            }
            excluded.push(included.remove(0));
        };
        (excluded, starts)
    }

    /// One way for every `n_tb` that reaches the largest common `k_chunk` of the `included` modules that fits.
    fn starts(&self, included: &[Projection], budget_us: f64) -> Vec<Choice> {
        let n_tbs = self.n_tbs().into_iter();
        let starts: Vec<_> = n_tbs.filter_map(|n_tb| self.start(n_tb, included, budget_us)).collect();
        let most = starts.iter().map(|&(k_chunk, _)| k_chunk).max();
        starts.into_iter().filter(|&(k_chunk, _)| Some(k_chunk) == most).map(|(_, choice)| choice).collect()
    }

    /// The largest `k_chunk` above 0 that was measured for all `included` modules and fits.
    fn start(&self, n_tb: usize, included: &[Projection], budget_us: f64) -> Option<(usize, Choice)> {
        let (_, first) = self.modules[included.first()?.index()].at(n_tb)?;
        first.iter().rev().filter(|&&(k_chunk, _)| k_chunk > 0).find_map(|&(k_chunk, _)| {
            let mut choice = Choice { besides_us: self.besides_us(n_tb, true), ..self.at_base(n_tb) };
            for projection in included {
                let (_, curve) = self.modules[projection.index()].at(n_tb)?;
                let point = curve.binary_search_by_key(&k_chunk, |&(k, _)| k).ok()?;
                let chosen = &mut choice.modules[projection.index()];
                (chosen.k_chunk, chosen.us) = curve[point];
            }
            (choice.us() <= budget_us).then_some((k_chunk, choice))
        })
    }

    /// Raises single modules to their next measured `k_chunk`, the one that adds least time first, while the
    /// layer fits.
    fn fine(&self, mut choice: Choice, budget_us: f64) -> Choice {
        loop {
            let mut best: Option<(f64, usize, Chosen)> = None;
            for (i, module) in self.modules.iter().enumerate() {
                let now = choice.modules[i];
                let Some((_, curve)) = module.at(choice.n_tb) else { continue };
                let next = curve.partition_point(|&(k_chunk, _)| k_chunk <= now.k_chunk);
                let Some(&(k_chunk, us)) = curve.get(next) else { continue };
                if best.as_ref().is_none_or(|&(added, ..)| us - now.us < added) {
                    best = Some((us - now.us, i, Chosen { k_chunk, us, ..now }));
                }
            }
            let Some((_, i, raised)) = best else { return choice };
            let before = std::mem::replace(&mut choice.modules[i], raised);
            if choice.us() > budget_us {
                choice.modules[i] = before;
                return choice;
            }
        }
    }

    /// The true optimum over everything measured: the largest Σ `k_chunk` within `budget_us`, then the least
    /// time. For every `n_tb`, the least time of every sum, module by module.
    pub fn exhaustive(&self, budget_us: f64) -> Choice {
        let mut best = self.at_base(self.n_tbs().first().copied().unwrap_or(1));
        for n_tb in self.n_tbs() {
            let start = self.at_base(n_tb);
            let mut by_sum = BTreeMap::from([(0, (start.us(), start))]);
            for (i, module) in self.modules.iter().enumerate() {
                let Some((_, curve)) = module.at(n_tb) else { continue };
                let mut next = BTreeMap::<usize, (f64, Choice)>::new();
                for (sum, (_, choice)) in &by_sum {
                    for &(k_chunk, us) in curve {
                        let mut raised = choice.clone();
                        raised.modules[i] = Chosen { k_chunk, us, ..raised.modules[i] };
                        let total = raised.us();
                        let known = next.get(&(sum + k_chunk));
                        if total <= budget_us && known.is_none_or(|&(least, _)| total < least) {
                            next.insert(sum + k_chunk, (total, raised));
                        }
                    }
                }
                by_sum = next;
            }
            if let Some((sum, (us, choice))) = by_sum.pop_last()
                && (sum > best.sum_k() || sum == best.sum_k() && us < best.us())
            {
                best = choice;
            }
        }
        best
    }
}
