//! What each family reads of its `config.json`, and what its class in transformers assumes where nothing is said.

use serde_json::{Value, json};

use super::{config, merged, read, refusal, windows};
use crate::config::families::ALL;
use crate::config::{LayerNorm, ModelConfig, NormPlacement, Pairing, Projection, QkNorm, QueryScaling};

/// Every type of text model.
fn types_of_models() -> Vec<&'static str> {
    ALL.iter().flat_map(|family| family.model_types).map(|(name, _)| *name).collect()
}

/// What a family needs besides what all do.
fn of(model_type: &str, changes: Value) -> Value {
    let mut base = json!({ "model_type": model_type });
    if model_type == "ministral3" {
        base["rope_parameters"] = json!({ "rope_type": "yarn", "factor": 4, "llama_4_scaling_beta": 0.1 });
    }
    merged(base, &changes)
}

/// All but the text that it was read from.
fn computed(changes: Value) -> ModelConfig {
    ModelConfig { json: Value::Null, ..config(changes) }
}

/// Unfinished work is gone on with if the configuration prints alike: nothing in it may differ from run to run.
#[test]
fn a_configuration_prints_no_addresses() {
    let is_fixed = |printed: &str| !printed.contains("0x");
    for model_type in types_of_models() {
        let printed = format!("{:?}", computed(of(model_type, json!({}))));
        assert!(printed.contains("family: ") && is_fixed(&printed), "{printed}");
    }
    let function: fn() -> Vec<&'static str> = types_of_models;
    assert!(!is_fixed(&format!("{function:?}")), "the comparison can fail");
}

#[test]
fn what_classes_assume() {
    let absent = || json!({ "head_dim": "absent", "num_key_value_heads": "absent", "num_attention_heads": 128 });
    let shared = [
        // Type, (head_dim, kv heads), the head is the embedding.
        ("llama", (16, 128), false),
        ("mistral", (16, 8), false),
        ("ministral3", (128, 8), false),
        ("phi3", (16, 128), false),
        ("qwen2", (16, 32), false),
        ("qwen3", (128, 32), false),
        ("smollm3", (16, 4), true),
        ("gemma2", (256, 4), true),
        ("gemma3_text", (256, 4), true),
        ("olmo2", (16, 128), false),
        ("olmo3", (16, 128), false),
        ("granite", (16, 128), false),
        ("glm4", (128, 2), false),
    ];
    assert_eq!(shared.map(|(name, ..)| name).to_vec(), types_of_models());
    for (name, (head_dim, kv_heads), tied) in shared {
        let read = read(of(name, merged(absent(), &json!({ "hidden_size": 2048 }))));
        assert_eq!((read.head_dim, read.num_kv_heads, read.tie_word_embeddings), (head_dim, kv_heads, tied), "{name}");
    }
    let attention = |changes: Value| config(changes).layers[0].attention().clone();
    assert_eq!(attention(of("mistral", json!({}))).window, Some(4096));
    assert_eq!(attention(of("mistral", json!({ "sliding_window": null }))).window, None);
    assert_eq!(attention(of("ministral3", json!({}))).window, None);
    assert_eq!(windows(of("qwen3", json!({ "use_sliding_window": true, "max_window_layers": 2 })))[2], Some(4096));
    let gemma = attention(of("gemma2", json!({})));
    assert_eq!((gemma.scale, gemma.softcap), (1.0 / 16.0, Some(50.0)));
    assert_eq!(config(of("gemma2", json!({}))).logit_softcap, Some(30.0));
    let null = json!({ "attn_logit_softcapping": null, "final_logit_softcapping": null });
    assert_eq!(attention(of("gemma2", null.clone())).softcap, None);
    assert_eq!(config(of("gemma2", null)).logit_softcap, None);
    assert_eq!(config(of("gemma3_text", json!({ "final_logit_softcapping": 20.0 }))).logit_softcap, Some(20.0));
    assert_eq!(config(of("gemma3_text", json!({}))).embedding_scale, 8.0);
    assert_eq!(attention(of("granite", json!({}))).scale, 1.0);
    assert_eq!(config(of("smollm3", json!({}))).ropes[0].theta, 2e6);
    let eps = |name: &str| config(of(name, json!({ "rms_norm_eps": "absent" }))).rms_norm_eps;
    assert_eq!([eps("gemma3_text"), eps("olmo2"), eps("glm4")], [1e-6, 1e-5, 1.5625e-7]);
    let biased = |changes: Value| config(changes).biased;
    assert_eq!(biased(of("glm4", json!({}))), [Projection::Qkv]);
    assert_eq!(biased(of("glm4", json!({ "attention_bias": false }))), []);
    assert_eq!(biased(of("qwen3", json!({ "attention_bias": true }))), [Projection::Qkv, Projection::O]);
    assert_eq!(biased(of("smollm3", json!({ "mlp_bias": true }))), [Projection::GateUp, Projection::Down]);
}

