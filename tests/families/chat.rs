//! Texts and chats against the ids that transformers makes of them, and chats against what Jinja2 renders, from a
//! directory and from GGUF.

use std::path::Path;

use decdec::source::Source;
use decdec::tokenizer::{Message, TextFiles, Tokenizer};
use decdec::weights::ModelWeights;
use serde_json::Value;

use crate::models::{COMPLETE, Complete, complete_of, config, file, open, read_json};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The tokenizer with the files of a directory.
fn from_directory(complete: &Complete) -> Tokenizer {
    let dir = tempfile::tempdir().expect("a directory");
    complete.write_texts(dir.path());
    let model = open(complete.model, &config(complete.model, "published.json")).expect("the model opens");
    let files = TextFiles::read(dir.path()).expect("readable");
    Tokenizer::new(&files, model.config()).unwrap_or_else(|e| panic!("{}: {e:#}", complete.tokenizer))
}

fn from_gguf(path: &Path) -> Tokenizer {
    let source = Source::open(path).unwrap_or_else(|e| panic!("{path:?}: {e:#}"));
    Tokenizer::new(source.texts(), source.config()).unwrap_or_else(|e| panic!("{path:?}: {e:#}"))
}

/// Whether texts and chats become what they do with the tokenizer and template called so.
fn agrees(tokenizer: &Tokenizer, name: &str, template: &str) -> Result<(), String> {
    let (known, renderings) = (read_json("tokenizers/known.json"), read_json("chat/renderings.json"));
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let wanted = &known["tokenizers"][name];
    for (text, wanted) in list(&known["texts"]).iter().zip(list(&wanted["ids"])) {
        let got = tokenizer.encode(text.as_str().expect("a text")).expect("ids");
        if got != ids(&wanted) {
            return Err(format!("{name}: {text} becomes {got:?}, not {wanted}"));
        }
    }
    let rendered = list(&renderings["families"][template]["renderings"]);
    let wanted = list(&wanted["chats"][template]).into_iter().zip(rendered);
    for (conversation, (wanted, rendered)) in list(&renderings["conversations"]).iter().zip(wanted) {
        let turns = conversation.as_array().expect("turns").iter();
        let messages: Vec<_> =
            turns.map(|t| Message::new(t[0].as_str().expect("a role"), t[1].as_str().expect("a text"))).collect();
        let got = tokenizer.chat_ids(&messages, true).ok();
        if got != wanted.is_array().then(|| ids(&wanted)) {
            return Err(format!("{template}: {conversation} becomes {got:?}, not {wanted}"));
        }
        for (prompt, rendered) in [true, false].into_iter().zip(list(&rendered)) {
            let got = tokenizer.chat(&messages, prompt).ok();
            if got.as_deref() != rendered.as_str() {
                return Err(format!("{template}: {conversation} is rendered as {got:?}, not {rendered}"));
            }
        }
    }
    Ok(())
}

pub(crate) fn chat(family: &str) {
    for complete in complete_of(family) {
        let Complete { model, tokenizer: name, template, ends } = complete;
        agrees(&from_directory(complete), name, template).unwrap_or_else(|e| panic!("{model}: {e}"));
        let tokenizer = from_gguf(&file(model, "model.gguf"));
        agrees(&tokenizer, name, template).unwrap_or_else(|e| panic!("{model}, GGUF: {e}"));
        assert_eq!(tokenizer.stop_ids(), *ends, "{model}");
        // Every other tokenizer cuts words in another way, or has other special tokens.
        for other in COMPLETE.iter().filter(|other| other.tokenizer != *name) {
            let both = format!("{model} with the tokenizer of {}", other.model);
            agrees(&tokenizer, other.tokenizer, other.template).expect_err(&both);
        }
    }
}
