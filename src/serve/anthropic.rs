//! `POST /v1/messages`: Anthropic's requests, written as OpenAI's, and answers in Anthropic's words.
//!
//! Fields that are not known here are passed over, as Anthropic's own server does with newer ones.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::app::{self, App, Shared, aside};
use super::chat::{self, Asked};
use super::fields::{Fields, wrong};
use super::job::{End, Event, Finish};
use super::line::ENDED;
use super::marks::Piece;
use super::problem::{Answer, Problem};
use super::said::{Part, Said};
use super::sse::{self, Out, Protocol};

/// `POST /v1/messages`
pub(super) async fn messages(State(app): Shared, request: Request) -> Response {
    answer(app, request).await.unwrap_or_else(|problem| problem.answer(problem.anthropic()))
}

/// `POST /v1/messages/count_tokens`
pub(super) async fn count_tokens(State(app): Shared, request: Request) -> Response {
    let counted = async {
        let fields = app::fields(&app, request).await?;
        aside(move || {
            let mut fields = translate(fields, false)?;
            Ok(chat::prompt(&app, &mut fields)?.0.len())
        })
        .await
    };
    match counted.await {
        Ok(count) => Json(json!({ "input_tokens": count })).into_response(),
        Err(problem) => problem.answer(problem.anthropic()),
    }
}

async fn answer(app: Arc<App>, request: Request) -> Answer<Response> {
    let fields = app::fields(&app, request).await?;
    let shared = Arc::clone(&app);
    let asked = aside(move || chat::read(&shared, translate(fields, true)?)).await?;
    let mut events = asked.ask(&app)?;
    let said = asked.said();
    let mut told = Told { id: app.id("msg_"), app, said, block: None, blocks: 0, input: asked.prompt.len(), asked };
    if told.asked.stream.is_some() {
        return Ok(sse::respond(events, 1, told));
    }
    loop {
        match events.recv().await {
            Some((_, Event::End(end))) => {
                told.said.end(&told.app, &end);
                return Ok(Json(told.whole()).into_response());
            }
            Some((_, Event::Failed(said))) => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, said)),
            Some((_, event)) => drop(told.said.hear(&told.app, event)),
            None => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ENDED)),
        }
    }
}

/// The same request in OpenAI's words. A number of tokens is needed where an answer is asked for.
fn translate(mut fields: Fields, needs_max: bool) -> Answer<Fields> {
    let mut out = Map::new();
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({ "role": "system", "content": blocks("system", system)?.text }));
    }
    let given = fields.need("messages")?;
    let Value::Array(given) = given else { return Err(wrong("messages", &given, "a list of messages")) };
    for (i, message) in given.into_iter().enumerate() {
        one(&format!("messages[{i}]"), message, &mut messages)?;
    }
    out.insert("messages".into(), messages.into());
    if needs_max {
        out.insert("max_tokens".into(), fields.need("max_tokens")?);
    }
    for name in ["model", "temperature", "top_p", "top_k", "stream", "seed"] {
        out.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    out.extend(fields.take("stop_sequences").map(|value| ("stop".to_owned(), value)));
    if let Some(tools) = fields.take("tools") {
        let Value::Array(tools) = tools else { return Err(wrong("tools", &tools, "a list of tools")) };
        out.insert("tools".into(), tools.into_iter().enumerate().map(tool).collect::<Answer<Vec<_>>>()?.into());
    }
    if let Some(choice) = fields.take("tool_choice") {
        let choice = match choice["type"].as_str() {
            Some("auto") => "auto".into(),
            Some("none") => "none".into(),
            Some("any") => "required".into(),
            Some("tool") => json!({ "type": "function", "function": { "name": choice["name"] } }),
            _ => return Err(wrong("tool_choice", &choice, "one of the types auto, any, tool, none")),
        };
        out.insert("tool_choice".into(), choice);
    }
    if let Some(thinking) = fields.take("thinking") {
        let enabled = matches!(thinking["type"].as_str(), Some("enabled" | "adaptive"));
        out.insert("chat_template_kwargs".into(), json!({ "enable_thinking": enabled }));
    }
    Fields::of("", Value::Object(out))
}

