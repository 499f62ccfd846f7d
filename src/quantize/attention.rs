//! Attention on this machine's cores: of several texts, behind what is kept of each, and its derivatives.

use std::ops::Range;

use rayon::prelude::*;

use super::exponential::{dot, softcap, softmax};
use super::forward::Ropes;
use super::product::{Strided, Threads, accumulate, multiply, path};
use crate::config::{Attention, LayerConfig};
use crate::processor::on_every_path;

/// Queries that are scored against the keys at once.
pub(super) const QUERY_BLOCK: usize = 64;
/// Queries whose scores, and the derivatives by them, are in memory at once.
const QUERY_BLOCK_BACK: usize = 128;

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
        if count == 1 {
            // Text that is made token by token: laying keys and values out for a product would take longer than it.
            let seen = seen(self.attention, position);
            let (keys, values) = (&self.keys[seen.start * self.stride..], &self.values[seen.start * self.stride..]);
            let scores = &mut scores[seen];
            score_one(path(), &queries[..d], keys, self.stride, scores);
            scale_scores(self.attention, position, scores);
            softmax(path(), scores);
            return weigh_one(path(), scores, values, self.stride, out);
        }
        let q = Strided { values: queries, row: stride, column: 1 };
        let keys = Strided { values: self.keys, row: 1, column: self.stride };
        multiply([count, len, d], q, keys, &mut scores, Threads::One);
        for (i, row) in scores.chunks_exact_mut(len).enumerate() {
            let seen = seen(self.attention, position + i);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            scale_scores(self.attention, position + i, &mut row[seen.clone()]);
            softmax(path(), &mut row[seen]);
        }
        let values = Strided { values: self.values, row: self.stride, column: 1 };
        let scores = Strided { values: &scores, row: len, column: 1 };
        multiply([count, d, len], scores, values, out, Threads::One);
    }
}

on_every_path! {
    /// Products of one query with keys that are `stride` apart, in the lanes of [`dot`].
    fn score_one(query: &[f32], keys: &[f32], stride: usize, scores: &mut [f32]) {
        for (score, key) in scores.iter_mut().zip(keys.chunks(stride)) {
            *score = dot(query, &key[..query.len()]);
        }
    }
}

on_every_path! {
    /// The sum of values that are `stride` apart, each times its share.
    fn weigh_one(shares: &[f32], values: &[f32], stride: usize, out: &mut [f32]) {
        out.fill(0.0);
        for (share, value) in shares.iter().zip(values.chunks(stride)) {
            out.iter_mut().zip(value).for_each(|(sum, v)| *sum += share * v);
        }
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

/// The derivative by queries, keys and values before rotation, from that by what attention puts out; `qkv` is rotated.
pub(super) fn attend_back(attention: &Attention, ropes: &Ropes, texts: usize, qkv: &[f32], d_out: &[f32]) -> Vec<f32> {
    let Attention { head_dim: d, num_heads: heads, num_kv_heads: kv_heads, .. } = *attention;
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
            head_back(attention, tokens, [of(head), keys, values, d_out], [d_queries, d_keys, d_values]);
        }
        for head in out.chunks_exact_mut(tokens * d).take(shared + 1) {
            head.chunks_exact_mut(d).enumerate().for_each(|(t, head)| ropes.rotate_back(attention, head, t));
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
    attention: &Attention,
    tokens: usize,
    [queries, keys, values, d_out]: [Strided<'_>; 4],
    [d_queries, d_keys, d_values]: [&mut [f32]; 3],
) {
    let (d, one) = (attention.head_dim, Threads::One);
    let mut scores = vec![0.0; QUERY_BLOCK_BACK.min(tokens) * tokens];
    let mut d_scores = scores.clone();
    let mut slopes = vec![0.0; tokens];
    for (first, d_queries) in (0..tokens).step_by(QUERY_BLOCK_BACK).zip(d_queries.chunks_mut(QUERY_BLOCK_BACK * d)) {
        // Keys behind the block's last query are masked.
        let (count, len) = (d_queries.len() / d, first + d_queries.len() / d);
        let (queries, d_out) = (queries.below(first), d_out.below(first));
        let (scores, d_scores) = (&mut scores[..count * len], &mut d_scores[..count * len]);
        multiply([count, len, d], queries, across(keys), scores, one);
        multiply([count, len, d], d_out, across(values), d_scores, one);
        for (i, (row, d_row)) in scores.chunks_exact_mut(len).zip(d_scores.chunks_exact_mut(len)).enumerate() {
            let seen = seen(attention, first + i);
            let (p, d_p, slopes) = (&mut row[seen.clone()], &mut d_row[seen.clone()], &mut slopes[seen.clone()]);
            scale_scores(attention, first + i, p);
            score_slopes(attention, first + i, p, slopes);
            softmax(path(), p);
            let mean = dot(p, d_p);
            d_p.iter_mut().zip(&*p).zip(slopes).for_each(|((d, p), slope)| *d = *p * (*d - mean) * *slope);
            for row in [row, d_row] {
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
            }
        }
        let scores = Strided { values: scores, row: len, column: 1 };
        let d_scores = Strided { values: d_scores, row: len, column: 1 };
        multiply([count, d, len], d_scores, keys, d_queries, one);
        accumulate([len, d, count], across(d_scores), queries, &mut d_keys[..len * d], one);
        accumulate([len, d, count], across(scores), d_out, &mut d_values[..len * d], one);
    }
}

/// The derivatives of the scores of the query at `position` by its products with keys.
fn score_slopes(attention: &Attention, position: usize, scores: &[f32], slopes: &mut [f32]) {
    let scale = attention.scale_at(position) as f32;
    // cap · tanh(s / cap) has the derivative 1 − tanh².
    let per_cap = attention.softcap.map_or(0.0, |cap| 1.0 / cap as f32);
    slopes.iter_mut().zip(scores).for_each(|(slope, s)| *slope = scale * (1.0 - (s * per_cap).powi(2)));
}
