//! A compensated layer forwards and backwards: what a change of its codebooks does to what the model says.
//!
//! The layer is the quantized one with its compensation: `y = Ŵ·x + (W − Ŵ)·x_taken`. Channels that are taken come
//! out as in full precision, so no gradient reaches `Ŵ` through them. Which channels are taken counts as fixed.

use anyhow::Result;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::exponential::{dot, gated, gated_back, softmax};
use super::forward::{Affine, Inputs, KvCache, Layer, Ropes, add_parallel, attend, norm};
use super::gram::Taken;
use super::product::{Strided, accumulate, multiply};
use crate::config::{Activation, Attention, FeedForward, LayerNorm, ModelConfig, Projection};

/// Queries whose scores are in memory at once.
const QUERY_BLOCK: usize = 128;
/// Numbers that one core takes at once.
const PIECE: usize = 1 << 14;
/// Rows that are gathered together.
const TILE: usize = 32;

/// A quantized layer and what it was made from.
#[derive(Debug)]
pub(crate) struct Compensated {
    /// The layer as it is stored.
    pub(crate) layer: Layer,
    /// Each projection in full precision, `[out_features, in_features]`.
    pub(crate) originals: [Vec<f32>; 4],
    /// Channels of 1024 that compensation takes.
    pub(crate) k_chunks: [usize; 4],
}

/// What a layer's backward pass needs of its forward pass, but for gate and up, the widest, which are computed again. All
/// layers' wait for it, so it is kept in 16 bits: a gradient over hundreds of tokens does not show their rounding.
/// Queries and keys, which exponents depend on, in the finer kind.
#[derive(Debug)]
pub(crate) struct Trace {
    h: Vec<bf16>,      // [tokens, hidden_size]: what entered
    middle: Vec<bf16>, // the same, after attention
    qkv: Vec<f16>,     // [tokens, q, k and v]: queries and keys rotated
    x_o: Vec<bf16>,    // [tokens, num_heads · head_dim]
    pub(crate) taken: [Taken; 4],
}

/// Bytes of a token in a [`Trace`], without the channels taken, of which there are few.
pub(super) fn trace_bytes(config: &ModelConfig) -> usize {
    let [qkv, o, ..] = Projection::ALL.map(|p| config.shape(0, p));
    2 * (qkv.1 + 2 * config.hidden_size + o.0)
}

/// What enters a projection, and the channels of it that are taken.
type Entering = (Vec<f32>, Taken);

