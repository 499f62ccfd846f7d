//! A compensated layer forwards and backwards: what a change of its codebooks does to what the model says.
//!
//! The layer is the quantized one with its compensation: `y = Ŵ·x + (W − Ŵ)·x_taken`. Channels that are taken come
//! out as in full precision, so no gradient reaches `Ŵ` through them. Which channels are taken counts as fixed.

use std::borrow::Cow;
use std::mem;

use anyhow::Result;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::exponential::{dot, gated, gated_back, softmax};
use super::forward::{Affine, Inputs, KvCache, Layer, Ropes, add_parallel, norm_qk, rotate, run, scale_scores, seen};
use super::gram::Taken;
use super::product::{Strided, accumulate, multiply};
use crate::config::{Attention, LayerNorm, ModelConfig, Op, Projection, Reads, Writes};

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

/// What a layer's backward pass needs of its forward pass. All layers' wait for it, so it is kept in 16 bits: a gradient
/// over hundreds of tokens does not show their rounding. Queries and keys, which exponents depend on, in the finer kind.
///
/// What is not here is made again: norms and rotations from what entered them, and gate and up, the widest, by their
/// product.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    entered: [Vec<bf16>; 4], // by projection: the stream that it read, or what attention put out; nothing of gate and up
    qkv: Vec<f16>,           // [tokens, q, k and v], neither normed nor rotated
    branches: Vec<Vec<bf16>>, // [tokens, hidden_size]: what entered each norm behind a branch, in the order of the layer
    pub(crate) taken: [Taken; 4],
}

/// Bytes of a token in a [`Trace`], without the channels taken, of which there are few.
pub(super) fn trace_bytes(config: &ModelConfig, layer: usize) -> usize {
    let kept = |op| match op {
        Op::Project { projection, reads, writes } => {
            let (inputs, outputs) = config.shape(layer, projection);
            let entered = if matches!(reads, Reads::Gated(_)) { 0 } else { inputs };
            entered + if matches!(writes, Writes::Qkv | Writes::Branch) { outputs } else { 0 }
        }
        _ => 0,
    };
    2 * config.layers[layer].program().into_iter().map(kept).sum::<usize>()
}

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
        let tokens = h.len() / config.hidden_size / texts;
        let mut cache = KvCache::new(&self.layer.config, texts, tokens);
        let mut trace = Trace::default();
        let inputs = run(config, &self.layer, ropes, &mut cache, texts, h, |(projection, reads, writes), h, x| {
            let i = projection.index();
            let taken = Taken::select(x, self.layer.linear(projection).in_features, self.k_chunks[i])?;
            let y = self.output(projection, x, &taken);
            trace.taken[i] = taken;
            match reads {
                Reads::Stream(_) => trace.entered[i] = shortened(h),
                Reads::Attended => trace.entered[i] = shortened(x),
                Reads::Gated(_) => {}
            }
            match writes {
                Writes::Qkv => trace.qkv = shortened(&y),
                Writes::Branch => trace.branches.push(shortened(&y)),
                Writes::GateUp | Writes::Stream => {}
            }
            Ok(y)
        })?;
        Ok((trace, inputs))
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
        mut trace: Trace,
        d: &mut [f32],
    ) -> [Vec<f32>; 4] {
        let (layer, intermediate) = (&self.layer, self.layer.config.intermediate_size());
        let mut weights = [const { Vec::new() }; 4];
        let (mut d_qkv, mut d_attended, mut d_gate_up, mut d_branch) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for op in layer.config.program().into_iter().rev() {
            match op {
                Op::Project { projection, reads, writes } => {
                    let i = projection.index();
                    let mut entered = lengthened(&trace.entered[i]);
                    let gate_up = if let Reads::Gated(_) = reads { self.gate_up(config, &trace) } else { Vec::new() };
                    let x = match reads {
                        Reads::Stream(n) => layer.normed(config, n, &entered),
                        Reads::Attended => mem::take(&mut entered),
                        Reads::Gated(activation) => gated(activation, &gate_up, intermediate),
                    };
                    let d_y = match writes {
                        Writes::Qkv => Cow::Owned(mem::take(&mut d_qkv)),
                        Writes::GateUp => Cow::Owned(mem::take(&mut d_gate_up)),
                        Writes::Stream => Cow::Borrowed(&*d),
                        Writes::Branch => Cow::Owned(mem::take(&mut d_branch)),
                    };
                    let (d_x, d_w) = self.derive(projection, x, &trace.taken[i], &d_y);
                    drop(d_y);
                    weights[i] = d_w;
                    match reads {
                        Reads::Stream(Some(n)) => norm_back(&entered, layer.norm(n), config.norm_eps(n), &d_x, d),
                        Reads::Stream(None) => add_parallel(d, &d_x),
                        Reads::Attended => d_attended = d_x,
                        Reads::Gated(activation) => d_gate_up = gated_back(activation, &gate_up, &d_x, intermediate),
                    }
                }
                Op::NormQk(_) => norm_qk_back(layer, config.rms_norm_eps, &lengthened(&trace.qkv), &mut d_qkv),
                Op::Attend => {
                    let qkv = self.attending(config, ropes, d.len() / config.hidden_size / texts, &trace);
                    d_qkv = attend_back(layer.config.attention(), ropes, texts, &qkv, &mem::take(&mut d_attended));
                }
                Op::AddNormed(n) => {
                    let branch = lengthened(&trace.branches.pop().expect("what entered each norm was kept"));
                    d_branch = vec![0.0; d.len()];
                    norm_back(&branch, layer.norm(n), config.norm_eps(n), d, &mut d_branch);
                }
            }
        }
        weights
    }

    /// What gate and up put out, once more.
    fn gate_up(&self, config: &ModelConfig, trace: &Trace) -> Vec<f32> {
        let i = Projection::GateUp.index();
        let norm = self.layer.config.norm_before(Projection::GateUp);
        let x = self.layer.normed(config, norm, &lengthened(&trace.entered[i]));
        self.output(Projection::GateUp, &x, &trace.taken[i])
    }

    /// Queries, keys and values as attention takes them, for texts of `tokens` tokens.
    fn attending(&self, config: &ModelConfig, ropes: &Ropes, tokens: usize, trace: &Trace) -> Vec<f32> {
        let mut qkv = lengthened(&trace.qkv);
        if self.layer.config.attention().qk_norm.is_some() {
            norm_qk(&self.layer, config.rms_norm_eps, &mut qkv);
        }
        rotate(self.layer.config.attention(), ropes, 0, tokens, &mut qkv);
        qkv
    }

    /// Derivatives by what entered a projection and by its stored weights, from those by what came out, `d`.
    fn derive(&self, projection: Projection, mut x: Vec<f32>, taken: &Taken, d: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Affine { in_features: n, out_features: m, ref weight, .. } = *self.layer.linear(projection);
        let (tokens, lost) = (d.len() / m, self.lost(projection, taken));
        let all = gemm::Parallelism::Rayon(0);
        let mut d_x = vec![0.0; tokens * n];
        let (rows, w) = (Strided { values: d, row: m, column: 1 }, Strided { values: weight, row: n, column: 1 });
        multiply([tokens, n, m], rows, w, &mut d_x, all);
        let each = d_x.par_chunks_exact_mut(n).zip(x.par_chunks_exact_mut(n)).zip(d.par_chunks_exact(m));
        each.enumerate().for_each(|(t, ((d_x, x), d))| {
            for &k in taken.of(t) {
                d_x[k as usize] += dot(lost.of_channel(k), d);
                x[k as usize] = 0.0;
            }
        });
        let mut d_w = vec![0.0; m * n];
        let (columns, x) = (Strided { values: d, row: 1, column: m }, Strided { values: &x, row: n, column: 1 });
        multiply([m, n, tokens], columns, x, &mut d_w, all);
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
    rows.for_each(|((d, h), d_out)| norm_row_back(h, gamma, eps, d_out, d));
}

