//! Full-precision sources: values, row order, fusing, and what bad files say.

#[path = "../answers/mod.rs"]
mod answers;
#[path = "../devices/mod.rs"]
mod devices;
#[path = "../fixtures/mod.rs"]
mod fixtures;

mod architectures;
mod finite;
mod metadata;
#[cfg(target_os = "linux")]
mod small_files;

use std::fs;

use decdec::config::{LayerNorm, Projection};
use decdec::source::Source;
use decdec::weights::{ModelWeights, Weight};
use fixtures::directory::Directory;
use fixtures::{Gguf, HEAD_DIM, HIDDEN, INTERMEDIATE, KV, LAYERS, Meta, VOCAB, values};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::json;
use tempfile::TempDir;

const MERGES: [&str; 2] = ["a b", "ab c"];

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Opens the bytes of a GGUF.
fn open_gguf(bytes: &[u8]) -> anyhow::Result<Source> {
    let dir = directory();
    let path = dir.path().join("small.gguf");
    fs::write(&path, bytes).expect("writable");
    Source::open(&path)
}

fn small_gguf(architecture: &str) -> Gguf {
    let (gguf, tokens) = fixtures::byte_level(fixtures::small_config(architecture), "gpt-2", &MERGES);
    assert_eq!(tokens.len(), VOCAB);
    gguf
}

/// A projection's matrix in f32, `[out_features, in_features]`.
fn matrix(source: &Source, layer: usize, projection: Projection) -> Vec<f32> {
    let linear = source.projection(layer, projection).expect("readable");
    assert_eq!((linear.weight.in_features(), linear.weight.out_features()), source.config().shape(layer, projection));
    let Weight::Dense(dense) = linear.weight else { panic!("full precision is dense") };
    dense.values.to_f32().into_owned()
}

/// The message of a failure: one line, with the path in front.
fn message(result: anyhow::Result<Source>) -> String {
    let message = format!("{:#}", result.expect_err("it fails"));
    assert!(message.starts_with("cannot open the model ") && !message.contains('\n'), "{message}");
    message
}

