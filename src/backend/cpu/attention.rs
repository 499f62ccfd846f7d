//! Attention of a layer in host memory, and what the layer remembers.

use std::ops::Range;

use super::remembered::Remembered;
use super::{Cpu, kernels};
use crate::backend::{KvBits, cached_positions};
use crate::config::Attention;

/// Products of attention that are worth another thread.
const MIN_PRODUCTS: usize = 1 << 14;

/// The attention of one layer and what it remembers: the latest `capacity` tokens, each at its position modulo that.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) attention: Attention,
    capacity: usize,
    bits: KvBits,
    keys: Remembered,   // [num_kv_heads · capacity, head_dim]
    values: Remembered, // likewise
}

/// Consecutive tokens that the layer does not remember yet.
struct Pass<'a> {
    attention: &'a Attention,
    start: usize,       // position of the first
    keys: Remembered,   // rotated, [num_kv_heads · tokens, head_dim]
    values: Remembered, // likewise
    qkv: &'a [f32],     // [tokens, qkv_rows]
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

/// `x = cap · tanh(x / cap)`
pub(super) fn cap_all(cap: f32, values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
}

impl<'a> Pass<'a> {
    fn new(attention: &'a Attention, table: Option<&[[f32; 2]]>, start: usize, qkv: &'a [f32], bits: KvBits) -> Self {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *attention;
        let tokens = qkv.len() / attention.qkv_rows();
        let room = || Remembered::new(num_kv_heads * tokens, head_dim, bits);
        let (mut keys, mut values) = (room(), room());
        for (t, qkv) in qkv.chunks_exact(attention.qkv_rows()).enumerate() {
            let mut heads = qkv[num_heads * head_dim..].chunks_exact(head_dim);
            for (head, key) in heads.by_ref().take(num_kv_heads).enumerate() {
                let mut key = key.to_vec();
                rotate(table, &mut key, start + t);
                keys.write(head * tokens + t, &key);
            }
            heads.enumerate().for_each(|(head, value)| values.write(head * tokens + t, value));
        }
        Self { attention, start, keys, values, qkv }
    }

    fn tokens(&self) -> usize {
        self.qkv.len() / self.attention.qkv_rows()
    }
}

impl Cached {
    /// Nothing yet, with room for what a text of `max_seq_len` tokens needs.
    pub(super) fn new(attention: &Attention, max_seq_len: usize, bits: KvBits) -> Self {
        let capacity = cached_positions(attention, max_seq_len);
        let zeros = || Remembered::new(attention.num_kv_heads * capacity, attention.head_dim, bits);
        Self { attention: attention.clone(), capacity, bits, keys: zeros(), values: zeros() }
    }

    /// How many bytes [`Cached::new`] takes.
    pub(super) fn bytes(attention: &Attention, max_seq_len: usize, bits: KvBits) -> usize {
        let rows = attention.num_kv_heads * cached_positions(attention, max_seq_len);
        2 * Remembered::bytes(rows, attention.head_dim, bits)
    }

    /// Attention of the tokens of `qkv`, the first of which is at `start`, to themselves and to what is remembered. They
    /// are remembered when all have their answer: what they replace is seen by the first of them.
    pub(super) fn attend(&mut self, cpu: &Cpu, table: Option<&[[f32; 2]]>, start: usize, qkv: &[f32], out: &mut [f32]) {
        let attention = self.attention.clone();
        let Attention { num_heads, head_dim, .. } = attention;
        let (pass, width) = (Pass::new(&attention, table, start, qkv, self.bits), attention.qkv_rows());
        let (tokens, cached) = (pass.tokens(), &*self);
        let least = MIN_PRODUCTS / (start + tokens);
        cpu.team.divide(&mut out[..tokens * num_heads * head_dim], head_dim, least, &|first, out| {
            for (i, out) in (first / head_dim..).zip(out.chunks_exact_mut(head_dim)) {
                let (t, head) = (i / num_heads, i % num_heads);
                let mut q = qkv[t * width + head * head_dim..][..head_dim].to_vec();
                rotate(table, &mut q, start + t);
                cached.attend_head(cpu, &pass, head, t, &q, out);
            }
        });
        self.remember(&pass);
    }

