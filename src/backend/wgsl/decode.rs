//! A whole token on the reference backend.

use anyhow::{Context, Result, ensure};

use super::kernels::{ADD_NORM, APPEND, ARGMAX, ATTEND, GATED, NORM_QK, RMS_NORM, ROPE, SOFTCAP};
use super::matrix::{Matrix, ROWS, words};
use super::{Vector, Wgpu, scratch};
use crate::backend::{DecodeBackend, Feed, GemvBackend, Input, Norm, Product, cached_positions, ensure_room, kernels};
use crate::config::{Attention, LayerConfig, ModelConfig};
use crate::sampling::{self, NO_TOKEN, Sampling};

/// The widest head that `attend.wgsl` takes.
const MAX_HEAD_DIM: usize = 256;

/// Groups that cap logits, at most: a grid has no more than 65,535 of them, and logits may be more than their threads.
const MAX_SOFTCAP_GROUPS: usize = 4096;

/// One text in the making.
#[derive(Debug)]
pub struct Sequence {
    vocab_size: usize,
    max_seq_len: usize,
    layers: Vec<Cache>,
    angles: Vec<wgpu::Buffer>, // of every RoPE: cosine and sine, [max_seq_len, head_dim / 2, 2]
    tokens: wgpu::Buffer,      // sampled, u32 [max_seq_len + 1]
    len: usize,
    sampled: usize,
    sampling: Sampling,
    draws: Vec<f32>,
}

/// The attention of one layer and what it remembers: the latest `capacity` tokens, each at its position modulo that.
#[derive(Debug)]
struct Cache {
    attention: Attention,
    capacity: usize,
    keys: wgpu::Buffer,   // [capacity, num_kv_heads · head_dim]
    values: wgpu::Buffer, // likewise
}

impl Wgpu {
    fn cache(&self, layer: &LayerConfig, max_seq_len: usize) -> Result<Cache> {
        let attention = layer.attention().clone();
        let Attention { num_kv_heads, head_dim, .. } = attention;
        ensure!(
            head_dim <= MAX_HEAD_DIM,
            "heads are {head_dim} wide, {} allows {MAX_HEAD_DIM}, use --device cpu",
            self.gpu.info.id
        );
        let capacity = cached_positions(&attention, max_seq_len);
        let zeros = || self.gpu.zeros(4 * capacity * num_kv_heads * head_dim);
        let [keys, values] = [zeros(), zeros()]
            .map(|zeros| zeros.with_context(|| format!("no text of {max_seq_len} tokens fits, ask for fewer")));
        Ok(Cache { attention, capacity, keys: keys?, values: values? })
    }
}

