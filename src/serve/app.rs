//! What all requests share, and which of them goes where.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::fields::Fields;
use super::guide::{Form, Guide, Guides};
use super::job::{Event, Job, Rules};
use super::keys::Keys;
use super::line::{Line, Refusal};
use super::marks::Marks;
use super::problem::{Answer, Problem};
use super::{adjust, anthropic, chat, completions, info, openapi, page, responses, tokenize};
use crate::tokenizer::Tokenizer;

/// How long a client may take to send a request's body.
const BODY: Duration = Duration::from_secs(60);

/// What is served, and to whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model's names; the first is the one that answers tell.
    pub names: Vec<String>,
    /// Tokens of the longest text, prompt and answer together.
    pub max_seq_len: usize,
    /// Who may ask.
    pub keys: Keys,
    /// Bytes of the largest request.
    pub body_limit: usize,
    /// Web pages of these origins may ask, too; `*` stands for any.
    pub origins: Vec<String>,
    /// Prompts are compensated, as what is made of them is.
    pub compensate_prompt: bool,
    /// Whoever may ask may also change how the model is compensated.
    pub adjustable: bool,
    /// The model's chat template, for those who ask for it.
    pub chat_template: Option<String>,
    /// What the model runs on.
    pub device: String,
}

/// What all requests share.
pub struct App {
    pub(super) line: Arc<Line>,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) options: Options,
    /// Seconds since 1970 when the server was started.
    pub(super) created: u64,
    /// What the model's template says of thoughts and calls.
    pub(super) marks: Marks,
    guides: OnceLock<Result<Guides, String>>,
    next_id: AtomicU64,
}

/// What handlers get.
pub(super) type Shared = State<Arc<App>>;

/// What is heard of the texts of one request.
pub(super) type Events = UnboundedReceiver<(usize, Event)>;

impl App {
    /// A server's state, before any request.
    pub fn new(line: Arc<Line>, tokenizer: Arc<Tokenizer>, options: Options) -> Self {
        let (guides, next_id) = (OnceLock::new(), AtomicU64::new(0));
        let marks = options.chat_template.as_deref().map(Marks::of).unwrap_or_default();
        Self { line, tokenizer, options, created: now(), marks, guides, next_id }
    }

    pub(super) fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// The name that answers tell.
    pub(super) fn name(&self) -> &str {
        self.options.names.first().map_or("", String::as_str)
    }

    /// An id that no other answer of this server has.
    pub(super) fn id(&self, prefix: &str) -> String {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:08x}{number:08x}", self.created as u32)
    }

    /// A seed that differs from request to request.
    pub(super) fn fresh_seed(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (u64::from(since.subsec_nanos()) << 20) ^ self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The guide to a form.
    pub(super) fn guide(&self, param: &str, form: &Form) -> Answer<Guide> {
        let made = self.guides.get_or_init(|| Guides::new(&self.tokenizer).map_err(|error| format!("{error:#}")));
        let guides = made.as_ref().map_err(|said| Problem::unsupported(param, said))?;
        guides.guide(form).map_err(|error| Problem::field(param, format!("{param} cannot be held to: {error:#}")))
    }

    /// Asks for texts; `param` is where their prompts are in the request.
    pub(super) fn ask(&self, param: &str, texts: Vec<(Vec<u32>, Rules)>) -> Answer<Events> {
        let room = self.options.max_seq_len;
        let (events, heard) = unbounded_channel();
        let since = Instant::now();
        let mut jobs = Vec::with_capacity(texts.len());
        for (index, (prompt, rules)) in texts.into_iter().enumerate() {
            if prompt.is_empty() {
                return Err(Problem::field(param, format!("{param} has no tokens, at least one is needed")));
            }
            let vocab = self.tokenizer.vocab_size();
            if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
                let last = vocab - 1;
                return Err(Problem::field(param, format!("{param} has the token id {id}, the last one is {last}")));
            }
            if prompt.len() > room {
                return Err(Problem { param: Some(param.into()), ..Problem::too_long(prompt.len(), room) });
            }
            jobs.push(Job { prompt, rules, index, events: events.clone(), since });
        }
        self.line.submit(jobs).inspect_err(|refusal| {
            if matches!(refusal, Refusal::Full(_)) {
                self.line.metrics.refused.inc();
            }
        })?;
        Ok(heard)
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Runs what takes a while, such as tokenizing, where it is in nobody's way.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> Answer<T> + Send + 'static) -> Answer<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be read")))
}

/// The fields of a request's body.
pub(super) async fn fields(app: &App, request: Request) -> Answer<Fields> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("none");
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let message = format!("the content-type is {kind}, application/json is expected");
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let limit = app.options.body_limit;
    let too_large = || {
        let message = format!("the body has more than {limit} bytes, at most that many are allowed");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > limit as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY, to_bytes(request.into_body(), limit)).await {
        Ok(Ok(bytes)) => aside(move || Fields::parse(&bytes)).await,
        Ok(Err(error)) if is_length(&error) => Err(too_large()),
        Ok(Err(_)) => Err(Problem::bad("the body ends before it is complete")),
        Err(_) => {
            let message = format!("the body was not there after {} s", BODY.as_secs());
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// Whether a body was longer than it may be.
fn is_length(error: &axum::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.to_string().contains("length limit") {
            return true;
        }
        cause = error.source();
    }
    error.to_string().contains("length limit")
}

/// All that is answered.
pub(super) fn router(app: App) -> Router {
    let app = Arc::new(app);
    Router::new()
        .route("/", get(page::page))
        .route("/openapi.json", get(openapi::openapi))
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/version", get(info::version))
        .route("/metrics", get(info::metrics))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/v1/loads", get(info::loads))
        .route("/props", get(info::props))
        .route("/slots", get(info::slots))
        .route("/tokenizer_info", get(tokenize::info))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/responses", post(responses::responses))
        .route("/compensation", post(adjust::compensation))
        .fallback(|request: Request| async move {
            let message = format!("there is no {}, /openapi.json lists what there is", request.uri().path());
            Problem::new(StatusCode::NOT_FOUND, message)
        })
        .method_not_allowed_fallback(|request: Request| async move {
            let message = format!("{} is no method of {}", request.method(), request.uri().path());
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .layer(from_fn_with_state(Arc::clone(&app), admit))
        .with_state(app)
}

/// Paths that are open to everybody: whether the server is there, and the page that asks for a key.
const OPEN: [&str; 3] = ["/", "/health", "/ready"];

/// Lets requests with a key in, and pages of origins that may ask.
async fn admit(State(app): Shared, request: Request, next: Next) -> Response {
    let origin = allowed_origin(&app, request.headers());
    let mut response = if request.method() == Method::OPTIONS && origin.is_some() {
        Response::builder().status(StatusCode::NO_CONTENT).body(Body::empty()).unwrap_or_default()
    } else if !OPEN.contains(&request.uri().path()) && !app.options.keys.admit(request.headers()) {
        let message = "the key is missing or unknown, send Authorization: Bearer KEY";
        let problem = Problem::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key");
        let is_messages = request.uri().path().starts_with("/v1/messages");
        if is_messages { problem.answer(problem.anthropic()) } else { problem.into_response() }
    } else {
        next.run(request).await
    };
    if let Some(origin) = origin {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        let allowed = HeaderValue::from_static("authorization, content-type, x-api-key, anthropic-version");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    }
    response
}

/// The origin of a page that may ask.
fn allowed_origin(app: &App, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let text = origin.to_str().ok()?;
    app.options.origins.iter().any(|allowed| allowed == "*" || allowed == text).then(|| origin.clone())
}
