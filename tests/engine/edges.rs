//! Limits, refusals, and ends from outside.

use std::sync::atomic::{AtomicBool, Ordering};

use decdec::device::{self, Device};
use decdec::engine::{Compensate, Engine, ErrorKind, Finish, Options, Settings};
use decdec::progress::{Progress, Silent};
use decdec::sampling::Sampling;

use crate::{CONTEXT, VOCAB, opened};

fn options(max_seq_len: usize) -> Options {
    Options { max_seq_len: Some(max_seq_len), compensate: Compensate::Off, ..Options::default() }
}

/// However many tokens are asked for, there are as many as the context has room for, and rates are numbers.
#[test]
fn counts_are_bounded_by_the_room() {
    let (device, opened) = (Device::open("cpu").unwrap(), opened(None));
    let engine = Engine::load(&device, &opened, &options(8), &Silent).unwrap();
    for temperature in [0.0, 1.0] {
        let sampling = Sampling { temperature, ..Sampling::GREEDY };
        let mut session = engine.session(Settings { sampling, seed: 7, ..Settings::default() }).unwrap();
        let mut make = |max_new_tokens| {
            session.clear();
            session.settings.max_new_tokens = max_new_tokens;
            session.prompt(&[1, 2, 3]).unwrap();
            session.rest().unwrap().clone()
        };
        // Of the eight places three are taken, and the last token needs none.
        for (asked, expected) in [(0, 0), (1, 1), (6, 6), (7, 6), (1 << 40, 6), (1 << 63, 6), (usize::MAX, 6)] {
            let made = make(asked);
            assert_eq!(made.tokens.len(), expected, "{asked} at temperature {temperature}");
            assert_eq!(made.finish, Some(if asked > 6 { Finish::Context } else { Finish::Length }), "{asked}");
            assert_eq!(made.decoded, expected.saturating_sub(1), "{asked}");
            assert!(made.tokens_per_second().is_finite() && made.decode_per_second().is_finite(), "{asked}");
            assert_eq!(made.tokens, make(6).tokens[..expected], "the same draws decide, however many there are");
        }
    }
}

/// A token that ends the text is not part of it, and is kept for what follows if it was read.
#[test]
fn stop_ids_end_a_text() {
    let (device, opened) = (Device::open("cpu").unwrap(), opened(None));
    let engine = Engine::load(&device, &opened, &options(CONTEXT), &Silent).unwrap();
    let sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    let mut session = engine.session(Settings { sampling, max_new_tokens: 30, ..Settings::default() }).unwrap();
    session.prompt(&[5, 6, 7]).unwrap();
    let free = session.rest().unwrap().tokens.clone();
    assert_eq!(free.len(), 30);
    // One that comes late, for the first time.
    let at = (1..30).rev().find(|&i| !free[..i].contains(&free[i])).expect("a token that is new");
    session.settings.stop_ids = vec![free[at]];
    session.clear();
    session.prompt(&[5, 6, 7]).unwrap();
    let made = session.rest().unwrap();
    assert_eq!((&made.tokens[..], made.finish), (&free[..at], Some(Finish::Stop)));
    assert_eq!(made.decoded, at, "the one that ended the text was decoded too");
    assert_eq!(session.next().unwrap(), None);
    assert_eq!(session.tokens(), [&[5, 6, 7], &free[..=at]].concat());
}

