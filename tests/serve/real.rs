//! A real engine behind the server: a small model of random numbers in 3 bits, with residuals, on the CPU.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use decdec::checkpoint::BitWidth;
use decdec::device::Device;
use decdec::engine::{Compensate, Engine, Options, Settings};
use decdec::format::{Format, Storage};
use decdec::model::LayerCompensation;
use decdec::open::Opened;
use decdec::random::RandomWeights;
use decdec::serve::{App, Ending, Line, Scheduler, Server, Slots};
use serde_json::{Value, json};

use crate::client::{Setup, exchange, options, post};
use crate::script;

fn opened() -> Opened {
    let weights = RandomWeights::new(script::config(), Storage::ANYPREC, 3, 11).expect("random numbers");
    Opened::random(weights, Format::AnyPrec, BitWidth::of_layers(&[3]).expect("one width"), "small")
}

/// Runs `client` against a server on the model, which `client` asks by path and body.
fn serve(slots: usize, client: impl FnOnce(&(dyn Fn(&str, &Value) -> Value + Sync)) + Send) {
    let (device, opened) = (Device::open("cpu").expect("a CPU"), opened());
    let tokenizer = Arc::new(script::tokenizer(script::TEMPLATE));
    let own = Options { max_seq_len: Some(256), slots, text: false, ..Options::default() };
    let engine = Engine::load(&device, &opened, &own, &decdec::progress::Silent).expect("an engine");
    assert!(engine.is_compensated());
    let line = Arc::new(Line::new(64));
    let app = App::new(Arc::clone(&line), Arc::clone(&tokenizer), options(&Setup { room: 256, ..Setup::default() }));
    let ending = Ending { notice: Duration::ZERO, limit: Duration::from_secs(20) };
    let server = Server::start(TcpListener::bind("127.0.0.1:0").expect("a port"), app, 64, ending).expect("a server");
    let address = server.address();
    let ask = move |path: &str, body: &Value| {
        let response = exchange(address, &post(path, &body.to_string()));
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    };
    let texts = Slots::new(&engine, slots).expect("slots");
    // The engine stays on the thread that opened the device: clients get another one.
    std::thread::scope(|scope| {
        let clients = scope.spawn(move || {
            let ready =
                || exchange(address, "GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").status == 200;
            while !ready() {
                std::thread::sleep(Duration::from_millis(5));
            }
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client(&ask)));
            server.stop();
            server.wait();
            ended
        });
        Scheduler::new(texts, &line, &tokenizer, Duration::from_millis(50)).run().expect("it ends well");
        if let Err(panic) = clients.join().expect("it was caught") {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The tokens of an answer, by their names.
fn tokens(answer: &Value) -> Vec<String> {
    let tokens = &answer["choices"][0]["logprobs"]["tokens"];
    tokens.as_array().expect("tokens").iter().map(|token| token.as_str().expect("a token").to_owned()).collect()
}

fn body(i: usize) -> Value {
    json!({ "prompt": format!("text {i}, which is not like others {}", "x".repeat(5 * (i % 4))), "max_tokens": 12,
        "temperature": if i.is_multiple_of(2) { 0.0 } else { 0.8 }, "seed": i, "logprobs": 0, "ignore_eos": true,
        "return_tokens_as_token_ids": true })
}

#[test]
fn answers_are_the_engines_own_alone_and_together() {
    serve(3, |ask| {
        let alone: Vec<_> = (0..8).map(|i| tokens(&ask("/v1/completions", &body(i)))).collect();
        let together: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|i| scope.spawn(move || tokens(&ask("/v1/completions", &body(i))))).collect();
            threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
        });
        assert_eq!(alone, together);
        // The same texts by the library.
        let (device, opened, tokenizer) =
            (Device::open("cpu").expect("a CPU"), opened(), script::tokenizer(script::TEMPLATE));
        let own = Options { max_seq_len: Some(256), text: false, ..Options::default() };
        let engine = Engine::load(&device, &opened, &own, &decdec::progress::Silent).expect("an engine");
        let mut session = engine.session(Settings { max_new_tokens: 12, ..Settings::default() }).expect("a session");
        for (i, served) in alone.iter().enumerate() {
            let sampling = decdec::sampling::Sampling {
                temperature: if i % 2 == 0 { 0.0 } else { 0.8 },
                ..decdec::sampling::Sampling::GREEDY
            };
            session.settings = Settings { sampling, seed: i as u64, ..session.settings.clone() };
            session.clear();
            let prompt = tokenizer.encode(body(i)["prompt"].as_str().expect("text")).expect("ids");
            session.prompt(&prompt).expect("it fits");
            let made: Vec<_> =
                session.rest().expect("tokens").tokens.iter().map(|id| format!("token_id:{id}")).collect();
            assert_eq!(&made, served, "text {i}");
        }
    });
}

