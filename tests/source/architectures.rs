//! GGUFs of each architecture: their keys in the words of a `config.json`, their tensors' names, the order of their
//! rows.

use decdec::config::{Attention, LayerNorm, ModelConfig, Pairing, Projection, QueryScaling, RopeScaling};
use decdec::source::Source;
use decdec::weights::ModelWeights;

use super::fixtures::{self, Gguf, HEAD_DIM, HIDDEN, INTERMEDIATE, KV, LAYERS, Meta, VOCAB, values};
use super::{assert_says, matrix, message, model_type, open_gguf, permuted, small_gguf};

/// The tensors of a small model of this architecture.
fn tensors(architecture: &str) -> Vec<(String, Vec<usize>)> {
    let mut tensors = fixtures::small_tensor_shapes(VOCAB);
    let (left_out, added): (&[&str], &[(&str, &[usize])]) = match architecture {
        "qwen3" => (&[], &[("attn_q_norm", &[HEAD_DIM]), ("attn_k_norm", &[HEAD_DIM])]),
        "gemma2" => (&[], &[("post_attention_norm", &[HIDDEN]), ("post_ffw_norm", &[HIDDEN])]),
        "gemma3" => (
            &[],
            &[
                ("attn_q_norm", &[HEAD_DIM]),
                ("attn_k_norm", &[HEAD_DIM]),
                ("post_attention_norm", &[HIDDEN]),
                ("post_ffw_norm", &[HIDDEN]),
            ],
        ),
        "olmo2" => (
            &["attn_norm", "ffn_norm"],
            &[
                ("attn_q_norm", &[HIDDEN]),
                ("attn_k_norm", &[KV]),
                ("post_attention_norm", &[HIDDEN]),
                ("post_ffw_norm", &[HIDDEN]),
            ],
        ),
        "glm4" => (
            &["ffn_gate", "ffn_up"],
            &[
                ("ffn_up", &[2 * INTERMEDIATE, HIDDEN]),
                ("post_attention_norm", &[HIDDEN]),
                ("post_ffw_norm", &[HIDDEN]),
            ],
        ),
        "phi3" => (
            &["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"],
            &[("attn_qkv", &[HIDDEN + 2 * KV, HIDDEN]), ("ffn_up", &[2 * INTERMEDIATE, HIDDEN])],
        ),
        _ => (&[], &[]),
    };
    tensors.retain(|(name, _)| !left_out.iter().any(|module| name.ends_with(&format!(".{module}.weight"))));
    for layer in 0..LAYERS {
        tensors.extend(added.iter().map(|(name, shape)| (format!("blk.{layer}.{name}.weight"), shape.to_vec())));
    }
    tensors
}

