//! `POST /v1/responses`, as far as it needs no memory: every request brings its whole conversation.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::app::{self, App, Shared, aside, now};
use super::chat::{self, Asked};
use super::fields::{Fields, wrong};
use super::job::{End, Event, Finish};
use super::line::ENDED;
use super::marks::Piece;
use super::problem::{Answer, Problem};
use super::said::{Part, Said};
use super::sse::{self, Out, Protocol};

/// `POST /v1/responses`
pub(super) async fn responses(State(app): Shared, request: Request) -> Answer<Response> {
    let fields = app::fields(&app, request).await?;
    let shared = Arc::clone(&app);
    let asked = aside(move || chat::read(&shared, translate(fields)?)).await?;
    let mut events = asked.ask(&app)?;
    let said = asked.said();
    let mut told =
        Told { id: app.id("resp_"), created: now(), app, said, asked, number: 0, open: None, items: Vec::new() };
    if told.asked.stream.is_some() {
        return Ok(sse::respond(events, 1, told));
    }
    loop {
        match events.recv().await {
            Some((_, Event::End(end))) => {
                let parts = told.said.end(&told.app, &end);
                told.parts(parts, &mut Out::default());
                told.shut(&mut Out::default());
                return Ok(Json(told.whole()).into_response());
            }
            Some((_, Event::Failed(said))) => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, said)),
            Some((_, event)) => {
                let parts = told.said.hear(&told.app, event);
                told.parts(parts, &mut Out::default());
            }
            None => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ENDED)),
        }
    }
}

