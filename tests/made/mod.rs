//! The text that a model makes, operation by operation.

use decdec::backend::DecodeBackend;
use decdec::model::{Model, State};
use decdec::sampling::Sampling;

/// `count` greedy tokens behind `prompt`, which is compensated if `compensated`.
pub(crate) fn made<B: DecodeBackend>(
    model: &Model<'_, B>,
    state: &mut State<B>,
    prompt: &[u32],
    count: usize,
    compensated: bool,
) -> Vec<u32> {
    model.begin(state, 0, &Sampling::GREEDY, &[]).expect("begins");
    model.prompt(state, 0, prompt, compensated).expect("reads");
    (1..count).for_each(|_| model.step(state, &[0]).expect("steps"));
    (0..count).map(|i| model.sampled(state, 0, i).expect("a token")).collect()
}
