//! A whole token on the CPU: norms, rotary attention, feed-forward, sampling.

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use rayon::prelude::*;

use super::{Cpu, Matrix, kernels};
use crate::backend::{DecodeBackend, Feed, Input, Norm, Product, cached_positions, ensure_room};
use crate::config::{Attention, LayerConfig, ModelConfig};
use crate::host;
use crate::sampling::{self, NO_TOKEN, Sampling};

/// One text in host memory.
#[derive(Debug)]
pub struct Sequence {
    max_seq_len: usize,
    layers: Vec<Cached>,
    tables: Vec<Vec<[f32; 2]>>, // of every RoPE: cos and sin, [max_seq_len, head_dim / 2]
    len: usize,
    sampling: Sampling,
    draws: Vec<f32>,
    sampled: Vec<u32>,
}

/// The attention of one layer and what it remembers: the latest `capacity` tokens, each at its position modulo that.
#[derive(Debug)]
struct Cached {
    attention: Attention,
    capacity: usize,
    keys: Vec<f32>,   // [num_kv_heads, capacity, head_dim]
    values: Vec<f32>, // likewise
}

impl Sequence {
    /// Fails if `tokens` more would go past the end of the cache.
    fn fits(&self, tokens: usize) -> Result<()> {
        ensure_room(self.len, tokens, self.max_seq_len)
    }
}

