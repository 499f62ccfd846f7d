//! Rows of several texts in one pass: each is what it is alone, bit for bit.

use std::collections::HashMap;

use decdec::backend::DecodeBackend;
use decdec::dec::Selection;
use decdec::model::{Compensation, Model, Part, State};
use decdec::sampling::{Sampling, draws};

use crate::UnderTest;
use crate::changed::Changed;
use crate::noise::Noise;
use crate::small_model::SmallModel;
use crate::whole::Quantized;

const VOCAB: usize = 96;

/// Tokens of the longest text.
const CONTEXT: usize = 48;

/// Texts at once, at most.
const SLOTS: usize = 16;

/// One text: what it is given, and what it makes of it.
#[derive(Debug, Clone)]
struct Text {
    prompt: Vec<u32>,
    tokens: usize,
    compensated: bool, // its prompt
    sampling: Sampling,
    draws: Vec<f32>,
}

impl Text {
    fn any(noise: &mut Noise, compensated: bool) -> Self {
        let tokens = 1 + noise.below(12);
        let prompt = (0..1 + noise.below(CONTEXT - 14)).map(|_| noise.below(VOCAB) as u32).collect();
        let temperature = [0.0, 0.9][noise.below(2)];
        let draws = draws(noise.below(1 << 20) as u64, tokens);
        let compensated = compensated && noise.below(2) == 0;
        Self { prompt, tokens, compensated, sampling: Sampling { temperature, ..Sampling::GREEDY }, draws }
    }
}

/// The tokens of a text alone, and the logits of what follows the last of them that was read.
fn alone<B: DecodeBackend>(model: &Model<'_, B>, text: &Text) -> (Vec<u32>, Vec<u32>) {
    let mut state = model.state(1, CONTEXT).unwrap();
    model.begin(&mut state, 0, &text.sampling, &text.draws).unwrap();
    // One token a pass: whatever else a pass may hold must not matter.
    let (last, before) = text.prompt.split_last().unwrap();
    before.iter().for_each(|&token| model.extend(&mut state, 0, &[token], text.compensated).unwrap());
    model.prompt(&mut state, 0, &[*last], text.compensated).unwrap();
    (1..text.tokens).for_each(|_| model.step(&mut state, &[0]).unwrap());
    let tokens: Vec<_> = (0..text.tokens).map(|i| model.sampled(&state, 0, i).unwrap()).collect();
    let logits = next_logits(model, &mut state, 0, *tokens.last().unwrap());
    (tokens, logits)
}

/// The logits behind a token that is read in `slot`, as bits.
fn next_logits<B: DecodeBackend>(model: &Model<'_, B>, state: &mut State<B>, slot: usize, token: u32) -> Vec<u32> {
    let mut vector = model.backend().vector(VOCAB).unwrap();
    model.logits(state, slot, &[token], true, &mut vector).unwrap();
    let mut out = vec![0.0; VOCAB];
    model.backend().read(&vector, &mut out).unwrap();
    out.iter().map(|x| x.to_bits()).collect()
}

/// A text in a slot.
struct Going {
    text: Text,
    read: usize,
    made: usize,
    want: (Vec<u32>, Vec<u32>),
}

