//! Profiles of whole tokens: prices that every compensation has, the best of all choices, what is kept of what was tried.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use decdec::config::Projection;
use decdec::nsys::trace::{Kernel, Line, Role};
use decdec::nsys::{Capture, KernelRecord, Kind, TokenTime, Writer};
use decdec::tune::search::{Choice, Module, Timings, Token};
use decdec::tune::{self, Objective, Options, Outcome, Tuning, settle};
use proptest::prelude::*;

use crate::{LLAMA, capture, identity, options};

/// µs of a token without compensation, of 4 layers.
const BASE_US: f64 = 1000.0;

/// What a token takes, µs: `ready` at each n_tb, and what a unit of `k_chunk` adds in each module; together they cost
/// `factor` times as much.
struct Prices {
    ready: BTreeMap<usize, f64>,
    unit: [f64; 4],
    factor: f64,
}

impl Prices {
    fn us(&self, n_tb: usize, k_chunks: [usize; 4]) -> f64 {
        let added: f64 = k_chunks.iter().zip(self.unit).map(|(&k, unit)| k as f64 * unit).sum();
        let several = k_chunks.iter().filter(|&&k| k > 0).count() > 1;
        BASE_US + self.ready[&n_tb] + if several { self.factor * added } else { added }
    }

    /// The profile of a sweep: nothing, each module by itself, and one mix at every n_tb.
    fn write(&self, dir: &Path) {
        let (trace, sqlite) = (identity().trace(dir), identity().sqlite(dir));
        let n_tbs = self.ready.keys().copied().collect();
        let of = Capture {
            kind: Kind::Tokens,
            layers: 4,
            layers_ns: 900_000,
            n_tbs,
            k_chunks: vec![1, 2, 4, 8],
            ..capture()
        };
        let mut writer = Writer::create(&sqlite, &of).unwrap();
        let stretches = |role: Role, dec: Option<(usize, [usize; 4])>| {
            let mut now = 1;
            let mut lines = Vec::new();
            for (i, (projection, us)) in Projection::ALL.into_iter().zip([30u64, 20, 90, 50]).enumerate() {
                let role = if let Role::Concurrent(first) = role { Role::Concurrent(first + i) } else { role };
                let (start_ns, end_ns) = (now, now + us * 1000);
                now = end_ns + 1000;
                let record = KernelRecord { start_ns, end_ns, grid: [1; 3], ..KernelRecord::default() };
                if let Some((n_tb, k_chunks)) = dec {
                    let dec = KernelRecord { grid: [n_tb as u32, 1, 1], ..record.clone() };
                    lines.push((Line { role, kernel: Kernel::Dec(k_chunks[projection.index()]) }, dec));
                }
                lines.push((Line { role, kernel: Kernel::Gemv(projection) }, record));
            }
            lines
        };
        writer.append(&stretches(Role::Standalone, None)).unwrap();
        for &n_tb in self.ready.keys() {
            let singles =
                (0..4).flat_map(|i| [1, 2, 4, 8].map(|k| std::array::from_fn(|j| if i == j { k } else { 0 })));
            for k_chunks in [[0; 4]].into_iter().chain(singles).chain([[4; 4]]) {
                let ns = |us: f64| (us * 1e3).round() as u64;
                let (token_ns, base_ns) = (ns(self.us(n_tb, k_chunks)), ns(BASE_US));
                let lines = stretches(Role::Concurrent(writer.pairs()), Some((n_tb, k_chunks)));
                writer.append_token(&lines, Some(&TokenTime { n_tb, k_chunks, token_ns, base_ns })).unwrap();
            }
        }
        writer.finish(&trace, &sqlite).unwrap();
    }
}

fn prices() -> Prices {
    Prices { ready: BTreeMap::from([(8, 20.0), (16, 30.0), (64, 520.0)]), unit: [4.0, 6.0, 3.0, 2.0], factor: 1.0 }
}