#[test]
fn shapes_of_layers() {
    let attention = |name: &str| config(of(name, json!({}))).layers[0].attention().clone();
    let norms = |name: &str| config(of(name, json!({}))).layers[0].norms;
    for name in ["qwen3", "gemma3_text"] {
        assert_eq!(attention(name).qk_norm, Some(QkNorm::PerHead), "{name}");
    }
    for name in ["olmo2", "olmo3"] {
        assert_eq!(attention(name).qk_norm, Some(QkNorm::WholeRow), "{name}");
        assert_eq!(norms(name), NormPlacement::After, "{name}");
    }
    for name in ["gemma2", "gemma3_text", "glm4"] {
        assert_eq!(norms(name), NormPlacement::Both, "{name}");
    }
    // Each norm that a layer has, the family has a name for, and no two the same.
    for name in types_of_models() {
        let config = config(of(name, json!({})));
        let own: Vec<_> = config.layers[0].norms(64).into_iter().map(|(norm, _)| norm).collect();
        let mut modules: Vec<_> = own.iter().map(|norm| config.family.norm(*norm).expect(name)).collect();
        assert_eq!(own.len(), config.family.norms.len(), "{name}");
        modules.sort_unstable();
        modules.dedup();
        assert_eq!(modules.len(), own.len(), "{name}");
    }
}

#[test]
fn windows_of_each_family() {
    let (wide, slides, full) = (Some(32), "sliding_attention", "full_attention");
    let layers = |name: &str, changes: Value| {
        windows(of(name, merged(json!({ "num_hidden_layers": 6, "sliding_window": 32 }), &changes)))
    };
    assert_eq!(layers("gemma2", json!({})), [wide, None, wide, None, wide, None]);
    assert_eq!(layers("gemma3_text", json!({})), [wide, wide, wide, wide, wide, None]);
    let pattern = json!({ "sliding_window_pattern": 2, "_sliding_window_pattern": 6 });
    assert_eq!(layers("gemma3_text", pattern), [wide, None, wide, None, wide, None]);
    assert_eq!(layers("olmo3", json!({})), [wide, wide, wide, None, wide, wide]);
    let listed = json!({ "layer_types": [full, slides, full, full, full, full] });
    for name in ["gemma2", "gemma3_text", "olmo3"] {
        assert_eq!(layers(name, listed.clone()), [None, wide, None, None, None, None], "{name}");
    }
    for name in ["mistral", "ministral3", "phi3"] {
        assert_eq!(layers(name, listed.clone()), [wide; 6], "{name} slides in all layers or in none");
    }
    for name in ["llama", "olmo2", "granite", "glm4"] {
        assert_eq!(layers(name, listed.clone()), [None; 6], "{name} has no window");
    }
    let smollm = |changes: Value| layers("smollm3", merged(json!({ "use_sliding_window": true }), &changes));
    assert_eq!(smollm(json!({})), [None, None, None, wide, None, None]);
    assert_eq!(smollm(listed.clone()), [None, wide, None, None, None, None]);
    assert_eq!(layers("smollm3", listed), [None; 6]);
}

