//! A whole token on the CPU: norms, rotary attention, feed-forward, sampling.

use anyhow::{Result, bail, ensure};
use rayon::prelude::*;

use super::{Cpu, Matrix, kernels};
use crate::backend::{DecodeBackend, Input, Norm, ensure_room};
use crate::config::ModelConfig;
use crate::dec::DecPlan;
use crate::host;
use crate::sampling::{self, NO_TOKEN, Sampling};

/// One text in host memory.
#[derive(Debug)]
pub struct Sequence {
    max_seq_len: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    window: usize,
    keys: Vec<Vec<f32>>,      // per layer [num_kv_heads, max_seq_len, head_dim]
    values: Vec<Vec<f32>>,    // likewise
    rotations: Vec<[f32; 2]>, // cos and sin, [max_seq_len, head_dim / 2]
    len: usize,
    sampling: Sampling,
    draws: Vec<f32>,
    sampled: Vec<u32>,
}

impl Sequence {
    /// Fails if `tokens` more would go past the end of the cache.
    fn fits(&self, tokens: usize) -> Result<()> {
        ensure_room(self.len, tokens, self.max_seq_len)
    }

    /// Rotates one head at `position`; channel `i` pairs with `i + head_dim / 2`.
    fn rotate(&self, head: &mut [f32], position: usize) {
        let half = self.head_dim / 2;
        let (first, second) = head.split_at_mut(half);
        let rotations = &self.rotations[position * half..][..half];
        for ((a, b), [cos, sin]) in first.iter_mut().zip(second).zip(rotations) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }

    /// Rotates a token's keys and writes them and its values behind the text.
    fn append(&mut self, layer: usize, position: usize, kv: &[f32]) {
        let (keys, values) = kv.split_at(self.num_kv_heads * self.head_dim);
        for head in 0..self.num_kv_heads {
            let from = head * self.head_dim..(head + 1) * self.head_dim;
            let at = (head * self.max_seq_len + position) * self.head_dim;
            let mut key = keys[from.clone()].to_vec();
            self.rotate(&mut key, position);
            self.keys[layer][at..at + self.head_dim].copy_from_slice(&key);
            self.values[layer][at..at + self.head_dim].copy_from_slice(&values[from]);
        }
    }

    /// `softmax(q·K / √head_dim)·V` of one query head over the positions it may see.
    fn attend_head(&self, cpu: &Cpu, layer: usize, head: usize, position: usize, q: &[f32], out: &mut [f32]) {
        let mut q = q.to_vec();
        self.rotate(&mut q, position);
        let first = (position + 1).saturating_sub(self.window);
        let kv_head = head / (self.num_heads / self.num_kv_heads);
        let at = (kv_head * self.max_seq_len + first) * self.head_dim;
        let seen = (position + 1 - first) * self.head_dim;
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let keys = self.keys[layer][at..at + seen].chunks_exact(self.head_dim);
        let mut scores: Vec<f32> = keys.map(|k| kernels::dot(cpu.isa, k, &q) * scale).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in &mut scores {
            *score = (*score - max).exp();
            sum += *score;
        }
        out.fill(0.0);
        for (score, v) in scores.iter().zip(self.values[layer][at..at + seen].chunks_exact(self.head_dim)) {
            kernels::add_scaled(cpu.isa, score / sum, v, out);
        }
    }
}

impl Cpu {
    /// `h += W·x + bias`
    fn add_product(&self, matrix: &Matrix, plan: Option<&DecPlan>, x: &[f32], h: &mut [f32], tokens: usize) {
        let mut y = vec![0.0; tokens * matrix.out_features];
        self.product(matrix, plan, x, &mut y, tokens);
        kernels::add_scaled(self.isa, 1.0, &y, &mut h[..y.len()]);
    }
}

