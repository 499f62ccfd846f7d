//! The layer against an obvious one in f64.

use std::collections::BTreeSet;
use std::f64::consts::PI;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::json;

use super::super::attention::QUERY_BLOCK;
use super::super::calibrate::Activations;
use super::super::fixture::{self, layer, numbers};
use super::super::head::LmHead;
use super::*;
use crate::config::{Activation, FeedForward, NormPlacement, QkNorm, RopeScaling, families};
use crate::source::Source;

/// What attention puts out is wider than what enters.
fn config(sliding_window: Option<usize>) -> ModelConfig {
    let fields = json!({
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "head_dim": 8,
        "sliding_window": sliding_window,
    });
    fixture::config().with(fields).unwrap()
}

fn oracle_norm(h: &[f64], gamma: &[f32], eps: f32) -> Vec<f64> {
    let mean = h.iter().map(|x| x * x).sum::<f64>() / h.len() as f64;
    h.iter().zip(gamma).map(|(x, &g)| x / (mean + f64::from(eps)).sqrt() * f64::from(g)).collect()
}

fn oracle_apply(linear: &Affine, x: &[f64]) -> Vec<f64> {
    (0..linear.out_features)
        .map(|row| {
            let bias = linear.bias.as_ref().map_or(0.0, |b| f64::from(b[row]));
            bias + linear.row(row).iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>()
        })
        .collect()
}