fn tuned(prices: &Prices, targets: &[f64], objective: Objective) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    prices.write(dir.path());
    tune::run(&Options { exhaustive: true, objective, ..options(dir.path(), targets) }).unwrap()
}

/// The price of being ready is paid once, whatever is compensated; where nothing fits beside it, nothing is.
#[test]
fn the_price_of_any_compensation_is_paid_once() {
    let outcome = tuned(&prices(), &[1.0, 2.5, 5.0, 10.0], Objective::Channels);
    let found: Vec<_> = outcome.tunings.iter().map(|tuning| &tuning.found.fine).collect();
    assert_eq!(found[0].k_chunks(), [0; 4], "ready costs 2 % at least");
    // 5 µs above the 20 of n_tb 8: one unit of gate and up (3 µs) is worth most, and 2 of down (4 µs) as much less.
    assert_eq!((found[1].n_tb, found[1].k_chunks()), (8, [0, 0, 1, 1]));
    for (tuning, choice) in outcome.tunings.iter().zip(&found).skip(1) {
        let slowdown = (prices().us(choice.n_tb, choice.k_chunks()) / BASE_US - 1.0) * 100.0;
        assert!(slowdown <= tuning.target + 1e-6, "{choice:?}: {slowdown}");
        assert!((choice.us() / outcome.timings.base_us() - 1.0 - slowdown / 100.0).abs() < 1e-6, "{choice:?}");
        assert_eq!(choice.n_tb, 8);
    }
    // 80 µs: all 8 of gate and up (24) and of down (16) come first, by bytes a µs, then qkv (4 µs), then o.
    assert_eq!(found[3].k_chunks(), [8, 1, 8, 8]);
    let report = outcome.to_string();
    for says in [
        "note: objective k: the sum of k_chunk times bytes",
        "whole tokens were measured",
        "the least price of any compensation that was measured: +2.20 % for k_chunk [0, 0, 0, 1] at n_tb 8",
        "k_chunk per module       : 8, 1, 8, 8",
        "Fine-grained layer time: 249.50 us (Slowdown: 1.10)",
    ] {
        // A layer's part of 1098 µs, without its part of the 100 µs before and after all layers: 274.5 − 25.
        assert!(report.contains(says), "{says}: {report}");
    }
}

/// What one mix costs says what others cost; without it, the target would be missed.
#[test]
fn prices_that_do_not_add_up_are_seen_in_a_mix() {
    let dear = Prices { factor: 1.5, ..prices() };
    let outcome = tuned(&dear, &[10.0], Objective::Channels);
    let fine = &outcome.tunings[0].found.fine;
    assert!(dear.us(fine.n_tb, fine.k_chunks()) <= 1.1 * BASE_US + 1e-6, "{fine:?}");
    // Negative control: what the sum of the parts would have allowed.
    assert!(dear.us(8, [8, 1, 8, 8]) > 1.1 * BASE_US);
}

#[test]
fn what_channels_are_worth_decides_among_modules() {
    let outcome = tuned(&prices(), &[5.0], Objective::Divergence([1.0, 0.0, 0.0, 0.0]));
    let fine = &outcome.tunings[0].found.fine;
    assert_eq!(fine.k_chunks()[0], 7, "28 of 30 µs are qkv's: {fine:?}");
    assert!(fine.k_chunks()[1..].iter().all(|&k| k == 0), "{fine:?}");
    assert!(outcome.to_string().contains("objective kl: the divergence that compensation gives back"), "{outcome}");
    assert_eq!(outcome.tuned(&outcome.tunings[0]).objective.as_deref(), Some("kl"));
}

#[test]
fn of_whole_tokens_the_exhaustive_choice_is_one_that_was_measured() {
    let outcome = tuned(&prices(), &[10.0], Objective::Channels);
    let tuning = &outcome.tunings[0];
    // 24 µs and the 20 of being ready are 4.4 %; by bytes, 4 of every projection, which fit as well, are less.
    assert_eq!(tuning.exhaustive.as_ref().unwrap().k_chunks(), [0, 0, 8, 0]);
    let bytes = LLAMA.map(|(inputs, outputs)| (inputs * outputs) as f64);
    assert!(tuning.found.fine.worth(bytes) > tuning.exhaustive.as_ref().unwrap().worth(bytes));
}

