//! One decoder layer in f32, many tokens at once: what calibration and sampling run.
//!
//! Plain Llama-type arithmetic (spec §3.2): RMSNorm, RoPE over the pairs `(i, i + head_dim/2)`, causal attention
//! with grouped queries and an optional sliding window, SwiGLU. Products run on all cores.

use anyhow::Result;
use rayon::prelude::*;

use super::exponential::{softmax, swiglu};
use super::product::{Strided, multiply, product};
use crate::config::{ModelConfig, Projection};
use crate::weights::{Linear, ModelWeights};

/// Queries that are scored against the keys at once.
const QUERY_BLOCK: usize = 64;

/// A linear layer in f32.
#[derive(Debug, Clone)]
pub(crate) struct Affine {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) weight: Vec<f32>,       // [out_features, in_features]
    pub(crate) bias: Option<Vec<f32>>, // [out_features]
}

impl Affine {
    pub(crate) fn new(linear: &Linear<'_>) -> Self {
        let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
        let mut weight = vec![0.0; in_features * out_features];
        let rows = weight.par_chunks_exact_mut(in_features).enumerate();
        rows.for_each(|(row, values)| linear.weight.row(row, values));
        Self { in_features, out_features, weight, bias: linear.bias.as_deref().map(<[f32]>::to_vec) }
    }

    /// `[tokens, out_features]` from `x` `[tokens, in_features]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.in_features * self.out_features];
        product(x, &self.weight, self.in_features, &mut y);
        if let Some(bias) = &self.bias {
            y.par_chunks_exact_mut(self.out_features).for_each(|y| add(y, bias));
        }
        y
    }

    /// Row `row` of the matrix.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.weight[row * self.in_features..][..self.in_features]
    }
}

/// One layer in f32.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) input_norm: Vec<f32>, // [hidden_size]
    pub(crate) post_norm: Vec<f32>,  // [hidden_size]
    pub(crate) linears: [Affine; 4], // in the order of `Projection::ALL`
}

impl Layer {
    /// Reads a layer, dequantized where it is quantized.
    pub(crate) fn read(weights: &dyn ModelWeights, layer: usize) -> Result<Self> {
        Self::collect(weights.layer_norms(layer)?, |projection| weights.projection(layer, projection))
    }

    /// A layer of these norms and projections.
    pub(crate) fn collect<'a>(
        (input_norm, post_norm): (Vec<f32>, Vec<f32>),
        projection: impl Fn(Projection) -> Result<Linear<'a>>,
    ) -> Result<Self> {
        let [qkv, o, gate_up, down] = Projection::ALL.map(|p| projection(p).map(|linear| Affine::new(&linear)));
        Ok(Self { input_norm, post_norm, linears: [qkv?, o?, gate_up?, down?] })
    }

    /// The projection's matrix.
    pub(crate) fn linear(&self, projection: Projection) -> &Affine {
        &self.linears[projection.index()]
    }
}

/// Rotations of the rotary embedding.
#[derive(Debug)]
pub(crate) struct Rope {
    table: Vec<[f32; 2]>, // [positions, head_dim / 2] of (cos, sin)
    half: usize,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, positions: usize) -> Self {
        Self { table: config.rope_table(positions), half: config.head_dim / 2 }
    }

    fn rotate(&self, head: &mut [f32], position: usize) {
        let (low, high) = head.split_at_mut(self.half);
        let pairs = &self.table[position * self.half..][..self.half];
        for ((a, b), [cos, sin]) in low.iter_mut().zip(high).zip(pairs) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }

    /// Undoes [`Rope::rotate`].
    pub(crate) fn rotate_back(&self, head: &mut [f32], position: usize) {
        let (low, high) = head.split_at_mut(self.half);
        let pairs = &self.table[position * self.half..][..self.half];
        for ((a, b), [cos, sin]) in low.iter_mut().zip(high).zip(pairs) {
            (*a, *b) = (*a * cos + *b * sin, *b * cos - *a * sin);
        }
    }
}

/// Keys and values of one layer for several texts of equal length.
#[derive(Debug)]
pub(crate) struct KvCache {
    keys: Vec<f32>,   // [texts, capacity, num_kv_heads · head_dim]
    values: Vec<f32>, // the same
    capacity: usize,
    len: usize, // tokens of each text so far
}

impl KvCache {
    pub(crate) fn new(config: &ModelConfig, texts: usize, capacity: usize) -> Self {
        let len = texts * capacity * config.num_kv_heads * config.head_dim;
        Self { keys: vec![0.0; len], values: vec![0.0; len], capacity, len: 0 }
    }
}

/// What enters the four projections, each `[tokens, in_features]`.
pub(crate) type Inputs = [Vec<f32>; 4];

