//! How far what a model says is from what full precision says: the Kullback-Leibler divergence, and its derivative.

use rayon::prelude::*;

use super::backward::norm_back;
use super::exponential::{LANES, exp, log_sum};
use super::head::LmHead;
use super::product::{Strided, Threads, accumulate, path};
use crate::processor::on_every_path;

/// Logits that are summed up in f32: what f32 resolves is enough for so many.
const PART: usize = 64 * LANES;
/// Tokens whose logits, of both models, are in memory at once.
pub(super) const HEAD_TOKENS: usize = 128;

impl LmHead<'_> {
    /// Mean divergence of what `h` says from what `truth` says, both `[tokens, hidden_size]` as they leave the last
    /// layer, and its derivative by `h`.
    pub(super) fn divergence(&self, truth: &[f32], h: &[f32]) -> (f64, Vec<f32>) {
        let (n, vocab) = (self.weight.in_features, self.weight.out_features);
        let tokens = h.len() / n;
        let mut d = vec![0.0; h.len()];
        let mut total = 0.0;
        // Not kept: most of the time layers need the room.
        let mut room = vec![0.0; 2 * HEAD_TOKENS.min(tokens) * vocab];
        let parts = h.chunks(HEAD_TOKENS * n).zip(truth.chunks(HEAD_TOKENS * n));
        for ((h, truth), d) in parts.zip(d.chunks_mut(HEAD_TOKENS * n)) {
            let x = [self.normed(truth), self.normed(h)].concat();
            let logits = &mut room[..x.len() / n * vocab];
            self.write_logits(&x, logits);
            let (p, q) = logits.split_at_mut(h.len() / n * vocab);
            let rows = q.par_chunks_exact_mut(vocab).zip(p.par_chunks_exact(vocab));
            let share = 1.0 / tokens as f32;
            total +=
                rows.map(|(q, p)| differ(path(), p, q, share, self.softcap)).collect::<Vec<f64>>().iter().sum::<f64>();
            let mut d_x = vec![0.0; h.len()];
            self.each_rows(|start, rows| {
                let d = Strided { values: &q[start..], row: vocab, column: 1 };
                let (count, rows) = (rows.len() / n, Strided { values: rows, row: n, column: 1 });
                accumulate([h.len() / n, n, count], d, rows, &mut d_x, Threads::All);
            });
            norm_back(h, &self.final_norm, self.eps, &d_x, d);
        }
        (total / tokens as f64, d)
    }
}

/// Mean divergence, in nats, of the logits `q` from `p`, both `[tokens, vocab_size]`.
pub(super) fn mean(p: &[f32], mut q: Vec<f32>, vocab_size: usize) -> f64 {
    let rows = q.par_chunks_exact_mut(vocab_size).zip(p.par_chunks_exact(vocab_size));
    let each: Vec<f64> = rows.map(|(q, p)| differ(path(), p, q, 0.0, None)).collect();
    each.iter().sum::<f64>() / each.len() as f64
}

on_every_path! {
/// The divergence of one token's logits `q` from `p`. They become its derivative, `share` times, by what they were before
/// the cap.
fn differ(p: &[f32], q: &mut [f32], share: f32, softcap: Option<f32>) -> f64 {
    let per_cap = softcap.map_or(0.0, |cap| 1.0 / cap);
    let (sum_p, sum_q) = (log_sum(p) as f32, log_sum(q) as f32);
    let parts = q.chunks_mut(PART).zip(p.chunks(PART)).map(|(q, p)| {
        let mut sum = [0f32; LANES];
        for (q, p) in q.chunks_mut(LANES).zip(p.chunks(LANES)) {
            for ((q, p), sum) in q.iter_mut().zip(p).zip(&mut sum) {
                let (log_p, log_q) = (p - sum_p, *q - sum_q);
                let p = exp(log_p);
                *sum += p * (log_p - log_q);
                // cap · tanh(z / cap) has the derivative 1 − tanh².
                *q = (exp(log_q) - p) * share * (1.0 - (*q * per_cap).powi(2));
            }
        }
        sum.iter().map(|&x| f64::from(x)).sum::<f64>()
    });
    parts.sum()
}
}

#[cfg(test)]
mod tests {
    use super::super::head::HEAD_ROWS;
    use super::*;
    use crate::format::Dense;
    use crate::sampling;

    const N: usize = 32;
    const VOCAB: usize = HEAD_ROWS + 5;
    const TOKENS: usize = HEAD_TOKENS + 3;

    #[test]
    fn the_derivative_of_the_divergence_is_that_of_differences() {
        let numbers = |seed, len| -> Vec<f32> { sampling::draws(seed, len).iter().map(|x| 2.0 * x - 1.0).collect() };
        let head = Dense { in_features: N, out_features: VOCAB, values: numbers(1, N * VOCAB).into() };
        let gamma: Vec<f32> = numbers(2, N).iter().map(|g| 1.0 + g / 2.0).collect();
        let (truth, mut h) = (numbers(3, TOKENS * N), numbers(4, TOKENS * N));
        let mut uncapped = Vec::new();
        for softcap in [None, Some(1.5)] {
            let lm_head = LmHead { weight: &head, final_norm: gamma.clone(), eps: 1e-5, softcap };
            let (loss, d) = lm_head.divergence(&truth, &h);
            assert!(loss > 0.1 && lm_head.divergence(&truth, &truth).0.abs() < 1e-6);
            // Along the derivative; in its last token alone, behind the last whole block.
            for from in [0, (TOKENS - 1) * N] {
                let steepest: f64 = d[from..].iter().map(|d| f64::from(*d).powi(2)).sum();
                let step = 1e-3 / steepest.sqrt() as f32;
                let old = h.clone();
                let mut slope = |d: &[f32]| {
                    let mut at = |step: f32| {
                        h.copy_from_slice(&old);
                        h[from..].iter_mut().zip(&d[from..]).for_each(|(h, d)| *h += step * d);
                        lm_head.divergence(&truth, &h).0
                    };
                    (at(step) - at(-step)) / f64::from(2.0 * step)
                };
                let own = slope(&d);
                assert!((own - steepest).abs() < 2e-2 * steepest, "from {from}: {own}, {steepest} expected");
                if softcap.is_some() {
                    let along: f64 =
                        d[from..].iter().zip(&uncapped[from..]).map(|(a, b): (&f32, &f32)| f64::from(a * b)).sum();
                    let squares: f64 = uncapped[from..].iter().map(|d: &f32| f64::from(*d).powi(2)).sum();
                    assert!((along - squares).abs() > 4e-2 * squares, "the cap would not show");
                }
                h.copy_from_slice(&old);
            }
            uncapped = d;
        }
    }

    #[test]
    fn divergence_is_that_of_the_distributions() {
        // p = (1/2, 1/2), q = (1/4, 3/4), up to a shift that must not matter.
        let (p, mut q) = ([0.0, 0.0], [5.0 + 0.25f32.ln(), 5.0 + 0.75f32.ln()]);
        let want = 0.5 * 2f64.ln() + 0.5 * (2f64 / 3.0).ln();
        assert!((differ(path(), &p, &mut q, 2.0, None) - want).abs() < 1e-6);
        assert!((mean(&[q, q].concat(), [p, p].concat(), 2) - want).abs() > 1e-3, "the order matters");
        assert!((q[0] + 0.5).abs() < 1e-6 && (q[1] - 0.5).abs() < 1e-6, "{q:?}");
    }
}
