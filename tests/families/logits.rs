//! Logits against those of transformers: from a directory, in both spellings of its configuration, and from GGUF; of a
//! short text, and of one past every window and original context.

use std::fs;

use decdec::backend::DecodeBackend;
use decdec::model::Model;
use decdec::sampling::Sampling;
use decdec::source::Source;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::models::{complete_of, config, file, of, open, read_json};

/// Both sides compute in f32 on the same weights, in other orders: rounding errors of 2^-24 grow to some 10^-6 of
/// the largest logit in two layers.
const TOLERANCE: f32 = 2e-5;

/// A text, and the logits of its last positions as transformers has them.
pub(crate) struct Known {
    pub(crate) ids: Vec<u32>,
    pub(crate) logits: Vec<f32>,
}

/// A text that ends before the context that the model's RoPE stretches and, of most models, one that goes past it and
/// past every window.
pub(crate) fn known(name: &str) -> Vec<Known> {
    let bytes = fs::read(file(name, "expected.safetensors")).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = |name: &str| Some(tensors.tensor(name).ok()?.data().to_vec());
    let text = |(ids, logits)| {
        let (ids, logits) = (tensor(ids)?, tensor(logits)?);
        Some(Known { ids: bytemuck::pod_collect_to_vec(&ids), logits: bytemuck::pod_collect_to_vec(&logits) })
    };
    [("ids", "logits"), ("long_ids", "long_logits")].into_iter().filter_map(text).collect()
}

/// The logits of every position, read so many tokens at once (or as many as the device takes).
pub(crate) fn logits<B: DecodeBackend>(model: &Model<'_, B>, ids: &[u32], at_once: usize) -> Vec<f32> {
    let vocab = model.config().vocab_size;
    let mut state = model.state(1, ids.len()).expect("room");
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).expect("begins");
    let mut on_device = model.backend().vector(ids.len() * vocab).expect("room");
    let mut all = Vec::new();
    for ids in ids.chunks(at_once.min(state.max_tokens())) {
        model.logits(&mut state, 0, ids, false, &mut on_device).expect("runs");
        let mut host = vec![0.0; ids.len() * vocab];
        model.backend().read(&on_device, &mut host).expect("reads");
        all.extend(host);
    }
    all
}

/// The largest difference of a logit over the largest logit; of text `known`, read so many tokens at once.
fn off<B: DecodeBackend>(model: &Model<'_, B>, known: &Known, at_once: usize) -> f32 {
    let got = logits(model, &known.ids, at_once);
    let largest = known.logits.iter().fold(0f32, |most, logit| most.max(logit.abs()));
    let pairs = got[got.len() - known.logits.len()..].iter().zip(&known.logits);
    pairs.fold(0f32, |most, (got, want)| most.max((got - want).abs())) / largest
}

/// Loads what `source` gives, and asks of it every text: whole, in passes that end inside windows, token by token.
fn agrees<B: DecodeBackend>(backend: &B, what: &str, source: anyhow::Result<Source>) {
    let name = what.split(',').next().expect("a name");
    let source = source.unwrap_or_else(|e| panic!("{what}: {e:#}"));
    let model = Model::load(backend, &source, |_| ()).unwrap_or_else(|e| panic!("{what}: {e:#}"));
    for known in known(name) {
        for at_once in [known.ids.len(), 7, 1] {
            let (off, length) = (off(&model, &known, at_once), known.ids.len());
            assert!(off <= TOLERANCE, "{what}, {length} tokens, {at_once} at once: off by {off}");
        }
    }
}

/// A source that was changed, or none if it is refused by one of `names`.
fn unless_refused(what: &str, source: anyhow::Result<Source>, names: &[&str]) -> Option<Source> {
    source
        .map_err(|error| {
            let message = format!("{error:#}");
            assert!(names.iter().any(|name| message.contains(name)), "{what}: {message}");
        })
        .ok()
}

/// The logits of a model that overlooks what was changed in `source` are others.
fn differs<B: DecodeBackend>(backend: &B, what: &str, source: &Source) {
    let name = what.split(',').next().expect("a name");
    let model = Model::load(backend, source, |_| ()).unwrap_or_else(|e| panic!("{what}: {e:#}"));
    let off = known(name).iter().fold(0f32, |most, known| most.max(off(&model, known, known.ids.len())));
    assert!(off > 50.0 * TOLERANCE, "{what} changes logits by no more than {off}");
}

