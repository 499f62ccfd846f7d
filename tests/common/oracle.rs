//! What every backend is held against, in f64: dequantize and multiply, select, normalize, rotate, attend.
//!
//! Written from the formulas alone, with nothing of the backends or of `dec.rs` in it.

use decdec::config::{Activation, Attention, LayerNorm, Projection, Rope};
use decdec::dec::Selection;
use decdec::weights::{Linear, ModelWeights, Weight};

/// `W·x + bias`, `[out_features]`, and for every row the sum of the magnitudes that were added up.
pub(crate) fn gemv(linear: &Linear<'_>, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut row = vec![0.0; linear.weight.in_features()];
    let rows = (0..linear.weight.out_features()).map(|i| {
        linear.weight.row(i, &mut row);
        let bias = linear.bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]));
        let sum: f64 = row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        (bias + sum, bias.abs() + row_magnitude(linear, i, &row, x))
    });
    rows.unzip()
}

/// A binary-coded row may be summed plane by plane: there the planes' magnitudes count, not the weights'.
fn row_magnitude(linear: &Linear<'_>, i: usize, row: &[f32], x: &[f64]) -> f64 {
    let Weight::LutGemm(w) = &linear.weight else {
        return row.iter().zip(x).map(|(&w, x)| (f64::from(w) * x).abs()).sum();
    };
    let size = |k: usize| {
        let g = k / w.group_size();
        let alpha = |b: usize| w.alpha().get((g * w.bits() + b) * w.out_features() + i).abs();
        f64::from(w.q_bias().get(g * w.out_features() + i).abs() + (0..w.bits()).map(alpha).sum::<f32>())
    };
    x.iter().enumerate().map(|(k, x)| size(k) * x.abs()).sum()
}

/// `s · Σ q·x` over `channels`, `[out_features]`, and the magnitudes.
pub(crate) fn correction(linear: &Linear<'_>, channels: &[u32], x: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let residual = linear.residual.as_ref().unwrap();
    let rows = (0..residual.out_features()).map(|row| {
        let scale = f64::from(residual.scales().get(row));
        let term = |&c: &u32| scale * f64::from(residual.nibble(c as usize, row)) * x[c as usize];
        (channels.iter().map(term).sum::<f64>(), channels.iter().map(|c| term(c).abs()).sum::<f64>())
    });
    rows.unzip()
}

/// The salient channels of `x` by spec §3.1, ascending: chunk by chunk, all channels in order of preference.
pub(crate) fn select(x: &[f32], thresholds: &[f32], k_chunk: usize, selection: Selection) -> Vec<u32> {
    let edges = edges(thresholds, k_chunk * x.len() / 1024);
    let mut selected = Vec::new();
    for (chunk, x) in x.chunks(1024).enumerate() {
        // Smaller is preferred. NaN and infinity come before every other number.
        let rank = |x: f32| match selection {
            Selection::Bucket if x.is_nan() => 0.0,
            Selection::Bucket => edges.iter().take_while(|&&edge| x.abs() < edge).count() as f64,
            Selection::Exact if x.is_nan() => f64::NEG_INFINITY,
            Selection::Exact => -f64::from(x.abs()).min(f64::MAX),
        };
        // NaN's payloads count in exact selection: the larger bit pattern is preferred.
        let payload = |x: f32| if x.is_nan() && selection == Selection::Exact { x.abs().to_bits() } else { 0 };
        let mut order: Vec<(f64, u32, usize)> =
            x.iter().enumerate().map(|(i, &x)| (rank(x), u32::MAX - payload(x), i)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut order: Vec<usize> = order.into_iter().map(|(_, _, i)| i).collect();
        order.truncate(k_chunk * x.len() / 1024);
        order.sort_unstable();
        selected.extend(order.into_iter().map(|i| (1024 * chunk + i) as u32));
    }
    selected
}

fn edges(thresholds: &[f32], k: usize) -> [f32; 32] {
    let (a, b) = (thresholds[0], thresholds[k.max(1) - 1]);
    let mut edges = std::array::from_fn(|i| match i {
        0..16 => a + (b - a) * i as f32 / 15.0,
        _ => b * (31 - i) as f32 / 16.0,
    });
    for i in 1..32 {
        edges[i] = edges[i].min(edges[i - 1]);
    }
    edges
}

/// `γ · h / √(mean(h²) + ε)`
pub(crate) fn rms_norm(gamma: &[f32], eps: f32, h: &[f64]) -> Vec<f64> {
    let mean = h.iter().map(|h| h * h).sum::<f64>() / h.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    h.iter().zip(gamma).map(|(h, &gamma)| f64::from(gamma) * h * scale).collect()
}

/// `x / (1 + e^−x)`, or GELU's form `x / 2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            // Far below 0 the sum with 1 would cancel to nothing: there (1 + tanh u) / 2 = 1 / (1 + e^−2u) says it.
            if u < -1.0 { x / (1.0 + (-2.0 * u).exp()) } else { x / 2.0 * (1.0 + u.tanh()) }
        }
    }
}

