//! A whole token on the CPU: norms, rotary attention, feed-forward, sampling.

use anyhow::{Result, bail, ensure};

use super::attention::{Cached, cap_all};
use super::{Cpu, Matrix, kernels};
use crate::backend::{DecodeBackend, Feed, Input, Norm, Product, ensure_room};
use crate::config::{Attention, ModelConfig};
use crate::host;
use crate::sampling::{self, NO_TOKEN, Sampling};

/// Numbers that are worth another thread.
const MIN_NUMBERS: usize = 1 << 13;

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

impl Sequence {
    /// Fails if `tokens` more would go past the end of the cache.
    fn fits(&self, tokens: usize) -> Result<()> {
        ensure_room(self.len, tokens, self.max_seq_len)
    }
}

impl DecodeBackend for Cpu {
    type Sequence = Sequence;
    /// Operations are not recorded: there is no queue to replay them into.
    type Graph = ();

    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Sequence> {
        ensure!(max_seq_len > 0, "the context has no room for a single token");
        let attentions = || config.layers.iter().map(|layer| layer.attention());
        let cached: usize = attentions().map(|attention| Cached::numbers(attention, max_seq_len)).sum();
        let tables: usize = config.ropes.iter().map(|rope| max_seq_len * rope.head_dim).sum();
        let what = format!("a context of {max_seq_len} tokens");
        host::ensure_memory(4 * (cached + tables) as u64, &what, "make fewer tokens, or set --max-seq-len")?;
        Ok(Sequence {
            max_seq_len,
            layers: attentions().map(|attention| Cached::new(attention, max_seq_len)).collect(),
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

    fn recall(&self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        sequence.len = tokens;
        Ok(())
    }

    fn embed(&self, sequence: &Sequence, table: &Matrix, scale: f32, input: Input<'_>, h: &mut Vec<f32>) -> Result<()> {
        let tokens = match input {
            Input::Prompt(tokens) => tokens,
            Input::Sampled => std::slice::from_ref(sequence.sampled.last().unwrap_or(&NO_TOKEN)),
        };
        let mut codes = vec![0; table.in_features];
        for (&token, h) in tokens.iter().zip(h.chunks_exact_mut(table.in_features)) {
            match token as usize {
                row if row < table.out_features => {
                    table.values.dequantize(self.path, row, &mut codes, h);
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
                self.team.divide(&mut made, width, MIN_NUMBERS, &|_, x| {
                    x.chunks_exact_mut(width).for_each(|x| kernels::rms_norm(self.path, &norm.gamma, norm.eps, x));
                });
                &made
            }
            Feed::Gated(activation) => {
                made.resize(tokens * width, 0.0);
                self.team.divide(&mut made, width, MIN_NUMBERS, &|first, out| {
                    for (gu, out) in x[2 * first..].chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
                        let (gate, up) = gu.split_at(width);
                        kernels::gated(self.path, activation, gate, up, out);
                    }
                });
                &made
            }
        };
        self.product(matrix, plan, x, y, tokens, add);
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
            queries.chunks_exact_mut(query.len).for_each(|x| kernels::rms_norm(self.path, &query.gamma, query.eps, x));
            rest[..num_kv_heads * head_dim]
                .chunks_exact_mut(key.len)
                .for_each(|x| kernels::rms_norm(self.path, &key.gamma, key.eps, x));
        }
        Ok(())
    }

    fn add_norm(&self, norm: &Norm<Vec<f32>>, branch: &Vec<f32>, h: &mut Vec<f32>, tokens: usize) -> Result<()> {
        for (branch, h) in branch.chunks_exact(norm.len).zip(h.chunks_exact_mut(norm.len)).take(tokens) {
            let mut x = branch.to_vec();
            kernels::rms_norm(self.path, &norm.gamma, norm.eps, &mut x);
            kernels::add(self.path, &x, h);
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
        sequence.fits(tokens)?;
        let Sequence { layers, tables, len, .. } = sequence;
        let cached = &mut layers[layer];
        let table = cached.attention.rope.map(|rope| &tables[rope][..]);
        cached.attend(self, table, *len, &qkv[..tokens * cached.attention.qkv_rows()], out);
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