fn assert_says(result: anyhow::Result<Source>, parts: &[&str]) {
    let message = message(result);
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// What the configuration calls the family.
fn model_type(source: &Source) -> &str {
    source.config().json["model_type"].as_str().expect("a text")
}

/// What llama.cpp's converter does to the rows of q and k, from its description: a head's rows, as
/// `(2, head_dim / 2)`, are transposed.
fn permuted(original: &[f32], columns: usize) -> Vec<f32> {
    let mut stored = vec![0.0; original.len()];
    for (row, values) in original.chunks(columns).enumerate() {
        let (head, within) = (row / HEAD_DIM, row % HEAD_DIM);
        let (part, index) = (within / (HEAD_DIM / 2), within % (HEAD_DIM / 2));
        let to = head * HEAD_DIM + 2 * index + part;
        stored[to * columns..(to + 1) * columns].copy_from_slice(values);
    }
    stored
}

#[test]
fn gguf_values_fused_and_unpermuted() {
    let source = open_gguf(&fixtures::small_tensors(small_gguf("llama"), VOCAB).bytes()).expect("it opens");
    let config = source.config();
    let head_dim = config.layers[0].attention().head_dim;
    assert_eq!((model_type(&source), config.layers.len(), head_dim), ("llama", LAYERS, HEAD_DIM));
    assert_eq!((config.vocab_size, config.tie_word_embeddings, config.rms_norm_eps), (VOCAB, true, 1e-5));
    assert!(source.head().expect("readable").is_none());
    assert_eq!(source.embedding().expect("readable").values.to_f32(), values("token_embd.weight", VOCAB * HIDDEN));
    assert_eq!(source.final_norm().expect("readable"), values("output_norm.weight", HIDDEN));
    for layer in 0..LAYERS {
        let stored =
            |name: &str, rows: usize, columns: usize| values(&format!("blk.{layer}.{name}.weight"), rows * columns);
        let norm = |norm| source.norm(layer, norm).expect("readable");
        let (attention, feed_forward) = (norm(LayerNorm::AttentionInput), norm(LayerNorm::FeedForwardInput));
        assert_eq!((attention, feed_forward), (stored("attn_norm", HIDDEN, 1), stored("ffn_norm", HIDDEN, 1)));

        let qkv = matrix(&source, layer, Projection::Qkv);
        let (q, rest) = qkv.split_at(HIDDEN * HIDDEN);
        let (k, v) = rest.split_at(KV * HIDDEN);
        assert_eq!(permuted(q, HIDDEN), stored("attn_q", HIDDEN, HIDDEN));
        assert_eq!(permuted(k, HIDDEN), stored("attn_k", KV, HIDDEN));
        assert_eq!(v, stored("attn_v", KV, HIDDEN));
        assert_ne!(q, stored("attn_q", HIDDEN, HIDDEN), "the order did change");

        let gate_up = [stored("ffn_gate", INTERMEDIATE, HIDDEN), stored("ffn_up", INTERMEDIATE, HIDDEN)].concat();
        assert_eq!(matrix(&source, layer, Projection::GateUp), gate_up);
        assert_eq!(matrix(&source, layer, Projection::O), stored("attn_output", HIDDEN, HIDDEN));
        assert_eq!(matrix(&source, layer, Projection::Down), stored("ffn_down", HIDDEN, INTERMEDIATE));
    }
    assert_eq!(source.bits(0), None);
}

#[test]
fn gguf_qwen2_biases_and_order() {
    let mut gguf = fixtures::small_tensors(small_gguf("qwen2"), VOCAB);
    for (name, rows) in [("attn_q", HIDDEN), ("attn_v", KV)] {
        for layer in 0..LAYERS {
            let name = format!("blk.{layer}.{name}.bias");
            gguf = gguf.floats(&name, &[rows], &values(&name, rows));
        }
    }
    let source = open_gguf(&gguf.bytes()).expect("it opens");
    assert_eq!(model_type(&source), "qwen2");
    let q = matrix(&source, 1, Projection::Qkv)[..HIDDEN * HIDDEN].to_vec();
    assert_eq!(q, values("blk.1.attn_q.weight", HIDDEN * HIDDEN), "only Llama's rows are stored in another order");
    let bias = source.projection(1, Projection::Qkv).expect("readable").bias.expect("a bias");
    let expected = [values("blk.1.attn_q.bias", HIDDEN), vec![0.0; KV], values("blk.1.attn_v.bias", KV)].concat();
    assert_eq!(bias.to_vec(), expected, "a part without a bias has zeros");
    assert!(source.projection(1, Projection::O).expect("readable").bias.is_none());
}

#[test]
fn gguf_phi3_is_fused_already() {
    let mut gguf = small_gguf("phi3").meta("phi3.attention.sliding_window", Meta::U32(99));
    let tensor =
        |gguf: Gguf, name: &str, shape: &[usize]| gguf.floats(name, shape, &values(name, shape.iter().product()));
    gguf = tensor(gguf, "token_embd.weight", &[VOCAB, HIDDEN]);
    gguf = tensor(gguf, "output.weight", &[VOCAB, HIDDEN]);
    gguf = tensor(gguf, "output_norm.weight", &[HIDDEN]);
    for layer in 0..LAYERS {
        gguf = tensor(gguf, &format!("blk.{layer}.attn_norm.weight"), &[HIDDEN]);
        gguf = tensor(gguf, &format!("blk.{layer}.ffn_norm.weight"), &[HIDDEN]);
        gguf = tensor(gguf, &format!("blk.{layer}.attn_qkv.weight"), &[HIDDEN + 2 * KV, HIDDEN]);
        gguf = tensor(gguf, &format!("blk.{layer}.attn_output.weight"), &[HIDDEN, HIDDEN]);
        gguf = tensor(gguf, &format!("blk.{layer}.ffn_up.weight"), &[2 * INTERMEDIATE, HIDDEN]);
        gguf = tensor(gguf, &format!("blk.{layer}.ffn_down.weight"), &[HIDDEN, INTERMEDIATE]);
    }
    let source = open_gguf(&gguf.bytes()).expect("it opens");
    assert_eq!(model_type(&source), "phi3");
    assert_eq!(source.config().layers[1].attention().window, Some(99));
    let head = source.head().expect("readable").expect("a head of its own");
    assert_eq!(head.values.to_f32(), values("output.weight", VOCAB * HIDDEN));
    let qkv = matrix(&source, 0, Projection::Qkv);
    assert_eq!(qkv, values("blk.0.attn_qkv.weight", (HIDDEN + 2 * KV) * HIDDEN));
    assert_eq!(matrix(&source, 1, Projection::GateUp), values("blk.1.ffn_up.weight", 2 * INTERMEDIATE * HIDDEN));
}

/// Every block format against the reference dequantizer of the `gguf` package.
#[test]
fn gguf_block_formats() {
    let bytes = fs::read("tests/data/gguf_blocks.safetensors").expect("readable");
    let known = SafeTensors::deserialize(&bytes).expect("safetensors");
    let kinds =
        [("Q4_0", 2), ("Q4_1", 3), ("Q5_0", 6), ("Q5_1", 7), ("Q8_0", 8), ("Q4_K", 12), ("Q5_K", 13), ("Q6_K", 14)];
    for (name, kind) in kinds {
        let blocks = known.tensor(&format!("{name}.blocks")).expect(name);
        let expected = known.tensor(&format!("{name}.values")).expect(name);
        let expected: Vec<f32> = bytemuck::pod_collect_to_vec(expected.data());
        let read = |blocks: &[u8]| {
            // The embedding holds the blocks, as many of them as whole rows need.
            let count = VOCAB * 256;
            let repeated: Vec<u8> =
                blocks.iter().copied().cycle().take(blocks.len() * count / expected.len()).collect();
            let mut gguf = small_gguf("llama").meta("llama.attention.key_length", Meta::U32(HEAD_DIM as u32));
            gguf = gguf.tensor("token_embd.weight", kind, &[VOCAB, 256], &repeated);
            let gguf = wide_tensors(gguf);
            let source = open_gguf(&gguf.bytes()).expect("it opens");
            source.embedding().expect("readable").values.to_f32().into_owned()
        };
        let got = read(blocks.data());
        let matches = |got: &[f32]| got.iter().zip(expected.iter().cycle()).all(|(a, b)| a == b);
        assert!(matches(&got), "{name}: {:?} instead of {:?}", &got[..8], &expected[..8]);
        let mut flipped = blocks.data().to_vec();
        flipped[blocks.data().len() / 2] ^= 0x10;
        assert!(!matches(&read(&flipped)), "{name}: a flipped bit shows");
    }
}

/// The tensors besides the embedding of a model that is 256 wide and has the small model's other sizes.
fn wide_tensors(gguf: Gguf) -> Gguf {
    const WIDE: usize = 256;
    let q = 4 * HEAD_DIM;
    let mut gguf = gguf.meta("llama.embedding_length", Meta::U32(WIDE as u32));
    let mut add = |name: String, shape: &[usize]| {
        gguf = std::mem::take(&mut gguf).floats(&name, shape, &vec![0.5; shape.iter().product()]);
    };
    add("output_norm.weight".into(), &[WIDE]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("attn_norm", &[WIDE][..]),
            ("ffn_norm", &[WIDE]),
            ("attn_q", &[q, WIDE]),
            ("attn_k", &[KV, WIDE]),
            ("attn_v", &[KV, WIDE]),
            ("attn_output", &[WIDE, q]),
            ("ffn_gate", &[INTERMEDIATE, WIDE]),
            ("ffn_up", &[INTERMEDIATE, WIDE]),
            ("ffn_down", &[WIDE, INTERMEDIATE]),
        ] {
            add(format!("blk.{layer}.{name}.weight"), shape);
        }
    }
    gguf
}

