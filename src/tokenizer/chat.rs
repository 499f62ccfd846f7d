//! A conversation written out as the model was trained to see it: the model's own Jinja template.

mod json;
mod limits;
mod marks;
mod python;
mod source;
mod strftime;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::{Map, Value as Json};

use limits::{MAX_TEXT, Writer};
use marks::Marks;
pub(super) use marks::private;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or another word that the template knows: letters, digits, `_` and `-`.
    pub role: String,
    /// What was said. It is text whatever it says: the spelling of a special token does not become that token.
    pub content: String,
    /// What else a template may look for, such as `tool_calls`. All strings in it are text, too.
    pub more: Map<String, Json>,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned(), more: Map::new() }
    }
}

/// What a template may be told beside the messages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extras {
    /// Functions that the model may call, as OpenAI's requests describe them; null for none. All strings in it are
    /// text.
    pub tools: Json,
    /// More variables, such as `enable_thinking`. What they say is the caller's own: special tokens in it count.
    pub variables: Map<String, Json>,
}

const NAME: &str = "chat template";

/// A chat template. It is compiled when a conversation asks for it, so that one that is not Jinja stands in nobody
/// else's way.
#[derive(Debug, Clone)]
pub(super) struct Chat {
    template: String,
    /// Special tokens by the name of their variable, such as `bos_token`.
    tokens: Vec<(String, String)>,
}

/// A conversation as the template writes it.
pub(super) struct Rendering {
    pub(super) text: String,
    /// The same text, character by character, with a mark in the place of each that came with a message and that
    /// could be part of a special token.
    pub(super) marked: String,
}

impl Chat {
    /// A template, and the special tokens that it may name.
    pub(super) fn new(template: &str, tokens: Vec<(String, String)>) -> Self {
        Self { template: template.to_owned(), tokens }
    }

    /// The text of a conversation.
    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_within(limits::MAX_TIME, messages, add_generation_prompt)
    }

    fn render_within(&self, limit: Duration, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let (chat, messages) = (self.clone(), messages.to_vec());
        let write = move || chat.write(&chat.compile()?, &messages, &Extras::default(), add_generation_prompt);
        limits::bounded(limit, write)
    }

    /// The text of a conversation, and which of its characters came with the messages.
    ///
    /// The template is a program: what it does with a message shows when it is given a message with other characters
    /// instead. Where the two texts agree in all other characters, those that differ came from the message. A
    /// template may look into messages, so fewer characters are exchanged until it does the same with both.
    pub(super) fn render_marked(
        &self,
        messages: &[Message],
        extras: &Extras,
        add_generation_prompt: bool,
        specials: Vec<String>,
    ) -> Result<Rendering> {
        let (chat, messages, extras) = (self.clone(), messages.to_vec(), extras.clone());
        limits::bounded(limits::MAX_TIME, move || {
            let environment = chat.compile()?;
            let text = chat.write(&environment, &messages, &extras, add_generation_prompt)?;
            let marks = Marks::new(&specials, (&messages, &extras.tools), &[&text, &chat.template]);
            if let Some(token) = marks.named(&messages, &extras.tools) {
                return Err(anyhow!("the special token {token} is in the name of a field, leave it out"));
            }
            for (messages, tools) in marks.choices(&messages, &extras.tools) {
                let extras = Extras { tools, variables: extras.variables.clone() };
                match chat.write(&environment, &messages, &extras, add_generation_prompt) {
                    Ok(marked) if marks.remove(&marked) == text => return Ok(Rendering { text, marked }),
                    _ => (),
                }
            }
            let token = marks.spelled(&messages, &extras.tools).unwrap_or_default();
            Err(anyhow!(
                "the chat template acts on the special token {token} in a message, leave it out of the message"
            ))
        })
    }

    /// Compiles the template with the functions and white space rules that transformers gives it.
    fn compile(&self) -> Result<Environment<'static>> {
        let source = source::prepare(&self.template);
        let mut environment = Environment::new();
        environment.set_fuel(Some(limits::steps(source.longest)));
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_formatter(limits::write);
        python::add_to(&mut environment);
        // One time for all, however often the conversation is written.
        let now = SystemTime::now();
        environment.add_function("strftime_now", move |format: String| strftime::at(now, &format));
        environment.add_template_owned(NAME, source.text).map_err(one_line)?;
        Ok(environment)
    }

    fn write(
        &self,
        environment: &Environment<'_>,
        messages: &[Message],
        extras: &Extras,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let is_word = |role: &str| !role.is_empty() && role.chars().all(|c| c.is_alphanumeric() || "_-".contains(c));
        for Message { role, .. } in messages {
            ensure!(is_word(role), "the role of a message is {role:?}, letters, digits, _ and - are allowed");
        }
        let bytes: usize = messages.iter().map(|m| m.content.len()).sum();
        ensure!(bytes <= MAX_TEXT, "the messages of a chat have {bytes} bytes, at most {MAX_TEXT} are allowed");
        let messages: Vec<Value> = messages.iter().map(value).collect();
        let tokens = self.tokens.iter().map(|(name, token)| (name.clone(), Value::from(token)));
        let variables = extras.variables.iter().map(|(name, value)| (name.clone(), json_value(value)));
        let own = Value::from_object(tokens.chain(variables).collect::<BTreeMap<String, Value>>());
        let tools = json_value(&extras.tools);
        let context = context! { messages, add_generation_prompt, tools, documents => (), ..own };
        let mut writer = Writer::default();
        environment.get_template(NAME).and_then(|t| t.render_captured_to(context, &mut writer)).map_err(one_line)?;
        String::from_utf8(writer.0).map_err(|_| anyhow!("the chat template writes what is not UTF-8"))
    }
}

/// A message as a template sees it.
fn value(message: &Message) -> Value {
    let own = [("role", Value::from(&message.role)), ("content", Value::from(&message.content))];
    let more = message.more.iter().map(|(name, value)| (name.clone(), json_value(value)));
    let own = own.map(|(name, value)| (name.to_owned(), value));
    Value::from_pairs(own.into_iter().chain(more))
}

/// JSON as a template sees it, fields in their order.
fn json_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text),
        Json::Array(list) => Value::from(list.iter().map(json_value).collect::<Vec<_>>()),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(name, value)| (name.as_str(), json_value(value)))),
    }
}

/// The error and where it is; its debug output would repeat the template.
fn one_line(error: Error) -> anyhow::Error {
    if let (ErrorKind::WriteFailure, Some(source)) = (error.kind(), std::error::Error::source(&error)) {
        return anyhow!("{source}");
    }
    let message = match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".into(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let message: String = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = message.chars().take(300).collect();
    anyhow!("the chat template fails in line {}: {short}", error.line().unwrap_or(0))
}

#[cfg(test)]
mod tests;
