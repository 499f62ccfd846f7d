//! `/openapi.json`: what may be asked, for programs that read such a description.

use axum::Json;
use serde_json::{Map, Value, json};

/// Method, path, what it does, and the schema of what is sent.
type Route = (&'static str, &'static str, &'static str, &'static str);

const ROUTES: [Route; 20] = [
    ("get", "/", "a page to chat on", ""),
    ("get", "/health", "the process is alive", ""),
    (
        "get",
        "/ready",
        "a text would be taken now; 503 while the model is loaded, draining, or after the engine has ended",
        "",
    ),
    ("get", "/version", "the program's version", ""),
    ("get", "/metrics", "counters in Prometheus' format", ""),
    ("get", "/openapi.json", "this description", ""),
    ("get", "/v1/models", "the models that are served", ""),
    ("get", "/v1/models/{name}", "one of them", ""),
    ("get", "/v1/loads", "how busy the server is", ""),
    ("get", "/props", "what is served and how", ""),
    ("get", "/slots", "the texts in the making", ""),
    ("get", "/tokenizer_info", "special tokens and the chat template", ""),
    ("post", "/tokenize", "a text's tokens", "Tokenize"),
    ("post", "/detokenize", "the text of tokens", "Detokenize"),
    ("post", "/v1/completions", "texts that go on from prompts, and how probable texts are", "Completion"),
    ("post", "/v1/chat/completions", "answers in a conversation", "Chat"),
    ("post", "/v1/messages", "answers in a conversation, in Anthropic's words", "Messages"),
    ("post", "/v1/messages/count_tokens", "how many tokens such a conversation has", "Messages"),
    ("post", "/v1/responses", "answers to an input, without memory", "Responses"),
    ("post", "/compensation", "compensate otherwise from now on, for everybody", "Compensation"),
];

/// `GET /openapi.json`
pub(super) async fn openapi() -> Json<Value> {
    Json(description())
}

fn description() -> Value {
    let mut paths = Map::new();
    for (method, path, summary, schema) in ROUTES {
        let mut operation = json!({
            "summary": summary,
            "responses": { "200": { "description": "the answer" }, "default": { "description": "an error",
                "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } } } },
        });
        if let Some(name) = path.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(name, _)| name) {
            operation["parameters"] =
                json!([{ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }]);
        }
        if !schema.is_empty() {
            let schema = json!({ "$ref": format!("#/components/schemas/{schema}") });
            operation["requestBody"] =
                json!({ "required": true, "content": { "application/json": { "schema": schema } } });
        }
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "decdec", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
        },
        "security": [{}, { "key": [] }],
    })
}

fn schemas() -> Value {
    let (text, flag, whole, number) = (
        json!({ "type": "string" }),
        json!({ "type": "boolean" }),
        json!({ "type": "integer" }),
        json!({ "type": "number" }),
    );
    let list = |items: &Value| json!({ "type": "array", "items": items });
    let any = json!({});
    let object = |required: &[&str], fields: &[(&[&str], &Value)]| {
        let mut properties = Map::new();
        for (names, schema) in fields {
            properties.extend(names.iter().map(|name| ((*name).to_owned(), (*schema).clone())));
        }
        json!({ "type": "object", "required": required, "properties": properties })
    };
    let sampling: [(&[&str], &Value); 6] = [
        (&["model", "grammar", "user"], &text),
        (&["stream", "ignore_eos", "skip_special_tokens", "return_tokens_as_token_ids"], &flag),
        (&["max_tokens", "max_completion_tokens", "min_tokens", "n", "seed", "top_k"], &whole),
        (&["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"], &number),
        (
            &["response_format", "structured_outputs", "guided_json", "json_schema", "logit_bias", "stream_options"],
            &any,
        ),
        (&["stop", "stop_token_ids", "guided_regex", "guided_choice", "guided_grammar"], &any),
    ];
    let with = |required: &[&str], own: &[(&[&str], &Value)]| object(required, &[&sampling[..], own].concat());
    let objects = list(&json!({ "type": "object" }));
    let error = object(&["message", "type"], &[(&["message", "type", "param", "code"], &text)]);
    json!({
        "Tokenize": object(&[], &[(&["prompt", "content", "model"], &text), (&["messages"], &objects),
            (&["add_special_tokens", "return_token_strs"], &flag)]),
        "Detokenize": object(&["tokens"], &[(&["tokens"], &list(&whole)), (&["model"], &text)]),
        "Completion": with(&["prompt"], &[(&["prompt"], &any), (&["echo", "add_special_tokens"], &flag),
            (&["logprobs", "best_of"], &whole)]),
        "Chat": with(&["messages"], &[(&["messages", "tools"], &objects),
            (&["logprobs", "add_generation_prompt"], &flag), (&["top_logprobs"], &whole),
            (&["tool_choice", "chat_template_kwargs", "reasoning_effort"], &any)]),
        "Messages": object(&["messages"], &[(&["messages", "tools"], &objects), (&["model"], &text),
            (&["stream"], &flag), (&["max_tokens", "top_k"], &whole), (&["temperature", "top_p"], &number),
            (&["system", "tool_choice", "thinking", "stop_sequences"], &any)]),
        "Responses": object(&["input"], &[(&["model", "instructions"], &text), (&["tools"], &objects),
            (&["input", "text", "reasoning", "tool_choice"], &any), (&["stream"], &flag),
            (&["max_output_tokens"], &whole), (&["temperature", "top_p"], &number)]),
        "Compensation": object(&["k_chunks"], &[(&["k_chunks"], &list(&whole)), (&["n_tb"], &whole)]),
        "Error": object(&["error"], &[(&["error"], &error)]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every route of the server is described, and nothing else.
    #[test]
    fn what_is_described_is_what_there_is() {
        let source = include_str!("app.rs");
        let routes = source.split(".route(\"").skip(1).filter_map(|rest| rest.split_once('"')).map(|(path, _)| path);
        let mut known: Vec<String> = routes.map(|path| path.replace("{*name}", "{name}")).collect();
        known.sort();
        let description = description();
        let mut described: Vec<String> = description["paths"].as_object().expect("paths").keys().cloned().collect();
        described.sort();
        assert_eq!(known, described);
        let text = description.to_string();
        for reference in text.split("#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(description["components"]["schemas"][reference].is_object(), "{reference}");
        }
    }
}
