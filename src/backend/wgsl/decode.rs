//! A whole token on the reference backend.

use anyhow::{Context, Result, ensure};

use super::kernels::{
    ADD_NORM, APPEND, APPEND_BYTES, ARGMAX, ATTEND, GATED, NORM_QK, RMS_NORM, ROPE, ROUND_BYTES, SOFTCAP,
};
use super::matrix::{Matrix, ROWS, words};
use super::{Vector, Wgpu, scratch};
use crate::backend::{
    DecodeBackend, Feed, GemvBackend, Input, KvBits, Norm, Product, Rows, cached_positions, ensure_room, ensure_slot,
    holds_no_text, kernels, numbered,
};
use crate::config::{Attention, ModelConfig};
use crate::sampling::{self, NO_TOKEN, Sampling};

/// The widest head that `attend.wgsl` takes.
const MAX_HEAD_DIM: usize = 256;

/// Groups that cap logits, at most: a grid has no more than 65,535 of them, and logits may be more than their threads.
const MAX_SOFTCAP_GROUPS: usize = 4096;

/// Texts in the making.
#[derive(Debug)]
pub struct Cache {
    vocab_size: usize,
    max_seq_len: usize,
    bits: KvBits,
    attentions: Vec<Attention>, // of each layer
    angles: Vec<wgpu::Buffer>,  // of every RoPE: cosine and sine, [max_seq_len, head_dim / 2, 2]
    slots: Vec<Option<Text>>,
}

/// One text.
#[derive(Debug)]
struct Text {
    layers: Vec<Cached>,
    tokens: wgpu::Buffer, // sampled, u32 [max_seq_len + 1]
    len: usize,
    sampled: usize,
    sampling: Sampling,
    draws: Vec<f32>,
}

/// What one layer remembers: the latest `capacity` tokens, each at its position modulo that.
#[derive(Debug)]
struct Cached {
    capacity: usize,
    keys: wgpu::Buffer,   // [capacity, num_kv_heads · head_dim], or as append_bytes.wgsl says
    values: wgpu::Buffer, // likewise
}

impl Cache {
    fn text(&self, slot: usize) -> Result<&Text> {
        self.slots.get(slot).and_then(Option::as_ref).with_context(|| holds_no_text(slot))
    }

    fn text_mut(&mut self, slot: usize) -> Result<&mut Text> {
        self.slots.get_mut(slot).and_then(Option::as_mut).with_context(|| holds_no_text(slot))
    }
}

/// Words that a head's keys or values of one position take.
fn head_words(head_dim: usize, bits: KvBits) -> usize {
    match bits {
        KvBits::Whole => head_dim,
        KvBits::Eight => head_dim.div_ceil(4) + 1,
    }
}

impl Wgpu {
    fn cached(&self, attention: &Attention, max_seq_len: usize, bits: KvBits) -> Result<Cached> {
        let Attention { num_kv_heads, head_dim, .. } = *attention;
        let capacity = cached_positions(attention, max_seq_len);
        let zeros = || self.gpu.zeros(4 * capacity * num_kv_heads * head_words(head_dim, bits));
        let [keys, values] = [zeros(), zeros()]
            .map(|zeros| zeros.with_context(|| format!("no text of {max_seq_len} tokens fits, ask for fewer")));
        Ok(Cached { capacity, keys: keys?, values: values? })
    }

    /// Room for another text.
    fn open_text(&self, cache: &Cache) -> Result<Text> {
        let max_seq_len = cache.max_seq_len;
        Ok(Text {
            layers: cache.attentions.iter().map(|a| self.cached(a, max_seq_len, cache.bits)).collect::<Result<_>>()?,
            tokens: self.gpu.zeros(4 * (max_seq_len + 1))?,
            len: 0,
            sampled: 0,
            sampling: Sampling::GREEDY,
            draws: Vec::new(),
        })
    }

    /// Attention of one text's rows, which begin at `first` of the pass: what lies further back in `qkv` and `out` is
    /// brought to the front of work space and back, since kernels count rows from there.
    fn attend_text(
        &self,
        cache: &Cache,
        layer: usize,
        (first, Rows { slot, count, .. }): (usize, Rows),
        (qkv, out): (&wgpu::Buffer, &wgpu::Buffer),
    ) -> Result<()> {
        let text = cache.text(slot)?;
        ensure_room(text.len, count, cache.max_seq_len)?;
        let attention = &cache.attentions[layer];
        let (width, out_width) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
        if first == 0 {
            return self.attend_front(cache, text, layer, (qkv, out), count);
        }
        let own = scratch(&self.gpu, &self.scratch.own, count * width)?;
        let attended = scratch(&self.gpu, &self.scratch.attended, count * out_width)?;
        self.gpu.copy((qkv, 4 * first * width), (&own, 0), 4 * count * width);
        self.attend_front(cache, text, layer, (&own, &attended), count)?;
        self.gpu.copy((&attended, 0), (out, 4 * first * out_width), 4 * count * out_width);
        Ok(())
    }

