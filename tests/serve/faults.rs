//! What breaks: a device that fails, an engine that dies, a server that is told to end, clients that do not read.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use decdec::serve::Ending;
use serde_json::{Value, json};

use crate::client::{Response, Scripted, Setup, connect, post};

#[test]
fn a_text_that_fails_ends_and_others_go_on() {
    let server = Scripted::start(Setup::default());
    let whole = server.post("/v1/completions", &json!({ "prompt": "FAIL" }));
    assert_eq!((whole.status, &whole.json()["error"]["type"]), (500, &json!("server_error")));
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let body = json!({ "prompt": "FAIL", "messages": [{ "role": "user", "content": "FAIL" }], "stream": true });
        let mut body = body.as_object().expect("an object").clone();
        body.remove(if path.contains("chat") { "prompt" } else { "messages" });
        let chunks = server.stream(path, &Value::Object(body));
        let last = chunks.last().expect("an error");
        assert!(last["error"]["message"].as_str().expect("a message").contains("/nowhere"), "{last}");
    }
    assert_eq!(server.metric("decdec_requests_failed_total"), 3.0);
    server.ok("/v1/completions", &json!({ "prompt": "[[b]]" }));
}

#[test]
fn a_dead_engine_is_told_to_everybody() {
    let server = Scripted::start(Setup { slots: 1, delay: Duration::from_millis(2), ..Setup::default() });
    let begin = |body: &Value| {
        let mut stream = connect(server.address);
        stream.write_all(post("/v1/completions", &body.to_string()).as_bytes()).expect("sent");
        stream
    };
    let mut killer = begin(&json!({ "prompt": "x".repeat(300) + "PANIC", "stream": true }));
    server.until("it has its slot", || server.busy() == 1);
    let mut waits = begin(&json!({ "prompt": "x" }));
    let streamed = Response::read(&mut killer);
    assert!(streamed.status == 200 && streamed.body.ends_with("data: [DONE]\n\n"), "{}", streamed.body);
    assert!(streamed.body.contains("the engine has ended"), "{}", streamed.body);
    assert_eq!(Response::read(&mut waits).status, 500);
    assert_eq!([server.get("/health").status, server.get("/ready").status], [200, 503]);
    let refused = server.post("/v1/completions", &json!({ "prompt": "x" }));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
}

#[test]
fn a_server_that_ends_first_says_so_and_then_finishes_what_it_began() {
    let ending = Ending { notice: Duration::from_millis(300), limit: Duration::from_secs(120) };
    let mut server = Scripted::start(Setup { delay: Duration::from_millis(2), ending, ..Setup::default() });
    let mut stream = connect(server.address);
    let body = json!({ "prompt": "x", "max_tokens": 400, "temperature": 0, "stream": true });
    stream.write_all(post("/v1/completions", &body.to_string()).as_bytes()).expect("sent");
    server.until("it is being made", || server.busy() == 1);
    let mut idle = connect(server.address);
    let handle = server.server.take().expect("a server");
    handle.stop();
    server.until("it is not ready", || server.get("/ready").status == 503);
    // Routers may not have noticed yet: what comes is made.
    server.ok("/v1/completions", &json!({ "prompt": "[[b]]" }));
    let answer = Response::read(&mut stream);
    assert_eq!(crate::client::events(&answer.body).len(), 401, "400 tokens and the end");
    let started = Instant::now();
    handle.wait();
    assert!(started.elapsed() < Duration::from_secs(5), "idle connections are closed");
    assert!(server.engine.take().expect("an engine").join().expect("no panic"));
    assert_eq!(idle.read(&mut [0; 8]).unwrap_or(0), 0);
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens");
}

#[test]
fn texts_that_take_too_long_are_left_in_the_end() {
    let ending = Ending { notice: Duration::ZERO, limit: Duration::from_millis(100) };
    let mut server = Scripted::start(Setup { delay: Duration::from_millis(20), ending, ..Setup::default() });
    let mut stream = connect(server.address);
    let body = json!({ "prompt": "x", "max_tokens": 900, "temperature": 0, "stream": true });
    stream.write_all(post("/v1/completions", &body.to_string()).as_bytes()).expect("sent");
    server.until("it is being made", || server.busy() == 1);
    let handle = server.server.take().expect("a server");
    let started = Instant::now();
    handle.stop();
    let told = Response::read(&mut stream);
    let last = crate::client::events(&told.body).pop().expect("an error");
    assert!(last["error"]["message"].as_str().is_some_and(|said| said.starts_with("the server ends")), "{last}");
    handle.wait();
    assert!(server.engine.take().expect("an engine").join().expect("no panic"));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

/// Who reads nothing for a while gets all of it later; idle connections stand in nobody's way.
#[test]
fn slow_readers_and_idle_connections() {
    let server = Scripted::start(Setup { slots: 2, ..Setup::default() });
    let mut idle: Vec<_> = (0..200).map(|_| connect(server.address)).collect();
    let mut slow = connect(server.address);
    let body = json!({ "prompt": "x", "max_tokens": 900, "temperature": 0, "stream": true, "logprobs": 5 });
    slow.write_all(post("/v1/completions", &body.to_string()).as_bytes()).expect("sent");
    server.until("its text is made although nobody reads", || server.metric("vllm:generation_tokens_total") == 900.0);
    server.ok("/v1/completions", &json!({ "prompt": "[[b]]" }));
    let answer = Response::read(&mut slow);
    assert_eq!(crate::client::events(&answer.body).len(), 901);
    // Each of them still has its place.
    let last = idle.last_mut().expect("many");
    last.write_all(post("/v1/completions", &json!({ "prompt": "[[b]]" }).to_string()).as_bytes()).expect("sent");
    assert_eq!(Response::read(last).json()["choices"][0]["text"], "b");
}
