//! What families add to Llama's layer, operation by operation: other gates, norms of queries and keys and behind a
//! branch, caps, and attention that differs from layer to layer.

use decdec::backend::{Feed, GemvBackend, Input, Norm, Product};
use decdec::config::{Activation, Attention, FeedForward, LayerConfig, Mixer, ModelConfig, NormPlacement};
use decdec::config::{Pairing, QkNorm, QueryScaling, Rope, RopeScaling};
use decdec::sampling::Sampling;
use decdec::weights::{Linear, Weight};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;

use crate::UnderTest;
use crate::common::{self, Stored, oracle};

const BOTH: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

fn upload<B: GemvBackend>(backend: &B, values: &[f32]) -> B::Vector {
    let mut vector = backend.vector(values.len()).unwrap();
    backend.write(values, &mut vector).unwrap();
    vector
}

fn download<B: GemvBackend>(backend: &B, vector: &B::Vector, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    backend.read(vector, &mut out).unwrap();
    out
}

fn exact(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn norm_of<B: GemvBackend>(backend: &B, gamma: &[f32], eps: f32) -> Norm<B::Vector> {
    Norm { gamma: upload(backend, gamma), len: gamma.len(), eps }
}

/// Plain attention without a rotation.
fn attention(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Attention {
    let scale = 1.0 / (head_dim as f64).sqrt();
    Attention {
        num_heads,
        num_kv_heads,
        head_dim,
        rope: None,
        window: None,
        qk_norm: None,
        scale,
        softcap: None,
        query_scaling: None,
    }
}

fn rope(theta: f64, head_dim: usize) -> Rope {
    Rope { head_dim, rotary_dim: head_dim, pairing: Pairing::Halves, theta, scaling: RopeScaling::None }
}

/// A model of these attentions, of which only they are used.
fn model(attentions: &[Attention], ropes: Vec<Rope>) -> ModelConfig {
    let fields = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": true,
    });
    let layer = |attention: &Attention| LayerConfig {
        mixer: Mixer::Attention(attention.clone()),
        feed_forward: FeedForward::Dense { intermediate_size: 128, activation: Activation::Silu },
        norms: NormPlacement::Before,
    };
    let layers = attentions.iter().map(layer).collect();
    ModelConfig { layers, ropes, ..ModelConfig::from_json(&fields).unwrap() }
}

/// Runs `body` on cases that are the same every time.
fn any<S: Strategy>(cases: u32, strategy: &S, body: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let run = |case| {
        body(case);
        Ok(())
    };
    runner.run(strategy, run).unwrap_or_else(|error| panic!("{error}"));
}

pub(crate) fn embedding_scale<B: UnderTest>(backend: &B) {
    let sequence = backend.sequence(&model(&[attention(4, 2, 16)], Vec::new()), 16).unwrap();
    for stored in Stored::ALL {
        let weight = common::dense(3, 72, 50, stored);
        let Weight::Dense(table) = &weight else { unreachable!() };
        let rows = table.values.to_f32().into_owned();
        let matrix = backend.matrix(&Linear::plain(weight.clone())).unwrap();
        let mut h = backend.vector(2 * 72).unwrap();
        for scale in [1.0, 72f32.sqrt(), 12.0 / 0.22] {
            backend.embed(&sequence, &matrix, scale, Input::Prompt(&[49, 50]), &mut h).unwrap();
            let got = download(backend, &h, 2 * 72);
            // One product, rounded once.
            let want: Vec<f32> = rows[49 * 72..].iter().map(|x| scale * x).collect();
            assert_eq!(got[..72], want, "{stored:?} times {scale}");
            assert!(got[72..].iter().all(|h| h.is_nan()), "there is no row 50");
        }
    }
}

/// `x / (1 + e^−x)`, or the approximation of GELU by its own formula.
fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            // (1 + tanh u) / 2, written so that what is far below 0 does not cancel to 0.
            x / (1.0 + (-2.0 * root * (x + 0.044715 * x * x * x)).exp())
        }
    }
}