    fn attend_front(
        &self,
        cache: &Cache,
        text: &Text,
        layer: usize,
        (qkv, out): (&wgpu::Buffer, &wgpu::Buffer),
        tokens: usize,
    ) -> Result<()> {
        let (attention, Cached { capacity, keys, values }) = (&cache.attentions[layer], &text.layers[layer]);
        let Attention { num_heads, num_kv_heads, head_dim, rope, window, .. } = *attention;
        let rotated = scratch(&self.gpu, &self.scratch.rotated, tokens * attention.qkv_rows())?;
        // A layer that rotates nothing reads no angles, but a binding needs a buffer.
        let angles = rope.map_or(&text.tokens, |rope| &cache.angles[rope]);
        let heads = [num_heads, num_kv_heads, head_dim, text.len];
        let parameters = words(&[&heads[..], &[usize::from(rope.is_some())]].concat());
        let groups = (attention.qkv_rows() / 2).div_ceil(ROWS);
        self.gpu.dispatch(&ROPE, &[], &[qkv, angles, &rotated], &parameters, [groups, tokens]);
        let steps = match cache.bits {
            KvBits::Whole => None,
            KvBits::Eight => {
                let steps = scratch(&self.gpu, &self.scratch.steps, tokens * 2 * num_kv_heads)?;
                let parameters = words(&heads[..3]);
                self.gpu.dispatch(&ROUND_BYTES, &[], &[&steps, &rotated], &parameters, [2 * num_kv_heads, tokens]);
                Some(steps)
            }
        };
        let mut parameters = words(&[&heads[..], &[window.unwrap_or(cache.max_seq_len), *capacity]].concat());
        parameters.extend([attention.scale, attention.softcap.unwrap_or(0.0)].map(|x| (x as f32).to_bits()));
        let (beta, original) = attention.query_scaling.map_or((0.0, 1), |scaling| (scaling.beta, scaling.original));
        parameters.extend([(beta as f32).to_bits(), original as u32]);
        let overrides = [("BYTES", u32::from(steps.is_some()))];
        self.gpu.dispatch(&ATTEND, &overrides, &[&rotated, keys, values, out], &parameters, [num_heads, tokens]);
        // Behind all answers: what these tokens replace is seen by the first of them.
        let kept = tokens.min(*capacity);
        let parameters = words(&[&heads[..], &[*capacity, tokens - kept]].concat());
        let groups = (2 * num_kv_heads * head_words(head_dim, cache.bits)).div_ceil(ROWS);
        match steps {
            None => self.gpu.dispatch(&APPEND, &[], &[&rotated, keys, values], &parameters, [groups, kept]),
            Some(steps) => {
                let buffers = [&rotated, &steps, keys, values];
                self.gpu.dispatch(&APPEND_BYTES, &[], &buffers, &parameters, [groups, kept]);
            }
        }
        Ok(())
    }

    /// The next token of a text from row `row` of `logits`.
    fn sample_one(&self, cache: &mut Cache, slot: usize, logits: &Vector, row: usize) -> Result<()> {
        let (vocab, most) = (cache.vocab_size, cache.max_seq_len);
        let text = cache.text_mut(slot)?;
        let at = text.sampled;
        ensure!(at <= most, "{at} tokens were sampled, a text of {most} has no more");
        let own = if row == 0 {
            logits.0.clone()
        } else {
            let own = scratch(&self.gpu, &self.scratch.logits, vocab)?;
            self.gpu.copy((&logits.0, 4 * row * vocab), (&own, 0), 4 * vocab);
            own
        };
        if text.sampling.temperature == 0.0 {
            let parameters = words(&[vocab, at]);
            let overrides = [("NO_TOKEN", NO_TOKEN)];
            self.gpu.dispatch(&ARGMAX, &overrides, &[&own, &text.tokens], &parameters, [1, 1]);
        } else {
            let mut values = vec![0.0; vocab];
            self.read(&Vector(own), &mut values)?;
            let draw = text.draws.get(at).copied().unwrap_or(0.0);
            let token = text.sampling.choose(&values, draw).unwrap_or(NO_TOKEN);
            self.gpu.write(&[token], &text.tokens, at);
        }
        text.sampled += 1;
        Ok(())
    }
}

impl DecodeBackend for Wgpu {
    type Cache = Cache;
    /// Operations are queued anew for every token.
    type Graphs = ();

