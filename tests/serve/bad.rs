//! Requests that make no sense: one line each, the right status, and the server goes on.

use std::io::Write;

use decdec::serve::Keys;
use serde_json::{Value, json};

use crate::client::{Response, Scripted, Setup, connect, exchange, post};

#[test]
fn what_is_wrong_is_said_in_openais_form() {
    let server = Scripted::start(Setup::default());
    let chat = |more: Value| {
        let mut body = json!({ "messages": [{ "role": "user", "content": "x" }] });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        ("/v1/chat/completions", body)
    };
    let plain = |more: Value| {
        let mut body = json!({ "prompt": "x" });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        ("/v1/completions", body)
    };
    let cases = [
        (chat(json!({ "wibble": 1 })), 400, "wibble", "wibble is not a field of this request, leave it out"),
        (chat(json!({ "a\nb": 1 })), 400, "a\nb", "a\\nb is not a field"),
        (chat(json!({ "Temperature": 1 })), 400, "Temperature", "is temperature meant"),
        (
            chat(json!({ "temperature": -1 })),
            400,
            "temperature",
            "temperature is -1, a number from 0 to 100 is expected",
        ),
        (chat(json!({ "temperature": "hot" })), 400, "temperature", "\"hot\""),
        (chat(json!({ "top_p": 1.5 })), 400, "top_p", "0 to 1"),
        (chat(json!({ "n": 0 })), 400, "n", "n is 0, 1 to 128 is expected"),
        (chat(json!({ "n": 129 })), 400, "n", "129"),
        (chat(json!({ "max_tokens": -1 })), 400, "max_tokens", "-1"),
        (chat(json!({ "top_logprobs": 2 })), 400, "top_logprobs", "set logprobs to true"),
        (chat(json!({ "logprobs": true, "top_logprobs": 21 })), 400, "top_logprobs", "21"),
        (chat(json!({ "model": "gpt-4" })), 404, "model", "the model is gpt-4, scripted, alias is served here"),
        (
            chat(json!({ "messages": [] })),
            400,
            "messages",
            "messages is [], a list of at least one message is expected",
        ),
        (chat(json!({ "messages": "hello" })), 400, "messages", "\"hello\""),
        (chat(json!({ "messages": [{ "content": "x" }] })), 400, "messages[0].role", "messages[0].role is missing"),
        (chat(json!({ "messages": [{ "role": "user", "content": 1 }] })), 400, "messages[0].content", "a string"),
        (
            chat(json!({ "messages": [{ "role": "user", "content": "x", "odd": 1 }] })),
            400,
            "messages[0].odd",
            "not a field",
        ),
        (
            chat(json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] })),
            400,
            "messages[0].content[0].type",
            "is image_url, this model reads text only",
        ),
        (chat(json!({ "store": true })), 400, "store", "store is not supported, nothing is stored"),
        (chat(json!({ "functions": [] })), 400, "functions", "use tools"),
        (chat(json!({ "echo": true })), 400, "echo", "use /v1/completions"),
        (chat(json!({ "response_format": { "type": "xml" } })), 400, "response_format.type", "xml"),
        (chat(json!({ "stream_options": { "usage": true } })), 400, "stream_options.usage", "include_usage"),
        (chat(json!({ "logit_bias": { "9999": 1 } })), 400, "logit_bias", "below 262"),
        (chat(json!({ "stop": vec!["x"; 17] })), 400, "stop", "stop has 17 texts, at most 16 are allowed"),
        (chat(json!({ "stop_token_ids": [300] })), 400, "stop_token_ids", "300"),
        (chat(json!({ "seed": 1.5 })), 400, "seed", "1.5"),
        (plain(json!({ "prompt": [] })), 400, "prompt", "prompt is []"),
        (plain(json!({ "prompt": [1, "a"] })), 400, "prompt", "a list of token ids"),
        (plain(json!({ "prompt": [5000] })), 400, "prompt", "prompt has the token id 5000, the last one is 261"),
        (plain(json!({ "prompt": {} })), 400, "prompt", "a string"),
        (plain(json!({ "prompt": Value::Null })), 400, "prompt", "prompt is missing"),
        (plain(json!({ "best_of": 1, "n": 2 })), 400, "best_of", "best_of is 1, n is 2"),
        (plain(json!({ "best_of": 2, "stream": true })), 400, "best_of", "cannot be streamed"),
        (plain(json!({ "suffix": "x" })), 400, "suffix", "suffix is not supported"),
        (plain(json!({ "logprobs": 101 })), 400, "logprobs", "101"),
        (("/tokenize", json!({ "tokens": [1] })), 400, "messages", "messages is missing"),
        (("/detokenize", json!({ "tokens": ["a"] })), 400, "tokens", "a list of token ids"),
    ];
    for ((path, body), status, param, message) in cases {
        let response = server.post(path, &body);
        let error = response.json()["error"].clone();
        assert_eq!(response.status, status, "{body}: {error}");
        assert_eq!(error["param"], param, "{body}: {error}");
        let said = error["message"].as_str().expect("a message");
        assert!(said.contains(message) && !said.contains('\n'), "{body}: {said}");
        assert!(error["type"].is_string() && error.get("code").is_some(), "{error}");
    }
    let long = server.post("/v1/completions", &json!({ "prompt": "x", "y".repeat(50_000): 1 }));
    assert_eq!(long.json()["error"]["message"].as_str().expect("a message").chars().count(), 1001);
    assert_eq!(server.steps(), 0, "nobody was asked for anything");
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
}

