//! The parts of a decoder besides its products.

use std::time::Duration;

use decdec::backend::{Feed, Input, Norm, Product, Rows};
use decdec::config::{Activation, ModelConfig};
use decdec::sampling::Sampling;
use decdec::weights::{Linear, Weight};
use serde_json::{Value, json};

use crate::UnderTest;
use crate::common::{self, Stored, oracle};
use crate::small_model::SmallModel;

pub(crate) fn config() -> ModelConfig {
    SmallModel::new(1, 2, false).config
}

/// A product that is added to what is there.
pub(crate) fn added<'a, B: UnderTest>(matrix: &'a B::Matrix, feed: Feed<'a, B::Vector>) -> Product<'a, B> {
    Product { feed, matrix, plan: None, compensated: 0, add: true }
}

pub(crate) fn upload<B: UnderTest>(backend: &B, values: &[f32]) -> B::Vector {
    let mut vector = backend.vector(values.len()).unwrap();
    backend.write(values, &mut vector).unwrap();
    vector
}

pub(crate) fn download<B: UnderTest>(backend: &B, vector: &B::Vector, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    backend.read(vector, &mut out).unwrap();
    out
}

pub(crate) fn exact(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

pub(crate) fn embed_and_gather<B: UnderTest>(backend: &B) {
    for stored in Stored::ALL {
        let weight = common::dense(3, 72, 50, stored);
        let Weight::Dense(table) = &weight else { unreachable!() };
        let rows = table.values.to_f32().into_owned();
        let row = |id: u32| rows[72 * id as usize..][..72].to_vec();
        let matrix = backend.matrix(&Linear::plain(weight.clone())).unwrap();
        let mut cache = backend.cache(&config(), 1, 16, Default::default()).unwrap();
        let of = |count| [Rows { slot: 0, position: 0, count }];
        backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
        let mut h = backend.vector(3 * 72).unwrap();
        backend.embed(&cache, &of(3), (&matrix, 1.0), Input::Tokens(&[49, 0, 17]), &mut h).unwrap();
        assert_eq!(download(backend, &h, 3 * 72), [row(49), row(0), row(17)].concat());

        let mut some = backend.vector(2 * 72).unwrap();
        backend.gather(&h, 72, &[2, 1], &mut some).unwrap();
        assert_eq!(download(backend, &some, 2 * 72), [row(17), row(0)].concat());
        backend.gather(&h, 72, &[0], &mut some).unwrap();
        assert_eq!(download(backend, &some, 2 * 72), [row(49), row(0)].concat());

        // Ids that the table does not have, such as those of a text that has no next token: nothing is read.
        backend.embed(&cache, &of(3), (&matrix, 1.0), Input::Tokens(&[50, 3, u32::MAX]), &mut h).unwrap();
        let got = download(backend, &h, 3 * 72);
        assert!(got[..72].iter().chain(&got[144..]).all(|h| h.is_nan()), "{got:?}");
        assert_eq!(got[72..144], row(3));

        let mut logits = vec![0.0; 96];
        logits[31] = 1.0;
        backend.sample(&mut cache, &[0], &upload(backend, &logits)).unwrap();
        backend.embed(&cache, &of(1), (&matrix, 1.0), Input::Sampled, &mut h).unwrap();
        assert_eq!(download(backend, &h, 72), row(31));
        backend.sample(&mut cache, &[0], &upload(backend, &[f32::NAN; 96])).unwrap();
        backend.embed(&cache, &of(1), (&matrix, 1.0), Input::Sampled, &mut h).unwrap();
        assert!(download(backend, &h, 72).iter().all(|h| h.is_nan()), "no token has a row");
    }
}

/// Through the identity, so that the product adds nothing of its own.
pub(crate) fn norm<B: UnderTest>(backend: &B) {
    for (width, tokens) in [(64, 1), (576, 3), (1056, 5)] {
        let matrix = backend.matrix(&Linear::plain(common::identity(width))).unwrap();
        let gamma = common::uniform(1, width);
        let h = common::heavy_tailed(2, tokens * width);
        let norm = Norm { gamma: upload(backend, &gamma), len: width, eps: 1e-2 };
        let mut y = backend.vector(tokens * width).unwrap();
        let product = Product { add: false, ..added(&matrix, Feed::Norm(&norm)) };
        backend.project(&product, &upload(backend, &h), &mut y, tokens).unwrap();
        let got = download(backend, &y, tokens * width);
        for (h, got) in h.chunks_exact(width).zip(got.chunks_exact(width)) {
            let want = oracle::rms_norm(&gamma, 1e-2, &exact(h));
            let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], width + 8, want[i].abs());
            assert_eq!(common::misfit(got, &want, allowed), None, "width {width}");
            let wrong_eps = oracle::rms_norm(&gamma, 2e-2, &exact(h));
            assert!(common::misfit(got, &wrong_eps, allowed).is_some(), "a wrong epsilon goes unseen");
        }
    }
}

