//! Attention of layers that differ, against an oracle in f64 that knows what the cache holds.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails. The CPU's attention is held against the same
//! oracle wherever the tests run.

mod cuda_common;

use cuda_common::{Noise, cuda, options};
use decdec::backend::cpu::Cpu;
use decdec::backend::cuda::Dtype;
use decdec::backend::{DecodeBackend, GemvBackend, KvBits, Rows};
use decdec::config::{Attention, Mixer, ModelConfig, Pairing, QueryScaling, Rope, RopeScaling};
use decdec::sampling::Sampling;
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::json;

/// Query heads, key-value heads and the width of a head: each group of queries that a family has, each width, and some
/// that tensor cores do not take.
const SHAPES: [(usize, usize, usize); 16] = [
    (2, 2, 64),
    (4, 2, 256),
    (3, 1, 128),
    (8, 2, 128),
    (5, 1, 128),
    (6, 1, 64),
    (7, 1, 128),
    (8, 1, 256),
    (16, 1, 128),
    (3, 3, 96),
    (10, 2, 96),
    (4, 1, 80),
    (4, 2, 32),
    (14, 2, 16),
    (4, 2, 8),
    (12, 2, 40),
];

const MAX_SEQ_LEN: usize = 1300;

/// The layers of a model of these heads. Those with a window remember as much (in tiles of 16 on CUDA) and no more: texts go
/// round that ring many times.
fn layers((num_heads, num_kv_heads, head_dim): (usize, usize, usize), noise: &mut Noise) -> Vec<Attention> {
    let plain = Attention {
        num_heads,
        num_kv_heads,
        head_dim,
        rope: Some(0),
        window: None,
        qk_norm: None,
        scale: (head_dim as f64).powf(-0.5),
        softcap: None,
        query_scaling: None,
    };
    let scaling = QueryScaling { beta: 0.3, original: 50 + noise.below(100) };
    vec![
        plain.clone(),
        Attention { window: Some(2 + noise.below(40)), rope: Some(1), ..plain.clone() },
        Attention { rope: None, query_scaling: Some(scaling), scale: 0.7 * plain.scale, ..plain.clone() },
        Attention {
            window: Some(41 + noise.below(160)),
            softcap: Some(2.0 + 8.0 * f64::from(noise.uniform())),
            scale: 1.5 * plain.scale,
            ..plain.clone()
        },
        // A ring without a place to spare.
        Attention { window: Some(16 * (1 + noise.below(4))), ..plain.clone() },
        Attention { window: Some(1), ..plain },
    ]
}

/// What each of [`layers`] is not: the comparison has to notice.
fn mistaken(layer: usize, right: &Attention) -> Vec<(&'static str, Attention)> {
    let window = |by: usize| right.window.map(|window| window + 1 - by);
    match layer {
        0 => vec![("no rotation", Attention { rope: None, ..right.clone() })],
        1 => vec![
            ("one token more", Attention { window: window(0), ..right.clone() }),
            ("another rotation", Attention { rope: Some(0), ..right.clone() }),
        ],
        2 => vec![
            ("queries that do not grow", Attention { query_scaling: None, ..right.clone() }),
            ("another scale", Attention { scale: 1.03 * right.scale, ..right.clone() }),
        ],
        3 => vec![
            ("one token less", Attention { window: window(2), ..right.clone() }),
            ("no cap", Attention { softcap: None, ..right.clone() }),
        ],
        4 => vec![
            ("one token more", Attention { window: window(0), ..right.clone() }),
            ("one token less", Attention { window: window(2), ..right.clone() }),
        ],
        _ => vec![("one token more", Attention { window: window(0), ..right.clone() })],
    }
}

fn model(attentions: &[Attention]) -> ModelConfig {
    let Attention { num_heads, num_kv_heads, head_dim, .. } = attentions[0];
    let mut config = ModelConfig::from_json(&json!({
        "model_type": "mistral",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": attentions.len(),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": 100,
        "rms_norm_eps": 1e-5,
        "sliding_window": null,
        "max_position_embeddings": MAX_SEQ_LEN,
    }))
    .expect("a configuration");
    let rope = |theta, scaling| Rope { head_dim, rotary_dim: head_dim, pairing: Pairing::Halves, theta, scaling };
    config.ropes = vec![rope(1e4, RopeScaling::None), rope(1e6, RopeScaling::Linear { factor: 8.0 })];
    for (layer, attention) in config.layers.iter_mut().zip(attentions) {
        layer.mixer = Mixer::Attention(attention.clone());
    }
    config
}

/// Single tokens at the end of every text.
const LAST: usize = 12;

