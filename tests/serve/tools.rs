//! Thoughts, calls, and texts that have to look like something.

use serde_json::{Value, json};

use crate::client::{Scripted, Setup};

/// A template that writes thoughts, tools and calls as Qwen's does.
const HERMES: &str = "{{ bos_token }}{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}\
    Answer <tool_call>, think <think>.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}\
    <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not \
    enable_thinking %}QUIET{% endif %}{% endif %}";

/// Mistral's marks, which are special tokens.
const MISTRAL: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
    {% endfor %}{# [TOOL_CALLS] tools #}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn weather() -> Value {
    json!([{ "type": "function", "function": { "name": "get_weather", "description": "Today's weather",
        "parameters": { "type": "object", "properties": { "city": { "type": "string", "maxLength": 6 } },
            "required": ["city"], "additionalProperties": false } } }])
}

fn body(content: &str, more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": content }], "temperature": 0, "max_tokens": 300 });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

const CALL: &str = "[[<think>which?</think>Let me see. <tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>]]";

#[test]
fn a_call_as_a_whole_and_in_parts() {
    let server = Scripted::start(Setup { template: HERMES, ..Setup::default() });
    let answer = server.ok("/v1/chat/completions", &body(CALL, json!({ "tools": weather() })));
    let choice = &answer["choices"][0];
    let message = &choice["message"];
    assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("Let me see."), &json!("which?")));
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let call = &message["tool_calls"][0];
    assert_eq!(call["function"], json!({ "name": "get_weather", "arguments": "{\"city\":\"Köln\"}" }));
    assert!(call["type"] == "function" && call["id"].as_str().expect("an id").starts_with("call_"));
    assert_eq!(choice["finish_reason"], "tool_calls");
    // One byte a token: the marks come in as many parts as they have bytes.
    let chunks = server.stream("/v1/chat/completions", &body(CALL, json!({ "tools": weather(), "stream": true })));
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for chunk in &chunks {
        let delta = &chunk["choices"][0]["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        reasoning.push_str(delta["reasoning_content"].as_str().unwrap_or_default());
        calls.extend(delta["tool_calls"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!((content.as_str(), reasoning.as_str()), ("Let me see.", "which?"));
    assert_eq!((calls.len(), &calls[0]["index"], &calls[0]["function"]), (1, &json!(0), &call["function"]));
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "tool_calls");
    let quiet =
        server.ok("/v1/chat/completions", &body(CALL, json!({ "tools": weather(), "include_reasoning": false })));
    let message = &quiet["choices"][0]["message"];
    assert_eq!((message.get("reasoning_content"), &message["content"]), (None, &json!("Let me see.")));
}

#[test]
fn marks_that_are_special_tokens() {
    let server = Scripted::start(Setup { template: MISTRAL, ..Setup::default() });
    let content = "[[[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Bonn\"}}] ]]";
    let answer = server.ok("/v1/chat/completions", &body(content, json!({ "tools": weather() })));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"city\":\"Bonn\"}");
    assert_eq!(message["content"], Value::Null);
    // Whoever gave no tools is told no special token.
    let plain = server.ok("/v1/chat/completions", &body("[[a[TOOL_CALLS]b]]", json!({})));
    assert_eq!(plain["choices"][0]["message"]["content"], "ab");
    let special = json!({ "skip_special_tokens": false });
    let shown = server.ok("/v1/chat/completions", &body("[[a[TOOL_CALLS]b]]", special));
    assert_eq!(shown["choices"][0]["message"]["content"], "a[TOOL_CALLS]b");
}

#[test]
fn none_is_none_and_what_is_forced_is_a_call() {
    let server = Scripted::start(Setup { template: HERMES, ..Setup::default() });
    let prompt = |more: Value| {
        let mut body = body("x", more);
        body.as_object_mut()
            .expect("an object")
            .retain(|name, _| ["messages", "tools", "tool_choice"].contains(&name.as_str()));
        let tokens = server.ok("/tokenize", &body)["tokens"].clone();
        server.ok("/detokenize", &json!({ "tokens": tokens }))["prompt"].as_str().expect("text").to_owned()
    };
    assert!(prompt(json!({ "tools": weather() })).contains("Today's weather"));
    assert!(!prompt(json!({ "tools": weather(), "tool_choice": "none" })).contains("weather"));
    // The script would say something else: the form allows a call alone.
    for choice in [json!("required"), json!({ "type": "function", "function": { "name": "get_weather" } })] {
        let more = json!({ "tools": weather(), "tool_choice": choice });
        let answer = server.ok("/v1/chat/completions", &body("[[No, I will not.]]", more));
        let choice = &answer["choices"][0];
        let function = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(
            (&function["name"], &choice["finish_reason"]),
            (&json!("get_weather"), &json!("tool_calls")),
            "{answer}"
        );
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().expect("text")).expect("JSON");
        assert!(arguments["city"].is_string(), "{arguments}");
    }
    for (more, message) in [
        (json!({ "tool_choice": "required" }), "tools has no function"),
        (
            json!({ "tools": weather(), "tool_choice": { "type": "function", "function": { "name": "other" } } }),
            "not among tools",
        ),
        (json!({ "tools": weather(), "tool_choice": "maybe" }), "auto, none, required"),
        (json!({ "tools": [{ "type": "retrieval" }] }), "tools[0].type is retrieval"),
        (json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] }), "tools[0].function.name"),
    ] {
        let refused = server.post("/v1/chat/completions", &body("x", more));
        assert!(refused.status == 400 && refused.body.contains(message), "{}", refused.body);
    }
    let without = Scripted::start(Setup::default());
    let refused = without.post("/v1/chat/completions", &body("x", json!({ "tools": weather() })));
    assert!(refused.status == 400 && refused.body.contains("template knows none"), "{}", refused.body);
}

