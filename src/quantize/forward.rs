//! One decoder layer in f32, many tokens at once: what calibration and sampling run.
//!
//! What a layer computes is its program's ([`LayerConfig::program`]); here is how (spec §3.2). Products run on all cores.

use std::ops::Range;

use anyhow::Result;
use rayon::prelude::*;

use super::exponential::{gated, softcap, softmax};
use super::product::{Strided, multiply, product};
use crate::config::{Attention, LayerConfig, LayerNorm, ModelConfig, Op, Projection, Reads, Writes};
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

/// The norms of a layer in the order of [`LayerNorm::ALL`]; empty where there is none.
pub(crate) type Norms = [Vec<f32>; 6];

/// One layer in f32.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) config: LayerConfig,
    pub(crate) norms: Norms,
    pub(crate) linears: [Affine; 4], // in the order of `Projection::ALL`
}

impl Layer {
    /// Reads a layer, dequantized where it is quantized.
    pub(crate) fn read(weights: &dyn ModelWeights, layer: usize) -> Result<Self> {
        let config = weights.config();
        Self::collect(config.layers[layer].clone(), weights.norms(layer)?, |projection| {
            weights.projection(layer, projection)
        })
    }

    /// A layer of these norms and projections.
    pub(crate) fn collect<'a>(
        config: LayerConfig,
        norms: Norms,
        projection: impl Fn(Projection) -> Result<Linear<'a>>,
    ) -> Result<Self> {
        let linears = Projection::each(|p| projection(p).map(|linear| Affine::new(&linear)))?;
        Ok(Self { config, norms, linears })
    }

    /// The projection's matrix.
    pub(crate) fn linear(&self, projection: Projection) -> &Affine {
        &self.linears[projection.index()]
    }

    /// γ of a norm that the layer has.
    pub(crate) fn norm(&self, norm: LayerNorm) -> &[f32] {
        &self.norms[norm.index()]
    }

    /// `h` `[tokens, hidden_size]` through one of the norms, if through any.
    pub(super) fn normed(&self, config: &ModelConfig, through: Option<LayerNorm>, h: &[f32]) -> Vec<f32> {
        through.map_or_else(|| h.to_vec(), |n| norm(h, self.norm(n), config.norm_eps(n)))
    }
}

/// The norms that a layer has, each as `make` gives it for its length.
pub(crate) fn norms(config: &LayerConfig, hidden_size: usize, make: impl Fn(LayerNorm, usize) -> Vec<f32>) -> Norms {
    let mut norms = Norms::default();
    config.norms(hidden_size).into_iter().for_each(|(norm, len)| norms[norm.index()] = make(norm, len));
    norms
}

/// Rotations of the rotary embedding, one table for each of the model's.
#[derive(Debug)]
pub(crate) struct Ropes(Vec<Vec<[f32; 2]>>); // [positions, head_dim / 2] of (cos, sin)

impl Ropes {
    pub(crate) fn new(config: &ModelConfig, positions: usize) -> Self {
        Self(config.ropes.iter().map(|rope| rope.table(positions)).collect())
    }

    /// Turns a head of `attention` at `position`.
    pub(crate) fn rotate(&self, attention: &Attention, head: &mut [f32], position: usize) {
        self.each_pair(attention, head, position, |a, b, [cos, sin]| (a * cos - b * sin, b * cos + a * sin));
    }

    /// The derivative by what [`Ropes::rotate`] turned, from that by what it made; for a plain rotation, its inverse.
    pub(crate) fn rotate_back(&self, attention: &Attention, head: &mut [f32], position: usize) {
        self.each_pair(attention, head, position, |a, b, [cos, sin]| (a * cos + b * sin, b * cos - a * sin));
    }

