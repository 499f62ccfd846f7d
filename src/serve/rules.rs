//! The fields that say how a text is made: the same in all of OpenAI's requests.

use serde_json::Value;

use super::app::App;
use super::fields::{Fields, wrong};
use super::guide::Form;
use super::job::{Penalties, Rules};
use super::problem::{Answer, Problem};
use crate::sampling::Sampling;

/// The most texts that one request may ask for.
pub(super) const MOST_CHOICES: usize = 128;

/// The most stop texts.
const MOST_STOPS: usize = 16;

/// Who asks, and what clients keep for themselves: nothing of the answer depends on it.
pub(super) const LABELS: [&str; 7] =
    ["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id", "priority"];

/// Refuses another model than the one that is served.
pub(super) fn model(app: &App, fields: &mut Fields) -> Answer<String> {
    let Some(name) = fields.text("model")? else { return Ok(app.name().to_owned()) };
    if name.is_empty() || app.options.names.contains(&name) {
        return Ok(if name.is_empty() { app.name().to_owned() } else { name });
    }
    let message = format!("the model is {name}, {} is served here", app.options.names.join(", "));
    let problem = Problem { param: Some("model".into()), ..Problem::new(axum::http::StatusCode::NOT_FOUND, message) };
    Err(problem.with_code("model_not_found"))
}

/// Takes the fields of [`Rules`] but those that tell probabilities; `default_max` tokens are made where nobody says
/// how many.
pub(super) fn rules(app: &App, fields: &mut Fields, default_max: usize) -> Answer<Rules> {
    fields.pass(&LABELS);
    fields.refuse(&[
        ("service_tier", "auto".into(), "there is one tier, leave it out"),
        ("store", false.into(), "nothing is stored, leave it out"),
        ("include_stop_str_in_output", false.into(), "a stop text is never part of the answer, leave it out"),
        ("no_stop_trim", false.into(), "a stop text is never part of the answer, leave it out"),
        ("return_hidden_states", false.into(), "texts and probabilities alone are told, leave it out"),
        ("use_beam_search", false.into(), "texts are sampled, use n or best_of"),
        ("length_penalty", 1.0.into(), "there is no beam search, leave it out"),
        ("truncate_prompt_tokens", Value::Null, "prompts are never cut, shorten it"),
        ("prompt_logprobs", Value::Null, "use echo and logprobs of /v1/completions"),
        ("spaces_between_special_tokens", true.into(), "tokens are decoded as the tokenizer says, leave it out"),
        ("logits_processors", Value::Null, "use logit_bias"),
        ("bad_words", Value::Null, "use logit_bias"),
        ("allowed_token_ids", Value::Null, "use logit_bias or grammar"),
        ("typical_p", 1.0.into(), "use top_p or min_p"),
        ("mirostat", 0.into(), "use top_p or min_p"),
    ])?;
    let temperature = fields.number("temperature", 0.0, 100.0)?.unwrap_or(1.0);
    let top_k = fields.read("top_k", "a whole number, -1 or 0 for all,", |value| match value.as_i64()? {
        -1 => Some(0),
        count => usize::try_from(count).ok(),
    })?;
    let (top_p, min_p) = (fields.number("top_p", 0.0, 1.0)?, fields.number("min_p", 0.0, 1.0)?);
    let sampling =
        Sampling { temperature, top_k: top_k.unwrap_or(0), top_p: top_p.unwrap_or(1.0), min_p: min_p.unwrap_or(0.0) };
    let penalties = Penalties {
        repetition: fields.number("repetition_penalty", 0.01, 100.0)?.unwrap_or(1.0),
        presence: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
    };
    let seed = fields.read("seed", "a whole number", |value| value.as_u64().or(value.as_i64().map(|n| n as u64)))?;
    let (new, old) =
        (fields.whole("max_completion_tokens", 0, usize::MAX)?, fields.whole("max_tokens", 0, usize::MAX)?);
    let stop = fields.texts("stop")?.unwrap_or_default();
    if stop.len() > MOST_STOPS {
        return Err(Problem::field("stop", format!("stop has {} texts, at most {MOST_STOPS} are allowed", stop.len())));
    }
    let stop_ids = fields.ids("stop_token_ids")?.unwrap_or_default();
    let rules = Rules {
        sampling,
        seed: seed.unwrap_or_else(|| app.fresh_seed()),
        max_tokens: new.or(old).unwrap_or(default_max),
        min_tokens: fields.whole("min_tokens", 0, usize::MAX)?.unwrap_or(0),
        stop,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        penalties,
        bias: bias(app, fields)?,
        logprobs: None,
        scores_prompt: false,
        guide: form(fields)?.map(|(param, form)| app.guide(param, &form)).transpose()?,
        special_text: !fields.flag("skip_special_tokens")?.unwrap_or(true),
        compensate_prompt: app.options.compensate_prompt,
        stop_ids,
    };
    let vocab = app.tokenizer.vocab_size();
    if let Some(id) = rules.stop_ids.iter().find(|&&id| id as usize >= vocab) {
        let message = format!("stop_token_ids has {id}, the last token id is {}", vocab - 1);
        return Err(Problem::field("stop_token_ids", message));
    }
    Ok(rules)
}

