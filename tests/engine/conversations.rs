//! A text that goes on in a session, against one that is read from its beginning.

use decdec::backend::cpu::Cpu;
use decdec::dec::Selection;
use decdec::device::Device;
use decdec::engine::{Compensate, Engine, Generated, Options, Session, Settings};
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::sampling::Sampling;
use proptest::prelude::*;

use crate::devices::named_devices;
use crate::{CONTEXT, VOCAB, opened, weights};

/// One turn of a conversation.
#[derive(Debug, Clone)]
struct Turn {
    /// How much stays of the text before, per cent.
    stays: usize,
    /// What is said behind that.
    new: Vec<u32>,
    /// The most tokens of the answer.
    answer: usize,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    // Mostly all of it, as in a chat; sometimes a place in the middle.
    let stays = prop_oneof![3 => Just(100usize), 1 => 0..100usize, 1 => 90..100usize];
    let turn = (stays, prop::collection::vec(0..VOCAB, 1..24), 0..16usize);
    prop::collection::vec(turn.prop_map(|(stays, new, answer)| Turn { stays, new, answer }), 2..7)
}

/// The text of a turn; what is too long begins anew.
fn text(before: &[u32], turn: &Turn) -> Vec<u32> {
    let kept = &before[..before.len() * turn.stays / 100];
    let kept = if kept.len() + turn.new.len() > CONTEXT { &[] } else { kept };
    [kept, &turn.new].concat()
}

fn answered(session: &mut Session<'_, '_>, text: &[u32]) -> Generated {
    session.prompt(text).expect("it fits");
    session.rest().expect("it runs").clone()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// A token's numbers do not depend on the tokens that it is read with, and everything is compensated alike: a
    /// conversation with cuts and edits gives the same tokens and the same logits, bit for bit, as its text read from the
    /// beginning, whatever the passes, whatever windows forget and whatever was queued ahead.
    #[test]
    fn a_conversation_is_what_it_is_from_the_beginning(
        turns in turns(),
        window in prop::sample::select(vec![None, Some(5), Some(30)]),
        at_once in prop::sample::select(vec![1usize, 7, 512]),
        lookahead in prop::sample::select(vec![0usize, 3]),
        k_chunk in prop::sample::select(vec![0usize, 256]),
        temperature in prop::sample::select(vec![0.0f32, 0.9]),
        seed in any::<u64>(),
    ) {
        let cpu = Cpu::that_takes(at_once, lookahead);
        let engine = Engine::of(Model::load(&cpu, &weights(window), |_| ()).unwrap(), CONTEXT);
        engine.compensate(Some(&Compensation::uniform(2, k_chunk, Selection::Exact))).unwrap();
        let sampling = Sampling { temperature, ..Sampling::GREEDY };
        let settings = Settings { sampling, seed, compensate_prompt: true, ..Settings::default() };
        let (mut session, mut before) = (engine.session(settings.clone()).unwrap(), Vec::new());
        for turn in &turns {
            let text = text(&before, turn);
            session.settings.max_new_tokens = turn.answer;
            let common = session.tokens().iter().zip(&text).take_while(|(a, b)| a == b).count();
            let made = answered(&mut session, &text);
            let mut alone = engine.session(session.settings.clone()).unwrap();
            let want = answered(&mut alone, &text);
            prop_assert_eq!((&made.tokens, made.finish), (&want.tokens, want.finish));
            prop_assert_eq!(want.kept, 0);
            // All that is known, but for the last token, which may not have been read, and for a token to read.
            let least = if window.is_some() || turn.answer == 0 { 0 } else { common.saturating_sub(1).min(text.len() - 1) };
            prop_assert!((least..=common).contains(&made.kept), "{} of {common} kept", made.kept);
            before = [text, made.tokens].concat();
            if before.len() <= CONTEXT {
                let mut alone = engine.session(settings.clone()).unwrap();
                prop_assert_eq!(bits(session.logits(&before).unwrap()), bits(alone.logits(&before).unwrap()));
            }
        }
    }
}

