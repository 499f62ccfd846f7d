//! Attention as families have it: by layer its own heads, rotation, window, scale, cap and growth of queries.

use decdec::backend::KvBits;
use decdec::backend::Rows;
use decdec::config::{Attention, Pairing, QueryScaling, Rope, RopeScaling};
use decdec::sampling::Sampling;

use crate::UnderTest;
use crate::common::{self, oracle};
use crate::decode::{download, exact, upload};
use crate::operations::{any, attention, cases, model};

fn rope(theta: f64, head_dim: usize) -> Rope {
    Rope { head_dim, rotary_dim: head_dim, pairing: Pairing::Halves, theta, scaling: RopeScaling::None }
}

/// A text through layers of these attentions, `parts` tokens at a time: `texts[l]` `[tokens, qkv_rows]` enters layer `l`,
/// and what comes out of it is `[tokens, num_heads · head_dim]`.
fn read<B: UnderTest>(
    backend: &B,
    attentions: &[Attention],
    ropes: &[Rope],
    texts: &[Vec<f32>],
    parts: &[usize],
    bits: KvBits,
) -> Vec<Vec<f32>> {
    let len: usize = parts.iter().sum();
    let mut cache = backend.cache(&model(attentions, ropes.to_vec()), 1, len, bits).unwrap();
    backend.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
    let mut got = vec![Vec::new(); attentions.len()];
    let mut start = 0;
    for &tokens in parts {
        let rows = [Rows { slot: 0, position: start, count: tokens }];
        for (l, attention) in attentions.iter().enumerate() {
            let (width, out_width) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
            let qkv = upload(backend, &texts[l][start * width..(start + tokens) * width]);
            let mut out = backend.vector(tokens * out_width).unwrap();
            backend.attend(&mut cache, l, &rows, &qkv, &mut out).unwrap();
            got[l].extend(download(backend, &out, tokens * out_width));
        }
        backend.advance(&mut cache, &rows).unwrap();
        start += tokens;
    }
    got
}

/// What a token would find at the positions that it sees, were its whole part written over what a window remembers before
/// the part attends to it.
fn overwritten(window: usize, parts: &[usize], t: usize) -> Vec<usize> {
    let ends = parts.iter().scan(0, |end, tokens| {
        *end += tokens;
        Some(*end)
    });
    let latest = ends.into_iter().find(|&end| end > t).expect("a part") - 1;
    ((t + 1).saturating_sub(window)..t + 1).map(|position| latest - (latest - position) % window).collect()
}

/// A text of `parts` tokens at a time through layers of these attentions; none of the wrong ones beside each fits, and
/// neither does one of which a part replaces what it still has to see.
fn check_attention<B: UnderTest>(backend: &B, layers: &[(Attention, Vec<Attention>)], ropes: &[Rope], parts: &[usize]) {
    let len: usize = parts.iter().sum();
    let attentions: Vec<Attention> = layers.iter().map(|(attention, _)| attention.clone()).collect();
    let text = |l: usize| common::uniform(l as u64 + 1, len * attentions[l].qkv_rows());
    let texts: Vec<Vec<f32>> = (0..layers.len()).map(text).collect();
    let got = read(backend, &attentions, ropes, &texts, parts, KvBits::Whole);
    for (l, (attention, wrong)) in layers.iter().enumerate() {
        let qkv: Vec<Vec<f64>> = texts[l].chunks_exact(attention.qkv_rows()).map(exact).collect();
        let want = oracle::attend(attention, ropes, &qkv).concat();
        // |q·k| ≤ 2·dim, since a rotated pair of numbers below 1 stays below √2; a cap is off by what logits' is; an
        // error of the scores moves every share by at most twice as much, relatively; |values| ≤ 1.
        let dim = attention.head_dim;
        let score = common::tolerance(0.0, 0.0, dim + 16, 2.0 * dim as f64 * attention.scale_at(len).abs())
            + attention.softcap.unwrap_or(0.0) * 16.0 * 2f64.powi(-24);
        let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], len + 16, 1.0) + 2.0 * score;
        assert_eq!(common::misfit(&got[l], &want, allowed), None, "layer {l}, {attention:?}, {parts:?}");
        for wrong in wrong {
            let wrong_out = oracle::attend(wrong, ropes, &qkv).concat();
            assert!(common::misfit(&got[l], &wrong_out, allowed).is_some(), "layer {l}: {wrong:?} goes unseen");
        }
        let Some(window) = attention.window else { continue };
        let replaced = |&t: &usize| overwritten(window, parts, t).first() != Some(&(t + 1).saturating_sub(window));
        let replaced = (0..len).filter(replaced).count();
        // A single key of little weight might go unseen.
        if replaced >= 4 {
            let wrong_out = oracle::attend_to(attention, ropes, &qkv, &|t| overwritten(window, parts, t)).concat();
            let misfit = common::misfit(&got[l], &wrong_out, allowed);
            assert!(misfit.is_some(), "layer {l}, {attention:?}, {parts:?}: {replaced} tokens replaced too early");
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
    // Round the rings many times, in the longest parts.
    let rest = most.min(100);
    check_attention(backend, &layers[1..2], &ropes, &[most, 1, 1, rest, 1, 1, 1]);
    check_attention(backend, &layers[3..], &ropes, &[rest, most, 1, 1]);
}