fn gated(activation: Activation, gu: &[f64]) -> Vec<f64> {
    let (gate, up) = gu.split_at(gu.len() / 2);
    gate.iter().zip(up).map(|(&gate, up)| activated(activation, gate) * up).collect()
}

/// Gates of `tokens`, through the identity: overwritten, then added.
fn check_gates<B: UnderTest>(backend: &B, activation: Activation, gu: &[f32], tokens: usize) {
    let width = gu.len() / tokens / 2;
    let matrix = backend.matrix(&Linear::plain(common::identity(width))).unwrap();
    let x = upload(backend, gu);
    let mut y = upload(backend, &vec![f32::NAN; tokens * width]);
    let mut product = Product { feed: Feed::Gated(activation), matrix: &matrix, plan: None, add: false };
    backend.project(&product, &x, &mut y, tokens).unwrap();
    let once = download(backend, &y, tokens * width);
    product.add = true;
    backend.project(&product, &x, &mut y, tokens).unwrap();
    let twice = download(backend, &y, tokens * width);
    let what = format!("{activation:?}, {tokens} tokens of {width}");
    for (t, gu) in gu.chunks_exact(2 * width).enumerate() {
        let own = |all: &[f32]| all[t * width..(t + 1) * width].to_vec();
        let want = gated(activation, &exact(gu));
        // An exponential is good to 3 + 2·|z| units in the last place, and z itself to 6·|z|; below 1e-30 it underflows.
        let z = |x: f64| if activation == Activation::Silu { x } else { 1.6 * (x + 0.045 * x * x * x) };
        let depth = |i: usize| 8 + 8 * z(f64::from(gu[i])).abs().min(100.0).ceil() as usize;
        let allowed = |i: usize| 1e-30 + common::tolerance(B::ROUNDING, want[i], depth(i), want[i].abs());
        assert_eq!(common::misfit(&own(&once), &want, allowed), None, "{what}");
        let sum: Vec<f64> = own(&once).iter().map(|&y| 2.0 * f64::from(y)).collect();
        let allowed_sum = |i: usize| 1e-30 + common::tolerance(B::ROUNDING, sum[i], 1, sum[i].abs());
        assert_eq!(common::misfit(&own(&twice), &sum, allowed_sum), None, "{what}, added");
        if gu[..width].iter().any(|gate| gate.abs() > 0.1) {
            let other = BOTH.into_iter().find(|&other| other != activation).unwrap();
            let wrong = gated(other, &exact(gu));
            assert!(common::misfit(&own(&once), &wrong, allowed).is_some(), "{what}: {other:?} goes unseen");
        }
    }
}

pub(crate) fn gates<B: UnderTest>(backend: &B) {
    for activation in BOTH {
        for (width, tokens) in [(96, 1), (96, 2), (1056, 1), (1056, 7)] {
            let mut gu: Vec<f32> = common::uniform(1, 2 * tokens * width).iter().map(|x| 8.0 * x).collect();
            gu[..8].copy_from_slice(&[100.0, -100.0, 0.0, -0.0, 30.0, -30.0, -7.0, 7.0]);
            check_gates(backend, activation, &gu, tokens);
        }
    }
}

/// Each stretch of `gamma.len()` numbers by itself.
fn stretches(x: &[f32], gamma: &[f32], eps: f32) -> Vec<f64> {
    x.chunks_exact(gamma.len()).flat_map(|x| oracle::rms_norm(gamma, eps, &exact(x))).collect()
}

