//! The metadata and the tensors of a GGUF: every spelling that llama.cpp reads means what it means there, and what is
//! not understood is refused by name.

use std::fs;

use decdec::config::{ModelConfig, Projection, RopeScaling};
use decdec::source::Source;
use decdec::weights::ModelWeights;

use super::fixtures::{self, Gguf, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, Meta, VOCAB, values};
use super::{MERGES, assert_says, directory, matrix, message, open_gguf, small_gguf};

/// The small model with more metadata.
fn with(architecture: &str, metadata: &[(&str, Meta<'_>)]) -> anyhow::Result<Source> {
    let add = |gguf: Gguf, (key, value): &(&str, Meta<'_>)| gguf.meta(key, value.clone());
    open_gguf(&fixtures::small_tensors(metadata.iter().fold(small_gguf(architecture), add), VOCAB).bytes())
}

/// The message behind the path.
fn refusal(result: anyhow::Result<Source>) -> String {
    let message = message(result);
    message.split_once(".gguf: ").expect("the path").1.to_owned()
}

#[test]
fn every_spelling_of_rope_scaling() {
    let (factor, old, kind) = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.type");
    let linear = |factor| RopeScaling::Linear { factor };
    let cases: [(&[(&str, Meta<'_>)], RopeScaling); 20] = [
        (&[], RopeScaling::None),
        (&[(factor, Meta::F32(4.0))], linear(4.0)),
        (&[(old, Meta::F32(4.0))], linear(4.0)),
        (&[(factor, Meta::F32(4.0)), (old, Meta::F32(2.0))], linear(4.0)),
        (&[(old, Meta::F32(2.0)), (factor, Meta::F32(4.0))], linear(4.0)),
        (&[(factor, Meta::F32(0.0)), (old, Meta::F32(2.0))], RopeScaling::None),
        (&[(factor, Meta::F32(1.0))], RopeScaling::None),
        (&[(factor, Meta::F32(0.0))], RopeScaling::None),
        (&[(old, Meta::F32(1.0))], RopeScaling::None),
        (&[(kind, Meta::Text("linear"))], RopeScaling::None),
        (&[(kind, Meta::Text("linear")), (factor, Meta::F32(1.0))], RopeScaling::None),
        (&[(kind, Meta::Text("linear")), (factor, Meta::F32(2.5))], linear(2.5)),
        (&[(kind, Meta::Text("linear")), (old, Meta::F32(2.5))], linear(2.5)),
        (&[(kind, Meta::Text("none"))], RopeScaling::None),
        (&[(kind, Meta::Text("none")), (factor, Meta::F32(4.0))], RopeScaling::None),
        (&[(kind, Meta::Text("none")), (old, Meta::F32(4.0))], RopeScaling::None),
        (&[("rope.scaling.attn_factor", Meta::F32(1.0)), (factor, Meta::F32(4.0))], linear(4.0)),
        (&[("rope.scaling.original_context_length", Meta::U32(64)), (factor, Meta::F32(4.0))], linear(4.0)),
        (&[("rope.scaling.finetuned", Meta::Bool(true)), (factor, Meta::F32(4.0))], linear(4.0)),
        (&[(factor, Meta::F32(0.1))], linear(0.1)),
    ];
    for architecture in ["llama", "qwen2"] {
        for (metadata, expected) in &cases {
            let keys: Vec<_> = metadata.iter().map(|(key, _)| format!("{architecture}.{key}")).collect();
            let named: Vec<_> =
                keys.iter().map(String::as_str).zip(metadata.iter().map(|(_, value)| value.clone())).collect();
            let source = with(architecture, &named).unwrap_or_else(|e| panic!("{keys:?}: {e:#}"));
            assert_eq!(source.config().ropes[0].scaling, *expected, "{keys:?}");
            // What a checkpoint made of it says is the same.
            assert_eq!(ModelConfig::from_json(source.config_json()).expect("readable"), *source.config());
        }
    }
    // A key of another architecture says nothing.
    let source = with("llama", &[("qwen2.rope.scaling.factor", Meta::F32(4.0))]).expect("it opens");
    assert_eq!(source.config().ropes[0].scaling, RopeScaling::None);

    let unknown = |kind: &str| {
        format!("llama.rope.scaling.type: RoPE type {kind:?} is unknown, none, linear or yarn is expected")
    };
    for kind in ["longrope", "dynamic", "LINEAR", "", "default"] {
        let (kind_key, factor_key) = ("llama.rope.scaling.type", "llama.rope.scaling.factor");
        assert_eq!(refusal(with("llama", &[(kind_key, Meta::Text(kind))])), unknown(kind));
        let both = [(factor_key, Meta::F32(4.0)), (kind_key, Meta::Text(kind))];
        assert_eq!(refusal(with("llama", &both)), unknown(kind));
    }
    let negative = refusal(with("llama", &[("llama.rope.scaling.factor", Meta::F32(-2.0))]));
    assert_eq!(negative, "rope_scaling: factor is -2.0, a number above 0 is expected");
    let integer = refusal(with("llama", &[("llama.rope.scaling.factor", Meta::U32(4))]));
    assert_eq!(integer, "llama.rope.scaling.factor is 4, a floating-point number is expected");
}

#[test]
fn what_changes_the_model_and_is_unknown_is_refused() {
    let from_directory = "what it would change is not computed: quantize from the Hugging Face directory instead";
    for (key, value, shown) in [
        ("attention.scale", Meta::F32(0.5), "0.5"),
        ("attn_logit_softcapping", Meta::F32(50.0), "50"),
        ("rope.scaling.yarn_log_multiplier", Meta::F32(0.5), "0.5"),
        ("rope.scaling.yarn_ext_factor", Meta::F32(1.0), "1"),
        ("rope.dimension_sections", Meta::I32s(vec![2, 1, 1]), "a list of 3"),
        ("rope.freq_base_swa", Meta::F32(10_000.0), "10000"),
        ("attention.sliding_window_pattern", Meta::U32(6), "6"),
        ("nextn_predict_layers", Meta::U32(1), "1"),
        ("something.new", Meta::Text("x"), "a string"),
        ("block_count2", Meta::Bool(true), "true"),
    ] {
        let key = format!("llama.{key}");
        let wanted = format!("the metadata {key} ({shown}) is not known, {from_directory}");
        assert_eq!(refusal(with("llama", &[(&key, value)])), wanted);
    }
    for (key, value, same, only) in [
        ("attention.causal", Meta::Bool(false), Meta::Bool(true), "false, only 1"),
        ("attention.clamp_kqv", Meta::F32(8.0), Meta::F32(0.0), "8, only 0"),
        ("attention.max_alibi_bias", Meta::F32(8.0), Meta::F32(0.0), "8, only 0"),
        ("embedding_scale", Meta::F32(12.0), Meta::F32(1.0), "12, only 1"),
        ("logit_scale", Meta::F32(0.5), Meta::F32(1.0), "0.5, only 1"),
        ("pooling_type", Meta::U32(3), Meta::U32(0), "3, only 0"),
        ("residual_scale", Meta::F32(0.2), Meta::F32(1.0), "0.2, only 1"),
        ("rope.scaling.attn_factor", Meta::F32(1.19), Meta::F32(1.0), "1.19, only 1"),
        ("use_parallel_residual", Meta::Bool(true), Meta::Bool(false), "true, only 0"),
    ] {
        let key = format!("llama.{key}");
        assert_eq!(refusal(with("llama", &[(&key, value)])), format!("{key} is {only} is supported"));
        with("llama", &[(&key, same)]).expect("it changes nothing");
    }
    // What is silent, and what is not of the architecture.
    for (key, value) in [
        ("llama.vocab_size", Meta::U32(VOCAB as u32)),
        ("llama.tensor_data_layout", Meta::Text("Meta AI original pth")),
        ("llama.attention.layer_norm_epsilon", Meta::F32(1e-5)),
        ("general.quantization_version", Meta::U32(2)),
        ("general.type", Meta::Text("model")),
        ("quantize.imatrix.entries_count", Meta::I32s(vec![1])),
    ] {
        with("llama", &[(key, value)]).expect(key);
    }
    let adapter = refusal(with("llama", &[("general.type", Meta::Text("adapter"))]));
    assert_eq!(adapter, "general.type is \"adapter\", \"model\" is expected: give the model itself");
    let twice = small_gguf("llama").meta_again("llama.block_count", Meta::U32(2));
    let twice = refusal(open_gguf(&fixtures::small_tensors(twice, VOCAB).bytes()));
    assert_eq!(twice, "the metadata \"llama.block_count\" comes twice");
}

#[test]
fn lists_with_a_number_for_each_layer() {
    let replaced = |key: &str, value: Meta<'_>| {
        let gguf = fixtures::config_without("llama", key).meta(&format!("llama.{key}"), value);
        let (gguf, _) = fixtures::byte_level(gguf, "gpt-2", &MERGES);
        open_gguf(&fixtures::small_tensors(gguf, VOCAB).bytes())
    };
    let plain = with("llama", &[]).expect("it opens");
    for (key, n) in [("attention.head_count", 4), ("attention.head_count_kv", 2), ("feed_forward_length", INTERMEDIATE)]
    {
        let n = n as i32;
        for value in [Meta::I32s(vec![n, n]), Meta::U32s(vec![n as u32, n as u32])] {
            assert_eq!(replaced(key, value).expect(key).config(), plain.config());
        }
        let wanted = format!("llama.{key} is {n} in layer 0 and {} in layer 1, one for all layers is expected", n / 2);
        assert_eq!(refusal(replaced(key, Meta::I32s(vec![n, n / 2]))), wanted);
        let wanted = format!("llama.{key} has 3 values, the model has 2 layers");
        assert_eq!(refusal(replaced(key, Meta::I32s(vec![n, n, n]))), wanted);
        let wanted = format!("llama.{key} has -1, 0 or more is expected");
        assert_eq!(refusal(replaced(key, Meta::I32s(vec![-1, -1]))), wanted);
        let wanted = format!("llama.{key} is a list of 2, an integer is expected");
        assert_eq!(refusal(replaced(key, Meta::F32s(vec![4.0, 4.0]))), wanted);
    }
    let missing = |key: &str| {
        let (gguf, _) = fixtures::byte_level(fixtures::config_without("llama", key), "gpt-2", &MERGES);
        open_gguf(&fixtures::small_tensors(gguf, VOCAB).bytes())
    };
    for key in ["block_count", "embedding_length", "attention.head_count", "feed_forward_length", "context_length"] {
        assert_eq!(refusal(missing(key)), format!("llama.{key} is missing"));
    }
    let eps = "attention.layer_norm_rms_epsilon";
    assert_eq!(refusal(missing(eps)), format!("llama.{eps} is missing"));
    assert_eq!(missing("rope.freq_base").expect("it opens").config().ropes[0].theta, 10_000.0);
}

#[test]
fn mixtures_of_experts_are_named() {
    let dense = || fixtures::small_tensors(small_gguf("llama"), VOCAB);
    let experts = "which is not supported: a dense one is expected";
    let key =
        refusal(with("llama", &[("llama.expert_count", Meta::U32(8)), ("llama.expert_used_count", Meta::U32(2))]));
    assert_eq!(key, format!("the model is a mixture of experts (llama.expert_count is 8), {experts}"));
    let none = [("llama.expert_count", Meta::U32(0)), ("llama.expert_used_count", Meta::U32(0))];
    with("llama", &none).expect("no experts");
    for name in ["blk.0.ffn_gate_exps.weight", "blk.1.ffn_gate_inp.weight"] {
        let found = refusal(open_gguf(&dense().floats(name, &[1, HIDDEN], &[0.0; HIDDEN]).bytes()));
        assert_eq!(found, format!("the model is a mixture of experts (it has a tensor {name}), {experts}"));
    }
}

#[test]
fn tensors_that_nothing_reads_are_refused() {
    let dense = || fixtures::small_tensors(small_gguf("llama"), VOCAB);
    for name in ["blk.0.attn_q_norm.weight", "output.bias", "blk.0.attn_norm.bias", "blk.2.attn_q.weight", "x"] {
        let found = refusal(open_gguf(&dense().floats(name, &[HIDDEN], &[0.0; HIDDEN]).bytes()));
        assert_eq!(
            found,
            format!(
                "tensor {name} is not one of a llama model, what it would change is not computed: quantize from the \
                 Hugging Face directory instead"
            )
        );
    }
    let (long, short) = ("rope_factors_long.weight", "rope_factors_short.weight");
    for (name, other) in [(long, short), (short, long)] {
        let found = refusal(open_gguf(&dense().floats(name, &[HEAD_DIM / 2], &[1.0; HEAD_DIM / 2]).bytes()));
        assert_eq!(found, format!("tensor {other} is missing"));
    }
    let twice = dense().floats("output_norm.weight", &[HIDDEN], &[2.0; HIDDEN]);
    assert_eq!(refusal(open_gguf(&twice.bytes())), "tensor \"output_norm.weight\" comes twice");
    let both = small_gguf("llama").meta("llama.rope.scaling.factor", Meta::F32(2.0));
    let both = fixtures::small_tensors(both, VOCAB).floats("rope_freqs.weight", &[HEAD_DIM / 2], &[1.0; HEAD_DIM / 2]);
    let wanted = "rope_freqs.weight and a RoPE factor of 2 are both there, one of them is expected";
    assert_eq!(refusal(open_gguf(&both.bytes())), wanted);
}

#[test]
fn versions_and_what_is_no_gguf() {
    let good = fixtures::small_tensors(small_gguf("llama"), VOCAB).bytes();
    let of_version = |version: u32| {
        let mut bytes = good.clone();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        open_gguf(&bytes)
    };
    assert_eq!(of_version(2).expect("it opens").config(), of_version(3).expect("it opens").config());
    for version in [0, 1, 4, 1 << 20] {
        let wanted = format!("GGUF version {version} is not supported, 2 or 3 is expected: convert the model again");
        assert_eq!(refusal(of_version(version)), wanted);
    }
    let wanted = "the file is big-endian, convert the model again for a little-endian machine";
    assert_eq!(refusal(of_version(3u32.swap_bytes())), wanted);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n";
    assert_says(
        open_gguf(pointer.as_bytes()),
        &["small.gguf is a pointer of git-lfs, not the file itself: git lfs pull"],
    );
    assert_says(open_gguf(b"<!doctype html>"), &["not a GGUF file: it does not start with \"GGUF\""]);
}

/// Ids of special tokens that no token has are none.
#[test]
fn ids_outside_the_vocabulary() {
    for id in [VOCAB as u32, u32::MAX] {
        let json =
            with("llama", &[("tokenizer.ggml.eos_token_id", Meta::U32(id))]).map(|source| source.config().clone());
        if let Ok(config) = json {
            assert!(config.eos_token_ids.is_empty(), "{id}");
        }
    }
    let last = with("llama", &[("tokenizer.ggml.eos_token_id", Meta::U32(VOCAB as u32 - 1))]).expect("it opens");
    assert_eq!(last.config().eos_token_ids, [VOCAB as u32 - 1]);
}

/// The small model in `count` files: metadata in the first, tensors in all.
fn split(count: usize, change: impl Fn(usize, Gguf) -> Gguf) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<Gguf> = (0..count)
        .map(|i| {
            let file = if i == 0 { small_gguf("llama") } else { Gguf::default() };
            file.meta("split.no", Meta::U32(i as u32)).meta("split.count", Meta::U32(count as u32))
        })
        .collect();
    let tensors = fixtures::small_tensor_shapes(VOCAB);
    files[0] = std::mem::take(&mut files[0]).meta("split.tensors.count", Meta::I32(tensors.len() as i32));
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let file = std::mem::take(&mut files[i % count]);
        files[i % count] = file.floats(name, shape, &values(name, shape.iter().product()));
    }
    let name = |i: usize| format!("m-{:05}-of-{count:05}.gguf", i + 1);
    files.into_iter().enumerate().map(|(i, file)| (name(i), change(i, file).bytes())).collect()
}

fn open_split(files: &[(String, Vec<u8>)], open: &str) -> anyhow::Result<Source> {
    let dir = directory();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).expect("writable");
    }
    Source::open(&dir.path().join(open))
}

#[test]
fn a_model_in_several_files() {
    let whole = with("llama", &[]).expect("it opens");
    for count in [2, 3, 7] {
        let files = split(count, |_, file| file);
        let source = open_split(&files, &files[0].0).expect("it opens");
        assert_eq!(source.config(), whole.config());
        for (layer, projection) in (0..LAYERS).flat_map(|layer| Projection::ALL.map(|p| (layer, p))) {
            assert_eq!(matrix(&source, layer, projection), matrix(&whole, layer, projection), "{count}");
        }
        let wanted = format!("it is file 2 of the {count} of a model: give the first, {}", files[0].0);
        assert_eq!(refusal(open_split(&files, &files[1].0)), wanted);
    }
    let files = split(3, |_, file| file);
    let missing = refusal(open_split(&files[..2], &files[0].0));
    assert!(missing.starts_with("file 3 of 3, m-00003-of-00003.gguf: cannot open "), "{missing}");
    let renamed = refusal(open_split(&[("a.gguf".into(), files[0].1.clone())], "a.gguf"));
    let wanted = "it is file 1 of the 3 of a model, a name that ends in -00001-of-00003.gguf is expected";
    assert_eq!(renamed, wanted);
    // The last of another model, a tensor twice, one too many.
    let swapped = [files[0].clone(), files[1].clone(), (files[2].0.clone(), files[1].1.clone())];
    let wanted = "m-00003-of-00003.gguf has split.no 1 and split.count 3, 2 and 3 are expected: it is of another model";
    assert_eq!(refusal(open_split(&swapped, &files[0].0)), wanted);
    let add = |name: &'static str| {
        move |i: usize, file: Gguf| if i == 1 { file.floats(name, &[HIDDEN], &[0.5; HIDDEN]) } else { file }
    };
    let twice = split(3, add("token_embd.weight"));
    let wanted = "tensor token_embd.weight is in m-00002-of-00003.gguf and in a file before it";
    assert_eq!(refusal(open_split(&twice, &twice[0].0)), wanted);
    let more = split(3, add("x"));
    let count = fixtures::small_tensor_shapes(VOCAB).len();
    let wanted = format!("the 3 files have {} tensors, split.tensors.count says {count}", count + 1);
    assert_eq!(refusal(open_split(&more, &more[0].0)), wanted);
}
