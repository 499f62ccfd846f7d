//! What an error in a matrix costs: `d·H·dᵀ` for a row's error `d`, with `H` the sum over tokens of what enters.
//!
//! Where compensation follows, the channels that it takes give their error back (but for what 4 bits of residual
//! lose): `H = Σ x̄ x̄ᵀ`, `x̄ = x − x_taken`. Against the plain `H` small channels learn to cancel the errors of large
//! ones; compensation then removes those errors and leaves the cancellation behind. But which channels are taken
//! depends on the text, so every token counts both ways: `H = Σ (alone·x xᵀ + (1 − alone)·x̄ x̄ᵀ)`.

use anyhow::Result;
use rayon::prelude::*;

use super::product::{Strided, Threads, accumulate_beside};
use crate::dec::{DecPlan, Selection};

/// Every diagonal element grows by this share of itself. On text that the fit had not seen (SmolLM2, layers 3 and 15, 4
/// bits, botchan.txt windows 100..104) 0.5 leaves 5 to 13 % less error than 0.01 of the mean, the usual; 0.2 and 1 are
/// nearly as good, 2 is not.
const DAMPING: f32 = 0.5;
/// A mean square of what comes in below which sums of squares of it would be lost in single precision.
const TINY: f64 = 1e-12;
/// Tokens of which the outer products are summed up at once.
const GRAM_TOKENS: usize = 4096;
/// Rows of a Hessian that are summed up at once, from the diagonal to the right.
const GRAM_ROWS: usize = 192;

/// The channels that exact selection takes, token by token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    channels: Vec<u32>, // [tokens, count], ascending in each token
    count: usize,
}

impl Taken {
    /// Selects `k_chunk` channels per 1024 for every token of `x` `[tokens, in_features]`.
    ///
    /// # Errors
    /// `k_chunk` above 1024.
    pub(crate) fn select(x: &[f32], in_features: usize, k_chunk: usize) -> Result<Self> {
        let plan = DecPlan::new(in_features, 8, &vec![0.0; in_features], k_chunk, 1, Selection::Exact)?;
        let count = plan.selected();
        let mut channels = vec![0; x.len() / in_features * count];
        if count > 0 {
            let tokens = channels.par_chunks_exact_mut(count).zip(x.par_chunks_exact(in_features));
            tokens.for_each_init(Vec::new, |list, (channels, x)| {
                plan.select(x, list);
                channels.copy_from_slice(list);
            });
        }
        Ok(Self { channels, count })
    }

    /// True if any channel is taken.
    pub(crate) fn any(&self) -> bool {
        self.count > 0
    }

    /// The channels taken for token `t`.
    pub(crate) fn of(&self, t: usize) -> &[u32] {
        &self.channels[t * self.count..(t + 1) * self.count]
    }

    /// The channels of `in_features` that any token takes, ascending.
    pub(crate) fn union(&self, in_features: usize) -> Vec<u32> {
        let mut any = vec![false; in_features];
        self.channels.iter().for_each(|&k| any[k as usize] = true);
        (0..).zip(any).filter_map(|(k, any)| any.then_some(k)).collect()
    }

    /// For every channel, the tokens that took it.
    pub(crate) fn by_channel(&self, in_features: usize) -> Vec<Vec<u32>> {
        let mut tokens = vec![Vec::new(); in_features];
        for (i, &channel) in self.channels.iter().enumerate() {
            tokens[channel as usize].push((i / self.count) as u32);
        }
        tokens
    }

    /// Σx² of every channel over the tokens that took it.
    pub(crate) fn energy(&self, x: &[f32], in_features: usize) -> Vec<f32> {
        let mut sums = vec![0f64; in_features];
        for (i, &channel) in self.channels.iter().enumerate() {
            sums[channel as usize] += f64::from(x[i / self.count * in_features + channel as usize]).powi(2);
        }
        sums.iter().map(|&s| s as f32).collect()
    }
}

/// What damping does to a Hessian.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Damping {
    /// Everything is divided by it: what is best does not depend on scale, and sums of squares of tiny numbers would
    /// leave single precision.
    pub(crate) divisor: f64,
    /// Then every diagonal element grows by this share of itself,
    pub(crate) share: f32,
    /// and by this.
    pub(crate) floor: f32,
}