fn tool((i, tool): (usize, Value)) -> Answer<Value> {
    let place = format!("tools[{i}]");
    let mut fields = Fields::of(&place, tool)?;
    if let Some(kind) = fields.text("type")?.filter(|kind| kind != "custom") {
        let message = format!("{place}.type is {kind}, tools of the caller alone are known here");
        return Err(Problem::field(format!("{place}.type"), message));
    }
    let (name, schema) =
        (fields.need("name")?, fields.take("input_schema").unwrap_or_else(|| json!({ "type": "object" })));
    let mut function = json!({ "name": name, "parameters": schema });
    if let Some(description) = fields.text("description")? {
        function["description"] = description.into();
    }
    Ok(json!({ "type": "function", "function": function }))
}

/// What stands in the blocks of a message.
#[derive(Default)]
struct Blocks {
    text: String,
    thinking: String,
    calls: Vec<Value>,
    /// Results of calls: ids and texts.
    results: Vec<(String, String)>,
}

fn blocks(place: &str, value: Value) -> Answer<Blocks> {
    let mut found = Blocks::default();
    let list = match value {
        Value::String(text) => return Ok(Blocks { text, ..found }),
        Value::Array(list) => list,
        other => return Err(wrong(place, &other, "a string or a list of blocks")),
    };
    for (i, block) in list.into_iter().enumerate() {
        let place = format!("{place}[{i}]");
        let mut fields = Fields::of(&place, block)?;
        let kind = fields.text("type")?.unwrap_or_default();
        match kind.as_str() {
            "text" => found.text.push_str(&fields.text("text")?.unwrap_or_default()),
            "thinking" => found.thinking.push_str(&fields.text("thinking")?.unwrap_or_default()),
            "redacted_thinking" => {}
            "tool_use" => {
                let (id, name) = (fields.need("id")?, fields.need("name")?);
                let arguments = fields.take("input").unwrap_or_else(|| json!({}));
                let function = json!({ "name": name, "arguments": arguments });
                found.calls.push(json!({ "id": id, "type": "function", "function": function }));
            }
            "tool_result" => {
                let id = fields.text("tool_use_id")?.unwrap_or_default();
                let content = fields.take("content").map(|content| blocks(&format!("{place}.content"), content));
                found.results.push((id, content.transpose()?.unwrap_or_default().text));
            }
            other => {
                let message = format!("{place}.type is {other}, this model reads text only");
                return Err(Problem::field(format!("{place}.type"), message));
            }
        }
    }
    Ok(found)
}

/// One message of Anthropic's; results of calls are messages of their own for templates.
fn one(place: &str, value: Value, messages: &mut Vec<Value>) -> Answer<()> {
    let mut fields = Fields::of(place, value)?;
    let role = fields.need("role")?;
    let found = blocks(&format!("{place}.content"), fields.need("content")?)?;
    for (id, text) in found.results {
        messages.push(json!({ "role": "tool", "tool_call_id": id, "content": text }));
    }
    if found.text.is_empty() && found.calls.is_empty() && found.thinking.is_empty() {
        return Ok(());
    }
    let mut message = json!({ "role": role, "content": found.text });
    if !found.calls.is_empty() {
        message["tool_calls"] = found.calls.into();
    }
    if !found.thinking.is_empty() {
        message["reasoning_content"] = found.thinking.into();
    }
    messages.push(message);
    Ok(())
}

/// An answer in the making.
struct Told {
    app: Arc<App>,
    asked: Asked,
    id: String,
    said: Said,
    /// The kind of the block that is open, and how many there were.
    block: Option<&'static str>,
    blocks: usize,
    input: usize,
}

