//! A compensated layer forwards and backwards: what a change of its codebooks does to what the model says.
//!
//! The layer is the quantized one with its compensation: `y = Ŵ·x + (W − Ŵ)·x_taken`. Channels that are taken come
//! out as in full precision, so no gradient reaches `Ŵ` through them. Which channels are taken counts as fixed.

use anyhow::Result;
use rayon::prelude::*;

use super::forward::{
    Affine, Inputs, KvCache, Layer, Rope, Strided, accumulate, add_parallel, attend, multiply, norm, softmax, swiglu,
};
use super::gram::Taken;
use crate::config::{ModelConfig, Projection};

/// A quantized layer and what it lost.
#[derive(Debug)]
pub(crate) struct Compensated {
    /// The layer as it is stored.
    pub(crate) layer: Layer,
    /// `W − Ŵ` of each projection, `[in_features, out_features]`: one channel's correction of all rows is one line.
    pub(crate) lost: [Vec<f32>; 4],
    /// Channels of 1024 that compensation takes.
    pub(crate) k_chunks: [usize; 4],
}

/// What a layer's backward pass needs of its forward pass.
#[derive(Debug)]
pub(crate) struct Trace {
    h: Vec<f32>,       // [tokens, hidden_size]: what entered
    middle: Vec<f32>,  // the same, after attention
    qkv: Vec<f32>,     // [tokens, q, k and v]: queries and keys rotated
    gate_up: Vec<f32>, // [tokens, gate then up]
    pub(crate) x: Inputs,
    pub(crate) taken: [Taken; 4],
}

impl Compensated {
    /// Takes `h` `[texts, tokens, hidden_size]` through the layer.
    ///
    /// # Errors
    /// `k_chunk` above 1024.
    pub(crate) fn forward(&self, config: &ModelConfig, rope: &Rope, texts: usize, h: &mut [f32]) -> Result<Trace> {
        let before = h.to_vec();
        let tokens = h.len() / config.hidden_size / texts;
        let x_qkv = norm(h, &self.layer.input_norm, config.rms_norm_eps);
        let (mut qkv, taken_qkv) = self.apply(Projection::Qkv, &x_qkv)?;
        let x_o = attend(config, rope, &mut KvCache::new(config, texts, tokens), texts, &mut qkv);
        let (y, taken_o) = self.apply(Projection::O, &x_o)?;
        add_parallel(h, &y);
        let middle = h.to_vec();
        let x_gate_up = norm(h, &self.layer.post_norm, config.rms_norm_eps);
        let (gate_up, taken_gate_up) = self.apply(Projection::GateUp, &x_gate_up)?;
        let x_down = swiglu(&gate_up, config.intermediate_size);
        let (y, taken_down) = self.apply(Projection::Down, &x_down)?;
        add_parallel(h, &y);
        let (x, taken) = ([x_qkv, x_o, x_gate_up, x_down], [taken_qkv, taken_o, taken_gate_up, taken_down]);
        Ok(Trace { h: before, middle, qkv, gate_up, x, taken })
    }

    fn apply(&self, projection: Projection, x: &[f32]) -> Result<(Vec<f32>, Taken)> {
        let (linear, lost) = (self.layer.linear(projection), &self.lost[projection.index()]);
        let taken = Taken::select(x, linear.in_features, self.k_chunks[projection.index()])?;
        let mut y = linear.apply(x);
        let tokens = y.par_chunks_exact_mut(linear.out_features).zip(x.par_chunks_exact(linear.in_features));
        tokens.enumerate().for_each(|(t, (y, x))| {
            for &k in taken.of(t) {
                let line = &lost[k as usize * linear.out_features..][..linear.out_features];
                y.iter_mut().zip(line).for_each(|(y, lost)| *y += lost * x[k as usize]);
            }
        });
        Ok((y, taken))
    }

