//! A whole small model: logits and greedy tokens against the f64 forward pass.

use std::borrow::Cow;

use anyhow::Result;
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::format::{Dense, Floats};
use decdec::model::{Compensation, Model};
use decdec::quantize;
use decdec::sampling::Sampling;
use decdec::weights::{Linear, ModelWeights, Weight};

use crate::UnderTest;
use crate::changed::{Change, Changed};
use crate::common::{self, Stored, oracle};
use crate::small_model::SmallModel;

/// What f32 arithmetic may move the logits by, relative to the largest: two layers of sums of at most 128
/// terms each stay two orders below this, a wrong weight or position far above.
const LOGITS: f64 = 1e-4;

/// The small model with every projection replaced by random codes with a random residual.
pub(crate) struct Quantized {
    pub(crate) model: SmallModel,
    pub(crate) lutgemm: bool,
}

impl Change for Quantized {
    fn of(&self) -> &dyn ModelWeights {
        &self.model
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let (inner, outer) = self.model.config().shape(layer, projection);
        let seed = (10 * layer + projection.index()) as u64;
        let weight = if self.lutgemm {
            common::lutgemm(seed, inner, outer, 3, 32, Stored::F32)
        } else {
            common::anyprec(seed, inner, outer, 3, Stored::F16)
        };
        let bias = self.model.projection(layer, projection)?.bias;
        Ok(Linear { bias, ..common::compensable(seed + 1, weight) })
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        Some(3)
    }
}

/// A model with the numbers of another head.
struct WithHead<'a> {
    weights: &'a dyn ModelWeights,
    head: Vec<f32>,
}

impl Change for WithHead<'_> {
    fn of(&self) -> &dyn ModelWeights {
        self.weights
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        let ModelConfig { hidden_size, vocab_size, .. } = *self.weights.config();
        let values = Floats::F32(Cow::Borrowed(&self.head));
        Ok(Some(Dense { in_features: hidden_size, out_features: vocab_size, values }))
    }
}

fn check<B: UnderTest>(backend: &B, weights: &dyn ModelWeights, compensated: bool) {
    check_with_head(backend, weights, None, compensated);
}

/// `head` is what the device multiplies by; `weights` have the same numbers.
fn check_with_head<B: UnderTest>(backend: &B, weights: &dyn ModelWeights, head: Option<Weight<'_>>, compensated: bool) {
    let mut model = Model::load_with_head(backend, weights, head, |_| ()).unwrap();
    if compensated {
        model.compensate(Some(&Compensation::uniform(4, 1024, Selection::Bucket))).unwrap();
    }
    let mut text: Vec<u32> = (0..21).map(|i| (i * 37 + 5) % 96).collect();
    let mut state = model.state(1, 64).unwrap();
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();

    let vocab = weights.config().vocab_size;
    let want = oracle::forward(weights, &text, compensated).concat();
    let mut got = Vec::new();
    for part in text.chunks(state.max_tokens().min(9)) {
        let mut logits = backend.vector(part.len() * vocab).unwrap();
        model.logits(&mut state, 0, part, compensated, &mut logits).unwrap();
        let mut out = vec![0.0; part.len() * vocab];
        backend.read(&logits, &mut out).unwrap();
        got.extend(out);
    }
    let largest = want.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let allowed = |_| largest * (LOGITS + 8.0 * B::ROUNDING);
    assert_eq!(common::misfit(&got, &want, allowed), None);
    let mut other = text.clone();
    other[0] += 1;
    let wrong = oracle::forward(weights, &other, compensated).concat();
    assert!(common::misfit(&got[vocab..], &wrong[vocab..], allowed).is_some(), "a wrong first token goes unseen");

    // Token by token, from the prompt on: every choice is the oracle's, or as good as it.
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    model.prompt(&mut state, 0, &text, compensated).unwrap();
    for i in 0..8 {
        let token = model.sampled(&state, 0, i).unwrap();
        let logits = oracle::forward(weights, &text, compensated).pop().unwrap();
        let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = logits[token as usize];
        assert!(chosen >= best - 2.0 * allowed(0), "token {i} is {token} with logit {chosen}, the largest is {best}");
        text.push(token);
        model.step(&mut state, &[0]).unwrap();
    }
}

pub(crate) fn small_models<B: UnderTest>(backend: &B) {
    check(backend, &SmallModel::new(3, 2, false), false);
    check(backend, &SmallModel::new(4, 1, true), false);
    for lutgemm in [false, true] {
        let quantized = Changed(Quantized { model: SmallModel::new(5, 2, lutgemm), lutgemm });
        check(backend, &quantized, false);
        check(backend, &quantized, true);
    }
}

/// Heads of 8 and 4 bits, of tied and untied models: what a device computes is what the rounded head says, and that
/// is near the logits of the head as it was.
pub(crate) fn small_heads<B: UnderTest>(backend: &B) {
    for (tied, bits, near) in [(false, 8, 0.02), (true, 8, 0.02), (false, 4, 0.3), (true, 4, 0.3)] {
        let model = SmallModel::new(6, 1, false);
        let other: Vec<f32> = model.embedding.iter().rev().copied().collect();
        let untied = Changed(WithHead { weights: &model, head: other });
        let weights: &dyn ModelWeights = if tied { &model } else { &untied };
        let rounded = quantize::head(weights, bits).unwrap();
        let mut head = vec![0.0; rounded.in_features() * rounded.out_features()];
        head.chunks_exact_mut(rounded.in_features()).enumerate().for_each(|(row, out)| rounded.row(row, out));
        let same = Changed(WithHead { weights: &model, head });
        let text = [5, 42, 79, 20];
        let before = oracle::forward(weights, &text, false).concat();
        let after = oracle::forward(&same, &text, false).concat();
        let norm = |values: Vec<f64>| values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let moved = norm(before.iter().zip(&after).map(|(a, b)| a - b).collect()) / norm(before);
        assert!(moved > 0.0 && moved < near, "{bits} bits move the logits by {moved}, below {near} is expected");
        check_with_head(backend, &same, Some(rounded), false);
    }
    let error = quantize::head(&SmallModel::new(6, 1, false), 5).unwrap_err().to_string();
    assert!(error.contains("5 bits") && error.contains("8 and 4"), "{error}");
}
