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
    model.begin(state, &Sampling::GREEDY, &[]).expect("begins");
    model.prompt(state, prompt, compensated).expect("reads");
    (1..count).for_each(|_| model.step(state).expect("steps"));
    (0..count).map(|i| model.sampled(state, i).expect("a token")).collect()
}