/// What is added to single logits: `{"ID": -100 to 100}`.
fn bias(app: &App, fields: &mut Fields) -> Answer<Vec<(u32, f32)>> {
    let Some(value) = fields.take("logit_bias") else { return Ok(Vec::new()) };
    let vocab = app.tokenizer.vocab_size() as u32;
    let expected = format!("token ids below {vocab} with numbers from -100 to 100");
    let pair = |(id, bias): (&String, &Value)| {
        let id = id.parse().ok().filter(|&id: &u32| id < vocab)?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
        // -100 forbids, as in OpenAI's own words.
        Some((id, if bias == -100.0 { f32::NEG_INFINITY } else { bias as f32 }))
    };
    let pairs: Option<_> = value.as_object().and_then(|map| map.iter().map(pair).collect());
    pairs.ok_or_else(|| wrong("logit_bias", &value, &expected))
}

/// What the text has to look like, and the field that says so: OpenAI's, vLLM's or llama.cpp's.
fn form(fields: &mut Fields) -> Answer<Option<(&'static str, Form)>> {
    let mut forms = Vec::new();
    if let Some(mut format) = fields.object("response_format")? {
        let form = match format.text("type")?.as_deref() {
            Some("text") => None,
            Some("json_object") => Some(Form::Json),
            Some("json_schema") => {
                let mut named = format.object("json_schema")?.ok_or_else(|| {
                    Problem::field("response_format.json_schema", "response_format.json_schema is missing")
                })?;
                named.pass(&["name", "description", "strict"]);
                let schema = named.need("schema")?;
                named.finish()?;
                Some(Form::Schema(schema))
            }
            other => {
                let said = other.unwrap_or("missing");
                let message = format!("response_format.type is {said}, text, json_object and json_schema are known");
                return Err(Problem::field("response_format.type", message));
            }
        };
        format.finish()?;
        forms.extend(form.map(|form| ("response_format", form)));
    }
    if let Some(mut outputs) = fields.object("structured_outputs")? {
        forms.extend(
            vllm(&mut outputs, ["json", "regex", "choice", "grammar", "json_object"])?
                .map(|form| ("structured_outputs", form)),
        );
        outputs.finish()?;
    }
    let guided = ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"];
    forms.extend(vllm(fields, guided)?.map(|form| ("guided_json", form)));
    forms.extend(fields.text("grammar")?.map(|grammar| ("grammar", Form::Grammar(grammar))));
    forms.extend(fields.take("json_schema").map(|schema| ("json_schema", Form::Schema(schema))));
    match forms.len() {
        0 | 1 => Ok(forms.pop()),
        _ => {
            let names: Vec<_> = forms.iter().map(|(name, _)| *name).collect();
            Err(Problem::field(names[1], format!("{} are given, a text has one form", names.join(" and "))))
        }
    }
}

/// vLLM's names, in that order.
fn vllm(fields: &mut Fields, names: [&'static str; 5]) -> Answer<Option<Form>> {
    let [json, regex, choice, grammar, any] = names;
    let schema = fields.take(json).map(|schema| match schema {
        // A schema may come as the text of one.
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        schema => schema,
    });
    let choices = fields.texts(choice)?.map(|choices| {
        let escaped: Vec<_> = choices.iter().map(|choice| escape(choice)).collect();
        Form::Regex(format!("({})", escaped.join("|")))
    });
    let (regex, grammar) = (fields.text(regex)?.map(Form::Regex), fields.text(grammar)?.map(Form::Grammar));
    let any = fields.flag(any)?.unwrap_or(false).then_some(Form::Json);
    Ok(schema.map(Form::Schema).or(regex).or(choices).or(grammar).or(any))
}

/// A text as a regular expression that matches it alone.
pub(super) fn escape(text: &str) -> String {
    let special = |c: char| r"\.+*?()|[]{}^$#&-~/".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}