pub(crate) fn swiglu<B: UnderTest>(backend: &B) {
    let width = 96;
    let matrix = backend.matrix(&Linear::plain(common::identity(width))).unwrap();
    let mut gu: Vec<f32> = common::uniform(1, 4 * width).iter().map(|x| 8.0 * x).collect();
    gu[..6].copy_from_slice(&[100.0, -100.0, 0.0, -0.0, 30.0, -30.0]);
    let mut h = backend.vector(2 * width).unwrap();
    backend.project(&added(&matrix, Feed::Gated(Activation::Silu)), &upload(backend, &gu), &mut h, 2).unwrap();
    let got = download(backend, &h, 2 * width);
    for (gu, got) in gu.chunks_exact(2 * width).zip(got.chunks_exact(width)) {
        let want = oracle::gated(Activation::Silu, &exact(gu));
        // An exponential is good to 3 + 2·|x| units in the last place; what underflows is far below 1e-30.
        let depth = |i: usize| 8 + 2 * gu[i].abs().ceil() as usize;
        let allowed = |i: usize| 1e-30 + common::tolerance(B::ROUNDING, want[i], depth(i), want[i].abs());
        assert_eq!(common::misfit(got, &want, allowed), None);
        let swapped = oracle::gated(Activation::Silu, &exact(&[&gu[width..], &gu[..width]].concat()));
        assert!(common::misfit(got, &swapped, allowed).is_some(), "gate and up swapped go unseen");
    }
    // A second time: added to what is there.
    backend.project(&added(&matrix, Feed::Gated(Activation::Silu)), &upload(backend, &gu), &mut h, 2).unwrap();
    let twice: Vec<f64> = got.iter().map(|&y| 2.0 * f64::from(y)).collect();
    let allowed = |i: usize| common::tolerance(B::ROUNDING, twice[i], 1, twice[i].abs());
    assert_eq!(common::misfit(&download(backend, &h, 2 * width), &twice, allowed), None);
}

/// The same with a window.
fn windowed(config: &ModelConfig, window: usize) -> ModelConfig {
    config.with(json!({ "model_type": "mistral", "sliding_window": window })).unwrap()
}

/// A text of `parts` tokens at a time, through two layers that see different numbers.
fn check_attention<B: UnderTest>(backend: &B, config: &ModelConfig, parts: &[usize]) {
    let len: usize = parts.iter().sum();
    let attention = config.layers[0].attention();
    let (dim, width) = (attention.head_dim, attention.qkv_rows());
    let q_width = attention.num_heads * dim;
    let texts: [Vec<f32>; 2] = [1, 2].map(|seed| common::uniform(seed, len * width));
    let mut cache = backend.cache(config, 1, len, Default::default()).unwrap();
    // The second round shows that beginning again forgets the first.
    for _ in 0..2 {
        backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
        let mut got = [Vec::new(), Vec::new()];
        let mut start = 0;
        for &tokens in parts {
            let rows = [Rows { slot: 0, position: start, count: tokens }];
            for layer in 0..2 {
                let qkv = upload(backend, &texts[layer][start * width..(start + tokens) * width]);
                let mut out = backend.vector(tokens * q_width).unwrap();
                backend.attend(&mut cache, layer, &rows, &qkv, &mut out).unwrap();
                got[layer].extend(download(backend, &out, tokens * q_width));
            }
            backend.advance(&mut cache, &rows).unwrap();
            start += tokens;
        }
        for (text, got) in texts.iter().zip(&got) {
            let qkv: Vec<Vec<f64>> = text.chunks_exact(width).map(exact).collect();
            let want = oracle::attend(attention, &config.ropes, &qkv).concat();
            // |q·k| ≤ 2·dim, since a rotated pair of numbers below 1 stays below √2; an error of the scores
            // moves every share by at most twice as much, relatively; |values| ≤ 1.
            let score = common::tolerance(0.0, 0.0, dim + 8, 2.0 * dim as f64) / (dim as f64).sqrt();
            let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], len + 16, 1.0) + 2.0 * score;
            assert_eq!(common::misfit(got, &want, allowed), None);
            let narrower = windowed(config, attention.window.unwrap_or(len) - 1);
            let wrong = oracle::attend(narrower.layers[0].attention(), &config.ropes, &qkv).concat();
            assert!(common::misfit(got, &wrong, allowed).is_some(), "one token less to see goes unseen");
        }
    }
}