impl Compensated {
    /// Takes `h` `[texts, tokens, hidden_size]` through the layer. Returns what the way back needs, and what entered
    /// the projections.
    ///
    /// # Errors
    /// `k_chunk` above 1024.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        ropes: &Ropes,
        texts: usize,
        h: &mut [f32],
    ) -> Result<(Trace, Inputs)> {
        let before = shortened(h);
        let attention = self.layer.config.attention();
        let tokens = h.len() / config.hidden_size / texts;
        let x_qkv = norm(h, self.layer.norm(LayerNorm::AttentionInput), config.stream_eps());
        let (mut qkv, taken_qkv) = self.apply(Projection::Qkv, &x_qkv)?;
        let x_o = attend(attention, ropes, &mut KvCache::new(&self.layer.config, texts, tokens), texts, &mut qkv);
        let (y, taken_o) = self.apply(Projection::O, &x_o)?;
        add_parallel(h, &y);
        let middle = shortened(h);
        let x_gate_up = norm(h, self.layer.norm(LayerNorm::FeedForwardInput), config.stream_eps());
        let (gate_up, taken_gate_up) = self.apply(Projection::GateUp, &x_gate_up)?;
        let x_down = gated(self.activation(), &gate_up, self.layer.config.intermediate_size());
        let (y, taken_down) = self.apply(Projection::Down, &x_down)?;
        add_parallel(h, &y);
        let taken = [taken_qkv, taken_o, taken_gate_up, taken_down];
        let trace = Trace { h: before, middle, qkv: shortened(&qkv), x_o: shortened(&x_o), taken };
        Ok((trace, [x_qkv, x_o, x_gate_up, x_down]))
    }

    fn activation(&self) -> Activation {
        let FeedForward::Dense { activation, .. } = self.layer.config.feed_forward;
        activation
    }

    fn apply(&self, projection: Projection, x: &[f32]) -> Result<(Vec<f32>, Taken)> {
        let n = self.layer.linear(projection).in_features;
        let taken = Taken::select(x, n, self.k_chunks[projection.index()])?;
        Ok((self.output(projection, x, &taken), taken))
    }

    /// What a projection puts out with the channels `taken` compensated.
    fn output(&self, projection: Projection, x: &[f32], taken: &Taken) -> Vec<f32> {
        let linear = self.layer.linear(projection);
        let (n, m) = (linear.in_features, linear.out_features);
        let mut y = linear.apply(x);
        let lost = self.lost(projection, taken);
        y.par_chunks_exact_mut(m).zip(x.par_chunks_exact(n)).enumerate().for_each(|(t, (y, x))| {
            for &k in taken.of(t) {
                y.iter_mut().zip(lost.of_channel(k)).for_each(|(y, lost)| *y += lost * x[k as usize]);
            }
        });
        y
    }

    /// What quantization lost in the channels that any token takes.
    fn lost(&self, projection: Projection, taken: &Taken) -> Lost {
        let linear = self.layer.linear(projection);
        Lost::of(linear, &self.originals[projection.index()], &taken.union(linear.in_features))
    }

    /// Turns `d`, the derivative by what comes out, into that by what entered, and returns those by the stored
    /// weights, each `[out_features, in_features]`.
    pub(crate) fn backward(
        &self,
        config: &ModelConfig,
        ropes: &Ropes,
        texts: usize,
        trace: Trace,
        d: &mut [f32],
    ) -> [Vec<f32>; 4] {
        let Trace { h, middle, qkv, x_o, taken: [taken_qkv, taken_o, taken_gate_up, taken_down] } = trace;
        let (eps, intermediate) = (config.stream_eps(), self.layer.config.intermediate_size());
        let middle = lengthened(&middle);
        let x_gate_up = norm(&middle, self.layer.norm(LayerNorm::FeedForwardInput), eps);
        let gate_up = self.output(Projection::GateUp, &x_gate_up, &taken_gate_up);
        let (d_down, w_down) =
            self.derive(Projection::Down, (gated(self.activation(), &gate_up, intermediate), taken_down), d);
        let d_gate_up = gated_back(self.activation(), &gate_up, &d_down, intermediate);
        drop(gate_up);
        let (d_x, w_gate_up) = self.derive(Projection::GateUp, (x_gate_up, taken_gate_up), &d_gate_up);
        norm_back(&middle, self.layer.norm(LayerNorm::FeedForwardInput), eps, &d_x, d);
        let (d_o, w_o) = self.derive(Projection::O, (lengthened(&x_o), taken_o), d);
        let d_qkv = attend_back(self.layer.config.attention(), ropes, texts, &lengthened(&qkv), &d_o);
        let h = lengthened(&h);
        let x_qkv = norm(&h, self.layer.norm(LayerNorm::AttentionInput), eps);
        let (d_x, w_qkv) = self.derive(Projection::Qkv, (x_qkv, taken_qkv), &d_qkv);
        norm_back(&h, self.layer.norm(LayerNorm::AttentionInput), eps, &d_x, d);
        [w_qkv, w_o, w_gate_up, w_down]
    }

    /// Derivatives by what entered a projection and by its stored weights, from those by what came out, `d`.
    fn derive(&self, projection: Projection, (mut x, taken): Entering, d: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Affine { in_features: n, out_features: m, ref weight, .. } = *self.layer.linear(projection);
        let (tokens, lost) = (d.len() / m, self.lost(projection, &taken));
        let all = gemm::Parallelism::Rayon(0);
        let mut d_x = vec![0.0; tokens * n];
        let (rows, w) = (Strided { values: d, row: m, column: 1 }, Strided { values: weight, row: n, column: 1 });
        multiply(tokens, n, m, 1.0, rows, w, &mut d_x, all);
        let each = d_x.par_chunks_exact_mut(n).zip(x.par_chunks_exact_mut(n)).zip(d.par_chunks_exact(m));
        each.enumerate().for_each(|(t, ((d_x, x), d))| {
            for &k in taken.of(t) {
                d_x[k as usize] += dot(lost.of_channel(k), d);
                x[k as usize] = 0.0;
            }
        });
        let mut d_w = vec![0.0; m * n];
        let (columns, x) = (Strided { values: d, row: 1, column: m }, Strided { values: &x, row: n, column: 1 });
        multiply(m, n, tokens, 1.0, columns, x, &mut d_w, all);
        (d_x, d_w)
    }
}

