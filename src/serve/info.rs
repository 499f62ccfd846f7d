//! What a server says of itself.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::{App, Shared, now};
use super::metrics;
use super::problem::{Answer, Problem};

/// The process is alive.
pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// A text would be taken and made now.
pub(super) async fn ready(State(app): Shared) -> Response {
    match app.line.ready() {
        Ok(()) => Json(json!({ "status": "ready" })).into_response(),
        Err(why) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION"), "server": "decdec" }))
}

pub(super) async fn metrics(State(app): Shared) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], metrics::page(&app.line, app.name())).into_response()
}

fn card(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "decdec",
        "root": app.name(),
        "parent": null,
        "max_model_len": app.options.max_seq_len,
    })
}

pub(super) async fn models(State(app): Shared) -> Json<Value> {
    let cards: Vec<_> = app.options.names.iter().map(|name| card(&app, name)).collect();
    Json(json!({ "object": "list", "data": cards }))
}

pub(super) async fn model(State(app): Shared, Path(name): Path<String>) -> Answer<Json<Value>> {
    if app.options.names.contains(&name) {
        return Ok(Json(card(&app, &name)));
    }
    let message = format!("there is no model {name}, {} is served here", app.options.names.join(", "));
    Err(Problem::new(StatusCode::NOT_FOUND, message).with_code("model_not_found"))
}

/// How busy it is, in the words that routers read.
pub(super) async fn loads(State(app): Shared) -> Json<Value> {
    let (line, m) = (&app.line, &app.line.metrics);
    let (running, waiting) = (m.running.get(), line.waiting() as u64);
    let slots = line.slots().len() as u64;
    Json(json!({
        "timestamp": now(),
        "dp_rank_count": 1,
        "loads": [{
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_waiting_uncached_tokens": line.waiting_tokens(),
            "num_total_reqs": running + waiting,
            "num_used_tokens": m.held.get(),
            "max_total_num_tokens": m.capacity.get(),
            "token_usage": m.usage(),
            "gen_throughput": m.speed.per_second(),
            "cache_hit_rate": m.hit_rate(),
            "utilization": running as f64 / slots.max(1) as f64,
            "max_running_requests": slots,
        }],
    }))
}

pub(super) async fn slots(State(app): Shared) -> Json<Value> {
    Json(json!(app.line.slots()))
}

/// What is served and how.
pub(super) async fn props(State(app): Shared) -> Json<Value> {
    let sets: Vec<_> =
        app.line.compensation().iter().map(|set| json!({ "n_tb": set.n_tb, "k_chunks": set.k_chunks })).collect();
    Json(json!({
        "model": app.name(),
        "device": app.options.device,
        "n_ctx": app.options.max_seq_len,
        "total_slots": app.line.slots().len(),
        "chat_template": app.options.chat_template,
        "compensation": sets,
        "compensate_prompt": app.options.compensate_prompt,
        "adjustable": app.options.adjustable,
        "version": env!("CARGO_PKG_VERSION"),
    }))
}