fn check_norm_qk<B: UnderTest>(backend: &B, attention: &Attention, whole: bool, tokens: usize) {
    let Attention { num_heads, num_kv_heads, head_dim, .. } = *attention;
    let (queries, keys, width) = (num_heads * head_dim, num_kv_heads * head_dim, attention.qkv_rows());
    let lens = if whole { [queries, keys] } else { [head_dim, head_dim] };
    let qk_norm = Some(if whole { QkNorm::WholeRow } else { QkNorm::PerHead });
    let other = crate::operations::attention(2, 1, 8);
    // Not the first layer: another's shape would show.
    let config = model(&[other, Attention { qk_norm, ..attention.clone() }], Vec::new());
    let sequence = backend.sequence(&config, 32).unwrap();
    let qkv: Vec<f32> = common::heavy_tailed(7, tokens * width);
    let [query, key] = [(8, lens[0]), (9, lens[1])].map(|(seed, len)| common::uniform(seed, len));
    // A large ε, so that it shows, and another one for keys.
    let norms = [(&query, 0.25), (&key, 0.5)];
    let [q, k] = norms.map(|(gamma, eps)| norm_of(backend, gamma, eps));
    let mut vector = upload(backend, &qkv);
    backend.norm_qk(&sequence, 1, [&q, &k], &mut vector, tokens).unwrap();
    let got = download(backend, &vector, tokens * width);
    let want = |x: &[f32], norms: [(&Vec<f32>, f32); 2]| -> Vec<f64> {
        let (x, values) = x.split_at(queries + keys);
        let [q, k] = [&x[..queries], &x[queries..]];
        let normed = [(q, norms[0]), (k, norms[1])].map(|(x, (gamma, eps))| stretches(x, gamma, eps));
        [normed.concat(), exact(values)].concat()
    };
    let what = format!("{num_heads} heads on {num_kv_heads} of {head_dim}, whole {whole}, {tokens} tokens");
    for (qkv, got) in qkv.chunks_exact(width).zip(got.chunks_exact(width)) {
        assert_eq!(got[queries + keys..], qkv[queries + keys..], "{what}: values stay");
        let all = want(qkv, norms);
        let depth = lens[0].max(lens[1]) + 8;
        let allowed = |i: usize| common::tolerance(B::ROUNDING, all[i], depth, all[i].abs());
        assert_eq!(common::misfit(got, &all, allowed), None, "{what}");
        for wrong in [[(&query, 0.25), (&key, 0.25)], [(&query, 0.5), (&key, 0.5)]] {
            assert!(common::misfit(got, &want(qkv, wrong), allowed).is_some(), "{what}: a wrong epsilon goes unseen");
        }
    }
}

pub(crate) fn norms_of_queries_and_keys<B: UnderTest>(backend: &B) {
    for (heads, kv_heads, dim) in [(1, 1, 8), (4, 2, 16), (6, 2, 80), (9, 3, 64), (2, 1, 256), (40, 8, 128)] {
        for (whole, tokens) in [(false, 1), (false, 5), (true, 1), (true, 3)] {
            check_norm_qk(backend, &attention(heads, kv_heads, dim), whole, tokens);
        }
    }
}

fn check_add_norm<B: UnderTest>(backend: &B, width: usize, tokens: usize) {
    let gamma = common::uniform(1, width);
    let (branch, h) = (common::heavy_tailed(2, tokens * width), common::uniform(3, tokens * width));
    let norm = norm_of(backend, &gamma, 0.125);
    let mut on_device = upload(backend, &h);
    backend.add_norm(&norm, &upload(backend, &branch), &mut on_device, tokens).unwrap();
    let got = download(backend, &on_device, tokens * width);
    for t in 0..tokens {
        let own = t * width..(t + 1) * width;
        let h = exact(&h[own.clone()]);
        let sum = |eps| -> (Vec<f64>, Vec<f64>) {
            let normed = oracle::rms_norm(&gamma, eps, &exact(&branch[own.clone()]));
            let sum = h.iter().zip(&normed).map(|(h, n)| h + n).collect();
            (sum, h.iter().zip(&normed).map(|(h, n)| h.abs() + n.abs()).collect())
        };
        let (want, size) = sum(0.125);
        let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], width + 8, size[i]);
        assert_eq!(common::misfit(&got[own.clone()], &want, allowed), None, "{tokens} tokens of {width}");
        let (wrong, _) = sum(0.25);
        assert!(common::misfit(&got[own.clone()], &wrong, allowed).is_some(), "a wrong epsilon goes unseen");
    }
}