#[test]
fn layers_without_rotation() {
    let rotated = |changes: Value| {
        let changes = of("smollm3", merged(json!({ "num_hidden_layers": 5 }), &changes));
        config(changes).layers.iter().map(|layer| layer.attention().rope.is_some()).collect::<Vec<_>>()
    };
    assert_eq!(rotated(json!({})), [true, true, true, false, true]);
    assert_eq!(rotated(json!({ "no_rope_layer_interval": 2 })), [true, false, true, false, true]);
    let listed = json!({ "no_rope_layers": [0, 1, 1, 1, 0], "no_rope_layer_interval": 2 });
    assert_eq!(rotated(listed), [false, true, true, true, false]);
    let refused = |list: Value| refusal(of("smollm3", json!({ "no_rope_layers": list })));
    let wanted = "no_rope_layers has 2 entries, as many as num_hidden_layers, 3, are expected";
    assert_eq!(refused(json!([1, 0])), wanted);
    assert_eq!(refused(json!([1, 0, 2])), "no_rope_layers has 2, 1 (rotated) or 0 (not rotated) is expected");
    assert_eq!(refused(json!(4)), "no_rope_layers is 4, a list is expected");
}

#[test]
fn multipliers() {
    let granite = config(of(
        "granite",
        json!({
            "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.5,
            "logits_scaling": 8.0,
        }),
    ));
    assert_eq!((granite.layers[0].attention().scale, granite.embedding_scale), (0.25, 12.0));
    assert_eq!((granite.residual_multiplier, granite.logit_scale), (0.5, 0.125));
    assert_eq!((granite.embedding_factor(), granite.stream_eps()), (24.0, 4e-6));
    let zero = refusal(of("granite", json!({ "residual_multiplier": 0 })));
    assert_eq!(zero, "residual_multiplier is 0, a number above 0 is expected");

    let ministral = |rope: Value| {
        let base = json!({ "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32 });
        of("ministral3", json!({ "rope_parameters": merged(base, &rope) }))
    };
    let beta = json!({ "llama_4_scaling_beta": 0.1, "max_position_embeddings": 128 });
    let scaling = |changes: Value| config(changes).layers[0].attention().query_scaling;
    assert_eq!(scaling(ministral(beta.clone())), Some(QueryScaling { beta: 0.1, original: 32 }));
    let beside = merged(ministral(beta), &json!({ "original_max_position_embeddings": 64 }));
    assert_eq!(scaling(beside), Some(QueryScaling { beta: 0.1, original: 64 }));
    assert_eq!(refusal(ministral(json!({}))), "llama_4_scaling_beta is missing in rope_parameters");
    let negative = refusal(ministral(json!({ "llama_4_scaling_beta": -0.1 })));
    assert_eq!(negative, "rope_parameters: llama_4_scaling_beta is -0.1, a number of 0 or more is expected");
    let other = refusal(json!({ "rope_scaling": { "type": "yarn", "factor": 2, "llama_4_scaling_beta": 0.1 } }));
    assert!(other.contains("llama_4_scaling_beta is 0.1, which is not known for the RoPE type \"yarn\""), "{other}");
}

/// A field that a class of transformers never reads changes nothing.
#[test]
fn what_classes_never_read() {
    let ignored = [
        ("gemma3_text", json!({ "attn_logit_softcapping": 50.0, "hidden_act": "gelu", "mlp_bias": true })),
        ("gemma2", json!({ "hidden_act": "silu", "sliding_window_pattern": 7, "sliding_window_size": 9 })),
        ("mistral", json!({ "layer_types": ["full_attention"], "attention_bias": true, "max_window_layers": 1 })),
        ("phi3", json!({ "attention_bias": true, "mlp_bias": true, "lm_head_bias": false, "full_attn_mod": 1 })),
        ("qwen3", json!({ "sliding_window": 3, "max_window_layers": 0, "mlp_bias": true })),
        ("smollm3", json!({ "sliding_window": 3, "max_window_layers": 0 })),
        ("olmo2", json!({ "sliding_window": 3, "layer_types": [], "mlp_bias": true })),
        ("granite", json!({ "sliding_window": 3, "query_pre_attn_scalar": 3 })),
        ("glm4", json!({ "sliding_window": 3, "mlp_bias": true, "use_qk_norm": true })),
        ("llama", json!({ "sliding_window": 3, "embedding_multiplier": 3, "no_rope_layers": [0] })),
    ];
    for (name, fields) in ignored {
        assert_eq!(computed(of(name, fields.clone())), computed(of(name, json!({}))), "{name}: {fields}");
    }
}

#[test]
fn contradictions() {
    let types = |count| vec!["full_attention"; count];
    for name in ["qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo3"] {
        let message = refusal(of(name, json!({ "layer_types": types(2) })));
        assert_eq!(message, "layer_types has 2 entries, as many as num_hidden_layers, 3, are expected", "{name}");
        let message = refusal(of(name, json!({ "layer_types": ["full_attention", "chunked_attention", "x"] })));
        let wanted = "layer_types has \"chunked_attention\", \"full_attention\" or \"sliding_attention\" is expected";
        assert_eq!(message, wanted, "{name}");
    }
    for name in ["mistral", "ministral3", "phi3", "gemma2", "gemma3_text", "olmo3"] {
        let message = refusal(of(name, json!({ "sliding_window": 0 })));
        assert_eq!(message, "sliding_window is 0, 1 to 16777216 is expected", "{name}");
    }
    for name in types_of_models() {
        let message = refusal(of(name, json!({ "head_dim": 15, "partial_rotary_factor": 1.0 })));
        assert_eq!(message, "head_dim is 15, an even number is expected", "{name}");
        let message = refusal(of(name, json!({ "num_key_value_heads": 3 })));
        assert_eq!(message, "num_attention_heads 4 is no multiple of num_key_value_heads 3", "{name}");
    }
    let wanted = "use_bidirectional_attention is true, only false is supported: tokens see none after them";
    for name in ["gemma2", "gemma3_text"] {
        assert_eq!(refusal(of(name, json!({ "use_bidirectional_attention": true }))), wanted);
        let message = refusal(of(name, json!({ "hidden_activation": "gelu" })));
        assert_eq!(message, "hidden_activation \"gelu\" is unknown, gelu_pytorch_tanh is expected");
    }
    for name in types_of_models() {
        for value in [json!(false), Value::Null, json!(0)] {
            let message = refusal(of(name, json!({ "is_causal": value })));
            let wanted = format!("is_causal is {value}, only true is supported: tokens see none after them");
            assert_eq!(message, wanted, "{name}");
        }
        assert_eq!(computed(of(name, json!({ "is_causal": true }))), computed(of(name, json!({}))), "{name}");
    }
    let message = refusal(of("gemma3_text", json!({ "query_pre_attn_scalar": 0 })));
    assert_eq!(message, "query_pre_attn_scalar is 0, a number above 0 is expected");
}

/// A directory of a model that sees images: the part about text is read, special tokens and the head are said outside.
#[test]
fn models_that_see_images() {
    let text = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
        "model_type": "mistral", "sliding_window": null, "eos_token_id": 9, "bos_token_id": 8,
    });
    let whole = |changes: Value| {
        let base = json!({ "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"],
            "vision_config": { "hidden_size": 5 }, "text_config": text });
        ModelConfig::from_json(&merged(base, &changes))
    };
    let outer = whole(json!({ "eos_token_id": [1, 5] })).expect("it is read");
    assert_eq!((outer.bos_token_id, outer.eos_token_ids.clone()), (Some(8), vec![1, 5]));
    assert_eq!((outer.family.model_types[0].0, outer.hidden_size), ("mistral", 64));
    assert!(outer.tie_word_embeddings, "the class of the whole says so");
    assert!(!whole(json!({ "tie_word_embeddings": false })).expect("it is read").tie_word_embeddings);
    let inside = json!({ "text_config": merged(text.clone(), &json!({ "tie_word_embeddings": false })) });
    assert!(whole(inside).expect("it is read").tie_word_embeddings, "what is said inside is not looked at");
    assert_eq!(ModelConfig::from_json(&outer.json).expect("it is read again"), outer);

    let refused = |changes: Value| format!("{:#}", whole(changes).expect_err("a bad configuration"));
    let wanted = "text_config is missing: the part about text is expected in it";
    assert_eq!(refused(json!({ "text_config": null })), wanted);
    let of_type = |name: &str| json!({ "text_config": merged(text.clone(), &json!({ "model_type": name })) });
    let wanted = "text_config: model_type is \"qwen2\", mistral or ministral3 is expected inside mistral3";
    assert_eq!(refused(of_type("qwen2")), wanted);
    assert!(refused(of_type("mistral4")).starts_with("text_config: model_type \"mistral4\" is not supported, the"));
    let wanted = "architectures is [\"MistralForCausalLM\"], Mistral3ForConditionalGeneration is expected where";
    assert!(refused(json!({ "architectures": ["MistralForCausalLM"] })).starts_with(wanted));
    let none = json!({ "text_config": merged(text.clone(), &json!({ "hidden_size": 0 })) });
    assert_eq!(refused(none), "text_config: hidden_size is 0, 1 to 16777216 is expected");
}

