//! Texts whose operations are mixed with those of others, or with other compensation: each is what it is alone.

use decdec::backend::DecodeBackend;
use decdec::dec::Selection;
use decdec::model::{Compensation, Model, State};
use decdec::sampling::{Sampling, argmax, draws};

/// Tokens that are made of each text.
const TOKENS: usize = 14;

/// One text: its prompt, and how its tokens are chosen.
struct Text {
    prompt: Vec<u32>,
    sampling: Sampling,
    draws: Vec<f32>,
}

impl Text {
    /// Two that differ in everything.
    fn two(vocab: usize) -> [Self; 2] {
        let prompt = |len: u32, step: u32| (0..len).map(|i| (i * step + 3) % vocab as u32).collect();
        let sampling = Sampling { temperature: 0.9, top_k: 30, top_p: 0.95, min_p: 0.01 };
        [
            Self { prompt: prompt(5, 37), sampling: Sampling::GREEDY, draws: Vec::new() },
            Self { prompt: prompt(9, 53), sampling, draws: draws(8, TOKENS) },
        ]
    }

    /// Reads the prompt and chooses the first token.
    fn begin<B: DecodeBackend>(&self, model: &Model<'_, B>, state: &mut State<B>) {
        model.begin(state, 0, &self.sampling, &self.draws).unwrap();
        model.prompt(state, 0, &self.prompt, true).unwrap();
    }
}

fn tokens<B: DecodeBackend>(model: &Model<'_, B>, state: &State<B>) -> Vec<u32> {
    (0..TOKENS).map(|i| model.sampled(state, 0, i).unwrap()).collect()
}

/// Two texts on two states, token by token in turn, and one that begins anew in the middle of the other.
pub(crate) fn interleaved<B: DecodeBackend>(model: &Model<'_, B>) {
    let texts = Text::two(model.config().vocab_size);
    let alone = texts.each_ref().map(|text| {
        let mut state = model.state(1, 30).unwrap();
        text.begin(model, &mut state);
        (1..TOKENS).for_each(|_| model.step(&mut state, &[0]).unwrap());
        tokens(model, &state)
    });
    assert_ne!(alone[0], alone[1], "the texts do not differ");

    let mut states = [model.state(1, 30).unwrap(), model.state(1, 25).unwrap()];
    for (text, state) in texts.iter().zip(&mut states) {
        text.begin(model, state);
    }
    for _ in 1..TOKENS {
        states.iter_mut().for_each(|state| model.step(state, &[0]).unwrap());
    }
    for (state, want) in states.iter().zip(&alone) {
        assert_eq!(&tokens(model, state), want, "a text in turn with another");
    }

    let [first, second] = &mut states;
    texts.iter().zip([&mut *first, &mut *second]).for_each(|(text, state)| text.begin(model, state));
    let mut behind = 0;
    for i in 1..TOKENS {
        if i % 5 == 4 {
            texts[1].begin(model, second);
            behind = i - 1;
        }
        model.step(first, &[0]).unwrap();
        model.step(second, &[0]).unwrap();
    }
    (0..behind).for_each(|_| model.step(second, &[0]).unwrap());
    assert_eq!(tokens(model, first), alone[0], "a text while another begins anew");
    assert_eq!(tokens(model, second), alone[1], "a text that began anew beside another");
}

/// A text whose model is compensated otherwise every few tokens, against one that is read token by token.
pub(crate) fn recompensated<B: DecodeBackend>(model: &mut Model<'_, B>, k_chunk: usize) {
    let vocab = model.config().vocab_size;
    let text = &Text::two(vocab)[0];
    let uniform = |k_chunk| Compensation::uniform(2, k_chunk, Selection::Bucket);
    let phases = [None, Some(uniform(k_chunk)), None, Some(uniform(2 * k_chunk)), Some(uniform(k_chunk))];
    let mut state = model.state(1, 40).unwrap();
    text.begin(model, &mut state);
    let mut vector = model.backend().vector(text.prompt.len() * vocab).unwrap();
    // One reads what the text does, the other without compensation.
    let mut readers = [true, false].map(|compensated| (compensated, model.state(1, 40).unwrap()));
    let mut read = |model: &Model<'_, B>, tokens: &[u32]| {
        readers.each_mut().map(|(compensated, reader)| {
            let mut values = vec![0.0; tokens.len() * vocab];
            model.logits(reader, 0, tokens, *compensated, &mut vector).unwrap();
            model.backend().read(&vector, &mut values).unwrap();
            values
        })
    };
    read(model, &text.prompt);
    for (i, phase) in phases.iter().flat_map(|phase| [phase; 4]).enumerate() {
        // Long enough in each phase for a token to be recorded and replayed.
        if i % 4 == 0 {
            model.compensate(phase.as_ref()).unwrap();
        }
        let last = model.sampled(&state, 0, i).unwrap();
        let [values, plain] = read(model, &[last]);
        assert!(phase.is_none() || values != plain, "token {}: compensation changes nothing", i + 1);
        model.step(&mut state, &[0]).unwrap();
        assert_eq!(Some(model.sampled(&state, 0, i + 1).unwrap()), argmax(&values), "token {}", i + 1);
    }
}
