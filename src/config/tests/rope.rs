//! How `config.json` says that heads are rotated.

use serde_json::{Value, json};

use super::{config, merged, read, refusal};
use crate::config::{Pairing, RopeScaling};

/// What Llama's class and most others take.
const TYPES: &str = "default, linear, llama3, yarn or longrope";

#[test]
fn both_spellings_of_rope() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(500000.0);
    let old = read(json!({ "rope_theta": 500000.0, "rope_scaling": scaling }));
    assert_eq!(old, read(json!({ "rope_parameters": parameters })));
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    assert_eq!((old.rope_theta, old.rope_scaling), (500000.0, expected));
    let linear = read(json!({ "rope_scaling": { "type": "linear", "factor": 2 } }));
    assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    let plain = read(json!({ "rope_scaling": null, "rope_parameters": { "rope_theta": 5, "rope_type": "default" } }));
    assert_eq!((plain.rope_theta, plain.rope_scaling), (5.0, RopeScaling::None));
    let untyped = read(json!({ "rope_theta": 7, "rope_parameters": { "rope_theta": 7 } }));
    assert_eq!((untyped.rope_theta, untyped.rope_scaling), (7.0, RopeScaling::None));
}

/// One way to say how frequencies are scaled, in each of the objects that may say it, alone or in both.
#[test]
fn every_spelling_of_rope_scaling() {
    let linear = |factor| RopeScaling::Linear { factor };
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    });
    let as_llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    let cases = [
        (Value::Null, RopeScaling::None),
        (json!({}), RopeScaling::None),
        (json!({ "rope_theta": 10000 }), RopeScaling::None),
        (json!({ "partial_rotary_factor": 1.0 }), RopeScaling::None),
        (json!({ "type": "default" }), RopeScaling::None),
        (json!({ "rope_type": "default" }), RopeScaling::None),
        (json!({ "rope_type": "default", "type": "default" }), RopeScaling::None),
        (json!({ "rope_type": "default", "factor": null }), RopeScaling::None),
        // transformers does not look at the factor of this type.
        (json!({ "rope_type": "default", "factor": 4.0 }), RopeScaling::None),
        (json!({ "type": "linear", "factor": 4.0 }), linear(4.0)),
        (json!({ "rope_type": "linear", "factor": 4 }), linear(4.0)),
        (json!({ "rope_type": "linear", "type": "linear", "factor": 4 }), linear(4.0)),
        (json!({ "rope_type": null, "type": "linear", "factor": 4 }), linear(4.0)),
        (json!({ "rope_type": "linear", "type": null, "factor": 0.5 }), linear(0.5)),
        (json!({ "type": "linear", "factor": 4.0, "finetuned": true }), linear(4.0)),
        (json!({ "type": "linear", "factor": 4.0, "attention_factor": null }), linear(4.0)),
        (json!({ "type": "linear", "factor": 1 }), RopeScaling::None),
        (json!({ "rope_type": "linear", "factor": 1.0 }), RopeScaling::None),
        (llama3.clone(), as_llama3.clone()),
        (merged(llama3.clone(), &json!({ "rope_type": "absent", "type": "llama3" })), as_llama3),
    ];
    for (mut object, expected) in cases {
        if let Some(fields) = object.as_object_mut() {
            fields.retain(|_, value| *value != json!("absent"));
        }
        for changes in [
            json!({ "rope_scaling": object }),
            json!({ "rope_parameters": object }),
            json!({ "rope_scaling": object, "rope_parameters": object }),
            json!({ "rope_scaling": object, "rope_parameters": {} }),
            json!({ "rope_scaling": null, "rope_parameters": object }),
        ] {
            assert_eq!(read(changes.clone()).rope_scaling, expected, "{changes}");
        }
    }
}