/// Rotates one head at `position`; channel `i` pairs with `i + head_dim / 2`.
fn rotate(table: Option<&[[f32; 2]]>, head: &mut [f32], position: usize) {
    let Some(table) = table else { return };
    let half = head.len() / 2;
    let (first, second) = head.split_at_mut(half);
    for ((a, b), [cos, sin]) in first.iter_mut().zip(second).zip(&table[position * half..][..half]) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

impl Cached {
    /// Rotates a token's keys and writes them and its values into their places.
    fn append(&mut self, table: Option<&[[f32; 2]]>, position: usize, kv: &[f32]) {
        let Attention { num_kv_heads, head_dim, .. } = self.attention;
        let (keys, values) = kv.split_at(num_kv_heads * head_dim);
        for head in 0..num_kv_heads {
            let from = head * head_dim..(head + 1) * head_dim;
            let at = (head * self.capacity + position % self.capacity) * head_dim;
            let mut key = keys[from.clone()].to_vec();
            rotate(table, &mut key, position);
            self.keys[at..at + head_dim].copy_from_slice(&key);
            self.values[at..at + head_dim].copy_from_slice(&values[from]);
        }
    }

    /// The places in a head's keys or values of `positions`, oldest first: one run, or two around the end.
    fn runs(&self, kv_head: usize, positions: Range<usize>) -> [Range<usize>; 2] {
        let Attention { head_dim, .. } = self.attention;
        let (start, len) = (positions.start % self.capacity, positions.len());
        let first = len.min(self.capacity - start);
        let run = |start: usize, len: usize| {
            let at = (kv_head * self.capacity + start) * head_dim;
            at..at + len * head_dim
        };
        [run(start, first), run(0, len - first)]
    }

    /// `softmax(scale·q·K)·V` of one query head, rotated already, over the positions that it may see.
    fn attend_head(&self, cpu: &Cpu, head: usize, position: usize, q: &[f32], out: &mut [f32]) {
        let Attention { num_heads, num_kv_heads, head_dim, window, softcap, .. } = self.attention;
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let runs = self.runs(head / (num_heads / num_kv_heads), first..position + 1);
        let scale = self.attention.scale_at(position) as f32;
        let keys = runs.iter().flat_map(|run| self.keys[run.clone()].chunks_exact(head_dim));
        let mut scores: Vec<f32> = keys.map(|k| kernels::dot(cpu.isa, k, q) * scale).collect();
        if let Some(cap) = softcap {
            cap_all(cap as f32, &mut scores);
        }
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in &mut scores {
            *score = (*score - max).exp();
            sum += *score;
        }
        out.fill(0.0);
        let values = runs.iter().flat_map(|run| self.values[run.clone()].chunks_exact(head_dim));
        for (score, v) in scores.iter().zip(values) {
            kernels::add_scaled(cpu.isa, score / sum, v, out);
        }
    }
}

/// `x = cap · tanh(x / cap)`
fn cap_all(cap: f32, values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
}

/// `x = x / √(mean(x²) + ε) · γ`
fn rms_norm(isa: kernels::Isa, norm: &Norm<Vec<f32>>, x: &mut [f32]) {
    let scale = 1.0 / (kernels::dot(isa, x, x) / x.len() as f32 + norm.eps).sqrt();
    for (x, gamma) in x.iter_mut().zip(&norm.gamma) {
        *x = *x * scale * gamma;
    }
}

impl DecodeBackend for Cpu {
    type Sequence = Sequence;
    /// Operations are not recorded: there is no queue to replay them into.
    type Graph = ();

    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Sequence> {
        ensure!(max_seq_len > 0, "the context has no room for a single token");
        let places = |layer: &LayerConfig| {
            let attention = layer.attention();
            let capacity = cached_positions(attention, max_seq_len, self.info.max_tokens);
            (capacity, attention.num_kv_heads * capacity * attention.head_dim)
        };
        let tables: usize = config.ropes.iter().map(|rope| max_seq_len * rope.head_dim).sum();
        let bytes = 4 * (config.layers.iter().map(|layer| 2 * places(layer).1).sum::<usize>() + tables);
        let what = format!("a context of {max_seq_len} tokens");
        host::ensure_memory(bytes as u64, &what, "make fewer tokens, or set --max-seq-len")?;
        let cached = |layer: &LayerConfig| {
            let (capacity, len) = places(layer);
            Cached { attention: layer.attention().clone(), capacity, keys: vec![0.0; len], values: vec![0.0; len] }
        };
        Ok(Sequence {
            max_seq_len,
            layers: config.layers.iter().map(cached).collect(),
            tables: config.ropes.iter().map(|rope| rope.table(max_seq_len)).collect(),
            len: 0,
            sampling: Sampling::GREEDY,
            draws: Vec::new(),
            sampled: Vec::new(),
        })
    }

    fn begin(&self, sequence: &mut Sequence, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        sequence.len = 0;
        sequence.sampling = *sampling;
        sequence.draws = draws.to_vec();
        sequence.sampled.clear();
        Ok(())
    }

    fn embed(&self, sequence: &Sequence, table: &Matrix, scale: f32, input: Input<'_>, h: &mut Vec<f32>) -> Result<()> {
        let tokens = match input {
            Input::Prompt(tokens) => tokens,
            Input::Sampled => std::slice::from_ref(sequence.sampled.last().unwrap_or(&NO_TOKEN)),
        };
        for (&token, h) in tokens.iter().zip(h.chunks_exact_mut(table.in_features)) {
            match token as usize {
                row if row < table.out_features => {
                    table.values.dequantize(row, h);
                    h.iter_mut().for_each(|h| *h *= scale);
                }
                _ => h.fill(f32::NAN),
            }
        }
        Ok(())
    }

    fn project(&self, product: &Product<'_, Self>, x: &Vec<f32>, y: &mut Vec<f32>, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, add } = *product;
        let width = matrix.in_features;
        let mut made = Vec::new();
        let x = match feed {
            Feed::Plain => &x[..tokens * width],
            Feed::Norm(norm) => {
                made.extend_from_slice(&x[..tokens * width]);
                made.chunks_exact_mut(width).for_each(|x| rms_norm(self.isa, norm, x));
                &made
            }
            Feed::Gated(activation) => {
                made.reserve(tokens * width);
                for gu in x.chunks_exact(2 * width).take(tokens) {
                    let (gate, up) = gu.split_at(width);
                    made.extend(gate.iter().zip(up).map(|(&gate, up)| activation.of(gate) * up));
                }
                &made
            }
        };
        if !add {
            self.product(matrix, plan, x, y, tokens);
            return Ok(());
        }
        let mut sum = vec![0.0; tokens * matrix.out_features];
        self.product(matrix, plan, x, &mut sum, tokens);
        kernels::add_scaled(self.isa, 1.0, &sum, &mut y[..sum.len()]);
        Ok(())
    }

    fn norm_qk(
        &self,
        sequence: &Sequence,
        layer: usize,
        [query, key]: [&Norm<Vec<f32>>; 2],
        qkv: &mut Vec<f32>,
        tokens: usize,
    ) -> Result<()> {
        let attention = &sequence.layers[layer].attention;
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *attention;
        for qkv in qkv.chunks_exact_mut(attention.qkv_rows()).take(tokens) {
            let (queries, rest) = qkv.split_at_mut(num_heads * head_dim);
            queries.chunks_exact_mut(query.len).for_each(|x| rms_norm(self.isa, query, x));
            rest[..num_kv_heads * head_dim].chunks_exact_mut(key.len).for_each(|x| rms_norm(self.isa, key, x));
        }
        Ok(())
    }

    fn add_norm(&self, norm: &Norm<Vec<f32>>, branch: &Vec<f32>, h: &mut Vec<f32>, tokens: usize) -> Result<()> {
        for (branch, h) in branch.chunks_exact(norm.len).zip(h.chunks_exact_mut(norm.len)).take(tokens) {
            let mut x = branch.to_vec();
            rms_norm(self.isa, norm, &mut x);
            kernels::add_scaled(self.isa, 1.0, &x, h);
        }
        Ok(())
    }

    fn softcap(&self, cap: f32, logits: &mut Vec<f32>, count: usize) -> Result<()> {
        cap_all(cap, &mut logits[..count]);
        Ok(())
    }

    fn attend(
        &self,
        sequence: &mut Sequence,
        layer: usize,
        qkv: &Vec<f32>,
        out: &mut Vec<f32>,
        tokens: usize,
    ) -> Result<()> {
        let start = sequence.len;
        sequence.fits(tokens)?;
        let Sequence { layers, tables, .. } = sequence;
        let cached = &mut layers[layer];
        let Attention { num_heads, head_dim, rope, .. } = cached.attention;
        let table = rope.map(|rope| &tables[rope][..]);
        let (q_width, width) = (num_heads * head_dim, cached.attention.qkv_rows());
        for (t, qkv) in qkv.chunks_exact(width).take(tokens).enumerate() {
            cached.append(table, start + t, &qkv[q_width..]);
        }
        let cached = &*cached;
        let run = |(i, out): (usize, &mut [f32])| {
            let (t, head) = (i / num_heads, i % num_heads);
            let mut q = qkv[t * width + head * head_dim..][..head_dim].to_vec();
            rotate(table, &mut q, start + t);
            cached.attend_head(self, head, start + t, &q, out);
        };
        let out = &mut out[..tokens * q_width];
        // Below some 100,000 products, waking a thread costs more than it saves.
        if tokens * q_width * (start + tokens) > 100_000 {
            out.par_chunks_exact_mut(head_dim).enumerate().for_each(run);
        } else {
            out.chunks_exact_mut(head_dim).enumerate().for_each(run);
        }
        Ok(())
    }

    fn advance(&self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        sequence.fits(tokens)?;
        sequence.len += tokens;
        Ok(())
    }

    fn last_row(&self, h: &Vec<f32>, len: usize, tokens: usize, last: &mut Vec<f32>) -> Result<()> {
        last[..len].copy_from_slice(&h[(tokens - 1) * len..tokens * len]);
        Ok(())
    }

    fn sample(&self, sequence: &mut Sequence, logits: &Vec<f32>) -> Result<()> {
        let draw = sequence.draws.get(sequence.sampled.len()).copied().unwrap_or(0.0);
        sequence.sampled.push(sequence.sampling.choose(logits, draw).unwrap_or(NO_TOKEN));
        Ok(())
    }

    fn sampled(&self, sequence: &Sequence, i: usize) -> Result<u32> {
        let Some(&token) = sequence.sampled.get(i) else { bail!("token {i} was read before it was sampled") };
        sampling::token(i, token)
    }

    fn prepare(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn replay(&self, _graph: &mut Option<()>, token: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        token()
    }
}