impl Told {
    fn stop(&self) -> (Value, Value) {
        match &self.said.finish {
            Some(Finish::Text(text)) => ("stop_sequence".into(), text.as_str().into()),
            Some(Finish::Length) => ("max_tokens".into(), Value::Null),
            Some(_) if !self.said.calls.is_empty() => ("tool_use".into(), Value::Null),
            Some(Finish::Stop | Finish::Token(_)) => ("end_turn".into(), Value::Null),
            None => (Value::Null, Value::Null),
        }
    }

    fn usage(&self) -> Value {
        // What was cached is told beside the rest, not within.
        let cached = self.said.cached;
        json!({ "input_tokens": self.input - cached, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0, "output_tokens": self.said.made })
    }

    fn message(&self, content: Vec<Value>) -> Value {
        let (reason, sequence) = self.stop();
        json!({ "id": self.id, "type": "message", "role": "assistant", "model": self.asked.model, "content": content,
            "stop_reason": reason, "stop_sequence": sequence, "usage": self.usage() })
    }

    fn whole(&self) -> Value {
        let mut content = Vec::new();
        if !self.said.reasoning.is_empty() {
            content.push(json!({ "type": "thinking", "thinking": self.said.reasoning, "signature": "" }));
        }
        if !self.said.content.is_empty() {
            content.push(json!({ "type": "text", "text": self.said.content }));
        }
        for (id, call) in &self.said.calls {
            let input: Value = serde_json::from_str(&call.arguments).unwrap_or_default();
            content.push(json!({ "type": "tool_use", "id": id, "name": call.name, "input": input }));
        }
        self.message(content)
    }

    fn open(&mut self, kind: &'static str, block: Value, out: &mut Out) {
        if self.block == Some(kind) && kind != "tool_use" {
            return;
        }
        self.shut(out);
        self.block = Some(kind);
        out.named(
            "content_block_start",
            &json!({ "type": "content_block_start", "index": self.blocks, "content_block": block }),
        );
    }

    fn shut(&mut self, out: &mut Out) {
        if self.block.take().is_some() {
            out.named("content_block_stop", &json!({ "type": "content_block_stop", "index": self.blocks }));
            self.blocks += 1;
        }
    }

    fn parts(&mut self, parts: Vec<Part>, out: &mut Out) {
        for (piece, id) in parts {
            let delta = match piece {
                Piece::Content(text) => {
                    self.open("text", json!({ "type": "text", "text": "" }), out);
                    json!({ "type": "text_delta", "text": text })
                }
                Piece::Reasoning(text) => {
                    self.open("thinking", json!({ "type": "thinking", "thinking": "", "signature": "" }), out);
                    json!({ "type": "thinking_delta", "thinking": text })
                }
                Piece::Call(call) => {
                    let block = json!({ "type": "tool_use", "id": id, "name": call.name, "input": {} });
                    self.open("tool_use", block, out);
                    json!({ "type": "input_json_delta", "partial_json": call.arguments })
                }
            };
            let delta = json!({ "type": "content_block_delta", "index": self.blocks, "delta": delta });
            out.named("content_block_delta", &delta);
        }
    }
}

impl Protocol for Told {
    fn begin(&mut self, out: &mut Out) {
        let message = self.message(Vec::new());
        out.named("message_start", &json!({ "type": "message_start", "message": message }));
        out.named("ping", &json!({ "type": "ping" }));
    }

    fn hear(&mut self, _: usize, event: Event, out: &mut Out) {
        let parts = self.said.hear(&self.app, event);
        self.parts(parts, out);
    }

    fn end(&mut self, _: usize, end: &End, out: &mut Out) {
        let parts = self.said.end(&self.app, end);
        self.parts(parts, out);
        self.shut(out);
        let (reason, sequence) = self.stop();
        let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
        out.named("message_delta", &json!({ "type": "message_delta", "delta": delta, "usage": self.usage() }));
    }

    fn close(&mut self, out: &mut Out) {
        out.named("message_stop", &json!({ "type": "message_stop" }));
    }

    fn fail(&mut self, said: &str, out: &mut Out) {
        out.named("error", &Problem::new(StatusCode::INTERNAL_SERVER_ERROR, said).anthropic());
    }
}
