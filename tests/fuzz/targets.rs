//! What is fuzzed: one function for each kind of file that comes from outside, which tells whether the file was
//! accepted. None may panic, hang, or hold more than [`CAP`](crate::allocation::CAP) beyond what it maps.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use decdec::checkpoint::Checkpoint;
use decdec::config::{LayerNorm, ModelConfig, Projection};
use decdec::format::Format;
use decdec::nsys::{self, Identity, Precision};
use decdec::open::Opened;
use decdec::source::Source;
use decdec::source::torch::{TorchFile, Value};
use decdec::tokenizer::{Message, TextFiles, Tokenizer};
use decdec::weights::ModelWeights;
use serde_json::{Value as Json, json};

use crate::pt::{End, Entry, archive};

#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&[u8]) -> bool,
}

pub(crate) const TARGETS: [Target; 8] = [
    Target { name: "pickle", run: pickle },
    Target { name: "zip", run: zip },
    Target { name: "gguf", run: gguf },
    Target { name: "safetensors", run: safetensors },
    Target { name: "config", run: config },
    Target { name: "tokenizer", run: tokenizer },
    Target { name: "sqlite", run: sqlite },
    Target { name: "trace", run: trace },
];

#[allow(dead_code, reason = "the test program runs all of them")]
pub(crate) fn find(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

/// A directory in memory where the system has one: disks make thousands of rewritten files slow.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary directory")
}

/// The directory for the files of this process.
static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(scratch);

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = DIR.path().join(name);
    fs::write(&path, bytes).expect("writable");
    path
}

/// A directory of which all files but one stay the same.
fn directory(name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let dir = DIR.path().join(name);
    fs::create_dir_all(&dir).expect("writable");
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).expect("writable");
    }
    dir
}

/// The pickle of an archive with a storage of 64 bytes.
fn pickle(data: &[u8]) -> bool {
    let entries = [Entry::new("a/data.pkl", data), Entry::new("a/data/0", [0x3c; 64])];
    let path = file("pickle.pt", &archive(&entries, &End::default(), 0));
    read_torch(&path)
}

/// A whole archive: as `torch.save` writes it, and with a GGUF inside.
fn zip(data: &[u8]) -> bool {
    let path = file("archive.zip", data);
    read_torch(&path) | read_source(&path)
}

fn gguf(data: &[u8]) -> bool {
    read_source(&file("model.gguf", data))
}

/// Of a Hugging Face directory and of a checkpoint, whose files may all be the same one.
fn safetensors(data: &[u8]) -> bool {
    static SOURCE: LazyLock<PathBuf> = LazyLock::new(|| {
        let config = small_config().to_string();
        directory("source", &[("config.json", config.as_bytes()), ("tokenizer.json", TOKENIZER)])
    });
    static CHECKPOINT: LazyLock<PathBuf> = LazyLock::new(|| {
        let mut config = small_config();
        config["decdec"] = json!({
            "version": 1, "backend": "ap", "bits": 3.0, "group_size": null, "residual_bits": 4, "source": "", "calibration": "",
        });
        directory("checkpoint", &[("config.json", config.to_string().as_bytes()), ("tokenizer.json", TOKENIZER)])
    });
    fs::write(SOURCE.join("model.safetensors"), data).expect("writable");
    let source = read_source(&SOURCE);
    for name in ["model", "residuals", "thresholds"] {
        fs::write(CHECKPOINT.join(name).with_extension("safetensors"), data).expect("writable");
    }
    let checkpoint = Checkpoint::open(&CHECKPOINT);
    checkpoint.as_ref().is_ok_and(|checkpoint| read_weights(checkpoint)) | source
}

/// `config.json` of a directory that is otherwise in order, and read by whichever reader it asks for.
fn config(data: &[u8]) -> bool {
    static MODEL: LazyLock<PathBuf> = LazyLock::new(|| directory("config", &[("tokenizer.json", TOKENIZER)]));
    let json = serde_json::from_slice::<Json>(data).ok();
    let config = json.and_then(|json| ModelConfig::from_json(&json).ok());
    let accepted = config.is_some_and(|config| !config.ropes[0].frequencies(1).is_empty());
    fs::write(MODEL.join("config.json"), data).expect("writable");
    Opened::open(&MODEL, None, false).is_ok() | accepted
}

