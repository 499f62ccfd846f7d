//! What a model marks in its answers: what it thinks, and the functions that it calls.
//!
//! The marks are those of the model's own chat template. A [`Splitter`] is given an answer in whatever parts it comes,
//! and takes it apart: nothing that may be part of a mark is told before it is known what it is.

use serde_json::{Map, Value};

/// How the models of a family write calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Calls {
    /// A JSON object between two marks, for each call: Qwen, SmolLM3, Granite 4.
    Tagged {
        /// Before the object.
        open: &'static str,
        /// Behind it.
        close: &'static str,
    },
    /// A JSON list behind a mark: Mistral, Granite 3, Phi-4.
    List {
        /// Before the list.
        open: &'static str,
    },
    /// A mark and a name, another mark and the arguments, for each call: Ministral 3.
    Named {
        /// Before the name.
        open: &'static str,
        /// Before the arguments.
        arguments: &'static str,
    },
    /// The whole answer is an object with a name and parameters: Llama 3.
    Bare,
    /// A name, and the arguments in the next line: GLM-4.
    Lines,
    /// Python calls between two marks, one a line: OLMo 3.
    Python {
        /// Before the calls.
        open: &'static str,
        /// Behind them.
        close: &'static str,
    },
}

/// What a model's answers may have in them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Marks {
    /// Around what it thinks.
    pub(super) think: Option<(&'static str, &'static str)>,
    pub(super) calls: Option<Calls>,
}

impl Marks {
    /// Those of a chat template.
    pub(super) fn of(template: &str) -> Self {
        let has = |mark: &str| template.contains(mark);
        let think = [("<think>", "</think>"), ("[THINK]", "[/THINK]")];
        let calls = if has("[TOOL_CALLS]") && has("[ARGS]") {
            Some(Calls::Named { open: "[TOOL_CALLS]", arguments: "[ARGS]" })
        } else if has("[TOOL_CALLS]") {
            Some(Calls::List { open: "[TOOL_CALLS]" })
        } else if has("<|tool_call|>") {
            Some(Calls::List { open: "<|tool_call|>" })
        } else if has("<tool_call>") {
            Some(Calls::Tagged { open: "<tool_call>", close: "</tool_call>" })
        } else if has("<function_calls>") {
            Some(Calls::Python { open: "<function_calls>", close: "</function_calls>" })
        } else if has("<|observation|>") {
            Some(Calls::Lines)
        } else if has("<|python_tag|>") || (has("\"parameters\"") && has("<|start_header_id|>")) {
            Some(Calls::Bare)
        } else {
            None
        };
        Self { think: think.into_iter().find(|(open, _)| has(open)), calls }
    }
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    /// What is said.
    Content(String),
    /// What is thought.
    Reasoning(String),
    /// A function that is called.
    Call(Call),
}

/// A function that is called, and its arguments as JSON.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    pub(super) name: String,
    pub(super) arguments: String,
}

/// Takes one answer apart.
#[derive(Debug, Clone)]
pub(super) struct Splitter {
    marks: Marks,
    /// Functions that may be called.
    tools: Vec<String>,
    state: State,
    /// What was not told yet.
    held: String,
    /// White space is left out until something else comes.
    fresh: bool,
    /// The whole answer is one call: its form was prescribed.
    forced: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing has been said: an answer may be a call as a whole.
    Start,
    Content,
    Thinking,
    Calling,
}

impl Splitter {
    /// An answer with `marks`, by a model that may call `tools`. It is thinking already where the prompt ends with the
    /// mark before that.
    pub(super) fn new(marks: &Marks, tools: &[String], prompt_end: &str) -> Self {
        let thinking = marks.think.is_some_and(|(open, _)| prompt_end.trim_end().ends_with(open));
        let marks = Marks { calls: marks.calls.filter(|_| !tools.is_empty()), ..marks.clone() };
        let state = if thinking { State::Thinking } else { State::Start };
        Self { marks, tools: tools.to_vec(), state, held: String::new(), fresh: thinking, forced: false }
    }

