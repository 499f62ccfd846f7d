//! One layer, projection after projection: what enters each has been through the quantized ones before it.
//!
//! Errors of what came before are then part of what a projection is fitted to, as in GPTQ (Frantar et al. 2022).

use std::borrow::Cow;

use anyhow::Result;
use indicatif::ProgressBar;
use rayon::prelude::*;

use super::calibrate::{self, Activations};
use super::forward::{Affine, KvCache, Layer, Rope, add_parallel, attend, norm, swiglu};
use super::gram::{Hessian, Taken};
use super::job::Job;
use super::refine::Effort;
use super::{Norms, awq, ensure_running, finish_weighted, sqllm};
use crate::config::Projection;
use crate::format::Residual;
use crate::weights::{Linear, Weight};

/// Amplitudes that are tried.
const AMPLITUDES: [f32; 4] = [0.15, 0.3, 0.45, 0.6];
/// Where there is too little text to hold any back.
const DEFAULT_AMPLITUDE: f32 = 0.3;
/// Rows on which they are tried.
const AMPLITUDE_ROWS: usize = 64;
/// One window of so many is held back.
const HELD_BACK: usize = 6;
/// How much the energy of channels that are not taken counts for the residual's scales.
const OTHERS: f32 = 0.1;

fn knob(name: &str, default: f32) -> f32 {
    std::env::var(name).map_or(default, |v| v.parse().expect("number"))
}

/// Quantizes a layer and takes `stream` through what came of it.
pub(super) fn quantize_layer(
    job: &Job<'_>,
    bits: u32,
    layer: &Layer,
    rope: &Rope,
    stream: &mut Activations,
) -> Result<(Norms, [Linear<'static>; 4])> {
    let config = job.source.config();
    let (eps, heads) = (config.rms_norm_eps, config.num_heads * config.head_dim);
    let layer = scaled(job, bits, layer, rope, stream)?;
    let stage = |projection: Projection, x: &[f32]| -> Result<(Linear<'static>, Stored<'static>)> {
        ensure_running(job.stop)?;
        let k_chunk = job.options.k_chunk(projection);
        let linear = layer.linear(projection);
        let quantized = quantize(job, bits, linear, k_chunk, x, stream.tokens)?;
        if knob("SEQ", 1.0) == 0.0 {
            return Ok((quantized, Stored { matrix: linear.clone(), residual: None, k_chunk: 0 }));
        }
        let stored = Stored::new(&quantized, k_chunk);
        Ok((quantized, stored))
    };
    let x = norm(&stream.h, &layer.input_norm, eps);
    let (qkv, stored) = stage(Projection::Qkv, &x)?;
    let x = stream.batches(&x, (config.hidden_size, heads), |x, texts| {
        let mut qkv = stored.apply(x)?;
        let mut cache = KvCache::new(config, texts, stream.tokens);
        Ok(attend(config, rope, &mut cache, texts, &mut qkv))
    })?;
    let (o, stored) = stage(Projection::O, &x)?;
    let y = stream.batches(&x, (heads, config.hidden_size), |x, _| stored.apply(x))?;
    add_parallel(&mut stream.h, &y);
    let x = norm(&stream.h, &layer.post_norm, eps);
    let (gate_up, stored) = stage(Projection::GateUp, &x)?;
    let x = stream.batches(&x, (config.hidden_size, config.intermediate_size), |x, _| {
        Ok(swiglu(&stored.apply(x)?, config.intermediate_size))
    })?;
    let (down, stored) = stage(Projection::Down, &x)?;
    let y = stream.batches(&x, (config.intermediate_size, config.hidden_size), |x, _| stored.apply(x))?;
    add_parallel(&mut stream.h, &y);
    Ok(((layer.input_norm.clone(), layer.post_norm.clone()), [qkv, o, gate_up, down]))
}

/// The layer with AWQ's scales folded in, where they are asked for.
fn scaled<'a>(
    job: &Job<'_>,
    bits: u32,
    layer: &'a Layer,
    rope: &Rope,
    stream: &Activations,
) -> Result<Cow<'a, Layer>> {
    let (Some(group_size), true) = (job.manifest.group_size, job.options.awq) else { return Ok(Cow::Borrowed(layer)) };
    let config = job.source.config();
    let quiet = ProgressBar::hidden();
    let mut inputs = stream.clone().advance(config, layer, rope, true, job.stop, &quiet)?;
    let mut layer = layer.clone();
    awq::scale(config, &mut layer, &mut inputs, bits as usize, group_size);
    Ok(Cow::Owned(layer))
}

/// How hard codes are fitted.
fn effort() -> Effort {
    Effort { rounds: knob("ROUNDS", 3.0) as usize, steps: knob("STEPS", 3.0) as usize }
}

