//! Anthropic's messages, OpenAI's responses, and compensation while texts are made.

use serde_json::{Value, json};

use crate::client::{Scripted, Setup};

/// Names and data of a stream's events.
fn named(body: &str) -> Vec<(String, Value)> {
    let blocks = body.split_terminator("\n\n").filter(|block| !block.starts_with(':'));
    let event = |block: &str| {
        let (name, data) = block.split_once('\n').expect("two lines");
        let name = name.strip_prefix("event: ").expect("a name").to_owned();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(data["type"], *name);
        (name, data)
    };
    blocks.map(event).collect()
}

const TOOLS: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
    {% endfor %}{# <tool_call> <think> tools #}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

const SAID: &str = "[[<think>hm</think>Hi<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": 1}}</tool_call>]]";

#[test]
fn anthropics_messages() {
    let server = Scripted::start(Setup { template: TOOLS, ..Setup::default() });
    let body = |stream: bool| {
        json!({ "model": "scripted", "max_tokens": 200, "temperature": 0, "system": [{ "type": "text", "text": "s" }],
            "messages": [{ "role": "user", "content": [{ "type": "text", "text": SAID, "cache_control": { "type": "ephemeral" } }] }],
            "tools": [{ "name": "now", "description": "d", "input_schema": { "type": "object" } }],
            "metadata": { "user_id": "u" }, "something_new": 1, "stream": stream })
    };
    let whole = server.ok("/v1/messages", &body(false));
    assert_eq!(
        (&whole["type"], &whole["role"], &whole["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("tool_use"))
    );
    let content = whole["content"].as_array().expect("blocks");
    let kinds: Vec<_> = content.iter().map(|block| block["type"].as_str().expect("a type")).collect();
    assert_eq!(kinds, ["thinking", "text", "tool_use"]);
    assert_eq!(
        (&content[0]["thinking"], &content[1]["text"], &content[2]["input"]),
        (&json!("hm"), &json!("Hi"), &json!({ "a": 1 }))
    );
    let counted = server.ok("/v1/messages/count_tokens", &{
        let mut body = body(false);
        body.as_object_mut().expect("an object").remove("max_tokens");
        body
    });
    let usage = &whole["usage"];
    assert_eq!(
        counted["input_tokens"].as_u64(),
        Some(
            usage["input_tokens"].as_u64().expect("a number")
                + usage["cache_read_input_tokens"].as_u64().expect("a number")
        )
    );
    let response = server.post("/v1/messages", &body(true));
    let events = named(&response.body);
    let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names[0], names[1], names[names.len() - 1]), ("message_start", "ping", "message_stop"));
    let starts: Vec<_> = events
        .iter()
        .filter(|(name, _)| name == "content_block_start")
        .map(|(_, data)| data["content_block"]["type"].clone())
        .collect();
    assert_eq!(starts, ["thinking", "text", "tool_use"]);
    assert_eq!(names.iter().filter(|name| **name == "content_block_stop").count(), 3);
    let joined = |kind: &str, field: &str| -> String {
        events
            .iter()
            .filter(|(_, data)| data["delta"]["type"] == kind)
            .map(|(_, data)| data["delta"][field].as_str().expect("text"))
            .collect()
    };
    assert_eq!(joined("thinking_delta", "thinking"), "hm");
    assert_eq!(joined("text_delta", "text"), "Hi");
    assert_eq!(joined("input_json_delta", "partial_json"), "{\"a\":1}");
    let (_, delta) = events.iter().find(|(name, _)| name == "message_delta").expect("one");
    assert_eq!(
        (&delta["delta"]["stop_reason"], &delta["usage"]["output_tokens"]),
        (&json!("tool_use"), &usage["output_tokens"])
    );
}