/// A small Hugging Face directory with the tokenizer of the small GGUF.
fn hugging_face(dtype: Dtype) -> Directory {
    let source = open_gguf(&fixtures::small_tensors(small_gguf("llama"), VOCAB).bytes()).expect("it opens");
    Directory::llama(dtype, source.texts())
}

#[test]
fn hugging_face_types_are_kept() {
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        let source = hugging_face(dtype).open().expect("it opens");
        let name = |module: &str| format!("model.layers.1.{module}.weight");
        let rounded = |name: &str, count: usize| -> Vec<f32> {
            let round = |v: f32| if dtype == Dtype::BF16 { bf16::from_f32(v).to_f32() } else { v };
            values(name, count).into_iter().map(round).collect()
        };
        let Weight::Dense(down) = source.projection(1, Projection::Down).expect("readable").weight else {
            panic!("full precision is dense")
        };
        assert_eq!(down.values.bytes(), HIDDEN * INTERMEDIATE * if dtype == Dtype::F32 { 4 } else { 2 });
        assert_eq!(down.values.to_f32(), rounded(&name("mlp.down_proj"), HIDDEN * INTERMEDIATE));
        let qkv = [
            rounded(&name("self_attn.q_proj"), HIDDEN * HIDDEN),
            rounded(&name("self_attn.k_proj"), KV * HIDDEN),
            rounded(&name("self_attn.v_proj"), KV * HIDDEN),
        ];
        assert_eq!(matrix(&source, 1, Projection::Qkv), qkv.concat());
        let head = source.head().expect("readable").expect("a head of its own");
        assert_eq!(head.values.to_f32(), rounded("lm_head.weight", VOCAB * HIDDEN));
    }
}

