//! From logits to a token (spec §3.3): the rules, and their plain implementation for host memory.
//!
//! A NaN is never chosen. Where the largest of the other logits is infinite, or there are no others, numbers have
//! overflowed or weights are damaged: then there is no token to choose, whatever the rules.

use std::cmp::Ordering;

use anyhow::{Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What devices write in place of a token where there is none to choose; no vocabulary reaches it.
pub const NO_TOKEN: u32 = u32::MAX - 1;

/// The weight of the most probable token. Weights are whole numbers: their sums do not depend on the order of adding.
const ONE: f64 = (1u64 << 44) as f64;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Only this many of the largest logits stay; 0 keeps all.
    pub top_k: usize,
    /// Of these, the fewest whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Of these, those at least this share of the most probable one; 0 keeps all.
    pub min_p: f32,
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Checks that the rules say something.
    ///
    /// # Errors
    /// A temperature that is negative or not finite, shares outside 0 to 1.
    pub fn validate(&self) -> Result<()> {
        let temperature = self.temperature;
        ensure!(
            temperature >= 0.0 && temperature.is_finite(),
            "the temperature is {temperature}, a finite number of at least 0 is allowed"
        );
        for (name, share) in [("top_p", self.top_p), ("min_p", self.min_p)] {
            ensure!((0.0..=1.0).contains(&share), "{name} is {share}, 0 to 1 are allowed");
        }
        Ok(())
    }

    /// The token that `draw`, uniform in `[0, 1)`, chooses; `None` where [`argmax`] finds none. Tokens follow each
    /// other as their logits do, largest first, equal ones by their ids.
    ///
    /// ```
    /// use decdec::sampling::Sampling;
    ///
    /// let rules = Sampling { temperature: 1.0, top_k: 2, ..Sampling::GREEDY };
    /// let logits = [0.5, 2.0, 1.9, 0.1];
    /// assert_eq!([0.0, 0.9].map(|draw| rules.choose(&logits, draw)), [Some(1), Some(2)]);
    /// assert_eq!(Sampling::GREEDY.choose(&logits, 0.9), Some(1));
    /// ```
    pub fn choose(&self, logits: &[f32], draw: f32) -> Option<u32> {
        let best = argmax(logits)?;
        if self.temperature == 0.0 {
            return Some(best);
        }
        let logit = |id: u32| logits[id as usize];
        // What is left has an order: no NaN is among it.
        let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|&id| logit(id) > f32::NEG_INFINITY).collect();
        let descending = |a: &u32, b: &u32| logit(*b).partial_cmp(&logit(*a)).unwrap_or(Ordering::Equal).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < ids.len() {
            ids.select_nth_unstable_by(self.top_k - 1, descending);
            ids.truncate(self.top_k);
        }
        ids.sort_unstable_by(descending);
        let top = f64::from(logit(best));
        let weight = |&id: &u32| ((f64::from(logit(id)) - top) / f64::from(self.temperature)).exp() * ONE + 0.5;
        // What weighs nothing is never drawn and adds to no sum.
        let mut weights: Vec<u64> = ids.iter().map(|id| weight(id) as u64).take_while(|&w| w > 0).collect();
        let share = |share: f32, weights: &[u64]| (f64::from(share) * total(weights) as f64) as u128;
        if self.top_p < 1.0 {
            weights.truncate(reaching(&weights, share(self.top_p, &weights)) + 1);
        }
        let enough = f64::from(self.min_p) * ONE;
        weights.truncate(weights.iter().take_while(|&&w| w as f64 >= enough).count().max(1));
        Some(ids[reaching(&weights, share(draw, &weights) + 1)])
    }
}

fn total(weights: &[u64]) -> u128 {
    weights.iter().map(|&w| u128::from(w)).sum()
}

/// Where the sum of `weights` reaches `target`: the last of them if it never does.
fn reaching(weights: &[u64], target: u128) -> usize {
    let mut sum = 0;
    let reaches = weights.iter().position(|&w| {
        sum += u128::from(w);
        sum >= target
    });
    reaches.unwrap_or(weights.len() - 1)
}

/// The index of the largest number, the lowest among equals; NaN is passed over. `None` if that number is infinite,
/// or if there is none.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let (mut best, mut largest) = (None, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > largest {
            (best, largest) = (Some(i as u32), logit);
        }
    }
    best.filter(|_| largest.is_finite())
}

/// The `i`-th token of a text, from what a device wrote for it.
///
/// # Errors
/// [`NO_TOKEN`].
pub(crate) fn token(i: usize, written: u32) -> Result<u32> {
    ensure!(
        written != NO_TOKEN,
        "token {i} cannot be chosen, the largest logit is not a finite number: try --dtype bfloat16 or --dtype float32, \
         and check the checkpoint with decdec eval"
    );
    Ok(written)
}

/// `count` draws, uniform in `[0, 1)`, the same on every machine for the same seed (ChaCha8).
pub fn draws(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 24) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    #[test]
    fn equal_logits_share_the_draws_evenly_and_zeros_of_both_signs_are_equal() {
        for logits in [[2.0f32; 8], [-3e38; 8], [0.0, -0.0, 0.0, -0.0, -0.0, 0.0, 0.0, -0.0]] {
            let got: Vec<_> = (0..8).map(|i| PLAIN.choose(&logits, i as f32 / 8.0).unwrap()).collect();
            assert_eq!(got, [0, 1, 2, 3, 4, 5, 6, 7], "{logits:?}");
            assert_eq!(Sampling { top_k: 3, ..PLAIN }.choose(&logits, 0.99), Some(2), "{logits:?}");
            assert_eq!(Sampling { top_p: 0.5, ..PLAIN }.choose(&logits, 0.99), Some(3), "{logits:?}");
            assert_eq!(Sampling { min_p: 1.0, ..PLAIN }.choose(&logits, 0.99), Some(7), "{logits:?}");
            assert_eq!(argmax(&logits), Some(0), "{logits:?}");
        }
    }

    #[test]
    fn rules_that_say_nothing_are_refused() {
        for (rules, message) in [
            (Sampling { temperature: f32::NAN, ..PLAIN }, "the temperature is NaN"),
            (Sampling { temperature: f32::INFINITY, ..PLAIN }, "the temperature is inf"),
            (Sampling { temperature: -1.0, ..PLAIN }, "the temperature is -1"),
            (Sampling { top_p: f32::NAN, ..PLAIN }, "top_p is NaN, 0 to 1"),
            (Sampling { min_p: 1.5, ..PLAIN }, "min_p is 1.5, 0 to 1"),
        ] {
            let error = rules.validate().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        PLAIN.validate().unwrap();
        Sampling { temperature: 0.0, top_p: 0.0, min_p: 1.0, ..PLAIN }.validate().unwrap();
    }
}
