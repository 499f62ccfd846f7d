//! `POST /v1/chat/completions`: answers in conversations.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::{self, App, Events, Shared, aside, now};
use super::completions::{Wish, stop_reason, stream};
use super::fields::Fields;
use super::job::{End, Event, Rules};
use super::line::ENDED;
use super::marks::{Piece, Splitter};
use super::messages::conversation;
use super::problem::{Answer, Problem};
use super::rules::{self, MOST_CHOICES};
use super::said::{Part, Said, told};
use super::sse::{self, Out, Protocol};
use super::told::Usage;
use super::tools::Tools;
use crate::tokenizer::Extras;

/// The most probable tokens that may be asked for beside each.
const MOST_LOGPROBS: usize = 20;

/// Tokens at the end of a prompt that show whether the model is thinking already.
const TAIL: usize = 16;

/// What a request asks for.
pub(super) struct Asked {
    pub(super) model: String,
    pub(super) prompt: Vec<u32>,
    pub(super) rules: Rules,
    pub(super) n: usize,
    pub(super) stream: Option<Wish>,
    splitter: Splitter,
    logprobs: bool,
    as_ids: bool,
    /// What the model thinks is told, too.
    thoughts: bool,
}

impl Asked {
    /// An answer to it.
    pub(super) fn said(&self) -> Said {
        Said::new(self.splitter.clone(), self.logprobs, self.as_ids, self.thoughts)
    }

    /// Asks for all answers to it.
    pub(super) fn ask(&self, app: &App) -> Answer<Events> {
        let seeded = |i: usize| Rules { seed: self.rules.seed.wrapping_add(i as u64), ..self.rules.clone() };
        app.ask("messages", (0..self.n).map(|i| (self.prompt.clone(), seeded(i))).collect())
    }
}

/// The tokens of a request's conversation, and the functions that may be called in it.
pub(super) fn prompt(app: &App, fields: &mut Fields) -> Answer<(Vec<u32>, Tools)> {
    let messages = conversation(fields.need("messages")?)?;
    let opens = fields.flag("add_generation_prompt")?.unwrap_or(true);
    fields.refuse(&[
        ("continue_final_message", false.into(), "a template ends each message, use /v1/completions"),
        ("add_special_tokens", false.into(), "the template says which tokens there are, leave it out"),
        ("chat_template", Value::Null, "the model's own is used, leave it out"),
        ("documents", Value::Null, "put them into a message"),
    ])?;
    let tools = Tools::read(fields)?;
    let template = app.options.chat_template.as_deref().unwrap_or_default();
    if !tools.list.is_null() && tools.form().is_none() && !template.contains("tools") {
        return Err(Problem::unsupported(
            "tools",
            "the model's template knows none, only tool_choice can force a call",
        ));
    }
    let mut variables = match fields.take("chat_template_kwargs") {
        None => serde_json::Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(super::fields::wrong("chat_template_kwargs", &other, "an object")),
    };
    let own = ["messages", "tools", "documents", "add_generation_prompt"];
    if let Some(name) = own.iter().find(|name| variables.contains_key(**name)) {
        let param = format!("chat_template_kwargs.{name}");
        return Err(Problem::field(param.clone(), format!("{param} is the request's own to say, leave it out")));
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        if !template.contains("reasoning_effort") && effort != "none" {
            let hint = "the model's template knows no such thing, try chat_template_kwargs";
            return Err(Problem::unsupported("reasoning_effort", hint));
        }
        if effort == "none" {
            variables.entry("enable_thinking").or_insert(false.into());
        }
        variables.insert("reasoning_effort".into(), effort.into());
    }
    let extras = Extras { tools: tools.list.clone(), variables };
    let ids = app.tokenizer.chat_ids_with(&messages, &extras, opens);
    Ok((ids.map_err(|error| Problem::field("messages", format!("{error:#}")))?, tools))
}

/// `POST /v1/chat/completions`
pub(super) async fn completions(State(app): Shared, request: Request) -> Answer<Response> {
    let fields = app::fields(&app, request).await?;
    let shared = Arc::clone(&app);
    let asked = aside(move || read(&shared, fields)).await?;
    let mut events = asked.ask(&app)?;
    let mut told = Told::new(app, asked);
    let count = told.choices.len();
    if told.asked.stream.is_some() {
        return Ok(sse::respond(events, count, told));
    }
    let mut left = count;
    while left > 0 {
        match events.recv().await {
            Some((i, Event::End(end))) => {
                told.ended(i, &end);
                left -= 1;
            }
            Some((_, Event::Failed(said))) => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, said)),
            Some((i, event)) => drop(told.choices[i].hear(&told.app, event)),
            None => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ENDED)),
        }
    }
    Ok(Json(told.whole()).into_response())
}