#[test]
fn an_older_format_and_damaged_rows_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    prices().write(dir.path());
    let sqlite = identity().sqlite(dir.path());
    let good = fs::read(&sqlite).unwrap();
    for (sql, says) in [
        ("DELETE FROM META_DATA_CAPTURE WHERE name = 'DECDEC_FORMAT'", "a profile of format 1, this program reads 2"),
        ("UPDATE META_DATA_CAPTURE SET value = '3' WHERE name = 'DECDEC_FORMAT'", "format 3, this program reads 2"),
        (
            "UPDATE META_DATA_CAPTURE SET value = 'steps' WHERE name = 'DECDEC_KIND'",
            "DECDEC_KIND is not one that we know",
        ),
        ("UPDATE DECDEC_TOKENS SET gu = 2000 WHERE rowid = 3", "DECDEC_TOKENS has the row"),
        ("UPDATE DECDEC_TOKENS SET base_ns = 0 WHERE rowid = 3", "DECDEC_TOKENS has the row"),
        ("UPDATE DECDEC_TOKENS SET token_ns = 'soon' WHERE rowid = 3", "cannot read DECDEC_TOKENS"),
        ("DELETE FROM DECDEC_TOKENS WHERE n_tb = 16 AND qkv + o + gu + d = 0", "no token was measured at n_tb 16"),
        ("DROP TABLE DECDEC_TOKENS", "has no whole tokens"),
    ] {
        rusqlite::Connection::open(&sqlite).unwrap().execute_batch(sql).unwrap();
        let error = crate::refusal(dir.path());
        assert!(error.contains(says), "{sql}: {error}");
        fs::write(&sqlite, &good).unwrap();
    }
    assert!(tune::run(&options(dir.path(), &[5.0])).is_ok(), "good before it was spoiled");
}

/// A random table of whole tokens: consecutive `k_chunk` from 1 on, and some choices measured as they are.
fn tables() -> impl Strategy<Value = Timings> {
    let added = prop::collection::vec(0.0f64..4.0, 1..4);
    let n_tb = (0.0f64..6.0, prop::collection::vec(added, 4));
    let mix = (0usize..3, prop::collection::vec(0usize..4, 4), 0.5f64..2.0);
    (prop::collection::vec(n_tb, 1..4), prop::collection::vec(mix, 0..6)).prop_map(|(n_tbs, mixes)| {
        let base = [10.0, 7.0, 30.0, 15.0];
        let modules = std::array::from_fn(|i| {
            let curve = |(n, (_, added)): (usize, &(f64, Vec<Vec<f64>>))| {
                (4 * (n + 1), added[i].iter().enumerate().map(|(k, us)| (k + 1, base[i] + us)).collect())
            };
            Module::new(LLAMA[i], base[i], n_tbs.iter().enumerate().map(curve).collect())
        });
        let ready_us = n_tbs.iter().enumerate().map(|(n, (ready, _))| (4 * (n + 1), *ready)).collect();
        let token = Token { rest_us: 8.0, outside_us: 3.0, ready_us, measured: Vec::new() };
        let mut timings = Timings { modules, token: Some(token) };
        for (n, k_chunks, factor) in mixes {
            let (n_tb, k_chunks) = (4 * (n % n_tbs.len() + 1), std::array::from_fn(|i| k_chunks[i]));
            let base = timings.base_us();
            let known = timings.layer_us(n_tb, k_chunks).filter(|_| k_chunks != [0; 4]);
            let token = timings.token.as_mut().unwrap();
            if let Some(us) = known.filter(|_| token.measured.iter().all(|(n, k, _)| (*n, *k) != (n_tb, k_chunks))) {
                token.measured.push((n_tb, k_chunks, base + (us - base) * factor));
            }
        }
        timings
    })
}

