//! How far what a model says is from what full precision says: the Kullback-Leibler divergence, and its derivative.

use rayon::prelude::*;

use super::backward::norm_back;
use super::exponential::{LANES, exp, log_sum};
use super::forward::norm;
use super::product::{Strided, accumulate, product_beside};
use super::sample::HEAD_ROWS;
use crate::format::Dense;

/// Logits that are summed up in f32: what f32 resolves is enough for so many.
const PART: usize = 64 * LANES;
/// Tokens whose logits, of both models, are in memory at once.
pub(super) const HEAD_TOKENS: usize = 128;

/// What comes behind the last layer.
pub(super) struct Speaker<'a> {
    head: &'a Dense<'a>,
    final_norm: &'a [f32],
    eps: f32,
}

impl<'a> Speaker<'a> {
    pub(super) fn new(head: &'a Dense<'a>, final_norm: &'a [f32], eps: f32) -> Self {
        Self { head, final_norm, eps }
    }

    /// Mean divergence of what `h` says from what `truth` says, both `[tokens, hidden_size]` as they leave the last
    /// layer, and its derivative by `h`.
    pub(super) fn divergence(&self, truth: &[f32], h: &[f32]) -> (f64, Vec<f32>) {
        let (n, vocab) = (self.head.in_features, self.head.out_features);
        let tokens = h.len() / n;
        let mut d = vec![0.0; h.len()];
        let mut total = 0.0;
        // Not kept: most of the time layers need the room.
        let mut room = vec![0.0; 2 * HEAD_TOKENS.min(tokens) * vocab];
        let parts = h.chunks(HEAD_TOKENS * n).zip(truth.chunks(HEAD_TOKENS * n));
        for ((h, truth), d) in parts.zip(d.chunks_mut(HEAD_TOKENS * n)) {
            let mut x = norm(truth, self.final_norm, self.eps);
            x.extend(norm(h, self.final_norm, self.eps));
            let logits = &mut room[..x.len() / n * vocab];
            self.each_rows(|start, rows| product_beside(&x, rows, n, &mut logits[start..], vocab));
            let (p, q) = logits.split_at_mut(h.len() / n * vocab);
            let rows = q.par_chunks_exact_mut(vocab).zip(p.par_chunks_exact(vocab));
            total += rows.map(|(q, p)| differ(p, q, 1.0 / tokens as f32)).collect::<Vec<f64>>().iter().sum::<f64>();
            let mut d_x = vec![0.0; h.len()];
            self.each_rows(|start, rows| {
                let d = Strided { values: &q[start..], row: vocab, column: 1 };
                let (count, rows) = (rows.len() / n, Strided { values: rows, row: n, column: 1 });
                accumulate(h.len() / n, n, count, 1.0, d, rows, &mut d_x, gemm::Parallelism::Rayon(0));
            });
            norm_back(h, self.final_norm, self.eps, &d_x, d);
        }
        (total / tokens as f64, d)
    }

    /// Calls `with` for the head's rows in f32, some at a time: where they begin, and the rows.
    fn each_rows(&self, mut with: impl FnMut(usize, &[f32])) {
        let (n, vocab) = (self.head.in_features, self.head.out_features);
        let mut rows = vec![0.0; HEAD_ROWS.min(vocab) * n];
        for start in (0..vocab).step_by(HEAD_ROWS) {
            let rows = &mut rows[..HEAD_ROWS.min(vocab - start) * n];
            let each = rows.par_chunks_exact_mut(n).enumerate();
            each.for_each(|(i, out)| self.head.values.read_f32((start + i) * n, out));
            with(start, rows);
        }
    }
}

/// Mean divergence, in nats, of the logits `q` from `p`, both `[tokens, vocab_size]`.
pub(super) fn mean(p: &[f32], mut q: Vec<f32>, vocab_size: usize) -> f64 {
    let rows = q.par_chunks_exact_mut(vocab_size).zip(p.par_chunks_exact(vocab_size));
    let each: Vec<f64> = rows.map(|(q, p)| differ(p, q, 0.0)).collect();
    each.iter().sum::<f64>() / each.len() as f64
}

/// The divergence of one token's logits `q` from `p`, which become its derivative, `share` times.
fn differ(p: &[f32], q: &mut [f32], share: f32) -> f64 {
    let (sum_p, sum_q) = (log_sum(p) as f32, log_sum(q) as f32);
    let parts = q.chunks_mut(PART).zip(p.chunks(PART)).map(|(q, p)| {
        let mut sum = [0f32; LANES];
        for (q, p) in q.chunks_mut(LANES).zip(p.chunks(LANES)) {
            for ((q, p), sum) in q.iter_mut().zip(p).zip(&mut sum) {
                let (log_p, log_q) = (p - sum_p, *q - sum_q);
                let p = exp(log_p);
                *sum += p * (log_p - log_q);
                *q = (exp(log_q) - p) * share;
            }
        }
        sum.iter().map(|&x| f64::from(x)).sum::<f64>()
    });
    parts.sum()
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let speaker = Speaker::new(&head, &gamma, 1e-5);
        let (loss, d) = speaker.divergence(&truth, &h);
        assert!(loss > 0.1 && speaker.divergence(&truth, &truth).0.abs() < 1e-6);
        // Along the derivative; in its last token alone, behind the last whole block.
        for from in [0, (TOKENS - 1) * N] {
            let steepest: f64 = d[from..].iter().map(|d| f64::from(*d).powi(2)).sum();
            let step = 1e-3 / steepest.sqrt() as f32;
            let old = h.clone();
            let mut at = |step: f32| {
                h.copy_from_slice(&old);
                h[from..].iter_mut().zip(&d[from..]).for_each(|(h, d)| *h += step * d);
                speaker.divergence(&truth, &h).0
            };
            let slope = (at(step) - at(-step)) / f64::from(2.0 * step);
            h.copy_from_slice(&old);
            assert!((slope - steepest).abs() < 2e-2 * steepest, "from {from}: {slope}, {steepest} expected");
        }
    }

    #[test]
    fn divergence_is_that_of_the_distributions() {
        // p = (1/2, 1/2), q = (1/4, 3/4), up to a shift that must not matter.
        let (p, mut q) = ([0.0, 0.0], [5.0 + 0.25f32.ln(), 5.0 + 0.75f32.ln()]);
        let want = 0.5 * 2f64.ln() + 0.5 * (2f64 / 3.0).ln();
        assert!((differ(&p, &mut q, 2.0) - want).abs() < 1e-6);
        assert!((mean(&[q, q].concat(), [p, p].concat(), 2) - want).abs() > 1e-3, "the order matters");
        assert!((q[0] + 0.5).abs() < 1e-6 && (q[1] - 0.5).abs() < 1e-6, "{q:?}");
    }
}
