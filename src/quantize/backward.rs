//! A compensated layer forwards and backwards: what a change of its codebooks does to what the model says.
//!
//! The layer is the quantized one with its compensation: `y = Ŵ·x + (W − Ŵ)·x_taken`. Channels that are taken come
//! out as in full precision, so no gradient reaches `Ŵ` through them. Which channels are taken counts as fixed.

use std::mem;

use anyhow::Result;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::compute::{Compute, Selected, Short, Tensor, Trained};
use super::exponential::dot;
use super::forward::{Affine, Norms, Ropes, normed, of_qk, run};
use super::gram::Taken;
use super::product::{Strided, Threads, multiply};
use crate::config::{Attention, LayerConfig, ModelConfig, Op, Projection, Reads, Writes};

/// Numbers that one core takes at once.
const PIECE: usize = 1 << 14;
/// Rows that are gathered together.
const TILE: usize = 32;

/// A quantized layer and what it was made from.
pub(crate) struct Compensated<'a> {
    /// What it computes.
    pub(crate) config: &'a LayerConfig,
    /// As they are stored.
    pub(crate) norms: Norms,
    /// In the order of [`Projection::ALL`].
    pub(crate) projections: [Trained; 4],
    /// Input channels of each.
    pub(crate) in_features: [usize; 4],
    /// Channels of 1024 that compensation takes.
    pub(crate) k_chunks: [usize; 4],
}

/// What a layer's backward pass needs of its forward pass. All layers' wait for it, so it is kept in 16 bits: a gradient
/// over hundreds of tokens does not show their rounding. Queries and keys, which exponents depend on, in the finer kind.
///
/// What is not here is made again: norms and rotations from what entered them, and gate and up, the widest, by their
/// product.
#[derive(Default)]
pub(crate) struct Trace {
    entered: [Tensor; 4], // by projection: the stream that it read, or what attention put out; nothing of gate and up
    qkv: Tensor,          // [tokens, q, k and v], neither normed nor rotated
    branches: Vec<Tensor>, // [tokens, hidden_size]: what entered each norm behind a branch, in the order of the layer
    pub(crate) taken: [Option<Selected>; 4],
}

impl Trace {
    fn taken(&self, projection: usize) -> &Selected {
        self.taken[projection].as_ref().expect("every projection selects on the way up")
    }
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

impl Compensated<'_> {
    /// Takes `h` `[texts, tokens, hidden_size]` through the layer. Returns what the way back needs, and what entered
    /// the projections.
    ///
    /// # Errors
    /// `k_chunk` above 1024; those of the device.
    pub(crate) fn forward(
        &self,
        on: &dyn Compute,
        config: &ModelConfig,
        ropes: &Ropes,
        (texts, tokens): (usize, usize),
        h: &mut Tensor,
    ) -> Result<(Trace, [Tensor; 4])> {
        let mut cache = on.cache(self.config, texts, tokens)?;
        let mut trace = Trace::default();
        let layer = (self.config, &self.norms);
        let inputs = run(on, config, layer, ropes, &mut cache, texts, h, |(projection, reads, writes), h, x| {
            let i = projection.index();
            let taken = on.select(x, self.in_features[i], self.k_chunks[i])?;
            let y = on.output(&self.projections[i], x, &taken)?;
            trace.taken[i] = Some(taken);
            match reads {
                Reads::Stream(_) => trace.entered[i] = on.shorten(h, Short::Bf16)?,
                Reads::Attended => trace.entered[i] = on.shorten(x, Short::Bf16)?,
                Reads::Gated(_) => {}
            }
            match writes {
                Writes::Qkv => trace.qkv = on.shorten(&y, Short::F16)?,
                Writes::Branch => trace.branches.push(on.shorten(&y, Short::Bf16)?),
                Writes::GateUp | Writes::Stream => {}
            }
            Ok(y)
        })?;
        Ok((trace, inputs))
    }