/// The most that a choice is worth within the budget, all of them tried.
fn brute_force(timings: &Timings, budget: impl Fn(usize) -> f64, weights: [f64; 4], with_ready: bool) -> f64 {
    let mut best = 0.0f64;
    for n_tb in timings.n_tbs() {
        let curves = timings.modules.each_ref().map(|m| m.curves[&n_tb].clone());
        let longest = curves.iter().map(Vec::len).max().unwrap();
        for i in 0..longest.pow(4) {
            let index: [usize; 4] = std::array::from_fn(|p| i / longest.pow(p as u32) % longest);
            if (0..4).any(|p| index[p] >= curves[p].len()) || index == [0; 4] {
                continue;
            }
            let k_chunks = std::array::from_fn(|p| curves[p][index[p]].0);
            if (0..4).any(|p| weights[p] == 0.0 && k_chunks[p] > 0) {
                continue;
            }
            let token = timings.token.as_ref().unwrap();
            let us = timings.layer_us(n_tb, k_chunks).unwrap() - if with_ready { 0.0 } else { token.ready_us[&n_tb] };
            if us <= budget(n_tb) {
                best = best.max((0..4).map(|p| k_chunks[p] as f64 * weights[p]).sum());
            }
        }
    }
    best
}

/// Whether a choice is as good as the best, but for the order in which numbers are added.
fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * (1.0 + a.abs())
}

proptest! {
    #[test]
    fn no_choice_within_the_budget_is_worth_more(
        timings in tables(), slower in 0.0f64..0.3, more in 0.0f64..0.1, weights in prop::array::uniform4(0u32..20),
    ) {
        let weights = weights.map(f64::from);
        let budget = |n_tb: usize| timings.base_us() * (1.0 + slower + if n_tb == 8 { more } else { 0.0 });
        let found = timings.search_weighted(&budget, weights);
        prop_assert!(found.fine.sum_k() == 0 || found.fine.us() <= budget(found.fine.n_tb) + 1e-9);
        let real = timings.layer_us(found.fine.n_tb, found.fine.k_chunks()).unwrap();
        let wasted = found.fine.k_chunks().into_iter().zip(weights).any(|(k_chunk, weight)| weight == 0.0 && k_chunk > 0);
        prop_assert!(!wasted, "worth nothing: {:?}", found.fine);
        prop_assert!(close(real, found.fine.us()), "{real} is what it takes: {:?}", found.fine);
        let best = brute_force(&timings, budget, weights, true);
        prop_assert!(close(found.fine.worth(weights), best), "{best} is worth more than {:?}", found.fine);
        // Negative control: as if being ready cost nothing, a choice that is too slow would be worth as much or more.
        prop_assert!(brute_force(&timings, budget, weights, false) >= best);
    }

    /// Whatever tokens really take: what is kept holds, each time that it was measured, no choice that was measured and
    /// holds is worth more, and few are measured.
    #[test]
    fn what_is_kept_is_the_best_of_what_was_tried(
        timings in tables(), target in 0.0f64..30.0, factor in 0.3f64..3.0, more in -2.0f64..4.0, noise in 0.0f64..2.0,
    ) {
        let (base, weights) = (timings.base_us(), LLAMA.map(|(inputs, outputs)| (inputs * outputs) as f64));
        let found = timings.search_weighted(&|_| base * (1.0 + target / 100.0), weights);
        let mut tuning = Tuning { target, found, exhaustive: None, verified: None };
        let mut seen: Vec<(Choice, f64)> = Vec::new();
        let mut measure = |choice: &Choice, _: bool| -> Result<(f64, f64)> {
            let expected = (choice.us() / base - 1.0) * 100.0;
            let wobble = noise * (seen.len() as f64 * 2.4).sin();
            let real = if choice.sum_k() == 0 { 0.0 } else { expected * factor + more + wobble };
            seen.push((choice.clone(), real));
            Ok((2.0, 2.0 * (1.0 + real / 100.0)))
        };
        settle(&timings, weights, &mut tuning, &mut measure).unwrap();
        let verified = tuning.verified.unwrap();
        prop_assert!(seen.len() <= 2 * 12 + 1, "{} measurements", seen.len());
        prop_assert!(verified.slowdown <= target + 1e-9);
        let holds = |choice: &Choice| seen.iter().filter(|(same, _)| same.is_same(choice)).all(|(_, real)| *real <= target);
        let fine = &tuning.found.fine;
        prop_assert!(fine.sum_k() == 0 || holds(fine), "{fine:?} in {seen:?}");
        prop_assert!(fine.sum_k() == 0 || seen.iter().filter(|(same, _)| same.is_same(fine)).count() > 1);
        let better = seen.iter().find(|(choice, _)| holds(choice) && choice.worth(weights) > fine.worth(weights));
        prop_assert!(better.is_none(), "{better:?} holds, {fine:?} was kept");
        prop_assert!(verified.missed.iter().all(|(_, slowdown)| *slowdown > target));
    }
}

