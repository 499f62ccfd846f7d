//! The regressed residual: what the taken channels say about the others is corrected through them too.
//!
//! A token's input is `x = z + x̄`, with `z` what compensation takes of it. The residual `R = W − Ŵ` gives back `R·z` and
//! leaves `R·x̄`. Where `x̄` goes along with `z`, `D = R·(I + H_x̄z·H_zz⁻¹)` does better: of all matrices it leaves the
//! least of `Σ |R·x − D·z|²`, with `H_x̄z = Σ x̄ zᵀ` and `H_zz = Σ z zᵀ` over the calibration text. `H_zz` is damped, so that
//! channels that are seldom taken keep their own residual.

use anyhow::Result;
use rayon::prelude::*;

use super::exponential::dot;
use super::gram::Taken;
use super::product::{Strided, Threads, accumulate_beside, multiply};

/// What the diagonal of `H_zz` grows by, of its mean.
const DAMPING: f32 = 0.1;
/// Channels that the others are predicted by, at most: what they cost grows with their square.
const MOST: usize = 2048;
/// Inputs of more channels are not regressed: sums over pairs of them would fill a GPU.
pub(crate) const WIDEST: usize = 16_384;
/// Columns of a triangle that are found one by one; what they take off all others goes as a product.
const BLOCK: usize = 64;
const ALL: Threads = Threads::All;

/// What the channels that are taken have in common, summed up over tokens.
#[derive(Debug, Clone)]
pub(crate) struct Together {
    channels: Vec<u32>, // ascending: those that are regressed on
    square: Vec<f32>,   // [channels, channels]: Σ z zᵀ
    across: Vec<f32>,   // [channels, n]: Σ z x̄ᵀ
    energy: Vec<f32>,   // [n]: Σ z²
}

impl Together {
    /// Of inputs `x` `[tokens, n]` of which the channels `taken` are taken.
    pub(crate) fn of(x: &[f32], n: usize, taken: &Taken) -> Self {
        let energy = taken.energy(x, n);
        if n > WIDEST {
            return Self::none(energy);
        }
        let channels = regressed(&energy);
        let u = channels.len();
        let tokens = taken.by_channel(n);
        let mut place = vec![None; n];
        channels.iter().enumerate().for_each(|(i, &k)| place[k as usize] = Some(i));
        let (mut across, mut square) = (vec![0f32; u * n], vec![0f32; u * u]);
        let rows = across.par_chunks_exact_mut(n).zip(square.par_chunks_exact_mut(u.max(1))).zip(&channels);
        rows.for_each(|((across, square), &k)| {
            for &t in &tokens[k as usize] {
                let x = &x[t as usize * n..][..n];
                let by = x[k as usize];
                across.iter_mut().zip(x).for_each(|(sum, x)| *sum += by * x);
                for &other in taken.of(t as usize) {
                    let product = by * x[other as usize];
                    across[other as usize] -= product;
                    if let Some(i) = place[other as usize] {
                        square[i] += product;
                    }
                }
            }
        });
        Self { channels, square, across, energy }
    }

    /// Nothing but Σ z² of every channel: no residual is regressed.
    pub(crate) fn none(energy: Vec<f32>) -> Self {
        Self { channels: Vec::new(), square: Vec::new(), across: Vec::new(), energy }
    }

    /// The same from `Σ z²`, `[n]`, the channels that [`regressed`] says, and among them `Σ z zᵀ` and to all `Σ z x̄ᵀ`.
    pub(crate) fn summed(energy: Vec<f32>, channels: Vec<u32>, square: Vec<f32>, across: Vec<f32>) -> Self {
        Self { channels, square, across, energy }
    }

    /// Σx² of every channel over the tokens for which it is taken.
    pub(crate) fn energy(&self) -> &[f32] {
        &self.energy
    }

