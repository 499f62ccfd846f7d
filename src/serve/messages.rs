//! The messages of a conversation, as requests spell them.

use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use super::problem::{Answer, Problem};
use crate::tokenizer::Message;

/// The messages in a request's field of that name.
pub(super) fn conversation(value: Value) -> Answer<Vec<Message>> {
    let list = match value {
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(wrong("messages", &other, "a list of at least one message")),
    };
    list.into_iter().enumerate().map(|(i, message)| one(&format!("messages[{i}]"), message)).collect()
}

fn one(place: &str, value: Value) -> Answer<Message> {
    let mut fields = Fields::of(place, value)?;
    let role = fields.need("role")?;
    let role = role.as_str().ok_or_else(|| wrong(&format!("{place}.role"), &role, "a string"))?;
    // OpenAI's newer word, which templates do not know.
    let role = if role == "developer" { "system" } else { role };
    let content = content(&format!("{place}.content"), fields.take("content"))?;
    let mut message = Message::new(role, &content);
    if let Some(calls) = fields.take("tool_calls") {
        let Value::Array(calls) = calls else {
            return Err(wrong(&format!("{place}.tool_calls"), &calls, "a list of calls"));
        };
        let read = |(i, value)| call(&format!("{place}.tool_calls[{i}]"), value);
        let calls: Vec<Value> = calls.into_iter().enumerate().map(read).collect::<Answer<_>>()?;
        if !calls.is_empty() {
            message.more.insert("tool_calls".into(), calls.into());
        }
    }
    for (name, known) in [("reasoning", "reasoning_content"), ("reasoning_content", "reasoning_content")] {
        if let Some(text) = fields.text(name)? {
            message.more.insert(known.into(), text.into());
        }
    }
    for name in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(name)? {
            message.more.insert(name.into(), text.into());
        }
    }
    fields.pass(&["refusal", "annotations", "audio"]);
    fields.finish()?;
    Ok(message)
}

/// A call of an earlier answer, its arguments as templates expect them. What a model once wrote need not be JSON: it is
/// a text then, and the conversation goes on.
fn call(place: &str, value: Value) -> Answer<Value> {
    let mut fields = Fields::of(place, value)?;
    let id = fields.text("id")?;
    let kind = fields.text("type")?.unwrap_or_else(|| "function".into());
    fields.pass(&["index"]);
    let function = fields.need("function")?;
    fields.finish()?;
    let mut function = Fields::of(&format!("{place}.function"), function)?;
    let name = function.need("name")?;
    let arguments = match function.take("arguments") {
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        Some(given) => given,
        None => json!({}),
    };
    function.finish()?;
    Ok(json!({ "id": id, "type": kind, "function": { "name": name, "arguments": arguments } }))
}

/// A text, or a list of parts that are texts.
pub(super) fn content(place: &str, value: Option<Value>) -> Answer<String> {
    let parts = match value {
        None => return Ok(String::new()),
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(wrong(place, &other, "a string or a list of parts")),
    };
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let place = format!("{place}[{i}]");
        let mut fields = Fields::of(&place, part)?;
        let kind = fields.text("type")?.unwrap_or_else(|| "text".into());
        if !matches!(kind.as_str(), "text" | "input_text" | "output_text") {
            let message = format!("{place}.type is {kind}, this model reads text only");
            return Err(Problem::field(format!("{place}.type"), message).with_code("unsupported_content"));
        }
        let piece = fields.need("text")?;
        text.push_str(piece.as_str().ok_or_else(|| wrong(&format!("{place}.text"), &piece, "a string"))?);
        fields.pass(&["cache_control", "annotations", "logprobs"]);
        fields.finish()?;
    }
    Ok(text)
}