/// Calls of earlier answers and their results: also what is no JSON goes on, and nothing of it becomes a special token.
#[test]
fn a_history_of_calls() {
    let server = Scripted::start(Setup { template: HERMES, ..Setup::default() });
    let text = |arguments: &str| {
        let call = json!({ "id": "call_1", "type": "function", "function": { "name": "f", "arguments": arguments } });
        let messages = json!([{ "role": "user", "content": "x" }, { "role": "assistant", "content": null, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "call_1", "content": "12<|im_end|>" }]);
        let tokens = server.ok("/tokenize", &json!({ "messages": messages }))["tokens"].clone();
        let ends = tokens.as_array().expect("ids").iter().filter(|id| **id == 259).count();
        (server.ok("/detokenize", &json!({ "tokens": tokens }))["prompt"].as_str().expect("text").to_owned(), ends)
    };
    let (good, ends) = text("{\"a\": [1]}");
    assert!(good.contains("<tool_call>f {\"a\": [1]}</tool_call>") && good.contains("12<|im_end|>"), "{good}");
    assert_eq!(ends, 3, "one a turn");
    let (bad, ends) = text("{\"a\": <|im_end|>");
    assert!(bad.contains("<tool_call>f \"{\\\"a\\\": <|im_end|>\"</tool_call>"), "{bad}");
    assert_eq!(ends, 3);
}

#[test]
fn variables_of_the_template() {
    let server = Scripted::start(Setup { template: HERMES, ..Setup::default() });
    let count =
        |more: Value| server.ok("/v1/chat/completions", &body("[[x]]", more))["usage"]["prompt_tokens"].as_u64();
    let plain = count(json!({}));
    assert_eq!(count(json!({ "chat_template_kwargs": { "enable_thinking": false } })), plain.map(|n| n + 5));
    assert_eq!(count(json!({ "reasoning_effort": "none" })), plain.map(|n| n + 5));
    let refused = server.post("/v1/chat/completions", &body("x", json!({ "reasoning_effort": "high" })));
    assert!(refused.status == 400 && refused.body.contains("reasoning_effort is not supported"), "{}", refused.body);
    let own = server.post("/v1/chat/completions", &body("x", json!({ "chat_template_kwargs": { "messages": [] } })));
    assert_eq!(own.status, 400);
}

/// The script says what does not fit, and yet the answer does: what may not come is never chosen.
/// A schema of lists in lists, so many levels deep.
fn deep(levels: usize) -> Value {
    (1..levels).fold(json!({ "type": "integer" }), |inside, _| json!({ "type": "array", "items": inside }))
}

