//! Calls in any order and with anything: an error that says what is wrong, and texts go on as if nothing had happened.

use anyhow::Result;
use decdec::backend::cpu::Cpu;
use decdec::config::Op;
use decdec::dec::Selection;
use decdec::engine::{Engine, ErrorKind, Event, Settings};
use decdec::eval;
use decdec::model::{Compensation, Model, Operation, State};
use decdec::sampling::Sampling;
use decdec::weights::ModelWeights;

use crate::changed::{Change, Changed};
use crate::recording::Recording;
use crate::small_model::SmallModel;
use crate::whole::Quantized;
use crate::{UnderTest, texts};

fn weights() -> Changed<Quantized> {
    Changed(Quantized { model: SmallModel::new(5, 2, false), lutgemm: false })
}

fn model<'b, B: UnderTest>(backend: &'b B, weights: &dyn ModelWeights) -> Model<'b, B> {
    Model::load(backend, weights, |_| ()).unwrap()
}

/// Fails if `result` is no error with all of `parts` in it.
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error, {parts:?} expected") };
    let error = format!("{error:#}");
    assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}: {parts:?} expected");
}

/// A text of a prompt and `steps` steps.
fn text<B: UnderTest>(model: &Model<'_, B>, max_seq_len: usize, prompt: &[u32], steps: usize) -> State<B> {
    let mut state = model.state(1, max_seq_len).unwrap();
    model.prompt(&mut state, 0, prompt, false).unwrap();
    (0..steps).for_each(|_| model.step(&mut state, &[0]).unwrap());
    state
}

fn tokens<B: UnderTest>(model: &Model<'_, B>, state: &State<B>, count: usize) -> Vec<u32> {
    (0..count).map(|i| model.sampled(state, 0, i).unwrap()).collect()
}

/// Nothing is read or written behind the end, also by a token that was recorded before.
pub(crate) fn past_the_end<B: UnderTest>(backend: &B) {
    let model = model(backend, &weights());
    let prompt = [5, 42, 79, 20];
    let want = tokens(&model, &text(&model, 40, &prompt, 8), 9);
    let mut state = text(&model, 12, &prompt, 8);
    let mut logits = backend.vector(96).unwrap();
    let full = ["1 more tokens", "context of 12 has room for 0"];
    for _ in 0..3 {
        refused(model.step(&mut state, &[0]), &full);
        refused(model.prompt(&mut state, 0, &[1], false), &full);
        refused(model.logits(&mut state, 0, &[1], false, &mut logits), &full);
        for operation in model.operations().into_iter().chain([Operation::Layers]) {
            refused(model.operate(&mut state, 0, operation), &full);
        }
    }
    assert_eq!((state.len(0), state.room(0)), (12, 0));
    assert_eq!(tokens(&model, &state, 9), want);
    refused(model.sampled(&state, 0, 9), &["token 9", "9 were chosen"]);

    // A prompt that does not fit, or that is wrong at its end, is not read at all.
    let long: Vec<u32> = (0..50).map(|i| i * 7 % 96).collect();
    let mut state = text(&model, 49, &prompt, 1);
    for _ in 0..2 {
        refused(model.prompt(&mut state, 0, &long, false), &["50 more tokens", "context of 49 has room for 44"]);
        let wrong: Vec<u32> = long[..43].iter().copied().chain([96]).collect();
        refused(model.prompt(&mut state, 0, &wrong, false), &["token id 96", "ends at 95"]);
        assert_eq!(state.len(0), 5);
    }
    (0..7).for_each(|_| model.step(&mut state, &[0]).unwrap());
    assert_eq!(tokens(&model, &state, 9), want);
    refused(model.prepare(&mut state, 0, 50, false), &["50 more tokens", "context of 49"]);
    model.prepare(&mut state, 0, 49, false).unwrap();
    assert!(state.is_empty(0));
}

