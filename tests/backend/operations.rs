//! What families add to Llama's layer, operation by operation: a scaled embedding, other gates, norms of queries and keys
//! and behind a branch, caps.

use decdec::backend::{Feed, Input, Norm, Product, Rows};
use decdec::config::{Activation, Attention, FeedForward, LayerConfig, Mixer, ModelConfig, NormPlacement};
use decdec::config::{QkNorm, Rope};
use decdec::dec::{DecPlan, Selection};
use decdec::sampling::Sampling;
use decdec::weights::{Linear, Weight};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;

use crate::UnderTest;
use crate::common::{self, Stored, oracle};
use crate::decode::{download, exact, upload};

const BOTH: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

fn norm_of<B: UnderTest>(backend: &B, gamma: &[f32], eps: f32) -> Norm<B::Vector> {
    Norm { gamma: upload(backend, gamma), len: gamma.len(), eps }
}

/// Plain attention without a rotation.
pub(crate) fn attention(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Attention {
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

/// A model of these attentions, of which only they are used.
pub(crate) fn model(attentions: &[Attention], ropes: Vec<Rope>) -> ModelConfig {
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
pub(crate) fn any<S: Strategy>(cases: u32, strategy: &S, body: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let run = |case| {
        body(case);
        Ok(())
    };
    runner.run(strategy, run).unwrap_or_else(|error| panic!("{error}"));
}

pub(crate) fn embedding_scale<B: UnderTest>(backend: &B) {
    let mut cache = backend.cache(&model(&[attention(4, 2, 16)], Vec::new()), 1, 16, Default::default()).unwrap();
    backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
    let rows = [Rows { slot: 0, position: 0, count: 2 }];
    for stored in Stored::ALL {
        let weight = common::dense(3, 72, 50, stored);
        let Weight::Dense(table) = &weight else { unreachable!() };
        let values = table.values.to_f32().into_owned();
        let matrix = backend.matrix(&Linear::plain(weight.clone())).unwrap();
        let mut h = backend.vector(2 * 72).unwrap();
        for scale in [1.0, 72f32.sqrt(), 12.0 / 0.22] {
            backend.embed(&cache, &rows, (&matrix, scale), Input::Tokens(&[49, 50]), &mut h).unwrap();
            let got = download(backend, &h, 2 * 72);
            // One product, rounded once.
            let want: Vec<f32> = values[49 * 72..].iter().map(|x| scale * x).collect();
            assert_eq!(got[..72], want, "{stored:?} times {scale}");
            assert!(got[72..].iter().all(|h| h.is_nan()), "there is no row 50");
        }
    }
}

/// Gates of `tokens`, through the identity: overwritten, then added. What enters a product is rounded by `rounding`.
fn check_gates<B: UnderTest>(backend: &B, activation: Activation, gu: &[f32], tokens: usize, rounding: f64) {
    let width = gu.len() / tokens / 2;
    let matrix = backend.matrix(&Linear::plain(common::identity(width))).unwrap();
    let x = upload(backend, gu);
    let mut y = upload(backend, &vec![f32::NAN; tokens * width]);
    let mut product =
        Product { feed: Feed::Gated(activation), matrix: &matrix, plan: None, compensated: 0, add: false };
    backend.project(&product, &x, &mut y, tokens).unwrap();
    let once = download(backend, &y, tokens * width);
    product.add = true;
    backend.project(&product, &x, &mut y, tokens).unwrap();
    let twice = download(backend, &y, tokens * width);
    let what = format!("{activation:?}, {tokens} tokens of {width}");
    for (t, gu) in gu.chunks_exact(2 * width).enumerate() {
        let own = |all: &[f32]| all[t * width..(t + 1) * width].to_vec();
        let want = oracle::gated(activation, &exact(gu));
        let least = least(rounding);
        let allowed =
            |i: usize| least + common::tolerance(rounding, want[i], gate_depth(activation, gu[i]), want[i].abs());
        assert_eq!(common::misfit(&own(&once), &want, allowed), None, "{what}");
        let sum: Vec<f64> = own(&once).iter().map(|&y| 2.0 * f64::from(y)).collect();
        let allowed_sum = |i: usize| 1e-30 + common::tolerance(0.0, sum[i], 1, sum[i].abs());
        assert_eq!(common::misfit(&own(&twice), &sum, allowed_sum), None, "{what}, added");
        if gu[..width].iter().any(|gate| gate.abs() > 0.1) {
            let other = BOTH.into_iter().find(|&other| other != activation).unwrap();
            let wrong = oracle::gated(other, &exact(gu));
            assert!(common::misfit(&own(&once), &wrong, allowed).is_some(), "{what}: {other:?} goes unseen");
        }
    }
}

/// How many roundings a gate takes: an exponential is good to 3 + 2·|z| units in the last place, `z` itself to 6·|z|.
fn gate_depth(activation: Activation, x: f32) -> usize {
    let x = f64::from(x);
    let z = if activation == Activation::Silu { x } else { 1.6 * (x + 0.045 * x * x * x) };
    8 + 8 * z.abs().min(100.0).ceil() as usize
}

/// What may be off near 0: exponentials underflow below 1e-30, and float16 has steps of 2^-24.
fn least(rounding: f64) -> f64 {
    if rounding > 0.0 { 2f64.powi(-25) } else { 1e-30 }
}

fn gate_and_up(tokens: usize, width: usize) -> Vec<f32> {
    let mut gu: Vec<f32> = common::uniform(1, 2 * tokens * width).iter().map(|x| 8.0 * x).collect();
    gu[..8].copy_from_slice(&[100.0, -100.0, 0.0, -0.0, 30.0, -30.0, -7.0, 7.0]);
    gu
}

pub(crate) fn gates<B: UnderTest>(backend: &B) {
    gates_within(backend, B::ROUNDING);
}

pub(crate) fn gates_within<B: UnderTest>(backend: &B, rounding: f64) {
    for activation in BOTH {
        for (width, tokens) in [(96, 1), (96, 2), (1056, 1), (1056, 7)] {
            check_gates(backend, activation, &gate_and_up(tokens, width), tokens, rounding);
        }
    }
}

/// A plan for every channel, so that no rounding decides which are taken.
fn plan_of_all(linear: &Linear<'_>) -> DecPlan {
    let (inner, outer) = (linear.weight.in_features(), linear.weight.out_features());
    DecPlan::new(inner, outer, linear.thresholds.as_ref().unwrap(), 1024, 2, Selection::Bucket).unwrap()
}

pub(crate) fn compensated_gates<B: UnderTest>(backend: &B) {
    compensated_gates_within(backend, B::ROUNDING);
}

/// Gate and up that a compensation may still be beside, into a product that is compensated itself or not.
pub(crate) fn compensated_gates_within<B: UnderTest>(backend: &B, rounding: f64) {
    let width = 96;
    let all: Vec<u32> = (0..width as u32).collect();
    let linear = common::compensable(3, common::identity(width));
    let matrix = backend.matrix(&linear).unwrap();
    let plan = backend.plan(&matrix, &plan_of_all(&linear)).unwrap();
    let before = common::compensable(4, common::anyprec(5, width, 2 * width, 3, Stored::F16));
    let matrix_before = backend.matrix(&before).unwrap();
    let plan_before = backend.plan(&matrix_before, &plan_of_all(&before)).unwrap();
    for (activation, tokens) in BOTH.into_iter().flat_map(|activation| [(activation, 1), (activation, 3)]) {
        for (plan_before, plan) in [(None, Some(&plan)), (Some(&plan_before), None), (Some(&plan_before), Some(&plan))]
        {
            let x = upload(backend, &common::uniform(6, tokens * width));
            let mut gu = upload(backend, &vec![f32::NAN; 2 * tokens * width]);
            let product = Product {
                feed: Feed::Plain,
                matrix: &matrix_before,
                plan: plan_before,
                compensated: tokens,
                add: false,
            };
            backend.project(&product, &x, &mut gu, tokens).unwrap();
            let on_host = download(backend, &gu, 2 * tokens * width);
            let mut y = upload(backend, &vec![f32::NAN; tokens * width]);
            let product =
                Product { feed: Feed::Gated(activation), matrix: &matrix, plan, compensated: tokens, add: false };
            backend.project(&product, &gu, &mut y, tokens).unwrap();
            let got = download(backend, &y, tokens * width);
            for (gu, got) in on_host.chunks_exact(2 * width).zip(got.chunks_exact(width)) {
                let x = oracle::gated(activation, &exact(gu));
                let (correction, size) = oracle::correction(&linear, &all, &x);
                let add = |taken: f64| -> Vec<f64> { x.iter().zip(&correction).map(|(x, c)| x + taken * c).collect() };
                let want = add(if plan.is_some() { 1.0 } else { 0.0 });
                // A gate's own error is in every product of the compensation.
                let depth = gu[..width].iter().map(|&gate| gate_depth(activation, gate)).max().unwrap();
                let allowed = |i: usize| {
                    let sum = common::tolerance(0.0, 0.0, depth + width + 2, x[i].abs() + size[i]);
                    least(rounding) + rounding * x[i].abs() + sum
                };
                let what = format!("{activation:?}, {tokens} tokens, compensated {}", plan.is_some());
                assert_eq!(common::misfit(got, &want, allowed), None, "{what}");
                let wrong = add(if plan.is_some() { 0.0 } else { 1.0 });
                assert!(common::misfit(got, &wrong, allowed).is_some(), "{what}: that goes unseen");
            }
        }
    }
}

/// Norms and caps of what a compensated product has put out, and additions to it, as it is read back before.
pub(crate) fn after_a_compensated_product<B: UnderTest>(backend: &B) {
    let attention = attention(4, 2, 16);
    let (width, rows) = (96, attention.qkv_rows());
    let linear = common::compensable(7, common::anyprec(8, width, rows, 3, Stored::F16));
    let matrix = backend.matrix(&linear).unwrap();
    let plan = backend.plan(&matrix, &plan_of_all(&linear)).unwrap();
    let cache = backend.cache(&model(std::slice::from_ref(&attention), Vec::new()), 1, 8, Default::default()).unwrap();
    let product = |add| Product { feed: Feed::Plain, matrix: &matrix, plan: Some(&plan), compensated: 1, add };
    let (mut y, x) = (backend.vector(rows).unwrap(), upload(backend, &common::uniform(9, width)));
    let gamma = common::uniform(10, 16);
    let norm = norm_of(backend, &gamma, 0.25);
    // Twice: what was left beside a vector is no part of it later.
    for _ in 0..2 {
        backend.project(&product(false), &x, &mut y, 1).unwrap();
        let before = download(backend, &y, rows);
        backend.norm_qk(&cache, 0, [&norm, &norm], &mut y, 1).unwrap();
        let got = download(backend, &y, rows);
        assert_eq!(got[96..], before[96..], "values stay, with their compensation");
        let want = stretches(&before[..96], &gamma, 0.25);
        let allowed = |i: usize| common::tolerance(0.0, 0.0, 24, want[i].abs());
        assert_eq!(common::misfit(&got[..96], &want, allowed), None);
    }
    let gamma = common::uniform(11, rows);
    let norm = norm_of(backend, &gamma, 0.25);
    let mut h = upload(backend, &common::uniform(12, rows));
    backend.project(&product(false), &x, &mut y, 1).unwrap();
    for _ in 0..2 {
        backend.project(&product(true), &x, &mut h, 1).unwrap();
        let [branch, before] = [&y, &h].map(|vector| exact(&download(backend, vector, rows)));
        backend.add_norm(&norm, &y, &mut h, 1).unwrap();
        let normed = oracle::rms_norm(&gamma, 0.25, &branch);
        let want: Vec<f64> = before.iter().zip(&normed).map(|(h, n)| h + n).collect();
        let allowed = |i: usize| common::tolerance(0.0, 0.0, rows + 8, before[i].abs() + normed[i].abs());
        assert_eq!(common::misfit(&download(backend, &h, rows), &want, allowed), None);
    }
    for _ in 0..2 {
        backend.project(&product(false), &x, &mut y, 1).unwrap();
        let want: Vec<f64> = exact(&download(backend, &y, rows)).iter().map(|y| 2.0 * (y / 2.0).tanh()).collect();
        backend.softcap(2.0, &mut y, rows).unwrap();
        let allowed = |_: usize| 2.0 * 16.0 * 2f64.powi(-24);
        assert_eq!(common::misfit(&download(backend, &y, rows), &want, allowed), None);
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
    let cache = backend.cache(&config, 1, 32, Default::default()).unwrap();
    let qkv: Vec<f32> = common::heavy_tailed(7, tokens * width);
    let [query, key] = [(8, lens[0]), (9, lens[1])].map(|(seed, len)| common::uniform(seed, len));
    // A large ε, so that it shows, and another one for keys.
    let norms = [(&query, 0.25), (&key, 0.5)];
    let [q, k] = norms.map(|(gamma, eps)| norm_of(backend, gamma, eps));
    let mut vector = upload(backend, &qkv);
    backend.norm_qk(&cache, 1, [&q, &k], &mut vector, tokens).unwrap();
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

/// How many cases of a property suit a backend.
pub(crate) fn cases<B: UnderTest>() -> u32 {
    (B::CASES / 20).clamp(12, 60) as u32
}

/// Every operation at any shape.
pub(crate) fn operations_of_any_shape<B: UnderTest>(backend: &B) {
    let strategy = (1usize..9, 1usize..4, 1usize..33, proptest::bool::ANY, 1usize..8, 1usize..700, 0usize..2);
    any(cases::<B>(), &strategy, |(group, kv_heads, eighths, whole, tokens, eighths_wide, activation)| {
        let dim = 8 * eighths;
        check_norm_qk(backend, &attention(group * kv_heads, kv_heads, dim), whole, tokens);
        check_add_norm(backend, 8 * eighths_wide, tokens);
        let width = 8 * (eighths_wide % 40 + 1);
        let gu: Vec<f32> = common::heavy_tailed(5, 2 * tokens * width);
        check_gates(backend, BOTH[activation], &gu, tokens, B::ROUNDING);
        let logits: Vec<f32> = common::heavy_tailed(6, 13 * eighths_wide).iter().map(|x| 9.0 * x).collect();
        check_softcap(backend, eighths_wide as f32 / 10.0, &logits, 13 * eighths_wide - 5);
    });
}