    /// Turns `d`, the derivative by what comes out, into that by what entered, and returns those by the stored
    /// weights, each `[out_features, in_features]`.
    pub(crate) fn backward(
        &self,
        config: &ModelConfig,
        rope: &Rope,
        texts: usize,
        trace: Trace,
        d: &mut [f32],
    ) -> [Vec<f32>; 4] {
        let Trace { h, middle, qkv, gate_up, x: [x_qkv, x_o, x_gate_up, x_down], taken } = trace;
        let [taken_qkv, taken_o, taken_gate_up, taken_down] = taken;
        let eps = config.rms_norm_eps;
        let (d_down, w_down) = self.derive(Projection::Down, x_down, &taken_down, d);
        let d_gate_up = swiglu_back(&gate_up, &d_down, config.intermediate_size);
        let (d_x, w_gate_up) = self.derive(Projection::GateUp, x_gate_up, &taken_gate_up, &d_gate_up);
        norm_back(&middle, &self.layer.post_norm, eps, &d_x, d);
        let (d_o, w_o) = self.derive(Projection::O, x_o, &taken_o, d);
        let d_qkv = attend_back(config, rope, texts, &qkv, &d_o);
        let (d_x, w_qkv) = self.derive(Projection::Qkv, x_qkv, &taken_qkv, &d_qkv);
        norm_back(&h, &self.layer.input_norm, eps, &d_x, d);
        [w_qkv, w_o, w_gate_up, w_down]
    }

    /// Derivatives by what entered a projection and by its stored weights, from those by what came out, `d`.
    fn derive(&self, projection: Projection, mut x: Vec<f32>, taken: &Taken, d: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Affine { in_features: n, out_features: m, ref weight, .. } = *self.layer.linear(projection);
        let (tokens, lost) = (d.len() / m, &self.lost[projection.index()]);
        let all = gemm::Parallelism::Rayon(0);
        let mut d_x = vec![0.0; tokens * n];
        let (rows, w) = (Strided { values: d, row: m, column: 1 }, Strided { values: weight, row: n, column: 1 });
        multiply(tokens, n, m, 1.0, rows, w, &mut d_x, all);
        let each = d_x.par_chunks_exact_mut(n).zip(x.par_chunks_exact_mut(n)).zip(d.par_chunks_exact(m));
        each.enumerate().for_each(|(t, ((d_x, x), d))| {
            for &k in taken.of(t) {
                let line = &lost[k as usize * m..][..m];
                d_x[k as usize] += line.iter().zip(d).map(|(lost, d)| lost * d).sum::<f32>();
                x[k as usize] = 0.0;
            }
        });
        let mut d_w = vec![0.0; m * n];
        let (columns, x) = (Strided { values: d, row: 1, column: m }, Strided { values: &x, row: n, column: 1 });
        multiply(m, n, tokens, 1.0, columns, x, &mut d_w, all);
        (d_x, d_w)
    }
}

/// Adds to `d` the derivative by `h` of its RMSNorm, from that by what the norm puts out.
pub(crate) fn norm_back(h: &[f32], gamma: &[f32], eps: f32, d_out: &[f32], d: &mut [f32]) {
    let n = gamma.len();
    let rows = d.par_chunks_exact_mut(n).zip(h.par_chunks_exact(n)).zip(d_out.par_chunks_exact(n));
    rows.for_each(|((d, h), d_out)| {
        let squares: f32 = h.iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / n as f32 + eps).sqrt();
        let along: f32 = h.iter().zip(gamma).zip(d_out).map(|((h, g), d)| h * g * d).sum();
        let shrink = along * scale.powi(3) / n as f32;
        for (((d, h), gamma), d_out) in d.iter_mut().zip(h).zip(gamma).zip(d_out) {
            *d += scale * gamma * d_out - shrink * h;
        }
    });
}

/// The derivative by gate and up, from that by `silu(gate) ⊙ up`.
fn swiglu_back(gate_up: &[f32], d: &[f32], intermediate: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len()];
    let rows = out.par_chunks_exact_mut(2 * intermediate).zip(gate_up.par_chunks_exact(2 * intermediate));
    rows.zip(d.par_chunks_exact(intermediate)).for_each(|((out, gate_up), d)| {
        let (d_gate, d_up) = out.split_at_mut(intermediate);
        let (gate, up) = gate_up.split_at(intermediate);
        for k in 0..intermediate {
            let sigmoid = 1.0 / (1.0 + (-gate[k]).exp());
            d_gate[k] = d[k] * up[k] * sigmoid * (1.0 + gate[k] * (1.0 - sigmoid));
            d_up[k] = d[k] * gate[k] * sigmoid;
        }
    });
    out
}