/// Takes `h` `[texts, tokens, hidden_size]` through one layer, behind what `cache` holds of each text, and
/// returns what entered its projections.
pub(crate) fn forward(
    config: &ModelConfig,
    layer: &Layer,
    rope: &Rope,
    cache: &mut KvCache,
    texts: usize,
    h: &mut [f32],
) -> Inputs {
    let x_qkv = norm(h, &layer.input_norm, config.rms_norm_eps);
    let mut qkv = layer.linear(Projection::Qkv).apply(&x_qkv);
    let x_o = attend(config, rope, cache, texts, &mut qkv);
    drop(qkv);
    add_parallel(h, &layer.linear(Projection::O).apply(&x_o));
    let x_gate_up = norm(h, &layer.post_norm, config.rms_norm_eps);
    let gate_up = layer.linear(Projection::GateUp).apply(&x_gate_up);
    let x_down = swiglu(&gate_up, config.intermediate_size);
    drop(gate_up);
    add_parallel(h, &layer.linear(Projection::Down).apply(&x_down));
    [x_qkv, x_o, x_gate_up, x_down]
}

/// RMSNorm of every row of `h`.
pub(crate) fn norm(h: &[f32], gamma: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; h.len()];
    let rows = out.par_chunks_exact_mut(gamma.len()).zip(h.par_chunks_exact(gamma.len()));
    rows.for_each(|(out, h)| {
        let squares: f32 = h.iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / gamma.len() as f32 + eps).sqrt();
        for ((out, h), gamma) in out.iter_mut().zip(h).zip(gamma) {
            *out = h * scale * gamma;
        }
    });
    out
}

/// Rotates queries and keys of `qkv`, appends keys and values to `cache`, and returns causal attention,
/// `[texts, tokens, num_heads · head_dim]`.
pub(crate) fn attend(
    config: &ModelConfig,
    rope: &Rope,
    cache: &mut KvCache,
    texts: usize,
    qkv: &mut [f32],
) -> Vec<f32> {
    let (d, heads) = (config.head_dim, config.num_heads);
    let (q_dim, kv_dim) = (heads * d, config.num_kv_heads * d);
    let width = q_dim + 2 * kv_dim;
    let tokens = qkv.len() / width / texts;
    let past = cache.len;
    qkv.par_chunks_exact_mut(width).enumerate().for_each(|(i, row)| {
        row[..q_dim + kv_dim].chunks_exact_mut(d).for_each(|head| rope.rotate(head, past + i % tokens));
    });
    for (i, row) in qkv.chunks_exact(width).enumerate() {
        let at = (i / tokens * cache.capacity + past + i % tokens) * kv_dim;
        cache.keys[at..at + kv_dim].copy_from_slice(&row[q_dim..q_dim + kv_dim]);
        cache.values[at..at + kv_dim].copy_from_slice(&row[q_dim + kv_dim..]);
    }
    cache.len += tokens;

    let cache = &*cache;
    let qkv = &*qkv;
    let mut by_head = vec![0.0; texts * tokens * q_dim]; // [texts, heads, tokens, head_dim]
    by_head.par_chunks_exact_mut(tokens * d).enumerate().for_each(|(i, out)| {
        let (text, head) = (i / heads, i % heads);
        let queries = &qkv[text * tokens * width + head * d..];
        let kv = text * cache.capacity * kv_dim + head / (heads / config.num_kv_heads) * d;
        let history = History {
            keys: &cache.keys[kv..],
            values: &cache.values[kv..],
            stride: kv_dim,
            window: config.sliding_window,
        };
        for (block, out) in out.chunks_mut(QUERY_BLOCK * d).enumerate() {
            let first = block * QUERY_BLOCK;
            history.attend(&queries[first * width..], width, past + first, d, out);
        }
    });
    let mut out = vec![0.0; by_head.len()];
    out.par_chunks_exact_mut(q_dim).enumerate().for_each(|(i, row)| {
        for (head, row) in row.chunks_exact_mut(d).enumerate() {
            let at = ((i / tokens * heads + head) * tokens + i % tokens) * d;
            row.copy_from_slice(&by_head[at..at + d]);
        }
    });
    out
}

/// Keys and values of one head of one text.
struct History<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    stride: usize,
    window: Option<usize>,
}

impl History<'_> {
    /// Attention of a block of queries, the first at `position`, `stride` apart; overwrites `out`
    /// `[queries, head_dim]`.
    fn attend(&self, queries: &[f32], stride: usize, position: usize, d: usize, out: &mut [f32]) {
        let count = out.len() / d;
        let len = position + count;
        let scale = 1.0 / (d as f32).sqrt();
        let mut scores = vec![0.0; count * len];
        let q = Strided { values: queries, row: stride, column: 1 };
        let keys = Strided { values: self.keys, row: 1, column: self.stride };
        multiply(count, len, d, scale, q, keys, &mut scores, gemm::Parallelism::None);
        for (i, row) in scores.chunks_exact_mut(len).enumerate() {
            let end = position + i + 1;
            let start = self.window.map_or(0, |window| end.saturating_sub(window));
            row[..start].fill(0.0);
            row[end..].fill(0.0);
            softmax(&mut row[start..end]);
        }
        let values = Strided { values: self.values, row: self.stride, column: 1 };
        let scores = Strided { values: &scores, row: len, column: 1 };
        multiply(count, d, len, 1.0, scores, values, out, gemm::Parallelism::None);
    }
}

/// `y += x`
fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

pub(crate) fn add_parallel(y: &mut [f32], x: &[f32]) {
    y.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 14)).for_each(|(y, x)| add(y, x));
}

#[cfg(test)]
mod tests;