/// Whether the head is the embedding is said by the numbers, where the configuration says that it is.
#[test]
fn a_head_of_other_numbers_counts() {
    let mut model = hugging_face(Dtype::F16);
    let mut config = Directory::config();
    config["tie_word_embeddings"] = true.into();
    model.write_json("config.json", &config);
    let own = model.open().expect("it opens");
    let head = own.head().expect("readable").expect("a head of its own").values.to_f32().into_owned();
    assert_eq!(head, values("lm_head.weight", VOCAB * HIDDEN));
    assert_eq!((own.config().tie_word_embeddings, &own.config_json()["tie_word_embeddings"]), (false, &json!(false)));
    let bytes = model.tensors.iter().find(|(name, ..)| name == "model.embed_tokens.weight").expect("there").3.clone();
    model.tensors.iter_mut().filter(|(name, ..)| name == "lm_head.weight").for_each(|head| head.3.clone_from(&bytes));
    assert!(model.open().expect("it opens").head().expect("readable").is_none(), "the same numbers");
    model.tensors.retain(|(name, ..)| name != "lm_head.weight");
    assert!(model.open().expect("it opens").head().expect("readable").is_none());
}

#[test]
fn hugging_face_shards() {
    let model = hugging_face(Dtype::F16);
    let whole = matrix(&model.open().expect("it opens"), 1, Projection::GateUp);
    fs::remove_file(model.path().join("model.safetensors")).expect("removable");
    let (first, second) = model.tensors.split_at(model.tensors.len() / 2);
    let mut map = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
        model.save(file, tensors);
        map.extend(tensors.iter().map(|(name, ..)| (name.clone(), file.into())));
    }
    model.write_json("model.safetensors.index.json", &json!({ "weight_map": map }));
    let source = Source::open(model.path()).expect("it opens");
    assert_eq!(matrix(&source, 1, Projection::GateUp), whole);

    // A single file goes first, as in transformers; without an index it may have any name, and be the only one.
    let mut other = hugging_face(Dtype::F16);
    other.tensors.iter_mut().for_each(|(name, _, shape, bytes)| {
        let values = values(&format!("other {name}"), shape.iter().product());
        *bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    });
    let single = matrix(&other.open().expect("it opens"), 1, Projection::GateUp);
    assert_ne!(single, whole);
    model.save("model.safetensors", &other.tensors);
    assert_eq!(matrix(&Source::open(model.path()).expect("it opens"), 1, Projection::GateUp), single);
    fs::remove_file(model.path().join("model.safetensors")).expect("removable");
    assert_eq!(matrix(&Source::open(model.path()).expect("it opens"), 1, Projection::GateUp), whole);
    let path = other.path().join("model.safetensors");
    fs::rename(&path, other.path().join("gptq_model-4bit-128g.safetensors")).expect("movable");
    assert_eq!(matrix(&Source::open(other.path()).expect("it opens"), 1, Projection::GateUp), single);
    other.save("b.safetensors", &other.tensors);
    let two = "there is neither model.safetensors nor model.safetensors.index.json, but b.safetensors and 1 more: the \
               index is missing";
    assert_says(Source::open(other.path()), &[two]);
    let only_adapter = hugging_face(Dtype::F16);
    only_adapter.save("adapter_model.safetensors", &only_adapter.tensors[..1]);
    let merge = "there is only adapter_model.safetensors, which changes another model: merge it into that model first";
    assert_says(Source::open(only_adapter.path()), &[merge]);

    // A tensor that two files have: even where both are the same, one of them is a mistake.
    let both: Vec<_> = second.iter().chain(&first[..1]).cloned().collect();
    model.save("b.safetensors", &both);
    let name = &first[0].0;
    let says = format!("tensor {name} is in a.safetensors and in b.safetensors: which of them is meant?");
    assert_says(Source::open(model.path()), &[&says]);
    model.save("b.safetensors", second);
    // One that the index names and nobody has, which nobody reads either.
    let mut more = map.clone();
    more.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), "a.safetensors".into());
    model.write_json("model.safetensors.index.json", &json!({ "weight_map": more }));
    Source::open(model.path()).expect("it opens");

    fs::remove_file(model.path().join("b.safetensors")).expect("removable");
    assert_says(Source::open(model.path()), &["b.safetensors", "cannot open"]);
    map.insert("x".into(), "../b.safetensors".into());
    model.write_json("model.safetensors.index.json", &json!({ "weight_map": map }));
    assert_says(Source::open(model.path()), &["\"../b.safetensors\"", "without directories"]);
}

