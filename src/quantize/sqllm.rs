//! AnyPrec codes: one codebook per row, found by weighted k-means (SqueezeLLM, Kim et al. 2023, §4.1, with the
//! energy of a channel over calibration in place of the Fisher information).
//!
//! In one dimension clusters are intervals of the sorted weights, so the best clustering can be found exactly, by
//! dynamic programming over where the last interval begins (Wang and Song, Ckmeans.1d.dp, 2011; the beginnings never
//! move backwards, which allows divide and conquer). Lloyd's rounds from quantiles, the usual way, stop at 1.1 to
//! 4 times the error on the layers of SmolLM2.

use std::time::Instant;

use anyhow::Result;
use half::f16;
use rayon::prelude::*;

use super::compute::Curvature;
use super::forward::Affine;
use super::refine::{AnyGrid, Codebook, Effort};
use crate::format::{AnyPrec, bytes};
use crate::weights::Weight;

/// Clusters that are found exactly; more are found by dividing each of these, and Lloyd's rounds over all.
const EXACT: usize = 16;
/// Where codes are refined afterwards, clusters begin at one of so many places in a row for each of them.
const PLACES: usize = 16;
/// Rounds of Lloyd's method after dividing; few rows still move after that.
const ROUNDS: usize = 25;

/// Quantizes every row of `linear` to `bits`; an error in channel `k` counts `importance[k]` times its square.
pub(crate) fn quantize(linear: &Affine, bits: usize, importance: &[f32]) -> Result<Weight<'static>> {
    let (inputs, outputs) = (linear.in_features, linear.out_features);
    let mut codes = vec![0; inputs * outputs];
    let mut lut = vec![0.0; outputs << bits];
    let rows = codes.par_chunks_exact_mut(inputs).zip(lut.par_chunks_exact_mut(1 << bits)).enumerate();
    rows.for_each(|(row, (codes, lut))| {
        cluster(linear.row(row), importance, usize::MAX, lut);
        bytes::round(lut);
        nearest(linear.row(row), lut, codes);
    });
    pack(linear, bits, &codes, &lut)
}

/// The same against a whole Hessian: codes and codebooks nearly those of [`quantize`] are where [`super::refine`] begins.
pub(crate) fn refined(
    linear: &Affine,
    bits: usize,
    hessian: &dyn Curvature,
    effort: Effort,
) -> Result<Weight<'static>> {
    let (inputs, outputs) = (linear.in_features, linear.out_features);
    let start = Instant::now();
    let importance = hessian.diagonal()?;
    let mut codes = vec![0; inputs * outputs];
    let mut lut = vec![0.0; outputs << bits];
    let rows = codes.par_chunks_exact_mut(inputs).zip(lut.par_chunks_exact_mut(1 << bits)).enumerate();
    rows.for_each(|(row, (codes, lut))| {
        cluster(linear.row(row), &importance, PLACES << bits, lut);
        nearest(linear.row(row), lut, codes);
    });
    let begun = start.elapsed();
    hessian.refine(AnyGrid::Codebook(Codebook { bits }), &linear.weight, &mut codes, &mut lut, effort)?;
    tracing::debug!("{outputs} rows of {inputs}: clusters {begun:.1?}, refined {:.1?}", start.elapsed());
    pack(linear, bits, &codes, &lut)
}

/// `codes` `[out_features, in_features]` and codebooks `[out_features, 2^bits]`, which are in half precision already.
fn pack(linear: &Affine, bits: usize, codes: &[u8], lut: &[f32]) -> Result<Weight<'static>> {
    let lut: Vec<f16> = lut.iter().map(|&c| f16::from_f32(c)).collect();
    Ok(Weight::AnyPrec(AnyPrec::pack(linear.in_features, linear.out_features, bits, codes, lut.into())?))
}

/// Overwrites `lut` (`2^bits`, ascending) with the clusters' centroids of one row, in half precision; clusters begin at
/// one of `places`.
fn cluster(row: &[f32], importance: &[f32], places: usize, lut: &mut [f32]) {
    let centroids = Sorted::new(row, importance).thinned(places).centroids(lut.len());
    lut.iter_mut().zip(centroids).for_each(|(c, centroid)| *c = f16::from_f64(centroid).to_f32());
}

