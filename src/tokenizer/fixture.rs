//! Small tokenizers of every kind that models have, trained on the book in `tests/data`.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, PreTokenizerWrapper};

use super::{TextFiles, Tokenizer};
use crate::config::ModelConfig;

/// Special tokens that start and end turns.
pub(super) const SPECIALS: [&str; 7] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<mask>", "PAD"];

/// Text to train on and to draw from.
pub(super) fn book() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/botchan.txt");
    let book = std::fs::read_to_string(path).expect("readable").replace("\r\n", "\n");
    book.trim_start_matches('\u{feff}').chars().take(40_000).collect()
}

/// The kinds by name.
pub(super) fn kinds() -> Vec<(&'static str, Tokenizer)> {
    let words = |pattern: &str| {
        json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        ] })
    };
    let digits = |pattern: &str| {
        let [before, after] = [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ];
        words(&[before, pattern, after].concat())
    };
    let (llama3, qwen2) = (digits(r"\p{N}{1,3}"), digits(r"\p{N}"));
    let metaspace = |scheme: &str, split: bool| -> Value {
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split })
    };
    let llama2 = json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "▁" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
    ] });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let byte_level = trained(true);
    let pieces = trained(false);
    let with = |json: &Value, parts: &[(&str, Value)]| {
        let mut json = json.clone();
        for (key, part) in parts {
            match *key {
                "ignore_merges" => json["model"][*key] = part.clone(),
                _ => json[*key] = part.clone(),
            }
        }
        tokenizer(json)
    };
    let none = Value::Null;
    vec![
        ("gpt-2", with(&byte_level, &[])),
        ("llama-3", with(&byte_level, &[("pre_tokenizer", llama3), ("ignore_merges", true.into())])),
        ("qwen2", with(&byte_level, &[("pre_tokenizer", qwen2), ("normalizer", json!({ "type": "NFC" }))])),
        ("llama-2", with(&pieces, &[("normalizer", llama2), ("pre_tokenizer", none.clone())])),
        ("no prefix", with(&pieces, &[("normalizer", replace), ("pre_tokenizer", none)])),
        ("metaspace first", with(&pieces, &[("pre_tokenizer", metaspace("first", false))])),
        ("metaspace always", with(&pieces, &[("pre_tokenizer", metaspace("always", true))])),
        ("metaspace never", with(&pieces, &[("pre_tokenizer", metaspace("never", false))])),
        ("unigram", tokenizer(unigram())),
    ]
}

/// Kinds whose special tokens are found, or not, depending on the text next to them.
pub(super) fn odd_kinds() -> Vec<(&'static str, Tokenizer)> {
    let change = |name, of: &str, key: &str| {
        let (_, tokenizer) = kinds().into_iter().find(|(kind, _)| *kind == of).expect("a kind");
        let mut json: Value = serde_json::from_str(&tokenizer.inner.to_string(false).expect("JSON")).expect("JSON");
        for token in json["added_tokens"].as_array_mut().into_iter().flatten() {
            if token["content"] != "<tool>" {
                token[key] = (!token[key].as_bool().expect("a flag")).into();
            }
        }
        (name, with_template(json.to_string().into_bytes(), None))
    };
    vec![
        change("normalized, bytes", "qwen2", "normalized"),
        change("normalized, pieces", "llama-2", "normalized"),
        change("whole words", "gpt-2", "single_word"),
        change("space before", "llama-3", "lstrip"),
        change("space behind", "llama-2", "rstrip"),
        change("not special", "gpt-2", "special"),
    ]
}

/// A BPE tokenizer on bytes, or on pieces of text with bytes to fall back on.
fn trained(on_bytes: bool) -> Value {
    let trainer = BpeTrainer::builder().vocab_size(900).show_progress(false);
    let mut json = if on_bytes {
        let alphabet = ByteLevel::alphabet().into_iter().collect();
        train(BPE::default(), ByteLevel::new(false, true, true), trainer.initial_alphabet(alphabet).build())
    } else {
        let bytes = (0..256).map(|byte| AddedToken::from(format!("<0x{byte:02X}>"), false)).collect();
        let words = Metaspace::new('▁', PrependScheme::Never, true);
        train(BPE::default(), words, trainer.special_tokens(bytes).build())
    };
    json["added_tokens"] = json!([]);
    json["model"]["byte_fallback"] = (!on_bytes).into();
    json["decoder"] = match on_bytes {
        true => json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        false => json!({ "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
        ] }),
    };
    json
}

/// A Unigram tokenizer whose vocabulary has the special tokens too, as SentencePiece's has.
fn unigram() -> Value {
    let mut trainer = UnigramTrainer::builder();
    trainer.vocab_size(600).show_progress(false).unk_token(Some("<unk>".to_owned()));
    trainer.special_tokens(["<unk>", "<s>", "</s>"].map(|token| AddedToken::from(token, true)).to_vec());
    let words = Metaspace::new('▁', PrependScheme::Always, true);
    train(Unigram::default(), words, trainer.build().expect("a trainer"))
}

fn train(
    model: impl Into<ModelWrapper>,
    words: impl Into<PreTokenizerWrapper>,
    trainer: impl Into<TrainerWrapper>,
) -> Value {
    let mut trained = tokenizers::Tokenizer::new(model);
    trained.with_pre_tokenizer(Some(words));
    trained.train(&mut trainer.into(), book().lines()).expect("it trains");
    serde_json::from_str(&trained.to_string(false).expect("JSON")).expect("JSON")
}

/// With special tokens, and BOS before each text.
fn tokenizer(mut json: Value) -> Tokenizer {
    let mut inner = tokenizers::Tokenizer::from_bytes(json.to_string()).expect("it loads");
    let special = |name: &str| AddedToken::from(name, true).lstrip(name == "<mask>").rstrip(name == "<|user|>");
    inner.add_special_tokens(SPECIALS.map(special)).expect("they are new");
    inner.add_tokens([AddedToken::from("<tool>", false)]).expect("it is new");
    json = serde_json::from_str(&inner.to_string(false).expect("JSON")).expect("JSON");
    let bos = inner.token_to_id("<s>").expect("it is there");
    json["post_processor"] = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [bos], "tokens": ["<s>"] } },
    });
    with_template(json.to_string().into_bytes(), None)
}

/// A tokenizer of `tokenizer.json`, and a chat template.
pub(super) fn with_template(tokenizer_json: Vec<u8>, chat_template: Option<&str>) -> Tokenizer {
    let files = TextFiles {
        tokenizer_json,
        chat_template: chat_template.map(str::to_owned),
        special_tokens: [("bos_token", "<s>"), ("eos_token", "</s>")]
            .map(|(name, token)| (name.to_owned(), Some(token.to_owned())))
            .into(),
        eos_token_ids: vec![],
    };
    let config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").expect("it is known");
    Tokenizer::new(&files, &ModelConfig { eos_token_ids: vec![], bos_token_id: None, ..config }).expect("it loads")
}
