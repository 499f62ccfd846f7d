//! Every derivative against differences of the forward pass.

use super::*;
use crate::config::{Architecture, RopeScaling};
use crate::sampling;

fn config(sliding_window: Option<usize>) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 1,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        vocab_size: 8,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        sliding_window,
        max_position_embeddings: 256,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

fn numbers(seed: u64, len: usize, amplitude: f32) -> Vec<f32> {
    sampling::draws(seed, len).iter().map(|x| (2.0 * x - 1.0) * amplitude).collect()
}

/// A layer of which every 32nd channel is compensated.
fn compensated(config: &ModelConfig) -> Compensated {
    let linears = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(p);
        let weight = numbers(p.index() as u64 + 1, in_features * out_features, 0.5);
        Affine { in_features, out_features, weight, bias: None }
    });
    let lost = Projection::ALL.map(|p| {
        let (in_features, out_features) = config.shape(p);
        numbers(p.index() as u64 + 11, in_features * out_features, 0.1)
    });
    let gamma = |seed| numbers(seed, config.hidden_size, 0.5).iter().map(|x| 1.0 + x).collect();
    Compensated { layer: Layer { input_norm: gamma(5), post_norm: gamma(6), linears }, lost, k_chunks: [32; 4] }
}

const TEXTS: usize = 2;
const TOKENS: usize = 7;

/// A linear function of what comes out, and which channels are taken.
fn value(layer: &Compensated, config: &ModelConfig, h: &[f32], by: &[f32]) -> (f64, [Taken; 4]) {
    let mut h = h.to_vec();
    let trace = layer.forward(config, &Rope::new(config, TOKENS), TEXTS, &mut h).unwrap();
    (h.iter().zip(by).map(|(h, by)| f64::from(*h) * f64::from(*by)).sum(), trace.taken)
}

/// What `got` says of a change, and what differences say, must agree to what f32 resolves. False if another channel is
/// taken after the change: the output jumps there.
fn agree(what: &str, got: f32, mut at: impl FnMut(f32) -> (f64, [Taken; 4])) -> bool {
    let step = 4e-3;
    let (above, below) = (at(step), at(-step));
    let want = (above.0 - below.0) / f64::from(2.0 * step);
    let error = (f64::from(got) - want).abs();
    let same = above.1 == below.1;
    assert!(!same || error < 1e-2 * want.abs() + 1e-2, "{what}: {got}, differences say {want}");
    same
}

#[test]
fn derivatives_are_those_of_the_forward_pass() {
    for window in [None, Some(3)] {
        let config = config(window);
        let mut layer = compensated(&config);
        let mut h = numbers(20, TEXTS * TOKENS * config.hidden_size, 1.0);
        let by = numbers(21, h.len(), 1.0);
        let rope = Rope::new(&config, TOKENS);
        let trace = layer.forward(&config, &rope, TEXTS, &mut h.clone()).unwrap();
        assert!(trace.taken.iter().all(Taken::any));
        let mut d = by.clone();
        let mut compared = 0;
        let gradients = layer.backward(&config, &rope, TEXTS, trace, &mut d);
        for i in (0..h.len()).step_by(23) {
            let old = h[i];
            compared += usize::from(agree(&format!("input {i}"), d[i], |step| {
                h[i] = old + step;
                value(&layer, &config, &h, &by)
            }));
            h[i] = old;
        }
        for (p, gradient) in gradients.iter().enumerate() {
            for i in (0..gradient.len()).step_by(gradient.len() / 37) {
                let (n, m) = (layer.layer.linears[p].in_features, layer.layer.linears[p].out_features);
                let (row, k) = (i / n, i % n);
                let (old, old_lost) = (layer.layer.linears[p].weight[i], layer.lost[p][k * m + row]);
                compared += usize::from(agree(&format!("projection {p}, weight {i}"), gradient[i], |step| {
                    // The full-precision weight stays.
                    layer.layer.linears[p].weight[i] = old + step;
                    layer.lost[p][k * m + row] = old_lost - step;
                    value(&layer, &config, &h, &by)
                }));
                (layer.layer.linears[p].weight[i], layer.lost[p][k * m + row]) = (old, old_lost);
            }
        }
        assert!(compared > 120, "{compared} derivatives compared");
    }
}