/// A family that is known and not supported is refused by what the decoder lacks for it, whatever else it says.
#[test]
fn families_that_the_decoder_lacks_something_for() {
    for (name, lacks) in [
        ("gpt_oss", "mixture of experts, attention sinks"),
        ("qwen3_moe", "mixture of experts"),
        ("mixtral", "mixture of experts"),
        ("glm4_moe", "mixture of experts"),
        ("qwen3_5", "gated DeltaNet layers, gated attention"),
        ("qwen3_5_moe", "gated DeltaNet layers, gated attention, mixture of experts"),
        ("qwen3_next", "gated DeltaNet layers, gated attention, mixture of experts"),
        ("gemma4", "a head_dim for each type of layer"),
        ("gemma4_text", "a head_dim for each type of layer"),
        ("deepseek_v3", "latent attention, mixture of experts"),
        ("lfm2", "short convolutions"),
        ("llama4", "mixture of experts, chunked attention"),
    ] {
        let message = refusal(json!({ "model_type": name, "hidden_size": "absent", "rope_scaling": 5 }));
        let start = format!("model_type {name:?} is not supported, the decoder lacks {lacks}");
        assert!(message.starts_with(&start) && !message.contains('\n'), "{message}");
        assert!(message.contains(": a dense model of type llama, ") && message.ends_with("is expected"), "{message}");
    }
    for name in types_of_models() {
        assert_eq!(crate::config::families::lacking(name), None, "{name}");
    }
}

