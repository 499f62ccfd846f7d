mod families;
mod rope;

use serde_json::{Value, json};

use super::fields::merged;
use crate::config::{Attention, ModelConfig, Projection, RopeScaling};

/// A small configuration with some fields changed; "absent" takes one out.
fn with(changes: Value) -> Value {
    let base = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128, "hidden_act": "silu",
    });
    let mut json = merged(base, &changes);
    json.as_object_mut().expect("an object").retain(|_, value| *value != json!("absent"));
    json
}

/// What the first layer of a model has, beside what they all share.
#[derive(Debug, PartialEq)]
struct Read {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
    sliding_window: Option<usize>,
    rope_theta: f64,
    rope_scaling: RopeScaling,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    tie_word_embeddings: bool,
}

impl Read {
    fn of(config: &ModelConfig) -> Self {
        let layer = &config.layers[0];
        let Attention { num_heads, num_kv_heads, head_dim, window, .. } = *layer.attention();
        Self {
            num_heads,
            num_kv_heads,
            head_dim,
            intermediate_size: layer.intermediate_size(),
            sliding_window: window,
            rope_theta: config.ropes[0].theta,
            rope_scaling: config.ropes[0].scaling.clone(),
            bos_token_id: config.bos_token_id,
            eos_token_ids: config.eos_token_ids.clone(),
            tie_word_embeddings: config.tie_word_embeddings,
        }
    }
}

fn config(changes: Value) -> ModelConfig {
    ModelConfig::from_json(&with(changes)).expect("a good configuration")
}

fn read(changes: Value) -> Read {
    Read::of(&config(changes))
}

/// The windows of all layers.
fn windows(changes: Value) -> Vec<Option<usize>> {
    config(changes).layers.iter().map(|layer| layer.attention().window).collect()
}

fn refusal(changes: Value) -> String {
    format!("{:#}", ModelConfig::from_json(&with(changes)).expect_err("a bad configuration"))
}

#[test]
fn every_architecture() {
    for (name, window) in [("llama", None), ("mistral", Some(32)), ("phi3", Some(32)), ("qwen2", None)] {
        let config = config(json!({ "model_type": name, "sliding_window": 32 }));
        assert!(config.family.model_types.iter().any(|(model_type, _)| *model_type == name));
        assert!(config.layers.iter().all(|layer| layer.attention().window == window), "{name}");
    }
    let expected = Read {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        intermediate_size: 96,
        sliding_window: None,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        bos_token_id: None,
        eos_token_ids: vec![],
        tie_word_embeddings: false,
    };
    let config = config(json!({}));
    assert_eq!(Read::of(&config), expected);
    assert_eq!((config.hidden_size, config.layers.len(), config.vocab_size), (64, 3, 500));
    assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-6, 128));
}

#[test]
fn fields_that_may_be_absent_null_or_lists() {
    assert_eq!(read(json!({ "head_dim": null })).head_dim, 16);
    assert_eq!(read(json!({ "head_dim": 24, "hidden_size": 63 })).head_dim, 24);
    assert_eq!(read(json!({ "num_key_value_heads": null })).num_kv_heads, 4);
    assert_eq!(read(json!({ "eos_token_id": 7, "bos_token_id": 0 })).eos_token_ids, [7]);
    assert_eq!(read(json!({ "eos_token_id": [7, 9], "bos_token_id": 0 })).bos_token_id, Some(0));
    assert!(read(json!({ "eos_token_id": null, "hidden_act": "absent" })).eos_token_ids.is_empty());
    assert!(read(json!({ "tie_word_embeddings": true })).tie_word_embeddings);
}

#[test]
fn windows_of_some_layers() {
    let qwen = |changes: Value| {
        merged(json!({ "model_type": "qwen2", "sliding_window": 32, "use_sliding_window": true }), &changes)
    };
    let wide = Some(32);
    assert_eq!(windows(qwen(json!({ "max_window_layers": 0 }))), [wide; 3]);
    assert_eq!(windows(qwen(json!({ "max_window_layers": 28 }))), [None; 3]);
    assert_eq!(windows(qwen(json!({ "max_window_layers": 1 }))), [None, wide, wide]);
    let (slides, full) = ("sliding_attention", "full_attention");
    assert_eq!(windows(qwen(json!({ "layer_types": [slides, slides, slides] }))), [wide; 3]);
    assert_eq!(windows(qwen(json!({ "layer_types": [full, full, full] }))), [None; 3]);
    assert_eq!(windows(qwen(json!({ "layer_types": [slides, full, full] }))), [wide, None, None]);
    let message = refusal(qwen(json!({ "layer_types": [slides, full] })));
    assert_eq!(message, "layer_types has 2 entries, as many as num_hidden_layers, 3, are expected");
}