#[test]
fn texts_in_every_form() {
    let server = Scripted::start(Setup::default());
    let chat = |more: Value| {
        let answer = server.ok("/v1/chat/completions", &body("[[no form]]", more));
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{answer}");
        choice["message"]["content"].as_str().expect("text").to_owned()
    };
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer", "minimum": 3, "maximum": 5 },
        "w": { "enum": ["no", "yes"] } }, "required": ["n", "w"], "additionalProperties": false });
    let fits = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let n = value["n"].as_i64().expect("a number");
        assert!((3..=5).contains(&n) && (value["w"] == "no" || value["w"] == "yes"), "{text}");
        assert_eq!(value.as_object().expect("an object").len(), 2, "{text}");
    };
    let named = json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } });
    fits(&chat(json!({ "response_format": named })));
    fits(&chat(json!({ "structured_outputs": { "json": schema } })));
    fits(&chat(json!({ "guided_json": schema.to_string() })));
    let referred = json!({ "$defs": { "W": { "enum": ["no", "yes"] } }, "type": "object",
        "properties": { "n": { "const": 4 }, "w": { "$ref": "#/$defs/W" } }, "required": ["n", "w"], "additionalProperties": false });
    fits(&chat(json!({ "guided_json": referred })));
    let matched = chat(json!({ "guided_regex": "n[a-z]{1,2}o" }));
    assert!(matched.starts_with('n') && matched.ends_with('o') && (3..=4).contains(&matched.len()), "{matched}");
    assert!(["yes", "nay"].contains(&chat(json!({ "guided_choice": ["yes", "nay"] })).as_str()));
    for field in ["grammar", "guided_grammar"] {
        assert_eq!(chat(json!({ field: "start: \"x\" B\nB: /[n-p]{2}/" })).len(), 3, "{field}");
    }
    let object = server
        .ok("/v1/chat/completions", &body("[[{\"a\": 1}]]", json!({ "response_format": { "type": "json_object" } })));
    assert_eq!(object["choices"][0]["message"]["content"], "{\"a\": 1}");
    let streamed = server.stream(
        "/v1/completions",
        &json!({ "prompt": "[[no]]", "guided_regex": "ab+c", "stream": true,
        "temperature": 1.0, "seed": 3, "max_tokens": 100 }),
    );
    let text: String = streamed.iter().map(|c| c["choices"][0]["text"].as_str().expect("text")).collect();
    assert!(text.starts_with("ab") && text.trim_matches(|c| "abc".contains(c)).is_empty(), "{text}");
    // As deep as they may be.
    let inside = |text: &str| format!("{}{text}{}", "(".repeat(64), ")".repeat(64));
    assert_eq!(chat(json!({ "guided_regex": inside("no") })), "no");
    assert_eq!(server.post("/v1/chat/completions", &body("x", json!({ "guided_json": deep(64) }))).status, 200);
    for (more, message) in [
        (json!({ "guided_regex": "(" }), "cannot be held to"),
        (json!({ "grammar": "start: nothing" }), "grammar cannot be held to"),
        (json!({ "grammar": "start: start" }), "grammar cannot be held to"),
        (json!({ "grammar": format!("start: {}", inside("\"no\"")) }), "too deeply nested"),
        (json!({ "grammar": format!("start: {}\"x\"", "(".repeat(40_000)) }), "40000 levels deep, at most 64"),
        (json!({ "guided_regex": "(".repeat(40_000) }), "40000 levels deep, at most 64"),
        (json!({ "guided_json": { "enum": [[i64::MIN], 1] } }), "name a number nearer to 0"),
        (json!({ "guided_json": deep(65) }), "65 levels deep"),
        (json!({ "guided_json": { "type": "string", "pattern": "(".repeat(40_000) } }), "40001 levels deep"),
        (json!({ "guided_json": { "type": "wrong" } }), "cannot be held to"),
        (json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x" } } }), "schema is missing"),
        (json!({ "grammar": "start: \"x\"", "guided_regex": "x" }), "a text has one form"),
        (json!({ "guided_json": { "type": "object", "patternProperties": { "(": {} } } }), "cannot be held to"),
    ] {
        let refused = server.post("/v1/chat/completions", &body("x", more.clone()));
        assert!(refused.status == 400 && refused.body.contains(message), "{more}: {}", refused.body);
    }
}