/// The same request in the words of chats.
fn translate(mut fields: Fields) -> Answer<Fields> {
    fields.refuse(&[
        ("previous_response_id", Value::Null, "nothing is stored, send the whole conversation as input"),
        ("conversation", Value::Null, "nothing is stored, send the whole conversation as input"),
        ("background", false.into(), "answers come at once, leave it out"),
        ("prompt", Value::Null, "nothing is stored, send the text as input"),
        ("truncation", "disabled".into(), "texts are never cut, shorten the input"),
        ("max_tool_calls", Value::Null, "calls are the caller's to make, leave it out"),
        ("include", json!([]), "leave it out"),
    ])?;
    // That nothing is stored is no loss to who does not ask for it.
    fields.pass(&["store"]);
    let mut out = Map::new();
    let mut messages = Vec::new();
    if let Some(text) = fields.text("instructions")? {
        messages.push(json!({ "role": "system", "content": text }));
    }
    match fields.need("input")? {
        Value::String(text) => messages.push(json!({ "role": "user", "content": text })),
        Value::Array(items) => {
            for (i, item) in items.into_iter().enumerate() {
                messages.push(one(&format!("input[{i}]"), item)?);
            }
        }
        other => return Err(wrong("input", &other, "a string or a list of items")),
    }
    out.insert("messages".into(), messages.into());
    for name in [
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stream",
        "tool_choice",
        "stop",
        "user",
        "metadata",
        "priority",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "safety_identifier",
        "prompt_cache_key",
        "service_tier",
        "parallel_tool_calls",
        "top_logprobs",
        "chat_template_kwargs",
    ] {
        out.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    // A function to call is named without a field of its own here.
    if let Some(name) = out.get("tool_choice").and_then(|choice| choice.get("name")).cloned() {
        out.insert("tool_choice".into(), json!({ "type": "function", "function": { "name": name } }));
    }
    out.extend(fields.take("max_output_tokens").map(|value| ("max_tokens".to_owned(), value)));
    if let Some(tools) = fields.take("tools") {
        let Value::Array(tools) = tools else { return Err(wrong("tools", &tools, "a list of functions")) };
        let tool = |(i, tool): (usize, Value)| {
            let mut fields = Fields::of(&format!("tools[{i}]"), tool)?;
            let kind = fields.text("type")?.unwrap_or_default();
            if kind != "function" {
                let message = format!("tools[{i}].type is {kind}, function is known");
                return Err(Problem::field(format!("tools[{i}].type"), message));
            }
            let mut function = json!({ "name": fields.need("name")? });
            for name in ["description", "parameters", "strict"] {
                if let Some(value) = fields.take(name) {
                    function[name] = value;
                }
            }
            fields.finish()?;
            Ok(json!({ "type": "function", "function": function }))
        };
        out.insert("tools".into(), tools.into_iter().enumerate().map(tool).collect::<Answer<Vec<_>>>()?.into());
    }
    if let Some(mut text) = fields.object("text")? {
        text.pass(&["verbosity"]);
        if let Some(mut format) = text.take("format") {
            if format["type"] == "json_schema" && format.get("json_schema").is_none() {
                format = json!({ "type": "json_schema", "json_schema": { "schema": format["schema"] } });
            }
            out.insert("response_format".into(), format);
        }
        text.finish()?;
    }
    if let Some(mut reasoning) = fields.object("reasoning")? {
        out.extend(reasoning.take("effort").map(|effort| ("reasoning_effort".to_owned(), effort)));
        reasoning.pass(&["summary", "generate_summary"]);
        reasoning.finish()?;
    }
    fields.finish()?;
    Fields::of("", Value::Object(out))
}

/// A message, a call or its result.
fn one(place: &str, item: Value) -> Answer<Value> {
    let kind = item["type"].as_str().unwrap_or("message").to_owned();
    match kind.as_str() {
        "message" => Ok(json!({ "role": item["role"], "content": item["content"] })),
        "function_call" => {
            let function = json!({ "name": item["name"], "arguments": item["arguments"] });
            let call = json!({ "id": item["call_id"], "type": "function", "function": function });
            Ok(json!({ "role": "assistant", "content": null, "tool_calls": [call] }))
        }
        "function_call_output" => {
            let content =
                if item["output"].is_string() { item["output"].clone() } else { item["output"].to_string().into() };
            Ok(json!({ "role": "tool", "tool_call_id": item["call_id"], "content": content }))
        }
        other => {
            let message = format!("{place}.type is {other}, message, function_call and function_call_output are known");
            Err(Problem::field(format!("{place}.type"), message))
        }
    }
}

/// An answer in the making.
struct Told {
    app: Arc<App>,
    asked: Asked,
    id: String,
    created: u64,
    said: Said,
    /// Events so far: each has its number.
    number: usize,
    /// The item that is open: its id, whether it is a thought, and its text.
    open: Option<(String, bool, String)>,
    /// Items that are complete.
    items: Vec<Value>,
}

impl Told {
    fn say(&mut self, kind: &str, mut value: Value, out: &mut Out) {
        value["type"] = kind.into();
        value["sequence_number"] = self.number.into();
        self.number += 1;
        out.named(kind, &value);
    }

    fn whole(&self) -> Value {
        let is_cut = self.said.finish == Some(Finish::Length);
        let status = match self.said.finish {
            None => "in_progress",
            Some(Finish::Length) => "incomplete",
            Some(_) => "completed",
        };
        let (input, cached, made) = (self.asked.prompt.len(), self.said.cached, self.said.made);
        let usage = json!({ "input_tokens": input, "input_tokens_details": { "cached_tokens": cached },
            "output_tokens": made, "output_tokens_details": { "reasoning_tokens": 0 }, "total_tokens": input + made });
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "model": self.asked.model,
            "status": status, "error": null, "output": self.items, "parallel_tool_calls": true, "tool_choice": "auto",
            "tools": [], "metadata": {}, "store": false, "instructions": null,
            "temperature": self.asked.rules.sampling.temperature,
            "top_p": self.asked.rules.sampling.top_p,
            "incomplete_details": is_cut.then(|| json!({ "reason": "max_output_tokens" })),
            "usage": self.said.finish.is_some().then_some(usage),
        })
    }

    fn parts(&mut self, parts: Vec<Part>, out: &mut Out) {
        for (piece, id) in parts {
            match piece {
                Piece::Content(text) => self.text(&text, false, out),
                Piece::Reasoning(text) => self.text(&text, true, out),
                Piece::Call(call) => {
                    self.shut(out);
                    let own = self.app.id("fc_");
                    let index = self.items.len();
                    let item = |arguments: &str, status: &str| {
                        json!({ "id": own, "type": "function_call", "call_id": id, "name": call.name,
                            "arguments": arguments, "status": status })
                    };
                    let begun = json!({ "output_index": index, "item": item("", "in_progress") });
                    self.say("response.output_item.added", begun, out);
                    let delta = json!({ "item_id": own, "output_index": index, "delta": call.arguments });
                    self.say("response.function_call_arguments.delta", delta, out);
                    let mut done = json!({ "item_id": own, "output_index": index, "arguments": call.arguments });
                    done["name"] = call.name.as_str().into();
                    self.say("response.function_call_arguments.done", done, out);
                    let whole = item(&call.arguments, "completed");
                    self.say("response.output_item.done", json!({ "output_index": index, "item": whole.clone() }), out);
                    self.items.push(whole);
                }
            }
        }
    }

    fn text(&mut self, text: &str, is_thought: bool, out: &mut Out) {
        if self.open.as_ref().is_some_and(|(_, thought, _)| *thought != is_thought) {
            self.shut(out);
        }
        let index = self.items.len();
        if self.open.is_none() {
            let id = self.app.id(if is_thought { "rs_" } else { "msg_" });
            let item = item(&id, is_thought, None);
            self.say("response.output_item.added", json!({ "output_index": index, "item": item }), out);
            if !is_thought {
                let part = json!({ "item_id": id, "output_index": index, "content_index": 0, "part": part("") });
                self.say("response.content_part.added", part, out);
            }
            self.open = Some((id, is_thought, String::new()));
        }
        let Some((id, _, whole)) = &mut self.open else { return };
        whole.push_str(text);
        let delta = json!({ "item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": [] });
        let kind = if is_thought { "response.reasoning_text.delta" } else { "response.output_text.delta" };
        self.say(kind, delta, out);
    }

    fn shut(&mut self, out: &mut Out) {
        let Some((id, is_thought, text)) = self.open.take() else { return };
        let index = self.items.len();
        let done = json!({ "item_id": id, "output_index": index, "content_index": 0, "text": text, "logprobs": [] });
        let kind = if is_thought { "response.reasoning_text.done" } else { "response.output_text.done" };
        self.say(kind, done, out);
        if !is_thought {
            let part = json!({ "item_id": id, "output_index": index, "content_index": 0, "part": part(&text) });
            self.say("response.content_part.done", part, out);
        }
        let whole = item(&id, is_thought, Some(&text));
        self.say("response.output_item.done", json!({ "output_index": index, "item": whole.clone() }), out);
        self.items.push(whole);
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

/// An item of text, which is complete once there is a text.
fn item(id: &str, is_thought: bool, text: Option<&str>) -> Value {
    let status = if text.is_some() { "completed" } else { "in_progress" };
    match is_thought {
        true => {
            let content: Vec<_> = text.iter().map(|text| json!({ "type": "reasoning_text", "text": text })).collect();
            json!({ "id": id, "type": "reasoning", "summary": [], "content": content, "status": status })
        }
        false => {
            let content: Vec<_> = text.iter().map(|text| part(text)).collect();
            json!({ "id": id, "type": "message", "role": "assistant", "content": content, "status": status })
        }
    }
}

impl Protocol for Told {
    fn begin(&mut self, out: &mut Out) {
        for kind in ["response.created", "response.in_progress"] {
            let whole = self.whole();
            self.say(kind, json!({ "response": whole }), out);
        }
    }

    fn hear(&mut self, _: usize, event: Event, out: &mut Out) {
        let parts = self.said.hear(&self.app, event);
        self.parts(parts, out);
    }

    fn end(&mut self, _: usize, end: &End, out: &mut Out) {
        let parts = self.said.end(&self.app, end);
        self.parts(parts, out);
        self.shut(out);
    }

    fn close(&mut self, out: &mut Out) {
        let whole = self.whole();
        let kind = if whole["status"] == "incomplete" { "response.incomplete" } else { "response.completed" };
        self.say(kind, json!({ "response": whole }), out);
    }

    fn fail(&mut self, said: &str, out: &mut Out) {
        let mut whole = self.whole();
        whole["status"] = "failed".into();
        whole["error"] = json!({ "code": "server_error", "message": said });
        self.say("response.failed", json!({ "response": whole }), out);
    }
}
