//! A text that grows token by token ends as the text of all tokens at once.

use decdec::tokenizer::{TextFiles, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Tokens that decoders treat in their own ways; the 256 byte tokens follow.
const TOKENS: [&str; 34] = [
    "<s>", "</s>", "▁the", "▁", "▁▁x", "a", "b▁", "é", "日", "\u{fffd}", " ", "  ", " b ", "lo</w>", "</w>", "##ing",
    "##", ".", " do not", "'s", "[PAD]", "|", "Ġa", "Ã", "©", "ðŁĺ", "Ģ", "Ġ", "Ċ", "<0xg1>", "<0xé>", "▁b", "stop",
    "▁stop",
];

const BYTES: u32 = TOKENS.len() as u32;

/// The id of a token, or of the byte that `<0x..>` spells.
fn id(token: &str) -> u32 {
    let byte = token.strip_prefix("<0x").and_then(|rest| u8::from_str_radix(rest.strip_suffix('>')?, 16).ok());
    let place = || TOKENS.iter().position(|&known| known == token).expect("a token") as u32;
    byte.map_or_else(place, |byte| BYTES + u32::from(byte))
}

fn ids(tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| id(token)).collect()
}

/// A tokenizer of these tokens with this decoder.
fn tokenizer(decoder: &Value) -> Tokenizer {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = TOKENS.iter().map(|&token| token.to_owned()).chain(bytes);
    let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, json!(id))).collect();
    let added = |id: u32| {
        json!({ "id": id, "content": TOKENS[id as usize], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let json = json!({
        "version": "1.0", "added_tokens": [added(0), added(1)], "decoder": decoder,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    let files = TextFiles {
        tokenizer_json: json.to_string().into_bytes(),
        chat_template: None,
        special_tokens: super::named(&[("bos_token", Some("<s>"))]),
        eos_token_ids: vec![],
    };
    let (_, config) = super::texts(|_| ());
    Tokenizer::new(&files, &config).expect("it loads")
}

fn sequence(decoders: &[Value]) -> Value {
    json!({ "type": "Sequence", "decoders": decoders })
}

fn strip(start: usize, stop: usize) -> Value {
    json!({ "type": "Strip", "content": " ", "start": start, "stop": stop })
}

fn replace(from: &str, to: &str) -> Value {
    json!({ "type": "Replace", "pattern": { "String": from }, "content": to })
}

/// SentencePiece's decoder as Llama 2 has it, with `more` steps at its end.
fn sentence_piece(more: &[Value]) -> Value {
    let steps = [replace("▁", " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    sequence(&[&steps, more].concat())
}

fn byte_level() -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false })
}

fn metaspace(scheme: &str) -> Value {
    json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true })
}

/// Every kind of step that `tokenizer.json` may have, and the sequences in use.
fn decoders() -> Vec<(&'static str, Value)> {
    let word_piece = |cleanup: bool| json!({ "type": "WordPiece", "prefix": "##", "cleanup": cleanup });
    let ctc = json!({ "type": "CTC", "pad_token": "[PAD]", "word_delimiter_token": "|", "cleanup": true });
    let fallback = json!({ "type": "ByteFallback" });
    vec![
        ("none", Value::Null),
        ("byte-level", byte_level()),
        ("byte fallback", fallback.clone()),
        ("Llama", sentence_piece(&[strip(1, 0)])),
        ("without strip", sentence_piece(&[])),
        ("two spaces go", sentence_piece(&[strip(2, 0)])),
        ("both ends", sentence_piece(&[strip(1, 2)])),
        ("replaced after all", sentence_piece(&[replace("a", "bb"), strip(1, 0)])),
        ("Metaspace", metaspace("always")),
        ("Metaspace, first", metaspace("first")),
        ("Metaspace, never", metaspace("never")),
        ("WordPiece", word_piece(false)),
        ("WordPiece, cleaned", word_piece(true)),
        ("ends of words", json!({ "type": "BPEDecoder", "suffix": "</w>" })),
        ("CTC", ctc),
        ("strip each", sequence(&[strip(1, 0), fallback.clone()])),
        ("words and bytes", sequence(&[metaspace("first"), fallback])),
        ("nested", sequence(&[sequence(&[replace("▁", " ")]), sequence(&[byte_level(), strip(1, 0)])])),
    ]
}

/// What a stream hands out at each token, and at the end.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).expect("a token")).collect();
    pieces.push(stream.flush().expect("the rest"));
    assert!(!pieces.iter().flatten().any(String::is_empty), "a piece has text");
    pieces.into_iter().map(Option::unwrap_or_default).collect()
}

