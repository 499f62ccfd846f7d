//! A whole token on the CPU: norms, rotary attention, feed-forward, sampling.

use anyhow::{Context, Result, bail, ensure};

use super::attention::{Cached, cap_all};
use super::{Cpu, MIN_NUMBERS, Matrix, kernels};
use crate::backend::{
    DecodeBackend, Feed, Input, KvBits, Norm, Product, Rows, ensure_room, ensure_slot, holds_no_text, numbered,
};
use crate::config::{Attention, ModelConfig};
use crate::host;
use crate::sampling::{self, NO_TOKEN, Sampling};

/// Texts in host memory.
#[derive(Debug)]
pub struct Cache {
    max_seq_len: usize,
    vocab_size: usize,
    bits: KvBits,
    attentions: Vec<Attention>, // of each layer
    tables: Vec<Vec<[f32; 2]>>, // of every RoPE: cos and sin, [max_seq_len, head_dim / 2]
    slots: Vec<Option<Text>>,
}

/// One text.
#[derive(Debug)]
struct Text {
    layers: Vec<Cached>,
    len: usize,
    sampling: Sampling,
    draws: Vec<f32>,
    sampled: Vec<u32>,
}

impl Cache {
    /// Fails if the rows would go past the end of their text.
    fn fits(&self, rows: &[Rows]) -> Result<()> {
        rows.iter().try_for_each(|rows| ensure_room(self.text(rows.slot)?.len, rows.count, self.max_seq_len))
    }

    fn text(&self, slot: usize) -> Result<&Text> {
        self.slots.get(slot).and_then(Option::as_ref).with_context(|| holds_no_text(slot))
    }

    fn text_mut(&mut self, slot: usize) -> Result<&mut Text> {
        self.slots.get_mut(slot).and_then(Option::as_mut).with_context(|| holds_no_text(slot))
    }

    /// Room for another text.
    fn open(&self) -> Result<Text> {
        let bytes = |attention| Cached::bytes(attention, self.max_seq_len, self.bits);
        let cached: usize = self.attentions.iter().map(bytes).sum();
        let what = format!("a context of {} tokens", self.max_seq_len);
        host::ensure_memory(cached as u64, &what, "make fewer tokens, or set --max-seq-len")?;
        let layers =
            self.attentions.iter().map(|attention| Cached::new(attention, self.max_seq_len, self.bits)).collect();
        Ok(Text { layers, len: 0, sampling: Sampling::GREEDY, draws: Vec::new(), sampled: Vec::new() })
    }
}

impl DecodeBackend for Cpu {
    type Cache = Cache;
    /// Operations are not recorded: there is no queue to replay them into.
    type Graphs = ();

    fn cache(&self, config: &ModelConfig, slots: usize, max_seq_len: usize, bits: KvBits) -> Result<Cache> {
        ensure!(max_seq_len > 0, "the context has no room for a single token");
        let tables: usize = config.ropes.iter().map(|rope| max_seq_len * rope.head_dim).sum();
        let what = format!("a context of {max_seq_len} tokens");
        host::ensure_memory(4 * tables as u64, &what, "make fewer tokens, or set --max-seq-len")?;
        Ok(Cache {
            max_seq_len,
            bits,
            vocab_size: config.vocab_size,
            attentions: config.layers.iter().map(|layer| layer.attention().clone()).collect(),
            tables: config.ropes.iter().map(|rope| rope.table(max_seq_len)).collect(),
            slots: (0..slots).map(|_| None).collect(),
        })
    }

    fn begin(&self, cache: &mut Cache, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        ensure_slot(slot, cache.slots.len())?;
        let text = match cache.slots[slot].take() {
            Some(text) => text,
            None => cache.open()?,
        };
        let Text { layers, mut sampled, .. } = text;
        sampled.clear();
        cache.slots[slot] = Some(Text { layers, len: 0, sampling: *sampling, draws: draws.to_vec(), sampled });
        Ok(())
    }

    fn cut(&self, cache: &mut Cache, slot: usize, tokens: usize, sampled: usize) -> Result<()> {
        let text = cache.text_mut(slot)?;
        text.len = tokens;
        text.sampled.truncate(sampled);
        Ok(())
    }

    fn embed(
        &self,
        cache: &Cache,
        rows: &[Rows],
        (table, scale): (&Matrix, f32),
        input: Input<'_>,
        h: &mut Vec<f32>,
    ) -> Result<()> {
        let last = |rows: &Rows| Ok(cache.text(rows.slot)?.sampled.last().copied().unwrap_or(NO_TOKEN));
        let tokens = match input {
            Input::Tokens(tokens) => tokens.to_vec(),
            Input::Sampled => rows.iter().map(last).collect::<Result<_>>()?,
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
        let Product { feed, matrix, plan, compensated, add } = *product;
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
        self.product(matrix, plan.map(|plan| (plan, compensated)), x, y, tokens, add);
        Ok(())
    }

    fn norm_qk(
        &self,
        cache: &Cache,
        layer: usize,
        [query, key]: [&Norm<Vec<f32>>; 2],
        qkv: &mut Vec<f32>,
        tokens: usize,
    ) -> Result<()> {
        let attention = &cache.attentions[layer];
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

    fn attend(&self, cache: &mut Cache, layer: usize, rows: &[Rows], qkv: &Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        cache.fits(rows)?;
        let Cache { attentions, tables, slots, .. } = cache;
        let attention = &attentions[layer];
        let table = attention.rope.map(|rope| &tables[rope][..]);
        let (width, out_width) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
        for (first, Rows { slot, count, .. }) in numbered(rows) {
            let text = slots[slot].as_mut().with_context(|| holds_no_text(slot))?;
            let (qkv, out) = (&qkv[first * width..][..count * width], &mut out[first * out_width..]);
            text.layers[layer].attend(self, table, text.len, qkv, out);
        }
        Ok(())
    }

    fn advance(&self, cache: &mut Cache, rows: &[Rows]) -> Result<()> {
        cache.fits(rows)?;
        rows.iter().try_for_each(|rows| {
            cache.text_mut(rows.slot)?.len += rows.count;
            Ok(())
        })
    }

    fn gather(&self, from: &Vec<f32>, len: usize, which: &[usize], to: &mut Vec<f32>) -> Result<()> {
        for (&row, to) in which.iter().zip(to.chunks_exact_mut(len)) {
            to.copy_from_slice(&from[row * len..][..len]);
        }
        Ok(())
    }

    fn sample(&self, cache: &mut Cache, slots: &[usize], logits: &Vec<f32>) -> Result<()> {
        let vocab = cache.vocab_size;
        for (&slot, logits) in slots.iter().zip(logits.chunks_exact(vocab)) {
            let text = cache.text_mut(slot)?;
            let draw = text.draws.get(text.sampled.len()).copied().unwrap_or(0.0);
            text.sampled.push(text.sampling.choose(logits, draw).unwrap_or(NO_TOKEN));
        }
        Ok(())
    }

    fn sampled(&self, cache: &Cache, slot: usize, i: usize) -> Result<u32> {
        let Some(&token) = cache.text(slot)?.sampled.get(i) else { bail!("token {i} was read before it was sampled") };
        sampling::token(i, token)
    }

    fn prepare(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn replay(&self, _graphs: &mut (), _rows: &[Rows], work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        work()
    }
}