#[test]
fn bad_directories() {
    let mut model = hugging_face(Dtype::F16);
    model.add("lm_head.weight", Dtype::F16, &[VOCAB - 1, HIDDEN]);
    assert_says(model.open(), &["lm_head.weight", "[259, 32]", "[260, 32]"]);
    model.add("lm_head.weight", Dtype::I32, &[VOCAB, HIDDEN]);
    assert_says(model.open(), &["lm_head.weight", "I32", "F16, BF16 or F32 is expected"]);
    model.tensors.retain(|(name, ..)| name != "lm_head.weight");
    assert_says(model.open(), &["tensor lm_head.weight is missing"]);

    let model = hugging_face(Dtype::F16);
    model.open().expect("it opens");
    let path = model.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("readable");
    fs::write(&path, &bytes[..bytes.len() - 1]).expect("writable");
    assert_says(Source::open(model.path()), &["model.safetensors", "truncated"]);
    fs::remove_file(&path).expect("removable");
    assert_says(Source::open(model.path()), &["neither model.safetensors nor"]);
    fs::write(model.path().join("pytorch_model.bin"), b"").expect("writable");
    assert_says(Source::open(model.path()), &["pytorch_model.bin", "save them as safetensors"]);

    let model = hugging_face(Dtype::F16);
    let mut config = Directory::config();
    let quantized = |method: &str| {
        format!(
            "the model is already quantized ({method}), full precision is expected: give the model that it was made from"
        )
    };
    for (fields, method) in [
        (json!({ "quant_method": "gptq" }), "gptq"),
        (json!({ "quant_method": "FP8" }), "fp8"),
        (json!({ "quant_method": "compressed-tensors", "format": "pack-quantized" }), "compressed-tensors"),
        (json!({ "bits": 4 }), "quant_method is missing"),
        (json!({}), "quant_method is missing"),
    ] {
        config["quantization_config"] = fields;
        model.write_json("config.json", &config);
        assert_says(model.open(), &[&quantized(method)]);
    }
    config["quantization_config"] = json!(4);
    model.write_json("config.json", &config);
    assert_says(model.open(), &["quantization_config is 4, an object is expected"]);
    // Where the family is not supported, the model that it was made from is of no use either.
    config["quantization_config"] = json!({ "quant_method": "fp8" });
    config["model_type"] = "mamba".into();
    model.write_json("config.json", &config);
    assert_says(model.open(), &["\"mamba\" is unknown", "llama, mistral, ministral3, phi3, "]);
    fs::write(model.path().join("config.json"), "{").expect("writable");
    assert_says(model.open(), &["config.json is not valid JSON"]);
    model.write_json("config.json", &Directory::config());
    fs::remove_file(model.path().join("tokenizer.json")).expect("removable");
    assert_says(model.open(), &["tokenizer.json is missing"]);
    assert_says(Source::open(&model.path().join("nothing")), &["nothing", "No such file"]);
}

