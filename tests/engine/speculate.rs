//! Tokens that are guessed: the text is the same with and without, and a text that repeats itself takes fewer passes.

use decdec::backend::cpu::Cpu;
use decdec::dec::Selection;
use decdec::engine::{Draft, Engine, Generated, Result, Settings, Speculate};
use decdec::model::{Compensation, Model};
use decdec::sampling::Sampling;

use crate::{CONTEXT, VOCAB, weights};

fn made(engine: &Engine<'_>, settings: &Settings, prompt: &[u32]) -> Generated {
    let mut session = engine.session(settings.clone()).unwrap();
    session.prompt(prompt).unwrap();
    session.rest().unwrap().clone()
}

/// Guesses `text` behind what it has of it, but for every `off`-th token.
struct Known {
    text: Vec<u32>,
    off: usize,
}

impl Draft for Known {
    fn guess(&mut self, text: &[u32], most: usize) -> Result<Vec<u32>> {
        let rest = self.text.iter().enumerate().skip(text.len()).take(most);
        Ok(rest.map(|(i, &token)| if i % self.off == 0 { (token + 1) % VOCAB } else { token }).collect())
    }
}

/// Greedy and sampled, compensated and not, right guesses and wrong ones: the same tokens, in as many passes as guesses
/// were right.
#[test]
fn the_text_is_the_same_and_takes_fewer_passes() {
    let cpu = Cpu::that_takes(64, 3);
    let engine = Engine::of(Model::load(&cpu, &weights(None), |_| ()).unwrap(), CONTEXT);
    let prompt: Vec<u32> = (0..20).map(|i| i * 7 % VOCAB).collect();
    for k_chunk in [0, 256] {
        engine.compensate(Some(&Compensation::uniform(2, k_chunk, Selection::Bucket))).unwrap();
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, ..Sampling::GREEDY };
            let settings =
                Settings { sampling, seed: 5, max_new_tokens: 60, compensate_prompt: true, ..Settings::default() };
            let want = made(&engine, &settings, &prompt);
            assert_eq!((want.tokens.len(), want.passes, want.guessed), (60, 59, 0));
            let text = [&prompt[..], &want.tokens].concat();
            for most in 1..=7 {
                let settings = Settings { speculate: Speculate::Most(most), ..settings.clone() };
                let looked_up = made(&engine, &settings, &prompt);
                assert_eq!((&looked_up.tokens, looked_up.finish), (&want.tokens, want.finish));
                for (off, least) in [(usize::MAX, most), (5, 0), (1, 0)] {
                    let mut session = engine.session(settings.clone()).unwrap();
                    session.guess_with(Known { text: text.clone(), off });
                    session.prompt(&prompt).unwrap();
                    let made = session.rest().unwrap().clone();
                    assert_eq!((&made.tokens, made.finish), (&want.tokens, want.finish), "{most} guesses, off {off}");
                    // Every pass makes one token and those that were guessed right.
                    assert_eq!(made.decoded, made.passes + made.right, "{most} guesses, off {off}");
                    if least > 0 {
                        assert_eq!((made.passes, made.right), (59usize.div_ceil(most + 1), made.guessed));
                    }
                    assert_eq!(made.right == 0, off == 1);
                    // What wrong guesses left behind is gone: the text goes on as one that never guessed.
                    let on: Vec<u32> = [&text[..70], &[3, 4]].concat();
                    let logits = session.logits(&on).unwrap().to_vec();
                    let mut fresh = engine.session(settings.clone()).unwrap();
                    assert_eq!(logits, fresh.logits(&on).unwrap());
                }
            }
        }
    }
}

