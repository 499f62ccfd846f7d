//! Functions that a model may call: what requests say of them.

use serde_json::{Map, Value, json};

use super::fields::{Fields, wrong};
use super::guide::Form;
use super::problem::{Answer, Problem};

/// What a request says of functions.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tools {
    /// As the template is told of them; null for none.
    pub(super) list: Value,
    /// Names and what their arguments look like.
    functions: Vec<(String, Value)>,
    /// The answer has to be a call of one of these.
    forced: Option<Vec<String>>,
}

impl Tools {
    /// `tools` and `tool_choice`.
    pub(super) fn read(fields: &mut Fields) -> Answer<Self> {
        let mut tools = Self::default();
        if let Some(list) = fields.take("tools") {
            let Value::Array(items) = list else { return Err(wrong("tools", &list, "a list of functions")) };
            for (i, item) in items.iter().enumerate() {
                tools.functions.push(function(&format!("tools[{i}]"), item.clone())?);
            }
            if !items.is_empty() {
                tools.list = Value::Array(items);
            }
        }
        let choice = fields.take("tool_choice").unwrap_or_else(|| "auto".into());
        // One call after another is the same to a template that knows several.
        fields.flag("parallel_tool_calls")?;
        match &choice {
            Value::String(word) if word == "auto" => {}
            Value::String(word) if word == "none" => (tools.list, tools.functions) = (Value::Null, Vec::new()),
            Value::String(word) if word == "required" => tools.forced = Some(tools.names()),
            Value::Object(choice) => {
                let name = choice.get("function").and_then(|function| function.get("name")?.as_str());
                let name = name.ok_or_else(|| {
                    Problem::field("tool_choice.function.name", "tool_choice.function.name is missing")
                })?;
                tools.forced = Some(vec![name.to_owned()]);
            }
            other => return Err(wrong("tool_choice", other, "auto, none, required or a function")),
        }
        if let Some(forced) = &tools.forced {
            let unknown = forced.iter().find(|name| !tools.functions.iter().any(|(known, _)| known == *name));
            if let Some(name) = unknown {
                return Err(Problem::field("tool_choice", format!("tool_choice is {name}, which is not among tools")));
            }
            if forced.is_empty() {
                return Err(Problem::field("tool_choice", "tool_choice wants a call, tools has no function"));
            }
        }
        Ok(tools)
    }

    /// The functions that may be called.
    pub(super) fn names(&self) -> Vec<String> {
        self.functions.iter().map(|(name, _)| name.clone()).collect()
    }

    /// What an answer has to look like that has to be a call.
    pub(super) fn form(&self) -> Option<Form> {
        let forced = self.forced.as_ref()?;
        let functions = self.functions.iter().filter(|(name, _)| forced.contains(name));
        let call = |(name, parameters): &(String, Value)| {
            json!({
                "type": "object",
                "properties": { "name": { "const": name }, "arguments": parameters },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        Some(Form::Schema(json!({ "anyOf": functions.map(call).collect::<Vec<_>>() })))
    }
}

/// The name of a function, and what its arguments look like.
fn function(place: &str, value: Value) -> Answer<(String, Value)> {
    let mut fields = Fields::of(place, value)?;
    let kind = fields.text("type")?.unwrap_or_else(|| "function".into());
    if kind != "function" {
        let message = format!("{place}.type is {kind}, function is known");
        return Err(Problem::field(format!("{place}.type"), message));
    }
    let function = fields.need("function")?;
    fields.finish()?;
    let mut function = Fields::of(&format!("{place}.function"), function)?;
    let name = function.need("name")?;
    let valid = |name: &&str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c));
    let name = name
        .as_str()
        .filter(valid)
        .ok_or_else(|| wrong(&format!("{place}.function.name"), &name, "letters, digits, _, -, . and :"))?
        .to_owned();
    function.pass(&["description", "strict"]);
    let any = || Value::Object(Map::from_iter([("type".to_owned(), "object".into())]));
    let parameters = function.take("parameters").unwrap_or_else(any);
    function.finish()?;
    if !parameters.is_object() {
        return Err(wrong(&format!("{place}.function.parameters"), &parameters, "a schema"));
    }
    Ok((name, parameters))
}