    /// Turns the residual `lost` `[rows, n]` into the one that also corrects what the taken channels predict of the
    /// others, which `predict` says: [`predicted`], or the same where a device computes. Channels that no token takes stay as
    /// they are.
    ///
    /// # Errors
    /// Those of `predict`.
    pub(crate) fn regress(
        mut self,
        predict: impl FnOnce(&[f32], &[f32], &[f32]) -> Result<Vec<f32>>,
        lost: &mut [f32],
    ) -> Result<()> {
        let (n, u) = (self.energy.len(), self.channels.len());
        let mean = self.square.iter().step_by(u + 1).sum::<f32>() / u.max(1) as f32;
        if mean <= 0.0 || !mean.is_finite() {
            return Ok(());
        }
        self.square.iter_mut().step_by(u + 1).for_each(|h| *h += DAMPING * mean);
        factor(&mut self.square, u);
        let predicted = predict(&self.across, &self.square, lost)?;
        lost.par_chunks_exact_mut(n).zip(predicted.par_chunks_exact(u)).for_each(|(lost, more)| {
            let finite = self.channels.iter().zip(more).filter(|(_, more)| more.is_finite());
            finite.for_each(|(&k, more)| lost[k as usize] += more);
        });
        Ok(())
    }
}

/// `lost·acrossᵀ·(L·Lᵀ)⁻¹`, `[rows, u]`, for `across` `[u, n]`, a triangle `L` `[u, u]`, of which the upper half is anything,
/// and `lost` `[rows, n]`: on this machine's cores.
#[allow(clippy::unnecessary_wraps, reason = "a device's may fail")]
pub(crate) fn predicted(across: &[f32], triangle: &[f32], lost: &[f32]) -> Result<Vec<f32>> {
    let u = triangle.len().isqrt();
    let n = across.len() / u;
    let m = lost.len() / n;
    let mut predicted = vec![0.0; m * u];
    let rows = Strided { values: lost, row: n, column: 1 };
    let turned = Strided { values: across, row: 1, column: n };
    multiply([m, u, n], rows, turned, &mut predicted, ALL);
    solve(triangle, u, &mut predicted);
    Ok(predicted)
}

/// The channels that are regressed on, ascending: those with some energy, [`MOST`] with the most of it.
pub(crate) fn regressed(energy: &[f32]) -> Vec<u32> {
    let mut channels: Vec<u32> = (0..energy.len() as u32).filter(|&k| energy[k as usize] > 0.0).collect();
    channels.sort_by(|&a, &b| energy[b as usize].total_cmp(&energy[a as usize]));
    channels.truncate(MOST);
    channels.sort_unstable();
    channels
}

/// Cholesky's triangle `L` of a symmetric, positive definite matrix `[n, n]`, `L·Lᵀ`, in the place of its lower half.
fn factor(a: &mut [f32], n: usize) {
    for first in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - first);
        // What the columns before take off this block's, all rows from here on.
        let left: Vec<f32> = a[first * n..].chunks_exact(n).flat_map(|row| &row[..first]).copied().collect();
        if first > 0 {
            let less: Vec<f32> = left[..width * first].iter().map(|x| -x).collect();
            let left = Strided { values: &left, row: first, column: 1 };
            let less = Strided { values: &less, row: 1, column: first };
            accumulate_beside([n - first, width, first], left, less, (&mut a[first * n + first..], n), ALL);
        }
        let (block, below) = a[first * n..].split_at_mut(width * n);
        for k in 0..width {
            let (above, rest) = block.split_at_mut((k + 1) * n);
            let row = &mut above[k * n + first..];
            // Rounding must not make it negative.
            row[k] = (row[k] - dot(&row[..k], &row[..k])).max(f32::MIN_POSITIVE).sqrt();
            rest.chunks_exact_mut(n).for_each(|other| eliminate(&mut other[first..], row, k));
        }
        below.par_chunks_exact_mut(n).for_each(|other| {
            block.chunks_exact(n).enumerate().for_each(|(k, row)| eliminate(&mut other[first..], &row[first..], k));
        });
    }
}

/// Number `k` of a triangle's row, from those before it and row `k` above.
fn eliminate(other: &mut [f32], row: &[f32], k: usize) {
    other[k] = (other[k] - dot(&other[..k], &row[..k])) / row[k];
}

