//! The closing step: codebooks of all layers together, so that the compensated model says what full precision does.
//!
//! Layer by layer, every error counts alike. What it does to the predictions does not: so, codes kept, codebooks follow
//! the gradient of the Kullback-Leibler divergence from the full-precision model's next-token distributions (as
//! EfficientQAT trains steps end to end, Chen et al. 2024, §3.3), over the calibration text, by Adam (Kingma and Ba,
//! 2015). Only codebooks move, so there is little to learn by heart.

use std::borrow::Cow;

use anyhow::{Context, Result, bail};
use half::f16;
use rayon::prelude::*;

use super::backward::{Compensated, Gradients, Trace, norm_back};
use super::calibrate::Activations;
use super::forward::{Affine, Layer, Rope, Strided, accumulate, norm, softmax};
use super::job::Job;
use super::refine::{Codebook, Grid};
use super::{Refine, sample};
use crate::config::Projection;
use crate::format::{AnyPrec, Dense, Residual};
use crate::weights::{Linear, Weight};

/// Tokens whose logits are in memory at once.
const HEAD_TOKENS: usize = 256;
/// Rows of the head that are converted to f32 at once.
const HEAD_ROWS: usize = 4096;

fn env(name: &str, default: f32) -> f32 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// What is learned of one layer.
#[derive(Debug, Clone, Default)]
struct Parameters {
    codebooks: [Vec<f32>; 4], // each [out_features, 2^bits]
    norms: [Vec<f32>; 2],     // each [hidden_size]
}

impl Parameters {
    fn lists(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.codebooks.iter_mut().chain(&mut self.norms)
    }
}

/// Learns the codebooks of all layers, of these `bits`, on `ids`, and writes the layers anew.
pub(super) fn polish(job: &Job<'_>, ids: &[u32], bits: &[u32]) -> Result<()> {
    let config = job.source.config();
    let k_chunks = match job.options.refine {
        Refine::Compensated { k_chunks } => k_chunks,
        _ => [0; 4],
    };
    let seq_len = job.options.calibration.seq_len();
    let rope = Rope::new(config, seq_len);
    let (embedding, head, final_norm) = (job.source.embedding()?, job.source.head()?, job.source.final_norm()?);
    let head = head.as_ref().unwrap_or(&embedding);
    let start = std::time::Instant::now();
    let mut teacher = Activations::embed(&embedding, ids, seq_len)?;
    for index in 0..config.num_layers {
        teacher.advance(config, &Layer::read(job.source, index)?, &rope, false, job.stop, job.progress)?;
    }
    eprintln!("teacher {:?}", start.elapsed());
    let mut parameters = (0..config.num_layers).map(|i| read(job, i, bits[i])).collect::<Result<Vec<_>>>()?;
    let mut first: Vec<Parameters> = parameters.iter().map(zeros).collect();
    let mut second = first.clone();
    let mut energies: Vec<[Vec<f32>; 4]> = vec![Default::default(); config.num_layers];
    let hidden = config.hidden_size;
    let batch = env("P_BATCH", 1.0) as usize;
    let epochs = env("P_EPOCHS", 1.0);
    let (lr, lr_norm) = (env("P_LR", 0.004), env("P_LR_NORM", 0.0));
    let texts = ids.len() / seq_len;
    let steps = (epochs * texts as f32 / batch as f32) as usize;
    for step in 0..steps {
        let from = step * batch % texts;
        let count = batch.min(texts - from);
        let window = from * seq_len..(from + count) * seq_len;
        let mut h = Activations::embed(&embedding, &ids[window.clone()], seq_len)?.h;
        let mut entered = Vec::with_capacity(config.num_layers);
        for (index, parameters) in parameters.iter().enumerate() {
            super::ensure_running(job.stop)?;
            entered.push(h.clone());
            live(job, index, bits[index], parameters, k_chunks)?.0.forward(config, &rope, count, &mut h)?;
        }
        let truth = &teacher.h[window.start * hidden..window.end * hidden];
        let (loss, mut d) = divergence(head, &final_norm, config.rms_norm_eps, truth, &h);
        let progress = step as f32 / steps as f32;
        let rate = ((step + 1) as f32 / 3.0).min(1.0) * (1.0 - progress);
        for index in (0..config.num_layers).rev() {
            let (layer, codes) = live(job, index, bits[index], &parameters[index], k_chunks)?;
            let mut h = entered.pop().context("one for each layer")?;
            let trace: Trace = layer.forward(config, &rope, count, &mut h)?;
            if step + texts / batch >= steps {
                for (i, energy) in energies[index].iter_mut().enumerate() {
                    let n = layer.layer.linears[i].in_features;
                    energy.resize(2 * n, 0.0);
                    let taken = trace.taken[i].energy(&trace.x[i], n);
                    let all = super::calibrate::energy(&trace.x[i], n);
                    energy.iter_mut().zip(taken.iter().chain(&all)).for_each(|(e, x)| *e += x);
                }
            }
            let gradients = layer.backward(config, &rope, count, trace, &mut d);
            let mut slopes = slopes(&gradients, &codes, bits[index] as usize, &layer.layer);
            let (p, m, v) = (&mut parameters[index], &mut first[index], &mut second[index]);
            for (i, ((p, m), (v, g))) in p.lists().zip(m.lists()).zip(v.lists().zip(slopes.lists())).enumerate() {
                let (width, lr) = if i < 4 { (1 << bits[index], lr) } else { (p.len(), lr_norm) };
                adam(p, m, v, g, width, lr * rate, step);
            }
        }
        eprintln!("step {step} loss {loss:.5} {:?}", start.elapsed());
    }
    for (index, parameters) in parameters.iter().enumerate() {
        write(job, index, bits[index], parameters, &energies[index])?;
    }
    Ok(())
}