    /// An answer that is a call as a whole.
    pub(super) fn forced(tools: &[String]) -> Self {
        let marks = Marks { think: None, calls: Some(Calls::Bare) };
        Self { state: State::Calling, forced: true, ..Self::new(&marks, tools, "") }
    }

    /// An answer in which nothing is marked.
    pub(super) fn plain() -> Self {
        Self { state: State::Content, ..Self::new(&Marks::default(), &[], "") }
    }

    /// Whether special tokens have to be told as text: they may be marks.
    pub(super) fn needs_specials(&self) -> bool {
        self.marks.think.is_some() || (self.marks.calls.is_some() && !self.forced)
    }

    /// The next part of the answer; what it is known to be.
    pub(super) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.advance(&mut pieces) {}
        pieces
    }

    /// What was held back, when nothing comes any more.
    pub(super) fn flush(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while self.advance(&mut pieces) {}
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Calling => match self.calls(&rest) {
                Some(calls) => pieces.extend(calls.into_iter().map(Piece::Call)),
                // What is no call after all is what was said.
                None => self.tell(format!("{}{rest}", self.open()), &mut pieces),
            },
            State::Start | State::Content | State::Thinking => self.tell(rest, &mut pieces),
        }
        pieces
    }

    /// The mark before calls, which was taken off.
    fn open(&self) -> &'static str {
        match self.marks.calls {
            Some(
                Calls::Tagged { open, .. }
                | Calls::List { open }
                | Calls::Named { open, .. }
                | Calls::Python { open, .. },
            ) => open,
            Some(Calls::Bare | Calls::Lines) | None => "",
        }
    }

    fn tell(&mut self, text: String, pieces: &mut Vec<Piece>) {
        let text = if self.fresh { text.trim_start().to_owned() } else { text };
        if text.is_empty() {
            return;
        }
        self.fresh = false;
        pieces.push(match self.state {
            State::Thinking => Piece::Reasoning(text),
            State::Start | State::Content | State::Calling => Piece::Content(text),
        });
    }

    /// Tells what is certain of what is held; true where more may be.
    fn advance(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Start => self.start(),
            State::Content => {
                let think = self.marks.think.map(|(open, _)| open);
                let call = Some(self.open()).filter(|open| !open.is_empty());
                self.until(&[(think, State::Thinking), (call, State::Calling)], pieces)
            }
            State::Thinking => {
                let close = self.marks.think.map(|(_, close)| close);
                self.until(&[(close, State::Content)], pieces)
            }
            State::Calling => self.call(pieces),
        }
    }

    /// Whether an answer is a call from its first character on.
    fn start(&mut self) -> bool {
        let text = self.held.trim_start();
        let tag = "<|python_tag|>";
        let next = match self.marks.calls {
            Some(Calls::Bare) if text.starts_with('{') || text.starts_with(tag) => State::Calling,
            Some(Calls::Bare) if tag.starts_with(text) => return false,
            Some(Calls::Lines) => match text.split_once('\n') {
                Some((name, _)) if self.tools.iter().any(|tool| tool == name.trim()) => State::Calling,
                Some(_) => State::Content,
                None if self.tools.iter().any(|tool| tool.starts_with(text)) => return false,
                None => State::Content,
            },
            _ if text.is_empty() && self.marks != Marks::default() => return false,
            _ => State::Content,
        };
        self.state = next;
        true
    }

    /// Tells what comes before the first of the marks, and goes on as that says.
    fn until(&mut self, marks: &[(Option<&'static str>, State)], pieces: &mut Vec<Piece>) -> bool {
        let found =
            marks.iter().filter_map(|&(mark, state)| Some((self.held.find(mark?)?, mark?, state))).min_by_key(|m| m.0);
        if let Some((at, mark, state)) = found {
            let before = self.held[..at].trim_end().to_owned();
            self.held.drain(..at + mark.len());
            self.tell(before, pieces);
            (self.state, self.fresh) = (state, true);
            return true;
        }
        let longest =
            |mark: &str| (1..mark.len()).rev().find(|&n| mark.is_char_boundary(n) && self.held.ends_with(&mark[..n]));
        let held = marks.iter().filter_map(|(mark, _)| longest((*mark)?)).max().unwrap_or(0);
        let mut end = self.held.len() - held;
        if marks.iter().any(|(mark, _)| mark.is_some()) {
            // Before a mark white space is left out.
            end = self.held[..end].trim_end().len();
        }
        let text: String = self.held.drain(..end).collect();
        self.tell(text, pieces);
        false
    }

    /// Tells calls that are complete.
    fn call(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let close = match self.marks.calls {
            Some(Calls::Tagged { close, .. } | Calls::Python { close, .. }) => close,
            // A call ends where the next begins.
            Some(Calls::Named { open, .. }) => open,
            // These end with the answer.
            _ => return false,
        };
        let Some(at) = self.held.find(close) else { return false };
        let text = self.held[..at].to_owned();
        self.held.drain(..at + close.len());
        match self.calls(&text) {
            Some(calls) => pieces.extend(calls.into_iter().map(Piece::Call)),
            None => self.tell(format!("{}{text}{close}", self.open()), pieces),
        }
        self.fresh = true;
        if !matches!(self.marks.calls, Some(Calls::Named { .. })) {
            self.state = State::Content;
        }
        true
    }

    /// The calls in what stands between marks; none where it is something else.
    fn calls(&self, text: &str) -> Option<Vec<Call>> {
        let text = text.trim();
        match self.marks.calls? {
            Calls::Tagged { .. } => Some(vec![call(&serde_json::from_str(text).ok()?)?]),
            Calls::List { .. } => {
                let list: Vec<Value> = serde_json::Deserializer::from_str(text).into_iter().next()?.ok()?;
                list.iter().map(call).collect()
            }
            Calls::Named { arguments, .. } => {
                let (name, given) = text.split_once(arguments)?;
                let given: Value = serde_json::from_str(given).ok()?;
                Some(vec![Call { name: name.trim().to_owned(), arguments: given.to_string() }])
            }
            Calls::Bare => {
                let text = text.strip_prefix("<|python_tag|>").unwrap_or(text);
                let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
                let first = call(&values.next()?.ok()?)?;
                let (mut calls, mut rest) = (vec![first], &text[values.byte_offset()..]);
                while let Some(more) = rest.trim_start().strip_prefix(';') {
                    let mut values = serde_json::Deserializer::from_str(more).into_iter::<Value>();
                    calls.push(call(&values.next()?.ok()?)?);
                    rest = &more[values.byte_offset()..];
                }
                let known = |call: &Call| self.tools.contains(&call.name);
                (rest.trim().is_empty() && calls.iter().all(known)).then_some(calls)
            }
            Calls::Lines => {
                let (name, given) = text.split_once('\n')?;
                let given: Value = serde_json::from_str(given).ok()?;
                Some(vec![Call { name: name.trim().to_owned(), arguments: given.to_string() }])
            }
            Calls::Python { .. } => {
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
                lines.map(super::python::call).collect()
            }
        }
    }
}

/// `{"name", "arguments"}` or `{"name", "parameters"}`, also inside of `function`.
fn call(value: &Value) -> Option<Call> {
    let value = value.get("function").filter(|function| function.is_object()).unwrap_or(value);
    let name = value.get("name")?.as_str()?.to_owned();
    let empty = Value::Object(Map::new());
    let arguments = match value.get("arguments").or(value.get("parameters")).unwrap_or(&empty) {
        Value::String(text) => serde_json::from_str::<Value>(text).ok()?.to_string(),
        given => given.to_string(),
    };
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests;