/// The same of one row.
fn norm_row_back(h: &[f32], gamma: &[f32], eps: f32, d_out: &[f32], d: &mut [f32]) {
    let n = gamma.len() as f32;
    let squares: f32 = h.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / n + eps).sqrt();
    let along: f32 = h.iter().zip(gamma).zip(d_out).map(|((h, g), d)| h * g * d).sum();
    let shrink = along * scale.powi(3) / n;
    for (((d, h), gamma), d_out) in d.iter_mut().zip(h).zip(gamma).zip(d_out) {
        *d += scale * gamma * d_out - shrink * h;
    }
}

/// Turns `d`, the derivative by normed queries and keys (and by values), into that by those of `qkv`, from before.
fn norm_qk_back(layer: &Layer, eps: f32, qkv: &[f32], d: &mut [f32]) {
    let attention = layer.config.attention();
    let (queries, keys) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
    let rows = d.par_chunks_exact_mut(attention.qkv_rows()).zip(qkv.par_chunks_exact(attention.qkv_rows()));
    rows.for_each(|(d, x)| {
        for (part, n) in [(0..queries, LayerNorm::Query), (queries..queries + keys, LayerNorm::Key)] {
            let gamma = layer.norm(n);
            for (d, x) in d[part.clone()].chunks_exact_mut(gamma.len()).zip(x[part].chunks_exact(gamma.len())) {
                let d_out = d.to_vec();
                d.fill(0.0);
                norm_row_back(x, gamma, eps, &d_out, d);
            }
        }
    });
}

/// The derivative by queries, keys and values before rotation, from that by what attention puts out; `qkv` is rotated.
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
    let mut scores = vec![0.0; QUERY_BLOCK.min(tokens) * tokens];
    let mut d_scores = scores.clone();
    let mut slopes = vec![0.0; tokens];
    for (first, d_queries) in (0..tokens).step_by(QUERY_BLOCK).zip(d_queries.chunks_mut(QUERY_BLOCK * d)) {
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
            softmax(p);
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

#[cfg(test)]
mod tests;
