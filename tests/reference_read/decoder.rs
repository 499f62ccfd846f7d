//! A decoder in f64, as plain as it can be, over dequantized rows.
//!
//! Oracles are half-precision models turned to f32: the sums of alphas that LUT-GEMM's weights are, and the rotary
//! frequencies, are then rounded to f16. The decoder does either.

use decdec::config::{Attention, LayerNorm, ModelConfig, Projection, RopeScaling};
use decdec::weights::{Linear, ModelWeights, Weight};
use half::f16;

/// A dense matrix, `[out_features, in_features]`, and its bias.
pub(crate) struct Matrix {
    pub(crate) in_features: usize,
    pub(crate) values: Vec<f64>,
    pub(crate) bias: Vec<f64>,
}

/// A dequantized model.
pub(crate) struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) embedding: Matrix,
    pub(crate) head: Matrix,
    pub(crate) final_norm: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    rotary: Vec<f64>, // [head_dim / 2]
}

/// Where the decoder rounds as an oracle of half precision did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounded {
    pub(crate) weights: bool,
    pub(crate) rotary: bool,
}

impl Rounded {
    pub(crate) const NOTHING: Self = Self { weights: false, rotary: false };
    pub(crate) const ALL: Self = Self { weights: true, rotary: true };
    /// What an oracle may have done.
    pub(crate) const EVERY: [Self; 4] =
        [Self::ALL, Self { rotary: false, ..Self::ALL }, Self { weights: false, ..Self::ALL }, Self::NOTHING];
}

pub(crate) struct Layer {
    pub(crate) norms: (Vec<f32>, Vec<f32>),
    pub(crate) projections: [Matrix; 4], // as in `Projection::ALL`
}

/// γ before attention and γ before the feed-forward part.
pub(crate) fn norms(weights: &dyn ModelWeights, layer: usize) -> (Vec<f32>, Vec<f32>) {
    let norm = |norm| weights.norm(layer, norm).unwrap();
    (norm(LayerNorm::AttentionInput), norm(LayerNorm::FeedForwardInput))
}

impl Matrix {
    pub(crate) fn new(linear: &Linear<'_>, with_residual: bool, rounded: bool) -> Self {
        let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
        let mut values = Vec::with_capacity(in_features * out_features);
        let (mut weight, mut residual) = (vec![0.0; in_features], vec![0.0; in_features]);
        for row in 0..out_features {
            linear.weight.row(row, &mut weight);
            if with_residual {
                linear.residual.as_ref().expect("a residual").row(row, &mut residual);
            }
            // Exact for codebooks, which are in half precision themselves.
            let round = |w: f32| if rounded { f16::from_f32(w).to_f64() } else { w.into() };
            values.extend(weight.iter().zip(&residual).map(|(&w, &r)| round(w) + f64::from(r)));
        }
        let bias = linear.bias.as_ref().map_or(vec![0.0; out_features], |b| b.iter().map(|&b| b.into()).collect());
        Self { in_features, values, bias }
    }

    pub(crate) fn times(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.values.chunks_exact(self.in_features).zip(&self.bias);
        rows.map(|(row, bias)| bias + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
    }
}

impl Model {
    pub(crate) fn read(weights: &dyn ModelWeights, with_residuals: bool, rounded: Rounded) -> Self {
        let config = weights.config().clone();
        let table = |dense| Matrix::new(&Linear::plain(Weight::Dense(dense)), false, false);
        let embedding = table(weights.embedding().unwrap());
        let head = table(weights.head().unwrap().unwrap_or_else(|| weights.embedding().unwrap()));
        let layer = |layer| Layer {
            norms: norms(weights, layer),
            projections: Projection::ALL
                .map(|p| Matrix::new(&weights.projection(layer, p).unwrap(), with_residuals, rounded.weights)),
        };
        let layers = (0..config.layers.len()).map(layer).collect();
        let rotary = rotary(&config);
        let rotary = match rounded.rotary {
            true => rotary.into_iter().map(|f| f16::from_f64(f).to_f64()).collect(),
            false => rotary,
        };
        Self { embedding, head, final_norm: weights.final_norm().unwrap(), layers, config, rotary }
    }