/// The model with its published configuration changed in what must not be overlooked, one by one, and what was changed;
/// without changes that are refused.
pub(crate) fn overlooked(model: &str) -> Vec<(String, Source)> {
    let published = config(model, "published.json");
    let changes = read_json("models/overlooked.json")[model].as_array().expect("a list").clone();
    let overlooked = changes.iter().filter_map(|changes| {
        let mut wrong = published.clone();
        let text = if wrong["text_config"].is_object() { &mut wrong["text_config"] } else { &mut wrong };
        let (what, changes) = (format!("{model}, {changes}"), changes.as_object().expect("an object"));
        changes.iter().for_each(|(key, value)| text[key] = value.clone());
        let names: Vec<&str> = changes.keys().map(String::as_str).collect();
        Some((what.clone(), unless_refused(&what, open(model, &wrong), &names)?))
    });
    overlooked.collect()
}

pub(crate) fn of_directories<B: DecodeBackend>(backend: &B, family: &str) {
    for name in of(family) {
        for (spelling, file) in [("older", "published.json"), ("newer", "config.json")] {
            agrees(backend, &format!("{name}, {spelling} spelling"), open(&name, &config(&name, file)));
        }
        for (what, source) in overlooked(&name) {
            differs(backend, &what, &source);
        }
    }
}

/// Keys of the GGUF metadata that a model is another one without.
const KEYS: [(&str, &[&str]); 9] = [
    ("qwen2.5-yarn", &["qwen2.rope.scaling.type", "qwen2.rope.scaling.factor"]),
    ("llama-3-yarn", &["llama.rope.scaling.type"]),
    (
        "ministral-3",
        &[
            "mistral3.attention.temperature_scale",
            "mistral3.rope.scaling.yarn_log_multiplier",
            "mistral3.rope.scaling.yarn_beta_fast",
            "mistral3.rope.scaling.yarn_beta_slow",
        ],
    ),
    ("gemma-2", &["gemma2.attn_logit_softcapping", "gemma2.final_logit_softcapping"]),
    ("gemma-3-1b", &["gemma3.attention.sliding_window"]),
    ("gemma-3-4b", &["gemma3.rope.scaling.type"]),
    ("olmo-3", &["olmo2.attention.sliding_window", "olmo2.rope.scaling.type"]),
    (
        "granite-3.3",
        &["granite.attention.scale", "granite.embedding_scale", "granite.residual_scale", "granite.logit_scale"],
    ),
    ("glm-4-9b", &["glm4.rope.dimension_count"]),
];

/// The GGUF `bytes` with a last character in the name of `key` that no reader knows.
fn without_key(mut bytes: Vec<u8>, key: &str) -> Vec<u8> {
    let stored = [&(key.len() as u64).to_le_bytes(), key.as_bytes()].concat();
    let found = bytes.windows(stored.len()).position(|window| window == stored).expect("the key");
    bytes[found + stored.len() - 1] = b'?';
    bytes
}

pub(crate) fn of_gguf<B: DecodeBackend>(backend: &B, family: &str) {
    let dir = tempfile::tempdir().expect("a directory");
    for complete in complete_of(family) {
        let (name, path) = (complete.model, file(complete.model, "model.gguf"));
        agrees(backend, &format!("{name}, GGUF"), Source::open(&path));
        let keys = KEYS.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, keys)| *keys);
        for key in keys {
            let without = dir.path().join("without.gguf");
            fs::write(&without, without_key(fs::read(&path).expect("readable"), key)).expect("writable");
            let what = format!("{name}, without {key}");
            if let Some(source) = unless_refused(&what, Source::open(&without), &[&key[..key.len() - 1]]) {
                differs(backend, &what, &source);
            }
        }
    }
}

#[test]
fn biases_are_those_of_the_configuration() {
    let refused = |name: &str, changes: Value| {
        let mut config = config(name, "published.json");
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        format!("{:#}", open(name, &config).map(drop).expect_err("refused"))
    };
    let message = refused("llama-3", json!({ "attention_bias": true }));
    assert!(message.contains("tensor model.layers.0.self_attn.q_proj.bias is missing"), "{message}");
    let message = refused("llama-biased", json!({ "mlp_bias": false }));
    assert!(message.contains("mlp.gate_proj.bias is there, the configuration asks for none"), "{message}");
    let message = refused("llama-3", json!({ "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"] }));
    assert!(message.contains("q_proj.bias is missing"), "{message}");
}