/// Plans change under texts in the making.
pub(crate) fn compensation_changes<B: UnderTest>(backend: &B) {
    let mut model = model(backend, &weights());
    texts::recompensated(&mut model, 200);
    // What cannot be is refused, and nothing has changed then.
    let before = model.is_compensated();
    let most = backend.device().max_n_tb;
    let with = |n_tb, k_chunk| Compensation::uniform(n_tb, k_chunk, Selection::Bucket);
    refused(model.compensate(Some(&with(most + 1, 8))), &["layer 0", &most.to_string()]);
    refused(model.compensate(Some(&with(2, 1025))), &["1025", "1024"]);
    let mut many = with(2, 8);
    many.by_bits.extend([many.by_bits[0]; 2]);
    refused(model.compensate(Some(&many)), &["3 sets", "1 bit width"]);
    many.by_bits.clear();
    refused(model.compensate(Some(&many)), &["0 sets", "1 bit width"]);
    assert_eq!(model.is_compensated(), before);
    let mut dense = Model::load(backend, &SmallModel::new(5, 1, false), |_| ()).unwrap();
    refused(dense.compensate(Some(&many)), &["0 sets"]);
    refused(dense.compensate(Some(&with(2, 8))), &["no residuals"]);
}

/// A state is of the model that made it.
pub(crate) fn a_state_of_another_model<B: UnderTest>(backend: &B) {
    let (ours, theirs) = (model(backend, &weights()), model(backend, &weights()));
    let mut state = text(&theirs, 12, &[5, 42], 3);
    let mut logits = backend.vector(96).unwrap();
    let other = ["made by another model", "state()"];
    refused(ours.step(&mut state, &[0]), &other);
    refused(ours.prompt(&mut state, 0, &[1], false), &other);
    refused(ours.logits(&mut state, 0, &[1], false, &mut logits), &other);
    refused(ours.begin(&mut state, 0, &Sampling::GREEDY, &[]), &other);
    refused(ours.prepare(&mut state, 0, 1, false), &other);
    refused(ours.operate(&mut state, 0, Operation::Embed), &other);
    refused(ours.sampled(&state, 0, 0), &other);
    theirs.step(&mut state, &[0]).unwrap();
    assert_eq!(tokens(&theirs, &state, 5), tokens(&ours, &text(&ours, 12, &[5, 42], 4), 5));
}

