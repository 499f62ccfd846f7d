//! SmolLM2-135M in full precision against transformers: ids, logits and greedy texts.

mod answers;
mod devices;
mod made;

use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;
use decdec::engine::Engine;
use decdec::eval;
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

/// What transformers says after a prompt.
struct Answer {
    /// Tokens, and their logits: all of them, or the largest and some others.
    logits: Vec<(usize, f32)>,
    /// `ln Σ exp` of all logits.
    log_sum_exp: f64,
    /// `Σ ln p` of the prompt's tokens but the first.
    log_probability: f64,
}

impl Answer {
    fn read(oracle: &SafeTensors<'_>, prompt: usize) -> Self {
        let tensor = |name: &str| oracle.tensor(&format!("p{prompt}.{name}"));
        let numbers = |name: &str| -> Vec<f32> {
            let data = tensor(name).unwrap_or_else(|e| panic!("{name} of prompt {prompt}: {e}"));
            bytemuck::pod_collect_to_vec(data.data())
        };
        let number = |name: &str| -> f64 {
            let data = tensor(name).unwrap_or_else(|e| panic!("{name} of prompt {prompt}: {e}"));
            bytemuck::pod_read_unaligned(data.data())
        };
        let log_probability = number("logprob_sum");
        let Ok(ids) = tensor("ids") else {
            let logits = numbers("last_logits");
            let log_sum_exp = log_sum_exp(&logits);
            return Self { logits: logits.into_iter().enumerate().collect(), log_sum_exp, log_probability };
        };
        let ids: Vec<i32> = bytemuck::pod_collect_to_vec(ids.data());
        let logits = ids.into_iter().map(|id| id as usize).zip(numbers("logits")).collect();
        Self { logits, log_sum_exp: number("log_sum_exp"), log_probability }
    }

    fn largest(&self) -> f32 {
        self.logits.iter().fold(0f32, |most, (_, logit)| most.max(logit.abs()))
    }

    /// The largest difference from the logits `got`, their common sum included.
    fn off(&self, got: &[f32]) -> f32 {
        let sum = (log_sum_exp(got) - self.log_sum_exp).abs() as f32;
        self.logits.iter().fold(sum, |most, &(id, want)| most.max((got[id] - want).abs()))
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, &logit| most.max(logit));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    sum.ln() + f64::from(most)
}

fn model() -> Option<Source> {
    Some(Source::open(&answers::smollm2()?).expect("opens"))
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

/// Half precision may choose other words, but reads a text as well.
#[test]
fn smollm2_reads_as_well_in_float16_on_cuda() {
    use decdec::backend::cuda::{Cuda, Dtype, Options};
    if !devices::is_under_test("cuda") {
        return;
    }
    let Some(source) = model() else { return };
    let text = std::fs::read_to_string("tests/data/botchan.txt").expect("readable");
    let tokenizer = Tokenizer::new(source.texts(), source.config()).expect("tokenizer");
    let text: String = text.replace("\r\n", "\n").chars().take(60_000).collect();
    let tokens = tokenizer.encode(&text).expect("encodes");
    let windows = eval::windows(&tokens, 512, 0..12).expect("long enough");
    let perplexity = |dtype| {
        let cuda = Cuda::new(0, Options { dtype, ..Options::default() }).expect("a CUDA device");
        let model = Model::load(&cuda, &source, |_| ()).expect("loads");
        eval::perplexity(&Engine::of(model, 512), None, &windows, |_| Ok(())).expect("runs").perplexity
    };
    let (single, half) = (perplexity(Dtype::Float32), perplexity(Dtype::Float16));
    println!("perplexity {single:.4} in float32, {half:.4} in float16");
    assert!(single > 5.0 && single < 100.0, "{single} is no perplexity of this text");
    assert!((half / single - 1.0).abs() < 5e-3, "{half} in float16, {single} in float32, 0.5 % apart at most");
}

fn ids_logits_and_texts_agree<B: DecodeBackend>(backend: &B) {
    let Some(source) = model() else { return };
    let read = |name: &str| std::fs::read(answers::reference("smollm2").join(name)).expect("readable");
    let cases: Vec<Case> = serde_json::from_slice(&read("greedy.json")).expect("json");
    let logits = read("logits.safetensors");
    let oracle = SafeTensors::deserialize(&logits).expect("safetensors");
    let tokenizer = Tokenizer::new(source.texts(), source.config()).expect("tokenizer");
    let model = Model::load(backend, &source, |_| ()).expect("loads");
    let vocab = source.config().vocab_size;
    let mut previous: Option<Vec<f32>> = None;
    for (i, case) in cases.iter().enumerate() {
        assert_eq!(tokenizer.encode(&case.prompt).expect("encodes"), case.ids, "{}", case.prompt);

        let mut state = model.state(1, case.ids.len()).expect("room");
        let mut all = backend.vector(case.ids.len() * vocab).expect("room");
        model.begin(&mut state, 0, &Sampling::GREEDY, &[]).expect("begins");
        model.logits(&mut state, 0, &case.ids, false, &mut all).expect("runs");
        let mut got = vec![0.0; case.ids.len() * vocab];
        backend.read(&all, &mut got).expect("reads");
        let next = case.ids[1..].iter().zip(got.chunks_exact(vocab));
        let log_probability: f64 = next.map(|(&id, l)| f64::from(l[id as usize]) - log_sum_exp(l)).sum();
        let got = &got[got.len() - vocab..];
        let answer = Answer::read(&oracle, i);
        let off = |got: &[f32]| answer.off(got) / answer.largest();
        assert!(off(got) <= 2e-3, "prompt {i}: logits are off by {} of the largest", off(got));
        let allowed = 2e-3 * f64::from(answer.largest()) * case.ids.len() as f64;
        let wrong = (log_probability - answer.log_probability).abs();
        assert!(wrong <= allowed, "prompt {i}: ln p is {wrong} off, {allowed} is allowed");
        if let Some(other) = &previous {
            assert!(off(other) > 2e-3, "prompt {i}: another prompt's logits pass too");
        }
        previous = Some(got.to_vec());

        for (prompt, greedy) in [(&case.ids, &case.greedy), (&case.chat_ids, &case.chat_greedy)] {
            let mut state = model.state(1, prompt.len() + greedy.len()).expect("room");
            let mut made = made::made(&model, &mut state, prompt, greedy.len(), false);
            let end = made.iter().position(|id| tokenizer.stop_ids().contains(id));
            made.truncate(end.unwrap_or(made.len()));
            let texts = greedy.split_at(made.len());
            assert_eq!(made, texts.0, "prompt {i}");
            assert_eq!(texts.1.len(), usize::from(end.is_some()), "prompt {i}: only the end of text may be missing");
        }
    }
}