/// `tokenizer.json`, loaded and used.
fn tokenizer(data: &[u8]) -> bool {
    static CONFIG: LazyLock<ModelConfig> = LazyLock::new(|| ModelConfig::from_json(&small_config()).expect("good"));
    let files = TextFiles {
        tokenizer_json: data.to_vec(),
        chat_template: Some("<s>{{ messages[0].content }}<s>".into()),
        special_tokens: [("bos_token".into(), Some("<s>".into()))].into(),
        eos_token_ids: vec![],
    };
    let Ok(tokenizer) = Tokenizer::new(&files, &CONFIG) else { return false };
    for text in ["", "a b\n 12 <s>x", "\u{1F600}\u{e9}e\u{301}"] {
        let ids = tokenizer.encode(text).unwrap_or_default();
        let _ = (tokenizer.encode_chat(text), tokenizer.decode(&ids), tokenizer.decode(&[0, 7, u32::MAX]));
        let _ = tokenizer.chat_ids(&[Message::new("user", text)], true);
        let mut stream = tokenizer.stream();
        ids.iter().for_each(|&id| drop(stream.push(id)));
        let _ = stream.flush();
    }
    true
}

/// An export of Nsight Systems beside a trace of two pairs.
fn sqlite(data: &[u8]) -> bool {
    static TRACE_FILE: LazyLock<PathBuf> = LazyLock::new(|| file("profile.trace", TRACE.as_bytes()));
    nsys::read(&TRACE_FILE, &file("profile.sqlite", data), &identity()).is_ok()
}

fn trace(data: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(data) else { return false };
    [Format::AnyPrec, Format::LutGemm].into_iter().any(|algo| {
        let Ok(lines) = nsys::trace::parse(text, algo) else { return false };
        let written: String = lines.iter().map(|line| format!("{}\n", line.display(algo))).collect();
        assert_eq!(nsys::trace::parse(&written, algo).expect("what is written can be read"), lines);
        true
    })
}

pub(crate) fn identity() -> Identity {
    Identity { prefix: "p".into(), model: "m".into(), precision: Precision::Fp16, format: Format::AnyPrec, bits: 3 }
}

/// The trace that every SQLite file is read with.
pub(crate) const TRACE: &str = "compile matmul_kbit_32 qkv\nwarmup matmul_kbit_32 qkv\nstandalone matmul_kbit_32 qkv\n\
    concurrent 0 fused_dec_kernel 8\nconcurrent 0 matmul_kbit_32 qkv\n";

pub(crate) const TOKENIZER: &[u8] = br#"{"version": "1.0", "added_tokens": [], "model":
    {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}"#;

/// One layer, one head, everything 32 wide.
pub(crate) fn small_config() -> Json {
    json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 16, "tie_word_embeddings": true,
    })
}

fn read_torch(path: &Path) -> bool {
    TorchFile::open(path).is_ok_and(|file| {
        read_value(file.root(), 4);
        true
    })
}

fn read_source(path: &Path) -> bool {
    let Ok(source) = Source::open(path) else { return false };
    read_weights(&source);
    if let Ok(tokenizer) = Tokenizer::new(source.texts(), source.config()) {
        let ids = tokenizer.encode("a b").unwrap_or_default();
        let _ = tokenizer.decode(&ids);
    }
    true
}

/// Reads every tensor of a model that has few of them.
fn read_weights(weights: &dyn ModelWeights) -> bool {
    let _ = (weights.embedding().map(drop), weights.head().map(drop), weights.final_norm());
    for layer in 0..weights.config().layers.len().min(4) {
        for norm in LayerNorm::ALL {
            let _ = weights.norm(layer, norm);
        }
        for projection in Projection::ALL {
            let Ok(linear) = weights.projection(layer, projection) else { continue };
            let mut row = vec![0.0; linear.weight.in_features()];
            linear.weight.row(linear.weight.out_features() - 1, &mut row);
            if let Some(residual) = linear.residual {
                residual.row(0, &mut row);
            }
        }
    }
    true
}

/// Reads all that a file of PyTorch's holds.
fn read_value(value: Value<'_>, depth: usize) {
    if let Ok(tensor) = value.tensor() {
        let _ = (tensor.floats().map(drop), tensor.words().map(drop), tensor.integers());
    }
    if depth == 0 {
        return;
    }
    value.entries().into_iter().flatten().for_each(|(_, value)| read_value(value, depth - 1));
    value.items().into_iter().flatten().for_each(|value| read_value(value, depth - 1));
}