/// Texts of random lengths join, leave in the middle and end; prompts go in chunks of any length beside the tokens of
/// others; slots are used again, from where their texts agree. All are what they are alone.
fn mix<B: UnderTest>(
    model: &Model<'_, B>,
    seed: u64,
    passes: usize,
    compensated: bool,
) -> HashMap<&'static str, usize> {
    let mut noise = Noise::new(seed);
    let mut state = model.state(SLOTS, CONTEXT).unwrap();
    let slots = 1 + noise.below(SLOTS);
    let mut going: Vec<Option<Going>> = (0..slots).map(|_| None).collect();
    // What each slot has read of its text before.
    let mut held: Vec<(Vec<u32>, bool)> = vec![(Vec::new(), false); slots];
    let mut seen: HashMap<&'static str, usize> = HashMap::new();
    for _ in 0..passes {
        for slot in 0..slots {
            if going[slot].is_some() || noise.below(3) == 0 {
                continue;
            }
            let mut text = Text::any(&mut noise, compensated);
            let (before, as_prompt) = &held[slot];
            // Sometimes the text begins like the one that the slot has read, where that was read in the same way.
            let kept = if *as_prompt == text.compensated && before.len() > 1 && noise.below(2) == 0 {
                let kept = 1 + noise.below(before.len() - 1);
                text.prompt = [&before[..kept], &text.prompt].concat();
                text.prompt.truncate(CONTEXT - 13);
                kept.min(text.prompt.len() - 1)
            } else {
                0
            };
            model.resume(&mut state, slot, kept, &text.sampling, &text.draws).unwrap();
            *seen.entry("kept").or_default() += usize::from(kept > 0);
            let want = alone(model, &text);
            going[slot] = Some(Going { text, read: kept, made: 0, want });
        }
        // Leaves in the middle.
        let slot = noise.below(slots);
        if noise.below(8) == 0 && going[slot].as_ref().is_some_and(|text| text.made > 0) {
            going[slot] = None;
            held[slot].0.clear();
            *seen.entry("cancelled").or_default() += 1;
        }
        let mut room = state.max_tokens();
        let mut parts = Vec::new();
        for (slot, text) in going.iter().enumerate().filter_map(|(slot, text)| Some((slot, text.as_ref()?))) {
            if room == 0 {
                break;
            }
            let rest = &text.text.prompt[text.read..];
            let part = match rest.len() {
                0 => Part::next(slot),
                len => {
                    let chunk = (1 + noise.below(len)).min(room);
                    let choices = usize::from(chunk == len);
                    Part { slot, tokens: Some(&rest[..chunk]), choices, compensated: text.text.compensated }
                }
            };
            room -= part.rows();
            parts.push(part);
        }
        if parts.is_empty() {
            continue;
        }
        *seen.entry("mixed").or_default() += usize::from(
            parts.iter().any(|part| part.tokens.is_some()) && parts.iter().any(|part| part.tokens.is_none()),
        );
        let most = seen.entry("most texts in a pass").or_default();
        *most = parts.len().max(*most);
        model.pass(&mut state, &parts).unwrap();
        let done: Vec<_> =
            parts.iter().map(|part| (part.slot, part.tokens.map_or(0, <[u32]>::len), part.choices)).collect();
        for (slot, read, chosen) in done {
            let text = going[slot].as_mut().unwrap();
            (text.read, text.made) = (text.read + read, text.made + chosen);
            if text.made < text.text.tokens {
                continue;
            }
            let Going { text, want, .. } = going[slot].take().unwrap();
            let got: Vec<_> = (0..text.tokens).map(|i| model.sampled(&state, slot, i).unwrap()).collect();
            assert_eq!(got, want.0, "{}, seed {seed}, {text:?}", model.backend().device().id);
            let logits = next_logits(model, &mut state, slot, *got.last().unwrap());
            assert_eq!(logits, want.1, "{}, seed {seed}, {text:?}", model.backend().device().id);
            held[slot] = (text.prompt, text.compensated);
            *seen.entry("ended").or_default() += 1;
        }
    }
    seen
}

/// The property, compensated and not, by both selections.
pub(crate) fn rows_of_several_texts<B: UnderTest>(backend: &B) {
    let weights = Changed(Quantized { model: SmallModel::new(5, 2, false), lutgemm: false });
    let mut model = Model::load(backend, &weights, |_| ()).unwrap();
    let (rounds, passes) = if B::CASES > 1000 { (2, 40) } else { (2, 24) };
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for (i, selection) in [None, Some(Selection::Bucket), Some(Selection::Exact)].into_iter().enumerate() {
        model.compensate(selection.map(|selection| Compensation::uniform(2, 200, selection)).as_ref()).unwrap();
        for round in 0..rounds {
            for (what, count) in mix(&model, 100 * i as u64 + round, passes, selection.is_some()) {
                *seen.entry(what).or_default() += count;
            }
        }
    }
    for what in ["kept", "cancelled", "mixed", "ended"] {
        assert!(seen[what] > 2, "{what} came {} times", seen[what]);
    }
    assert!(seen["most texts in a pass"] > 8);
}

/// What the property can see: a text that looks at another one's keys has other logits, though all else is the same.
pub(crate) fn a_row_of_another_slot_shows<B: UnderTest>(backend: &B) {
    let weights = Changed(Quantized { model: SmallModel::new(5, 2, false), lutgemm: false });
    let model = Model::load(backend, &weights, |_| ()).unwrap();
    let mut state = model.state(2, CONTEXT).unwrap();
    let prompts: [Vec<u32>; 2] = [(0..9).collect(), (40..49).collect()];
    let mut read = |slots: [usize; 2]| {
        for (&slot, prompt) in slots.iter().zip(&prompts) {
            model.begin(&mut state, slot, &Sampling::GREEDY, &[]).unwrap();
            model.extend(&mut state, slot, prompt, false).unwrap();
        }
        // The same token at the same position of both.
        [0, 1].map(|slot| next_logits(&model, &mut state, slot, 7))
    };
    let [first, second] = read([0, 1]);
    assert_ne!(first, second, "what was read before is not seen");
    assert_eq!(read([1, 0]), [second, first], "a slot is not its number");
}

