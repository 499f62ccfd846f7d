//! Tokens and their probabilities as clients are told of them.

use serde_json::{Map, Value, json};

use super::app::App;
use super::job::{End, Scored};

/// A token as a text; one that is no whole text by itself by its bytes.
pub(super) fn token_text(app: &App, id: u32, as_id: bool) -> String {
    if as_id {
        return format!("token_id:{id}");
    }
    let bytes = app.tokenizer.token_bytes(id).unwrap_or_default();
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let spelled: String = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("bytes:{spelled}")
    })
}

/// A number as JSON has it: what is not finite has no spelling there.
fn number(logprob: f32) -> Value {
    json!(logprob.max(f32::MIN))
}

/// The probabilities of completions: lists with an entry for each token.
#[derive(Debug, Default)]
pub(super) struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters of the text so far.
    length: usize,
}

impl Logprobs {
    pub(super) fn add(&mut self, app: &App, token: &Scored, as_id: bool) {
        let text = token_text(app, token.id, as_id);
        self.text_offset.push(self.length);
        self.length += app.tokenizer.token_bytes(token.id).map_or(0, |b| String::from_utf8_lossy(&b).chars().count());
        self.token_logprobs.push(token.logprob.map_or(Value::Null, number));
        let own = token.logprob.map(|logprob| (token.id, logprob));
        let mut top = Map::new();
        // A token that was made is told, too, where it is not among the most probable.
        for (id, logprob) in token.top.iter().copied().chain(own) {
            top.entry(token_text(app, id, as_id)).or_insert_with(|| number(logprob));
        }
        self.top_logprobs.push(if own.is_some() { Value::Object(top) } else { Value::Null });
        self.tokens.push(text);
    }

    /// What was added since the last time.
    pub(super) fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.token_logprobs),
            "top_logprobs": std::mem::take(&mut self.top_logprobs),
            "text_offset": std::mem::take(&mut self.text_offset),
        })
    }
}

/// A token in the form of chats.
pub(super) fn chat_logprob(app: &App, token: &Scored, as_id: bool) -> Value {
    let entry = |id: u32, logprob: f32| {
        json!({
            "token": token_text(app, id, as_id),
            "logprob": number(logprob),
            "bytes": app.tokenizer.token_bytes(id),
        })
    };
    let mut told = entry(token.id, token.logprob.unwrap_or(f32::MIN));
    told["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
    told
}

/// How many tokens a request took: prompts once, whatever number of texts was made of them.
#[derive(Debug, Default, Clone)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) cached: usize,
    pub(super) made: usize,
}

impl Usage {
    /// Takes note of a text that has ended; `is_first` of those with the same prompt.
    pub(super) fn add(&mut self, end: &End, is_first: bool) {
        if is_first {
            self.prompt += end.prompt_tokens;
            self.cached += end.cached;
        }
        self.made += end.made;
    }

    /// In OpenAI's words.
    pub(super) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": self.prompt + self.made,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// Times as llama-server tells them.
pub(super) fn timings(end: &End) -> Value {
    let per_second = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let (prompt, decode) = (end.prompt_time.as_secs_f64(), end.decode_time.as_secs_f64());
    let read = end.prompt_tokens - end.cached;
    json!({
        "cache_n": end.cached,
        "prompt_n": read,
        "prompt_ms": prompt * 1e3,
        "prompt_per_second": per_second(read, prompt),
        "predicted_n": end.made,
        "predicted_ms": decode * 1e3,
        "predicted_per_second": per_second(end.made.saturating_sub(1), decode),
        "queue_ms": end.waited.as_secs_f64() * 1e3,
    })
}