/// Where the context ends, or no more tokens are asked for, none is guessed past it; stop tokens end a text amid guesses.
#[test]
fn guesses_end_with_the_text() {
    let cpu = Cpu::that_takes(64, 0);
    let engine = Engine::of(Model::load(&cpu, &weights(None), |_| ()).unwrap(), 24);
    let prompt: Vec<u32> = vec![3; 10];
    let settings = |max_new_tokens| Settings { max_new_tokens, ..Settings::default() };
    let all = made(&engine, &settings(100), &prompt);
    assert_eq!(all.tokens.len(), 15);
    let text = [&prompt[..], &all.tokens, &[1; 9]].concat();
    for max_new_tokens in [1, 2, 3, 9, 14, 15, 100] {
        let settings = Settings { speculate: Speculate::Most(7), ..settings(max_new_tokens) };
        let mut session = engine.session(settings).unwrap();
        session.guess_with(Known { text: text.clone(), off: usize::MAX });
        session.prompt(&prompt).unwrap();
        let made = session.rest().unwrap();
        assert_eq!(made.tokens, all.tokens[..max_new_tokens.min(15)], "{max_new_tokens}");
    }
    let at = (1..15).rev().find(|&i| !all.tokens[..i].contains(&all.tokens[i]));
    if let Some(at) = at {
        let settings = Settings { speculate: Speculate::Most(7), stop_ids: vec![all.tokens[at]], ..settings(100) };
        let mut session = engine.session(settings).unwrap();
        session.guess_with(Known { text, off: usize::MAX });
        session.prompt(&prompt).unwrap();
        assert_eq!(session.rest().unwrap().tokens, all.tokens[..at]);
    }
}

/// Sampled texts follow the model's distribution: the second token of many texts, each with its own seed, made with guesses
/// that are often right and often wrong, against the probabilities of the logits (χ² at one in a million).
#[test]
fn sampled_tokens_follow_the_distribution() {
    let cpu = Cpu::that_takes(64, 0);
    let engine = Engine::of(Model::load(&cpu, &weights(None), |_| ()).unwrap(), CONTEXT);
    let sampling = Sampling { temperature: 0.7, top_k: 8, ..Sampling::GREEDY };
    let prompt = [5, 6, 7];
    let mut session = engine.session(Settings::default()).unwrap();
    // What a first token of 9 is followed by.
    let first = {
        let logits = session.logits(&prompt).unwrap();
        sampling.choose(logits, 0.0).unwrap()
    };
    let logits = session.logits(&[5, 6, 7, first]).unwrap().to_vec();
    let mut order: Vec<u32> = (0..VOCAB).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    order.truncate(8);
    let weight = |id: u32| (f64::from(logits[id as usize] - logits[order[0] as usize]) / 0.7).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    /// Always the same token.
    struct Always(u32);
    impl Draft for Always {
        fn guess(&mut self, _: &[u32], most: usize) -> Result<Vec<u32>> {
            Ok(vec![self.0; most])
        }
    }
    let (mut counts, mut right, mut texts) = ([0usize; 8], 0, 0);
    let settings = Settings { sampling, max_new_tokens: 3, speculate: Speculate::Most(1), ..Settings::default() };
    session.settings = settings;
    session.guess_with(Always(order[1]));
    for seed in 0..3000 {
        session.settings.seed = seed;
        session.prompt(&prompt).unwrap();
        let made = session.rest().unwrap();
        if made.tokens[0] == first {
            let at = order.iter().position(|&id| id == made.tokens[1]).expect("one of the eight");
            (counts[at], texts) = (counts[at] + 1, texts + 1);
            right += usize::from(at == 1);
        }
    }
    let chi = |of: &dyn Fn(usize) -> f64| -> f64 {
        counts.iter().enumerate().map(|(i, &n)| (n as f64 - of(i)).powi(2) / of(i)).sum()
    };
    // Seven degrees of freedom.
    let found = chi(&|i| texts as f64 * weight(order[i]) / total);
    assert!(found < 42.0, "χ² is {found}: {counts:?}");
    assert!(right > 20 && texts - right > 20, "{right} of {texts}");
    let even = chi(&|_| texts as f64 / 8.0);
    assert!(even > 42.0, "another distribution goes unseen: χ² is {even}");
}
