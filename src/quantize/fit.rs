//! One projection against a Hessian: which codes, which residual.
//!
//! What enters is that of the model in full precision. Letting it come through the quantized and compensated layers
//! before, as GPTQ does, was tried and measured worse (benches/runs/2026-11-25-xeon).

use std::time::Instant;

use anyhow::Result;

use super::compute::{Curvature, Entered, Metric};
use super::forward::Affine;
use super::job::Job;
use super::refine::Effort;
use super::{Refine, awq, finish, sqllm};
use crate::config::Projection;
use crate::weights::{Linear, Weight};

/// How long codes and parameters take turns.
pub(super) const EFFORT: Effort = Effort { rounds: 5, steps: 3 };
/// How much the error without compensation counts, the one with it counting `1 − ALONE`. Chosen among 0.3, 0.6 and 1 by
/// perplexity on *Botchan* windows 24..30 and GPL-3 windows 6..10 (benches/runs/2026-11-27-xeon).
pub(super) const ALONE: f32 = 0.6;
/// How much the energy of channels that are not taken counts for the residual's scales.
const OTHERS: f32 = 0.1;

/// How one projection of one layer is quantized.
pub(super) struct Fit<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) bits: usize,
    /// Channels of 1024 that compensation will take.
    pub(super) k_chunk: usize,
}

impl<'a> Fit<'a> {
    /// The way that the job's options ask for; `None` where every weight goes by itself.
    pub(super) fn new(job: &'a Job<'a>, bits: usize, projection: Projection) -> Option<Self> {
        let refine = job.options.refine;
        let k_chunk = refine.k_chunks(bits as u32, job.manifest.bits)[projection.index()];
        (refine != Refine::None).then_some(Self { job, bits, k_chunk })
    }

    /// Quantizes `linear`, which `x` enters: what is stored and its residual.
    pub(super) fn quantize(&self, linear: &Affine, x: &dyn Entered) -> Result<Linear<'static>> {
        let n = linear.in_features;
        let Metric { hessian, taken } = x.fit(self.k_chunk)?;
        // Where nothing ever came in, nothing can be fitted to, and every weight's best code by itself is the best.
        let Some(hessian) = hessian else {
            let weight = match self.job.manifest.group_size {
                None => sqllm::quantize(linear, self.bits, &vec![1.0; n])?,
                Some(group_size) => awq::quantize(linear, self.bits, group_size, None)?,
            };
            return finish(linear, weight, x.thresholds()?, &vec![1.0; n], None);
        };
        let start = Instant::now();
        let weight = self.against(&*hessian, linear, self.job.options.awq.then(|| x.all()))?;
        drop(hessian);
        let fitted = start.elapsed();
        let together = (self.k_chunk > 0).then(|| x.together(self.k_chunk)).transpose()?;
        let summed = start.elapsed();
        let done = finish(linear, weight, x.thresholds()?, &weigh(&taken, &x.energy()?), together.map(|t| (t, x)));
        tracing::debug!("codes {fitted:.1?}, sums {summed:.1?}, residual {:.1?}", start.elapsed());
        done
    }

    /// Codes and what they stand for; with `clipping`, groups of channels begin with the ranges best for these inputs.
    fn against(&self, hessian: &dyn Curvature, linear: &Affine, clipping: Option<&[f32]>) -> Result<Weight<'static>> {
        match self.job.manifest.group_size {
            None => sqllm::refined(linear, self.bits, hessian, EFFORT),
            Some(group_size) => awq::refined(linear, self.bits, group_size, clipping, hessian, EFFORT),
        }
    }
}

/// What an error in a channel of the residual costs, from the channels' energies where they are taken and over all: the
/// former, and some of the latter for those who compensate more than was planned. All alike where nothing is planned.
pub(super) fn weigh(taken: &[f32], all: &[f32]) -> Vec<f32> {
    if taken.iter().all(|&t| t == 0.0) {
        return vec![1.0; all.len()];
    }
    let mean = all.iter().sum::<f32>() / all.len() as f32;
    taken.iter().zip(all).map(|(taken, all)| taken + OTHERS * (all + 0.01 * mean)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::gram::{Hessian, Taken};
    use super::super::{calibrate, lost};
    use super::*;
    use crate::format::Residual;
    use crate::sampling;

    const N: usize = 128;
    const TOKENS: usize = 1500;

    /// Inputs with much in common, of which a few channels are now and then large.
    fn inputs(seed: u64, tokens: usize) -> Vec<f32> {
        let draws = sampling::draws(seed, tokens * (N + 8));
        let mix = sampling::draws(99, 8 * N);
        let mut x = Vec::with_capacity(tokens * N);
        for draws in draws.chunks_exact(N + 8) {
            let (common, own) = draws.split_at(8);
            x.extend(own.iter().enumerate().map(|(k, own)| {
                let shared: f32 = (0..8).map(|j| (common[j] - 0.5) * (mix[j * N + k] - 0.5)).sum();
                let loud = if k % 16 == 3 && *own > 0.5 { 12.0 } else { 1.0 };
                (own - 0.5 + 2.0 * shared) * loud
            }));
        }
        x
    }

    /// Σ over the tokens of `x` of the squared error of what comes out: without compensation, and with that of the
    /// channels `taken`.
    fn errors(linear: &Affine, weight: &Weight<'_>, residual: &Residual<'_>, x: &[f32], taken: &Taken) -> (f64, f64) {
        let n = linear.in_features;
        let squares = |y: &[f32]| -> f64 { y.iter().map(|&y| f64::from(y).powi(2)).sum() };
        let mut y = Affine { weight: lost(linear, weight), ..linear.clone() }.apply(x);
        let alone = squares(&y);
        let scales: Vec<f32> = (0..linear.out_features).map(|row| residual.scales().get(row)).collect();
        for (t, (y, x)) in y.chunks_exact_mut(linear.out_features).zip(x.chunks_exact(n)).enumerate() {
            for &k in taken.of(t) {
                for (row, (y, scale)) in y.iter_mut().zip(&scales).enumerate() {
                    *y -= scale * residual.nibble(k as usize, row) as f32 * x[k as usize];
                }
            }
        }
        (alone, squares(&y))
    }

    #[test]
    fn codes_for_compensation_are_better_with_it_and_codes_for_none_without() {
        let weight = sampling::draws(1, 64 * N).iter().map(|x| (x - 0.5).powi(3)).collect();
        let linear = Affine { in_features: N, out_features: 64, weight, bias: None };
        let (x, later) = (inputs(2, TOKENS), inputs(3, 200));
        let (taken, taken_later) = (Taken::select(&x, N, 32).unwrap(), Taken::select(&later, N, 32).unwrap());
        let importance = weigh(&taken.energy(&x, N), &calibrate::energy(&x, N));
        let fitted = |alone| {
            let mut hessian = Hessian::of(&x, N);
            hessian.discount_taken(&x, &taken, alone);
            hessian.damp();
            let weight = sqllm::refined(&linear, 3, &hessian, EFFORT).unwrap();
            let lost = lost(&linear, &weight);
            let residual = Residual::quantize_weighted(N, 64, &lost, &importance).unwrap();
            errors(&linear, &weight, &residual, &later, &taken_later)
        };
        let (plain, soft) = (fitted(1.0), fitted(ALONE));
        assert!(soft.1 < 0.95 * plain.1, "compensated: {soft:?} for compensation, {plain:?} for none");
        assert!(plain.0 < soft.0, "alone: {soft:?} for compensation, {plain:?} for none");
        assert!(soft.1 < soft.0, "compensation helps: {soft:?}");
    }
}