/// Whatever cannot go into a pass is told before anything is read, and the texts go on as if nothing had been.
pub(crate) fn passes_that_cannot_be<B: UnderTest>(backend: &B) {
    let weights = Changed(Quantized { model: SmallModel::new(5, 2, false), lutgemm: false });
    let model = Model::load(backend, &weights, |_| ()).unwrap();
    let mut state = model.state(3, 8).unwrap();
    let of = |slot, tokens: &'static [u32], choices| Part { slot, tokens: Some(tokens), choices, compensated: false };
    model.begin(&mut state, 1, &Sampling::GREEDY, &[]).unwrap();
    model.pass(&mut state, &[of(0, &[1, 2, 3], 1), of(1, &[4, 5, 6, 7, 8], 1)]).unwrap();
    let mut refused = |parts: &[Part<'_>], said: &[&str]| {
        let error = format!("{:#}", model.pass(&mut state, parts).unwrap_err());
        assert!(said.iter().all(|said| error.contains(said)) && !error.contains('\n'), "{error}: {said:?} expected");
    };
    refused(&[], &["no texts"]);
    refused(&[Part::next(0), Part::next(0)], &["slot 0", "twice"]);
    refused(&[Part::next(0), Part::next(2)], &["slot 2 holds no text"]);
    refused(&[Part::next(0), Part::next(3)], &["slot 3", "there are 3"]);
    refused(&[Part::next(0), of(1, &[1, 2, 3, 4], 0)], &["4 more tokens", "context of 8 has room for 3"]);
    refused(&[Part::next(0), of(1, &[96], 0)], &["token id 96", "95"]);
    refused(&[Part::next(0), of(1, &[], 0)], &["empty"]);
    refused(&[of(0, &[1; 5], 0), of(1, &[1; 3], 0), Part::next(0)], &["slot 0", "twice"]);
    refused(&[Part::next(0), of(1, &[1], 2)], &["2 tokens to be chosen", "1 rows"]);
    model.step(&mut state, &[0, 1]).unwrap();
    let got = [0, 1].map(|slot| [0, 1].map(|i| model.sampled(&state, slot, i).unwrap()));
    let mut one = model.state(1, 8).unwrap();
    let want = [&[1, 2, 3][..], &[4, 5, 6, 7, 8]].map(|prompt| {
        model.begin(&mut one, 0, &Sampling::GREEDY, &[]).unwrap();
        model.prompt(&mut one, 0, prompt, false).unwrap();
        model.step(&mut one, &[0]).unwrap();
        [0, 1].map(|i| model.sampled(&one, 0, i).unwrap())
    });
    assert_eq!(got, want);
}

/// Several tokens chosen in one pass, of which the last are taken back: the text goes on as if they had not been.
pub(crate) fn choices_are_taken_back<B: UnderTest>(backend: &B) {
    let weights = Changed(Quantized { model: SmallModel::new(5, 2, false), lutgemm: false });
    let mut model = Model::load(backend, &weights, |_| ()).unwrap();
    model.compensate(Some(&Compensation::uniform(2, 200, Selection::Bucket))).unwrap();
    for temperature in [0.0, 0.9] {
        let sampling = Sampling { temperature, ..Sampling::GREEDY };
        let text = Text { prompt: vec![5, 42, 79], tokens: 9, compensated: true, sampling, draws: draws(3, 9) };
        let (want, logits) = alone(&model, &text);
        let mut state = model.state(1, CONTEXT).unwrap();
        model.begin(&mut state, 0, &text.sampling, &text.draws).unwrap();
        model.prompt(&mut state, 0, &text.prompt, true).unwrap();
        // The token that is known, two that are right, and two that are not.
        let wrong = want[3] ^ 1;
        let rows = [want[0], want[1], want[2], wrong, 9];
        let part = Part { slot: 0, tokens: Some(&rows), choices: 5, compensated: true };
        model.pass(&mut state, &[part]).unwrap();
        let chosen = [1, 2, 3].map(|i| model.sampled(&state, 0, i).unwrap());
        assert_eq!(chosen, want[1..4]);
        (0..2).for_each(|i| drop(model.sampled(&state, 0, 4 + i)));
        model.cut(&mut state, 0, 6, 4).unwrap();
        (4..9).for_each(|_| model.step(&mut state, &[0]).unwrap());
        let got: Vec<_> = (0..9).map(|i| model.sampled(&state, 0, i).unwrap()).collect();
        assert_eq!(got, want, "temperature {temperature}");
        assert_eq!(next_logits(&model, &mut state, 0, got[8]), logits, "temperature {temperature}");
        let error = model.cut(&mut state, 0, 40, 4).unwrap_err().to_string();
        assert!(error.contains("cut to 40 tokens") && error.contains("begin it anew"), "{error}");
    }
}