#[test]
fn a_prompt_that_is_too_long_is_told_with_both_counts() {
    let server = Scripted::start(Setup { room: 20, ..Setup::default() });
    for (path, body) in [
        ("/v1/completions", json!({ "prompt": "x".repeat(20) })),
        ("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": "x" }] })),
    ] {
        let response = server.post(path, &body);
        let error = &response.json()["error"];
        assert_eq!((response.status, &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
        let tokens = error["n_prompt_tokens"].as_u64().expect("a number");
        assert!(tokens > 20 && error["n_ctx"] == 20, "{error}");
        let said = error["message"].as_str().expect("a message");
        assert!(said.contains("context_length_exceeded") && said.contains("maximum context length is 20"), "{said}");
        assert!(said.contains(&format!("{tokens} tokens")), "{said}");
    }
    // One that just fits has room for one token: nothing reads the last.
    let full = server.ok("/v1/completions", &json!({ "prompt": "x".repeat(19), "max_tokens": 5 }));
    assert_eq!(
        (&full["usage"]["completion_tokens"], &full["choices"][0]["finish_reason"]),
        (&json!(1), &json!("length"))
    );
    let most = server.ok("/v1/completions", &json!({ "prompt": "x".repeat(9), "max_tokens": 50 }));
    assert_eq!(most["usage"]["total_tokens"], 21);
}

#[test]
fn bodies_that_are_none() {
    let server = Scripted::start(Setup::default());
    let send = |request: &str| exchange(server.address, request);
    let with_type = |kind: &str| {
        send(&format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{kind}content-length: 2\r\n\r\n{{}}"
        ))
    };
    assert_eq!(with_type("content-type: text/plain\r\n").status, 415);
    assert_eq!(with_type("").status, 415);
    assert_eq!(with_type("content-type: application/json; charset=utf-8\r\n").status, 400, "a field is missing");
    let said = |response: Response| response.json()["error"]["message"].as_str().expect("a message").to_owned();
    let broken = send(&post("/v1/completions", "{\"prompt\": \"x\","));
    assert!(broken.status == 400 && said(broken).starts_with("the body is not valid JSON: "));
    let deep = send(&post("/v1/completions", &"[".repeat(50_000)));
    assert!(deep.status == 400 && said(deep).contains("recursion limit exceeded"));
    let large = send(&post("/v1/completions", &format!("{{\"prompt\": \"{}\"}}", "x".repeat(100_000))));
    assert!(large.status == 413 && said(large).contains("100000 bytes"));
    let chunked = format!("{:x}\r\n{}\r\n0\r\n\r\n", 150_000, "x".repeat(150_000));
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_eq!(send(&format!("{head}{chunked}")).status, 413);
    let header = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "x".repeat(1 << 20));
    assert_eq!(send(&header).status, 431);
    assert_eq!(server.get("/nowhere").status, 404);
    assert!(server.get("/nowhere").json()["error"]["message"].as_str().expect("a message").contains("/nowhere"));
    let wrong = send("DELETE /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert_eq!(wrong.status, 405);
    assert_eq!(send("nonsense\r\n\r\n").status, 400);
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
}

#[test]
fn keys_are_asked_for() {
    let server = Scripted::start(Setup { keys: Keys::new(&["secret"]), ..Setup::default() });
    let get = |path: &str, header: &str| {
        exchange(server.address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n{header}connection: close\r\n\r\n"))
    };
    assert_eq!([get("/health", "").status, get("/ready", "").status], [200, 200], "they are open to everybody");
    for path in ["/v1/models", "/metrics", "/props", "/slots", "/nowhere"] {
        let refused = get(path, "");
        assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("bearer")), "{path}");
        assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    }
    assert_eq!(get("/v1/models", "authorization: Bearer secret\r\n").status, 200);
    assert_eq!(get("/v1/models", "x-api-key: secret\r\n").status, 200);
    assert_eq!(get("/v1/models", "authorization: Bearer wrong\r\n").status, 401);
}

#[test]
fn pages_of_other_origins_may_not_ask_unless_they_are_named() {
    let ask = |server: &Scripted, method: &str| {
        let head =
            format!("{method} /v1/models HTTP/1.1\r\nhost: x\r\norigin: http://a.example\r\nconnection: close\r\n\r\n");
        let response = exchange(server.address, &head);
        (response.status, response.header("access-control-allow-origin").map(str::to_owned))
    };
    let closed = Scripted::start(Setup::default());
    assert_eq!(ask(&closed, "GET"), (200, None));
    assert_eq!(ask(&closed, "OPTIONS"), (405, None));
    let open = Scripted::start(Setup { origins: vec!["http://a.example".into()], ..Setup::default() });
    assert_eq!(ask(&open, "GET"), (200, Some("http://a.example".into())));
    assert_eq!(ask(&open, "OPTIONS"), (204, Some("http://a.example".into())));
    let other = Scripted::start(Setup { origins: vec!["http://b.example".into()], ..Setup::default() });
    assert_eq!(ask(&other, "GET"), (200, None));
}

#[test]
fn a_body_that_stops_half_way_is_left() {
    let server = Scripted::start(Setup::default());
    let mut stream = connect(server.address);
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half closed");
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut stream, &mut rest);
    assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
}