impl DecodeBackend for Wgpu {
    type Sequence = Sequence;
    /// Operations are queued anew for every token.
    type Graph = ();

    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Sequence> {
        let angles = config.ropes.iter().map(|rope| self.gpu.upload(bytemuck::cast_slice(&rope.table(max_seq_len))));
        Ok(Sequence {
            vocab_size: config.vocab_size,
            max_seq_len,
            layers: config.layers.iter().map(|layer| self.cache(layer, max_seq_len)).collect::<Result<_>>()?,
            angles: angles.collect::<Result<_>>()?,
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

    fn recall(&self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        sequence.len = tokens;
        Ok(())
    }

    fn embed(&self, sequence: &Sequence, table: &Matrix, scale: f32, input: Input<'_>, h: &mut Vector) -> Result<()> {
        match input {
            Input::Prompt(tokens) => {
                let ids = scratch(&self.gpu, &self.scratch.ids, tokens.len())?;
                self.gpu.write(tokens, &ids, 0);
                table.embed(&self.gpu, scale, &ids, 0, &h.0, tokens.len())
            }
            Input::Sampled => {
                let last = sequence.sampled.checked_sub(1).context("a token was read before it was sampled")?;
                table.embed(&self.gpu, scale, &sequence.tokens, last, &h.0, 1)
            }
        }
    }

    fn project(&self, product: &Product<'_, Self>, x: &Vector, y: &mut Vector, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, add } = *product;
        let made = || scratch(&self.gpu, &self.scratch.x, tokens * matrix.in_features);
        let x = match feed {
            Feed::Plain => x.0.clone(),
            Feed::Norm(norm) => {
                let (made, parameters) = (made()?, [matrix.in_features as u32, norm.eps.to_bits()]);
                self.gpu.dispatch(&RMS_NORM, &[], &[&norm.gamma.0, &x.0, &made], &parameters, [tokens, 1]);
                made
            }
            Feed::Gated(activation) => {
                let (made, groups) = (made()?, [matrix.in_features.div_ceil(ROWS), tokens]);
                let parameters = [matrix.in_features as u32, kernels::activation(activation)];
                self.gpu.dispatch(&GATED, &[], &[&x.0, &made], &parameters, groups);
                made
            }
        };
        self.product(matrix, plan, &x, &y.0, tokens, add)
    }

    fn norm_qk(
        &self,
        sequence: &Sequence,
        layer: usize,
        [query, key]: [&Norm<Vector>; 2],
        qkv: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = sequence.layers[layer].attention;
        let (queries, keys) = (num_heads * head_dim, num_kv_heads * head_dim);
        let mut parameters = words(&[queries, keys, query.len, key.len]);
        parameters.extend([query.eps.to_bits(), key.eps.to_bits()]);
        let buffers = [&query.gamma.0, &key.gamma.0, &qkv.0];
        self.gpu.dispatch(&NORM_QK, &[], &buffers, &parameters, [queries / query.len + keys / key.len, tokens]);
        Ok(())
    }

    fn add_norm(&self, norm: &Norm<Vector>, branch: &Vector, h: &mut Vector, tokens: usize) -> Result<()> {
        let parameters = [norm.len as u32, norm.eps.to_bits()];
        self.gpu.dispatch(&ADD_NORM, &[], &[&norm.gamma.0, &branch.0, &h.0], &parameters, [tokens, 1]);
        Ok(())
    }

    fn softcap(&self, cap: f32, logits: &mut Vector, count: usize) -> Result<()> {
        let groups = count.div_ceil(ROWS).min(MAX_SOFTCAP_GROUPS);
        self.gpu.dispatch(&SOFTCAP, &[], &[&logits.0], &[count as u32, cap.to_bits()], [groups, 1]);
        Ok(())
    }

    fn attend(
        &self,
        sequence: &mut Sequence,
        layer: usize,
        qkv: &Vector,
        out: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        ensure_room(sequence.len, tokens, sequence.max_seq_len)?;
        let Cache { attention, capacity, keys, values } = &sequence.layers[layer];
        let Attention { num_heads, num_kv_heads, head_dim, rope, window, .. } = *attention;
        let rotated = scratch(&self.gpu, &self.scratch.rotated, tokens * attention.qkv_rows())?;
        // A layer that rotates nothing reads no angles, but a binding needs a buffer.
        let angles = rope.map_or(&sequence.tokens, |rope| &sequence.angles[rope]);
        let heads = [num_heads, num_kv_heads, head_dim, sequence.len];
        let parameters = words(&[&heads[..], &[usize::from(rope.is_some())]].concat());
        let groups = (attention.qkv_rows() / 2).div_ceil(ROWS);
        self.gpu.dispatch(&ROPE, &[], &[&qkv.0, angles, &rotated], &parameters, [groups, tokens]);
        let mut parameters = words(&[&heads[..], &[window.unwrap_or(sequence.max_seq_len), *capacity]].concat());
        parameters.extend([attention.scale, attention.softcap.unwrap_or(0.0)].map(|x| (x as f32).to_bits()));
        let (beta, original) = attention.query_scaling.map_or((0.0, 1), |scaling| (scaling.beta, scaling.original));
        parameters.extend([(beta as f32).to_bits(), original as u32]);
        self.gpu.dispatch(&ATTEND, &[], &[&rotated, keys, values, &out.0], &parameters, [num_heads, tokens]);
        // Behind all answers: what these tokens replace is seen by the first of them.
        let kept = tokens.min(*capacity);
        let parameters = words(&[&heads[..], &[*capacity, tokens - kept]].concat());
        let groups = (2 * num_kv_heads * head_dim).div_ceil(ROWS);
        self.gpu.dispatch(&APPEND, &[], &[&rotated, keys, values], &parameters, [groups, kept]);
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Mixer;

    /// A layer has room for as many tokens as it sees, whatever the length of a pass.
    #[test]
    fn a_window_is_all_that_a_layer_remembers() {
        if !crate::devices::is_under_test("wgpu") {
            return;
        }
        let gpu = Wgpu::open(None).unwrap();
        let fields =
            json!({ "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1 });
        for (window, positions) in [(None, 600), (Some(1), 1), (Some(5), 5), (Some(100), 100), (Some(700), 600)] {
            let mut config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().with(fields.clone()).unwrap();
            let Mixer::Attention(attention) = &mut config.layers[0].mixer;
            attention.window = window;
            let sequence = gpu.sequence(&config, 600).unwrap();
            let Cache { keys, values, .. } = &sequence.layers[0];
            let bytes = 4 * 2 * 16 * positions;
            assert_eq!((keys.size(), values.size()), (bytes, bytes), "window {window:?}");
        }
    }
}