/// What the property rests on: texts are kept and texts are read anew, and one other token long before is seen.
#[test]
fn what_the_conversations_can_see() {
    let cpu = Cpu::that_takes(1, 3);
    for window in [None, Some(5)] {
        let engine = Engine::of(Model::load(&cpu, &weights(window), |_| ()).unwrap(), CONTEXT);
        let mut session = engine.session(Settings { max_new_tokens: 20, ..Settings::default() }).unwrap();
        let first: Vec<u32> = (0..30).map(|i| i * 7 % VOCAB).collect();
        let answer = answered(&mut session, &first).tokens;
        let longer = [&first[..], &answer[..], &[1, 2, 3]].concat();
        let made = answered(&mut session, &longer);
        assert!(made.kept >= 49 || window.is_some(), "window {window:?}: {} kept", made.kept);
        // Far behind the latest token, a window has forgotten what the middle of the text saw.
        let cut = [&first[..20], &[9, 9]].concat();
        let kept = answered(&mut session, &cut).kept;
        assert_eq!(kept, if window.is_some() { 0 } else { 20 }, "window {window:?}");
        let want = bits(session.logits(&cut).unwrap());
        let mut other = cut.clone();
        other[17] ^= 1;
        assert_ne!(want, bits(session.logits(&other).unwrap()), "another token is not seen");
    }
}

/// Compensation of one set for all layers.
fn compensated(k_chunk: usize) -> Options {
    let compensate = Compensate::Sets(vec![LayerCompensation { n_tb: 2, k_chunks: [k_chunk; 4] }]);
    Options { max_seq_len: Some(CONTEXT), compensate, ..Options::default() }
}

/// On every device, with passes of many tokens and compensated answers behind prompts that are not: a session in which
/// texts were cut goes on like one in which the same was said and nothing was ever cut, bit for bit. Where what is kept
/// was read in another way, logits are near.
#[test]
fn conversations_on_every_device() {
    for name in named_devices() {
        let device = Device::open(&name).unwrap();
        for (window, k_chunk) in [(None, 256), (Some(6), 0), (Some(40), 256)] {
            let what = format!("{name}, window {window:?}, k_chunk {k_chunk}");
            let opened = opened(window);
            let engine = Engine::load(&device, &opened, &compensated(k_chunk), &decdec::progress::Silent).unwrap();
            let settings = Settings { max_new_tokens: 9, ..Settings::default() };
            let new = || engine.session(settings.clone()).unwrap();
            let said: [Vec<u32>; 3] = [(0..12).collect(), (40..55).collect(), vec![3; 7]];
            // The text of each turn, and what was answered.
            let talk = |session: &mut Session<'_, '_>| {
                let (mut text, mut answers) = (Vec::new(), Vec::new());
                for said in &said {
                    text.extend(said);
                    let made = answered(session, &text);
                    assert!(made.kept + 1 >= text.len() - said.len(), "{what}: {} kept", made.kept);
                    text.extend(&made.tokens);
                    answers.push(made.tokens);
                }
                (text, answers)
            };
            let (text, answers) = talk(&mut new());
            let mut session = new();
            // Another end of the first turn, cut off again with the next one.
            let other = [&said[0][..11], &[90, 91, 92]].concat();
            answered(&mut session, &other);
            session.clear();
            assert_eq!(talk(&mut session), (text.clone(), answers.clone()), "{what}: after another conversation");

            // Two in turn.
            let (mut one, mut two) = (new(), new());
            one.prompt(&said[0]).unwrap();
            two.prompt(&other).unwrap();
            while one.next().unwrap().is_some() | two.next().unwrap().is_some() {}
            assert_eq!(one.made().tokens, answers[0], "{what}: beside another");
            assert_eq!(two.made().tokens, answered(&mut new(), &other).tokens, "{what}: beside another");

            // Cut and read otherwise: what is kept was made token by token, compensated.
            let kept = bits(session.logits(&text).unwrap());
            let mut alone = new();
            let want = alone.logits(&text).unwrap().to_vec();
            let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            let off = |bits: &[u32]| {
                let difference = bits.iter().zip(&want).map(|(&a, b)| (f32::from_bits(a) - b).abs());
                difference.fold(0f32, f32::max) / largest
            };
            if k_chunk == 0 {
                let near = if name.starts_with("cuda") { 2e-2 } else { 2e-4 };
                assert!(off(&kept) <= near, "{what}: logits are off by {} of the largest", off(&kept));
            }
            let mut otherwise = text.clone();
            let at = otherwise.len() - 2;
            otherwise[at] ^= 1;
            let other = off(&bits(alone.logits(&otherwise).unwrap()));
            assert!(other > 5e-2, "{what}: another token moves logits by {other} of the largest");
        }
    }
}
