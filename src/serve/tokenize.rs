//! Text to tokens and back, for those who have no tokenizer of their own.

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Map, Value, json};

use super::app::{self, Shared, aside};
use super::chat;
use super::problem::{Answer, Problem};
use super::rules;

/// `{"prompt" or "content", "add_special_tokens"}` or `{"messages"}` to `{"tokens", "count", "max_model_len"}`.
pub(super) async fn tokenize(State(app): Shared, request: Request) -> Answer<Json<Value>> {
    let mut fields = app::fields(&app, request).await?;
    aside(move || {
        rules::model(&app, &mut fields)?;
        let (prompt, content) = (fields.text("prompt")?, fields.text("content")?);
        let special = fields.flag("add_special_tokens")?;
        let names = fields.flag("return_token_strs")?.unwrap_or(false);
        let tokens = match prompt.or(content) {
            Some(text) if special.unwrap_or(true) => app.tokenizer.encode(&text),
            Some(text) => app.tokenizer.encode_chat(&text),
            None => Ok(chat::prompt(&app, &mut fields)?.0),
        };
        fields.finish()?;
        let tokens = tokens.map_err(|error| Problem::field("prompt", format!("{error:#}")))?;
        let mut answer = json!({ "tokens": tokens, "count": tokens.len(), "max_model_len": app.options.max_seq_len });
        if names {
            answer["token_strs"] = tokens.iter().map(|&id| app.tokenizer.token_name(id)).collect();
        }
        Ok(Json(answer))
    })
    .await
}

/// `{"tokens"}` to `{"prompt"}`, and to the same in `content`.
pub(super) async fn detokenize(State(app): Shared, request: Request) -> Answer<Json<Value>> {
    let mut fields = app::fields(&app, request).await?;
    aside(move || {
        rules::model(&app, &mut fields)?;
        let tokens =
            fields.ids("tokens")?.ok_or_else(|| Problem::field("tokens", "tokens is missing, a list of token ids"))?;
        fields.finish()?;
        let text = app.tokenizer.decode(&tokens).map_err(|error| Problem::field("tokens", format!("{error:#}")))?;
        Ok(Json(json!({ "prompt": text, "content": text })))
    })
    .await
}

/// The special tokens by their names, and the chat template: what an evaluation needs to write prompts.
pub(super) async fn info(State(app): Shared) -> Json<Value> {
    let mut answer = Map::new();
    for (name, token) in app.tokenizer.named_tokens() {
        answer.insert(name, token.into());
    }
    answer.insert("chat_template".into(), app.options.chat_template.clone().into());
    answer.insert("model_max_length".into(), app.options.max_seq_len.into());
    answer.insert("vocab_size".into(), app.tokenizer.vocab_size().into());
    Json(Value::Object(answer))
}
