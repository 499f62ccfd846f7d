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
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
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
        limits::bounded(limit, move || chat.write(&chat.compile()?, &messages, add_generation_prompt))
    }

    /// The text of a conversation, and which of its characters came with the messages.
    ///
    /// The template is a program: what it does with a message shows when it is given a message with other characters
    /// instead. Where the two texts agree in all other characters, those that differ came from the message. A
    /// template may look into messages, so fewer characters are exchanged until it does the same with both.
    pub(super) fn render_marked(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        specials: Vec<String>,
    ) -> Result<Rendering> {
        let (chat, messages) = (self.clone(), messages.to_vec());
        limits::bounded(limits::MAX_TIME, move || {
            let environment = chat.compile()?;
            let text = chat.write(&environment, &messages, add_generation_prompt)?;
            let marks = Marks::new(&specials, &messages, &[&text, &chat.template]);
            for messages in marks.choices(&messages) {
                match chat.write(&environment, &messages, add_generation_prompt) {
                    Ok(marked) if marks.remove(&marked) == text => return Ok(Rendering { text, marked }),
                    _ => (),
                }
            }
            let token = marks.spelled(&messages).unwrap_or_default();
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
        add_generation_prompt: bool,
    ) -> Result<String> {
        let is_word = |role: &str| !role.is_empty() && role.chars().all(|c| c.is_alphanumeric() || "_-".contains(c));
        for Message { role, .. } in messages {
            ensure!(is_word(role), "the role of a message is {role:?}, letters, digits, _ and - are allowed");
        }
        let bytes: usize = messages.iter().map(|m| m.content.len()).sum();
        ensure!(bytes <= MAX_TEXT, "the messages of a chat have {bytes} bytes, at most {MAX_TEXT} are allowed");
        let messages: Vec<Value> =
            messages.iter().map(|m| context! { role => &m.role, content => &m.content }).collect();
        let tokens = self.tokens.iter().map(|(name, token)| (name.clone(), Value::from(token)));
        let tokens = Value::from_object(tokens.collect::<BTreeMap<String, Value>>());
        let context = context! { messages, add_generation_prompt, tools => (), documents => (), ..tokens };
        let mut writer = Writer::default();
        environment.get_template(NAME).and_then(|t| t.render_captured_to(context, &mut writer)).map_err(one_line)?;
        String::from_utf8(writer.0).map_err(|_| anyhow!("the chat template writes what is not UTF-8"))
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
