//! A whole token on the reference backend.

use anyhow::{Context, Result, ensure};

use super::kernels::{ARGMAX, ATTEND, RMS_NORM, ROPE_APPEND, SWIGLU};
use super::matrix::{Matrix, ROWS, words};
use super::{Vector, Wgpu, scratch};
use crate::backend::{DecodeBackend, Feed, GemvBackend, Input, Norm, Product, ensure_room};
use crate::config::{Attention, ModelConfig};
use crate::sampling::{self, NO_TOKEN, Sampling};

/// The widest head that `attend.wgsl` takes.
const MAX_HEAD_DIM: usize = 256;

/// One text in the making.
#[derive(Debug)]
pub struct Sequence {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    window: usize,
    vocab_size: usize,
    max_seq_len: usize,
    layers: Vec<Cache>,
    angles: wgpu::Buffer, // cosine and sine, [max_seq_len, head_dim / 2, 2]
    tokens: wgpu::Buffer, // sampled, u32 [max_seq_len + 1]
    len: usize,
    sampled: usize,
    sampling: Sampling,
    draws: Vec<f32>,
}

/// Keys and values of one layer, each `[max_seq_len, num_kv_heads · head_dim]`.
#[derive(Debug)]
struct Cache {
    keys: wgpu::Buffer,
    values: wgpu::Buffer,
}

impl DecodeBackend for Wgpu {
    type Sequence = Sequence;
    /// Operations are queued anew for every token.
    type Graph = ();

    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Sequence> {
        let Attention { num_heads, num_kv_heads, head_dim, window, .. } = *config.layers[0].attention();
        ensure!(
            head_dim <= MAX_HEAD_DIM,
            "heads are {head_dim} wide, {} allows {MAX_HEAD_DIM}, use --device cpu",
            self.gpu.info.id
        );
        let bytes = 4 * max_seq_len * num_kv_heads * head_dim;
        let cache = |_| Ok(Cache { keys: self.gpu.zeros(bytes)?, values: self.gpu.zeros(bytes)? });
        let layers = (0..config.layers.len()).map(cache).collect::<Result<_>>();
        Ok(Sequence {
            num_heads,
            num_kv_heads,
            head_dim,
            window: window.unwrap_or(max_seq_len),
            vocab_size: config.vocab_size,
            max_seq_len,
            layers: layers.with_context(|| format!("no text of {max_seq_len} tokens fits, ask for fewer"))?,
            angles: self.gpu.upload(bytemuck::cast_slice(&config.ropes[0].table(max_seq_len)))?,
            tokens: self.gpu.zeros(4 * (max_seq_len + 1))?,
            len: 0,
            sampled: 0,
            sampling: Sampling::GREEDY,
            draws: Vec::new(),
        })
    }

    fn begin(&self, sequence: &mut Sequence, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        sequence.len = 0;
        sequence.sampled = 0;
        sequence.sampling = *sampling;
        sequence.draws = draws.to_vec();
        Ok(())
    }

    fn embed(&self, sequence: &Sequence, table: &Matrix, _scale: f32, input: Input<'_>, h: &mut Vector) -> Result<()> {
        match input {
            Input::Prompt(tokens) => {
                let ids = scratch(&self.gpu, &self.scratch.ids, tokens.len())?;
                self.gpu.write(tokens, &ids, 0);
                table.embed(&self.gpu, &ids, 0, &h.0, tokens.len())
            }
            Input::Sampled => {
                let last = sequence.sampled.checked_sub(1).context("a token was read before it was sampled")?;
                table.embed(&self.gpu, &sequence.tokens, last, &h.0, 1)
            }
        }
    }