fn zeros(parameters: &Parameters) -> Parameters {
    let mut zeros = parameters.clone();
    zeros.lists().for_each(|list| list.fill(0.0));
    zeros
}

fn adam(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], width: usize, lr: f32, step: usize) {
    let (b1, b2) = (env("P_B1", 0.9), env("P_B2", 0.95));
    let (c1, c2) = (1.0 - b1.powi(step as i32 + 1), 1.0 - b2.powi(step as i32 + 1));
    let rows = p.par_chunks_mut(width).zip(m.par_chunks_mut(width)).zip(v.par_chunks_mut(width)).zip(g.par_chunks(width));
    rows.for_each(|(((p, m), v), g)| {
        let rms = (p.iter().map(|p| p * p).sum::<f32>() / width as f32).sqrt();
        let mut shared = 0.0;
        for k in 0..width {
            m[k] = b1 * m[k] + (1.0 - b1) * g[k];
            v[k] = b2 * v[k] + (1.0 - b2) * g[k] * g[k];
            shared += v[k];
        }
        let shared = (shared / width as f32 / c2).sqrt() + 1e-12;
        for k in 0..width {
            p[k] -= lr * rms * m[k] / c1 / if env_shared() { shared } else { (v[k] / c2).sqrt() + 1e-12 };
        }
    });
}

fn env_shared() -> bool {
    use std::sync::OnceLock;
    static SHARED: OnceLock<bool> = OnceLock::new();
    *SHARED.get_or_init(|| env("P_SHARED", 0.0) > 0.0)
}

fn read(job: &Job<'_>, index: usize, bits: u32) -> Result<Parameters> {
    let config = job.source.config();
    let file = job.writer.layer(index, bits)?;
    let (input, post) = file.norms(config)?;
    let mut parameters = Parameters { norms: [input, post], ..Parameters::default() };
    for projection in Projection::ALL {
        let linear = file.projection(projection, config, job.manifest.group_size)?;
        let Weight::AnyPrec(weight) = &linear.weight else { bail!("only ap") };
        parameters.codebooks[projection.index()] = weight.lut().to_f32().into_owned();
    }
    Ok(parameters)
}

/// A layer with these parameters, and its codes.
fn live(
    job: &Job<'_>,
    index: usize,
    bits: u32,
    parameters: &Parameters,
    k_chunks: [usize; 4],
) -> Result<(Compensated, [Vec<u8>; 4])> {
    let config = job.source.config();
    let file = job.writer.layer(index, bits)?;
    let mut all_codes: [Vec<u8>; 4] = Default::default();
    let mut all_lost: [Vec<f32>; 4] = Default::default();
    let mut linears: Vec<Affine> = Vec::new();
    for projection in Projection::ALL {
        let i = projection.index();
        let linear = file.projection(projection, config, None)?;
        let Weight::AnyPrec(weight) = &linear.weight else { bail!("only ap") };
        let (n, m) = (weight.in_features(), weight.out_features());
        let mut codes = vec![0; n * m];
        codes.par_chunks_exact_mut(n).enumerate().for_each(|(row, codes)| weight.codes(row, codes));
        let mut affine = Affine::new(&job.source.projection(index, projection)?);
        let grid = Codebook { bits: bits as usize };
        let luts = &parameters.codebooks[i];
        let mut q = vec![0.0; n * m];
        let rows = q.par_chunks_exact_mut(n).zip(codes.par_chunks_exact(n)).zip(luts.par_chunks_exact(1 << bits));
        rows.for_each(|((q, codes), lut)| grid.weights(lut, codes, q));
        let mut lost = vec![0.0; n * m];
        const TILE: usize = 32;
        lost.par_chunks_mut(TILE * m).enumerate().for_each(|(tile, lost)| {
            for row in 0..m {
                let at = row * n + tile * TILE;
                let width = lost.len() / m;
                for k in 0..width {
                    lost[k * m + row] = affine.weight[at + k] - q[at + k];
                }
            }
        });
        affine.weight = q;
        all_codes[i] = codes;
        all_lost[i] = lost;
        linears.push(affine);
    }
    let linears: [Affine; 4] = linears.try_into().ok().context("four projections")?;
    let [input_norm, post_norm] = parameters.norms.clone();
    Ok((Compensated { layer: Layer { input_norm, post_norm, linears }, lost: all_lost, k_chunks }, all_codes))
}