    fn each_pair(
        &self,
        attention: &Attention,
        head: &mut [f32],
        position: usize,
        turn: impl Fn(f32, f32, [f32; 2]) -> (f32, f32),
    ) {
        let Some(rope) = attention.rope else { return };
        let half = head.len() / 2;
        let (low, high) = head.split_at_mut(half);
        for ((a, b), &pair) in low.iter_mut().zip(high).zip(&self.0[rope][position * half..][..half]) {
            (*a, *b) = turn(*a, *b, pair);
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
    pub(crate) fn new(layer: &LayerConfig, texts: usize, capacity: usize) -> Self {
        let len = texts * capacity * layer.attention().num_kv_heads * layer.attention().head_dim;
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
    ropes: &Ropes,
    cache: &mut KvCache,
    texts: usize,
    h: &mut [f32],
) -> Result<Inputs> {
    run(config, layer, ropes, cache, texts, h, |(projection, ..), _, x| Ok(layer.linear(projection).apply(x)))
}

/// The same with products of one's own: `product` gets a projection, `h` as it is then and `x`, what enters, and returns
/// what comes out.
pub(super) fn run(
    config: &ModelConfig,
    layer: &Layer,
    ropes: &Ropes,
    cache: &mut KvCache,
    texts: usize,
    h: &mut [f32],
    mut product: impl FnMut((Projection, Reads, Writes), &[f32], &[f32]) -> Result<Vec<f32>>,
) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    let (mut qkv, mut attended, mut gate_up, mut branch) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for op in layer.config.program() {
        match op {
            Op::Project { projection, reads, writes } => {
                let x = match reads {
                    Reads::Stream(n) => layer.normed(config, n, h),
                    Reads::Attended => std::mem::take(&mut attended),
                    Reads::Gated(activation) => gated(activation, &gate_up, layer.config.intermediate_size()),
                };
                let y = product((projection, reads, writes), h, &x)?;
                inputs[projection.index()] = x;
                match writes {
                    Writes::Qkv => qkv = y,
                    Writes::GateUp => gate_up = y,
                    Writes::Stream => add_parallel(h, &y),
                    Writes::Branch => branch = y,
                }
            }
            Op::NormQk(_) => norm_qk(layer, config.rms_norm_eps, &mut qkv),
            Op::Attend => attended = attend(layer.config.attention(), ropes, cache, texts, &mut qkv),
            Op::AddNormed(n) => add_parallel(h, &layer.normed(config, Some(n), &branch)),
        }
    }
    Ok(inputs)
}

/// RMSNorm of the queries and of the keys of every token of `qkv`, in place.
pub(super) fn norm_qk(layer: &Layer, eps: f32, qkv: &mut [f32]) {
    let attention = layer.config.attention();
    let (queries, keys) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
    let [query, key] = [LayerNorm::Query, LayerNorm::Key].map(|n| layer.norm(n));
    qkv.par_chunks_exact_mut(attention.qkv_rows()).for_each(|row| {
        row[..queries].chunks_exact_mut(query.len()).for_each(|x| norm_row(x, query, eps));
        row[queries..][..keys].chunks_exact_mut(key.len()).for_each(|x| norm_row(x, key, eps));
    });
}

/// RMSNorm of one row, in place.
fn norm_row(x: &mut [f32], gamma: &[f32], eps: f32) {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / gamma.len() as f32 + eps).sqrt();
    x.iter_mut().zip(gamma).for_each(|(x, gamma)| *x = *x * scale * gamma);
}

/// RMSNorm of every row of `h`.
pub(crate) fn norm(h: &[f32], gamma: &[f32], eps: f32) -> Vec<f32> {
    let mut out = h.to_vec();
    out.par_chunks_exact_mut(gamma.len()).for_each(|x| norm_row(x, gamma, eps));
    out
}

/// Rotates queries and keys of `qkv`, texts of `tokens` tokens, the first of each at position `past`.
pub(super) fn rotate(attention: &Attention, ropes: &Ropes, past: usize, tokens: usize, qkv: &mut [f32]) {
    let (d, turning) = (attention.head_dim, (attention.num_heads + attention.num_kv_heads) * attention.head_dim);
    qkv.par_chunks_exact_mut(attention.qkv_rows()).enumerate().for_each(|(i, row)| {
        row[..turning].chunks_exact_mut(d).for_each(|head| ropes.rotate(attention, head, past + i % tokens));
    });
}

/// Rotates queries and keys of `qkv`, appends keys and values to `cache`, and returns causal attention,
/// `[texts, tokens, num_heads · head_dim]`.
pub(crate) fn attend(
    attention: &Attention,
    ropes: &Ropes,
    cache: &mut KvCache,
    texts: usize,
    qkv: &mut [f32],
) -> Vec<f32> {
    let Attention { num_heads: heads, num_kv_heads, head_dim: d, .. } = *attention;
    let (q_dim, kv_dim) = (heads * d, num_kv_heads * d);
    let width = q_dim + 2 * kv_dim;
    let tokens = qkv.len() / width / texts;
    let past = cache.len;
    rotate(attention, ropes, past, tokens, qkv);
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
        let kv = text * cache.capacity * kv_dim + head / (heads / num_kv_heads) * d;
        let history = History { attention, keys: &cache.keys[kv..], values: &cache.values[kv..], stride: kv_dim };
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

/// Keys and values of one key-value head of one text.
struct History<'a> {
    attention: &'a Attention,
    keys: &'a [f32],
    values: &'a [f32],
    stride: usize,
}

impl History<'_> {
    /// Attention of a block of queries, the first at `position`, `stride` apart; overwrites `out`
    /// `[queries, head_dim]`.
    fn attend(&self, queries: &[f32], stride: usize, position: usize, d: usize, out: &mut [f32]) {
        let count = out.len() / d;
        let len = position + count;
        let mut scores = vec![0.0; count * len];
        let q = Strided { values: queries, row: stride, column: 1 };
        let keys = Strided { values: self.keys, row: 1, column: self.stride };
        multiply([count, len, d], q, keys, &mut scores, gemm::Parallelism::None);
        for (i, row) in scores.chunks_exact_mut(len).enumerate() {
            let seen = seen(self.attention, position + i);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            scale_scores(self.attention, position + i, &mut row[seen.clone()]);
            softmax(&mut row[seen]);
        }
        let values = Strided { values: self.values, row: self.stride, column: 1 };
        let scores = Strided { values: &scores, row: len, column: 1 };
        multiply([count, d, len], scores, values, out, gemm::Parallelism::None);
    }
}

/// The positions that the query at `position` sees.
pub(super) fn seen(attention: &Attention, position: usize) -> Range<usize> {
    let end = position + 1;
    attention.window.map_or(0, |window| end.saturating_sub(window))..end
}

/// Products of the query at `position` with keys become scores as the softmax takes them.
pub(super) fn scale_scores(attention: &Attention, position: usize, scores: &mut [f32]) {
    let scale = attention.scale_at(position) as f32;
    scores.iter_mut().for_each(|s| *s *= scale);
    if let Some(cap) = attention.softcap {
        softcap(cap as f32, scores);
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