/// How a text comes: single tokens, the longest pass, passes of any length, single tokens; longer than any ring.
fn passes(noise: &mut Noise, longest: usize) -> Vec<usize> {
    let mut passes = vec![1, 1, 1, 15, 1, longest];
    passes.extend([1; 5]);
    while passes.iter().sum::<usize>() < 1100 {
        passes.extend([2 + noise.below(160), 1, 1]);
    }
    passes.extend([1; LAST]);
    passes
}

/// A text of `len` tokens in other passes: seven at once, then for longer than any window token by token.
fn other_passes(len: usize) -> Vec<usize> {
    let sevens = (len - LAST - 220) / 7;
    let mut passes = vec![7; sevens];
    passes.extend(vec![1; len - 7 * sevens]);
    passes
}

/// What a type makes of a number of which no more is known than that it is within `slack`: the middle, and how far that may
/// be off.
fn stored(value: f64, slack: f64, dtype: Dtype) -> (f64, f64) {
    // By way of f32, as on the device: the crate's own way from f64 to bfloat16 cuts the number off first.
    let round = |v: f64| match dtype {
        Dtype::Float16 => f16::from_f32(v as f32).to_f64(),
        Dtype::Bfloat16 => bf16::from_f32(v as f32).to_f64(),
        Dtype::Float32 => v,
    };
    let (low, high) = (round(value - slack), round(value + slack));
    ((low + high) / 2.0, (high - low) / 2.0)
}

/// The queries, keys and values of a text in one layer.
struct Text<'a> {
    attention: &'a Attention,
    table: Option<Vec<[f32; 2]>>,
    qkv: &'a [f32], // [tokens, qkv_rows]
    dtype: Dtype,
    keys: Vec<(f64, f64)>, // [tokens, num_kv_heads, head_dim] as stored, and how far they may be off
    values: Vec<(f64, f64)>, // the same
    passes: Option<&'a [usize]>, // a pass replaces what windows remember before it is attended to: an error
}

impl<'a> Text<'a> {
    fn new(config: &ModelConfig, attention: &'a Attention, qkv: &'a [f32], dtype: Dtype) -> Self {
        let table = attention.rope.map(|rope| config.ropes[rope].table(MAX_SEQ_LEN));
        let mut text = Self { attention, table, qkv, dtype, keys: Vec::new(), values: Vec::new(), passes: None };
        let Attention { num_heads, num_kv_heads, .. } = *attention;
        for t in 0..qkv.len() / attention.qkv_rows() {
            for kv in num_heads..num_heads + num_kv_heads {
                let key = text.rotated(t, kv);
                text.keys.extend(key.into_iter().map(|(k, slack)| stored(k, slack, dtype)));
                let value = text.head(t, kv + num_kv_heads);
                text.values.extend(value.iter().map(|&v| stored(f64::from(v), 0.0, dtype)));
            }
        }
        text
    }