/// Arguments that make no sense, and calls before there is anything to go on from.
pub(crate) fn arguments<B: UnderTest>(backend: &B) {
    let model = model(backend, &weights());
    refused(model.state(1, 0).map(|_| ()), &["0 tokens", "1 to 128"]);
    refused(model.state(1, 129).map(|_| ()), &["129 tokens", "128"]);
    let mut state = model.state(1, 40).unwrap();
    let mut logits = backend.vector(40 * 96).unwrap();
    let begin = ["no token was chosen yet", "prompt"];
    refused(model.step(&mut state, &[0]), &begin);
    refused(model.operate(&mut state, 0, Operation::Embed), &begin);
    refused(model.sampled(&state, 0, 0), &["token 0", "0 were chosen"]);
    refused(model.prompt(&mut state, 0, &[], false), &["empty"]);
    refused(model.logits(&mut state, 0, &[], false, &mut logits), &["empty"]);
    refused(model.logits(&mut state, 0, &[96], false, &mut logits), &["token id 96", "95"]);
    let most = state.max_tokens();
    let mut longer = model.state(1, 128).unwrap();
    if longer.max_tokens() < 128 {
        let tokens = vec![1; longer.max_tokens() + 1];
        refused(model.logits(&mut longer, 0, &tokens, false, &mut logits), &[&format!("1 to {most}"), "in parts"]);
    }
    let mut small = backend.vector(2 * 96 - 8).unwrap();
    refused(model.logits(&mut state, 0, &[1, 2], false, &mut small), &["2 tokens", "192 are needed"]);
    // Logits choose nothing.
    model.logits(&mut state, 0, &[5], false, &mut logits).unwrap();
    refused(model.step(&mut state, &[0]), &begin);
    refused(
        model.begin(&mut state, 0, &Sampling { temperature: -1.0, ..Sampling::GREEDY }, &[]),
        &["temperature is -1"],
    );
    for draw in [1.0, -0.1, f32::NAN] {
        refused(model.begin(&mut state, 0, &Sampling::GREEDY, &[0.5, draw]), &["draw 1 is", "0 to 1"]);
    }
    let sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    model.begin(&mut state, 0, &sampling, &[0.5, 0.25]).unwrap();
    model.prompt(&mut state, 0, &[5, 42], false).unwrap();
    model.step(&mut state, &[0]).unwrap();
    refused(model.step(&mut state, &[0]), &["2 tokens were chosen", "no draw"]);
    refused(model.operate(&mut state, 0, Operation::Layer(2, Op::Attend)), &["layer 2", "model has 2"]);
    refused(model.operate(&mut state, 0, Operation::Layer(7, Op::Attend)), &["layer 7"]);
    // A choice is made again and again, until there is no room for more.
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    model.prompt(&mut state, 0, &[5, 42], false).unwrap();
    let chosen = (0..50).take_while(|_| model.operate(&mut state, 0, Operation::Sample).is_ok()).count();
    assert_eq!(chosen, 40);

    let window = |tokens: &'static [u32]| tokens;
    let engine = Engine::of(model, 40);
    let evaluated = |windows: &[&[u32]]| eval::perplexity(&engine, None, windows, |_| Ok(()));
    refused(evaluated(&[]), &["at least 2"]);
    refused(evaluated(&[window(&[1])]), &["windows of 1 tokens", "at least 2"]);
    refused(evaluated(&[window(&[1, 2, 3]), window(&[1, 2])]), &["window 1 has 2 tokens", "3"]);
    refused(evaluated(&[window(&[1, 2]), window(&[1, 96])]), &["window 1", "token id 96", "95"]);
    let mut other = SmallModel::new(5, 1, false);
    other.config.vocab_size = 32;
    other.embedding.truncate(32 * 64);
    let other = Engine::of(Model::load(backend, &other, |_| ()).unwrap(), 40);
    refused(eval::perplexity(&engine, Some(&other), &[&[1, 2]], |_| Ok(())), &["32 tokens", "96"]);
}

/// A model whose last norm has `gamma` everywhere.
struct Damaged(Changed<Quantized>, f32);

impl Change for Damaged {
    fn of(&self) -> &dyn ModelWeights {
        &self.0
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(vec![self.1; self.0.config().hidden_size])
    }
}

/// Numbers that overflow, or were none to begin with, end a text and an evaluation.
pub(crate) fn logits_that_are_no_numbers<B: UnderTest>(backend: &B) {
    for gamma in [f32::NAN, f32::INFINITY, f32::MAX] {
        let engine = Engine::of(model(backend, &Changed(Damaged(weights(), gamma))), 40);
        for temperature in [0.0, 0.8] {
            let sampling = Sampling { temperature, ..Sampling::GREEDY };
            let mut session = engine.session(Settings { sampling, seed: 3, ..Settings::default() }).unwrap();
            // Again and again, and never a token that nobody chose.
            for _ in 0..2 {
                session.prompt(&[5, 42, 79]).unwrap();
                let error = session.next().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Other);
                refused(
                    Err::<(), _>(error.into()),
                    &["token 0", "not a finite number", "--dtype bfloat16", "decdec eval"],
                );
                assert_eq!(session.next().unwrap(), None);
            }
        }
        refused(eval::perplexity(&engine, None, &[&[1, 2, 3]], |_| Ok(())), &["window 0", "not finite", "--dtype"]);
    }
}