/// As it is kept from the way up to the way down.
fn shortened<H: Copy + Default + Send>(values: &[f32]) -> Vec<H>
where
    [H]: HalfFloatSliceExt,
{
    let mut short = vec![H::default(); values.len()];
    short.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(s, v)| s.convert_from_f32_slice(v));
    short
}

fn lengthened<H: Sync>(values: &[H]) -> Vec<f32>
where
    [H]: HalfFloatSliceExt,
{
    let mut long = vec![0.0; values.len()];
    long.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(l, v)| v.convert_to_f32_slice(l));
    long
}

/// `original − stored` of some channels, one channel's correction of all rows a line.
struct Lost {
    place: Vec<u32>,  // [in_features]: the channel's line
    values: Vec<f32>, // [channels, out_features]
    width: usize,
}

impl Lost {
    fn of(stored: &Affine, original: &[f32], channels: &[u32]) -> Self {
        let (n, m) = (stored.in_features, stored.out_features);
        let mut place = vec![u32::MAX; n];
        channels.iter().zip(0..).for_each(|(&k, line)| place[k as usize] = line);
        let mut values = vec![0.0; channels.len() * m];
        // Rows in tiles: what is written of them in one line is together.
        let tiles: Vec<Vec<f32>> = (0..m.div_ceil(TILE))
            .into_par_iter()
            .map(|tile| {
                let rows = tile * TILE..m.min((tile + 1) * TILE);
                let mut lost = vec![0.0; channels.len() * TILE];
                for (i, row) in rows.enumerate() {
                    let (original, stored) = (&original[row * n..][..n], stored.row(row));
                    for (lost, &k) in lost.iter_mut().skip(i).step_by(TILE).zip(channels) {
                        *lost = original[k as usize] - stored[k as usize];
                    }
                }
                lost
            })
            .collect();
        if m > 0 {
            values.par_chunks_exact_mut(m).enumerate().for_each(|(line, values)| {
                for (values, tile) in values.chunks_mut(TILE).zip(&tiles) {
                    values.copy_from_slice(&tile[line * TILE..][..values.len()]);
                }
            });
        }
        Self { place, values, width: m }
    }

    /// Of channel `k`, which must be one of them.
    fn of_channel(&self, k: u32) -> &[f32] {
        &self.values[self.place[k as usize] as usize * self.width..][..self.width]
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

/// The derivative by queries, keys and values before rotation, from that by what attention puts out; `qkv` is
/// rotated.
fn attend_back(attention: &Attention, ropes: &Ropes, texts: usize, qkv: &[f32], d_out: &[f32]) -> Vec<f32> {
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
    let (d, one) = (attention.head_dim, gemm::Parallelism::None);
    let scale = attention.scale as f32;
    let mut scores = vec![0.0; QUERY_BLOCK.min(tokens) * tokens];
    let mut d_scores = scores.clone();
    for (first, d_queries) in (0..tokens).step_by(QUERY_BLOCK).zip(d_queries.chunks_mut(QUERY_BLOCK * d)) {
        // Keys behind the block's last query are masked.
        let (count, len) = (d_queries.len() / d, first + d_queries.len() / d);
        let (queries, d_out) = (queries.below(first), d_out.below(first));
        let (scores, d_scores) = (&mut scores[..count * len], &mut d_scores[..count * len]);
        multiply(count, len, d, scale, queries, across(keys), scores, one);
        multiply(count, len, d, 1.0, d_out, across(values), d_scores, one);
        for (i, (row, d_row)) in scores.chunks_exact_mut(len).zip(d_scores.chunks_exact_mut(len)).enumerate() {
            let end = first + i + 1;
            let start = attention.window.map_or(0, |window| end.saturating_sub(window));
            let (p, d_p) = (&mut row[start..end], &mut d_row[start..end]);
            softmax(p);
            let mean = dot(p, d_p);
            d_p.iter_mut().zip(p).for_each(|(d, p)| *d = *p * (*d - mean));
            for row in [row, d_row] {
                row[..start].fill(0.0);
                row[end..].fill(0.0);
            }
        }
        let scores = Strided { values: scores, row: len, column: 1 };
        let d_scores = Strided { values: d_scores, row: len, column: 1 };
        multiply(count, d, len, scale, d_scores, keys, d_queries, one);
        accumulate(len, d, count, scale, across(d_scores), queries, &mut d_keys[..len * d], one);
        accumulate(len, d, count, 1.0, across(scores), d_out, &mut d_values[..len * d], one);
    }
}

#[cfg(test)]
mod tests;
