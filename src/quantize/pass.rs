//! One layer, projection after projection: what enters each has been through the quantized ones before it.
//!
//! Errors of what came before are then part of what a projection is fitted to, as in GPTQ (Frantar et al. 2022).

use anyhow::Result;
use rayon::prelude::*;

use super::calibrate::{self, Activations};
use super::forward::{Affine, KvCache, Layer, Rope, add_parallel, attend, norm, swiglu};
use super::gram::{Hessian, Taken};
use super::job::Job;
use super::refine::Effort;
use super::{Norms, Refine, ensure_running, finish_weighted, sqllm};
use crate::config::{ModelConfig, Projection};
use crate::format::Residual;
use crate::weights::Linear;

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
    let sequential = knob("SEQ", 1.0) != 0.0;
    let stage = |projection: Projection, x: &[f32]| -> Result<(Linear<'static>, Stored<'static>)> {
        ensure_running(job.stop)?;
        let linear = layer.linear(projection);
        let quantized = quantize(job, bits, linear, projection, x)?;
        let stored = if sequential {
            let k = if job.options.refine == Refine::Compensated { job.options.for_k_chunks[projection.index()] } else { 0 };
            Stored { matrix: Affine::new(&quantized), residual: quantized.residual.clone().filter(|_| k > 0), k_chunk: k }
        } else {
            Stored { matrix: linear.clone(), residual: None, k_chunk: 0 }
        };
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

fn quantize(job: &Job<'_>, bits: u32, linear: &Affine, projection: Projection, x: &[f32]) -> Result<Linear<'static>> {
    let n = linear.in_features;
    let mut hessian = Hessian::plain(x, n);
    let k_chunk = job.options.for_k_chunks[projection.index()];
    let taken = Taken::select(x, n, k_chunk)?;
    let full: Vec<f32> = hessian.diagonal().collect();
    if job.options.refine == Refine::Compensated {
        let a = knob("AMP", 0.3);
        hessian.soften(x, &taken, a, knob("SQUARE", a * a));
    }
    hessian.damp();
    let effort = Effort { rounds: knob("ROUNDS", 3.0) as usize, steps: knob("STEPS", 3.0) as usize };
    let weight = sqllm::refined(linear, bits as usize, &hessian, effort)?;
    let share = knob("RESFULL", 1.0);
    let importance: Vec<f32> = if share >= 1.0 {
        vec![1.0; n]
    } else {
        let mean = full.iter().sum::<f32>() / n as f32;
        taken.energy(x, n).iter().zip(&full).map(|(e, f)| e + share * f + 1e-3 * mean).collect()
    };
    finish_weighted(linear, x, weight, &importance)
}

/// A projection as it is run: what is stored, compensated.
struct Stored<'a> {
    matrix: Affine,
    residual: Option<Residual<'a>>,
    k_chunk: usize,
}

impl Stored<'_> {
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