    fn head(&self, t: usize, head: usize) -> &'a [f32] {
        let dim = self.attention.head_dim;
        &self.qkv[t * self.attention.qkv_rows() + head * dim..][..dim]
    }

    /// A head, rotated, and how far f32 may be off: two products and their sum are rounded, on both sides.
    fn rotated(&self, t: usize, head: usize) -> Vec<(f64, f64)> {
        let x = self.head(t, head);
        let Some(table) = &self.table else { return x.iter().map(|&x| (f64::from(x), 0.0)).collect() };
        let half = x.len() / 2;
        let turned = |i: usize| {
            let [cos, sin] = table[t * half + i % half].map(f64::from);
            let (own, other) = (f64::from(x[i]) * cos, f64::from(x[(i + half) % x.len()]) * sin);
            (if i < half { own - other } else { own + other }, 2f64.powi(-22) * (own.abs() + other.abs()))
        };
        (0..x.len()).map(turned).collect()
    }

    /// The positions whose keys and values token `t` finds.
    fn seen(&self, t: usize) -> Vec<usize> {
        let window = self.attention.window.unwrap_or(usize::MAX);
        let seen = (t + 1).saturating_sub(window)..t + 1;
        let Some(passes) = self.passes else { return seen.collect() };
        let mut end = 0;
        let mut passes = passes.iter();
        while end <= t {
            end += passes.next().expect("a pass");
        }
        seen.map(|p| end - 1 - (end - 1 - p) % window).collect()
    }

    /// What head `h` of token `t` attends to, and how far each number may be off.
    fn attended(&self, t: usize, h: usize) -> Vec<(f64, f64)> {
        let Attention { num_heads, num_kv_heads, head_dim: dim, softcap, .. } = *self.attention;
        let kv = h / (num_heads / num_kv_heads);
        let seen = self.seen(t);
        let at = |p: usize| (p * num_kv_heads + kv) * dim..(p * num_kv_heads + kv + 1) * dim;
        // attend_tensor.cuh says what is lost where queries and weights are divided into two.
        let (split, small) = match self.dtype {
            Dtype::Float16 => (2f64.powi(-23), 2f64.powi(-25)),
            Dtype::Bfloat16 => (2f64.powi(-17), 0.0),
            Dtype::Float32 => (0.0, 0.0),
        };
        let unit = 2f64.powi(-24);
        let scale = self.attention.scale_at(t);
        let query = self.rotated(t, h).into_iter().map(|(q, slack)| {
            let (q, slack) = (scale * q, scale * slack);
            // The scale, its growth with the position and the product are rounded.
            (q, slack + (8.0 * unit + split) * q.abs() + small)
        });
        let query: Vec<_> = query.collect();
        let score = |p: usize| {
            let (mut sum, mut size, mut off) = (0.0, 0.0, 0.0);
            for (&(q, q_off), &(k, k_off)) in query.iter().zip(&self.keys[at(p)]) {
                sum += q * k;
                size += (q * k).abs();
                off += q_off * k.abs() + q.abs() * k_off;
            }
            // A sum in f32 of at most two products for each dimension; a cap is a few roundings of its size more.
            off += 2.0 * (2 * dim + 8) as f64 * unit * size;
            match softcap {
                Some(cap) => (cap * (sum / cap).tanh(), off + 8.0 * unit * cap),
                None => (sum, off),
            }
        };
        let scores: Vec<_> = seen.iter().map(|&p| score(p)).collect();
        let largest = scores.iter().map(|s| s.0).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<_> = scores.iter().map(|s| (s.0 - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        // Exponentials of a difference x are good to 2 + |x| units; a weight is scaled again whenever its part of the text
        // meets a larger score, and added to at most all others.
        let (count, deepest) = (scores.len(), scores.iter().map(|s| largest - s.0).fold(0.0, f64::max));
        let sums = (2.0 * (count + 64) as f64 + 4.0 * (count / 16 + 8) as f64 + 4.0 * deepest) * unit + split;
        let (mut out, mut all) = (vec![(0.0, 0.0); dim], 0.0);
        for ((p, weight), (_, off)) in seen.into_iter().zip(weights).zip(scores) {
            let share = weight / total;
            let off = share * (1.1 * off + sums);
            all += off;
            for (out, &(v, _)) in out.iter_mut().zip(&self.values[at(p)]) {
                out.0 += share * v;
                out.1 += off * v.abs();
            }
        }
        // The sum of all weights is off as they are.
        out.iter_mut().for_each(|out| out.1 += all * out.0.abs() + 1e-30);
        out
    }

    /// Where `got` `[tokens, num_heads · head_dim]` leaves what is wanted of these tokens; `None` where it never does.
    fn misfit(&self, got: &[f32], tokens: &[usize]) -> Option<String> {
        let Attention { num_heads, head_dim, .. } = *self.attention;
        tokens.par_iter().find_map_any(|&t| {
            (0..num_heads).find_map(|h| {
                let got = &got[(t * num_heads + h) * head_dim..][..head_dim];
                got.iter().zip(self.attended(t, h)).enumerate().find_map(|(i, (&got, (want, most)))| {
                    let fits = (f64::from(got) - want).abs() <= most;
                    (!fits).then(|| format!("token {t}, head {h}, {i}: {got}, {want} ± {most:e} expected"))
                })
            })
        })
    }
}

/// All layers of a model over one text: what each put out for every token, `[tokens, num_heads · head_dim]`.
fn run<B: DecodeBackend>(backend: &B, config: &ModelConfig, texts: &[Vec<f32>], passes: &[usize]) -> Vec<Vec<f32>> {
    let mut cache = backend.cache(config, 1, MAX_SEQ_LEN, KvBits::Whole).unwrap();
    backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
    let mut all = vec![Vec::new(); texts.len()];
    let mut start = 0;
    for &tokens in passes {
        let pass = [Rows { slot: 0, position: start, count: tokens }];
        for (layer, text) in texts.iter().enumerate() {
            let attention = config.layers[layer].attention();
            let (rows, width) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
            let mut qkv = backend.vector(tokens * rows).unwrap();
            backend.write(&text[start * rows..(start + tokens) * rows], &mut qkv).unwrap();
            let mut attend = || {
                let mut out = backend.vector(tokens * width).unwrap();
                // Every number must be overwritten.
                backend.write(&vec![f32::NAN; tokens * width], &mut out).unwrap();
                backend.attend(&mut cache, layer, &pass, &qkv, &mut out).unwrap();
                let mut got = vec![0f32; tokens * width];
                backend.read(&out, &mut got).unwrap();
                got
            };
            let got = attend();
            if tokens == 1 {
                assert_eq!(got, attend(), "token {start} of layer {layer}: another time, other bits");
            }
            all[layer].extend(got);
        }
        backend.advance(&mut cache, &pass).unwrap();
        start += tokens;
    }
    all
}

/// Every single token, and of each longer pass the ends and some between them.
fn looked_at(passes: &[usize], noise: &mut Noise) -> Vec<usize> {
    let mut start = 0;
    let mut tokens = Vec::new();
    for &pass in passes {
        tokens.extend([start, start + pass - 1]);
        tokens.extend((0..if pass > 1 { 4 } else { 0 }).map(|_| start + noise.below(pass)));
        start += pass;
    }
    tokens.dedup();
    tokens
}

fn check<B: DecodeBackend>(backend: &B, dtype: Dtype, shape: (usize, usize, usize), seed: u64) {
    let mut noise = Noise::new(seed);
    let attentions = layers(shape, &mut noise);
    let config = model(&attentions);
    let passes = passes(&mut noise, backend.device().max_tokens.min(512));
    let len: usize = passes.iter().sum();
    let texts: Vec<Vec<f32>> = attentions
        .iter()
        .map(|attention| (0..len * attention.qkv_rows()).map(|_| 3.0 * noise.uniform() - 1.5).collect())
        .collect();
    let width = |layer: usize| attentions[layer].num_heads * attentions[layer].head_dim;
    let all = run(backend, &config, &texts, &passes);
    // What layers remember does not depend on how a text came, to the bit: neither do answers to its last tokens.
    let again = run(backend, &config, &texts, &other_passes(len));
    let tokens = looked_at(&passes, &mut noise);
    for (layer, (got, qkv)) in all.iter().zip(&texts).enumerate() {
        let what = format!("{dtype:?}, {shape:?}, {:?}", attentions[layer]);
        assert_eq!(Text::new(&config, &attentions[layer], qkv, dtype).misfit(got, &tokens), None, "{what}");
        for (mistake, wrong) in mistaken(layer, &attentions[layer]) {
            let last = &tokens[tokens.len() - 8..];
            let misfit = Text::new(&config, &wrong, qkv, dtype).misfit(got, last);
            assert!(misfit.is_some(), "{what}: {mistake} goes unseen");
        }
        if attentions[layer].window.is_some() {
            let wrong = Text { passes: Some(&passes), ..Text::new(&config, &attentions[layer], qkv, dtype) };
            assert!(wrong.misfit(got, &tokens).is_some(), "{what}: tokens replaced too early go unseen");
        }
        let last = |all: &[f32]| all[(len - LAST) * width(layer)..].iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        assert!(last(got) == last(&again[layer]), "{what}: seven tokens at once leave something else");
    }
}

fn on_cuda(dtype: Dtype) {
    let Some(cuda) = cuda(options(dtype, 2)) else { return };
    // All kernels at once, on all cores: one after the other they would take a minute.
    let every_kernel = &mut || -> anyhow::Result<()> {
        for shape in SHAPES {
            let attentions = layers(shape, &mut Noise::new(1));
            let mut cache = cuda.cache(&model(&attentions), 1, 16, KvBits::Whole)?;
            cuda.begin(&mut cache, 0, &Sampling::GREEDY, &[])?;
            let (qkv, mut out) = (cuda.vector(2 * attentions[0].qkv_rows())?, cuda.vector(2 * shape.0 * shape.2)?);
            [1, 2].into_iter().try_for_each(|count| {
                cuda.attend(&mut cache, 0, &[Rows { slot: 0, position: 0, count }], &qkv, &mut out)
            })?;
        }
        Ok(())
    };
    cuda.prepare(every_kernel).unwrap();
    for (i, &shape) in SHAPES.iter().enumerate() {
        check(&cuda, dtype, shape, 100 + i as u64);
    }
    assert!(!cuda.went_beyond());
}

#[test]
fn attention_in_float16() {
    on_cuda(Dtype::Float16);
}

#[test]
fn attention_in_bfloat16() {
    on_cuda(Dtype::Bfloat16);
}

#[test]
fn attention_in_float32() {
    on_cuda(Dtype::Float32);
}

/// The oracle and the CPU, written apart, agree.
#[test]
fn the_cpu_attends_as_the_oracle_does() {
    for (i, shape) in [(4, 2, 16), (5, 1, 24)].into_iter().enumerate() {
        check(&Cpu::new(), Dtype::Float32, shape, 50 + i as u64);
    }
}