#[test]
fn refusals_name_what_is_wrong() {
    let cases = [
        (json!({ "model_type": "gemma" }), "model_type \"gemma\" is unknown, llama, mistral, ministral3, phi3, qwen2,"),
        (json!({ "model_type": "absent" }), "model_type is missing"),
        (
            json!({ "architectures": ["LlamaForSequenceClassification"] }),
            "architectures is [\"LlamaForSequenceClassification\"], LlamaForCausalLM is expected",
        ),
        (json!({ "model_type": "mistral", "architectures": ["MixtralForCausalLM"] }), "MistralForCausalLM is"),
        (
            json!({ "rope_theta": 5, "rope_parameters": { "rope_theta": 6 } }),
            "rope_theta is 5 in one place and 6 in another",
        ),
        (
            json!({ "rope_parameters": { "rope_theta": 6 }, "rope_scaling": { "type": "linear", "factor": 2 } }),
            "rope_parameters is None, but rope_scaling is Linear { factor: 2.0 }",
        ),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 2 } }), "RoPE type \"dynamic\" is unknown"),
        (json!({ "rope_parameters": { "full_attention": { "rope_type": "default" } } }), "has no rope_type"),
        (json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }), "partial_rotary_factor is 0.5"),
        (json!({ "num_hidden_layers": 5000 }), "num_hidden_layers is 5000, 1 to 4096"),
        (json!({ "hidden_act": "gelu" }), "hidden_act \"gelu\" is unknown, silu is expected"),
        (json!({ "rope_scaling": { "type": "longrope" } }), "rope_scaling: the RoPE scaling has no short_factor"),
        (json!({ "rope_scaling": { "factor": 2 } }), "has no rope_type"),
        (json!({ "rope_scaling": { "type": "linear" } }), "has no factor"),
        (json!({ "partial_rotary_factor": 0.75 }), "partial_rotary_factor is 0.75, only 1"),
        (json!({ "rope_theta": -1 }), "rope_theta is -1, a number above 0"),
        (json!({ "hidden_size": "absent" }), "hidden_size is missing"),
        (json!({ "hidden_size": 0 }), "hidden_size is 0, 1 to"),
        (json!({ "vocab_size": 1.5 }), "vocab_size is 1.5, a whole number"),
        (json!({ "num_hidden_layers": u64::MAX }), "num_hidden_layers is 18446744073709551615, 1 to"),
        (json!({ "hidden_size": 65 }), "hidden_size 65 is no multiple of num_attention_heads 4"),
        (json!({ "num_key_value_heads": 3 }), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (json!({ "head_dim": 15 }), "head_dim is 15, an even number"),
        (json!({ "eos_token_id": "</s>" }), "eos_token_id is \"</s>\", token ids"),
        (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings is 1, true or false"),
    ];
    for (changes, expected) in cases {
        let message = refusal(changes);
        assert!(message.contains(expected) && !message.contains('\n'), "{expected:?} is not in {message:?}");
    }
    assert!(ModelConfig::from_json(&json!([])).is_err());
}

#[test]
fn presets() {
    let shapes = |name: &str| {
        let config = ModelConfig::preset(name).expect(name);
        (config.layers.len(), Projection::ALL.map(|projection| config.shape(0, projection)))
    };
    let llama = (32, [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]);
    assert_eq!(shapes("Meta-Llama-3-8B-Instruct"), llama);
    assert_eq!(shapes("meta-llama/Meta-Llama-3-8B-Instruct"), llama);
    let large = (80, [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)]);
    assert_eq!(shapes("Meta-Llama-3-70B-Instruct"), large);
    let phi = (40, [(5120, 7680), (5120, 5120), (5120, 35840), (17920, 5120)]);
    assert_eq!(shapes("Phi-3-medium-4k-instruct"), phi);
    assert_eq!(ModelConfig::preset("Phi-3"), None);
    let newer = [
        ("Qwen3-8B", (36, [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)])),
        ("Qwen/Qwen3-14B", (40, [(5120, 7168), (5120, 5120), (5120, 34816), (17408, 5120)])),
        ("Qwen2.5-7B-Instruct", (28, [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)])),
        ("Llama-3.2-1B-Instruct", (16, [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)])),
        ("Llama-3.2-3B-Instruct", (28, [(3072, 5120), (3072, 3072), (3072, 16384), (8192, 3072)])),
        ("microsoft/phi-4", (40, [(5120, 7680), (5120, 5120), (5120, 35840), (17920, 5120)])),
        ("gemma-3-12b-it", (48, [(3840, 8192), (4096, 3840), (3840, 30720), (15360, 3840)])),
        ("Mistral-Small-3.1-24B-Instruct-2503", (40, [(5120, 6144), (4096, 5120), (5120, 65536), (32768, 5120)])),
    ];
    for (name, expected) in newer {
        assert_eq!(shapes(name), expected, "{name}");
    }
    // Weights of all layers, embedding and head: what the name of each promises.
    let billions = |name: &str| {
        let config = ModelConfig::preset(name).expect(name);
        let layers: usize = (0..config.layers.len())
            .flat_map(|layer| Projection::ALL.map(|projection| config.shape(layer, projection)))
            .map(|(columns, rows)| columns * rows)
            .sum();
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        (layers + tables * config.vocab_size * config.hidden_size) as f64 / 1e9
    };
    let promised = [8.0, 70.6, 14.0, 1.2, 3.2, 7.6, 8.2, 14.8, 14.7, 11.8, 23.6];
    for (name, promised) in ModelConfig::PRESETS.into_iter().zip(promised) {
        assert!((billions(name) - promised).abs() < 0.06, "{name} has {:.2} billion weights", billions(name));
    }
}

