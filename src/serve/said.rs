//! One answer in a conversation, as it is heard of.

use serde_json::{Value, json};

use super::app::App;
use super::job::{End, Event, Finish};
use super::marks::{Call, Piece, Splitter};
use super::told::{chat_logprob, timings};

/// One answer as far as it is known.
pub(super) struct Said {
    splitter: Splitter,
    pub(super) content: String,
    pub(super) reasoning: String,
    /// Calls, and the ids that they are told by.
    pub(super) calls: Vec<(String, Call)>,
    /// Probabilities that were not told yet, where they were asked for.
    pub(super) logprobs: Option<Vec<Value>>,
    as_ids: bool,
    thoughts: bool,
    pub(super) finish: Option<Finish>,
    pub(super) timings: Value,
    pub(super) cached: usize,
    pub(super) made: usize,
}

/// A part of an answer, a call with its id.
pub(super) type Part = (Piece, Option<String>);

impl Said {
    pub(super) fn new(splitter: Splitter, logprobs: bool, as_ids: bool, thoughts: bool) -> Self {
        Self {
            splitter,
            content: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            logprobs: logprobs.then(Vec::new),
            as_ids,
            thoughts,
            finish: None,
            timings: Value::Null,
            cached: 0,
            made: 0,
        }
    }

    /// Takes an event, its end apart; what is new.
    pub(super) fn hear(&mut self, app: &App, event: Event) -> Vec<Part> {
        match event {
            Event::Made { text, token } => {
                if let Some(token) = token {
                    self.made += 1;
                    if let Some(logprobs) = &mut self.logprobs {
                        logprobs.push(chat_logprob(app, &token, self.as_ids));
                    }
                }
                let pieces = self.splitter.push(&text);
                self.note(app, pieces)
            }
            Event::Begun { cached } => {
                self.cached = cached;
                Vec::new()
            }
            Event::Prompt(_) | Event::End(_) | Event::Failed(_) => Vec::new(),
        }
    }

    /// Takes its end; what was held back.
    pub(super) fn end(&mut self, app: &App, end: &End) -> Vec<Part> {
        (self.finish, self.made, self.timings) = (Some(end.finish.clone()), end.made, timings(end));
        let pieces = self.splitter.flush();
        self.note(app, pieces)
    }

    fn note(&mut self, app: &App, pieces: Vec<Piece>) -> Vec<Part> {
        let mut parts = Vec::with_capacity(pieces.len());
        let told = |piece: &Piece| self.thoughts || !matches!(piece, Piece::Reasoning(_));
        for piece in pieces.into_iter().filter(told).collect::<Vec<_>>() {
            let mut id = None;
            match &piece {
                Piece::Content(text) => self.content.push_str(text),
                Piece::Reasoning(text) => self.reasoning.push_str(text),
                Piece::Call(call) => {
                    let own = app.id("call_");
                    self.calls.push((own.clone(), call.clone()));
                    id = Some(own);
                }
            }
            parts.push((piece, id));
        }
        parts
    }

    /// OpenAI's word for why it ended; null before it has.
    pub(super) fn reason(&self) -> Value {
        match &self.finish {
            // What was cut off is no complete call.
            Some(Finish::Stop | Finish::Token(_) | Finish::Text(_)) if !self.calls.is_empty() => "tool_calls".into(),
            finish => finish.as_ref().map(Finish::reason).into(),
        }
    }

    /// All of it as OpenAI's message.
    pub(super) fn message(&self) -> Value {
        let content = match self.content.is_empty() && !self.calls.is_empty() {
            true => Value::Null,
            false => self.content.as_str().into(),
        };
        let mut message = json!({ "role": "assistant", "content": content });
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.as_str().into();
            message["reasoning"] = self.reasoning.as_str().into();
        }
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.iter().map(|(id, call)| told(id, call)).collect();
        }
        message
    }
}

/// A call as OpenAI's clients are told of it.
pub(super) fn told(id: &str, call: &Call) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } })
}