pub(crate) fn norms_behind_a_branch<B: UnderTest>(backend: &B) {
    for (width, tokens) in [(8, 1), (64, 1), (576, 3), (1056, 5), (5376, 2)] {
        check_add_norm(backend, width, tokens);
    }
}

fn check_softcap<B: UnderTest>(backend: &B, cap: f32, logits: &[f32], count: usize) {
    let mut vector = upload(backend, logits);
    backend.softcap(cap, &mut vector, count).unwrap();
    let got = download(backend, &vector, logits.len());
    assert_eq!(got[count..], logits[count..], "only the first {count} are capped");
    let exact = exact(&logits[..count]);
    let by = |cap: f64| -> Vec<f64> { exact.iter().map(|x| cap * (x / cap).tanh()).collect() };
    // By an exponential that is good to 3 units in the last place where it is near 1, and divisions good to 2.5: what
    // is near 0 is as far off as what is near the cap.
    let allowed = |_: usize| f64::from(cap) * 16.0 * 2f64.powi(-24);
    assert_eq!(common::misfit(&got[..count], &by(f64::from(cap)), allowed), None, "{count} capped by {cap}");
    if exact.iter().any(|x| x.abs() > f64::from(cap) / 4.0) {
        let wrong = by(1.01 * f64::from(cap));
        assert!(common::misfit(&got[..count], &wrong, allowed).is_some(), "a wrong cap goes unseen");
        assert!(common::misfit(&got[..count], &exact, allowed).is_some(), "no cap goes unseen");
    }
}

pub(crate) fn caps_of_logits<B: UnderTest>(backend: &B) {
    for cap in [30.0, 50.0, 0.5] {
        for count in [1, 63, 96, 1000, 300_001] {
            let mut logits: Vec<f32> = common::heavy_tailed(4, count + 5).iter().map(|x| 20.0 * x).collect();
            if count >= 8 {
                let awkward = [0.0, -0.0, 1e-3, -1e-3, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY];
                logits[..8].copy_from_slice(&awkward);
            }
            check_softcap(backend, cap, &logits, count);
        }
    }
    let mut logits = upload(backend, &[1.0, f32::NAN]);
    backend.softcap(30.0, &mut logits, 2).unwrap();
    assert!(download(backend, &logits, 2)[1].is_nan(), "NaN stays");
}

/// Causal attention of a whole text, by the formula: `qkv[t]` of every token, the output of every token.
fn attend(attention: &Attention, ropes: &[Rope], qkv: &[Vec<f64>]) -> Vec<f64> {
    let Attention { num_heads, num_kv_heads, head_dim, .. } = *attention;
    let still = vec![0.0; head_dim / 2];
    let frequencies = attention.rope.map_or(still, |rope| ropes[rope].frequencies(qkv.len()));
    let head = |t: usize, i: usize| &qkv[t][i * head_dim..(i + 1) * head_dim];
    let rotated = |t: usize, i: usize| oracle::rotate(head(t, i), &frequencies, t);
    let keys: Vec<Vec<Vec<f64>>> =
        (0..num_kv_heads).map(|kv| (0..qkv.len()).map(|t| rotated(t, num_heads + kv)).collect()).collect();
    let mut out = Vec::new();
    for t in 0..qkv.len() {
        let first = attention.window.map_or(0, |window| (t + 1).saturating_sub(window));
        let scale = attention.scale
            * attention.query_scaling.map_or(1.0, |s| 1.0 + s.beta * ((1 + t / s.original) as f64).ln());
        for h in 0..num_heads {
            let (q, kv) = (rotated(t, h), h * num_kv_heads / num_heads);
            let score = |k: &Vec<f64>| scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
            let capped = |s: f64| attention.softcap.map_or(s, |cap| cap * (s / cap).tanh());
            let shares: Vec<f64> = keys[kv][first..=t].iter().map(|k| capped(score(k)).exp()).collect();
            let total: f64 = shares.iter().sum();
            let value = |s: usize| head(first + s, num_heads + num_kv_heads + kv);
            out.extend(
                (0..head_dim).map(|j| shares.iter().enumerate().map(|(s, w)| w / total * value(s)[j]).sum::<f64>()),
            );
        }
    }
    out
}

