//! A tiny random checkpoint of every supported family against transformers (`tests/data/models`), in both
//! spellings of its configuration.

use std::fs;
use std::path::{Path, PathBuf};

use decdec::model::Model;
use decdec::sampling::Sampling;
use decdec::source::Source;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::UnderTest;

/// Both sides compute in f32 on the same weights, in other orders: rounding errors of 2^-24 grow to some 10^-6 of
/// the largest logit in two layers.
const TOLERANCE: f32 = 2e-5;

/// A tokenizer that nothing is asked of.
const TOKENIZER: &str =
    r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;

/// The models, and for each what must not be overlooked in its configuration.
fn families() -> Vec<(&'static str, Value)> {
    vec![
        ("llama-3", json!({ "rope_theta": 10000.0 })),
        ("llama-3.1", json!({ "rope_scaling": null })),
        ("llama-3.2", json!({ "rope_scaling": null })),
        ("llama-biased", json!({ "rms_norm_eps": 0.1 })),
        ("mistral-7b-v0.1", json!({ "sliding_window": null })),
        ("mistral-7b-v0.3", json!({ "sliding_window": 6 })),
        ("phi-3-mini-4k", json!({ "sliding_window": null })),
        ("phi-3-medium-4k", json!({ "sliding_window": 6 })),
        ("qwen2.5", json!({ "use_sliding_window": true, "max_window_layers": 0 })),
        ("qwen2.5-tied-window", json!({ "use_sliding_window": false })),
        ("smollm2", json!({ "rope_theta": 10000.0 })),
    ]
}

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

/// `ids` and `logits` as transformers has them.
fn expected(name: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = fs::read(data().join(name).join("expected.safetensors")).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = |name: &str| tensors.tensor(name).expect("there").data().to_vec();
    (bytemuck::pod_collect_to_vec(&tensor("ids")), bytemuck::pod_collect_to_vec(&tensor("logits")))
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

pub(crate) fn every_family<B: UnderTest>(backend: &B) {
    for (name, overlooked) in families() {
        let (ids, want) = expected(name);
        let largest = want.iter().fold(0f32, |m, l| m.max(l.abs()));
        let off = |config: &Value, at_once: usize| {
            let source = open(name, config).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            let model = Model::load(backend, &source, |_| ()).expect("loads");
            let got = logits(&model, &ids, at_once);
            got.iter().zip(&want).fold(0f32, |most, (got, want)| most.max((got - want).abs())) / largest
        };
        let published = read_json(&data().join(name).join("published.json"));
        let written = read_json(&data().join(name).join("config.json"));
        for (spelling, config) in [("older", &published), ("newer", &written)] {
            for at_once in [ids.len(), 1] {
                let off = off(config, at_once);
                assert!(off <= TOLERANCE, "{name}, {spelling} spelling, {at_once} tokens at once: off by {off}");
            }
        }
        let mut wrong = published;
        for (key, value) in overlooked.as_object().expect("an object") {
            wrong[key] = value.clone();
        }
        let off = off(&wrong, ids.len());
        assert!(off > 50.0 * TOLERANCE, "{name}: {overlooked} changes logits by no more than {off}");
    }
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