/// The fields of real models' `config.json` that say what to compute, as they are published.
#[test]
fn published_configurations() {
    let llama = |hidden: u64, inner: u64, layers: u64, heads: u64, kv: u64, more: Value| {
        let base = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "attention_bias": false, "bos_token_id": 128000, "max_position_embeddings": 131072,
        });
        merged(base, &more)
    };
    let scaling = |factor: f64| {
        json!({ "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3" })
    };
    let mistral = json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false,
    });
    let phi = json!({
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null,
        "sliding_window": 2047, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "attention_bias": false, "bos_token_id": 1, "eos_token_id": 32000, "tie_word_embeddings": false,
    });
    let qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "max_window_layers": 28, "use_sliding_window": false, "max_position_embeddings": 32768,
        "bos_token_id": 151643, "eos_token_id": 151645, "tie_word_embeddings": false,
    });
    let small_qwen = json!({
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_window_layers": 21, "sliding_window": 32768,
        "tie_word_embeddings": true,
    });
    let medium = json!({
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 10,
    });
    let v3 = json!({ "vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": null });
    let (ends, tied) = (json!({ "eos_token_id": [128001, 128008, 128009] }), json!({ "tie_word_embeddings": true }));
    let smollm2 = json!({
        "rope_theta": 100000, "rope_scaling": null, "rope_interleaved": false, "is_llama_config": true,
        "vocab_size": 49152, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    });
    // The model, its configuration; (head_dim, qkv rows), window, scaled, tied.
    let cases = [
        ("Llama 3 8B", llama(4096, 14336, 32, 32, 8, json!({})), (128, 6144), None, false, false),
        (
            "Llama 3.1 8B",
            merged(llama(4096, 14336, 32, 32, 8, json!({ "rope_scaling": scaling(8.0) })), &ends),
            (128, 6144),
            None,
            true,
            false,
        ),
        (
            "Llama 3.2 1B",
            merged(llama(2048, 8192, 16, 32, 8, json!({ "rope_scaling": scaling(32.0), "head_dim": 64 })), &tied),
            (64, 3072),
            None,
            true,
            true,
        ),
        ("Mistral 7B v0.1", mistral.clone(), (128, 6144), Some(4096), false, false),
        ("Mistral 7B v0.3", merged(mistral, &v3), (128, 6144), None, false, false),
        ("Phi-3 mini 4k", phi.clone(), (96, 9216), Some(2047), false, false),
        ("Phi-3 medium 4k", merged(phi, &medium), (128, 7680), Some(2047), false, false),
        ("Qwen2.5 7B", qwen.clone(), (128, 4608), None, false, false),
        ("Qwen2.5 0.5B", merged(qwen, &small_qwen), (64, 1152), None, false, true),
        ("SmolLM2 135M", merged(llama(576, 1536, 30, 9, 3, smollm2), &tied), (64, 960), None, false, true),
    ];
    for (name, json, (head_dim, qkv), window, scaled, tied) in cases {
        let config = ModelConfig::from_json(&json).expect(name);
        let read = Read::of(&config);
        assert_eq!((read.head_dim, config.shape(0, Projection::Qkv).1), (head_dim, qkv), "{name}");
        assert_eq!((read.sliding_window, read.tie_word_embeddings), (window, tied), "{name}");
        assert_eq!(read.rope_scaling != RopeScaling::None, scaled, "{name}");
    }
}

#[test]
fn biases() {
    let all = |changes: Value| {
        let config = config(changes);
        Projection::ALL.map(|p| config.biased.contains(&p))
    };
    assert_eq!(all(json!({})), [false; 4]);
    assert_eq!(all(json!({ "attention_bias": true })), [true, true, false, false]);
    assert_eq!(all(json!({ "mlp_bias": true })), [false, false, true, true]);
    assert_eq!(all(json!({ "model_type": "phi3", "attention_bias": true })), [false; 4], "Phi-3 ignores it");
    assert_eq!(all(json!({ "model_type": "qwen2" })), [true, false, false, false]);
    assert!(refusal(json!({ "mlp_bias": 1 })).contains("mlp_bias is 1"));
}
