//! The layer against an obvious one in f64.

use serde_json::json;

use super::super::fixture::{self, layer, numbers};
use super::*;

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
    let Attention { num_heads, num_kv_heads, head_dim: d, window, .. } = *layer.config.attention();
    let (q_dim, kv_dim) = (num_heads * d, num_kv_heads * d);
    let frequencies = config.ropes[0].frequencies(h.len());
    let qkv: Vec<Vec<f64>> = h
        .iter()
        .enumerate()
        .map(|(position, h)| {
            let x = oracle_norm(h, layer.norm(LayerNorm::AttentionInput), config.rms_norm_eps);
            let mut qkv = oracle_apply(&layer.linears[0], &x);
            for head in 0..num_heads + num_kv_heads {
                for (i, &f) in frequencies.iter().enumerate() {
                    let (sin, cos) = (position as f64 * f).sin_cos();
                    let (a, b) = (qkv[head * d + i], qkv[head * d + i + d / 2]);
                    qkv[head * d + i] = a * cos - b * sin;
                    qkv[head * d + i + d / 2] = b * cos + a * sin;
                }
            }
            qkv
        })
        .collect();
    (0..h.len())
        .map(|t| {
            let start = window.map_or(0, |w| (t + 1).saturating_sub(w));
            let mut attended = vec![0.0; q_dim];
            for head in 0..num_heads {
                let kv = head / (num_heads / num_kv_heads) * d;
                let score = |s: usize| -> f64 {
                    (0..d).map(|i| qkv[t][head * d + i] * qkv[s][q_dim + kv + i]).sum::<f64>() / (d as f64).sqrt()
                };
                let weights: Vec<f64> = (start..=t).map(|s| score(s).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (s, weight) in (start..=t).zip(&weights) {
                    for i in 0..d {
                        attended[head * d + i] += weight / sum * qkv[s][q_dim + kv_dim + kv + i];
                    }
                }
            }
            let o = oracle_apply(&layer.linears[1], &attended);
            let h: Vec<f64> = h[t].iter().zip(&o).map(|(h, o)| h + o).collect();
            let gate_up = oracle_apply(
                &layer.linears[2],
                &oracle_norm(&h, layer.norm(LayerNorm::FeedForwardInput), config.rms_norm_eps),
            );
            let (gate, up) = gate_up.split_at(layer.config.intermediate_size());
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let down = oracle_apply(&layer.linears[3], &inner);
            (h.iter().zip(&down).map(|(h, d)| h + d).collect(), attended)
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
        let mut cache = KvCache::new(&config.layers[0], texts, tokens);
        let inputs = forward(&config, &layer, &ropes, &mut cache, texts, &mut h);
        // Six sums of at most 41 terms follow each other; every one of them loses 2^-24 of its size per term,
        // and cancellation costs no more than a factor of 16 here.
        let tolerance = 16.0 * 6.0 * 41.0 * (2f64).powi(-24);
        assert!(difference(&h, want.iter().flat_map(|w| w.0.clone())) < tolerance);
        assert!(difference(&inputs[1], want.iter().flat_map(|w| w.1.clone())) < tolerance);

        let other = config.with(json!({ "rope_theta": 101.0 })).unwrap();
        let mut h = start.clone();
        let mut cache = KvCache::new(&other.layers[0], texts, tokens);
        forward(&other, &layer, &Ropes::new(&other, tokens), &mut cache, texts, &mut h);
        assert!(difference(&h, want.iter().flat_map(|w| w.0.clone())) > tolerance, "a wrong angle must show");
    }
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
    forward(&config, &layer, &ropes, &mut KvCache::new(&config.layers[0], texts, tokens), texts, &mut whole);
    let mut cache = KvCache::new(&config.layers[0], texts, tokens + 4);
    for step in 0..tokens {
        let at = |text: usize| (text * tokens + step) * hidden;
        let mut h: Vec<f32> = (0..texts).flat_map(|text| start[at(text)..at(text) + hidden].to_vec()).collect();
        forward(&config, &layer, &ropes, &mut cache, texts, &mut h);
        for (text, h) in h.chunks(hidden).enumerate() {
            let want = &whole[at(text)..at(text) + hidden];
            let difference = difference(h, want.iter().map(|&x| f64::from(x)));
            assert!(difference < 1e-4, "text {text}, token {step}: {difference}");
        }
    }
}
