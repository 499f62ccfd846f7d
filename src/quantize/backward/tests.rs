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

/// What differences say of a derivative: of the input, or of a projection's weights.
struct Difference {
    projection: Option<usize>,
    index: usize,
    slope: f64,
}

/// Derivatives by what enters and by every projection's weights.
type Derivatives = (Vec<f32>, [Vec<f32>; 4]);

fn derivatives(config: &ModelConfig, h: &[f32], by: &[f32]) -> Derivatives {
    let (layer, ropes) = (compensated(config), Ropes::new(config, TOKENS));
    let (trace, _) = layer.forward(config, &ropes, TEXTS, &mut h.to_vec()).unwrap();
    assert!(trace.taken.iter().all(Taken::any));
    let numbers = trace.entered.iter().chain(&trace.branches).map(Vec::len).sum::<usize>() + trace.qkv.len();
    assert_eq!(2 * numbers, TEXTS * TOKENS * trace_bytes(config, 0), "what an estimate says of a trace");
    let mut d = by.to_vec();
    let weights = layer.backward(config, &ropes, TEXTS, trace, &mut d);
    (d, weights)
}

/// Some of the derivatives from differences. Those where another channel is taken after the change are left out: the
/// output jumps there.
fn differences(config: &ModelConfig, h: &[f32], by: &[f32]) -> Vec<Difference> {
    let mut layer = compensated(config);
    let mut all = Vec::new();
    let step = 4e-3;
    let mut compare = |projection, index, at: &mut dyn FnMut(f32) -> (f64, [Taken; 4])| {
        let (above, below) = (at(step), at(-step));
        if above.1 == below.1 {
            all.push(Difference { projection, index, slope: (above.0 - below.0) / f64::from(2.0 * step) });
        }
    };
    for i in (0..h.len()).step_by(23) {
        compare(None, i, &mut |step| {
            let mut h = h.to_vec();
            h[i] += step;
            value(&layer, config, &h, by)
        });
    }
    for p in 0..4 {
        let len = layer.layer.linears[p].weight.len();
        for i in (0..len).step_by(len / 37) {
            let old = layer.layer.linears[p].weight[i];
            compare(Some(p), i, &mut |step| {
                layer.layer.linears[p].weight[i] = old + step;
                value(&layer, config, h, by)
            });
            layer.layer.linears[p].weight[i] = old;
        }
    }
    all
}

/// What derivatives and differences disagree about, beyond what f32 resolves and twice the rounding of what is kept in
/// bf16, of the largest.
fn disagreements((d, weights): &Derivatives, differences: &[Difference]) -> Vec<String> {
    let wrong = differences.iter().filter_map(|&Difference { projection, index, slope: want }| {
        let got = projection.map_or(d, |p| &weights[p]);
        let error = (f64::from(got[index]) - want).abs();
        let rounding = 2f64.powi(-8) * f64::from(got.iter().fold(0f32, |m, d| m.max(d.abs())));
        let agrees = error < 1e-2 * want.abs() + 5e-3 + rounding;
        (!agrees).then(|| format!("{projection:?} {index}: {}, differences say {want}", got[index]))
    });
    wrong.collect()
}

#[test]
fn derivatives_are_those_of_the_forward_pass() {
    let base = config(None);
    let h = numbers(20, TEXTS * TOKENS * base.hidden_size, 1.0);
    let by = numbers(21, h.len(), 1.0);
    let plain = derivatives(&base, &h, &by);
    for (name, config) in fixture::variants(&base) {
        let differences = differences(&config, &h, &by);
        assert!(differences.len() > 120, "{name}: {} derivatives compared", differences.len());
        let wrong = disagreements(&derivatives(&config, &h, &by), &differences);
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        let unlike = disagreements(&plain, &differences).len();
        assert!(name == "plain" || unlike > 5, "{name}: derivatives of another layer show in {unlike} places");
    }
}