/// What moves when a model is read: rows of queries and keys within their heads, and γ by one.
#[test]
fn rows_and_norms_as_they_are_kept() {
    let sizes = json!({ "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16 });
    let sized = |name: &str, changes: Value| config(of(name, merged(sizes.clone(), &changes)));
    let glm = sized("glm4", json!({}));
    let head = [0, 2, 4, 5, 1, 3, 6, 7];
    let expected: Vec<usize> = (0..3).flat_map(|i| head.map(|row| 8 * i + row)).chain(24..32).collect();
    assert_eq!(glm.row_order(0, Projection::Qkv, None), Some(expected));
    for other in [Projection::O, Projection::GateUp, Projection::Down] {
        assert_eq!(glm.row_order(0, other, None), None);
    }
    let phi = sized("phi3", json!({ "partial_rotary_factor": 0.5 })).row_order(0, Projection::Qkv, None);
    assert_eq!(phi.expect("rows move")[..9], [0, 1, 4, 5, 2, 3, 6, 7, 8]);
    assert_eq!(sized("llama", json!({})).row_order(0, Projection::Qkv, None), None);
    let neighbours = Some(Pairing::Neighbours);
    let llama = sized("llama", json!({})).row_order(0, Projection::Qkv, neighbours);
    assert_eq!(llama.expect("rows move")[..9], [0, 2, 4, 6, 1, 3, 5, 7, 8]);
    // A layer that rotates nothing is stored in the order of the others.
    let still = sized("smollm3", json!({ "no_rope_layers": [0, 1, 1] }));
    assert_eq!(still.row_order(0, Projection::Qkv, None), None);
    let order = |layer| still.row_order(layer, Projection::Qkv, neighbours);
    assert_eq!(order(0), order(1));

    let gemma = sized("gemma3_text", json!({}));
    let gamma = gemma.stored_gamma(Some((0, LayerNorm::Query)), vec![-1.0, 0.0, 0.5]);
    assert_eq!(gamma, [0.0, 1.0, 1.5]);
    assert_eq!(gemma.stored_gamma(None, vec![0.25]), [1.25], "the last norm too");
    assert_eq!(glm.stored_gamma(None, vec![0.25]), [0.25]);
}
