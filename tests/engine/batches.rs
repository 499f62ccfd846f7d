//! Texts that are made together, against each alone.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use decdec::backend::cpu::Cpu;
use decdec::dec::Selection;
use decdec::device::{self, Device};
use decdec::engine::{
    Batch, Compensate, Engine, ErrorKind, Event, Finish, Generated, Options, Settings, Speculate, TextId,
};
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::progress::Silent;
use decdec::sampling::Sampling;
use proptest::prelude::*;

use crate::devices::named_devices;
use crate::{CONTEXT, VOCAB, opened, weights};

/// What is asked of one text.
#[derive(Debug, Clone)]
struct Ask {
    prompt: Vec<u32>,
    settings: Settings,
    /// Passes before it joins, and after how many of its pieces it is cancelled.
    joins: usize,
    cancelled: Option<usize>,
}

fn asks(most: usize) -> impl Strategy<Value = Vec<Ask>> {
    let speculate = prop_oneof![Just(Speculate::Off), Just(Speculate::Auto), (1..=7usize).prop_map(Speculate::Most)];
    // Few different tokens, so that texts begin alike and guesses are made.
    let prompt = prop_oneof![prop::collection::vec(0..VOCAB, 1..60), prop::collection::vec(0..3u32, 1..60)];
    let ask = (
        prompt,
        0..14usize,
        any::<u64>(),
        any::<bool>(),
        speculate,
        0..20usize,
        prop::option::weighted(0.2, 0..8usize),
    );
    let ask = ask.prop_map(|(prompt, max_new_tokens, seed, greedy, speculate, joins, cancelled)| {
        let temperature = if greedy { 0.0 } else { 0.9 };
        let sampling = Sampling { temperature, ..Sampling::GREEDY };
        // What is kept was made or read: in the same way, so that it does not matter.
        let settings =
            Settings { sampling, seed, max_new_tokens, speculate, compensate_prompt: true, ..Settings::default() };
        Ask { prompt, settings, joins, cancelled }
    });
    prop::collection::vec(ask, 1..=most)
}

fn alone(engine: &Engine<'_>, ask: &Ask) -> Generated {
    let mut session = engine.session(Settings { speculate: Speculate::Off, ..ask.settings.clone() }).unwrap();
    session.prompt(&ask.prompt).unwrap();
    session.rest().unwrap().clone()
}

/// Runs all of `asks` through one batch; what became of each. Those that were cancelled have no end.
fn together(batch: &mut Batch<'_, '_>, asks: &[Ask]) -> Vec<Generated> {
    let (mut ids, mut made): (HashMap<TextId, usize>, Vec<Option<Generated>>) =
        (HashMap::new(), vec![None; asks.len()]);
    let (mut pieces, mut waiting) = (vec![Vec::new(); asks.len()], (0..asks.len()).collect::<Vec<_>>());
    for pass in 0.. {
        waiting.retain(|&i| {
            let joined = asks[i].joins <= pass
                && match batch.join(&asks[i].prompt, asks[i].settings.clone()) {
                    Ok(id) => ids.insert(id, i).is_none(),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::NoSlot, "{error}");
                        false
                    }
                };
            !joined
        });
        for event in batch.step().unwrap() {
            let i = ids[&event.id()];
            if made[i].as_ref().is_some_and(|made| made.finish == Some(Finish::Caller)) {
                // It was cancelled amid what had come of it.
                continue;
            }
            assert!(made[i].is_none(), "{event:?} of a text that has left");
            match event {
                Event::Piece(id, piece) => {
                    pieces[i].extend(piece.token);
                    // One that has ended in the same pass has left already.
                    if asks[i].cancelled == Some(pieces[i].len()) {
                        made[i] = batch.cancel(id);
                        assert!(batch.cancel(id).is_none());
                    }
                }
                Event::End(_, generated) => {
                    assert_eq!(generated.tokens, pieces[i]);
                    made[i] = Some(generated);
                }
                Event::Failed(_, error) => panic!("{error}"),
            }
        }
        if waiting.is_empty() && batch.is_empty() {
            break;
        }
        assert!(pass < 10_000, "texts do not end");
    }
    made.into_iter().map(|made| made.expect("it was made")).collect()
}