/// A small model with more metadata, its keys without the name of the architecture, and more tensors.
fn with(architecture: &str, metadata: &[(&str, Meta<'_>)], more: &[(&str, Vec<f32>)]) -> anyhow::Result<Source> {
    let add = |gguf: Gguf, (key, value): &(&str, Meta<'_>)| gguf.meta(&format!("{architecture}.{key}"), value.clone());
    let gguf = metadata.iter().fold(small_gguf(architecture), add);
    let gguf = tensors(architecture)
        .iter()
        .fold(gguf, |gguf, (name, shape)| gguf.floats(name, shape, &values(name, shape.iter().product())));
    open_gguf(&more.iter().fold(gguf, |gguf, (name, values)| gguf.floats(name, &[values.len()], values)).bytes())
}

fn config(architecture: &str, metadata: &[(&str, Meta<'_>)]) -> ModelConfig {
    let source = with(architecture, metadata, &[]).unwrap_or_else(|e| panic!("{architecture}: {e:#}"));
    // What a checkpoint made of it says is the same.
    assert_eq!(ModelConfig::from_json(source.config_json()).expect("readable"), *source.config());
    source.config().clone()
}

fn refusal(architecture: &str, metadata: &[(&str, Meta<'_>)], more: &[(&str, Vec<f32>)]) -> String {
    let message = message(with(architecture, metadata, more));
    message.split_once(".gguf: ").expect("the path").1.to_owned()
}

fn attention(config: &ModelConfig) -> Attention {
    config.layers[0].attention().clone()
}

#[test]
fn every_architecture_has_its_norms() {
    use LayerNorm::{AttentionInput, AttentionOutput, FeedForwardInput, FeedForwardOutput, Key, Query};
    let (before, inside) = ([AttentionInput, FeedForwardInput], [Query, Key]);
    let after = [AttentionOutput, FeedForwardOutput];
    let name = |norm| match norm {
        AttentionInput => "attn_norm",
        Query => "attn_q_norm",
        Key => "attn_k_norm",
        AttentionOutput => "post_attention_norm",
        FeedForwardInput => "ffn_norm",
        FeedForwardOutput => "post_ffw_norm",
    };
    for (architecture, own_type, norms) in [
        ("llama", "llama", before.to_vec()),
        ("qwen2", "qwen2", before.to_vec()),
        ("qwen3", "qwen3", [before, inside].concat()),
        ("phi3", "phi3", before.to_vec()),
        ("mistral3", "mistral", before.to_vec()),
        ("smollm3", "smollm3", before.to_vec()),
        ("gemma2", "gemma2", [before, after].concat()),
        ("gemma3", "gemma3_text", [before, inside, after].concat()),
        ("olmo2", "olmo2", [inside, after].concat()),
        ("granite", "granite", before.to_vec()),
        ("glm4", "glm4", [before, after].concat()),
    ] {
        let source = with(architecture, &[], &[]).unwrap_or_else(|e| panic!("{architecture}: {e:#}"));
        assert_eq!(model_type(&source), own_type);
        for (layer, norm) in (0..LAYERS).flat_map(|layer| norms.iter().map(move |norm| (layer, *norm))) {
            let found = source.norm(layer, norm).expect(architecture);
            // As they are multiplied by: what Gemma adds to them has been added.
            assert_eq!(found, values(&format!("blk.{layer}.{}.weight", name(norm)), found.len()), "{architecture}");
        }
        assert_eq!(source.final_norm().expect("readable"), values("output_norm.weight", HIDDEN), "{architecture}");
        // The same tensors under another name are of another model.
        let wrong = refusal(architecture, &[], &[("blk.0.attn_norm_2.weight", vec![0.5; HIDDEN])]);
        assert!(wrong.starts_with("tensor blk.0.attn_norm_2.weight is not one of a "), "{wrong}");
    }
}

/// Rows of queries and keys as transformers has them, where llama.cpp's converter moved them, and as they are kept
/// where only a part of a head turns.
#[test]
fn rows_of_each_architecture() {
    let stored = |name: &str, rows: usize| values(&format!("blk.1.{name}.weight"), rows * HIDDEN);
    let queries = |source: &Source| matrix(source, 1, Projection::Qkv)[..HIDDEN * HIDDEN].to_vec();
    let (as_stored, rows) = (stored("attn_q", HIDDEN), HIDDEN);
    for architecture in ["llama", "mistral3", "smollm3", "granite"] {
        let source = with(architecture, &[], &[]).expect(architecture);
        assert_eq!(permuted(&queries(&source), HIDDEN), as_stored, "{architecture}");
    }
    for architecture in ["qwen2", "qwen3", "gemma2", "gemma3", "olmo2"] {
        assert_eq!(queries(&with(architecture, &[], &[]).expect(architecture)), as_stored, "{architecture}");
    }
    let in_order = |head: [usize; HEAD_DIM]| -> Vec<f32> {
        let row = |i: usize| HEAD_DIM * (i / HEAD_DIM) + head[i % HEAD_DIM];
        (0..rows).flat_map(|i| as_stored[row(i) * HIDDEN..(row(i) + 1) * HIDDEN].to_vec()).collect()
    };
    let half = [("rope.dimension_count", Meta::U32(HEAD_DIM as u32 / 2))];
    let bias = values("bias", HIDDEN);
    let biases: Vec<(&str, Vec<f32>)> = vec![("blk.0.attn_q.bias", bias.clone()), ("blk.1.attn_q.bias", bias.clone())];
    let glm = with("glm4", &half, &biases).expect("it opens");
    let order = [0, 2, 4, 5, 1, 3, 6, 7];
    assert_eq!(queries(&glm), in_order(order));
    let kept = glm.projection(1, Projection::Qkv).expect("readable").bias.expect("there").into_owned();
    let moved: Vec<f32> = (0..HIDDEN).map(|i| bias[HEAD_DIM * (i / HEAD_DIM) + order[i % HEAD_DIM]]).collect();
    assert_eq!(kept[..HIDDEN], moved);
    assert_eq!((glm.config().ropes[0].rotary_dim, glm.config().ropes[0].pairing), (4, Pairing::Neighbours));
    let gate_up = matrix(&glm, 1, Projection::GateUp);
    assert_eq!(gate_up, values("blk.1.ffn_up.weight", 2 * INTERMEDIATE * HIDDEN));

    let phi = with("phi3", &half, &[]).expect("it opens");
    let fused = stored("attn_qkv", HIDDEN + 2 * KV);
    let order = [0, 1, 4, 5, 2, 3, 6, 7];
    let row = |i: usize| if i < HIDDEN + KV { HEAD_DIM * (i / HEAD_DIM) + order[i % HEAD_DIM] } else { i };
    let expected: Vec<f32> =
        (0..HIDDEN + 2 * KV).flat_map(|i| fused[row(i) * HIDDEN..(row(i) + 1) * HIDDEN].to_vec()).collect();
    assert_eq!(matrix(&phi, 1, Projection::Qkv), expected);
    assert_eq!(phi.config().ropes[0].rotary_dim, 4);
    let wanted = "llama.rope.dimension_count is 4, the width of a head, 8, is expected";
    assert_eq!(refusal("llama", &half, &[]), wanted);
}

#[test]
fn windows_and_rotations() {
    let windows = |config: &ModelConfig| -> Vec<_> {
        config.layers.iter().map(|layer| (layer.attention().window, layer.attention().rope)).collect()
    };
    let window = ("attention.sliding_window", Meta::U32(7));
    let of = |architecture: &str, more: &[(&str, Meta<'_>)]| {
        windows(&config(architecture, &[std::slice::from_ref(&window), more].concat()))
    };
    let pattern = |period| [("attention.sliding_window_pattern", Meta::U32(period))];
    let (wide, narrow) = ((None, Some(0)), Some(7));
    assert_eq!(of("gemma2", &[]), [(narrow, Some(0)), wide]);
    assert_eq!(of("gemma2", &pattern(6)), [(narrow, Some(0)); 2]);
    assert_eq!(of("gemma3", &[]), [(narrow, Some(1)); 2]);
    assert_eq!(of("gemma3", &pattern(2)), [(narrow, Some(1)), wide]);
    assert_eq!(of("gemma3", &pattern(0)), [wide; 2]);
    assert_eq!(of("olmo2", &[]), [(narrow, Some(1)); 2]);
    let listed = [("attention.sliding_window_pattern", Meta::Bools(vec![false, true]))];
    assert_eq!(of("olmo2", &listed), [wide, (narrow, Some(1))]);
    assert_eq!(of("llama", &[]), [(narrow, Some(0)); 2]);
    assert_eq!(of("qwen3", &[]), [wide; 2], "llama.cpp has no window for it");
    assert_eq!(windows(&config("smollm3", &[])), [wide; 2]);

    let local = config("gemma3", &[("rope.freq_base", Meta::F32(1e6)), ("rope.scaling.factor", Meta::F32(8.0))]);
    let ropes = |config: &ModelConfig| [0, 1].map(|i| (config.ropes[i].theta, config.ropes[i].scaling.clone()));
    let linear = RopeScaling::Linear { factor: 8.0 };
    assert_eq!(ropes(&local), [(1e6, linear), (1e4, RopeScaling::None)]);
    let local = config("gemma3", &[("rope.freq_base_swa", Meta::F32(5e3))]);
    assert_eq!(ropes(&local), [(1e4, RopeScaling::None), (5e3, RopeScaling::None)]);
    let yarn = [("rope.scaling.type", Meta::Text("yarn")), ("rope.scaling.factor", Meta::F32(4.0)), window.clone()];
    let olmo = ropes(&config("olmo2", &yarn));
    assert!(matches!(olmo[0], (1e4, RopeScaling::Yarn { .. })), "{olmo:?}");
    assert_eq!(olmo[1], (1e4, RopeScaling::None));

    let wrong = [("attention.sliding_window_pattern", Meta::Bools(vec![true; 3]))];
    let wanted = "gemma2.attention.sliding_window_pattern has 3 values, the model has 2 layers";
    assert_eq!(refusal("gemma2", &wrong, &[]), wanted);
}

#[test]
fn scales_and_caps() {
    let float = |key, value| [(key, Meta::F32(value))];
    let gemma = config("gemma2", &[]);
    assert_eq!((attention(&gemma).softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!((attention(&gemma).scale, gemma.embedding_scale), ((8f64).powf(-0.5), (32f64).sqrt()));
    assert_eq!(attention(&config("gemma2", &float("attn_logit_softcapping", 4.0))).softcap, Some(4.0));
    assert_eq!(config("gemma2", &float("final_logit_softcapping", 6.0)).logit_softcap, Some(6.0));
    assert_eq!(config("gemma3", &[]).logit_softcap, None);
    assert_eq!(config("gemma3", &float("final_logit_softcapping", 6.0)).logit_softcap, Some(6.0));

    let granite = config("granite", &[]);
    assert_eq!((attention(&granite).scale, granite.embedding_scale), ((8f64).powf(-0.5), 1.0));
    let all = [
        ("attention.scale", Meta::F32(0.25)),
        ("embedding_scale", Meta::F32(12.0)),
        ("residual_scale", Meta::F32(0.22)),
        ("logit_scale", Meta::F32(16.0)),
    ];
    let granite = config("granite", &all);
    assert_eq!((attention(&granite).scale, granite.embedding_scale), (0.25, 12.0));
    assert_eq!((granite.residual_multiplier, granite.logit_scale), (0.22, 1.0 / 16.0));
    for (key, value) in &all {
        let message = refusal("smollm3", &[(key, value.clone())], &[]);
        assert!(message.starts_with(&format!("the metadata smollm3.{key}")) || message.contains(", only 1 is"));
    }
}

#[test]
fn stretched_contexts() {
    let yarn = |more: &[(&'static str, Meta<'static>)]| {
        let mut all = vec![("rope.scaling.type", Meta::Text("yarn")), ("rope.scaling.factor", Meta::F32(4.0))];
        all.extend_from_slice(more);
        all
    };
    let scaling = |beta_fast, beta_slow, original, attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: original,
        beta_fast,
        beta_slow,
        truncate: true,
        attention_factor,
    };
    let growth = 0.1 * 4f64.ln() + 1.0;
    for architecture in ["llama", "qwen2", "qwen3", "smollm3", "granite"] {
        let found = config(architecture, &yarn(&[]));
        assert_eq!(found.ropes[0].scaling, scaling(32.0, 1.0, 128.0, growth), "{architecture}");
        assert_eq!(found.max_position_embeddings, 512, "{architecture}");
    }
    let more = [
        ("rope.scaling.original_context_length", Meta::U32(64)),
        ("rope.scaling.yarn_beta_fast", Meta::F32(16.0)),
        ("rope.scaling.yarn_beta_slow", Meta::F32(2.0)),
    ];
    assert_eq!(config("qwen3", &yarn(&more)).ropes[0].scaling, scaling(16.0, 2.0, 64.0, growth));
    // The whole factor as the converter writes it, or what llama.cpp multiplies by.
    for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"] {
        for same in [1.0, growth as f32] {
            let found = config("qwen3", &yarn(&[(key, Meta::F32(same))]));
            assert_eq!(found.ropes[0].scaling, scaling(32.0, 1.0, 128.0, growth));
        }
        let wanted = format!("qwen3.{key} is 1.5, only 1 or 1.1386294 is supported");
        assert_eq!(refusal("qwen3", &yarn(&[(key, Meta::F32(1.5))]), &[]), wanted);
    }
    for none in [0.0, 1.0] {
        let none = [("rope.scaling.type", Meta::Text("yarn")), ("rope.scaling.factor", Meta::F32(none))];
        assert_eq!(config("qwen3", &none).ropes[0].scaling, RopeScaling::None);
    }

    let ministral = yarn(&[
        ("rope.scaling.original_context_length", Meta::U32(32)),
        ("rope.scaling.yarn_log_multiplier", Meta::F32(1.0)),
        ("attention.temperature_scale", Meta::F32(0.1)),
    ]);
    let ministral = config("mistral3", &ministral);
    assert_eq!(ministral.ropes[0].scaling, scaling(32.0, 1.0, 32.0, 1.0));
    assert_eq!(attention(&ministral).query_scaling, Some(QueryScaling { beta: 0.1, original: 32 }));
    assert_eq!(ministral.json["model_type"], "ministral3");

    let (short, long) = (vec![1.0, 1.5, 2.0, 2.5], vec![1.0, 4.0, 8.0, 16.5]);
    let both = [("rope_factors_short.weight", short.clone()), ("rope_factors_long.weight", long.clone())];
    let phi = [("rope.scaling.original_context_length", Meta::U32(32)), ("rope.scaling.attn_factor", Meta::F32(1.25))];
    let source = with("phi3", &phi, &both).expect("it opens");
    let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect();
    let expected = RopeScaling::LongRope {
        short_factor: wide(&short),
        long_factor: wide(&long),
        original_max_position_embeddings: 32,
        attention_factor: 1.25,
    };
    assert_eq!(source.config().ropes[0].scaling, expected);
    let silent = with("phi3", &phi[..1], &both).expect("it opens");
    let RopeScaling::LongRope { attention_factor, .. } = silent.config().ropes[0].scaling else { panic!("LongRoPE") };
    assert_eq!(attention_factor, (1.0 + 4f64.ln() / 32f64.ln()).sqrt());
    assert_eq!(refusal("phi3", &phi, &both[..1]), "tensor rope_factors_long.weight is missing");
    let few = [both[0].clone(), ("rope_factors_long.weight", vec![1.0; 3])];
    let wanted = "rope_scaling: long_factor has 3 numbers, one for each pair of channels, 4, is expected";
    assert_eq!(refusal("phi3", &phi, &few), wanted);
}

#[test]
fn architectures_that_are_not_supported() {
    let refused = |architecture: &str| refusal(architecture, &[], &[]);
    let known = "llama, mistral3, phi3, qwen2, qwen3, smollm3, gemma2, gemma3, olmo2, granite or glm4 is expected";
    assert_eq!(refused("gemma"), format!("general.architecture is \"gemma\", {known}"));
    for (architecture, lacks) in [
        ("gpt-oss", "mixture of experts, attention sinks"),
        ("qwen3moe", "mixture of experts"),
        ("qwen35", "gated DeltaNet layers, gated attention"),
        ("deepseek2", "latent attention, mixture of experts"),
        ("lfm2", "short convolutions"),
    ] {
        let wanted = format!("general.architecture is {architecture:?}, {known}: the decoder lacks {lacks}");
        assert_eq!(refused(architecture), wanted);
    }
}

#[test]
fn gguf_llama_3_1_rope_from_divisors() {
    // The first two frequencies turn often in 8192 tokens and are kept, the third is between, the last divided.
    let divisors = |factor: f64| -> Vec<f32> {
        let turns = |i: usize| 8192.0 * 500_000f64.powf(-((2 * i) as f64) / HEAD_DIM as f64) / std::f64::consts::TAU;
        let kept = |i: usize| ((turns(i) - 1.0) / 3.0).clamp(0.0, 1.0);
        (0..HEAD_DIM / 2).map(|i| (1.0 / ((1.0 - kept(i)) / factor + kept(i))) as f32).collect()
    };
    let open = |divisors: &[f32]| {
        let gguf = small_gguf("llama").meta("llama.rope.freq_base", Meta::F32(500_000.0));
        let gguf = fixtures::small_tensors(gguf, VOCAB).floats("rope_freqs.weight", &[divisors.len()], divisors);
        open_gguf(&gguf.bytes())
    };
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    assert_eq!(open(&divisors(8.0)).expect("it opens").config().ropes[0].scaling, expected);
    let mut other = divisors(8.0);
    other[2] *= 1.01;
    for wrong in [&other[..], &other[..1]] {
        assert_says(open(wrong), &["rope_freqs.weight", "Llama 3.1"]);
    }
}