#[test]
fn bad_gguf() {
    let good = fixtures::small_tensors(small_gguf("llama"), VOCAB).bytes();
    open_gguf(&good).expect("it opens");
    assert_says(open_gguf(b""), &["not a GGUF file"]);
    assert_says(open_gguf(b"GGML\x03\0\0\0"), &["not a GGUF file"]);
    assert_says(open_gguf(b"GGUF\x01\0\0\0"), &["version 1", "2 or 3"]);
    assert_says(open_gguf(&good[..good.len() - 64]), &["truncated"]);
    assert_says(
        open_gguf(&fixtures::small_tensors(small_gguf("gpt2"), VOCAB).bytes()),
        &["\"gpt2\"", "llama, mistral3, phi3, qwen2, "],
    );
    assert_says(open_gguf(&fixtures::small_tensors(small_gguf("llama"), VOCAB + 1).bytes()[..64]), &["truncated"]);

    let without_tokenizer = fixtures::small_tensors(fixtures::small_config("llama"), VOCAB);
    assert_says(open_gguf(&without_tokenizer.bytes()), &["the file has no tokenizer"]);
    let (other, _) = fixtures::byte_level(fixtures::small_config("llama"), "jina-v9", &MERGES);
    let other = fixtures::small_tensors(other, VOCAB);
    assert_says(open_gguf(&other.bytes()), &["\"jina-v9\" is unknown", "smollm, llama-bpe"]);
    let other = fixtures::small_tensors(small_gguf("llama").meta("tokenizer.ggml.model", Meta::Text("t5")), VOCAB);
    assert_says(open_gguf(&other.bytes()), &["\"t5\" is unknown", "gpt2 or llama"]);

    let unknown =
        fixtures::small_tensors(small_gguf("llama"), VOCAB).tensor("output.weight", 99, &[VOCAB, HIDDEN], &[]);
    assert_says(open_gguf(&unknown.bytes()), &["output.weight (lm_head.weight): type 99 is not supported", "Q4_0"]);
    let named = fixtures::small_tensors(small_gguf("llama"), VOCAB).tensor("output.weight", 23, &[VOCAB, HIDDEN], &[]);
    assert_says(open_gguf(&named.bytes()), &["type IQ4_XS is not supported"]);
    let wrong =
        fixtures::small_tensors(small_gguf("llama"), VOCAB).floats("output.weight", &[4, HIDDEN], &[0.0; 4 * HIDDEN]);
    assert_says(open_gguf(&wrong.bytes()), &["lm_head.weight", "[4, 32]", "[260, 32]"]);
    let wrong = small_gguf("llama").meta("llama.block_count", Meta::Text("two"));
    assert_says(open_gguf(&fixtures::small_tensors(wrong, VOCAB).bytes()), &["llama.block_count", "an integer"]);
    let scaled = small_gguf("llama").meta("llama.rope.scaling.type", Meta::Text("dynamic"));
    assert_says(open_gguf(&fixtures::small_tensors(scaled, VOCAB).bytes()), &["\"dynamic\" is unknown"]);
}

