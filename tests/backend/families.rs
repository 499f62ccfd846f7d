//! A tiny random checkpoint of every supported family against transformers (`tests/data/models`): from a directory, in
//! both spellings of its configuration, and from GGUF; a short text, and one past every window and original context.

use std::fs;
use std::path::{Path, PathBuf};

use decdec::backend::cpu::Cpu;
use decdec::backend::cuda::{Cuda, Dtype, Options};
use decdec::model::Model;
use decdec::sampling::Sampling;
use decdec::source::Source;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::UnderTest;
use crate::common::devices;

/// Both sides compute in f32 on the same weights, in other orders: rounding errors of 2^-24 grow to some 10^-6 of
/// the largest logit in two layers.
const TOLERANCE: f32 = 2e-5;

/// A tokenizer that nothing is asked of.
const TOKENIZER: &str =
    r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON")
}

/// The model `name` with this configuration.
fn open(name: &str, config: &Value) -> anyhow::Result<Source> {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("config.json"), config.to_string()).expect("writable");
    fs::write(dir.path().join("tokenizer.json"), TOKENIZER).expect("writable");
    fs::copy(data().join(name).join("model.safetensors"), dir.path().join("model.safetensors")).expect("copied");
    Source::open(dir.path())
}

/// A text, and the logits of its last positions as transformers has them.
struct Known {
    ids: Vec<u32>,
    logits: Vec<f32>,
}

/// A text that ends before the context that the model's RoPE stretches and, of most models, one that goes past it and
/// past every window.
fn known(name: &str) -> Vec<Known> {
    let bytes = fs::read(data().join(name).join("expected.safetensors")).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = |name: &str| Some(tensors.tensor(name).ok()?.data().to_vec());
    let text = |(ids, logits)| {
        let (ids, logits) = (tensor(ids)?, tensor(logits)?);
        Some(Known { ids: bytemuck::pod_collect_to_vec(&ids), logits: bytemuck::pod_collect_to_vec(&logits) })
    };
    [("ids", "logits"), ("long_ids", "long_logits")].into_iter().filter_map(text).collect()
}

/// The logits of every position, read so many tokens at once (or as many as the device takes).
fn logits<B: UnderTest>(model: &Model<'_, B>, ids: &[u32], at_once: usize) -> Vec<f32> {
    let vocab = model.config().vocab_size;
    let mut state = model.state(ids.len()).expect("room");
    model.begin(&mut state, &Sampling::GREEDY, &[]).expect("begins");
    let mut on_device = model.backend().vector(ids.len() * vocab).expect("room");
    let mut all = Vec::new();
    for ids in ids.chunks(at_once.min(state.max_tokens())) {
        model.logits(&mut state, ids, false, &mut on_device).expect("runs");
        let mut host = vec![0.0; ids.len() * vocab];
        model.backend().read(&on_device, &mut host).expect("reads");
        all.extend(host);
    }
    all
}

/// The largest difference of a logit over the largest logit; of text `known`, read so many tokens at once.
fn off<B: UnderTest>(model: &Model<'_, B>, known: &Known, at_once: usize) -> f32 {
    let got = logits(model, &known.ids, at_once);
    let largest = known.logits.iter().fold(0f32, |most, logit| most.max(logit.abs()));
    let pairs = got[got.len() - known.logits.len()..].iter().zip(&known.logits);
    pairs.fold(0f32, |most, (got, want)| most.max((got - want).abs())) / largest
}