/// The derivative by queries, keys and values before rotation, from that by what attention puts out; `qkv` is
/// rotated.
fn attend_back(config: &ModelConfig, rope: &Rope, texts: usize, qkv: &[f32], d_out: &[f32]) -> Vec<f32> {
    let (d, heads, kv_heads) = (config.head_dim, config.num_heads, config.num_kv_heads);
    let shared = heads / kv_heads;
    let width = (heads + 2 * kv_heads) * d;
    let tokens = qkv.len() / width / texts;
    // For every text and key head: its queries' derivatives, the keys', the values'.
    let piece = (shared + 2) * tokens * d;
    let mut by_head = vec![0.0; texts * kv_heads * piece];
    by_head.par_chunks_exact_mut(piece).enumerate().for_each(|(i, out)| {
        let (text, kv_head) = (i / kv_heads, i % kv_heads);
        let (d_queries, d_kv) = out.split_at_mut(shared * tokens * d);
        let (d_keys, d_values) = d_kv.split_at_mut(tokens * d);
        let of = |head: usize| Strided { values: &qkv[text * tokens * width + head * d..], row: width, column: 1 };
        let (keys, values) = (of(heads + kv_head), of(heads + kv_heads + kv_head));
        for (j, d_queries) in d_queries.chunks_exact_mut(tokens * d).enumerate() {
            let head = kv_head * shared + j;
            let d_out = Strided { values: &d_out[(text * tokens * heads + head) * d..], row: heads * d, column: 1 };
            head_back(config, tokens, [of(head), keys, values, d_out], [d_queries, d_keys, d_values]);
        }
        for head in out.chunks_exact_mut(tokens * d).take(shared + 1) {
            head.chunks_exact_mut(d).enumerate().for_each(|(t, head)| rope.rotate_back(head, t));
        }
    });
    let mut out = vec![0.0; qkv.len()];
    out.par_chunks_exact_mut(width).enumerate().for_each(|(i, row)| {
        let (text, t) = (i / tokens, i % tokens);
        for (head, row) in row.chunks_exact_mut(d).enumerate() {
            let (kv_head, j) = match head {
                head if head < heads => (head / shared, head % shared),
                head => ((head - heads) % kv_heads, shared + (head - heads) / kv_heads),
            };
            let at = (text * kv_heads + kv_head) * piece + (j * tokens + t) * d;
            row.copy_from_slice(&by_head[at..at + d]);
        }
    });
    out
}

/// Rows as columns.
fn across(matrix: Strided<'_>) -> Strided<'_> {
    Strided { row: matrix.column, column: matrix.row, ..matrix }
}

/// One head of one text: overwrites the derivative by its queries, adds to those by keys and values.
fn head_back(
    config: &ModelConfig,
    tokens: usize,
    [queries, keys, values, d_out]: [Strided<'_>; 4],
    [d_queries, d_keys, d_values]: [&mut [f32]; 3],
) {
    let (d, one) = (config.head_dim, gemm::Parallelism::None);
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = vec![0.0; tokens * tokens];
    multiply(tokens, tokens, d, scale, queries, across(keys), &mut scores, one);
    let mut d_scores = vec![0.0; tokens * tokens];
    multiply(tokens, tokens, d, 1.0, d_out, across(values), &mut d_scores, one);
    for (t, (row, d_row)) in scores.chunks_exact_mut(tokens).zip(d_scores.chunks_exact_mut(tokens)).enumerate() {
        let start = config.sliding_window.map_or(0, |window| (t + 1).saturating_sub(window));
        let seen = start..t + 1;
        softmax(&mut row[seen.clone()]);
        let mean: f32 = row[seen.clone()].iter().zip(&d_row[seen.clone()]).map(|(p, d)| p * d).sum();
        row[..start].fill(0.0);
        row[t + 1..].fill(0.0);
        d_row.iter_mut().zip(row.iter()).for_each(|(d, p)| *d = p * (*d - mean));
    }
    let scores = Strided { values: &scores, row: tokens, column: 1 };
    let d_scores = Strided { values: &d_scores, row: tokens, column: 1 };
    multiply(tokens, d, tokens, scale, d_scores, keys, d_queries, one);
    accumulate(tokens, d, tokens, scale, across(d_scores), queries, d_keys, one);
    accumulate(tokens, d, tokens, 1.0, across(scores), d_out, d_values, one);
}

#[cfg(test)]
mod tests;
