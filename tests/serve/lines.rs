//! Many at once: a line with an end, clients that go, prompts between the steps of other texts.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Scripted, Setup, connect, post};

/// A request whose answer nobody waits for yet.
fn begin(server: &Scripted, body: &Value) -> TcpStream {
    let mut stream = connect(server.address);
    stream.write_all(post("/v1/completions", &body.to_string()).as_bytes()).expect("sent");
    stream
}

/// Slots that take 2 ms for each step.
fn slow(slots: usize, queue: usize) -> Scripted {
    Scripted::start(Setup { slots, queue, delay: Duration::from_millis(2), ..Setup::default() })
}

fn endless(stream: bool) -> Value {
    json!({ "prompt": "for ever", "max_tokens": 900, "temperature": 0, "stream": stream })
}

#[test]
fn a_line_has_an_end() {
    let server = slow(1, 2);
    let first = begin(&server, &endless(false));
    server.until("the first has its slot", || server.busy() == 1);
    let waiting = [begin(&server, &endless(false)), begin(&server, &endless(false))];
    server.until("two wait", || server.metric("vllm:num_requests_waiting") == 2.0);
    let refused = server.post("/v1/completions", &endless(false));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert!(refused.json()["error"]["message"].as_str().expect("a message").starts_with("2 texts wait already"));
    assert_eq!(server.metric("decdec_requests_refused_total"), 1.0);
    assert_eq!(server.get("/v1/loads").json()["loads"][0]["num_waiting_reqs"], 2);
    drop(waiting);
    server.until("they have gone", || server.metric("vllm:num_requests_waiting") == 0.0);
    drop(first);
    server.until("the slot is free", || server.busy() == 0);
    server.ok("/v1/completions", &json!({ "prompt": "[[b]]" }));
}

/// Wherever a text is when its client goes, it is left within one step.
#[test]
fn who_goes_is_not_worked_for() {
    let server = slow(1, 4);
    let free = |what: &str| {
        server.until(what, || server.busy() == 0);
        let steps = server.steps();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(server.steps(), steps, "{what}: nothing goes on");
    };
    // In the answer, streamed or not.
    for stream in [true, false] {
        let mut client = begin(&server, &endless(stream));
        server.until("it is being made", || server.get("/slots").json()[0]["made"].as_u64() > Some(3));
        if stream {
            let mut some = [0; 64];
            assert!(client.read(&mut some).expect("some") > 0);
        }
        drop(client);
        free("in the answer");
    }
    // In the prompt: 900 tokens, 16 a step.
    let client = begin(&server, &json!({ "prompt": "x".repeat(900), "stream": true }));
    server.until("some is read", || server.get("/slots").json()[0]["read"].as_u64() > Some(20));
    drop(client);
    free("in the prompt");
    let read = server.seen.lock().expect("no panic").steps.iter().flatten().map(|(_, tokens)| tokens).sum::<usize>();
    assert!(read < 3 * 900, "{read} tokens were read");
    // In the queue.
    let first = begin(&server, &endless(true));
    server.until("the first has its slot", || server.busy() == 1);
    let second = begin(&server, &json!({ "prompt": "FAIL", "stream": true }));
    server.until("the second waits", || server.metric("vllm:num_requests_waiting") == 1.0);
    drop(second);
    server.until("it has gone", || server.metric("vllm:num_requests_waiting") == 0.0);
    drop(first);
    free("in the queue");
    assert_eq!(server.metric("decdec_requests_failed_total"), 0.0, "the second was never begun");
    assert_eq!(server.metric("decdec_requests_cancelled_total"), 5.0, "each of them was noticed");
    server.ok("/v1/completions", &json!({ "prompt": "[[b]]" }));
}

/// A prompt is read in parts: a text in the making goes on in every step.
#[test]
fn prompts_are_read_between_steps() {
    let server = slow(2, 4);
    let first = begin(&server, &endless(false));
    server.until("it is being made", || server.get("/slots").json()[0]["made"].as_u64() > Some(3));
    let before = server.steps();
    let body = json!({ "prompt": "x".repeat(600), "max_tokens": 2, "temperature": 0 });
    server.ok("/v1/completions", &body);
    drop(first);
    let seen = server.seen.lock().expect("no panic");
    let with_both: Vec<_> = seen.steps[before..].iter().filter(|step| step.len() == 2).collect();
    assert!(with_both.len() >= 600 / 16, "{} steps", with_both.len());
    assert!(with_both.iter().all(|step| step.iter().any(|&(_, tokens)| tokens == 1)));
    assert!(with_both.iter().flat_map(|step| step.iter()).all(|&(_, tokens)| tokens <= 16));
}

/// Every answer is what it is alone, whatever else is asked for at the same time.
#[test]
fn answers_do_not_depend_on_each_other() {
    let server = Scripted::start(Setup { slots: 3, queue: 100, ..Setup::default() });
    let body = |i: usize| json!({ "prompt": format!("RANDOM {}", i % 7), "seed": i, "max_tokens": 20 + i % 5, "temperature": 1.0 });
    let text = |answer: Value| answer["choices"][0]["text"].as_str().expect("text").to_owned();
    let alone: Vec<_> = (0..24).map(|i| text(server.ok("/v1/completions", &body(i)))).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let (server, body, text) = (&server, &body, &text);
        let threads: Vec<_> =
            (0..24).map(|i| scope.spawn(move || text(server.ok("/v1/completions", &body(i))))).collect();
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    assert_eq!(alone, together);
    assert_ne!(alone[0], alone[7], "the prompts are the same, the seeds are not");
}

#[test]
fn a_prompt_goes_where_most_of_it_is() {
    let server = Scripted::start(Setup { slots: 2, ..Setup::default() });
    let ask = |prompt: &str| {
        let answer = server.ok("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 1, "temperature": 0 }));
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
    };
    assert_eq!(ask("first prompt"), 0);
    assert_eq!(ask("another one"), 0);
    assert_eq!(ask("first promises"), 11, "BOS and `first prom`");
    assert_eq!(ask("another one"), 11, "all but the last token");
    // Whose probabilities are asked for is read as a whole.
    let body = json!({ "prompt": "another one", "max_tokens": 0, "echo": true, "logprobs": 0 });
    let scored = server.ok("/v1/completions", &body);
    assert_eq!(scored["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(ask("another one"), 11, "it went where nothing was lost");
}

/// What was compensated is no part of a prompt that is not.
#[test]
fn a_prompt_goes_on_from_its_own_kind_alone() {
    let server = Scripted::start(Setup { slots: 1, ..Setup::default() });
    let body = json!({ "prompt": "another one", "max_tokens": 0, "echo": true, "logprobs": 0 });
    server.ok("/v1/completions", &body);
    let cached = || {
        let answer = server.ok("/v1/completions", &json!({ "prompt": "another one", "max_tokens": 1 }));
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64()
    };
    assert_eq!([cached(), cached()], [Some(0), Some(11)]);
}