/// Tokens that are slower than expected cost compensation, quicker ones give more of it; the nearest that holds is found.
#[test]
fn expectations_that_were_off_are_corrected_both_ways() {
    let outcome = tuned(&prices(), &[10.0], Objective::Channels);
    let bytes = LLAMA.map(|(inputs, outputs)| (inputs * outputs) as f64);
    let kept = |factor: f64| {
        let mut tuning = outcome.tunings[0].clone();
        let mut measure = |choice: &Choice, _: bool| {
            let expected = (choice.us() / outcome.timings.base_us() - 1.0) * 100.0;
            Ok((1.0, 1.0 + expected * factor / 100.0))
        };
        settle(&outcome.timings, bytes, &mut tuning, &mut measure).unwrap();
        tuning
    };
    let (slow, right, quick) = (kept(1.5), kept(1.0), kept(0.8));
    assert_eq!(right.found.fine.k_chunks(), [8, 1, 8, 8]);
    assert!(right.verified.unwrap().missed.is_empty());
    let worth = |tuning: &Tuning| tuning.found.fine.worth(bytes);
    assert!(worth(&slow) < worth(&quick), "{:?}", quick.found.fine);
    let (slow, quick) = (slow.verified.unwrap(), quick.verified.unwrap());
    assert!(!slow.missed.is_empty());
    assert!(slow.slowdown > 8.5 && slow.slowdown <= 10.0, "{slow:?}");
    assert!(quick.slowdown > 8.5 && quick.slowdown <= 10.0, "{quick:?}");
}

/// Where the best by its modules' times was measured and takes too long, the next best may be one that takes longer by its
/// modules' times.
#[test]
fn a_choice_that_was_too_slow_hides_no_other() {
    let of = |i: usize, added: &[f64]| {
        let curve = added.iter().enumerate().map(|(k, us)| (k + 1, 10.0 + us)).collect();
        Module::new(LLAMA[i], 10.0, [(4, curve)].into())
    };
    let modules = [of(0, &[1.0, 2.0]), of(1, &[3.0]), of(2, &[9.0]), of(3, &[9.0])];
    let token =
        Token { rest_us: 0.0, outside_us: 0.0, ready_us: [(4, 0.0)].into(), measured: vec![(4, [2, 0, 0, 0], 60.0)] };
    let mut timings = Timings { modules, token: Some(token) };
    let best = |timings: &Timings| timings.search_weighted(&|_| 43.5, [10.0, 15.0, 1.0, 1.0]).fine.k_chunks();
    assert_eq!(best(&timings), [0, 1, 0, 0]);
    // Negative control: nothing was measured as a whole.
    timings.token.as_mut().unwrap().measured.clear();
    assert_eq!(best(&timings), [2, 0, 0, 0]);
}