/// Attention of any shape, in any parts.
pub(crate) fn attention_of_any_shape<B: UnderTest>(backend: &B) {
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
        let mut wrong = if seen < 4 { vec![] } else { vec![Attention { window: Some(seen - 1), ..attention.clone() }] };
        if let Some(window) = window.filter(|window| parts.iter().sum::<usize>() >= window + 4) {
            wrong.push(Attention { window: Some(window + 1), ..attention.clone() });
        }
        check_attention(backend, &[(attention, wrong)], &ropes, &parts);
    });
}

/// What layers remember of a text does not depend on how many of its tokens came at once, to the bit: a token behind it has
/// the same answer. That answer depends on the oldest token of the window and on none before.
pub(crate) fn what_layers_remember<B: UnderTest>(backend: &B) {
    remember_in(backend, KvBits::Whole);
    if !backend.device().id.starts_with("cuda") {
        remember_in(backend, KvBits::Eight);
    }
}

fn remember_in<B: UnderTest>(backend: &B, bits: KvBits) {
    let (most, len, behind) = (backend.device().max_tokens.min(61), 61, 3);
    let ropes = [rope(10_000.0, 16), rope(10_000.0, 24)];
    let of = |rope, window| {
        let head_dim = if rope == Some(1) { 24 } else { 16 };
        Attention { rope, window, ..attention(6, 2, head_dim) }
    };
    let attentions =
        [of(Some(0), None), of(Some(0), Some(5)), of(None, Some(16)), of(Some(1), Some(40)), of(Some(1), Some(1))];
    let text = |l: usize| common::uniform(l as u64 + 1, (len + behind) * attentions[l].qkv_rows());
    let texts: Vec<Vec<f32>> = (0..attentions.len()).map(text).collect();
    let answers = |texts: &[Vec<f32>], at_once: usize| {
        let mut parts = vec![at_once; len / at_once];
        parts.extend(Some(len % at_once).filter(|&rest| rest > 0));
        parts.extend(vec![1; behind]);
        let got = read(backend, &attentions, &ropes, texts, &parts, bits);
        let words = |(out, attention): (Vec<f32>, &Attention)| {
            let width = attention.num_heads * attention.head_dim;
            out[len * width..].iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
        };
        got.into_iter().zip(&attentions).map(words).collect::<Vec<_>>()
    };
    let one_by_one = answers(&texts, 1);
    for at_once in [2, 7, 16.min(most), most] {
        let got = answers(&texts, at_once);
        for (l, attention) in attentions.iter().enumerate() {
            assert!(got[l] == one_by_one[l], "layer {l}, {attention:?}: {at_once} tokens at once leave something else");
        }
    }
    for (l, attention) in attentions.iter().enumerate() {
        let Some(window) = attention.window.filter(|&window| window > 1) else { continue };
        let (width, oldest) = (attention.qkv_rows(), len + 1 - window);
        for (token, seen) in [(oldest, true), (oldest - 1, false)] {
            let mut other = texts.clone();
            other[l][token * width..(token + 1) * width].iter_mut().for_each(|x| *x = -*x);
            let same = answers(&other, most)[l] == one_by_one[l];
            assert_eq!(same, !seen, "layer {l}, {attention:?}: another token {token}");
        }
    }
}

/// With keys and values in bytes, attention is that to what bytes keep of them: within what f32 sums are off, and not that to
/// the numbers themselves.
pub(crate) fn attention_to_bytes<B: UnderTest>(backend: &B) {
    if backend.device().id.starts_with("cuda") {
        common::devices::skip("CUDA keeps keys and values in 16 bits");
        return;
    }
    let most = backend.device().max_tokens.min(20);
    for (attention, window) in [(attention(4, 2, 16), None), (attention(5, 1, 24), Some(7))] {
        let attention = Attention { rope: None, window, ..attention };
        let (width, dim) = (attention.qkv_rows(), attention.head_dim);
        let parts = [1, most, 3, most, 1, 1];
        let len: usize = parts.iter().sum();
        let text = common::uniform(9, len * width);
        let texts = std::slice::from_ref(&text);
        let got = read(backend, std::slice::from_ref(&attention), &[], texts, &parts, KvBits::Eight);
        let round = |head: &[f32]| {
            let largest = head.iter().fold(0f32, |most, x| most.max(x.abs()));
            let byte = |&x: &f32| largest / 127.0 * (x * (127.0 / largest)).round_ties_even();
            head.iter().map(byte).collect::<Vec<_>>()
        };
        let rounded = |qkv: &[f32]| {
            let (queries, rest) = qkv.split_at(attention.num_heads * dim);
            exact(&[queries.to_vec(), rest.chunks_exact(dim).flat_map(round).collect()].concat())
        };
        let whole: Vec<Vec<f64>> = text.chunks_exact(width).map(exact).collect();
        let kept: Vec<Vec<f64>> = text.chunks_exact(width).map(rounded).collect();
        let want = oracle::attend(&attention, &[], &kept).concat();
        let score = common::tolerance(0.0, 0.0, dim + 16, 2.0 * dim as f64 * attention.scale_at(len).abs());
        let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], len + 16, 1.0) + 2.0 * score;
        assert_eq!(common::misfit(&got[0], &want, allowed), None, "{attention:?}");
        let other = oracle::attend(&attention, &[], &whole).concat();
        assert!(common::misfit(&got[0], &other, allowed).is_some(), "{attention:?}: bytes go unseen");
    }
}
