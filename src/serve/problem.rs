//! What goes wrong in a request, and how that is said: OpenAI's form, or Anthropic's.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::line::Refusal;

/// What a request is answered with in place of what it asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The field that is wrong.
    pub(super) param: Option<String>,
    pub(super) code: Option<&'static str>,
    /// More that programs read.
    pub(super) more: Vec<(&'static str, Value)>,
}

/// Characters of the longest message.
const LONGEST: usize = 1000;

/// `said` without line ends, which names of a request's fields may have, and cut where it is very long.
fn one_line(said: &str) -> String {
    let mut line = String::new();
    for c in said.chars().take(LONGEST) {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    if said.chars().nth(LONGEST).is_some() {
        line.push('…');
    }
    line
}

/// What handlers return.
pub(super) type Answer<T> = Result<T, Problem>;

impl Problem {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: one_line(&message.into()), param: None, code: None, more: Vec::new() }
    }

    /// A request that makes no sense, because of the field `param`.
    pub(super) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A request that makes no sense.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field that there is no support for.
    pub(super) fn unsupported(param: &str, hint: &str) -> Self {
        let message = format!("{param} is not supported, {hint}");
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// A prompt that there is no room for.
    pub(super) fn too_long(tokens: usize, room: usize) -> Self {
        let message = format!(
            "context_length_exceeded: the prompt has {tokens} tokens, this model's maximum context length is {room} \
             tokens, shorten the prompt"
        );
        let more = vec![("n_prompt_tokens", tokens.into()), ("n_ctx", room.into())];
        Self { code: Some("context_length_exceeded"), more, ..Self::field("messages", message) }
    }

    pub(super) fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// OpenAI's word for the kind of problem.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// In OpenAI's form.
    pub(super) fn json(&self) -> Value {
        let mut error = json!({ "message": self.message, "type": self.kind(), "param": self.param, "code": self.code });
        for (name, value) in &self.more {
            error[name] = value.clone();
        }
        json!({ "error": error })
    }

    /// In Anthropic's.
    pub(super) fn anthropic(&self) -> Value {
        let kind = match self.status.as_u16() {
            413 => "request_too_large",
            500 => "api_error",
            503 => "overloaded_error",
            _ => self.kind(),
        };
        json!({ "type": "error", "error": { "type": kind, "message": self.message } })
    }

    /// The answer with `body`.
    pub(super) fn answer(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::PAYLOAD_TOO_LARGE || self.status == StatusCode::REQUEST_TIMEOUT {
            // What is left of the body is not read.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.answer(self.json())
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let unavailable = |message: &str| Self::new(StatusCode::SERVICE_UNAVAILABLE, message);
        match refusal {
            Refusal::Full(waiting) => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{waiting} texts wait already, the queue is full, try again in a while"),
            )
            .with_code("queue_full"),
            Refusal::Loading => unavailable("the model is being loaded, try again in a while"),
            Refusal::Draining => unavailable("the server is about to end, ask another one"),
            Refusal::Dead => unavailable("the engine has ended, restart the server"),
        }
    }
}