/// A header cut anywhere, and huge lengths anywhere, are errors: no panic, no allocation of what they claim.
#[test]
fn hostile_gguf_headers() {
    let (gguf, _) = fixtures::byte_level(fixtures::small_config("llama"), "gpt-2", &MERGES);
    let gguf = fixtures::small_tensors(gguf, VOCAB);
    let bytes = gguf.bytes();
    let path = directory();
    let path = path.path().join("small.gguf");
    let open = |bytes: &[u8]| {
        fs::create_dir_all(path.parent().expect("a directory")).expect("writable");
        fs::write(&path, bytes).expect("writable");
        Source::open(&path)
    };
    let header = bytes.len() - LAYERS * 4 * HIDDEN * HIDDEN;
    for at in (0..header).step_by(97).chain(0..64) {
        assert!(open(&bytes[..at]).is_err(), "cut at {at}");
    }
    let end = 1600.min(header);
    for at in 8..end {
        let mut hostile = bytes.clone();
        hostile[at..at + 8].fill(0xff);
        // Some of these only change a text; whatever happens must be an error or a model.
        if let Err(e) = open(&hostile) {
            assert!(!format!("{e:#}").contains('\n'), "{e:#}");
        }
    }
    for at in [8, 16, 24] {
        let mut hostile = bytes.clone();
        hostile[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
        assert!(open(&hostile).is_err(), "a length at {at}");
    }
}

/// The one file in a zip, stored and compressed.
#[test]
fn zip_with_one_gguf() {
    use std::io::Write;
    use zip::write::{SimpleFileOptions, ZipWriter};
    let gguf = fixtures::small_tensors(small_gguf("llama"), VOCAB).bytes();
    let plain = matrix(&open_gguf(&gguf).expect("it opens"), 0, Projection::Qkv);
    let dir = directory();
    let path = dir.path().join("model.whl");
    let write = |names: &[&str], method| {
        let mut zip = ZipWriter::new(fs::File::create(&path).expect("writable"));
        for name in names {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).expect("writable");
            zip.write_all(&gguf).expect("writable");
        }
        zip.finish().expect("writable");
    };
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        write(&["a/model.gguf", "a/other.txt"], method);
        assert_eq!(matrix(&Source::open(&path).expect("it opens"), 0, Projection::Qkv), plain);
    }
    write(&["a.gguf", "b.gguf"], zip::CompressionMethod::Stored);
    assert_says(Source::open(&path), &["2 .gguf files, one is expected"]);
    write(&["a.txt"], zip::CompressionMethod::Stored);
    assert_says(Source::open(&path), &["0 .gguf files"]);
    fs::write(&path, b"PK\x03\x04 and nothing else").expect("writable");
    assert_says(Source::open(&path), &["zip: 22 bytes at least are expected: is the file truncated?"]);
}

#[test]
fn smollm2_opens_from_its_wheel() {
    let Some(path) = answers::smollm2() else { return };
    let source = Source::open(&path).expect("it opens");
    let config = source.config();
    let (attention, inner) = (config.layers[29].attention(), config.layers[29].intermediate_size());
    assert_eq!((config.layers.len(), attention.num_heads, attention.num_kv_heads), (30, 9, 3));
    assert_eq!((config.hidden_size, inner, config.vocab_size), (576, 1536, 49152));
    assert_eq!((config.ropes[0].theta, config.rms_norm_eps), (100_000.0, 1e-5));
    assert!(config.tie_word_embeddings && source.texts().chat_template.is_some());
    assert_eq!((source.config_json()["rms_norm_eps"].clone(), source.bits(0)), (json!(1e-5), None));
}
