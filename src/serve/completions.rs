//! `POST /v1/completions`: texts that go on from prompts, and how probable texts are.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::{self, App, Shared, aside, now};
use super::fields::{Fields, ids, wrong};
use super::job::{End, Event, Finish, Rules, Scored};
use super::line::ENDED;
use super::problem::{Answer, Problem};
use super::rules::{self, MOST_CHOICES};
use super::sse::{self, Out, Protocol};
use super::told::{Logprobs, Usage, timings};

/// Tokens that are made where nobody says how many.
const DEFAULT_MAX: usize = 16;

/// The most probable tokens that may be asked for beside each.
pub(super) const MOST_LOGPROBS: usize = 100;

/// What a request asks for.
struct Asked {
    model: String,
    /// Text as it was given, where it was, and tokens.
    prompts: Vec<(Option<String>, Vec<u32>)>,
    rules: Rules,
    n: usize,
    best_of: usize,
    stream: Option<Wish>,
    echo: bool,
    logprobs: bool,
    as_ids: bool,
}

/// When a stream tells how many tokens it took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// In a last chunk.
    pub(super) at_end: bool,
    /// In every chunk.
    pub(super) always: bool,
}

/// `stream` and `stream_options`; none where the answer comes as a whole.
pub(super) fn stream(fields: &mut Fields) -> Answer<Option<Wish>> {
    let is_stream = fields.flag("stream")?.unwrap_or(false);
    let mut wish = Wish::default();
    if let Some(mut options) = fields.object("stream_options")? {
        wish.at_end = options.flag("include_usage")?.unwrap_or(false);
        wish.always = options.flag("continuous_usage_stats")?.unwrap_or(false);
        options.pass(&["include_obfuscation"]);
        options.finish()?;
    }
    Ok(is_stream.then_some(wish))
}

/// `POST /v1/completions`
pub(super) async fn completions(State(app): Shared, request: Request) -> Answer<Response> {
    let fields = app::fields(&app, request).await?;
    let shared = Arc::clone(&app);
    let asked = aside(move || read(&shared, fields)).await?;
    let each = asked.best_of;
    let mut texts = Vec::with_capacity(asked.prompts.len() * each);
    for (_, prompt) in &asked.prompts {
        for i in 0..each {
            let rules = Rules { seed: asked.rules.seed.wrapping_add(i as u64), ..asked.rules.clone() };
            texts.push((prompt.clone(), rules));
        }
    }
    let count = texts.len();
    let events = app.ask("prompt", texts)?;
    let mut told = Told::new(app, asked);
    if told.asked.stream.is_some() {
        return Ok(sse::respond(events, count, told));
    }
    let (mut events, mut left) = (events, count);
    while left > 0 {
        match events.recv().await {
            Some((i, Event::End(end))) => {
                told.ended(i, &end);
                left -= 1;
            }
            Some((_, Event::Failed(said))) => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, said)),
            Some((i, event)) => told.heard(i, event),
            None => return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ENDED)),
        }
    }
    Ok(Json(told.whole()).into_response())
}

