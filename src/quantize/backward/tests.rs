//! Every derivative against differences of the forward pass.

use serde_json::json;

use super::super::fixture::{self, numbers};
use super::*;

fn config(sliding_window: Option<usize>) -> ModelConfig {
    let fields = json!({
        "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "sliding_window": sliding_window,
    });
    fixture::config().with(fields).unwrap()
}

/// A layer of which every 32nd channel is compensated.
fn compensated(config: &ModelConfig) -> Compensated {
    let layer = fixture::layer(config, 0.5);
    let originals = Projection::ALL.map(|p| {
        let weight = &layer.linear(p).weight;
        let lost = numbers(p.index() as u64 + 11, weight.len(), 0.1);
        weight.iter().zip(lost).map(|(w, lost)| w + lost).collect()
    });
    Compensated { layer, originals, k_chunks: [32; 4] }
}

const TEXTS: usize = 2;
const TOKENS: usize = 7;

/// A linear function of what comes out, and which channels are taken.
fn value(layer: &Compensated, config: &ModelConfig, h: &[f32], by: &[f32]) -> (f64, [Taken; 4]) {
    let mut h = h.to_vec();
    let (trace, _) = layer.forward(config, &Ropes::new(config, TOKENS), TEXTS, &mut h).unwrap();
    (h.iter().zip(by).map(|(h, by)| f64::from(*h) * f64::from(*by)).sum(), trace.taken)
}

/// What `got[i]` says of a change, and what differences say, must agree to what f32 resolves and to twice the rounding
/// of what is kept in bf16, of the largest. False if another channel is taken after the change: the output jumps there.
fn agree(what: &str, got: &[f32], i: usize, mut at: impl FnMut(f32) -> (f64, [Taken; 4])) -> bool {
    let step = 4e-3;
    let (above, below) = (at(step), at(-step));
    let want = (above.0 - below.0) / f64::from(2.0 * step);
    let error = (f64::from(got[i]) - want).abs();
    let rounding = 2f64.powi(-8) * f64::from(got.iter().fold(0f32, |m, d| m.max(d.abs())));
    let same = above.1 == below.1;
    assert!(!same || error < 1e-2 * want.abs() + 5e-3 + rounding, "{what} {i}: {}, differences say {want}", got[i]);
    same
}

#[test]
fn derivatives_are_those_of_the_forward_pass() {
    for window in [None, Some(3)] {
        let config = config(window);
        let mut layer = compensated(&config);
        let mut h = numbers(20, TEXTS * TOKENS * config.hidden_size, 1.0);
        let by = numbers(21, h.len(), 1.0);
        let ropes = Ropes::new(&config, TOKENS);
        let (trace, _) = layer.forward(&config, &ropes, TEXTS, &mut h.clone()).unwrap();
        assert!(trace.taken.iter().all(Taken::any));
        let mut d = by.clone();
        let mut compared = 0;
        let gradients = layer.backward(&config, &ropes, TEXTS, trace, &mut d);
        for i in (0..h.len()).step_by(23) {
            let old = h[i];
            compared += usize::from(agree("input", &d, i, |step| {
                h[i] = old + step;
                value(&layer, &config, &h, &by)
            }));
            h[i] = old;
        }
        for (p, gradient) in gradients.iter().enumerate() {
            for i in (0..gradient.len()).step_by(gradient.len() / 37) {
                let old = layer.layer.linears[p].weight[i];
                compared += usize::from(agree(&format!("projection {p}, weight"), gradient, i, |step| {
                    layer.layer.linears[p].weight[i] = old + step;
                    value(&layer, &config, &h, &by)
                }));
                layer.layer.linears[p].weight[i] = old;
            }
        }
        assert!(compared > 120, "{compared} derivatives compared");
    }
}
