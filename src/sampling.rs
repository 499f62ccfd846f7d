//! From logits to a token (spec §3.3): the rules, and their plain implementation for host memory.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

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

    /// The token that `draw`, uniform in `[0, 1)`, chooses.
    pub fn choose(&self, logits: &[f32], draw: f32) -> u32 {
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let descending = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, descending);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(descending);
        let top = f64::from(logits[order[0] as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - top) / f64::from(self.temperature)).exp();
        let mut weights: Vec<f64> = order.iter().map(|&id| weight(id)).collect();
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let by_p = weights.iter().position(|w| {
            sum += w;
            sum >= f64::from(self.top_p) * total
        });
        let by_min = weights.iter().position(|&w| w < f64::from(self.min_p)).unwrap_or(weights.len());
        weights.truncate(by_p.map_or(weights.len(), |i| i + 1).min(by_min).max(1));
        let mut left = f64::from(draw) * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[chosen.unwrap_or(weights.len() - 1)]
    }
}

/// The index of the largest number, the lowest among equals; NaN counts as smallest.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || logits[best].is_nan() && !logit.is_nan() {
            best = i;
        }
    }
    best as u32
}

/// `count` draws, uniform in `[0, 1)`, the same on every machine for the same seed (ChaCha8).
pub fn draws(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 24) as f32).collect()
}
