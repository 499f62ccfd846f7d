//! `/v1/chat/completions`.

use serde_json::{Value, json};

use crate::client::{Scripted, Setup};

fn start() -> Scripted {
    Scripted::start(Setup::default())
}

fn user(content: &str) -> Value {
    json!([{ "role": "user", "content": content }])
}

#[test]
fn an_answer_as_a_whole() {
    let server = start();
    let body = json!({ "model": "alias", "messages": user("[[Guten Tag, 東京]]"), "temperature": 0 });
    let answer = server.ok("/v1/chat/completions", &body);
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("alias")));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": "Guten Tag, 東京" }));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    assert_eq!(answer["usage"]["completion_tokens"], 18, "17 bytes and the end");
    assert!(answer["timings"]["predicted_n"] == 18 && answer["id"].as_str().expect("an id").starts_with("chatcmpl-"));
}

#[test]
fn a_stream_begins_with_the_role_and_ends_with_done() {
    let server = start();
    let body = json!({ "messages": user("[[naïve 🙂]]"), "stream": true, "temperature": 0, "n": 2,
        "stream_options": { "include_usage": true } });
    let response = server.post("/v1/chat/completions", &body);
    assert_eq!(response.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(response.header("cache-control"), Some("no-cache"));
    assert_eq!(response.header("x-accel-buffering"), Some("no"));
    let chunks = crate::client::events(&response.body);
    let ids: std::collections::BTreeSet<_> = chunks.iter().map(|c| c["id"].as_str().expect("an id")).collect();
    assert_eq!(ids.len(), 1);
    for i in 0..2 {
        let own: Vec<_> = chunks.iter().filter(|c| c["choices"][0]["index"] == i).map(|c| &c["choices"][0]).collect();
        assert_eq!(own[0]["delta"], json!({ "role": "assistant", "content": "" }));
        let (last, parts) = own.split_last().expect("chunks");
        assert!(parts.iter().all(|c| c["finish_reason"] == Value::Null));
        let content: String = parts.iter().map(|c| c["delta"]["content"].as_str().expect("content")).collect();
        assert_eq!(content, "naïve 🙂");
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
    }
    let usage = chunks.last().expect("chunks");
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(24)));
}

#[test]
fn probabilities_are_streamed_too() {
    let server = start();
    let body = |stream: bool| json!({ "messages": user("[[ab🙂]]"), "temperature": 0, "logprobs": true, "top_logprobs": 2, "stream": stream });
    let whole = server.ok("/v1/chat/completions", &body(false))["choices"][0]["logprobs"]["content"].clone();
    let chunks = server.stream("/v1/chat/completions", &body(true));
    let parts: Vec<Value> =
        chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned()).flatten().collect();
    assert_eq!(whole, json!(parts));
    assert_eq!(parts.len(), 6, "one for each token");
    assert_eq!((&parts[0]["token"], &parts[0]["bytes"]), (&json!("a"), &json!([97])));
    assert_eq!((&parts[2]["token"], &parts[2]["bytes"]), (&json!("bytes:\\xf0"), &json!([0xf0])));
    assert_eq!(parts[1]["top_logprobs"].as_array().expect("two").len(), 2);
    assert_eq!(parts[1]["top_logprobs"][0]["logprob"], parts[1]["logprob"]);
}

#[test]
fn messages_in_every_form() {
    let server = start();
    let count = |messages: Value| server.ok("/tokenize", &json!({ "messages": messages }))["tokens"].clone();
    let plain = count(json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "ab" }]));
    let parts = json!([{ "role": "developer", "content": [{ "type": "text", "text": "s" }] },
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]);
    assert_eq!(count(parts), plain);
    // Whoever writes into a message cannot end a turn in it, and no second BOS comes in.
    let spelled = count(json!([{ "role": "user", "content": "<|im_end|>" }]));
    assert_eq!(spelled.as_array().expect("ids").iter().filter(|id| **id == 259).count(), 1);
    assert_eq!(spelled.as_array().expect("ids").iter().filter(|id| **id == 256).count(), 1);
}

#[test]
fn a_conversation_goes_on_where_it_was() {
    let server = start();
    let first = json!([{ "role": "user", "content": "a long question, [[yes]]" }]);
    let body = |messages: &Value| json!({ "messages": messages, "temperature": 0 });
    let one = server.ok("/v1/chat/completions", &body(&first));
    assert_eq!(one["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let mut second = first.clone();
    second
        .as_array_mut()
        .expect("a list")
        .extend([json!({ "role": "assistant", "content": "yes" }), json!({ "role": "user", "content": "and then?" })]);
    let two = server.ok("/v1/chat/completions", &body(&second));
    // What was made was compensated, and prompts are not: the answer is read again, what came before is not.
    assert_eq!(two["usage"]["prompt_tokens_details"]["cached_tokens"], one["usage"]["prompt_tokens"]);
    assert_eq!(
        server.metric("vllm:prefix_cache_hits_total"),
        one["usage"]["prompt_tokens"].as_f64().expect("a number")
    );
}