/// A text of `parts` tokens at a time through layers of these attentions; none of the wrong ones beside each fits.
fn check_attention<B: UnderTest>(backend: &B, layers: &[(Attention, Vec<Attention>)], ropes: &[Rope], parts: &[usize]) {
    let len: usize = parts.iter().sum();
    let attentions: Vec<Attention> = layers.iter().map(|(attention, _)| attention.clone()).collect();
    let mut sequence = backend.sequence(&model(&attentions, ropes.to_vec()), len).unwrap();
    backend.begin(&mut sequence, &Sampling::GREEDY, &[]).unwrap();
    let text = |l: usize| common::uniform(l as u64 + 1, len * attentions[l].qkv_rows());
    let texts: Vec<Vec<f32>> = (0..layers.len()).map(text).collect();
    let mut got = vec![Vec::new(); layers.len()];
    let mut start = 0;
    for &tokens in parts {
        for (l, attention) in attentions.iter().enumerate() {
            let (width, out_width) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
            let qkv = upload(backend, &texts[l][start * width..(start + tokens) * width]);
            let mut out = backend.vector(tokens * out_width).unwrap();
            backend.attend(&mut sequence, l, &qkv, &mut out, tokens).unwrap();
            got[l].extend(download(backend, &out, tokens * out_width));
        }
        backend.advance(&mut sequence, tokens).unwrap();
        start += tokens;
    }
    for (l, (attention, wrong)) in layers.iter().enumerate() {
        let qkv: Vec<Vec<f64>> = texts[l].chunks_exact(attention.qkv_rows()).map(exact).collect();
        let want = attend(attention, ropes, &qkv);
        // |q·k| ≤ 2·dim, since a rotated pair of numbers below 1 stays below √2; a cap is off by what logits' is; an
        // error of the scores moves every share by at most twice as much, relatively; |values| ≤ 1.
        let dim = attention.head_dim;
        let score = common::tolerance(0.0, 0.0, dim + 16, 2.0 * dim as f64 * attention.scale_at(len).abs())
            + attention.softcap.unwrap_or(0.0) * 16.0 * 2f64.powi(-24);
        let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], len + 16, 1.0) + 2.0 * score;
        assert_eq!(common::misfit(&got[l], &want, allowed), None, "layer {l}, {attention:?}, {parts:?}");
        for wrong in wrong {
            let wrong_out = attend(wrong, ropes, &qkv);
            assert!(common::misfit(&got[l], &wrong_out, allowed).is_some(), "layer {l}: {wrong:?} goes unseen");
        }
    }
}

/// Layers that differ in all that attention may differ in, in one text that is longer than what windows' caches hold.
pub(crate) fn attention_by_layer<B: UnderTest>(backend: &B) {
    let ropes = [rope(10_000.0, 16), rope(100.0, 16)];
    let plain = attention(4, 2, 16);
    let local = Attention { rope: Some(1), window: Some(5), ..plain.clone() };
    let capped = Attention { rope: Some(0), scale: 0.5, softcap: Some(2.0), ..attention(6, 2, 16) };
    let scaled = Attention {
        query_scaling: Some(QueryScaling { beta: 0.5, original: 7 }),
        rope: Some(0),
        window: Some(9),
        softcap: Some(5.0),
        ..attention(5, 1, 16)
    };
    let other = |from: &Attention, change: &dyn Fn(&mut Attention)| {
        let mut wrong = from.clone();
        change(&mut wrong);
        wrong
    };
    let layers = [
        (plain.clone(), vec![other(&plain, &|a| a.rope = Some(0)), other(&plain, &|a| a.scale *= 1.01)]),
        (
            local.clone(),
            vec![
                other(&local, &|a| a.window = Some(4)),
                other(&local, &|a| a.window = Some(6)),
                other(&local, &|a| a.rope = Some(0)),
                other(&local, &|a| a.rope = None),
            ],
        ),
        (
            capped.clone(),
            vec![
                other(&capped, &|a| a.softcap = None),
                other(&capped, &|a| a.softcap = Some(2.1)),
                other(&capped, &|a| a.scale = 0.25),
            ],
        ),
        (
            scaled.clone(),
            vec![
                other(&scaled, &|a| a.query_scaling = None),
                other(&scaled, &|a| a.query_scaling = Some(QueryScaling { beta: 0.5, original: 8 })),
                other(&scaled, &|a| a.window = None),
                other(&scaled, &|a| a.softcap = None),
            ],
        ),
    ];
    let most = backend.device().max_tokens.min(512);
    check_attention(backend, &layers, &ropes, &[1, 1, 1, 4, 2, 3]);
    check_attention(backend, &layers, &ropes, &[most.min(16), 7, 1, 1, most.min(16), 13, 1, most.min(16), 1, 1]);
    // Past the longest ring, which holds a window and the longest pass.
    let rest = most.min(100);
    check_attention(backend, &layers[1..2], &ropes, &[most, 1, 1, rest, 1, 1, 1]);
    check_attention(backend, &layers[3..], &ropes, &[rest, most, 1, 1]);
}