impl Damping {
    /// That of a Hessian with this diagonal.
    pub(crate) fn of(diagonal: &[f32]) -> Self {
        let mean = diagonal.iter().copied().map(f64::from).sum::<f64>() / diagonal.len() as f64;
        let tiny = mean > 0.0 && mean < TINY;
        let (divisor, mean) = if tiny { (mean, 1.0) } else { (1.0, mean) };
        Self { divisor, share: DAMPING, floor: (mean * 1e-6).max(1e-20) as f32 }
    }
}

/// A symmetric, positive definite matrix.
#[derive(Debug, Clone)]
pub(crate) struct Hessian {
    pub(crate) channels: usize,
    pub(crate) values: Vec<f32>, // [channels, channels]
}

impl Hessian {
    /// Σ x xᵀ over the tokens of `x` `[tokens, channels]`.
    pub(crate) fn of(x: &[f32], channels: usize) -> Self {
        let mut hessian = Self { channels, values: vec![0.0; channels * channels] };
        hessian.add(x);
        hessian
    }

    /// Adds Σ x xᵀ over the tokens of `x` `[tokens, channels]`.
    pub(crate) fn add(&mut self, x: &[f32]) {
        let (n, values) = (self.channels, &mut self.values);
        for x in x.chunks(GRAM_TOKENS * n) {
            let plain = Strided { values: x, row: n, column: 1 };
            let (tokens, all) = (x.len() / n, Threads::All);
            for first in (0..n).step_by(GRAM_ROWS) {
                let (rows, right) = (GRAM_ROWS.min(n - first), plain.right(first));
                let to = (&mut values[first * n + first..], n);
                accumulate_beside([rows, n - first, tokens], right.turned(), right, to, all);
            }
        }
        // What is left of the diagonal is what is right of it.
        for first in (0..n).step_by(GRAM_ROWS) {
            let (above, below) = values.split_at_mut((first + GRAM_ROWS).min(n) * n);
            let above = &above[first * n..];
            below.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
                let column = above.chunks_exact(n).map(|above| above[first + GRAM_ROWS + i]);
                row[first..].iter_mut().zip(column).for_each(|(to, h)| *to = h);
            });
        }
    }

    /// The same where each token counts `alone` times as it is and `1 − alone` times without the channels that it
    /// takes: what is taken off is few outer products of sparse vectors.
    pub(crate) fn discount_taken(&mut self, x: &[f32], taken: &Taken, alone: f32) {
        if !taken.any() {
            return;
        }
        let n = self.channels;
        let lists = taken.by_channel(n);
        // Row `c`: Σ over the tokens that took it of x_c·share·(x − x_taken/2); the same across makes it symmetric.
        let share = 1.0 - alone;
        let mut off = vec![0.0; n * n];
        off.par_chunks_exact_mut(n).zip(&lists).enumerate().for_each(|(c, (row, tokens))| {
            for &t in tokens {
                let x = &x[t as usize * n..][..n];
                let by = x[c] * share;
                row.iter_mut().zip(x).for_each(|(sum, x)| *sum += by * x);
                for &other in taken.of(t as usize) {
                    row[other as usize] -= by / 2.0 * x[other as usize];
                }
            }
        });
        self.values.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
            for (j, value) in row.iter_mut().enumerate() {
                *value -= off[i * n + j] + off[j * n + i];
            }
        });
    }

    /// Takes what channels have in common for less than calibration saw of it: part of that is chance.
    pub(crate) fn damp(&mut self) {
        let damping = Damping::of(&self.diagonal().collect::<Vec<_>>());
        if damping.divisor != 1.0 {
            self.values.iter_mut().for_each(|h| *h = (f64::from(*h) / damping.divisor) as f32);
        }
        let Damping { share, floor, .. } = damping;
        self.values.iter_mut().step_by(self.channels + 1).for_each(|h| *h += share * *h + floor);
    }

    /// What an error in each channel costs by itself.
    pub(crate) fn diagonal(&self) -> impl Iterator<Item = f32> + '_ {
        self.values.iter().step_by(self.channels + 1).copied()
    }

    /// Row `i`.
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.channels..][..self.channels]
    }

    pub(crate) fn strided(&self) -> Strided<'_> {
        Strided { values: &self.values, row: self.channels, column: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling;

    const N: usize = 64;

    fn inputs() -> Vec<f32> {
        let sign = |x: f32| if x < 0.5 { -1.0 } else { 1.0 };
        sampling::draws(5, 40 * N).iter().map(|&x| sign(x) / (0.05 + x)).collect()
    }

    /// The Hessian of `x` as it is.
    fn direct(x: &[f32]) -> Vec<f64> {
        let at = |i: usize| x.chunks_exact(N).map(|x| f64::from(x[i / N]) * f64::from(x[i % N])).sum();
        (0..N * N).map(at).collect()
    }

    fn largest_difference(got: &[f32], want: &[f64]) -> f64 {
        let size = want.iter().fold(0f64, |m, x| m.max(x.abs()));
        got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max) / size
    }

    #[test]
    fn taken_channels_are_the_largest() {
        let x = inputs();
        // 64 of 1024: four of 64 channels.
        let taken = Taken::select(&x, N, 64).unwrap();
        for (t, x) in x.chunks_exact(N).enumerate() {
            let mut order: Vec<u32> = (0..N as u32).collect();
            order.sort_by(|&a, &b| x[b as usize].abs().total_cmp(&x[a as usize].abs()).then(a.cmp(&b)));
            order.truncate(4);
            order.sort_unstable();
            assert_eq!(taken.of(t), order, "token {t}");
        }
        assert!(!Taken::select(&x, N, 15).unwrap().any(), "15 of 1024 is less than one of 64");
    }

    #[test]
    fn discounting_is_a_mean_of_masked_and_whole_inputs() {
        let x = inputs();
        let taken = Taken::select(&x, N, 64).unwrap();
        let mut masked = x.clone();
        for (t, x) in masked.chunks_exact_mut(N).enumerate() {
            taken.of(t).iter().for_each(|&k| x[k as usize] = 0.0);
        }
        let (whole, masked) = (direct(&x), direct(&masked));
        for alone in [0.0, 0.3, 1.0] {
            let mut hessian = Hessian::of(&x[..25 * N], N);
            hessian.add(&x[25 * N..]);
            hessian.discount_taken(&x, &taken, alone);
            let share = f64::from(alone);
            let want: Vec<f64> = whole.iter().zip(&masked).map(|(w, m)| share * w + (1.0 - share) * m).collect();
            assert!(largest_difference(&hessian.values, &want) < 1e-5, "{alone}");
            let plain = largest_difference(&hessian.values, &whole);
            assert_eq!(plain > 1e-2, alone < 1.0, "the comparison can fail: {plain}");
        }
    }

    /// A sum of 9 products, each rounded once, as is every sum.
    #[test]
    fn both_halves_are_there_over_several_blocks_of_rows() {
        let (n, tokens) = (2 * GRAM_ROWS + 5, 9);
        let x: Vec<f32> = sampling::draws(8, tokens * n).iter().map(|x| x - 0.5).collect();
        let mut hessian = Hessian::of(&x[..4 * n], n);
        hessian.add(&x[4 * n..]);
        for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let term = |x: &[f32]| f64::from(x[i]) * f64::from(x[j]);
            let want: f64 = x.chunks_exact(n).map(term).sum();
            let size: f64 = x.chunks_exact(n).map(|x| term(x).abs()).sum();
            let off = (f64::from(hessian.row(i)[j]) - want).abs();
            assert!(off <= 20.0 * 2f64.powi(-24) * size, "{i}, {j}: {off}");
            assert_eq!(hessian.row(i)[j], hessian.row(j)[i]);
        }
        assert_ne!(hessian.row(3)[n - 1], hessian.row(4)[n - 1], "rows differ");
    }

    #[test]
    fn energy_of_taken_channels_is_theirs_alone() {
        let x = [3.0, 1.0, 0.5, 0.25].repeat(8).into_iter().chain([0.0, 0.0, 2.0, 0.0].repeat(8)).collect::<Vec<f32>>();
        let taken = Taken::select(&x, 32, 32).unwrap();
        let energy = taken.energy(&x, 32);
        assert_eq!((energy[0], energy[2]), (9.0, 4.0));
        assert_eq!(energy.iter().sum::<f32>(), 13.0);
    }

    #[test]
    fn silent_channels_count_after_damping() {
        let mut hessian = Hessian::of(&[0.0, 2.0, 0.0, 2.0], 2);
        hessian.damp();
        assert!(hessian.diagonal().all(|h| h > 0.0));
    }
}