#[test]
fn a_token_fetches_the_residuals_of_its_channels() {
    let (device, opened) = (Device::open("cpu").expect("a CPU"), opened());
    let sets = vec![LayerCompensation { n_tb: 8, k_chunks: [64, 32, 16, 8] }];
    let own = Options { text: false, compensate: Compensate::Sets(sets), ..Options::default() };
    let engine = Engine::load(&device, &opened, &own, &decdec::progress::Silent).expect("an engine");
    // Of 64, 64, 64 and 128 channels of each layer 4, 2, 1 and 1, with half a byte for each of the outputs.
    assert_eq!(engine.fetched(), 2 * (4 * 128 + 2 * 64 + 256 + 64) / 2);
    engine.compensate(None).expect("it stops");
    assert_eq!(engine.fetched(), 0);
}

#[test]
fn probabilities_of_a_prompt_are_those_of_an_evaluation() {
    let text = "What a text is worth is told by how little it surprises. ".repeat(3);
    let mut told = Vec::new();
    serve(2, |ask| {
        let body = json!({ "prompt": text, "max_tokens": 0, "echo": true, "logprobs": 0 });
        let answer = ask("/v1/completions", &body);
        let numbers = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("numbers").clone();
        told = numbers.iter().skip(1).map(|number| number.as_f64().expect("a number")).collect();
    });
    let (device, opened, tokenizer) =
        (Device::open("cpu").expect("a CPU"), opened(), script::tokenizer(script::TEMPLATE));
    let own = Options { max_seq_len: Some(256), text: false, ..Options::default() };
    let engine = Engine::load(&device, &opened, &own, &decdec::progress::Silent).expect("an engine");
    let tokens = tokenizer.encode(&text).expect("ids");
    assert_eq!(told.len(), tokens.len() - 1);
    let evaluation = decdec::eval::perplexity(&engine, None, &[&tokens], |_| Ok(())).expect("an evaluation");
    let served = (-told.iter().sum::<f64>() / told.len() as f64).exp();
    // Each number is told as a float32: half a unit in its last place, of numbers below 16.
    let rounding = 16.0 * f64::from(f32::EPSILON) / 2.0;
    assert!((served / evaluation.perplexity - 1.0).abs() < 2.0 * rounding, "{served}, {}", evaluation.perplexity);
    engine.compensate(None).expect("it stops");
    let without = decdec::eval::perplexity(&engine, None, &[&tokens], |_| Ok(())).expect("an evaluation");
    assert!((served / without.perplexity - 1.0).abs() > 20.0 * rounding, "without compensation it is another number");
}

#[test]
fn what_slots_hold_changes_no_answer() {
    let turns = |ask: &dyn Fn(&str, &Value) -> Value, first: &[&str]| {
        let mut messages: Vec<Value> = Vec::new();
        let mut answers = Vec::new();
        for content in first {
            messages.push(json!({ "role": "user", "content": content }));
            let body = json!({ "messages": messages, "temperature": 0, "max_tokens": 10, "ignore_eos": true });
            let answer = ask("/v1/chat/completions", &body);
            let said = answer["choices"][0]["message"]["content"].clone();
            messages.push(json!({ "role": "assistant", "content": said }));
            answers.push((said, answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64()));
        }
        (messages, answers)
    };
    serve(1, |ask| {
        let (messages, answers) = turns(ask, &["one", "two", "three"]);
        assert!(answers[2].1 > answers[1].1 && answers[1].1 > Some(0), "{answers:?}");
        // The same last turn behind another text, of which nothing can be kept.
        ask("/v1/completions", &json!({ "prompt": "another", "max_tokens": 1 }));
        let body = json!({ "messages": messages[..5], "temperature": 0, "max_tokens": 10, "ignore_eos": true });
        let again = ask("/v1/chat/completions", &body);
        assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() <= Some(1), "{again}");
        assert_eq!(again["choices"][0]["message"]["content"], answers[2].0);
    });
}