/// `out = x / √(mean(x²) + ε) · γ`
fn rms_norm(isa: kernels::Isa, norm: &Norm<Vec<f32>>, x: &[f32], out: &mut [f32]) {
    let scale = 1.0 / (kernels::dot(isa, x, x) / x.len() as f32 + norm.eps).sqrt();
    for ((out, x), gamma) in out.iter_mut().zip(x).zip(&norm.gamma) {
        *out = x * scale * gamma;
    }
}

impl DecodeBackend for Cpu {
    type Sequence = Sequence;
    /// Operations are not recorded: there is no queue to replay them into.
    type Graph = ();

    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Sequence> {
        ensure!(max_seq_len > 0, "the context has no room for a single token");
        let cache = config.num_kv_heads * max_seq_len * config.head_dim;
        let bytes = 4 * (2 * config.num_layers * cache + max_seq_len * config.head_dim);
        let what = format!("a context of {max_seq_len} tokens");
        host::ensure_memory(bytes as u64, &what, "make fewer tokens, or set --max-seq-len")?;
        Ok(Sequence {
            max_seq_len,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            window: config.sliding_window.unwrap_or(usize::MAX),
            keys: vec![vec![0.0; cache]; config.num_layers],
            values: vec![vec![0.0; cache]; config.num_layers],
            rotations: config.rope_table(max_seq_len),
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

    fn embed(&self, sequence: &Sequence, table: &Matrix, input: Input<'_>, h: &mut Vec<f32>) -> Result<()> {
        let tokens = match input {
            Input::Prompt(tokens) => tokens,
            Input::Sampled => std::slice::from_ref(sequence.sampled.last().unwrap_or(&NO_TOKEN)),
        };
        for (&token, h) in tokens.iter().zip(h.chunks_exact_mut(table.in_features)) {
            match token as usize {
                row if row < table.out_features => table.values.dequantize(row, h),
                _ => h.fill(f32::NAN),
            }
        }
        Ok(())
    }

    fn norm_gemv(
        &self,
        norm: &Norm<Vec<f32>>,
        matrix: &Matrix,
        plan: Option<&DecPlan>,
        h: &Vec<f32>,
        y: &mut Vec<f32>,
        tokens: usize,
    ) -> Result<()> {
        let width = matrix.in_features;
        let mut x = vec![0.0; tokens * width];
        for (h, x) in h.chunks_exact(width).zip(x.chunks_exact_mut(width)) {
            rms_norm(self.isa, norm, h, x);
        }
        self.product(matrix, plan, &x, y, tokens);
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
        let head_dim = sequence.head_dim;
        let q_width = sequence.num_heads * head_dim;
        let width = q_width + 2 * sequence.num_kv_heads * head_dim;
        for (t, qkv) in qkv.chunks_exact(width).take(tokens).enumerate() {
            sequence.append(layer, start + t, &qkv[q_width..]);
        }
        let sequence = &*sequence;
        let run = |(i, out): (usize, &mut [f32])| {
            let (t, head) = (i / sequence.num_heads, i % sequence.num_heads);
            let q = &qkv[t * width + head * head_dim..][..head_dim];
            sequence.attend_head(self, layer, head, start + t, q, out);
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

    fn gemv_add(
        &self,
        matrix: &Matrix,
        plan: Option<&DecPlan>,
        x: &Vec<f32>,
        h: &mut Vec<f32>,
        tokens: usize,
    ) -> Result<()> {
        self.add_product(matrix, plan, x, h, tokens);
        Ok(())
    }

    fn swiglu_gemv_add(
        &self,
        matrix: &Matrix,
        plan: Option<&DecPlan>,
        gu: &Vec<f32>,
        h: &mut Vec<f32>,
        tokens: usize,
    ) -> Result<()> {
        let width = matrix.in_features;
        let mut x = vec![0.0; tokens * width];
        for (gu, x) in gu.chunks_exact(2 * width).zip(x.chunks_exact_mut(width)) {
            let (gate, up) = gu.split_at(width);
            for ((x, g), u) in x.iter_mut().zip(gate).zip(up) {
                *x = g / (1.0 + (-g).exp()) * u;
            }
        }
        self.add_product(matrix, plan, &x, h, tokens);
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
