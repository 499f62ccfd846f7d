//! Every derivative against differences of the forward pass.

use std::sync::Arc;

use serde_json::json;

use super::super::compute::Coded;
use super::super::fixture::{self, numbers};
use super::super::forward::Layer;
use super::super::host::Host;
use super::*;

fn config(sliding_window: Option<usize>) -> ModelConfig {
    let fields = json!({
        "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "sliding_window": sliding_window,
    });
    fixture::config().with(fields).unwrap()
}

/// A layer of which every 32nd channel is compensated.
fn compensated(config: &ModelConfig) -> Compensated<'_> {
    let Layer { norms, linears, .. } = fixture::layer(config, 0.5);
    let in_features = linears.each_ref().map(|linear| linear.in_features);
    let mut seeds = 11..;
    let projections = linears.map(|linear| {
        let lost = numbers(seeds.next().unwrap(), linear.weight.len(), 0.1);
        let weight = linear.weight.iter().zip(lost).map(|(w, lost)| w + lost).collect();
        let original = Arc::new(Affine { weight, ..linear.clone() });
        Trained::Host(Box::new(linear), Coded { original, codes: Arc::default() })
    });
    Compensated { config: &config.layers[0], norms, projections, in_features, k_chunks: [32; 4] }
}

/// The stored weights of a projection.
fn weights<'a>(layer: &'a mut Compensated<'_>, projection: usize) -> &'a mut Vec<f32> {
    match &mut layer.projections[projection] {
        Trained::Host(linear, ..) => &mut linear.weight,
        Trained::Device(_) => panic!("layers of these tests are on this machine"),
    }
}

/// Numbers that a tensor holds, in whatever type.
fn count(tensor: &Tensor) -> usize {
    match tensor {
        Tensor::F32(values) => values.len(),
        Tensor::F16(values) => values.len(),
        Tensor::Bf16(values) => values.len(),
        Tensor::Device(_) => panic!("tensors of these tests are on this machine"),
    }
}

fn lists(trace: Trace) -> [Taken; 4] {
    trace.taken.map(|taken| match taken {
        Some(Selected::Host(taken)) => taken,
        _ => panic!("every projection selects on the way up"),
    })
}

const TEXTS: usize = 2;
const TOKENS: usize = 7;

/// A linear function of what comes out, and which channels are taken.
fn value(layer: &Compensated<'_>, config: &ModelConfig, h: &[f32], by: &[f32]) -> (f64, [Taken; 4]) {
    let mut h = Tensor::F32(h.to_vec());
    let (trace, _) = layer.forward(&Host, config, &Ropes::new(config, TOKENS), (TEXTS, TOKENS), &mut h).unwrap();
    (h.host().iter().zip(by).map(|(h, by)| f64::from(*h) * f64::from(*by)).sum(), lists(trace))
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
    let mut stream = Tensor::F32(h.to_vec());
    let (trace, _) = layer.forward(&Host, config, &ropes, (TEXTS, TOKENS), &mut stream).unwrap();
    let numbers = trace.entered.iter().chain(&trace.branches).map(count).sum::<usize>() + count(&trace.qkv);
    assert_eq!(2 * numbers, TEXTS * TOKENS * trace_bytes(config, 0), "what an estimate says of a trace");
    let mut d = Tensor::F32(by.to_vec());
    let weights = layer.backward(&Host, config, &ropes, (TEXTS, TOKENS), trace, &mut d).unwrap();
    let (trace, _) = layer.forward(&Host, config, &ropes, (TEXTS, TOKENS), &mut Tensor::F32(h.to_vec())).unwrap();
    assert!(lists(trace).iter().all(Taken::any));
    (Host.take(d).unwrap(), weights.map(|w| Host.take(w).unwrap()))
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
        let len = weights(&mut layer, p).len();
        for i in (0..len).step_by(len / 37) {
            let old = weights(&mut layer, p)[i];
            compare(Some(p), i, &mut |step| {
                weights(&mut layer, p)[i] = old + step;
                value(&layer, config, h, by)
            });
            weights(&mut layer, p)[i] = old;
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
