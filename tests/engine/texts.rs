//! Text, chats and stop texts, with a tiny model that has a tokenizer and a chat template.

use std::fs;
use std::path::Path;

use decdec::device::Device;
use decdec::engine::{Engine, Finish, Options, Settings};
use decdec::sampling::Sampling;
use decdec::tokenizer::Message;
use serde_json::json;

/// The tiny Llama of `tests/data` with a long context, as a directory.
fn model() -> tempfile::TempDir {
    let (dir, data) = (tempfile::tempdir().expect("a directory"), Path::new("tests/data"));
    let copy = |from: &str, to: &str| fs::copy(data.join(from), dir.path().join(to)).map(drop).expect("copied");
    copy("models/llama-3-yarn/model.safetensors", "model.safetensors");
    copy("tokenizers/llama-3.json", "tokenizer.json");
    copy("chat/llama-3.jinja", "chat_template.jinja");
    let config = fs::read_to_string(data.join("models/llama-3-yarn/config.json")).expect("text");
    let config = config.replace("\"max_position_embeddings\": 96", "\"max_position_embeddings\": 600");
    fs::write(dir.path().join("config.json"), config).expect("written");
    let tokens = json!({ "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>" });
    fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).expect("written");
    dir
}

/// Says all of what is random, without an end.
fn talkative(max_new_tokens: usize) -> Settings {
    let sampling = Sampling { temperature: 1.5, ..Sampling::GREEDY };
    Settings { sampling, seed: 5, max_new_tokens, ignore_eos: true, ..Settings::default() }
}

/// Pieces are the text, and a stop text ends it wherever tokens meet in it; what was held back comes out.
#[test]
fn pieces_and_stop_texts() {
    let (dir, device) = (model(), Device::open("cpu").unwrap());
    let engine = Engine::open(&device, dir.path(), &Options::default()).unwrap();
    let mut session = engine.session(talkative(60)).unwrap();
    let mut make = |stop: &[&str]| {
        session.clear();
        session.settings.stop = stop.iter().map(|&stop| stop.to_owned()).collect();
        session.prompt_text("once").unwrap();
        let mut pieces = Vec::new();
        while let Some(piece) = session.next().unwrap() {
            pieces.push(piece);
        }
        let made = session.made().clone();
        assert_eq!(pieces.iter().map(|piece| &*piece.text).collect::<String>(), made.text);
        assert_eq!(pieces.iter().filter_map(|piece| piece.token).collect::<Vec<_>>(), made.tokens);
        made
    };
    let free = make(&[]);
    assert_eq!((free.tokens.len(), free.finish), (60, Some(Finish::Length)));
    let prompt = engine.tokenizer().unwrap().encode("once").unwrap();
    let decode = |ids: &[u32]| engine.tokenizer().unwrap().decode(ids).unwrap();
    assert_eq!(format!("{}{}", decode(&prompt), free.text), decode(&[&prompt[..], &free.tokens].concat()));

    let characters: Vec<char> = free.text.chars().collect();
    let mut stopped = 0;
    for from in 0..characters.len() - 3 {
        // Three characters, which are at least two tokens of this model.
        let stop: String = characters[from..from + 3].iter().collect();
        let first = free.text.find(&stop).expect("it is there");
        let made = make(&["", "never to be seen", &stop]);
        assert_eq!((&*made.text, made.finish), (&free.text[..first], Some(Finish::Caller)), "{stop:?}");
        assert!(made.tokens.len() <= free.tokens.len() && free.tokens.starts_with(&made.tokens));
        stopped += usize::from(made.tokens.len() < free.tokens.len());
    }
    assert!(stopped > 20, "{stopped} stop texts ended a text before its end");
    // The beginning of a stop text that never comes is held back, and comes out at the end.
    let last = characters.last().expect("a character");
    assert_eq!(make(&[&format!("{last}never")]).text, free.text);
}

/// Of a conversation, only what is new is read; the answer is what a new session gives for the whole.
#[test]
fn a_chat_reads_what_is_new() {
    let (dir, device) = (model(), Device::open("cpu").unwrap());
    let engine = Engine::open(&device, dir.path(), &Options::default()).unwrap();
    let mut session = engine.session(talkative(20)).unwrap();
    let (mut messages, mut before) = (vec![Message::new("system", "be brief")], 0);
    for question in ["hello", "and now?", "why"] {
        messages.push(Message::new("user", question));
        session.prompt_chat(&messages).unwrap();
        let made = session.rest().unwrap().clone();
        // All that the conversation had before is there, but for the answer where its text becomes other tokens.
        assert!(made.kept >= before, "{} tokens kept, {before} were asked", made.kept);
        before = engine.tokenizer().unwrap().chat_ids(&messages, true).unwrap().len() - 1;
        messages.push(Message::new("assistant", &made.text));
    }
    messages.push(Message::new("user", "x".repeat(700).as_str()));
    let error = session.prompt_chat(&messages).unwrap_err();
    assert_eq!(error.kind(), decdec::engine::ErrorKind::ContextFull, "{error}");
    messages.push(Message::new("no role", "x"));
    let error = session.prompt_chat(&messages).unwrap_err();
    assert_eq!(error.kind(), decdec::engine::ErrorKind::Input, "{error}");
}