    /// `softmax(scale·q·K)·V` of a query head of token `t` of the pass, rotated already, over the positions that it may see.
    fn attend_head(&self, cpu: &Cpu, pass: &Pass<'_>, head: usize, t: usize, q: &[f32], out: &mut [f32]) {
        let Attention { num_heads, num_kv_heads, head_dim, window, softcap, .. } = self.attention;
        let (kv_head, position) = (head / (num_heads / num_kv_heads), pass.start + t);
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let runs = self.runs(kv_head, first.min(pass.start)..pass.start);
        let own = first.saturating_sub(pass.start)..t + 1;
        let these_rows = kv_head * pass.tokens() + own.start..kv_head * pass.tokens() + own.end;
        let scale = self.attention.scale_at(position) as f32;
        let remembered = runs.each_ref().map(Range::len);
        let mut scores = vec![0.0; remembered[0] + remembered[1] + own.len()];
        let (before, rest) = scores.split_at_mut(remembered[0]);
        let (after, these) = rest.split_at_mut(remembered[1]);
        kernels::dots(cpu.path, &self.keys.read(runs[0].clone()), head_dim, q, before);
        kernels::dots(cpu.path, &self.keys.read(runs[1].clone()), head_dim, q, after);
        kernels::dots(cpu.path, &pass.keys.read(these_rows.clone()), head_dim, q, these);
        scores.iter_mut().for_each(|score| *score *= scale);
        if let Some(cap) = softcap {
            cap_all(cap as f32, &mut scores);
        }
        kernels::softmax(cpu.path, &mut scores);
        out.fill(0.0);
        let (before, rest) = scores.split_at(remembered[0]);
        let (after, these) = rest.split_at(remembered[1]);
        kernels::add_weighted(cpu.path, before, &self.values.read(runs[0].clone()), head_dim, out);
        kernels::add_weighted(cpu.path, after, &self.values.read(runs[1].clone()), head_dim, out);
        kernels::add_weighted(cpu.path, these, &pass.values.read(these_rows), head_dim, out);
    }

    /// The rows of a head's keys or values at `positions`, oldest first: one run, or two around the end.
    fn runs(&self, kv_head: usize, positions: Range<usize>) -> [Range<usize>; 2] {
        let (start, len) = (positions.start % self.capacity, positions.len());
        let first = len.min(self.capacity - start);
        let run = |start: usize, len: usize| {
            let at = kv_head * self.capacity + start;
            at..at + len
        };
        [run(start, first), run(0, len - first)]
    }

    /// Writes the keys and values of a pass, its latest tokens if not all fit, into their places.
    fn remember(&mut self, pass: &Pass<'_>) {
        let Attention { num_kv_heads, .. } = self.attention;
        for t in pass.tokens().saturating_sub(self.capacity)..pass.tokens() {
            for head in 0..num_kv_heads {
                let row = head * self.capacity + (pass.start + t) % self.capacity;
                self.keys.copy(row, &pass.keys, head * pass.tokens() + t);
                self.values.copy(row, &pass.values, head * pass.tokens() + t);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Mixer, ModelConfig};

    /// A layer of four query heads, two key-value heads and a window.
    fn attention(window: Option<usize>) -> Attention {
        let fields = json!({ "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16 });
        let config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().with(fields).unwrap();
        let Mixer::Attention(attention) = &config.layers[0].mixer;
        Attention { window, ..attention.clone() }
    }

    /// A layer remembers as many tokens as it sees, whatever the length of a pass.
    #[test]
    fn a_window_is_all_that_a_layer_remembers() {
        for (window, max_seq_len, positions) in [
            (None, 600, 600),
            (Some(1), 600, 1),
            (Some(5), 600, 5),
            (Some(100), 600, 100),
            (Some(600), 600, 600),
            (Some(700), 600, 600),
        ] {
            let attention = attention(window);
            let cached = Cached::new(&attention, max_seq_len, KvBits::Whole);
            let len = |rows: &Remembered| rows.read(0..2 * positions).len();
            assert_eq!((len(&cached.keys), len(&cached.values)), (positions * 32, positions * 32), "{window:?}");
            assert_eq!(Cached::bytes(&attention, max_seq_len, KvBits::Whole), 8 * positions * 32, "{window:?}");
            assert_eq!(Cached::bytes(&attention, max_seq_len, KvBits::Eight), 4 * positions * 20, "{window:?}");
        }
    }

    /// Read whole, seven tokens at once and token by token, a text leaves the same bits and has the same answers, also where
    /// a pass is longer than the window; with another window it does not.
    #[test]
    fn passes_of_any_length_leave_and_answer_the_same() {
        let (cpu, tokens) = (Cpu::new(), 61);
        let windows = [None, Some(1), Some(3), Some(7), Some(20), Some(61), Some(80)];
        for (window, bits) in windows.into_iter().flat_map(|window| [(window, KvBits::Whole), (window, KvBits::Eight)])
        {
            let read = |window, at_once: usize| {
                let attention = attention(window);
                let (width, out_width) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
                let qkv: Vec<f32> = (0..tokens * width).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
                let angles: Vec<[f32; 2]> = (0..tokens * 8).map(|i| (i as f32 / 9.0).sin_cos().into()).collect();
                let (mut cached, mut out) = (Cached::new(&attention, tokens, bits), vec![f32::NAN; tokens * out_width]);
                for (i, qkv) in qkv.chunks(at_once * width).enumerate() {
                    let start = i * at_once;
                    cached.attend(&cpu, Some(&angles), start, qkv, &mut out[start * out_width..]);
                }
                let words = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
                let rows = 2 * cached.capacity;
                [words(&cached.keys.read(0..rows)), words(&cached.values.read(0..rows)), words(&out)]
            };
            let one_by_one = read(window, 1);
            for at_once in [7, 16, tokens] {
                assert!(read(window, at_once) == one_by_one, "window {window:?}, {at_once} at once");
            }
            if let Some(window) = window.filter(|&window| window < tokens) {
                assert!(read(Some(window + 1), tokens)[2] != one_by_one[2], "a key more than {window} goes unseen");
            }
        }
    }
}