/// Overwrites `rows` `[.., n]` with `rows · (L·Lᵀ)⁻¹`.
fn solve(l: &[f32], n: usize, rows: &mut [f32]) {
    let (triangle, count) = (Strided { values: l, row: n, column: 1 }, rows.len() / n);
    // What is found, with its sign changed: products are added.
    let mut found = vec![0.0; rows.len()];
    for first in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - first);
        if first > 0 {
            let (known, l) = (Strided { values: &found, row: n, column: 1 }, triangle.below(first).turned());
            accumulate_beside([count, width, first], known, l, (&mut rows[first..], n), ALL);
        }
        rows.par_chunks_exact_mut(n).zip(found.par_chunks_exact_mut(n)).for_each(|(row, found)| {
            for j in first..first + width {
                eliminate(&mut row[first..], &l[j * n + first..], j - first);
                found[j] = -row[j];
            }
        });
    }
    for first in (0..n).step_by(BLOCK).rev() {
        let end = n.min(first + BLOCK);
        if end < n {
            let known = Strided { values: &found[end..], row: n, column: 1 };
            let (l, width) = (triangle.below(end).right(first), end - first);
            accumulate_beside([count, width, n - end], known, l, (&mut rows[first..], n), ALL);
        }
        rows.par_chunks_exact_mut(n).zip(found.par_chunks_exact_mut(n)).for_each(|(row, found)| {
            for j in (first..end).rev() {
                let l = &l[j * n..];
                let by = row[j] / l[j];
                (row[j], found[j]) = (by, -by);
                row[first..j].iter_mut().zip(&l[first..j]).for_each(|(x, l)| *x -= by * l);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling;

    const N: usize = 64;
    const M: usize = 5;

    /// Inputs of which each channel goes along with its neighbours; a few are large, a few quiet.
    fn inputs(seed: u64, tokens: usize) -> Vec<f32> {
        let draws = sampling::draws(seed, tokens * (N + 4));
        let each = draws.chunks_exact(N + 4).flat_map(|draws| {
            (0..N).map(move |k| {
                let loud = [1.0, 6.0, 0.01][usize::from(k % 16 == 3) + 2 * usize::from(k % 16 == 9)];
                (draws[k..k + 4].iter().sum::<f32>() - 2.0) * loud
            })
        });
        each.collect()
    }

    fn lost() -> Vec<f32> {
        sampling::draws(7, M * N).iter().map(|x| x - 0.5).collect()
    }

    /// `Σ |R·x − D·z|²`, and its derivative by `D` without damping.
    fn left(residual: &[f32], lost: &[f32], x: &[f32], taken: &Taken) -> (f64, Vec<f64>) {
        let (mut sum, mut slope) = (0.0, vec![0.0; M * N]);
        for (t, x) in x.chunks_exact(N).enumerate() {
            for (row, (d, r)) in residual.chunks_exact(N).zip(lost.chunks_exact(N)).enumerate() {
                let all: f64 = r.iter().zip(x).map(|(r, x)| f64::from(*r) * f64::from(*x)).sum();
                let given = taken.of(t).iter().map(|&k| f64::from(d[k as usize]) * f64::from(x[k as usize]));
                let error = all - given.sum::<f64>();
                sum += error * error;
                taken.of(t).iter().for_each(|&k| slope[row * N + k as usize] -= 2.0 * error * f64::from(x[k as usize]));
            }
        }
        (sum, slope)
    }

    #[test]
    fn what_is_left_is_the_least_that_damping_allows() {
        let x = inputs(1, 900);
        let taken = Taken::select(&x, N, 96).unwrap();
        let (lost, mut residual) = (lost(), lost());
        Together::of(&x, N, &taken).regress(predicted, &mut residual).unwrap();
        // Where it is least, the slope is what damping pulls: 2·0.1·mean·(R − D).
        let energy: Vec<f32> = taken.energy(&x, N);
        let some = taken.union(N).len();
        let mean = f64::from(energy.iter().sum::<f32>()) / some as f64;
        let (own, slope) = left(&residual, &lost, &x, &taken);
        let (plain, steep) = left(&lost, &lost, &x, &taken);
        let size = steep.iter().fold(0f64, |m, s| m.max(s.abs()));
        for (i, slope) in slope.iter().enumerate() {
            let pull = 2.0 * f64::from(DAMPING) * mean * f64::from(lost[i] - residual[i]);
            assert!((slope - pull).abs() < 1e-3 * size, "{i}: {slope}, {pull} expected");
        }
        assert!(own < 0.8 * plain, "{own} is left, {plain} by the plain residual");
        assert!(size > 1.0, "the slope of the plain residual is seen");
    }

    #[test]
    fn later_text_gains_too_and_channels_that_nobody_takes_stay() {
        let (x, later) = (inputs(1, 900), inputs(2, 300));
        let taken = Taken::select(&x, N, 48).unwrap();
        let taken_later = Taken::select(&later, N, 48).unwrap();
        let (lost, mut residual) = (lost(), lost());
        Together::of(&x, N, &taken).regress(predicted, &mut residual).unwrap();
        let [own, plain] = [&residual, &lost].map(|residual| left(residual, &lost, &later, &taken_later).0);
        assert!(own < 0.9 * plain, "{own} is left, {plain} by the plain residual");
        let union = taken.union(N);
        let untouched = (0..M * N).filter(|i| !union.contains(&((i % N) as u32)));
        assert!(untouched.clone().count() > 0 && untouched.clone().all(|i| lost[i] == residual[i]));
        let none = Taken::select(&x, N, 0).unwrap();
        let mut same = lost.clone();
        Together::of(&x, N, &none).regress(predicted, &mut same).unwrap();
        assert_eq!(same, lost);
    }

    #[test]
    fn sums_over_all_channels_lead_to_the_same() {
        let x = inputs(1, 200);
        let taken = Taken::select(&x, N, 48).unwrap();
        let (mut square, mut across) = (vec![0f32; N * N], vec![0f32; N * N]);
        for (t, x) in x.chunks_exact(N).enumerate() {
            let is_taken = |k: usize| taken.of(t).contains(&(k as u32));
            for (i, j) in (0..N).filter(|&i| is_taken(i)).flat_map(|i| (0..N).map(move |j| (i, j))) {
                let to = if is_taken(j) { &mut square } else { &mut across };
                to[i * N + j] += x[i] * x[j];
            }
        }
        let (mut own, mut all) = (lost(), lost());
        let sparse = Together::of(&x, N, &taken);
        assert!(sparse.energy().iter().zip(taken.energy(&x, N)).all(|(a, b)| *a == b));
        sparse.regress(predicted, &mut own).unwrap();
        let energy = taken.energy(&x, N);
        let channels = regressed(&energy);
        let rows = channels.iter().flat_map(|&k| across[k as usize * N..][..N].to_vec()).collect();
        let among = channels.iter().flat_map(|&k| channels.iter().map(move |&j| (k, j)));
        let among = among.map(|(k, j)| square[k as usize * N + j as usize]).collect();
        Together::summed(energy, channels, among, rows).regress(predicted, &mut all).unwrap();
        let off = own.iter().zip(&all).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off < 1e-4 && own != lost(), "{off}");
    }

    #[test]
    fn a_triangle_solves_what_it_was_made_of() {
        // Within a block, and over several of which the last is not whole.
        for n in [40, 2 * BLOCK + 9] {
            let x: Vec<f32> = sampling::draws(3, n * 4 * n).iter().map(|x| x - 0.5).collect();
            let at = |i: usize, j: usize| x.chunks_exact(n).map(|x| f64::from(x[i]) * f64::from(x[j])).sum::<f64>();
            let a: Vec<f32> = (0..n * n).map(|i| at(i / n, i % n) as f32).collect();
            let want: Vec<f32> = sampling::draws(4, 3 * n);
            let mut rows: Vec<f32> = (0..3 * n)
                .map(|i| (0..n).map(|k| f64::from(want[i / n * n + k]) * at(k, i % n)).sum::<f64>() as f32)
                .collect();
            let mut l = a;
            factor(&mut l, n);
            let before = rows.clone();
            solve(&l, n, &mut rows);
            assert!(rows.iter().zip(&want).all(|(x, want)| (x - want).abs() < 1e-3), "{rows:?}");
            assert!(before.iter().zip(&want).any(|(x, want)| (x - want).abs() > 1e-2));
        }
    }
}