/// How many cases of a property suit a backend.
fn cases<B: UnderTest>() -> u32 {
    (B::CASES / 20).clamp(12, 60) as u32
}

/// Every operation at any shape.
pub(crate) fn any_shape<B: UnderTest>(backend: &B) {
    let strategy = (1usize..9, 1usize..4, 1usize..33, any_bool(), 1usize..8, 1usize..700, 0usize..2);
    any(cases::<B>(), &strategy, |(group, kv_heads, eighths, whole, tokens, eighths_wide, activation)| {
        let dim = 8 * eighths;
        check_norm_qk(backend, &attention(group * kv_heads, kv_heads, dim), whole, tokens);
        check_add_norm(backend, 8 * eighths_wide, tokens);
        let width = 8 * (eighths_wide % 40 + 1);
        let gu: Vec<f32> = common::heavy_tailed(5, 2 * tokens * width);
        check_gates(backend, BOTH[activation], &gu, tokens);
        let logits: Vec<f32> = common::heavy_tailed(6, 13 * eighths_wide).iter().map(|x| 9.0 * x).collect();
        check_softcap(backend, eighths_wide as f32 / 10.0, &logits, 13 * eighths_wide - 5);
    });
}

fn any_bool() -> impl Strategy<Value = bool> {
    proptest::bool::ANY
}

/// Attention of any shape, in any parts.
pub(crate) fn any_attention<B: UnderTest>(backend: &B) {
    let most = backend.device().max_tokens.min(40);
    let shape = (1usize..9, 1usize..4, 1usize..33);
    let kind = (proptest::option::of(0usize..2), proptest::option::of(1usize..40), proptest::option::of(1u32..30));
    let more = (proptest::option::of((1u32..10, 1usize..20)), 1u32..20, proptest::collection::vec(1..=most, 1..8));
    any(cases::<B>(), &(shape, kind, more), |((group, kv_heads, eighths), (rope_of, window, cap), more)| {
        let (growth, scale, parts) = more;
        let plain = attention(group * kv_heads, kv_heads, 8 * eighths);
        let attention = Attention {
            rope: rope_of,
            window,
            scale: plain.scale * f64::from(scale) / 10.0,
            softcap: cap.map(|cap| f64::from(cap) / 4.0),
            query_scaling: growth.map(|(beta, original)| QueryScaling { beta: f64::from(beta) / 20.0, original }),
            ..plain
        };
        let ropes = [rope(10_000.0, 8 * eighths), rope(50.0, 8 * eighths)];
        let seen = parts.iter().sum::<usize>().min(window.unwrap_or(usize::MAX));
        // A token that sees itself alone has the same output whatever its score is.
        let wrong = if seen < 4 { vec![] } else { vec![Attention { window: Some(seen - 1), ..attention.clone() }] };
        check_attention(backend, &[(attention, wrong)], &ropes, &parts);
    });
}