    fn project(&self, product: &Product<'_, Self>, x: &Vector, y: &mut Vector, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, add } = *product;
        let made = || scratch(&self.gpu, &self.scratch.x, tokens * matrix.in_features);
        match feed {
            Feed::Plain => self.product(matrix, plan, &x.0, &y.0, tokens, add),
            Feed::Norm(norm) => {
                let (made, parameters) = (made()?, [matrix.in_features as u32, norm.eps.to_bits()]);
                self.gpu.dispatch(&RMS_NORM, &[], &[&norm.gamma.0, &x.0, &made], &parameters, [tokens, 1]);
                self.product(matrix, plan, &made, &y.0, tokens, add)
            }
            Feed::Gated(_) => {
                let (made, groups) = (made()?, [matrix.in_features.div_ceil(ROWS), tokens]);
                self.gpu.dispatch(&SWIGLU, &[], &[&x.0, &made], &words(&[matrix.in_features]), groups);
                self.product(matrix, plan, &made, &y.0, tokens, add)
            }
        }
    }

    fn norm_qk(&self, _: &Sequence, _: usize, _: [&Norm<Vector>; 2], _: &mut Vector, _: usize) -> Result<()> {
        anyhow::bail!("norms of queries and keys")
    }

    fn add_norm(&self, _: &Norm<Vector>, _: &Vector, _: &mut Vector, _: usize) -> Result<()> {
        anyhow::bail!("norms behind a branch")
    }

    fn softcap(&self, _: f32, _: &mut Vector, _: usize) -> Result<()> {
        anyhow::bail!("soft caps")
    }

    fn attend(
        &self,
        sequence: &mut Sequence,
        layer: usize,
        qkv: &Vector,
        out: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        let Sequence { num_heads, num_kv_heads, head_dim, .. } = *sequence;
        ensure_room(sequence.len, tokens, sequence.max_seq_len)?;
        let Cache { keys, values } = &sequence.layers[layer];
        let q = scratch(&self.gpu, &self.scratch.q, tokens * num_heads * head_dim)?;
        let pairs = (num_heads + 2 * num_kv_heads) * head_dim / 2;
        self.gpu.dispatch(
            &ROPE_APPEND,
            &[],
            &[&qkv.0, &sequence.angles, &q, keys, values],
            &words(&[num_heads, num_kv_heads, head_dim, sequence.len]),
            [pairs.div_ceil(ROWS), tokens],
        );
        self.gpu.dispatch(
            &ATTEND,
            &[],
            &[&q, keys, values, &out.0],
            &words(&[num_heads, num_kv_heads, head_dim, sequence.len, sequence.window]),
            [num_heads, tokens],
        );
        Ok(())
    }

    fn advance(&self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        ensure_room(sequence.len, tokens, sequence.max_seq_len)?;
        sequence.len += tokens;
        Ok(())
    }

    fn last_row(&self, h: &Vector, len: usize, tokens: usize, last: &mut Vector) -> Result<()> {
        self.gpu.copy(&h.0, 4 * (tokens - 1) * len, &last.0, 4 * len);
        Ok(())
    }

    fn sample(&self, sequence: &mut Sequence, logits: &Vector) -> Result<()> {
        let at = sequence.sampled;
        ensure!(at <= sequence.max_seq_len, "{at} tokens were sampled, a text of {} has no more", sequence.max_seq_len);
        if sequence.sampling.temperature == 0.0 {
            let parameters = words(&[sequence.vocab_size, at]);
            let overrides = [("NO_TOKEN", NO_TOKEN)];
            self.gpu.dispatch(&ARGMAX, &overrides, &[&logits.0, &sequence.tokens], &parameters, [1, 1]);
        } else {
            let mut values = vec![0.0; sequence.vocab_size];
            self.read(logits, &mut values)?;
            let draw = sequence.draws.get(at).copied().unwrap_or(0.0);
            let token = sequence.sampling.choose(&values, draw).unwrap_or(NO_TOKEN);
            self.gpu.write(&[token], &sequence.tokens, at);
        }
        sequence.sampled += 1;
        Ok(())
    }

    fn sampled(&self, sequence: &Sequence, i: usize) -> Result<u32> {
        ensure!(i < sequence.sampled, "token {i} was read before it was sampled");
        let mut token = [0];
        self.gpu.read(&sequence.tokens, i, &mut token)?;
        sampling::token(i, token[0])
    }

    fn prepare(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn replay(&self, _graph: &mut Option<()>, token: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        token()
    }
}