#[test]
fn rope_scaling_that_is_not_understood() {
    let unknown = |kind: &str| format!("RoPE type \"{kind}\" is unknown, {TYPES} is expected");
    let mut cases = vec![
        (
            json!({ "factor": 4.0 }),
            format!("the RoPE scaling {{\"factor\":4.0}} has no rope_type, {TYPES} is expected"),
        ),
        (
            json!({ "type": null, "factor": 4.0 }),
            format!("the RoPE scaling {{\"type\":null,\"factor\":4.0}} has no rope_type, {TYPES} is expected"),
        ),
        (json!({ "type": "linear" }), "the RoPE scaling has no factor".into()),
        (json!({ "rope_type": "linear", "factor": null }), "the RoPE scaling has no factor".into()),
        (json!({ "type": "linear", "factor": "4.0" }), "factor is \"4.0\", a number above 0 is expected".into()),
        (json!({ "type": "linear", "factor": 0 }), "factor is 0, a number above 0 is expected".into()),
        (json!({ "type": "linear", "factor": -2.0 }), "factor is -2.0, a number above 0 is expected".into()),
        (json!({ "type": "linear", "factor": [4] }), "factor is [4], a number above 0 is expected".into()),
        (json!({ "type": 1 }), "type is 1, a string is expected".into()),
        (
            json!({ "rope_type": "linear", "type": "dynamic", "factor": 4 }),
            "rope_type is \"linear\", but type is \"dynamic\", leave one out".into(),
        ),
        (
            json!({ "rope_type": "default", "mrope_section": [2, 1, 1] }),
            "mrope_section is [2,1,1], which is not known for the RoPE type \"default\": leave it out if it changes \
             nothing"
                .into(),
        ),
        (
            json!({ "rope_type": "linear", "factor": 2, "attention_factor": 1.5 }),
            "attention_factor is 1.5, which is not known for the RoPE type \"linear\": leave it out if it changes \
             nothing"
                .into(),
        ),
        (
            json!({ "rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4 }),
            "the RoPE scaling has no factor".into(),
        ),
    ];
    let kinds = ["dynamic", "ntk", "su", "mrope", "proportional", "Linear", "none", ""];
    cases.extend(kinds.map(|kind| (json!({ "type": kind, "factor": 4.0 }), unknown(kind))));
    cases.extend(kinds.map(|kind| (json!({ "rope_type": kind, "factor": 1 }), unknown(kind))));
    for (object, expected) in cases {
        for name in ["rope_scaling", "rope_parameters"] {
            assert_eq!(refusal(json!({ name: object })), format!("{name}: {expected}"));
        }
    }
    for value in [json!("linear"), json!(4.0), json!([]), json!(false)] {
        for name in ["rope_scaling", "rope_parameters"] {
            let expected = format!("{name} is {value}, an object or null is expected");
            assert_eq!(refusal(json!({ name: value })), expected);
        }
    }
}

/// YaRN with some fields changed: the context was 128, four times that is read.
fn yarn(changes: Value) -> RopeScaling {
    let object = merged(json!({ "rope_type": "yarn", "factor": 4.0 }), &changes);
    let newer = read(json!({ "rope_parameters": object })).rope_scaling;
    assert_eq!(newer, read(json!({ "rope_scaling": object })).rope_scaling, "{object}");
    newer
}

#[test]
fn yarn_as_transformers_reads_it() {
    let expected = |beta_fast, beta_slow, truncate, attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 128.0,
        beta_fast,
        beta_slow,
        truncate,
        attention_factor,
    };
    let growth = |mscale: f64| 0.1 * mscale * 4f64.ln() + 1.0;
    let plain = expected(32.0, 1.0, true, growth(1.0));
    assert_eq!(yarn(json!({})), plain);
    assert_eq!(yarn(json!({ "attention_factor": null, "beta_fast": null, "finetuned": true })), plain);
    assert_eq!(yarn(json!({ "beta_fast": 16, "beta_slow": 2 })), expected(16.0, 2.0, true, growth(1.0)));
    assert_eq!(yarn(json!({ "truncate": false })), expected(32.0, 1.0, false, growth(1.0)));
    assert_eq!(yarn(json!({ "attention_factor": 1.5, "mscale": 1 })), expected(32.0, 1.0, true, 1.5));
    // Both of them, neither 0, or they do not count.
    let ratio = growth(1.0) / growth(0.5);
    assert_eq!(yarn(json!({ "mscale": 1.0, "mscale_all_dim": 0.5 })), expected(32.0, 1.0, true, ratio));
    assert_eq!(yarn(json!({ "mscale": 0.5, "mscale_all_dim": 0.5 })), expected(32.0, 1.0, true, 1.0));
    for one in [json!({ "mscale": 2.0 }), json!({ "mscale": 2.0, "mscale_all_dim": 0 }), json!({ "mscale_all_dim": 2 })]
    {
        assert_eq!(yarn(one), plain);
    }
    // What stands outside counts more than what stands inside.
    let original = |changes: Value| match read(changes).rope_scaling {
        RopeScaling::Yarn { original_max_position_embeddings, .. } => original_max_position_embeddings,
        other => panic!("{other:?}"),
    };
    let inside = json!({ "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64 });
    assert_eq!(original(json!({ "rope_scaling": inside })), 64.0);
    assert_eq!(original(json!({ "rope_scaling": inside, "original_max_position_embeddings": 32 })), 32.0);
}

/// Recipes leave `max_position_embeddings` at what it was before.
#[test]
fn yarn_stretches_the_context() {
    let context = |inside: Value, said: u64| {
        let object = merged(json!({ "rope_type": "yarn", "factor": 4.0 }), &inside);
        config(json!({ "rope_scaling": object, "max_position_embeddings": said })).max_position_embeddings
    };
    assert_eq!(context(json!({}), 32_768), 131_072);
    assert_eq!(context(json!({ "original_max_position_embeddings": 32_768 }), 40_960), 131_072);
    assert_eq!(context(json!({ "original_max_position_embeddings": 32_768 }), 131_072), 131_072);
    assert_eq!(context(json!({ "original_max_position_embeddings": 100 }), 1000), 1000);
    let llama3 = json!({ "type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 64 });
    assert_eq!(config(json!({ "rope_scaling": llama3 })).max_position_embeddings, 128);
}

#[test]
fn longrope_as_transformers_reads_it() {
    let divisors = |n: usize, last: f64| (0..n).map(|i| 1.0 + i as f64 * last).collect::<Vec<f64>>();
    let object = |changes: Value| {
        merged(
            json!({ "rope_type": "longrope", "short_factor": divisors(8, 0.1), "long_factor": divisors(8, 1.0) }),
            &changes,
        )
    };
    let phi = |changes: Value| {
        let base = json!({ "model_type": "phi3", "max_position_embeddings": 512,
            "original_max_position_embeddings": 32 });
        read(merged(base, &changes)).rope_scaling
    };
    let expected = |original, attention_factor| RopeScaling::LongRope {
        short_factor: divisors(8, 0.1),
        long_factor: divisors(8, 1.0),
        original_max_position_embeddings: original,
        attention_factor,
    };
    let grown = |factor: f64, original: f64| (1.0 + factor.ln() / original.ln()).sqrt();
    assert_eq!(phi(json!({ "rope_scaling": object(json!({})) })), expected(32, grown(16.0, 32.0)));
    for older in ["su", "yarn"] {
        let scaling = object(json!({ "rope_type": null, "type": older }));
        assert_eq!(phi(json!({ "rope_scaling": scaling })), expected(32, grown(16.0, 32.0)), "{older}");
    }
    let renamed = object(json!({ "type": "su" }));
    assert_eq!(phi(json!({ "rope_parameters": renamed })), expected(32, grown(16.0, 32.0)));
    let inside = object(json!({ "original_max_position_embeddings": 64 }));
    assert_eq!(phi(json!({ "rope_scaling": inside })), expected(32, grown(16.0, 32.0)), "outside counts");
    let said = object(json!({ "factor": 4.0 }));
    assert_eq!(phi(json!({ "rope_scaling": said })), expected(32, grown(4.0, 32.0)));
    let said = object(json!({ "factor": 4.0, "attention_factor": 1.25 }));
    assert_eq!(phi(json!({ "rope_scaling": said })), expected(32, 1.25));
    let same = json!({ "rope_scaling": object(json!({})), "max_position_embeddings": 32 });
    assert_eq!(phi(same), expected(32, 1.0));
    // The class has an original context of its own.
    let silent = json!({ "rope_scaling": object(json!({})), "original_max_position_embeddings": null });
    assert_eq!(phi(silent), expected(512, 1.0));
    let absent = json!({ "model_type": "phi3", "rope_scaling": object(json!({})), "max_position_embeddings": 131_072 });
    assert_eq!(read(absent).rope_scaling, expected(4096, grown(32.0, 4096.0)));

    let refused = |changes: Value| {
        refusal(json!({ "model_type": "phi3", "rope_scaling": object(changes) })).replace("rope_scaling: ", "")
    };
    let wanted = "short_factor has 3 numbers, one for each pair of channels, 8, is expected";
    assert_eq!(refused(json!({ "short_factor": [1, 1, 1] })), wanted);
    let wanted = "long_factor is [1.0,0], a list of numbers above 0 is expected";
    assert_eq!(refused(json!({ "long_factor": [1.0, 0] })), wanted);
    assert_eq!(refused(json!({ "long_factor": null })), "the RoPE scaling has no long_factor");
    let wanted = "RoPE type \"linear\" is unknown, default, longrope, su or yarn is expected";
    assert_eq!(refused(json!({ "rope_type": "linear", "factor": 2 })), wanted);
    let wanted = "rope_type is \"longrope\", but type is \"default\", leave one out";
    assert_eq!(refused(json!({ "type": "default" })), wanted);
}

#[test]
fn parts_of_heads() {
    let rope = |changes: Value| config(changes).ropes[0].clone();
    let half = rope(json!({ "model_type": "glm4", "head_dim": 16 }));
    assert_eq!((half.rotary_dim, half.pairing), (8, Pairing::Neighbours));
    let inside = json!({ "rope_type": "default", "partial_rotary_factor": 0.25 });
    assert_eq!(rope(json!({ "model_type": "glm4", "head_dim": 16, "rope_parameters": inside })).rotary_dim, 4);
    let phi = rope(json!({ "model_type": "phi3", "partial_rotary_factor": 0.75 }));
    assert_eq!((phi.rotary_dim, phi.head_dim, phi.pairing), (12, 16, Pairing::Halves));
    let wanted = "partial_rotary_factor is 0.2 of a head_dim of 16, an even number of channels is expected to turn";
    assert_eq!(refusal(json!({ "model_type": "phi3", "partial_rotary_factor": 0.2 })), wanted);
    assert!(refusal(json!({ "model_type": "phi3", "partial_rotary_factor": 1.5 })).contains("is 1.5 of a head_dim"));
    let twice = json!({ "model_type": "phi3", "partial_rotary_factor": 0.5, "rope_scaling": inside });
    assert!(refusal(twice).starts_with("partial_rotary_factor is 0.5 in one place and 0.25 in another"));
    let wanted = "partial_rotary_factor is 0.5, only 1 is supported";
    for family in
        ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite"]
    {
        assert_eq!(refusal(json!({ "model_type": family, "partial_rotary_factor": 0.5 })), wanted, "{family}");
    }
}

/// A rotation for layers that see the whole text, another for those that slide.
#[test]
fn rotations_of_layer_types() {
    let ropes = |changes: Value| {
        let config = config(changes);
        let [full, sliding] = &config.ropes[..] else { panic!("two rotations are expected") };
        ((full.theta, full.scaling.clone()), (sliding.theta, sliding.scaling.clone()))
    };
    let none = RopeScaling::None;
    let linear = RopeScaling::Linear { factor: 8.0 };
    let scaled = json!({ "rope_type": "linear", "factor": 8.0 });
    let gemma = |changes: Value| ropes(merged(json!({ "model_type": "gemma3_text" }), &changes));
    assert_eq!(gemma(json!({})), ((1e6, none.clone()), (1e4, none.clone())));
    let older = json!({ "rope_theta": 5e5, "rope_local_base_freq": 7e3, "rope_scaling": scaled });
    assert_eq!(gemma(older), ((5e5, linear.clone()), (7e3, none.clone())));
    let newer = json!({ "rope_parameters": {
        "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 5e5 },
        "sliding_attention": { "rope_type": "default", "rope_theta": 7e3 },
    }});
    assert_eq!(gemma(newer), ((5e5, linear), (7e3, none.clone())));
    assert_eq!(
        gemma(json!({ "rope_parameters": { "full_attention": null } })),
        ((1e6, none.clone()), (1e4, none.clone()))
    );

    // OLMo 3's layers that slide have a base of their own, which no older file says.
    let olmo = |changes: Value| ropes(merged(json!({ "model_type": "olmo3" }), &changes));
    assert_eq!(olmo(json!({ "rope_theta": 7.0 })), ((7.0, none.clone()), (5e5, none.clone())));
    let truncates = |changes: Value| match olmo(changes).0.1 {
        RopeScaling::Yarn { truncate, .. } => truncate,
        other => panic!("{other:?}"),
    };
    let yarn = json!({ "rope_type": "yarn", "factor": 4, "truncate": false });
    // With an object for each type of layer, it is read beside them.
    assert!(truncates(json!({ "rope_scaling": yarn })));
    assert!(truncates(json!({ "rope_parameters": { "full_attention": yarn } })));
    assert!(!truncates(json!({ "rope_parameters": { "full_attention": yarn, "truncate": false } })));

    let refused = |changes: Value| refusal(merged(json!({ "model_type": "gemma3_text" }), &changes));
    let wanted = "rope_parameters: rope_theta is 5, one object for full_attention and one for sliding_attention are \
                  expected";
    assert_eq!(refused(json!({ "rope_parameters": { "rope_theta": 5 } })), wanted);
    let twice = json!({ "rope_theta": 6, "rope_parameters": { "full_attention": { "rope_theta": 5 } } });
    assert_eq!(refused(twice), "rope_theta is 5 in one place and 6 in another, leave one out");
    let twice = json!({ "rope_scaling": scaled, "rope_parameters": { "full_attention": { "rope_type": "default" } } });
    assert_eq!(refused(twice), "rope_parameters is None, but rope_scaling is Linear { factor: 8.0 }, leave one out");
    let of_sliding = json!({ "rope_parameters": { "sliding_attention": { "type": "ntk" } } });
    assert_eq!(refused(of_sliding), format!("rope_parameters: RoPE type \"ntk\" is unknown, {TYPES} is expected"));
}

/// Logarithms that have no answer, and contexts beyond all that can be kept.
#[test]
fn hostile_numbers() {
    let yarn = |changes: Value| refusal(merged(json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } }), &changes));
    assert_eq!(yarn(json!({ "rope_theta": 1 })), "rope_theta is 1, a number above 1 is expected with YaRN");
    let vast = refusal(json!({ "rope_scaling": { "type": "yarn", "factor": 1e300 } }));
    assert!(vast.starts_with("factor times original_max_position_embeddings is 128"), "{vast}");
    assert!(vast.ends_with(", 16777216 tokens at most are expected"), "{vast}");
    let ones = vec![1; 8];
    let short = json!({ "type": "longrope", "short_factor": ones, "long_factor": ones });
    let short = refusal(json!({ "rope_scaling": short, "original_max_position_embeddings": 1 }));
    assert_eq!(short, "rope_scaling: original_max_position_embeddings is 1, 2 or more is expected");
}