    fn cache(&self, config: &ModelConfig, slots: usize, max_seq_len: usize, bits: KvBits) -> Result<Cache> {
        let attentions: Vec<_> = config.layers.iter().map(|layer| layer.attention().clone()).collect();
        if let Some(Attention { head_dim, .. }) = attentions.iter().find(|a| a.head_dim > MAX_HEAD_DIM) {
            anyhow::bail!("heads are {head_dim} wide, {} allows {MAX_HEAD_DIM}, use --device cpu", self.gpu.info.id);
        }
        let angles = config.ropes.iter().map(|rope| self.gpu.upload(bytemuck::cast_slice(&rope.table(max_seq_len))));
        Ok(Cache {
            vocab_size: config.vocab_size,
            max_seq_len,
            bits,
            attentions,
            angles: angles.collect::<Result<_>>()?,
            slots: (0..slots).map(|_| None).collect(),
        })
    }

    fn begin(&self, cache: &mut Cache, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        ensure_slot(slot, cache.slots.len())?;
        let text = match cache.slots[slot].take() {
            Some(text) => text,
            None => self.open_text(cache)?,
        };
        let text = Text { len: 0, sampled: 0, sampling: *sampling, draws: draws.to_vec(), ..text };
        cache.slots[slot] = Some(text);
        Ok(())
    }

    fn cut(&self, cache: &mut Cache, slot: usize, tokens: usize, sampled: usize) -> Result<()> {
        let text = cache.text_mut(slot)?;
        (text.len, text.sampled) = (tokens, sampled);
        Ok(())
    }

    fn embed(
        &self,
        cache: &Cache,
        rows: &[Rows],
        (table, scale): (&Matrix, f32),
        input: Input<'_>,
        h: &mut Vector,
    ) -> Result<()> {
        if let (Input::Sampled, [Rows { slot, .. }]) = (input, rows) {
            let text = cache.text(*slot)?;
            let last = text.sampled.checked_sub(1).context("a token was read before it was sampled")?;
            return table.embed(&self.gpu, scale, &text.tokens, last, &h.0, 1);
        }
        let count = crate::backend::count(rows);
        let ids = scratch(&self.gpu, &self.scratch.ids, count)?;
        match input {
            Input::Tokens(tokens) => self.gpu.write(tokens, &ids, 0),
            Input::Sampled => {
                for (row, Rows { slot, .. }) in numbered(rows) {
                    let text = cache.text(slot)?;
                    let last = text.sampled.checked_sub(1).context("a token was read before it was sampled")?;
                    self.gpu.copy((&text.tokens, 4 * last), (&ids, 4 * row), 4);
                }
            }
        }
        table.embed(&self.gpu, scale, &ids, 0, &h.0, count)
    }

    fn project(&self, product: &Product<'_, Self>, x: &Vector, y: &mut Vector, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, compensated, add } = *product;
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
        self.product(matrix, plan.map(|plan| (plan, compensated)), &x, &y.0, tokens, add)
    }

    fn norm_qk(
        &self,
        cache: &Cache,
        layer: usize,
        [query, key]: [&Norm<Vector>; 2],
        qkv: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = cache.attentions[layer];
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

    fn attend(&self, cache: &mut Cache, layer: usize, rows: &[Rows], qkv: &Vector, out: &mut Vector) -> Result<()> {
        numbered(rows).try_for_each(|rows| self.attend_text(cache, layer, rows, (&qkv.0, &out.0)))
    }

    fn advance(&self, cache: &mut Cache, rows: &[Rows]) -> Result<()> {
        let most = cache.max_seq_len;
        rows.iter().try_for_each(|rows| ensure_room(cache.text(rows.slot)?.len, rows.count, most))?;
        rows.iter().try_for_each(|rows| {
            cache.text_mut(rows.slot)?.len += rows.count;
            Ok(())
        })
    }

    fn gather(&self, from: &Vector, len: usize, which: &[usize], to: &mut Vector) -> Result<()> {
        for (i, &row) in which.iter().enumerate() {
            self.gpu.copy((&from.0, 4 * row * len), (&to.0, 4 * i * len), 4 * len);
        }
        Ok(())
    }

    fn sample(&self, cache: &mut Cache, slots: &[usize], logits: &Vector) -> Result<()> {
        slots.iter().enumerate().try_for_each(|(row, &slot)| self.sample_one(cache, slot, logits, row))
    }

    fn sampled(&self, cache: &Cache, slot: usize, i: usize) -> Result<u32> {
        let text = cache.text(slot)?;
        ensure!(i < text.sampled, "token {i} was read before it was sampled");
        let mut token = [0];
        self.gpu.read(&text.tokens, i, &mut token)?;
        sampling::token(i, token[0])
    }

    fn prepare(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn replay(&self, _graphs: &mut (), _rows: &[Rows], work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        work()
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
            let mut cache = gpu.cache(&config, 1, 600, Default::default()).unwrap();
            gpu.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
            let Cached { keys, values, .. } = &cache.text(0).unwrap().layers[0];
            let bytes = 4 * 2 * 16 * positions;
            assert_eq!((keys.size(), values.size()), (bytes, bytes), "window {window:?}");
        }
    }
}