fn read(app: &App, mut fields: Fields) -> Answer<Asked> {
    let fields = &mut fields;
    let model = rules::model(app, fields)?;
    let stream = stream(fields)?;
    let n = fields.whole("n", 1, MOST_CHOICES)?.unwrap_or(1);
    let best_of = fields.whole("best_of", 1, MOST_CHOICES)?.unwrap_or(n);
    if best_of < n {
        return Err(Problem::field("best_of", format!("best_of is {best_of}, n is {n}, best_of must not be smaller")));
    }
    if best_of > n && stream.is_some() {
        return Err(Problem::field("best_of", "best_of cannot be streamed, leave stream or best_of out"));
    }
    let echo = fields.flag("echo")?.unwrap_or(false);
    let logprobs = fields.read("logprobs", "0 to 100", |value| match value {
        Value::Bool(false) => Some(None),
        Value::Bool(true) => Some(Some(1)),
        value => value.as_u64().filter(|&n| n <= MOST_LOGPROBS as u64).map(|n| Some(n as usize)),
    })?;
    let logprobs = logprobs.flatten();
    let special = fields.flag("add_special_tokens")?.unwrap_or(true);
    let as_ids = fields.flag("return_tokens_as_token_ids")?.unwrap_or(false);
    fields.refuse(&[("suffix", "".into(), "texts are continued at their end only, leave it out")])?;
    let prompts = prompts(app, fields, special)?;
    if prompts.len() * best_of > MOST_CHOICES.max(prompts.len()) {
        let message = format!(
            "{} prompts and {best_of} texts of each are asked for, {MOST_CHOICES} texts are allowed",
            prompts.len()
        );
        return Err(Problem::field("n", message));
    }
    let mut rules = rules::rules(app, fields, DEFAULT_MAX)?;
    fields.finish()?;
    // What is chosen among is compared by its probability.
    rules.logprobs = logprobs.or((best_of > n).then_some(0));
    rules.scores_prompt = echo && logprobs.is_some();
    // A text's probabilities are those of the compensated model, as decdec eval computes them.
    rules.compensate_prompt |= rules.scores_prompt;
    Ok(Asked { model, prompts, rules, n, best_of, stream, echo, logprobs: logprobs.is_some(), as_ids })
}

/// A text, several, tokens, or several lists of tokens.
fn prompts(app: &App, fields: &mut Fields, special: bool) -> Answer<Vec<(Option<String>, Vec<u32>)>> {
    let value = fields.need("prompt")?;
    let encode = |text: &str| {
        let tokens = if special { app.tokenizer.encode(text) } else { app.tokenizer.encode_chat(text) };
        let tokens = tokens.map_err(|error| Problem::field("prompt", format!("{error:#}")))?;
        Ok((Some(text.to_owned()), tokens))
    };
    let expected = "a string, a list of strings, a list of token ids or a list of such lists";
    let items = match &value {
        Value::String(text) => return Ok(vec![encode(text)?]),
        Value::Array(items) if !items.is_empty() => items,
        other => return Err(wrong("prompt", other, expected)),
    };
    if let Some(ids) = ids(&value) {
        return Ok(vec![(None, ids)]);
    }
    let prompt = |item: &Value| match item {
        Value::String(text) => encode(text),
        item => ids(item).map(|ids| (None, ids)).ok_or_else(|| wrong("prompt", &value, expected)),
    };
    items.iter().map(prompt).collect()
}

/// An answer in the making.
struct Told {
    app: Arc<App>,
    asked: Asked,
    id: String,
    created: u64,
    choices: Vec<Choice>,
    usage: Usage,
}

#[derive(Default)]
struct Choice {
    text: String,
    logprobs: Logprobs,
    /// Sum and number of the logprobs of what was made.
    score: (f64, usize),
    finish: Option<Finish>,
    timings: Value,
    made: usize,
}

impl Told {
    fn new(app: Arc<App>, asked: Asked) -> Self {
        let choices = (0..asked.prompts.len() * asked.best_of).map(|_| Choice::default()).collect();
        let id = app.id("cmpl-");
        let mut told = Self { app, asked, id, created: now(), choices, usage: Usage::default() };
        if told.asked.echo {
            for i in 0..told.choices.len() {
                let (text, tokens) = &told.asked.prompts[i / told.asked.best_of];
                let text = text.clone().unwrap_or_else(|| told.app.tokenizer.decode(tokens).unwrap_or_default());
                told.choices[i].text = text;
            }
        }
        told
    }

    fn note(&mut self, i: usize, token: &Scored) {
        if self.asked.logprobs {
            self.choices[i].logprobs.add(&self.app, token, self.asked.as_ids);
        }
    }