/// `activation(gate) ⊙ up`, gate then up in `gu`.
pub(crate) fn gated(activation: Activation, gu: &[f64]) -> Vec<f64> {
    let (gate, up) = gu.split_at(gu.len() / 2);
    gate.iter().zip(up).map(|(&gate, up)| activated(activation, gate) * up).collect()
}

/// One head, rotated by half-split RoPE.
pub(crate) fn rotate(head: &[f64], frequencies: &[f64], position: usize) -> Vec<f64> {
    let half = head.len() / 2;
    let mut out = vec![0.0; head.len()];
    for i in 0..half {
        let (sin, cos) = (position as f64 * frequencies[i]).sin_cos();
        out[i] = head[i] * cos - head[i + half] * sin;
        out[i + half] = head[i + half] * cos + head[i] * sin;
    }
    out
}

/// Causal attention of a whole text: `qkv[t]` of every token, the output of every token.
pub(crate) fn attend(attention: &Attention, ropes: &[Rope], qkv: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let window = attention.window.unwrap_or(usize::MAX);
    attend_to(attention, ropes, qkv, &|t| ((t + 1).saturating_sub(window)..t + 1).collect())
}

/// The same where token `t` sees the positions `seen(t)`.
pub(crate) fn attend_to(
    attention: &Attention,
    ropes: &[Rope],
    qkv: &[Vec<f64>],
    seen: &dyn Fn(usize) -> Vec<usize>,
) -> Vec<Vec<f64>> {
    let Attention { num_heads: heads, num_kv_heads: kv_heads, head_dim: dim, .. } = *attention;
    let frequencies = attention.rope.map(|rope| ropes[rope].frequencies(qkv.len()));
    let head = |t: usize, i: usize| &qkv[t][i * dim..(i + 1) * dim];
    let rotated = |t: usize, i: usize| match &frequencies {
        Some(frequencies) => rotate(head(t, i), frequencies, t),
        None => head(t, i).to_vec(),
    };
    let all = |kv: usize| (0..qkv.len()).map(|t| rotated(t, heads + kv)).collect();
    let keys: Vec<Vec<Vec<f64>>> = (0..kv_heads).map(all).collect();
    let one = |t: usize, h: usize| -> Vec<f64> {
        let (q, kv, seen) = (rotated(t, h), h / (heads / kv_heads), seen(t));
        let grown = attention.query_scaling.map_or(1.0, |s| 1.0 + s.beta * ((1 + t / s.original) as f64).ln());
        let score = |k: &Vec<f64>| attention.scale * grown * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
        let capped = |s: f64| attention.softcap.map_or(s, |cap| cap * (s / cap).tanh());
        let scores: Vec<f64> = seen.iter().map(|&s| capped(score(&keys[kv][s]))).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shares: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = shares.iter().sum();
        let value = |s: usize| head(s, heads + kv_heads + kv);
        (0..dim).map(|j| seen.iter().zip(&shares).map(|(&s, share)| share / total * value(s)[j]).sum()).collect()
    };
    (0..qkv.len()).map(|t| (0..heads).flat_map(|h| one(t, h)).collect()).collect()
}

/// A whole model: the logits that follow each of `tokens`. With `compensated` every channel is.
pub(crate) fn forward(weights: &dyn ModelWeights, tokens: &[u32], compensated: bool) -> Vec<Vec<f64>> {
    let config = weights.config();
    let table = Linear::plain(Weight::Dense(weights.embedding().unwrap()));
    let mut row = vec![0.0; config.hidden_size];
    let mut texts: Vec<Vec<f64>> = Vec::new();
    for &token in tokens {
        table.weight.row(token as usize, &mut row);
        texts.push(row.iter().map(|&h| f64::from(h)).collect());
    }
    let project = |layer: usize, projection: Projection, x: &[f64]| {
        let linear = weights.projection(layer, projection).unwrap();
        let (mut y, _) = gemv(&linear, x);
        if compensated {
            let all: Vec<u32> = (0..x.len() as u32).collect();
            y.iter_mut().zip(correction(&linear, &all, x).0).for_each(|(y, c)| *y += c);
        }
        y
    };
    let add = |h: &mut Vec<f64>, y: Vec<f64>| h.iter_mut().zip(y).for_each(|(h, y)| *h += y);
    for layer in 0..config.layers.len() {
        let [input, post] =
            [LayerNorm::AttentionInput, LayerNorm::FeedForwardInput].map(|norm| weights.norm(layer, norm).unwrap());
        let norm = |gamma: &[f32], h: &[f64]| rms_norm(gamma, config.rms_norm_eps, h);
        let qkv: Vec<_> = texts.iter().map(|h| project(layer, Projection::Qkv, &norm(&input, h))).collect();
        for (h, attended) in texts.iter_mut().zip(attend(config.layers[layer].attention(), &config.ropes, &qkv)) {
            add(h, project(layer, Projection::O, &attended));
            let gu = project(layer, Projection::GateUp, &norm(&post, h));
            add(h, project(layer, Projection::Down, &gated(Activation::Silu, &gu)));
        }
    }
    let gamma = weights.final_norm().unwrap();
    let head = weights.head().unwrap().map_or(table, |head| Linear::plain(Weight::Dense(head)));
    texts.iter().map(|h| gemv(&head, &rms_norm(&gamma, config.rms_norm_eps, h)).0).collect()
}
