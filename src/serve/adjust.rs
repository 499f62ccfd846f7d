//! `POST /compensation`: how the model is compensated from the next step on, for everybody who asks it.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::app::{self, Shared};
use super::fields::wrong;
use super::line::ENDED;
use super::problem::{Answer, Problem};
use crate::dec::CHUNK;
use crate::model::LayerCompensation;

/// `{"k_chunks": [qkv, o, gu, d], "n_tb"}`; zeros stop it.
pub(super) async fn compensation(State(app): Shared, request: Request) -> Answer<Json<Value>> {
    if !app.options.adjustable {
        let message = "compensation cannot be changed here, start the server with --adjustable";
        return Err(Problem::new(StatusCode::FORBIDDEN, message));
    }
    let mut fields = app::fields(&app, request).await?;
    let value = fields.need("k_chunks")?;
    let list = value
        .as_array()
        .and_then(|list| list.iter().map(|k| k.as_u64().map(|k| k as usize)).collect::<Option<Vec<_>>>());
    let k_chunks: Option<[usize; 4]> =
        list.filter(|list| list.iter().all(|&k| k <= CHUNK)).and_then(|list| list.try_into().ok());
    let k_chunks =
        k_chunks.ok_or_else(|| wrong("k_chunks", &value, "four numbers from 0 to 1024, for qkv, o, gu, d"))?;
    let before = app.line.compensation().first().map_or(8, |set| set.n_tb);
    let n_tb = fields.whole("n_tb", 1, 1 << 16)?.unwrap_or(before);
    fields.finish()?;
    let sets = if k_chunks == [0; 4] { Vec::new() } else { vec![LayerCompensation { n_tb, k_chunks }] };
    let done = app.line.order(sets).await;
    match done {
        Ok(Ok(())) => Ok(Json(json!({ "k_chunks": k_chunks, "n_tb": n_tb }))),
        Ok(Err(said)) => Err(Problem::field("k_chunks", said)),
        Err(_) => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, ENDED)),
    }
}