/// Tokens in which bytes often follow each other; some ids are unknown.
fn any_tokens() -> impl Strategy<Value = Vec<u32>> {
    let character = proptest::char::any().prop_map(|c| {
        let mut bytes = [0; 4];
        c.encode_utf8(&mut bytes).bytes().map(|byte| BYTES + u32::from(byte)).collect()
    });
    let one = prop_oneof![0..BYTES, BYTES..BYTES + 260];
    let some = prop_oneof![
        3 => one.prop_map(|id| vec![id]),
        1 => character,
        1 => proptest::collection::vec(BYTES + 0x80..BYTES + 256, 1..5),
    ];
    proptest::collection::vec(some, 0..24).prop_map(|runs| runs.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_stream_ends_as_all_tokens_at_once(ids in any_tokens()) {
        thread_local! {
            static TOKENIZERS: Vec<(&'static str, Tokenizer)> =
                decoders().into_iter().map(|(name, decoder)| (name, tokenizer(&decoder))).collect();
        }
        TOKENIZERS.with(|tokenizers| {
            for (name, tokenizer) in tokenizers {
                // Some decoders give up on a text that is shorter than what they strip.
                let Ok(whole) = tokenizer.decode(&ids) else { continue };
                let pieces = pieces(tokenizer, &ids);
                prop_assert_eq!(pieces.concat(), whole.clone(), "{}", name);
                // A stop text is found where it stands, however it is cut.
                for stop in ["stop", " stop", "\u{fffd}", "日", " b"] {
                    let mut text = String::new();
                    let found = pieces.iter().find_map(|piece| {
                        text.push_str(piece);
                        text.find(stop)
                    });
                    prop_assert_eq!(found, whole.find(stop), "{} {:?}", name, stop);
                }
            }
            Ok(())
        })?;
    }

    #[test]
    fn nothing_waits_longer_than_it_must(ids in any_tokens()) {
        let bytes = tokenizer(&byte_level());
        let fallback = tokenizer(&sentence_piece(&[strip(1, 0)]));
        let (mut by_bytes, mut by_fallback) = (String::new(), String::new());
        let (byte_pieces, fallback_pieces) = (pieces(&bytes, &ids), pieces(&fallback, &ids));
        for n in 0..ids.len() {
            by_bytes.push_str(&byte_pieces[n]);
            by_fallback.push_str(&fallback_pieces[n]);
            let known = bytes.decode(&ids[..=n]).expect("a text");
            let rest = known.strip_prefix(by_bytes.as_str()).expect("what was shown stays");
            prop_assert!(["", "\u{fffd}"].contains(&rest), "one character may be incomplete, {rest:?} waits");
            let is_byte = |id: u32| (BYTES..BYTES + 256).contains(&id);
            let is_known = |id: u32| id < BYTES + 256;
            if ids[..=n].iter().rfind(|&&id| is_known(id)).is_some_and(|&id| !is_byte(id)) {
                prop_assert_eq!(&by_fallback, &fallback.decode(&ids[..=n]).expect("a text"));
            }
        }
    }
}

#[test]
fn every_byte_has_its_character() {
    let tokenizer = tokenizer(&byte_level());
    let hidden = ["Ġ", "Ċ", "ðŁĺ", "Ģ", "Ã", "©"];
    assert_eq!(tokenizer.decode(&ids(&hidden)).expect("a text"), " \n\u{1F600}é");
    assert_eq!(pieces(&tokenizer, &ids(&hidden)), [" ", "\n", "", "\u{1F600}", "", "é", ""]);
    let alone: String = ids(&hidden).iter().map(|&id| tokenizer.decode(&[id]).expect("a text")).collect();
    assert_ne!(alone, " \n\u{1F600}é", "tokens decoded one by one make another text");
    // All 256 characters, each before one that completes nothing.
    let (gguf, _) = crate::fixtures::byte_level(crate::fixtures::small_config("llama"), "gpt-2", &["a b"]);
    let all = super::tokenizer(gguf).expect("it loads");
    for byte in 0..=255u32 {
        let ids = [2 + byte, 2 + u32::from(b'a')];
        assert_eq!(pieces(&all, &ids).concat(), all.decode(&ids).expect("a text"), "{byte}");
    }
}

/// What the package tokenizers 0.23 makes of these tokens.
#[test]
fn byte_tokens_as_the_original_decodes_them() {
    let cases: [(&[&str], &str); 8] = [
        (&["▁the", "<0xE6>", "<0x97>", "<0xA5>", "▁b"], "the日 b"),
        (&["▁the", "<0xE6>", "<0x97>", "a"], "the\u{fffd}\u{fffd}a"),
        (&["a", "<0x0A>", "<0xFF>", "a"], "a\u{fffd}\u{fffd}a"),
        (&["<0xC3>", "<0xA9>", "<0x80>", "▁b"], "\u{fffd}\u{fffd}\u{fffd} b"),
        (&["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], "\u{1F600}"),
        (&["<0xED>", "<0xA0>", "<0x80>"], "\u{fffd}\u{fffd}\u{fffd}"),
        (&["▁", "▁the"], " the"),
        (&["<0x20>", "a", "<0xg1>"], "a<0xg1>"),
    ];
    let tokenizer = tokenizer(&sentence_piece(&[strip(1, 0)]));
    for (tokens, expected) in cases {
        assert_eq!(tokenizer.decode(&ids(tokens)).expect("a text"), expected, "{tokens:?}");
        assert_eq!(pieces(&tokenizer, &ids(tokens)).concat(), expected, "{tokens:?}");
    }
    // A run of bytes is shown by the token after it.
    let shown = pieces(&tokenizer, &ids(&["a", "<0xC3>", "<0xA9>", "a"]));
    assert_eq!(shown, ["a", "", "", "éa", ""]);
}

#[test]
fn a_stream_shows_whole_characters() {
    let tokenizer = super::small("gpt-2", &["a b"], |gguf| gguf);
    let mut stream = tokenizer.stream();
    let ids = tokenizer.encode("a\u{1F600}é").expect("ids");
    let shown: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id).expect("a token")).collect();
    let expected = [Some("a"), None, None, None, Some("\u{1F600}"), None, Some("é")];
    assert_eq!(shown, expected.map(|piece| piece.map(str::to_owned)));
    assert_eq!(stream.flush().expect("nothing"), None);
    for &id in &ids[1..3] {
        stream.push(id).expect("a token");
    }
    let rest = stream.flush().expect("the rest");
    assert_eq!(rest.as_deref(), Some("\u{fffd}"), "what is incomplete at the end shows so");
    assert_eq!(stream.flush().expect("nothing"), None);
}

#[test]
fn an_answer_keeps_the_space_before_its_first_word() {
    for (name, decoder) in decoders() {
        let tokenizer = tokenizer(&decoder);
        // At the end of a prompt, this decoder writes a suffix in another way: nothing after it can undo that.
        if name == "ends of words" || name == "both ends" {
            continue;
        }
        for (prompt, answer) in [
            (&["<s>", "▁the"][..], &["▁stop", "a", "▁b"][..]),
            (&["<s>", "a"], &["▁", "▁stop"]),
            (&["▁the", "."], &["##ing", "stop", "<0xC3>", "<0xA9>"]),
            (&["▁the"], &["<0xF0>", "<0x9F>", "▁b"]),
        ] {
            let (prompt, answer) = (ids(prompt), ids(answer));
            let mut stream = tokenizer.stream_after(&prompt);
            let mut text = tokenizer.decode(&prompt).expect("a text");
            for &id in &answer {
                text.extend(stream.push(id).expect("a token"));
            }
            text.extend(stream.flush().expect("the rest"));
            assert_eq!(text, tokenizer.decode(&[prompt, answer].concat()).expect("a text"), "{name}");
        }
    }
    let tokenizer = tokenizer(&sentence_piece(&[strip(1, 0)]));
    let first = |prompt: &[&str]| tokenizer.stream_after(&ids(prompt)).push(id("▁the")).expect("a token");
    assert_eq!(first(&["<s>", "a"]).as_deref(), Some(" the"));
    assert_eq!(first(&["<s>"]).as_deref(), Some("the"), "behind BOS a text starts");
    assert_eq!(first(&[]).as_deref(), Some("the"));
}

/// Tokens that never make a character do not pile up: each costs the same.
#[test]
fn a_stream_holds_back_little() {
    let tokenizer = tokenizer(&byte_level());
    // Each of these is shown at once, so nothing that came before is decoded again.
    let mut stream = tokenizer.stream();
    for _ in 0..20_000 {
        assert_eq!(stream.push(id("Ģ")).expect("a token").as_deref(), Some("\u{fffd}"));
    }
    assert_eq!(stream.flush().expect("nothing"), None);
}