/// Overwrites `codes` with the nearest of `lut` for each weight.
fn nearest(row: &[f32], lut: &[f32], codes: &mut [u8]) {
    let boundaries: Vec<f32> = lut.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    for (code, w) in codes.iter_mut().zip(row) {
        *code = boundaries.iter().filter(|&&b| *w > b).count() as u8;
    }
}

/// The weights of a row in ascending order, with sums over all before: `[n + 1]` each, importance `h`, weight `w`.
struct Sorted {
    values: Vec<f32>, // [n]
    mass: Vec<f64>,   // Σ h
    moment: Vec<f64>, // Σ h·w
    square: Vec<f64>, // Σ h·w²
}

impl Sorted {
    fn new(row: &[f32], importance: &[f32]) -> Self {
        let mut pairs: Vec<(f32, f32)> = row.iter().copied().zip(importance.iter().copied()).collect();
        pairs.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let sums = |of: fn(f64, f64) -> f64| {
            let mut sum = 0.0;
            let running = pairs.iter().map(|&(w, h)| {
                sum += of(f64::from(w), f64::from(h));
                sum
            });
            std::iter::once(0.0).chain(running).collect()
        };
        let (mass, moment, square) = (sums(|_, h| h), sums(|w, h| h * w), sums(|w, h| h * w * w));
        Self { values: pairs.iter().map(|p| p.0).collect(), mass, moment, square }
    }

    /// Neighbours together, `places` of them at most: dynamic programming takes that much less time.
    fn thinned(self, places: usize) -> Self {
        let step = self.values.len().div_ceil(places);
        if step == 1 {
            return self;
        }
        let ends = |sums: &[f64]| {
            let last = sums.last().filter(|_| !(sums.len() - 1).is_multiple_of(step));
            sums.iter().step_by(step).chain(last).copied().collect()
        };
        Self {
            values: self.values.iter().step_by(step).copied().collect(),
            mass: ends(&self.mass),
            moment: ends(&self.moment),
            square: ends(&self.square),
        }
    }

    /// `k` centroids, ascending.
    fn centroids(&self, k: usize) -> Vec<f64> {
        let n = self.values.len();
        if k <= EXACT {
            return self.means(&self.divide(0, n, k));
        }
        let coarse = self.divide(0, n, EXACT);
        let mut starts = Vec::with_capacity(k);
        for (i, &start) in coarse.iter().enumerate() {
            let end = coarse.get(i + 1).copied().unwrap_or(n);
            starts.extend(self.divide(start, end, k / EXACT));
        }
        let mut centroids = self.means(&starts);
        for _ in 0..ROUNDS {
            if !self.lloyd(&mut centroids) {
                break;
            }
        }
        centroids
    }

    /// The mean of every interval, or where one is empty the value at its place.
    fn means(&self, starts: &[usize]) -> Vec<f64> {
        let n = self.values.len();
        let mean = |(i, &start): (usize, &usize)| {
            let end = starts.get(i + 1).copied().unwrap_or(n);
            let mass = self.mass[end] - self.mass[start];
            if mass > 0.0 {
                (self.moment[end] - self.moment[start]) / mass
            } else {
                f64::from(self.values[start.min(n - 1)])
            }
        };
        starts.iter().enumerate().map(mean).collect()
    }

    /// Where `k` intervals of the weights `first..end` begin that have the least error together; the last ones are
    /// empty where there are fewer weights.
    fn divide(&self, first: usize, end: usize, k: usize) -> Vec<usize> {
        let n = end - first;
        if n <= k {
            return (0..k).map(|i| (first + i).min(end)).collect();
        }
        // Least error of the weights before `j` (counted from `first`) in one interval, two, ...
        let mut errors: Vec<f64> = (0..=n).map(|j| if j == 0 { 0.0 } else { self.error(first, first + j) }).collect();
        let mut begins = vec![vec![0u32; n + 1]; k];
        for (count, begins) in begins.iter_mut().enumerate().skip(1) {
            let mut stage = Stage { sorted: self, first, before: errors, errors: vec![f64::INFINITY; n + 1], begins };
            // The errors before, less their squares: what remains of the sum does not depend on `i`.
            (0..=n).for_each(|i| stage.before[i] -= self.square[first + i]);
            stage.solve(count + 1, n, count, n - 1);
            errors = stage.errors;
        }
        let mut starts = vec![first; k];
        let mut last = n;
        for (start, begins) in starts.iter_mut().zip(&begins).skip(1).rev() {
            last = begins[last] as usize;
            *start = first + last;
        }
        starts
    }