/// What fails in the middle leaves a text that says so, until it begins anew.
#[test]
fn a_failed_operation_ends_the_text() {
    let cpu = Cpu::new();
    let recording = Recording::new(&cpu);
    let model = model(&recording, &weights());
    let want = tokens(&model, &text(&model, 40, &[5, 42], 5), 6);
    let mut state = text(&model, 40, &[5, 42], 1);
    recording.fails.set(true);
    refused(model.step(&mut state, &[0]), &["the device fails"]);
    let again = ["has failed", "begin it anew"];
    refused(model.step(&mut state, &[0]), &again);
    refused(model.prompt(&mut state, 0, &[1], false), &again);
    refused(model.operate(&mut state, 0, Operation::Sample), &again);
    assert_eq!(tokens(&model, &state, 2), want[..2]);
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    model.prompt(&mut state, 0, &[5, 42], false).unwrap();
    (0..5).for_each(|_| model.step(&mut state, &[0]).unwrap());
    assert_eq!(tokens(&model, &state, 6), want);
}

/// The same misuse where tokens are recorded and replayed: nothing is replayed that is not what was meant.
macro_rules! where_tokens_are_recorded {
    ($($device:ident: $open:expr),* $(,)?) => {
        $(#[test]
        fn $device() {
            if crate::common::devices::is_under_test(stringify!($device)) {
                let backend = $open;
                for body in [past_the_end, compensation_changes, a_state_of_another_model, two_texts] {
                    let recording = Recording::new(&backend);
                    body(&recording);
                    recording.check();
                }
            }
        })*
    };
}

mod recorded {
    use super::*;

    where_tokens_are_recorded! {
        cpu: Cpu::new(),
    }

    #[cfg(feature = "reference-wgpu")]
    where_tokens_are_recorded! {
        wgpu: decdec::backend::wgsl::Wgpu::open(None).unwrap(),
    }
}

/// Two texts in the making, compensated and not.
pub(crate) fn two_texts<B: UnderTest>(backend: &B) {
    let mut model = model(backend, &weights());
    texts::interleaved(&model);
    model.compensate(Some(&Compensation::uniform(2, 200, Selection::Bucket))).unwrap();
    texts::interleaved(&model);
}

/// A device that fails in a pass fails the texts of that pass, and no others; their slots are free again.
#[test]
fn a_failed_pass_ends_its_texts_and_no_others() {
    let cpu = Cpu::new();
    let recording = Recording::new(&cpu);
    let engine = Engine::of(model(&recording, &weights()), 40);
    let settings = Settings { max_new_tokens: 5, ..Settings::default() };
    let alone = |prompt: &[u32]| {
        let mut session = engine.session(settings.clone()).unwrap();
        session.prompt(prompt).unwrap();
        session.rest().unwrap().tokens.clone()
    };
    let prompts: [&[u32]; 3] = [&[5, 42], &[7; 9], &[1, 2, 3, 4]];
    let want = prompts.map(alone);
    let mut batch = engine.batch();
    let first = batch.join(prompts[0], settings.clone()).unwrap();
    batch.step().unwrap();
    // Four rows of the second prompt are beside the first text's token, and none of the third.
    batch.prompt_rows = 4;
    let [second, third] = [1, 2].map(|i| batch.join(prompts[i], settings.clone()).unwrap());
    recording.fails.set(true);
    let events = batch.step().unwrap();
    recording.fails.set(false);
    let failed: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::Failed(id, error) => (*id, error.kind(), error.to_string().contains("the device fails")),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(failed, [(first, ErrorKind::Other, true), (second, ErrorKind::Other, true)]);
    assert_eq!(batch.len(), 1);
    let again = batch.join(prompts[0], settings.clone()).unwrap();
    let mut ends = Vec::new();
    while !batch.is_empty() {
        for event in batch.step().unwrap() {
            if let Event::End(id, made) = event {
                ends.push((id, made.tokens));
            }
        }
    }
    ends.sort();
    assert_eq!(ends, [(third, want[2].clone()), (again, want[0].clone())]);
}