/// Quantizes one projection; `x` is windows of `tokens` tokens.
fn quantize(job: &Job<'_>, bits: u32, linear: &Affine, k_chunk: usize, x: &[f32], tokens: usize) -> Result<Linear<'static>> {
    let n = linear.in_features;
    let taken = Taken::select(x, n, k_chunk)?;
    let windows = x.len() / n / tokens;
    let (seen, held) = x.split_at((windows - windows / HELD_BACK) * tokens * n);
    let mut hessian = Hessian::plain(seen, n);
    let mut amplitude = knob("AMP", 0.0);
    if taken.any() && amplitude == 0.0 {
        amplitude = DEFAULT_AMPLITUDE;
        if !held.is_empty() {
            amplitude = choose_amplitude(job, bits, linear, k_chunk, &hessian, (seen, held))?;
        }
    }
    hessian.add(held);
    if taken.any() {
        hessian.soften(x, &taken, amplitude);
    }
    hessian.damp();
    let weight = fit(job, bits, linear, x, &hessian)?;
    finish_weighted(linear, x, weight, &importance(x, n, &taken))
}

/// What an error in a channel of the residual costs: its energy where it is taken, and some of it elsewhere, for
/// those who compensate more than was planned.
fn importance(x: &[f32], channels: usize, taken: &Taken) -> Vec<f32> {
    let share = knob("RESFULL", OTHERS);
    let all = calibrate::energy(x, channels);
    let mean = all.iter().sum::<f32>() / channels as f32;
    taken.energy(x, channels).iter().zip(&all).map(|(taken, all)| taken + share * (all + 0.01 * mean)).collect()
}

/// Codes and what they stand for, against `hessian`.
fn fit(job: &Job<'_>, bits: u32, linear: &Affine, x: &[f32], hessian: &Hessian) -> Result<Weight<'static>> {
    match job.manifest.group_size {
        None => sqllm::refined(linear, bits as usize, hessian, effort()),
        Some(group) => {
            awq::refined(linear, bits as usize, group, job.options.awq.then_some(x), hessian, effort())
        }
    }
}

/// The amplitude with which taken channels should enter: the one that leaves least on windows that were held back,
/// tried on a few rows.
///
/// An eighth of the error without compensation counts too: what is quantized for compensation should still be of use
/// where less of it comes.
fn choose_amplitude(
    job: &Job<'_>,
    bits: u32,
    linear: &Affine,
    k_chunk: usize,
    plain: &Hessian,
    (seen, held): (&[f32], &[f32]),
) -> Result<f32> {
    let n = linear.in_features;
    let rows = sample(linear, AMPLITUDE_ROWS);
    let taken = Taken::select(seen, n, k_chunk)?;
    let wanted = rows.apply(held);
    let error = |got: &[f32]| -> f64 { got.iter().zip(&wanted).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
    let mut best = (f64::INFINITY, DEFAULT_AMPLITUDE);
    for amplitude in AMPLITUDES {
        ensure_running(job.stop)?;
        let mut hessian = plain.clone();
        hessian.soften(seen, &taken, amplitude);
        hessian.damp();
        let weight = fit(job, bits, &rows, seen, &hessian)?;
        let quantized = finish_weighted(&rows, seen, weight, &importance(seen, n, &taken))?;
        let mut stored = Stored::new(&quantized, k_chunk);
        let compensated = error(&stored.apply(held)?);
        stored.residual = None;
        let alone = error(&stored.apply(held)?);
        tracing::debug!("amplitude {amplitude}: {compensated:.5} compensated, {alone:.5} alone");
        let left = compensated + alone / 8.0;
        if left < best.0 {
            best = (left, amplitude);
        }
    }
    Ok(best.1)
}

/// Every so manieth row, `count` of them or all.
fn sample(linear: &Affine, count: usize) -> Affine {
    let rows = count.min(linear.out_features);
    let weight = (0..rows).flat_map(|i| linear.row(i * linear.out_features / rows)).copied().collect();
    Affine { in_features: linear.in_features, out_features: rows, weight, bias: None }
}

/// A projection as it is run: what is stored, compensated.
struct Stored<'a> {
    matrix: Affine,
    residual: Option<Residual<'a>>,
    k_chunk: usize,
}

impl<'a> Stored<'a> {
    fn new(quantized: &Linear<'a>, k_chunk: usize) -> Self {
        let residual = quantized.residual.clone().filter(|_| k_chunk > 0);
        Self { matrix: Affine::new(quantized), residual, k_chunk }
    }

    /// `[tokens, out_features]` from `x` `[tokens, in_features]`.
    fn apply(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut y = self.matrix.apply(x);
        let Some(residual) = &self.residual else { return Ok(y) };
        let (inputs, outputs) = (self.matrix.in_features, self.matrix.out_features);
        let taken = Taken::select(x, inputs, self.k_chunk)?;
        let scales: Vec<f32> = (0..outputs).map(|row| residual.scales().get(row)).collect();
        y.par_chunks_exact_mut(outputs).zip(x.par_chunks_exact(inputs)).enumerate().for_each_init(
            || vec![0.0; outputs],
            |sums, (t, (y, x))| {
                sums.fill(0.0);
                for &k in taken.of(t) {
                    let (k, x) = (k as usize, x[k as usize]);
                    let line = &residual.words()[k * (outputs / 8)..][..outputs / 8];
                    for (sums, &word) in sums.chunks_exact_mut(8).zip(line) {
                        for (i, sum) in sums.iter_mut().enumerate() {
                            *sum += x * ((word >> (4 * i) & 15) as i32 - 8) as f32;
                        }
                    }
                }
                for ((y, sum), scale) in y.iter_mut().zip(&*sums).zip(&scales) {
                    *y += sum * scale;
                }
            },
        );
        Ok(y)
    }
}