/// What the fields of a request ask for.
pub(super) fn read(app: &App, mut fields: Fields) -> Answer<Asked> {
    let fields = &mut fields;
    let model = rules::model(app, fields)?;
    let stream = stream(fields)?;
    let n = fields.whole("n", 1, MOST_CHOICES)?.unwrap_or(1);
    let (prompt, tools) = prompt(app, fields)?;
    let logprobs = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        return Err(Problem::field("top_logprobs", "top_logprobs is given, logprobs is not, set logprobs to true"));
    }
    let as_ids = fields.flag("return_tokens_as_token_ids")?.unwrap_or(false);
    let thoughts = fields.flag("include_reasoning")?.unwrap_or(true);
    fields.refuse(&[
        ("separate_reasoning", true.into(), "thoughts are always told apart, leave it out"),
        ("stream_reasoning", true.into(), "thoughts are always told as they come, leave it out"),
        ("echo", false.into(), "use /v1/completions"),
        ("best_of", Value::Null, "use n"),
        ("functions", Value::Null, "use tools"),
        ("function_call", Value::Null, "use tool_choice"),
        ("modalities", json!(["text"]), "answers are text, leave it out"),
        ("audio", Value::Null, "answers are text, leave it out"),
        ("prediction", Value::Null, "leave it out"),
        ("web_search_options", Value::Null, "nothing outside of this server is asked, leave it out"),
        ("verbosity", "medium".into(), "say so in a message"),
    ])?;
    let mut rules = rules::rules(app, fields, usize::MAX)?;
    fields.finish()?;
    rules.logprobs = logprobs.then_some(top.unwrap_or(0));
    let splitter = match tools.form() {
        Some(form) => {
            if rules.guide.is_some() {
                return Err(Problem::field(
                    "tool_choice",
                    "tool_choice and response_format are given, a text has one form",
                ));
            }
            rules.guide = Some(app.guide("tools", &form)?);
            Splitter::forced(&tools.names())
        }
        None if rules.guide.is_some() => Splitter::plain(),
        None => {
            let tail = app.tokenizer.decode(&prompt[prompt.len().saturating_sub(TAIL)..]).unwrap_or_default();
            Splitter::new(&app.marks, &tools.names(), &tail)
        }
    };
    rules.special_text |= splitter.needs_specials();
    Ok(Asked { model, prompt, rules, n, stream, splitter, logprobs, as_ids, thoughts })
}

/// An answer in the making.
struct Told {
    app: Arc<App>,
    asked: Asked,
    id: String,
    created: u64,
    choices: Vec<Said>,
    usage: Usage,
}

impl Told {
    fn new(app: Arc<App>, asked: Asked) -> Self {
        let choices = (0..asked.n).map(|_| asked.said()).collect();
        let id = app.id("chatcmpl-");
        Self { app, asked, id, created: now(), choices, usage: Usage::default() }
    }

    fn ended(&mut self, i: usize, end: &End) -> Vec<Part> {
        self.usage.add(end, i == 0);
        self.choices[i].end(&self.app, end)
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
        })
    }

    fn whole(&mut self) -> Value {
        let choice = |(i, said): (usize, &mut Said)| {
            json!({
                "index": i,
                "message": said.message(),
                "logprobs": said.logprobs.take().map(|content| json!({ "content": content })),
                "finish_reason": said.reason(),
                "stop_reason": stop_reason(said.finish.as_ref()),
            })
        };
        let choices = self.choices.iter_mut().enumerate().map(choice).collect();
        let mut whole = self.envelope("chat.completion", choices);
        whole["usage"] = self.usage.json();
        whole["timings"] = self.choices[0].timings.clone();
        whole
    }

    fn chunk(&mut self, i: usize, delta: Value, is_last: bool, out: &mut Out) {
        let said = &mut self.choices[i];
        let new = said.logprobs.as_mut().map(std::mem::take).filter(|new| !new.is_empty());
        let told = json!({
            "index": i,
            "delta": delta,
            "logprobs": new.map(|content| json!({ "content": content })),
            "finish_reason": if is_last { said.reason() } else { Value::Null },
            "stop_reason": if is_last { stop_reason(said.finish.as_ref()) } else { Value::Null },
        });
        let mut chunk = self.envelope("chat.completion.chunk", vec![told]);
        let wish = self.asked.stream.unwrap_or_default();
        if wish.always {
            let made = self.choices.iter().map(|said| said.made).sum();
            chunk["usage"] = Usage { prompt: self.asked.prompt.len(), cached: self.choices[0].cached, made }.json();
        } else if wish.at_end {
            chunk["usage"] = Value::Null;
        }
        out.data(&chunk);
    }

    fn parts(&mut self, i: usize, parts: Vec<Part>, out: &mut Out) {
        for (piece, id) in parts {
            let delta = match &piece {
                Piece::Content(text) => json!({ "content": text }),
                Piece::Reasoning(text) => json!({ "reasoning_content": text, "reasoning": text }),
                Piece::Call(call) => {
                    let id = id.unwrap_or_default();
                    let mut call = told(&id, call);
                    let index = self.choices[i].calls.iter().position(|(known, _)| *known == id);
                    call["index"] = index.into();
                    json!({ "tool_calls": [call] })
                }
            };
            self.chunk(i, delta, false, out);
        }
    }
}

impl Protocol for Told {
    fn begin(&mut self, out: &mut Out) {
        for i in 0..self.choices.len() {
            self.chunk(i, json!({ "role": "assistant", "content": "" }), false, out);
        }
    }

    fn hear(&mut self, index: usize, event: Event, out: &mut Out) {
        let parts = self.choices[index].hear(&self.app, event);
        self.parts(index, parts, out);
        // Probabilities of tokens whose text is held back.
        if self.choices[index].logprobs.as_ref().is_some_and(|left| !left.is_empty()) {
            self.chunk(index, json!({ "content": "" }), false, out);
        }
    }

    fn end(&mut self, index: usize, end: &End, out: &mut Out) {
        let parts = self.ended(index, end);
        self.parts(index, parts, out);
        self.chunk(index, json!({}), true, out);
    }

    fn close(&mut self, out: &mut Out) {
        if self.asked.stream.is_some_and(|wish| wish.at_end) {
            let mut last = self.envelope("chat.completion.chunk", Vec::new());
            last["usage"] = self.usage.json();
            out.data(&last);
        }
        out.text("[DONE]");
    }

    fn fail(&mut self, said: &str, out: &mut Out) {
        out.data(&Problem::new(StatusCode::INTERNAL_SERVER_ERROR, said).json());
        out.text("[DONE]");
    }
}