/// The whole layer for one text `[tokens][hidden]`, returning its output and the input of `o`.
fn oracle(config: &ModelConfig, layer: &Layer, h: &[Vec<f64>]) -> Vec<(Vec<f64>, Vec<f64>)> {
    let Attention { num_heads, num_kv_heads, head_dim: d, rope, window, qk_norm, scale, softcap, query_scaling } =
        *layer.config.attention();
    let (q_dim, kv_dim) = (num_heads * d, num_kv_heads * d);
    let norm = |x: &[f64], n| oracle_norm(x, layer.norm(n), config.rms_norm_eps);
    let before = |x: &[f64], n| if layer.config.norms == NormPlacement::After { x.to_vec() } else { norm(x, n) };
    let after = |x: Vec<f64>, n| if layer.config.norms == NormPlacement::Before { x } else { norm(&x, n) };
    // As it is without being divided.
    let multiplier = config.residual_multiplier;
    let h: Vec<Vec<f64>> = h.iter().map(|h| h.iter().map(|x| multiplier * x).collect()).collect();
    let add = |h: &[f64], x: &[f64]| -> Vec<f64> { h.iter().zip(x).map(|(h, x)| h + multiplier * x).collect() };
    let qkv: Vec<Vec<f64>> = h
        .iter()
        .enumerate()
        .map(|(position, row)| {
            let mut qkv = oracle_apply(&layer.linears[0], &before(row, LayerNorm::AttentionInput));
            for (part, n) in [(0..q_dim, LayerNorm::Query), (q_dim..q_dim + kv_dim, LayerNorm::Key)] {
                let width = match qk_norm {
                    None => continue,
                    Some(QkNorm::PerHead) => d,
                    Some(QkNorm::WholeRow) => part.len(),
                };
                qkv[part].chunks_exact_mut(width).for_each(|x| x.copy_from_slice(&norm(x, n)));
            }
            let Some(rope) = rope.map(|rope| &config.ropes[rope]) else { return qkv };
            let factor =
                if let RopeScaling::Yarn { attention_factor, .. } = rope.scaling { attention_factor } else { 1.0 };
            for head in 0..num_heads + num_kv_heads {
                for (i, &f) in rope.frequencies(h.len()).iter().enumerate() {
                    let (sin, cos) = (position as f64 * f).sin_cos();
                    let (a, b) = (qkv[head * d + i], qkv[head * d + i + d / 2]);
                    qkv[head * d + i] = factor * (a * cos - b * sin);
                    qkv[head * d + i + d / 2] = factor * (b * cos + a * sin);
                }
            }
            qkv
        })
        .collect();
    (0..h.len())
        .map(|t| {
            let start = window.map_or(0, |w| (t + 1).saturating_sub(w));
            let growth = query_scaling.map_or(1.0, |s| 1.0 + s.beta * (1.0 + (t / s.original) as f64).ln());
            let mut attended = vec![0.0; q_dim];
            for head in 0..num_heads {
                let kv = head / (num_heads / num_kv_heads) * d;
                let score = |s: usize| -> f64 {
                    let score: f64 = (0..d).map(|i| qkv[t][head * d + i] * qkv[s][q_dim + kv + i]).sum();
                    softcap.map_or(score * growth * scale, |cap| cap * (score * growth * scale / cap).tanh())
                };
                let weights: Vec<f64> = (start..=t).map(|s| score(s).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (s, weight) in (start..=t).zip(&weights) {
                    for i in 0..d {
                        attended[head * d + i] += weight / sum * qkv[s][q_dim + kv_dim + kv + i];
                    }
                }
            }
            let o = after(oracle_apply(&layer.linears[1], &attended), LayerNorm::AttentionOutput);
            let h = add(&h[t], &o);
            let gate_up = oracle_apply(&layer.linears[2], &before(&h, LayerNorm::FeedForwardInput));
            let (gate, up) = gate_up.split_at(layer.config.intermediate_size());
            let FeedForward::Dense { activation, .. } = layer.config.feed_forward;
            let activation = |g: f64| match activation {
                Activation::Silu => g / (1.0 + (-g).exp()),
                Activation::GeluTanh => g / 2.0 * (1.0 + ((2.0 / PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh()),
            };
            let inner: Vec<f64> = gate.iter().zip(up).map(|(&g, u)| activation(g) * u).collect();
            let down = after(oracle_apply(&layer.linears[3], &inner), LayerNorm::FeedForwardOutput);
            (add(&h, &down).iter().map(|x| x / multiplier).collect(), attended)
        })
        .collect()
}

/// The largest difference between `h` and the oracle, over the largest value.
fn difference(got: &[f32], want: impl Iterator<Item = f64>) -> f64 {
    let want: Vec<f64> = want.collect();
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    got.iter().zip(&want).fold(0.0, |m: f64, (&g, w)| m.max((f64::from(g) - w).abs())) / largest
}

#[test]
fn a_layer_is_what_the_formulas_say() {
    // More tokens than a block of queries, two texts, with and without a window.
    let (texts, tokens) = (2, QUERY_BLOCK + 9);
    for window in [None, Some(5)] {
        let config = config(window);
        let layer = layer(&config, 0.4);
        let ropes = Ropes::new(&config, tokens);
        let start = numbers(11, texts * tokens * config.hidden_size, 1.0);
        let rows: Vec<Vec<f64>> =
            start.chunks(config.hidden_size).map(|h| h.iter().map(|&x| f64::from(x)).collect()).collect();
        let want: Vec<_> = rows.chunks(tokens).flat_map(|text| oracle(&config, &layer, text)).collect();
        let mut h = start.clone();
        let mut cache = fixture::cache(&layer, texts, tokens);
        let inputs = fixture::forward(&config, &layer, &ropes, &mut cache, texts, &mut h);
        // Six sums of at most 41 terms follow each other; every one of them loses 2^-24 of its size per term,
        // and cancellation costs no more than a factor of 16 here.
        let tolerance = 16.0 * 6.0 * 41.0 * (2f64).powi(-24);
        assert!(difference(&h, want.iter().flat_map(|w| w.0.clone())) < tolerance);
        assert!(difference(&inputs[1], want.iter().flat_map(|w| w.1.clone())) < tolerance);

        let other = config.with(json!({ "rope_theta": 101.0 })).unwrap();
        let mut h = start.clone();
        let mut cache = fixture::cache(&layer, texts, tokens);
        fixture::forward(&other, &layer, &Ropes::new(&other, tokens), &mut cache, texts, &mut h);
        assert!(difference(&h, want.iter().flat_map(|w| w.0.clone())) > tolerance, "a wrong angle must show");
    }
}

/// Whatever a family does, the layer is what its formulas say, and not what another's say.
#[test]
fn layers_of_all_families_are_what_their_formulas_say() {
    let (texts, tokens) = (2, 20);
    let start = numbers(11, texts * tokens * 24, 1.0);
    let rows: Vec<Vec<f64>> = start.chunks(24).map(|h| h.iter().map(|&x| f64::from(x)).collect()).collect();
    let run = |(name, config): (&'static str, ModelConfig)| {
        let layer = layer(&config, 0.4);
        let want: Vec<f64> =
            rows.chunks(tokens).flat_map(|text| oracle(&config, &layer, text)).flat_map(|(h, _)| h).collect();
        let mut h = start.clone();
        let mut cache = fixture::cache(&layer, texts, tokens);
        fixture::forward(&config, &layer, &Ropes::new(&config, tokens), &mut cache, texts, &mut h);
        (name, h, want)
    };
    let runs: Vec<_> = fixture::variants(&config(None)).into_iter().map(run).collect();
    // As above, with up to four norms more, each a sum of at most 48 terms.
    let tolerance = 16.0 * 10.0 * 48.0 * (2f64).powi(-24);
    for (name, h, _) in &runs {
        for (formula, _, want) in &runs {
            let difference = difference(h, want.iter().copied());
            assert_eq!(difference < tolerance, name == formula, "{name} is off by {difference} from {formula}");
        }
    }
}

/// The logits of models of all families, whole, are those of transformers (`tests/data/models`), within and beyond the
/// windows of their attention and the contexts of their first training.
#[test]
fn whole_models_say_what_transformers_says() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models");
    let directories = fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let mut met = BTreeSet::new();
    for directory in directories {
        let dir = tempfile::tempdir().unwrap();
        let no_words = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;
        fs::write(dir.path().join("tokenizer.json"), no_words).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(directory.join(file), dir.path().join(file)).unwrap();
        }
        let source = Source::open(dir.path()).unwrap();
        met.insert(source.config().family.name);
        let bytes = fs::read(directory.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        for [ids, logits] in [["ids", "logits"], ["long_ids", "long_logits"]] {
            let Ok(ids) = expected.tensor(ids) else { continue };
            let ids: Vec<u32> = bytemuck::pod_collect_to_vec(ids.data());
            let want: Vec<f32> = bytemuck::pod_collect_to_vec(expected.tensor(logits).unwrap().data());
            let got = whole_model(&source, &ids);
            let off = difference(&got[got.len() - want.len()..], want.iter().map(|&x| f64::from(x)));
            // Both in f32, in other orders: 2^-24 grows to some 10^-6 of the largest logit in two to six layers.
            assert!(off < 2e-5, "{}, {logits}: {off}", directory.display());
            let mut other = ids.clone();
            *other.last_mut().unwrap() ^= 1;
            let got = whole_model(&source, &other);
            let off = difference(&got[got.len() - want.len()..], want.iter().map(|&x| f64::from(x)));
            assert!(off > 2e-5, "{}, {logits}: another token does not show", directory.display());
        }
    }
    assert_eq!(met, families::ALL.iter().map(|family| family.name).collect());
}

/// Logits of every one of `ids`, `[ids, vocab_size]`.
fn whole_model(weights: &dyn ModelWeights, ids: &[u32]) -> Vec<f32> {
    let (config, ropes) = (weights.config(), Ropes::new(weights.config(), ids.len()));
    let (embedding, head) = (weights.embedding().unwrap(), weights.head().unwrap());
    let mut h = Activations::embed(config, &embedding, ids, ids.len()).unwrap().h;
    for index in 0..config.layers.len() {
        let layer = Layer::read(weights, index).unwrap();
        let mut cache = fixture::cache(&layer, 1, ids.len());
        fixture::forward(config, &layer, &ropes, &mut cache, 1, &mut h);
    }
    LmHead::new(weights, head.as_ref().unwrap_or(&embedding)).unwrap().logits(&h)
}

/// Forth by exact angles, and back to where it was.
#[test]
fn rotations_are_exact_far_out() {
    let position = 131_071;
    let config = config(None).with(json!({ "rope_theta": 500_000.0 })).unwrap();
    let ropes = Ropes::new(&config, position + 1);
    let attention = config.layers[0].attention();
    let half = attention.head_dim / 2;
    let start = numbers(5, attention.head_dim, 1.0);
    let rotated = |angle: &dyn Fn(f64) -> f64| {
        let turn = |i: usize| angle(config.ropes[0].frequencies(position + 1)[i % half]).sin_cos();
        let number = |i: usize| f64::from(start[i]);
        let first = (0..half).map(|i| number(i) * turn(i).1 - number(i + half) * turn(i).0);
        first.chain((half..2 * half).map(|i| number(i) * turn(i).1 + number(i - half) * turn(i).0)).collect::<Vec<_>>()
    };
    let mut head = start.clone();
    ropes.rotate(attention, &mut head, position);
    // Two products and a sum of numbers of about 1, and a rounded cosine and sine.
    let tolerance = 8.0 * 2f64.powi(-24);
    assert!(difference(&head, rotated(&|f| position as f64 * f).into_iter()) < tolerance);
    let of_f32 = difference(&head, rotated(&|f| f64::from(position as f32 * f as f32)).into_iter());
    assert!(of_f32 > 4.0 * tolerance, "angles of f32 would go unseen: {of_f32}");
    ropes.rotate_back(attention, &mut head, position);
    assert!(difference(&head, start.iter().map(|&x| f64::from(x))) < tolerance);
}

#[test]
fn one_token_at_a_time_is_the_same() {
    let config = config(Some(7));
    let (layer, texts, tokens) = (layer(&config, 0.4), 3, 20);
    let ropes = Ropes::new(&config, tokens);
    let hidden = config.hidden_size;
    let start = numbers(3, texts * tokens * hidden, 1.0);
    let mut whole = start.clone();
    fixture::forward(&config, &layer, &ropes, &mut fixture::cache(&layer, texts, tokens), texts, &mut whole);
    let mut cache = fixture::cache(&layer, texts, tokens + 4);
    for step in 0..tokens {
        let at = |text: usize| (text * tokens + step) * hidden;
        let mut h: Vec<f32> = (0..texts).flat_map(|text| start[at(text)..at(text) + hidden].to_vec()).collect();
        fixture::forward(&config, &layer, &ropes, &mut cache, texts, &mut h);
        for (text, h) in h.chunks(hidden).enumerate() {
            let want = &whole[at(text)..at(text) + hidden];
            let difference = difference(h, want.iter().map(|&x| f64::from(x)));
            assert!(difference < 1e-4, "text {text}, token {step}: {difference}");
        }
    }
}
