//! Another people's client in Rust: async-openai, which knows OpenAI's types and nothing of this server.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionMessageToolCalls, CreateChatCompletionRequest, CreateChatCompletionStreamResponse, FinishReason,
};
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::client::{Scripted, Setup};

fn client(server: &Scripted) -> Client<OpenAIConfig> {
    let base = format!("http://{}/v1", server.address);
    Client::with_config(OpenAIConfig::new().with_api_base(base).with_api_key("any"))
}

/// The client's own type, whose fields it writes itself.
fn request(content: &str, more: &Value) -> CreateChatCompletionRequest {
    let mut body =
        json!({ "model": "scripted", "messages": [{ "role": "user", "content": content }], "temperature": 0.0 });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    serde_json::from_value(body).expect("a request")
}

/// Runs what waits on a thread of its own.
fn wait<T>(what: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(what)
}

#[test]
fn a_stream() {
    let server = Scripted::start(Setup::default());
    let more = json!({ "stream_options": { "include_usage": true } });
    let parts: Vec<CreateChatCompletionStreamResponse> = wait(async {
        let client = client(&server);
        let stream = client.chat().create_stream(request("[[Grüße, 世界]]", &more)).await.expect("a stream");
        stream.map(|part| part.expect("a part")).collect().await
    });
    let choices = || parts.iter().flat_map(|part| &part.choices);
    let text: String = choices().filter_map(|choice| choice.delta.content.as_deref()).collect();
    assert_eq!(text, "Grüße, 世界");
    assert!(choices().count() > 10, "it comes in parts");
    assert_eq!(choices().filter_map(|choice| choice.finish_reason).collect::<Vec<_>>(), [FinishReason::Stop]);
    let usage = parts.iter().filter_map(|part| part.usage.as_ref()).collect::<Vec<_>>();
    // A token for each byte, and the one that ends the text.
    assert_eq!((usage.len(), usage[0].completion_tokens), (1, "Grüße, 世界".len() as u32 + 1));
}

#[test]
fn forced_calls_and_forms() {
    let server = Scripted::start(Setup::default());
    let schema = json!({ "type": "object", "properties": { "city": { "type": "string", "maxLength": 4 } },
        "required": ["city"], "additionalProperties": false });
    let tools = json!({ "max_completion_tokens": 600, "tools": [{ "type": "function", "function": {
        "name": "get_weather", "description": "Today's weather", "parameters": schema } }],
        "tool_choice": { "type": "function", "function": { "name": "get_weather" } } });
    let form = json!({ "max_completion_tokens": 600, "response_format": { "type": "json_schema",
        "json_schema": { "name": "place", "strict": true, "schema": schema } } });
    let [called, formed] = wait(async {
        let client = client(&server);
        [
            client.chat().create(request("x", &tools)).await.expect("a call"),
            client.chat().create(request("x", &form)).await.expect("a text"),
        ]
    });
    let is_a_place = |text: &str| {
        let value: Value = serde_json::from_str(text).expect("JSON");
        assert!(value.as_object().is_some_and(|o| o.len() == 1) && value["city"].is_string(), "{text}");
    };
    let calls = called.choices[0].message.tool_calls.as_ref().unwrap_or_else(|| panic!("no calls in {called:?}"));
    let [ChatCompletionMessageToolCalls::Function(call)] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!((call.function.name.as_str(), call.id.starts_with("call_")), ("get_weather", true));
    is_a_place(&call.function.arguments);
    assert_eq!(called.choices[0].finish_reason, Some(FinishReason::ToolCalls));
    is_a_place(formed.choices[0].message.content.as_deref().expect("content"));
}

#[test]
fn errors() {
    let server = Scripted::start(Setup::default());
    let ask = |content: &str, more: Value| {
        wait(async { client(&server).chat().create(request(content, &more)).await }).expect_err("it is wrong")
    };
    for (more, status, param, code) in [
        (json!({ "n": 0 }), 400, Some("n"), None),
        (json!({ "model": "gpt-4" }), 404, Some("model"), Some("model_not_found")),
        (json!({ "store": true }), 400, Some("store"), Some("unsupported_parameter")),
    ] {
        let OpenAIError::ApiError(said) = ask("x", more) else { panic!("the server answers") };
        assert_eq!(
            (said.status_code.as_u16(), said.api_error.param.as_deref(), said.api_error.code.as_deref()),
            (status, param, code),
            "{said}"
        );
    }
    let OpenAIError::ApiError(said) = ask(&"x".repeat(2000), json!({})) else { panic!("the server answers") };
    assert_eq!(said.api_error.code.as_deref(), Some("context_length_exceeded"));
    // An error in a stream comes as one, and the stream ends.
    let (parts, end) = wait(async {
        let mut stream = client(&server).chat().create_stream(request("FAIL", &json!({}))).await.expect("a stream");
        let (mut parts, mut end) = (0, None);
        while let Some(part) = stream.next().await {
            match part {
                Ok(_) => parts += 1,
                Err(error) => end = Some(error),
            }
        }
        (parts, end)
    });
    assert!(end.expect("an error").to_string().contains("/nowhere"), "after {parts} parts");
}