    /// Logits of every position, `[tokens, vocab_size]`.
    pub(crate) fn logits(&self, tokens: &[usize]) -> Vec<f64> {
        let hidden = self.config.hidden_size;
        let mut stream: Vec<Vec<f64>> =
            tokens.iter().map(|&t| self.embedding.values[t * hidden..][..hidden].to_vec()).collect();
        for layer in &self.layers {
            let [qkv, o, gate_up, down] = &layer.projections;
            let fused: Vec<_> = stream.iter().map(|h| qkv.times(&self.norm(h, &layer.norms.0))).collect();
            for (position, h) in stream.iter_mut().enumerate() {
                add(h, &o.times(&self.attend(&fused, position)));
                let gu = gate_up.times(&self.norm(h, &layer.norms.1));
                let (gate, up) = gu.split_at(gu.len() / 2);
                let product: Vec<_> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(h, &down.times(&product));
            }
        }
        stream.iter().flat_map(|h| self.head.times(&self.norm(h, &self.final_norm))).collect()
    }

    /// `2·depth·2^-24·Σ|w·x|` of the head's largest row, for an `x` whose mean square is 1 before γ.
    pub(crate) fn head_tolerance(&self) -> f64 {
        let hidden = self.config.hidden_size;
        let gamma = self.final_norm.iter().map(|&g| f64::from(g));
        // By Cauchy and Schwarz, Σ|w·γ·x| ≤ |w·γ|·√hidden.
        let rows = self.head.values.chunks_exact(hidden);
        let norms = rows.map(|row| row.iter().zip(gamma.clone()).map(|(w, g)| (w * g).powi(2)).sum::<f64>().sqrt());
        2.0 * hidden as f64 * 2f64.powi(-24) * norms.fold(0.0, f64::max) * (hidden as f64).sqrt()
    }

    fn attention(&self) -> &Attention {
        self.config.layers[0].attention()
    }

    pub(crate) fn norm(&self, h: &[f64], gamma: &[f32]) -> Vec<f64> {
        let mean = h.iter().map(|x| x * x).sum::<f64>() / h.len() as f64;
        let scale = 1.0 / (mean + f64::from(self.config.rms_norm_eps)).sqrt();
        h.iter().zip(gamma).map(|(x, &g)| x * scale * f64::from(g)).collect()
    }

    /// Head `head` (queries first, then keys) at `position`, rotated: dimension `i` pairs with `i + half`.
    pub(crate) fn rotated(&self, qkv: &[f64], head: usize, position: usize) -> Vec<f64> {
        let dim = self.attention().head_dim;
        let (first, second) = qkv[head * dim..][..dim].split_at(dim / 2);
        let angle = |i: usize| position as f64 * self.rotary[i];
        let pairs = first.iter().zip(second).enumerate();
        let low = pairs.clone().map(|(i, (a, b))| a * angle(i).cos() - b * angle(i).sin());
        let high = pairs.map(|(i, (a, b))| b * angle(i).cos() + a * angle(i).sin());
        low.chain(high).collect()
    }

    pub(crate) fn attend(&self, qkv: &[Vec<f64>], position: usize) -> Vec<f64> {
        let Attention { num_heads, num_kv_heads, head_dim, window, .. } = *self.attention();
        let mut out = Vec::new();
        for head in 0..num_heads {
            let kv_head = head * num_kv_heads / num_heads;
            let query = self.rotated(&qkv[position], head, position);
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let scores = qkv[..=position].iter().enumerate().skip(first).map(|(p, qkv)| {
                let key = self.rotated(qkv, num_heads + kv_head, p);
                query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()
            });
            let scores: Vec<_> = scores.collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<_> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; head_dim];
            for (weight, qkv) in weights.iter().zip(&qkv[first..]) {
                let value = &qkv[(num_heads + num_kv_heads + kv_head) * head_dim..][..head_dim];
                mixed.iter_mut().zip(value).for_each(|(m, v)| *m += weight / sum * v);
            }
            out.extend(mixed);
        }
        out
    }
}

/// The inverse frequencies of RoPE; where they are scaled, those of the configuration, which has its own tests.
fn rotary(config: &ModelConfig) -> Vec<f64> {
    let rope = &config.ropes[0];
    if rope.scaling != RopeScaling::None {
        return rope.frequencies(config.max_position_embeddings);
    }
    let dim = rope.head_dim as f64;
    (0..rope.head_dim / 2).map(|i| rope.theta.powf(-(2.0 * i as f64) / dim)).collect()
}

pub(crate) fn add(h: &mut [f64], delta: &[f64]) {
    h.iter_mut().zip(delta).for_each(|(h, d)| *h += d);
}