pub(crate) fn attention<B: UnderTest>(backend: &B) {
    check_attention(backend, &config(), &[1, 1, 1]);
    check_attention(backend, &config(), &[16, 7, 1, 1, 13]);
    let fields = json!({ "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 80 });
    let wide = config().with(fields).unwrap();
    check_attention(backend, &wide, &[9, 1]);
}

pub(crate) fn sliding_window<B: UnderTest>(backend: &B) {
    check_attention(backend, &windowed(&config(), 5), &[16, 1, 1, 6]);
    // More positions than a kernel holds at a time.
    let fields = json!({ "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8 });
    let small = windowed(&config().with(fields).unwrap(), 300);
    check_attention(backend, &small, &[[16; 25].as_slice(), &[1, 1]].concat());
}

/// Attention between the last two positions of the longest context: angles must be exact there.
pub(crate) fn rotation_far_out<B: UnderTest>(backend: &B) {
    const LAST: usize = 131_071;
    let scaled = json!({
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    });
    for (rope_theta, rope_scaling) in
        [(10_000.0, Value::Null), (10_000.0, json!({ "rope_type": "linear", "factor": 2.0 })), (500_000.0, scaled)]
    {
        let (num_heads, num_kv_heads, head_dim) = (2, 1, 16);
        let fields = json!({
            "num_hidden_layers": 1,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
        });
        let config = windowed(&config().with(fields).unwrap(), 2);
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        // Scores of about 1: shares that an error of an angle moves.
        let tokens: [Vec<f32>; 2] = [1, 2].map(|seed| common::uniform(seed, width).iter().map(|x| 2.0 * x).collect());
        let mut cache = backend.cache(&config, 1, LAST + 1, Default::default()).unwrap();
        backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
        backend.advance(&mut cache, &[Rows { slot: 0, position: 0, count: LAST - 1 }]).unwrap();
        let mut out = backend.vector(num_heads * head_dim).unwrap();
        for (t, qkv) in tokens.iter().enumerate() {
            let rows = [Rows { slot: 0, position: LAST - 1 + t, count: 1 }];
            backend.attend(&mut cache, 0, &rows, &upload(backend, qkv), &mut out).unwrap();
            backend.advance(&mut cache, &rows).unwrap();
        }
        let got = download(backend, &out, num_heads * head_dim);
        let head = |t: usize, i: usize| exact(&tokens[t][i * head_dim..][..head_dim]);
        let turned = |t: usize, i: usize, angle: &dyn Fn(usize, f64) -> f64| {
            let angles: Vec<f64> =
                config.ropes[0].frequencies(LAST + 1).iter().map(|&f| angle(LAST - 1 + t, f)).collect();
            oracle::rotate(&head(t, i), &angles, 1)
        };
        let products = |h: usize, s: usize, angle: &dyn Fn(usize, f64) -> f64| -> Vec<f64> {
            let pairs = turned(1, h, angle).into_iter().zip(turned(s, num_heads, angle));
            pairs.map(|(q, k)| q * k / (head_dim as f64).sqrt()).collect()
        };
        let of_head = |h: usize, angle: &dyn Fn(usize, f64) -> f64| -> Vec<f64> {
            let scores = [0, 1].map(|s| products(h, s, angle).iter().sum::<f64>());
            let first = 1.0 / (1.0 + (scores[1] - scores[0]).exp());
            let values = head(0, num_heads + 1).into_iter().zip(head(1, num_heads + 1));
            values.map(|(a, b)| first * a + (1.0 - first) * b).collect()
        };
        let want = |angle: &dyn Fn(usize, f64) -> f64| -> Vec<f64> {
            (0..num_heads).flat_map(|h| of_head(h, angle)).collect()
        };
        let in_f64 = |position: usize, f: f64| position as f64 * f;
        let sizes = (0..num_heads).flat_map(|h| [0, 1].map(|s| products(h, s, &in_f64).iter().map(|p| p.abs()).sum()));
        // Two scores are off by this, a share by half of it, the result by twice that: values are 4 apart at most.
        let score = common::tolerance(0.0, 0.0, head_dim + 8, sizes.fold(0.0, f64::max));
        let exact = want(&in_f64);
        let allowed = |i: usize| common::tolerance(B::ROUNDING, exact[i], 8, 2.0) + 2.0 * score;
        assert_eq!(common::misfit(&got, &exact, allowed), None, "{:?}", config.ropes[0].scaling);
        let of_f32 = want(&|position, f| f64::from(position as f32 * f as f32));
        assert!(
            common::misfit(&got, &of_f32, allowed).is_some(),
            "{:?}: angles of f32 go unseen",
            config.ropes[0].scaling
        );
    }
    // Nothing is attended to, or advanced over, behind the end.
    let mut cache = backend.cache(&config(), 1, 3, Default::default()).unwrap();
    backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
    if !backend.device().id.starts_with("cuda") {
        let error = backend.advance(&mut cache, &[Rows { slot: 0, position: 0, count: 4 }]).unwrap_err().to_string();
        assert!(error.contains("4 more tokens") && error.contains("room for 3"), "{error}");
    }
}

/// More work takes longer, by the device's own clock.
pub(crate) fn time_passes<B: UnderTest>(backend: &B) {
    let linear = Linear::plain(common::anyprec(1, 1024, 512, 3, Stored::F16));
    let matrix = backend.matrix(&linear).unwrap();
    let x = upload(backend, &common::uniform(2, 1024));
    let mut y = backend.vector(512).unwrap();
    let mut time = |times: usize| {
        let mut work = || (0..times).try_for_each(|_| backend.gemv(&matrix, &x, &mut y));
        backend.time(&mut work).unwrap()
    };
    time(1);
    // Others may hold the processor up, so one clean measurement of several is asked for.
    let clean = (0..50).any(|_| {
        let (one, many) = (time(1), time(50));
        one > Duration::ZERO && many > 5 * one
    });
    assert!(clean, "50 products took no longer than one");
}