    fn heard(&mut self, i: usize, event: Event) {
        match event {
            Event::Prompt(tokens) => tokens.iter().for_each(|token| self.note(i, token)),
            Event::Made { text, token } => {
                self.choices[i].text.push_str(&text);
                if let Some(token) = token {
                    self.note(i, &token);
                    let choice = &mut self.choices[i];
                    choice.score.0 += f64::from(token.logprob.unwrap_or(0.0));
                    choice.score.1 += 1;
                    choice.made += 1;
                }
            }
            Event::Begun { .. } | Event::End(_) | Event::Failed(_) => {}
        }
    }

    fn ended(&mut self, i: usize, end: &End) {
        self.usage.add(end, i.is_multiple_of(self.asked.best_of));
        self.choices[i].finish = Some(end.finish.clone());
        self.choices[i].timings = timings(end);
    }

    /// One choice as far as it was not told yet.
    fn choice(&mut self, i: usize, index: usize) -> Value {
        let logprobs = self.asked.logprobs;
        let choice = &mut self.choices[i];
        json!({
            "index": index,
            "text": std::mem::take(&mut choice.text),
            "logprobs": if logprobs { choice.logprobs.take() } else { Value::Null },
            "finish_reason": choice.finish.as_ref().map(Finish::reason),
            "stop_reason": stop_reason(choice.finish.as_ref()),
        })
    }

    fn envelope(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
        })
    }

    /// The whole answer: of the texts made for each prompt, the `n` most probable ones.
    fn whole(&mut self) -> Value {
        let (n, best_of) = (self.asked.n, self.asked.best_of);
        let mut choices = Vec::new();
        for p in 0..self.asked.prompts.len() {
            let mut made: Vec<usize> = (p * best_of..(p + 1) * best_of).collect();
            if best_of > n {
                let mean = |i: usize| self.choices[i].score.0 / self.choices[i].score.1.max(1) as f64;
                made.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)));
            }
            for i in made.into_iter().take(n) {
                choices.push(self.choice(i, choices.len()));
            }
        }
        let mut whole = self.envelope(choices);
        whole["usage"] = self.usage.json();
        whole["timings"] = self.choices[0].timings.clone();
        whole
    }

    fn chunk(&mut self, i: usize, out: &mut Out) {
        let choice = self.choice(i, i);
        let mut chunk = self.envelope(vec![choice]);
        let wish = self.asked.stream.unwrap_or_default();
        if wish.always {
            let prompt = self.asked.prompts.iter().map(|(_, tokens)| tokens.len()).sum();
            let made = self.choices.iter().map(|choice| choice.made).sum();
            chunk["usage"] = Usage { prompt, cached: self.usage.cached, made }.json();
        } else if wish.at_end {
            chunk["usage"] = Value::Null;
        }
        out.data(&chunk);
    }
}

/// What ended a text, in vLLM's field: the stop text or token that was asked for.
pub(super) fn stop_reason(finish: Option<&Finish>) -> Value {
    match finish {
        Some(Finish::Text(stop)) => stop.as_str().into(),
        Some(Finish::Token(id)) => (*id).into(),
        Some(Finish::Stop | Finish::Length) | None => Value::Null,
    }
}

impl Protocol for Told {
    fn begin(&mut self, out: &mut Out) {
        // Without probabilities there is nothing to wait for before the prompt is told.
        if self.asked.echo && !self.asked.logprobs {
            (0..self.choices.len()).for_each(|i| self.chunk(i, out));
        }
    }

    fn hear(&mut self, index: usize, event: Event, out: &mut Out) {
        let is_made = matches!(event, Event::Made { .. });
        self.heard(index, event);
        if is_made && (self.asked.logprobs || !self.choices[index].text.is_empty()) {
            self.chunk(index, out);
        }
    }

    fn end(&mut self, index: usize, end: &End, out: &mut Out) {
        self.choices[index].made = end.made;
        self.ended(index, end);
        self.chunk(index, out);
    }

    fn close(&mut self, out: &mut Out) {
        if self.asked.stream.is_some_and(|wish| wish.at_end) {
            let mut last = self.envelope(Vec::new());
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