    /// Turns `d`, the derivative by what comes out, into that by what entered, and returns those by the stored
    /// weights, each `[out_features, in_features]`.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn backward(
        &self,
        on: &dyn Compute,
        config: &ModelConfig,
        ropes: &Ropes,
        (texts, tokens): (usize, usize),
        mut trace: Trace,
        d: &mut Tensor,
    ) -> Result<[Tensor; 4]> {
        let (layer, norms, intermediate) = (self.config, &self.norms, self.config.intermediate_size());
        let mut weights = <[Tensor; 4]>::default();
        let (mut d_qkv, mut d_attended) = (Tensor::default(), Tensor::default());
        let (mut d_gate_up, mut d_branch) = (Tensor::default(), Tensor::default());
        for op in layer.program().into_iter().rev() {
            match op {
                Op::Project { projection, reads, writes } => {
                    let i = projection.index();
                    let mut entered = Tensor::default();
                    let mut gate_up = Tensor::default();
                    let x = match reads {
                        Reads::Gated(activation) => {
                            gate_up = self.gate_up(on, config, &trace)?;
                            on.gated(activation, &gate_up, intermediate)?
                        }
                        Reads::Attended => on.lengthen(&trace.entered[i])?,
                        Reads::Stream(n) => {
                            entered = on.lengthen(&trace.entered[i])?;
                            normed(on, config, norms, n, &entered)?
                        }
                    };
                    let own = match writes {
                        Writes::Qkv => Some(mem::take(&mut d_qkv)),
                        Writes::GateUp => Some(mem::take(&mut d_gate_up)),
                        Writes::Stream => None,
                        Writes::Branch => Some(mem::take(&mut d_branch)),
                    };
                    let d_y = own.as_ref().unwrap_or(d);
                    let (d_x, d_w) = on.derive(&self.projections[i], x, trace.taken(i), d_y)?;
                    drop(own);
                    weights[i] = d_w;
                    match reads {
                        Reads::Stream(Some(n)) => {
                            on.norm_back(&entered, &norms[n.index()], config.norm_eps(n), &d_x, d)?;
                        }
                        Reads::Stream(None) => on.add(d, &d_x)?,
                        Reads::Attended => d_attended = d_x,
                        Reads::Gated(activation) => {
                            d_gate_up = on.gated_back(activation, &gate_up, &d_x, intermediate)?;
                        }
                    }
                }
                Op::NormQk(_) => {
                    let qkv = on.lengthen(&trace.qkv)?;
                    on.norm_qk_back(layer.attention(), of_qk(norms), config.rms_norm_eps, &qkv, &mut d_qkv)?;
                }
                Op::Attend => {
                    let qkv = self.attending(on, config, ropes, tokens, &trace)?;
                    d_qkv = on.attend_back(layer.attention(), ropes, texts, &qkv, &mem::take(&mut d_attended))?;
                }
                Op::AddNormed(n) => {
                    let branch = on.lengthen(&trace.branches.pop().expect("what entered each norm was kept"))?;
                    d_branch = on.norm_derivative(&branch, &norms[n.index()], config.norm_eps(n), d)?;
                }
            }
        }
        Ok(weights)
    }

    /// What gate and up put out, once more.
    fn gate_up(&self, on: &dyn Compute, config: &ModelConfig, trace: &Trace) -> Result<Tensor> {
        let i = Projection::GateUp.index();
        let norm = self.config.norm_before(Projection::GateUp);
        let x = normed(on, config, &self.norms, norm, &on.lengthen(&trace.entered[i])?)?;
        on.output(&self.projections[i], &x, trace.taken(i))
    }

    /// Queries, keys and values as attention takes them, for texts of `tokens` tokens.
    fn attending(
        &self,
        on: &dyn Compute,
        config: &ModelConfig,
        ropes: &Ropes,
        tokens: usize,
        trace: &Trace,
    ) -> Result<Tensor> {
        let (attention, mut qkv) = (self.config.attention(), on.lengthen(&trace.qkv)?);
        if attention.qk_norm.is_some() {
            on.norm_qk(attention, of_qk(&self.norms), config.rms_norm_eps, &mut qkv)?;
        }
        on.rotate(attention, ropes, tokens, &mut qkv)?;
        Ok(qkv)
    }
}

/// What a projection puts out for `x` with the channels `taken` compensated.
pub(super) fn output(linear: &Affine, original: &[f32], x: &[f32], taken: &Taken) -> Vec<f32> {
    let (n, m) = (linear.in_features, linear.out_features);
    let mut y = linear.apply(x);
    let lost = Lost::of(linear, original, &taken.union(n));
    y.par_chunks_exact_mut(m).zip(x.par_chunks_exact(n)).enumerate().for_each(|(t, (y, x))| {
        for &k in taken.of(t) {
            y.iter_mut().zip(lost.of_channel(k)).for_each(|(y, lost)| *y += lost * x[k as usize]);
        }
    });
    y
}

/// Derivatives by what entered a projection and by its stored weights, from those by what came out, `d`.
pub(super) fn derive(
    linear: &Affine,
    original: &[f32],
    mut x: Vec<f32>,
    taken: &Taken,
    d: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let Affine { in_features: n, out_features: m, ref weight, .. } = *linear;
    let (tokens, lost) = (d.len() / m, Lost::of(linear, original, &taken.union(n)));
    let all = Threads::All;
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

/// As it is kept from the way up to the way down.
pub(super) fn shortened<H: Copy + Default + Send>(values: &[f32]) -> Vec<H>
where
    [H]: HalfFloatSliceExt,
{
    let mut short = vec![H::default(); values.len()];
    short.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(s, v)| s.convert_from_f32_slice(v));
    short
}

pub(super) fn lengthened<H: Sync>(values: &[H]) -> Vec<f32>
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
pub(super) fn norm_qk_back(attention: &Attention, [query, key]: [&[f32]; 2], eps: f32, qkv: &[f32], d: &mut [f32]) {
    let (queries, keys) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
    let rows = d.par_chunks_exact_mut(attention.qkv_rows()).zip(qkv.par_chunks_exact(attention.qkv_rows()));
    rows.for_each(|(d, x)| {
        for (part, gamma) in [(0..queries, query), (queries..queries + keys, key)] {
            for (d, x) in d[part.clone()].chunks_exact_mut(gamma.len()).zip(x[part].chunks_exact(gamma.len())) {
                let d_out = d.to_vec();
                d.fill(0.0);
                norm_row_back(x, gamma, eps, &d_out, d);
            }
        }
    });
}

#[cfg(test)]
mod tests;