#[test]
fn anthropics_words_for_ends_and_errors() {
    let server = Scripted::start(Setup { room: 200, ..Setup::default() });
    let run = |content: Value, more: Value| {
        let mut body =
            json!({ "max_tokens": 20, "temperature": 0, "messages": [{ "role": "user", "content": content }] });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        server.post("/v1/messages", &body)
    };
    let reason = |content: &str, more: Value| run(json!(content), more).json()["stop_reason"].clone();
    assert_eq!(reason("[[a]]", json!({})), "end_turn");
    assert_eq!(reason("x", json!({})), "max_tokens");
    let stopped = run(json!("[[abc]]"), json!({ "stop_sequences": ["c"] })).json();
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!("c")));
    // Results of calls are messages of their own.
    let result =
        json!([{ "type": "tool_result", "tool_use_id": "t", "content": [{ "type": "text", "text": "[[r]]" }] }]);
    assert_eq!(run(result, json!({})).json()["content"][0]["text"], "r");
    for (content, more, status, message) in [
        (json!("x".repeat(300)), json!({}), 400, "context_length_exceeded"),
        (json!([{ "type": "image", "source": {} }]), json!({}), 400, "messages[0].content[0].type is image"),
        (json!("x"), json!({ "max_tokens": null }), 400, "max_tokens is missing"),
        (json!("x"), json!({ "model": "claude" }), 404, "the model is claude"),
        (json!("FAIL"), json!({}), 500, "nowhere"),
    ] {
        let response = run(content, more);
        let error = response.json();
        assert_eq!((response.status, &error["type"]), (status, &json!("error")), "{error}");
        assert!(error["error"]["message"].as_str().expect("a message").contains(message), "{error}");
    }
    let failed = named(&run(json!("FAIL"), json!({ "stream": true })).body);
    assert_eq!(failed.last().expect("events").0, "error");
}

#[test]
fn openais_responses() {
    let server = Scripted::start(Setup { template: TOOLS, ..Setup::default() });
    let body = |stream: bool| {
        json!({ "model": "scripted", "instructions": "s", "temperature": 0, "max_output_tokens": 200, "stream": stream,
            "input": [{ "role": "user", "content": [{ "type": "input_text", "text": SAID }] }],
            "tools": [{ "type": "function", "name": "now", "parameters": { "type": "object" } }] })
    };
    let whole = server.ok("/v1/responses", &body(false));
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("completed")));
    let kinds: Vec<_> = whole["output"].as_array().expect("items").iter().map(|item| item["type"].clone()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(whole["output"][1]["content"][0]["text"], "Hi");
    assert_eq!(whole["output"][2]["arguments"], "{\"a\":1}");
    let events = named(&server.post("/v1/responses", &body(true)).body);
    let numbers: Vec<_> = events.iter().map(|(_, data)| data["sequence_number"].as_u64().expect("a number")).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    assert_eq!((events[0].0.as_str(), events[1].0.as_str()), ("response.created", "response.in_progress"));
    let (last, data) = events.last().expect("events");
    assert_eq!(last, "response.completed");
    let texts = |response: &Value| {
        response["output"]
            .as_array()
            .expect("items")
            .iter()
            .map(|i| i["content"][0]["text"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(texts(&data["response"]), texts(&whole));
    let delta: String = events
        .iter()
        .filter(|(name, _)| name == "response.output_text.delta")
        .map(|(_, d)| d["delta"].as_str().expect("text"))
        .collect();
    assert_eq!(delta, "Hi");
    let history = json!({ "temperature": 0, "input": [{ "role": "user", "content": "q" },
        { "type": "function_call", "call_id": "c", "name": "now", "arguments": "{}" },
        { "type": "function_call_output", "call_id": "c", "output": "[[r]]" }] });
    assert_eq!(server.ok("/v1/responses", &history)["output"][0]["content"][0]["text"], "r");
    let cut = server.ok("/v1/responses", &json!({ "input": "x", "max_output_tokens": 3, "temperature": 0 }));
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    let refused = server.post("/v1/responses", &json!({ "input": "x", "previous_response_id": "r" }));
    assert!(refused.status == 400 && refused.body.contains("nothing is stored"), "{}", refused.body);
}

#[test]
fn compensation_changes_between_steps() {
    let server = Scripted::start(Setup::default());
    let set = server.ok("/compensation", &json!({ "k_chunks": [1, 2, 3, 4], "n_tb": 2 }));
    assert_eq!(set["k_chunks"], json!([1, 2, 3, 4]));
    assert_eq!(server.get("/props").json()["compensation"], json!([{ "n_tb": 2, "k_chunks": [1, 2, 3, 4] }]));
    assert_eq!(server.metric("decdec_k_chunk{model_name=\"scripted\",projection=\"d\"}"), 4.0);
    let kept = server.ok("/compensation", &json!({ "k_chunks": [8, 8, 8, 8] }));
    assert_eq!(kept["n_tb"], 2, "as it was");
    for body in [
        json!({ "k_chunks": [1, 2] }),
        json!({ "k_chunks": [2000, 0, 0, 0] }),
        json!({ "k_chunks": [1, 1, 1, 1], "n_tb": 9 }),
    ] {
        assert_eq!(server.post("/compensation", &body).status, 400, "{body}");
    }
    server.ok("/compensation", &json!({ "k_chunks": [0, 0, 0, 0] }));
    assert_eq!(server.get("/props").json()["compensation"], json!([]));
}
