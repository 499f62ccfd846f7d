//! The search on tables with known optima, noisy ones, and random ones.

use std::collections::BTreeMap;

use decdec::config::Projection;
use decdec::tune::search::{Choice, Timings};
use proptest::prelude::*;

use crate::{Synthetic, tuned, write};

#[test]
fn one_spike_does_not_stop_the_search() {
    let mut noisy = Synthetic::manual();
    let budget = noisy.base.iter().sum::<f64>() * 1.1;
    let calm = noisy.timings().search(budget).fine;
    for curves in &mut noisy.curves {
        curves[1].1[1] *= 3.0;
    }
    let found = noisy.timings().search(budget).fine;
    assert!(found.us() <= budget);
    assert_eq!(found.k_chunks(), calm.k_chunks());
    // Negative control: without smoothing, a spike three times as high fits no target of 10 %.
    assert!(noisy.curves[0][1].1[1] > 1.1 * noisy.base[0]);
}

#[test]
fn spikes_below_the_base_are_noise_too() {
    let mut noisy = Synthetic::manual();
    noisy.curves[2][1].1[5] = 1.0;
    let timings = noisy.timings();
    for (module, base) in timings.modules.iter().zip(noisy.base) {
        for curve in module.curves.values() {
            assert_eq!(curve[0], (0, base));
            assert!(curve.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1), "{curve:?}");
        }
    }
}

#[test]
fn where_nothing_fits_nothing_is_compensated_and_said_so() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[0.0]);
    assert_eq!(outcome.tunings[0].found.fine.k_chunks(), [0; 4]);
    assert_eq!(outcome.tunings[0].found.excluded.len(), 4);
    assert_eq!(outcome.tunings[0].found.fine.us(), outcome.timings.base_us());
    assert!(outcome.to_string().contains("no common k_chunk fits"), "{outcome}");
    assert_eq!(outcome.tuned(&outcome.tunings[0]).k_chunks, [0; 4]);
}

#[test]
fn where_everything_fits_the_edge_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[1000.0]);
    assert_eq!(outcome.tunings[0].found.fine.k_chunks(), [6; 4]);
    assert_eq!(outcome.tunings[0].found.clamped.len(), 4);
    assert!(outcome.to_string().contains("profile with --max-k-chunk 12"), "{outcome}");
}

#[test]
fn the_smallest_module_is_left_out_first_and_may_come_back() {
    // At k_chunk 1, o alone breaks the target; without it 3 fits everywhere, and nothing is left for o.
    let one = |times: &[f64]| vec![(4, times.to_vec())];
    let mut table = Synthetic {
        base: [10.0; 4],
        curves: [
            one(&[10.1, 10.2, 10.3]),
            one(&[19.0, 19.5, 20.0]),
            one(&[10.1, 10.2, 10.3]),
            one(&[10.1, 10.2, 10.3]),
        ],
    };
    let found = table.timings().search(41.0);
    assert_eq!(found.excluded, [Projection::O]);
    assert_eq!(found.fine.k_chunks(), [3, 0, 3, 3]);
    // The others too dear for a common k_chunk: o comes back in the second phase.
    table.curves = [one(&[11.0]), one(&[10.2]), one(&[10.5]), one(&[10.9])];
    let found = table.timings().search(41.8);
    assert_eq!(found.excluded, [Projection::O, Projection::Qkv]);
    assert_eq!(found.global.k_chunks(), [0, 0, 1, 1]);
    assert_eq!(found.fine.k_chunks(), [0, 1, 1, 1]);
}

/// A random table: base times and times that grow or not, two to four `n_tb` per module.
fn tables() -> impl Strategy<Value = Synthetic> {
    let curve = (2usize..12, prop::collection::vec(0.0f64..3.0, 1..5));
    let module = (5.0f64..50.0, prop::collection::vec(curve, 1..4));
    prop::collection::vec(module, 4).prop_map(|modules| {
        let base = std::array::from_fn(|i| modules[i].0);
        let curves = std::array::from_fn(|i| {
            let (base, curves) = &modules[i];
            let by_n_tb: BTreeMap<_, _> =
                curves.iter().map(|(n, added)| (*n, added.iter().map(|a| base + a).collect())).collect();
            by_n_tb.into_iter().collect()
        });
        Synthetic { base, curves }
    })
}

/// Every choice that the rules allow, by brute force: the best Σ `k_chunk`, then the least time.
fn brute_force(timings: &Timings, budget: f64) -> (usize, f64) {
    let mut best = (0, timings.base_us());
    for most in timings.n_tbs() {
        let curves = timings.modules.each_ref().map(|m| {
            let curve = m.curves.range(..=most).next_back().map(|(_, curve)| curve.clone());
            curve.unwrap_or_else(|| vec![(0, m.base_us)])
        });
        for a in &curves[0] {
            for b in &curves[1] {
                for c in &curves[2] {
                    for d in &curves[3] {
                        let (k, us) = (a.0 + b.0 + c.0 + d.0, a.1 + b.1 + c.1 + d.1);
                        if us <= budget && (k > best.0 || k == best.0 && us < best.1) {
                            best = (k, us);
                        }
                    }
                }
            }
        }
    }
    best
}

proptest! {
    #[test]
    fn the_search_keeps_its_promises(table in tables(), low in 0.0f64..0.3, more in 0.0f64..0.3) {
        let timings = table.timings();
        let (budget, wider) = (timings.base_us() * (1.0 + low), timings.base_us() * (1.0 + low + more));
        let found = timings.search(budget);
        let at_least = |a: &Choice, b: &Choice| a.k_chunks().iter().zip(b.k_chunks()).all(|(a, b)| *a >= b);
        prop_assert!(found.fine.us() <= budget, "above the target");
        prop_assert!(found.fine.sum_k() >= found.global.sum_k(), "worse than the global phase");
        prop_assert!(found.uneven || at_least(&found.fine, &found.global), "lower than the global phase");
        let exhaustive = timings.exhaustive(budget);
        prop_assert!(exhaustive.us() <= budget);
        let (sum, us) = brute_force(&timings, budget);
        prop_assert_eq!(exhaustive.sum_k(), sum);
        prop_assert!((exhaustive.us() - us).abs() < 1e-9);
        prop_assert!(found.fine.sum_k() <= sum);
        // Nothing single fits any more, but where a smaller budget gave more.
        for (i, module) in timings.modules.iter().enumerate() {
            let now = found.fine.modules[i];
            let curve = module.curves.range(..=found.fine.n_tb).next_back();
            let next = curve.and_then(|(_, curve)| curve.iter().find(|p| p.0 > now.k_chunk));
            prop_assert!(found.uneven || next.is_none_or(|&(_, us)| found.fine.us() - now.us + us > budget - 1e-9));
        }
        let then = timings.search(wider);
        prop_assert!(then.fine.sum_k() >= found.fine.sum_k(), "a wider target gave {:?} after {:?}", then, found);
        prop_assert!(then.excluded.len() <= found.excluded.len());
        prop_assert!(timings.exhaustive(wider).sum_k() >= exhaustive.sum_k());
    }
}
