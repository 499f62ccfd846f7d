//! The promise: whatever tokens really take, what is kept is not above the target.

use decdec::tune::search::Choice;
use decdec::tune::{Tuning, hold};
use proptest::prelude::*;

use crate::Synthetic;

/// Tunes the manual's example at `target` per cent and holds it against tokens that `real` (from a layer's slowdown
/// to a token's, in per cent) makes slower.
fn held(target: f64, real: impl Fn(f64) -> f64) -> Tuning {
    let timings = Synthetic::manual().timings();
    let base = timings.base_us();
    let found = timings.search(base * (1.0 + target / 100.0));
    let mut tuning = Tuning { target, found, exhaustive: None, verified: None };
    let mut measure = |choice: &Choice| {
        let layer = (choice.us() / base - 1.0) * 100.0;
        Ok((2.0, 2.0 * (1.0 + real(layer) / 100.0)))
    };
    hold(&timings, &mut tuning, &mut measure).unwrap();
    tuning
}

#[test]
fn what_holds_is_kept_as_it_was_found() {
    let tuning = held(10.0, |layer| 0.7 * layer);
    assert_eq!(tuning.found.fine.k_chunks(), [4, 4, 5, 5]);
    let verified = tuning.verified.unwrap();
    assert!(verified.missed.is_empty());
    assert!(verified.slowdown > 6.0 && verified.slowdown < 7.0, "{verified:?}");
    assert_eq!(verified.base_ms, 2.0);
}

#[test]
fn what_is_too_slow_is_searched_again_with_less() {
    let tuning = held(10.0, |layer| 1.4 * layer);
    let verified = tuning.verified.unwrap();
    assert_eq!(verified.missed[0].0, [4, 4, 5, 5]);
    assert!(verified.missed[0].1 > 13.0, "{verified:?}");
    let sum = tuning.found.fine.sum_k();
    assert!((8..18).contains(&sum), "less than before, but no less than it takes: {sum}");
    assert!(verified.slowdown > 7.0 && verified.slowdown <= 10.0, "{verified:?}");
}

#[test]
fn what_never_holds_is_given_up() {
    let tuning = held(10.0, |_| 50.0);
    assert_eq!(tuning.found.fine.k_chunks(), [0; 4]);
    let verified = tuning.verified.unwrap();
    assert_eq!(verified.slowdown, 0.0, "nothing is compensated, so nothing is slower");
    assert!(!verified.missed.is_empty());
}

proptest! {
    #[test]
    fn nothing_above_the_target_is_ever_kept(target in 0.0..30.0f64, share in 0.0..4.0f64, fixed in 0.0..10.0f64) {
        let tuning = held(target, |layer| if layer > 0.0 { fixed + share * layer } else { 0.0 });
        let verified = tuning.verified.unwrap();
        prop_assert!(verified.slowdown <= target);
        prop_assert!(verified.missed.iter().all(|&(_, slowdown)| slowdown > target));
        // Every further search chose less.
        let mut sums: Vec<_> = verified.missed.iter().map(|(k_chunks, _)| k_chunks.iter().sum()).collect();
        sums.push(tuning.found.fine.sum_k());
        prop_assert!(sums.is_sorted_by(|a: &usize, b| a >= b), "{sums:?}");
    }
}