/// Loads what `source` gives, and asks of it every text: whole, in passes that end inside windows, token by token.
fn agrees<B: UnderTest>(backend: &B, what: &str, source: anyhow::Result<Source>) {
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
fn differs<B: UnderTest>(backend: &B, what: &str, source: &Source) {
    let name = what.split(',').next().expect("a name");
    let model = Model::load(backend, source, |_| ()).unwrap_or_else(|e| panic!("{what}: {e:#}"));
    let off = known(name).iter().fold(0f32, |most, known| most.max(off(&model, known, known.ids.len())));
    assert!(off > 50.0 * TOLERANCE, "{what} changes logits by no more than {off}");
}

/// The models and what must not be overlooked in the published spelling of their configuration.
fn models() -> serde_json::Map<String, Value> {
    let models = read_json(&data().join("overlooked.json")).as_object().expect("an object").clone();
    let directories = fs::read_dir(data()).expect("readable").map(|entry| entry.expect("an entry").path());
    assert_eq!(directories.filter(|path| path.join("config.json").exists()).count(), models.len(), "none forgotten");
    models
}

/// The model with other fields in its (text model's) configuration, unless they are refused.
fn with_changes(name: &str, published: &Value, changes: &Value) -> Option<Source> {
    let mut wrong = published.clone();
    let text = if wrong["text_config"].is_object() { &mut wrong["text_config"] } else { &mut wrong };
    let changes = changes.as_object().expect("an object");
    changes.iter().for_each(|(key, value)| text[key] = value.clone());
    let names: Vec<&str> = changes.keys().map(String::as_str).collect();
    unless_refused(name, open(name, &wrong), &names)
}

pub(crate) fn every_family<B: UnderTest>(backend: &B) {
    for (name, overlooked) in models() {
        let published = read_json(&data().join(&name).join("published.json"));
        let written = read_json(&data().join(&name).join("config.json"));
        for (spelling, config) in [("older", &published), ("newer", &written)] {
            agrees(backend, &format!("{name}, {spelling} spelling"), open(&name, config));
        }
        for changes in overlooked.as_array().expect("a list") {
            if let Some(source) = with_changes(&name, &published, changes) {
                differs(backend, &format!("{name}, {changes}"), &source);
            }
        }
    }
}

/// The root mean square of differences over that of the logits, in units of what transformers is off by itself in a
/// type of 16 bits (`rounding`, a number for each text): the farther of the texts.
fn off_in_units<B: UnderTest>(backend: &B, name: &str, source: &Source, rounding: &Value) -> f32 {
    let model = Model::load(backend, source, |_| ()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|number| number * number).sum::<f32>();
    let of_text = |(known, rounding): (&Known, &Value)| {
        let got = logits(&model, &known.ids, known.ids.len());
        let pairs = got[got.len() - known.logits.len()..].iter().zip(&known.logits);
        let off = squares(&mut pairs.map(|(got, want)| got - want)) / squares(&mut known.logits.iter().copied());
        off.sqrt() / rounding.as_f64().expect("a number") as f32
    };
    known(name).iter().zip(rounding.as_array().expect("a list")).map(of_text).fold(0.0, f32::max)
}

/// Every family is off by no more than twice what transformers is in that type, and by more with a feature overlooked.
fn every_family_in<B: UnderTest>(backend: &B, kind: &str) {
    let rounding = read_json(&data().join("rounding.json"));
    for (name, overlooked) in models() {
        let published = read_json(&data().join(&name).join("published.json"));
        let off = |source: &Source| off_in_units(backend, &name, source, &rounding[&name][kind]);
        let itself = off(&open(&name, &published).unwrap_or_else(|e| panic!("{name}: {e:#}")));
        assert!(itself <= 2.0, "{name} in {kind} is off by {itself} times what transformers is");
        for changes in overlooked.as_array().expect("a list") {
            let by = with_changes(&name, &published, changes).map_or(f32::INFINITY, |source| off(&source));
            assert!(by > 2.0, "{name} in {kind}: {changes} puts it off by {by} times what transformers is");
        }
    }
}

/// What is asked of 16 bits tells every feature of every family.
#[test]
fn tolerances_of_short_types_notice_what_is_overlooked() {
    if devices::is_under_test("cpu") {
        every_family_in(&Cpu::new(), "float16");
        every_family_in(&Cpu::new(), "bfloat16");
    }
}

#[test]
fn cuda_in_float16_and_bfloat16() {
    if devices::is_under_test("cuda") {
        for (dtype, kind) in [(Dtype::Float16, "float16"), (Dtype::Bfloat16, "bfloat16")] {
            every_family_in(&Cuda::new(0, Options { dtype, ..Options::default() }).expect("the device"), kind);
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

pub(crate) fn every_family_from_gguf<B: UnderTest>(backend: &B) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut files = 0;
    for name in models().keys() {
        let path = data().join(name).join("model.gguf");
        if !path.exists() {
            continue;
        }
        files += 1;
        agrees(backend, &format!("{name}, GGUF"), Source::open(&path));
        let keys = KEYS.iter().find(|(of, _)| of == name).map_or(&[][..], |(_, keys)| *keys);
        for key in keys {
            let without = dir.path().join("without.gguf");
            fs::write(&without, without_key(fs::read(&path).expect("readable"), key)).expect("writable");
            let what = format!("{name}, without {key}");
            if let Some(source) = unless_refused(&what, Source::open(&without), &[&key[..key.len() - 1]]) {
                differs(backend, &what, &source);
            }
        }
    }
    assert_eq!(files, 16);
}

#[test]
fn biases_are_those_of_the_configuration() {
    let config = |name: &str| read_json(&data().join(name).join("published.json"));
    let refused = |name: &str, changes: Value| {
        let mut config = config(name);
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