fn slopes(gradients: &Gradients, codes: &[Vec<u8>; 4], bits: usize, layer: &Layer) -> Parameters {
    let grid = Codebook { bits };
    let codebooks = [0, 1, 2, 3].map(|i| {
        let n = layer.linears[i].in_features;
        let mut out = vec![0.0; layer.linears[i].out_features << bits];
        let rows = out.par_chunks_exact_mut(1 << bits).zip(codes[i].par_chunks_exact(n));
        rows.zip(gradients.weights[i].par_chunks_exact(n))
            .for_each(|((out, codes), gradient)| grid.derivatives(codes, gradient, out));
        out
    });
    Parameters { codebooks, norms: gradients.norms.clone() }
}

/// Mean divergence of what `h` says from what `truth` says, both as they leave the last layer, and its derivative.
fn divergence(head: &Dense<'_>, final_norm: &[f32], eps: f32, truth: &[f32], h: &[f32]) -> (f64, Vec<f32>) {
    let (n, vocab) = (head.in_features, head.out_features);
    let tokens = h.len() / n;
    let mut d = vec![0.0; h.len()];
    let mut total = 0.0;
    for ((h, truth), d) in h.chunks(HEAD_TOKENS * n).zip(truth.chunks(HEAD_TOKENS * n)).zip(d.chunks_mut(HEAD_TOKENS * n)) {
        let mut p = sample::logits(head, &norm(truth, final_norm, eps));
        let mut q = sample::logits(head, &norm(h, final_norm, eps));
        let each: Vec<f64> = q
            .par_chunks_exact_mut(vocab)
            .zip(p.par_chunks_exact_mut(vocab))
            .map(|(q, p)| {
                softmax(q);
                softmax(p);
                let mut sum = 0.0;
                for (q, p) in q.iter_mut().zip(p) {
                    if *p > 0.0 {
                        sum += f64::from(*p) * (f64::from(*p) / f64::from(q.max(1e-30))).ln();
                    }
                    *q = (*q - *p) / tokens as f32;
                }
                sum
            })
            .collect();
        total += each.iter().sum::<f64>();
        let mut d_x = vec![0.0; h.len()];
        let count = h.len() / n;
        for start in (0..vocab).step_by(HEAD_ROWS) {
            let rows = HEAD_ROWS.min(vocab - start);
            let mut block = vec![0.0; rows * n];
            block.par_chunks_exact_mut(n).enumerate().for_each(|(i, out)| head.values.read_f32((start + i) * n, out));
            let q = Strided { values: &q[start..], row: vocab, column: 1 };
            let block = Strided { values: &block, row: n, column: 1 };
            accumulate(count, n, rows, 1.0, q, block, &mut d_x, gemm::Parallelism::Rayon(0));
        }
        norm_back(h, final_norm, eps, &d_x, d);
    }
    (total / tokens as f64, d)
}

fn write(job: &Job<'_>, index: usize, bits: u32, parameters: &Parameters, energies: &[Vec<f32>; 4]) -> Result<()> {
    let config = job.source.config();
    let file = job.writer.layer(index, bits)?;
    let mut linears = Vec::new();
    for projection in Projection::ALL {
        let i = projection.index();
        let linear = file.projection(projection, config, None)?;
        let Weight::AnyPrec(weight) = &linear.weight else { bail!("only ap") };
        let (n, m) = (weight.in_features(), weight.out_features());
        let mut codes = vec![0; n * m];
        codes.par_chunks_exact_mut(n).enumerate().for_each(|(row, codes)| weight.codes(row, codes));
        let mut luts = parameters.codebooks[i].clone();
        let grid = Codebook { bits: bits as usize };
        luts.chunks_exact_mut(1 << bits).zip(codes.chunks_exact_mut(n)).for_each(|(l, c)| grid.tidy(l, c));
        let luts: Vec<f16> = luts.into_iter().map(f16::from_f32).collect();
        let weight = Weight::AnyPrec(AnyPrec::pack(n, m, bits as usize, &codes, luts.into())?);
        let affine = Affine::new(&job.source.projection(index, projection)?);
        let (taken, all) = energies[i].split_at(n);
        let importance = super::fit::weigh(taken, all);
        let residual: Residual<'static> = super::residual(&affine, &weight, &importance)?;
        let thresholds = linear.thresholds.as_deref().map(|t| Cow::Owned(t.to_vec()));
        let bias = affine.bias.clone().map(Cow::Owned);
        linears.push(Linear { weight, bias, residual: Some(residual), thresholds });
    }
    let linears: [Linear<'static>; 4] = linears.try_into().ok().context("four")?;
    drop(file);
    let [input, post] = parameters.norms.clone();
    job.writer.write_layer(index, bits, &(input, post), &linears)
}
