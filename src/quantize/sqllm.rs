//! AnyPrec codes: one codebook per row, found by weighted k-means (SqueezeLLM, Kim et al. 2023, §4.1, with the
//! energy of a channel over calibration in place of the Fisher information).
//!
//! In one dimension a clustering is a list of boundaries between sorted weights, and prefix sums give the
//! error of any interval at once, so a round of Lloyd's method costs a few binary searches.

use anyhow::Result;
use half::f16;
use rayon::prelude::*;

use super::forward::Affine;
use crate::format::AnyPrec;
use crate::weights::Weight;

/// Rounds of Lloyd's method; few rows still move after that.
const ROUNDS: usize = 25;

/// Quantizes every row of `linear` to `bits`; an error in channel `k` counts `importance[k]` times its square.
pub(crate) fn quantize(linear: &Affine, bits: usize, importance: &[f32]) -> Result<Weight<'static>> {
    let (inputs, outputs) = (linear.in_features, linear.out_features);
    let mut codes = vec![0; inputs * outputs];
    let mut lut = vec![f16::ZERO; outputs << bits];
    let rows = codes.par_chunks_exact_mut(inputs).zip(lut.par_chunks_exact_mut(1 << bits)).enumerate();
    rows.for_each(|(row, (codes, lut))| quantize_row(linear.row(row), importance, codes, lut));
    Ok(Weight::AnyPrec(AnyPrec::pack(inputs, outputs, bits, &codes, lut.into())?))
}

/// Overwrites `codes` and `lut` (`2^bits`, ascending) with the clustering of one row.
fn quantize_row(row: &[f32], importance: &[f32], codes: &mut [u8], lut: &mut [f16]) {
    let sorted = Sorted::new(row, importance);
    let mut centroids = sorted.quantiles(lut.len());
    for _ in 0..ROUNDS {
        if !sorted.lloyd(&mut centroids) {
            break;
        }
    }
    for (lut, centroid) in lut.iter_mut().zip(&centroids) {
        *lut = f16::from_f64(*centroid);
    }
    // Codes belong to the codebook as it is stored.
    let boundaries: Vec<f32> = lut.windows(2).map(|pair| (pair[0].to_f32() + pair[1].to_f32()) / 2.0).collect();
    for (code, w) in codes.iter_mut().zip(row) {
        *code = boundaries.iter().filter(|&&b| *w > b).count() as u8;
    }
}

/// The weights of a row in ascending order, with running sums.
struct Sorted {
    values: Vec<f32>,
    mass: Vec<f64>,   // [n + 1]: importance of all before
    moment: Vec<f64>, // [n + 1]: importance · weight of all before
}

impl Sorted {
    fn new(row: &[f32], importance: &[f32]) -> Self {
        let mut pairs: Vec<(f32, f32)> = row.iter().copied().zip(importance.iter().copied()).collect();
        pairs.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let (mut mass, mut moment) = (vec![0.0], vec![0.0]);
        let (mut m, mut s) = (0.0, 0.0);
        for &(w, h) in &pairs {
            m += f64::from(h);
            s += f64::from(h) * f64::from(w);
            mass.push(m);
            moment.push(s);
        }
        Self { values: pairs.iter().map(|p| p.0).collect(), mass, moment }
    }

    /// `k` centroids at the middles of `k` equally filled intervals.
    fn quantiles(&self, k: usize) -> Vec<f64> {
        let last = (self.values.len() - 1) as f64;
        let at = |i: usize| {
            let position = (i as f64 + 0.5) / k as f64 * last;
            let (low, part) = (position.floor(), position.fract());
            let value = |p: f64| f64::from(self.values[p as usize]);
            value(low) + part * (value(position.ceil()) - value(low))
        };
        (0..k).map(at).collect()
    }

    /// One round: every weight to its nearest centroid, every centroid to the mean of its weights. False if nothing
    /// moved.
    fn lloyd(&self, centroids: &mut [f64]) -> bool {
        let mut moved = false;
        let mut start = 0;
        for i in 0..centroids.len() {
            let end = match centroids.get(i + 1) {
                Some(next) => {
                    let boundary = (centroids[i] + next) / 2.0;
                    start + self.values[start..].partition_point(|&w| f64::from(w) <= boundary)
                }
                None => self.values.len(),
            };
            let mass = self.mass[end] - self.mass[start];
            if mass > 0.0 {
                let mean = (self.moment[end] - self.moment[start]) / mass;
                moved |= mean != centroids[i];
                centroids[i] = mean;
            }
            start = end;
        }
        moved
    }
}
