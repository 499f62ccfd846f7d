//! A whole small model: logits and greedy tokens against the f64 forward pass.

use anyhow::Result;
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::format::Dense;
use decdec::model::{Compensation, Model};
use decdec::sampling::Sampling;
use decdec::weights::{Linear, ModelWeights};

use crate::UnderTest;
use crate::common::{self, Stored, oracle};
use crate::small_model::SmallModel;

/// What f32 arithmetic may move the logits by, relative to the largest: two layers of sums of at most 128
/// terms each stay two orders below this, a wrong weight or position far above.
const LOGITS: f64 = 1e-4;

/// The small model with every projection replaced by random codes with a random residual.
struct Quantized {
    model: SmallModel,
    lutgemm: bool,
}

impl ModelWeights for Quantized {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.model.embedding()
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        self.model.head()
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.model.final_norm()
    }

    fn layer_norms(&self, layer: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        self.model.layer_norms(layer)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let (inner, outer) = self.config().shape(projection);
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

fn check<B: UnderTest>(backend: &B, weights: &dyn ModelWeights, compensated: bool) {
    let mut model = Model::load(backend, weights, |_| ()).unwrap();
    if compensated {
        model.compensate(Some(&Compensation::uniform(4, 1024, Selection::Bucket))).unwrap();
    }
    let mut text: Vec<u32> = (0..21).map(|i| (i * 37 + 5) % 96).collect();
    let mut state = model.state(64).unwrap();
    model.begin(&mut state, &Sampling::GREEDY, &[]).unwrap();

    let vocab = weights.config().vocab_size;
    let want = oracle::forward(weights, &text, compensated).concat();
    let mut got = Vec::new();
    for part in text.chunks(state.max_tokens().min(9)) {
        let mut logits = backend.vector(part.len() * vocab).unwrap();
        model.logits(&mut state, part, compensated, &mut logits).unwrap();
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
    model.begin(&mut state, &Sampling::GREEDY, &[]).unwrap();
    model.prompt(&mut state, &text, compensated).unwrap();
    for i in 0..8 {
        let token = backend.sampled(&state.sequence, i).unwrap();
        let logits = oracle::forward(weights, &text, compensated).pop().unwrap();
        let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = logits[token as usize];
        assert!(chosen >= best - 2.0 * allowed(0), "token {i} is {token} with logit {chosen}, the largest is {best}");
        text.push(token);
        model.step(&mut state).unwrap();
    }
}

pub(crate) fn small_models<B: UnderTest>(backend: &B) {
    check(backend, &SmallModel::new(3, 2, false), false);
    check(backend, &SmallModel::new(4, 1, true), false);
    for lutgemm in [false, true] {
        let quantized = Quantized { model: SmallModel::new(5, 2, lutgemm), lutgemm };
        check(backend, &quantized, false);
        check(backend, &quantized, true);
    }
}