    /// The error of the weights `i..j` in one interval.
    fn error(&self, i: usize, j: usize) -> f64 {
        let moment = self.moment[j] - self.moment[i];
        self.square[j] - self.square[i] - moment * moment / (self.mass[j] - self.mass[i])
    }

    /// One round: every weight to its nearest centroid, every centroid to the mean of its weights. False if nothing
    /// moved.
    fn lloyd(&self, centroids: &mut [f64]) -> bool {
        let mut starts = vec![0];
        for pair in centroids.windows(2) {
            let boundary = (pair[0] + pair[1]) / 2.0;
            let start = starts[starts.len() - 1];
            starts.push(start + self.values[start..].partition_point(|&w| f64::from(w) <= boundary));
        }
        let means = self.means(&starts);
        let moved = means != centroids;
        centroids.copy_from_slice(&means);
        moved
    }
}

/// One more interval.
struct Stage<'a> {
    sorted: &'a Sorted,
    first: usize,
    before: Vec<f64>,      // [n + 1]: least error with one interval fewer, less Σ h·w²
    errors: Vec<f64>,      // [n + 1]: least error with this one, filled in
    begins: &'a mut [u32], // [n + 1]: where it begins, filled in
}

impl Stage<'_> {
    /// Fills in the entries `low..=high`, whose last interval begins within `from..=to`.
    fn solve(&mut self, low: usize, high: usize, from: usize, to: usize) {
        if low > high {
            return;
        }
        let middle = (low + high) / 2;
        let range = from..to.min(middle - 1) + 1;
        let sums = self.first + range.start..self.first + range.end;
        let (mass, moment) = (self.sorted.mass[self.first + middle], self.sorted.moment[self.first + middle]);
        let rest = self.sorted.mass[sums.clone()].iter().zip(&self.sorted.moment[sums]);
        let mut best = (f64::INFINITY, from);
        for (i, (before, (mass_i, moment_i))) in range.clone().zip(self.before[range].iter().zip(rest)) {
            let moment = moment - moment_i;
            let error = before - moment * moment / (mass - mass_i);
            if error < best.0 {
                best = (error, i);
            }
        }
        self.errors[middle] = best.0 + self.sorted.square[self.first + middle];
        self.begins[middle] = best.1 as u32;
        self.solve(low, middle - 1, from, best.1);
        self.solve(middle + 1, high, best.1, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling;

    fn error(row: &[f32], importance: &[f32], centroids: &[f64]) -> f64 {
        let nearest = |w: f32| centroids.iter().map(|c| (c - f64::from(w)).powi(2)).fold(f64::INFINITY, f64::min);
        row.iter().zip(importance).map(|(&w, &h)| f64::from(h) * nearest(w)).sum()
    }

    fn row(seed: u64, len: usize) -> (Vec<f32>, Vec<f32>) {
        let importance = sampling::draws(seed + 1, len).iter().map(|x| 1.0 / (0.01 + x)).collect();
        (sampling::draws(seed, len).iter().map(|x| (x - 0.5).powi(3)).collect(), importance)
    }

    /// Every way to cut `n` weights into `k` intervals.
    fn exhaustive(sorted: &Sorted, k: usize) -> f64 {
        fn least(sorted: &Sorted, first: usize, k: usize) -> f64 {
            let n = sorted.values.len();
            if k == 1 {
                return sorted.error(first, n);
            }
            (first + 1..n).map(|i| sorted.error(first, i) + least(sorted, i, k - 1)).fold(f64::INFINITY, f64::min)
        }
        least(sorted, 0, k)
    }

    #[test]
    fn no_clustering_is_better() {
        for seed in 0..20 {
            let (row, importance) = row(seed, 14);
            let sorted = Sorted::new(&row, &importance);
            for k in [2, 4] {
                let found = error(&row, &importance, &sorted.centroids(k));
                let want = exhaustive(&sorted, k);
                assert!((found - want).abs() <= 1e-12 + 1e-9 * want, "{k} clusters: {found}, {want}");
            }
            assert!(error(&row, &importance, &sorted.centroids(8)) < exhaustive(&sorted, 4), "the comparison can fail");
        }
    }

    #[test]
    fn fewer_places_lose_little() {
        for len in [576, 1000, 1536] {
            let (row, importance) = row(9, len);
            for k in [4, 8, 16, 64] {
                let exact = error(&row, &importance, &Sorted::new(&row, &importance).centroids(k));
                let thinned = Sorted::new(&row, &importance).thinned(PLACES * k);
                assert!(thinned.values.len() <= PLACES * k && thinned.mass.len() == thinned.values.len() + 1);
                let found = error(&row, &importance, &thinned.centroids(k));
                assert!(found < 1.05 * exact, "{k} clusters of {len}: {found}, exactly {exact}");
            }
        }
    }

    #[test]
    fn more_clusters_lose_less() {
        let (row, importance) = row(3, 1024);
        let sorted = Sorted::new(&row, &importance);
        let mut before = f64::INFINITY;
        for bits in 2..=8 {
            let centroids = sorted.centroids(1 << bits);
            assert!(centroids.is_sorted());
            let now = error(&row, &importance, &centroids);
            assert!(now < before / 2.5, "{bits} bits: {now} after {before}");
            before = now;
        }
    }

    /// Those that are on a grid, where codebooks are bytes.
    #[test]
    fn few_distinct_weights_are_kept_as_they_are() {
        let quantized = |bits: usize, row: &[f32]| dequantized(&quantize(&rows(row), bits, &[1.0; 64]).unwrap());
        let row = |values: [f32; 3]| -> Vec<f32> { (0..64).map(|i| values[i % 3]).collect() };
        let halved = |x: f32| f16::from_f32(x).to_f32();
        let (bytes, others) = (row([-64.0, 3.0, 61.0].map(|n| n / 256.0)), row([-0.25, 0.1, 2.0].map(halved)));
        for bits in [3, 4, 6] {
            assert_eq!(quantized(bits, &bytes), bytes, "{bits} bits");
        }
        assert_eq!(quantized(6, &others), others);
        let near = quantized(3, &others);
        // 254 steps of five units in the last place of 2 are the first that are 2.25.
        let step = 5.0 / 512.0;
        assert!(near != others && near.iter().zip(&others).all(|(a, b)| (a - b).abs() <= 0.5 * step));
    }

    /// Eight rows of these weights.
    fn rows(row: &[f32]) -> Affine {
        Affine { in_features: row.len(), out_features: 8, weight: row.repeat(8), bias: None }
    }

    /// The first of the rows, as it is stored.
    fn dequantized(weight: &Weight<'_>) -> Vec<f32> {
        let mut row = vec![0.0; weight.in_features()];
        weight.row(0, &mut row);
        row
    }

    #[test]
    fn every_weight_takes_its_nearest_stored_centroid() {
        let (row, importance) = row(5, 512);
        for bits in [3, 4, 5] {
            let weight = quantize(&rows(&row), bits, &importance).unwrap();
            let Weight::AnyPrec(stored) = &weight else { panic!("AnyPrec is made") };
            let lut = stored.lut().to_f32();
            assert_eq!(bytes::one_plane_is_exact(&lut, 1 << bits), bits < 5, "{bits} bits are bytes");
            for (w, stored) in row.iter().zip(dequantized(&weight)) {
                let distance = |c: &f32| (c - w).abs();
                let nearest = lut[..1 << bits].iter().map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(&stored) <= nearest + f32::EPSILON * w.abs());
            }
        }
    }
}