#[test]
fn what_makes_no_sense_is_told_apart() {
    let (device, opened) = (Device::open("cpu").unwrap(), opened(None));
    let engine = Engine::load(&device, &opened, &options(20), &Silent).unwrap();
    let mut session = engine.session(Settings { max_new_tokens: 3, ..Settings::default() }).unwrap();
    session.prompt(&[1, 2]).unwrap();
    let want = session.rest().unwrap().tokens.clone();
    let is = |error: decdec::engine::Error, kind, parts: &[&str]| {
        let said = error.to_string();
        assert_eq!(error.kind(), kind, "{said}");
        assert!(parts.iter().all(|part| said.contains(part)) && !said.contains('\n'), "{said}: {parts:?}");
    };
    use ErrorKind::{ContextFull, Input};
    is(session.prompt(&[]).unwrap_err(), Input, &["prompt is empty"]);
    is(session.prompt(&[1, VOCAB]).unwrap_err(), Input, &["token id 96", "95"]);
    is(session.prompt(&[1; 21]).unwrap_err(), ContextFull, &["21 tokens", "room for 20", "shorten"]);
    is(session.logits(&[1; 21]).unwrap_err(), ContextFull, &["21 tokens", "20"]);
    is(session.logits(&[]).unwrap_err(), Input, &["empty"]);
    is(session.read(&[]).unwrap_err(), Input, &["empty"]);
    is(session.read(&[1; 21]).unwrap_err(), Input, &["21 tokens at once", "1 to 20"]);
    is(session.prompt_text("hello").unwrap_err(), Input, &["no tokenizer"]);
    session.settings.sampling.temperature = -1.0;
    is(session.prompt(&[1]).unwrap_err(), Input, &["temperature is -1"]);
    session.settings.sampling = Sampling::GREEDY;
    // Nothing of this has changed what the session holds.
    assert_eq!(session.made().tokens, want);
    session.prompt(&[1, 2]).unwrap();
    let again = session.rest().unwrap();
    assert_eq!((again.kept, &again.tokens), (1, &want));

    let load = |options: &Options| Engine::load(&device, &opened, options, &Silent).map(drop).unwrap_err();
    is(load(&options(0)), Input, &["0 tokens", "1 to 240"]);
    is(load(&options(241)), Input, &["241 tokens", "1 to 240"]);
    let file = Options { compensate: Compensate::File("/nowhere.json".into()), ..options(8) };
    is(load(&file), Input, &["/nowhere.json"]);
    is(Engine::open(&device, "/nowhere".as_ref(), &options(8)).map(drop).unwrap_err(), Input, &["/nowhere"]);
    let error = Device::open("gpu").map(drop).unwrap_err().to_string();
    assert!(error.contains("no device 'gpu'") && error.contains("cuda[:N]"), "{error}");
}

/// The flag ends a text between two tokens; taken back, it goes on as if nothing had been.
#[test]
fn an_interruption_is_no_end() {
    static FLAG: AtomicBool = AtomicBool::new(false);
    let device = Device::open_with("cpu", &device::Options { interrupt: Some(&FLAG), ..Default::default() }).unwrap();
    let opened = opened(Some(6));
    let engine = Engine::load(&device, &opened, &options(CONTEXT), &Silent).unwrap();
    let settings = Settings { max_new_tokens: 12, ..Settings::default() };
    let mut session = engine.session(settings.clone()).unwrap();
    session.prompt(&[8; 40]).unwrap();
    let want = session.rest().unwrap().tokens.clone();

    let mut session = engine.session(settings).unwrap();
    session.prompt(&[8; 40]).unwrap();
    for made in 0..5 {
        FLAG.store(true, Ordering::Relaxed);
        let error = session.next().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Stopped, "{error}");
        assert_eq!(session.made().tokens, want[..made], "nothing is lost");
        FLAG.store(false, Ordering::Relaxed);
        assert_eq!(session.next().unwrap().unwrap().token, Some(want[made]));
    }
    session.stop().unwrap();
    assert_eq!((session.next().unwrap(), session.made().finish), (None, Some(Finish::Caller)));
    assert_eq!(session.made().tokens, want[..5]);
}

/// Sessions share an engine, and go when they are dropped; a layer of loading is one step of progress.
#[test]
fn sessions_come_and_go() {
    use std::sync::atomic::AtomicU64;
    #[derive(Default)]
    struct Heard([AtomicU64; 2]);
    impl Progress for Heard {
        fn set_length(&self, steps: u64) {
            self.0[0].store(steps, Ordering::Relaxed);
        }
        fn inc(&self, steps: u64) {
            self.0[1].fetch_add(steps, Ordering::Relaxed);
        }
    }
    let (device, opened, heard) = (Device::open("cpu").unwrap(), opened(None), Heard::default());
    let engine = Engine::load(&device, &opened, &options(30), &heard).unwrap();
    assert_eq!(heard.0.map(AtomicU64::into_inner), [2, 2]);
    let make = |prompt: &[u32]| {
        let mut session = engine.session(Settings { max_new_tokens: 5, ..Settings::default() }).unwrap();
        session.prompt(prompt).unwrap();
        session.rest().unwrap().tokens.clone()
    };
    let want = make(&[4, 5]);
    let mut held = engine.session(Settings { max_new_tokens: 5, ..Settings::default() }).unwrap();
    held.prompt(&[4, 5]).unwrap();
    held.next().unwrap();
    assert_ne!(make(&[60]), want, "another prompt gives the same");
    assert_eq!(held.rest().unwrap().tokens, want, "one that was held while others came and went");
}
