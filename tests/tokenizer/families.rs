//! The tokenizers of `tests/data/tokenizers` against what transformers makes of texts and chats, from a directory and
//! from the GGUF files of `tests/data/models`.

use std::fs;
use std::path::{Path, PathBuf};

use decdec::config::ModelConfig;
use decdec::source::Source;
use decdec::tokenizer::{Message, TextFiles, Tokenizer};
use decdec::weights::ModelWeights;
use serde_json::{Value, json};

use super::{ids, texts};

/// The models that have a GGUF: their tokenizer, their chat template, and the tokens that end a text.
const FILES: [(&str, &str, &str, &[u32]); 16] = [
    ("gemma-2", "gemma", "gemma-2", &[1, 5]),
    ("gemma-3-1b", "gemma", "gemma-3", &[1, 5]),
    ("gemma-3-4b", "gemma", "gemma-3", &[1, 5]),
    ("glm-4-9b", "glm-4", "glm-4", &[296, 298]),
    ("granite-3.3", "granite", "granite-3.3", &[296]),
    ("llama-3-yarn", "llama-3", "llama-3", &[297, 300]),
    ("ministral-3", "tekken", "mistral-small-3.1", &[2]),
    ("mistral-small-3.1", "tekken", "mistral-small-3.1", &[2]),
    ("olmo-2", "olmo", "olmo-2", &[296, 299]),
    ("olmo-3", "olmo", "olmo-3", &[296, 299]),
    ("phi-3-mini-128k", "phi-3", "phi-3-mini-4k", &[300, 303]),
    ("phi-4", "phi-4", "phi-4", &[298]),
    ("phi-4-mini", "phi-4-mini", "phi-4-mini", &[296, 297]),
    ("qwen2.5-yarn", "qwen", "qwen2.5", &[297]),
    ("qwen3", "qwen", "qwen3", &[297]),
    ("smollm3", "smollm3", "smollm3", &[298]),
];

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn read_json(path: &str) -> Value {
    serde_json::from_slice(&fs::read(data(path)).expect("readable")).expect("JSON")
}

/// The tokenizer of a family with the files of a directory.
fn from_directory(name: &str, template: &str, renderings: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let family = &renderings["families"][template];
    let tokens = json!({ "bos_token": family["bos_token"], "eos_token": family["eos_token"] });
    fs::copy(data(&format!("tokenizers/{name}.json")), dir.path().join("tokenizer.json")).expect("copied");
    fs::copy(data(&format!("chat/{template}.jinja")), dir.path().join("chat_template.jinja")).expect("copied");
    fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).expect("writable");
    let config = ModelConfig { vocab_size: 320, ..texts(|_| ()).1 };
    Tokenizer::new(&TextFiles::read(dir.path()).expect("readable"), &config).unwrap_or_else(|e| panic!("{name}: {e:#}"))
}

/// Whether texts and chats become the ids of the tokenizer `name` and its template.
fn agrees(tokenizer: &Tokenizer, name: &str, template: &str, known: &Value, renderings: &Value) -> Result<(), String> {
    let wanted = &known["tokenizers"][name];
    for (text, wanted) in
        known["texts"].as_array().expect("a list").iter().zip(wanted["ids"].as_array().expect("a list"))
    {
        let got = tokenizer.encode(text.as_str().expect("a text")).expect("ids");
        if got != ids(wanted) {
            return Err(format!("{name}: {text} becomes {got:?}, not {wanted}"));
        }
    }
    let conversations = renderings["conversations"].as_array().expect("a list");
    for (conversation, wanted) in conversations.iter().zip(wanted["chats"][template].as_array().expect("a list")) {
        let turns = conversation.as_array().expect("turns").iter();
        let messages: Vec<_> =
            turns.map(|t| Message::new(t[0].as_str().expect("a role"), t[1].as_str().expect("a text"))).collect();
        let got = tokenizer.chat_ids(&messages, true).ok();
        if got != wanted.is_array().then(|| ids(wanted)) {
            return Err(format!("{template}: {conversation} becomes {got:?}, not {wanted}"));
        }
    }
    Ok(())
}

#[test]
fn every_family_from_a_directory() {
    let (known, renderings) = (read_json("tokenizers/known.json"), read_json("chat/renderings.json"));
    for (name, wanted) in known["tokenizers"].as_object().expect("an object") {
        for template in wanted["chats"].as_object().expect("an object").keys() {
            let tokenizer = from_directory(name, template, &renderings);
            agrees(&tokenizer, name, template, &known, &renderings).expect("the ids of transformers");
        }
    }
    // Tokenizers that cut words in another way, or find other special tokens.
    for (name, other, template) in [
        ("qwen", "phi-4", "phi-4"),
        ("phi-4-mini", "phi-4", "phi-4"),
        ("granite", "glm-4", "glm-4"),
        ("phi-3", "gemma", "gemma-2"),
        ("olmo", "phi-4", "phi-4"),
    ] {
        let tokenizer = from_directory(name, template, &renderings);
        agrees(&tokenizer, other, template, &known, &renderings).expect_err("another tokenizer");
    }
}

#[test]
fn every_family_from_gguf() {
    let (known, renderings) = (read_json("tokenizers/known.json"), read_json("chat/renderings.json"));
    for (model, name, template, ends) in FILES {
        let source =
            Source::open(&data(&format!("models/{model}/model.gguf"))).unwrap_or_else(|e| panic!("{model}: {e:#}"));
        let tokenizer = Tokenizer::new(source.texts(), source.config()).unwrap_or_else(|e| panic!("{model}: {e:#}"));
        agrees(&tokenizer, name, template, &known, &renderings).unwrap_or_else(|e| panic!("{model}: {e}"));
        assert_eq!(tokenizer.stop_ids(), ends, "{model}");
    }
}