fn check(engine: &Engine<'_>, asks: &[Ask], prompt_rows: usize) {
    let mut batch = engine.batch();
    batch.prompt_rows = prompt_rows;
    let made = together(&mut batch, asks);
    drop(batch);
    for (ask, made) in asks.iter().zip(&made) {
        let want = alone(engine, ask);
        match ask.cancelled {
            Some(_) if made.finish == Some(Finish::Caller) => {
                assert!(want.tokens.starts_with(&made.tokens), "{ask:?}: {made:?}, {want:?}");
            }
            _ => assert_eq!((&made.tokens, made.finish), (&want.tokens, want.finish), "{ask:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Texts join, leave and are cancelled, more of them than there are slots; prompts go in chunks; what begins alike is
    /// kept; tokens are guessed: all texts are what they are alone.
    #[test]
    fn texts_made_together_are_each_alone(
        asks in asks(20),
        window in prop::sample::select(vec![None, Some(5), Some(30)]),
        max_tokens in prop::sample::select(vec![1usize, 7, 24, 512]),
        prompt_rows in 1..40usize,
        k_chunk in prop::sample::select(vec![0usize, 256]),
    ) {
        let cpu = Cpu::that_takes(max_tokens, 0);
        let engine = Engine::of(Model::load(&cpu, &weights(window), |_| ()).unwrap(), CONTEXT);
        engine.compensate(Some(&Compensation::uniform(2, k_chunk, Selection::Exact))).unwrap();
        check(&engine, &asks, prompt_rows);
    }
}

fn options(slots: usize, k_chunk: usize) -> Options {
    let compensate = Compensate::Sets(vec![LayerCompensation { n_tb: 2, k_chunks: [k_chunk; 4] }]);
    Options { max_seq_len: Some(CONTEXT), slots, compensate, ..Options::default() }
}

fn ask(prompt: Vec<u32>, max_new_tokens: usize) -> Ask {
    let settings = Settings { max_new_tokens, compensate_prompt: true, ..Settings::default() };
    Ask { prompt, settings, joins: 0, cancelled: None }
}

/// The same on every device that is under test, with fewer texts.
#[test]
fn batches_on_every_device() {
    for name in named_devices() {
        let device = Device::open(&name).unwrap();
        for (window, k_chunk) in [(None, 0), (None, 256), (Some(6), 256)] {
            let opened = opened(window);
            let engine = Engine::load(&device, &opened, &options(3, k_chunk), &Silent).unwrap();
            let prompts: [Vec<u32>; 5] =
                [(0..12).collect(), (40..73).collect(), vec![3; 7], (0..10).collect(), vec![9]];
            let mut asks: Vec<_> = prompts.into_iter().map(|prompt| ask(prompt, 9)).collect();
            asks[2].settings.speculate = Speculate::Most(4);
            asks[3].joins = 4;
            asks[4].settings.sampling = Sampling { temperature: 0.8, ..Sampling::GREEDY };
            check(&engine, &asks, 8);
        }
    }
}

/// Bad input is told to whoever joins; a text that fails leaves, and the others go on; what is full says so.
#[test]
fn each_text_gets_its_own_error() {
    let (device, opened) = (Device::open("cpu").unwrap(), opened(None));
    let engine = Engine::load(&device, &opened, &options(2, 0), &Silent).unwrap();
    let first = ask((0..9).collect(), 8);
    let want = alone(&engine, &first);
    let mut batch = engine.batch();
    let join = |batch: &mut Batch<'_, '_>, prompt: &[u32], settings: &Settings| batch.join(prompt, settings.clone());
    let settings = &first.settings;
    let id = join(&mut batch, &first.prompt, settings).unwrap();
    let refused = |result: decdec::engine::Result<TextId>, kind: ErrorKind, said: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(said), "{error}");
    };
    for _ in 0..3 {
        refused(join(&mut batch, &[], settings), ErrorKind::Input, "empty");
        refused(join(&mut batch, &[VOCAB], settings), ErrorKind::Input, "token id 96");
        refused(join(&mut batch, &[1; CONTEXT + 1], settings), ErrorKind::ContextFull, "shorten");
        let bad = Settings { speculate: Speculate::Most(8), ..settings.clone() };
        refused(join(&mut batch, &[1], &bad), ErrorKind::Input, "1 to 7");
    }
    let second = join(&mut batch, &[1, 2, 3], settings).unwrap();
    refused(join(&mut batch, &[1], settings), ErrorKind::NoSlot, "2 texts");
    assert!(matches!(engine.session(settings.clone()).map(drop).unwrap_err().kind(), ErrorKind::NoSlot));
    assert_eq!(batch.len(), 2);
    batch.step().unwrap();
    assert!(batch.cancel(second).is_some() && batch.made(second).is_none() && batch.made(id).is_some());
    // Its slot is free at once, and a text that begins as it did keeps what was read.
    let third = join(&mut batch, &[1, 2, 3, 4], settings).unwrap();
    let mut ends = HashMap::new();
    while !batch.is_empty() {
        for event in batch.step().unwrap() {
            if let Event::End(id, made) = event {
                ends.insert(id, made);
            }
        }
    }
    assert_eq!((&ends[&id].tokens, ends[&id].finish), (&want.tokens, Some(Finish::Length)));
    assert_eq!(ends[&third].kept, 3);
    assert!(batch.step().unwrap().is_empty(), "nothing is left to do");
}

/// The flag ends a batch between two passes; taken back, all go on as if nothing had been.
#[test]
fn an_interrupted_batch_goes_on() {
    static FLAG: AtomicBool = AtomicBool::new(false);
    let device = Device::open_with("cpu", &device::Options { interrupt: Some(&FLAG), ..Default::default() }).unwrap();
    let opened = opened(None);
    let engine = Engine::load(&device, &opened, &options(4, 0), &Silent).unwrap();
    let asks = [ask(vec![8; 40], 6), ask((0..5).collect(), 9)];
    let want = asks.each_ref().map(|ask| alone(&engine, ask).tokens);
    let mut batch = engine.batch();
    batch.prompt_rows = 16;
    let ids = asks.each_ref().map(|ask| batch.join(&ask.prompt, ask.settings.clone()).unwrap());
    let mut ends = HashMap::new();
    while !batch.is_empty() {
        FLAG.store(true, Ordering::Relaxed);
        assert_eq!(batch.step().unwrap_err().kind(), ErrorKind::Stopped);
        FLAG.store(false, Ordering::Relaxed);
        for event in batch.step().unwrap() {
            if let Event::End(id, made) = event {
                ends.insert(id, made.tokens);
            }
        }
    }
    assert_eq!(ids.map(|id| ends[&id].clone()), want);
}
