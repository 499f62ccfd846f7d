//! Special tokens that are spread over the files beside `tokenizer.json`.

use std::collections::BTreeMap;

use decdec::tokenizer::{TextFiles, Tokenizer};
use serde_json::{Value, json};

use super::named;

/// A text with every token that the files below name: `<w>` to `<z>`, `<e>` and `<q>`.
const TEXT: &str = "ab <s> a<x> b<y> c<z>d<w><q><e><|im_end|> ab";

/// Names and contents.
type Files = Vec<(&'static str, Value)>;

/// A directory with these files and the small byte-level tokenizer, whose ids end at 258.
fn directory(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).expect("writable");
    write("tokenizer.json", &super::texts(|_| ()).0.tokenizer_json);
    files.iter().for_each(|(name, json)| write(name, json.to_string().as_bytes()));
    dir
}

fn read(files: &[(&str, Value)]) -> anyhow::Result<TextFiles> {
    TextFiles::read(directory(files).path())
}

fn load(texts: &TextFiles) -> Tokenizer {
    let (_, config) = super::texts(|_| ());
    Tokenizer::new(texts, &config).expect("it loads")
}

/// A token as an object.
fn token(content: &str) -> Value {
    json!({ "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true })
}

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// The ids of `TEXT` where none of the new tokens is known, split at each of them.
fn ids_with(known: &[(&str, u32)]) -> Vec<u32> {
    let known: BTreeMap<&str, u32> = known.iter().copied().chain([("<s>", 0), ("<|im_end|>", 1)]).collect();
    let mut ids = Vec::new();
    let mut rest = TEXT;
    while !rest.is_empty() {
        if let Some((text, id)) = known.iter().find(|(text, _)| rest.starts_with(**text)) {
            ids.push(*id);
            rest = &rest[text.len()..];
        } else if let Some(after) = rest.strip_prefix("ab") {
            ids.push(258);
            rest = after;
        } else {
            ids.push(2 + u32::from(rest.as_bytes()[0]));
            rest = &rest[1..];
        }
    }
    ids
}

/// What transformers 5.24 makes of the same files (`PreTrainedTokenizerFast`); where it says so, what 4.57 makes.
#[test]
fn each_file_names_tokens() {
    let decoder = |more: Value| {
        let mut tokens = json!({ "0": token("<s>"), "1": token("<|im_end|>") });
        tokens.as_object_mut().expect("an object").append(&mut more.as_object().expect("an object").clone());
        json!({ "added_tokens_decoder": tokens })
    };
    let lists = |config: Value, map: Value| {
        vec![
            (CONFIG, json!({ "additional_special_tokens": config })),
            (MAP, json!({ "additional_special_tokens": map })),
        ]
    };
    let cases: Vec<(Files, &[(&str, u32)])> = vec![
        (vec![], &[]),
        (vec![(CONFIG, decoder(json!({ "259": token("<x>"), "260": token("<y>") })))], &[("<x>", 259), ("<y>", 260)]),
        (vec![(ADDED, json!({ "<y>": 260, "<x>": 259 }))], &[("<x>", 259), ("<y>", 260)]),
        (lists(json!(["<x>", "<y>"]), json!(null)), &[("<x>", 259), ("<y>", 260)]),
        (lists(json!([token("<x>"), "<y>"]), json!(null)), &[("<x>", 259), ("<y>", 260)]),
        (vec![(MAP, json!({ "additional_special_tokens": ["<x>", "<y>"] }))], &[("<x>", 259), ("<y>", 260)]),
        // 4.57: 5.24 refuses objects here, and passes over the second of two lists.
        (lists(json!(null), json!([token("<x>"), token("<y>")])), &[("<x>", 259), ("<y>", 260)]),
        (lists(json!(["<x>"]), json!(["<y>"])), &[("<x>", 259), ("<y>", 260)]),
        (lists(json!([]), json!(["<y>"])), &[("<y>", 259)]),
        (
            vec![(CONFIG, json!({ "extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"] }))],
            &[("<x>", 259)],
        ),
        (vec![(CONFIG, json!({ "extra_special_tokens": { "image_token": "<x>" } }))], &[("<x>", 259)]),
        (vec![(CONFIG, json!({ "image_token": "<x>", "pad_token": "<y>" }))], &[("<y>", 259), ("<x>", 260)]),
        (
            vec![
                (MAP, json!({ "eos_token": token("<x>"), "bos_token": "<y>" })),
                (CONFIG, json!({ "eos_token": "<|im_end|>" })),
            ],
            &[("<y>", 259), ("<x>", 260)],
        ),
        (
            vec![
                (MAP, json!({ "eos_token": "<e>", "additional_special_tokens": ["<q>"] })),
                (ADDED, json!({ "<x>": 259, "<q>": 260 })),
                (CONFIG, json!({ "bos_token": "<s>", "pad_token": "<y>", "unk_token": "ab" })),
            ],
            &[("<x>", 259), ("<q>", 260), ("<e>", 261), ("<y>", 262)],
        ),
        // Where the newest kind of list is there, the older files are not read.
        (
            vec![
                (MAP, json!({ "eos_token": "<y>", "pad_token": "<z>" })),
                (ADDED, json!({ "<w>": 260 })),
                (CONFIG, decoder(json!({ "259": token("<x>") }))),
            ],
            &[("<x>", 259)],
        ),
    ];
    for (files, known) in cases {
        let texts = read(&files).unwrap_or_else(|e| panic!("{files:?}: {e:#}"));
        assert_eq!(load(&texts).encode(TEXT).expect("ids"), ids_with(known), "{files:?}");
        // What is written carries everything in tokenizer.json, for us and for other tools.
        let written = tempfile::tempdir().expect("a temporary directory");
        texts.write(written.path()).expect("writable");
        assert_eq!(TextFiles::read(written.path()).expect("readable"), texts, "{files:?}");
    }
    let spread = ids_with(&[("<x>", 259), ("<q>", 260), ("<e>", 261), ("<y>", 262)]);
    let by_transformers =
        [258, 34, 0, 34, 99, 259, 34, 100, 262, 34, 101, 62, 124, 64, 102, 62, 121, 64, 260, 261, 1, 34, 258];
    assert_eq!(spread, by_transformers, "the ids that transformers printed");
}

#[test]
fn names_of_special_tokens() {
    let files = [
        (MAP, json!({ "eos_token": token("<|im_end|>"), "pad_token": null })),
        (
            CONFIG,
            json!({ "bos_token": "<s>", "eos_token": "ab", "pad_token": "<s>", "unk_token": "<unk>", "add_bos_token": false }),
        ),
    ];
    let texts = read(&files).expect("readable");
    let expected = [
        ("bos_token", Some("<s>")),
        ("eos_token", Some("<|im_end|>")),
        ("pad_token", None),
        ("unk_token", Some("<unk>")),
    ];
    assert_eq!(texts.special_tokens, named(&expected));
    let tokenizer = load(&texts);
    assert_eq!((tokenizer.bos(), tokenizer.stop_ids()), (Some(0), &[1][..]));

    // A template sees them all; one that a file says is none is not defined.
    let chat = |texts: TextFiles| {
        let template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token is defined }}";
        load(&TextFiles { chat_template: Some(template.to_owned()), ..texts }).chat(&[], true).expect("a text")
    };
    assert_eq!(chat(texts).to_lowercase(), "<s>|<|im_end|>|<unk>|false");

    // Where no file speaks of BOS, the model's configuration does; a file that says null has the last word.
    let (_, mut config) = super::texts(|_| ());
    (config.bos_token_id, config.eos_token_ids) = (Some(0), vec![1]);
    let bos = |config_json: Value| {
        let mut texts = read(&[(CONFIG, config_json)]).expect("readable");
        texts.chat_template = Some("{{ bos_token }}".to_owned());
        let tokenizer = Tokenizer::new(&texts, &config).expect("it loads");
        (tokenizer.bos(), tokenizer.chat(&[], true).expect("a text"), tokenizer.stop_ids().to_vec())
    };
    assert_eq!(bos(json!({})), (Some(0), "<s>".to_owned(), vec![1]));
    assert_eq!(bos(json!({ "bos_token": null, "eos_token": null })), (None, String::new(), vec![1]));
}

#[test]
fn what_a_list_says_about_a_token_replaces_what_was_known() {
    let mut strips = token("<s>");
    strips["rstrip"] = true.into();
    let files = [(CONFIG, json!({ "added_tokens_decoder": { "0": strips, "1": token("<|im_end|>") } }))];
    let ids = load(&read(&files).expect("readable")).encode("<s> ab").expect("ids");
    assert_eq!(ids, [0, 258], "the space is taken along");
    // The oldest file says nothing about spaces.
    let files = [(ADDED, json!({ "<s>": 0 }))];
    assert_eq!(load(&read(&files).expect("readable")).encode("<s> ab").expect("ids"), [0, 34, 258]);
    // What has a name is special, and so is not made of pieces of text.
    let files = [(CONFIG, json!({ "eos_token": "ab" }))];
    assert_eq!(load(&read(&files).expect("readable")).stop_ids(), [258]);
}

#[test]
fn files_that_disagree_are_refused() {
    let decoder = |id: &str, content: &str| vec![(CONFIG, json!({ "added_tokens_decoder": { id: token(content) } }))];
    let cases = [
        (decoder("5", "<s>"), r#"tokenizer_config.json gives the token "<s>" the id 5, in tokenizer.json it has 0"#),
        (decoder("0", "<x>"), r#"tokenizer_config.json gives the id 0 to the token "<x>", tokenizer.json to "<s>""#),
        (
            vec![(ADDED, json!({ "ab": 7 }))],
            r#"added_tokens.json gives the token "ab" the id 7, in tokenizer.json it has 258"#,
        ),
        (
            vec![(ADDED, json!({ "<x>": 258 }))],
            r#"added_tokens.json gives the id 258 to the token "<x>", tokenizer.json to "ab""#,
        ),
        (
            vec![(ADDED, json!({ "<x>": 259, "<y>": 259 }))],
            r#"added_tokens.json gives the token "<y>" the id 259, the tokenizer 260: ids before it are missing, or another token has the same"#,
        ),
        (
            decoder("262", "<x>"),
            r#"tokenizer_config.json gives the token "<x>" the id 262, the tokenizer 259: ids before it are missing, or another token has the same"#,
        ),
        (
            vec![(CONFIG, json!({ "added_tokens_decoder": { "259": token("<x>"), "260": token("<x>") } }))],
            r#"tokenizer_config.json gives the token "<x>" the id 260, the tokenizer 259: ids before it are missing, or another token has the same"#,
        ),
        (vec![(ADDED, json!({ "<x>": "a" }))], r#"added_tokens.json: "a" is no token id"#),
        (
            decoder("a", "<x>"),
            r#"in added_tokens_decoder of tokenizer_config.json: "a" is no token id: invalid digit found in string"#,
        ),
        (
            vec![(CONFIG, json!({ "bos_token": 3 }))],
            "in tokenizer_config.json: bos_token is 3, a string or an object with content is expected",
        ),
        (
            vec![(MAP, json!({ "bos_token": { "text": "<s>" } }))],
            r#"in special_tokens_map.json: bos_token: {"text":"<s>"} is no token, a string or an object with content is expected: missing field `content`"#,
        ),
    ];
    for (files, expected) in cases {
        let error = format!("{:#}", read(&files).expect_err("it is refused"));
        assert_eq!(error, expected, "{files:?}");
    }
    // The library would number the tokens of tokenizer.json itself.
    let (mut texts, config) = super::texts(|_| ());
    let mut json: Value = serde_json::from_slice(&texts.tokenizer_json).expect("JSON");
    let mut token = token("<x>");
    token["id"] = 270.into();
    json["added_tokens"].as_array_mut().expect("a list").push(token);
    texts.tokenizer_json = json.to_string().into_bytes();
    let error = Tokenizer::new(&texts, &config).expect_err("it is refused").to_string();
    assert_eq!(error, r#"tokenizer.json gives the added token "<x>" the id 270, its vocabulary 259"#);
}

/// The configuration of a tokenizer with very many added tokens takes megabytes.
#[test]
fn a_large_configuration() {
    let tokens: serde_json::Map<_, _> =
        (0..40_000).map(|i| ((259 + i).to_string(), token(&format!("<custom_token_{i}>")))).collect();
    let files = [(CONFIG, json!({ "added_tokens_decoder": tokens }))];
    let (_, config) = super::texts(|_| ());
    let config = decdec::config::ModelConfig { vocab_size: 50_000, ..config };
    let texts = read(&files).expect("readable");
    let ids = Tokenizer::new(&texts, &config).expect("it loads").encode("<custom_token_39999>ab").expect("ids");
    assert_eq!(ids, [259 + 39_999, 258]);

    let dir = directory(&[]);
    let file = std::fs::File::create(dir.path().join(CONFIG)).expect("writable");
    file.set_len((64 << 20) + 1).expect("a sparse file");
    let error = format!("{:#}", TextFiles::read(dir.path()).expect_err("too long"));
    assert!(error.contains("has 67108865 bytes, at most 67108864 are expected"), "{error}");
}

#[test]
fn dropout_is_off() {
    let (mut texts, config) = super::texts(|_| ());
    let mut json: Value = serde_json::from_slice(&texts.tokenizer_json).expect("JSON");
    json["model"]["dropout"] = json!(1.0);
    texts.tokenizer_json = json.to_string().into_bytes();
    let tokenizer = Tokenizer::new(&texts, &config).expect("it loads");
    assert_eq!(tokenizer.encode("ab<s>ab").expect("ids"), [258, 0, 258], "with dropout, nothing would be merged");
}

/// Both fields count as in GGUF and in transformers 4, whatever the post-processor of `tokenizer.json` does.
#[test]
fn bos_and_eos_around_a_text() {
    let template = |tokens: &[&str]| {
        let item = |token: &&str| match *token {
            "$" => json!({ "Sequence": { "id": "A", "type_id": 0 } }),
            token => json!({ "SpecialToken": { "id": token, "type_id": 0 } }),
        };
        let ids = |(token, id): (&str, u32)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
        let special: serde_json::Map<_, _> =
            [("<s>", 0), ("<|im_end|>", 1), ("ab", 258)].map(ids).into_iter().collect();
        let single: Vec<Value> = tokens.iter().map(item).collect();
        json!({ "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special })
    };
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true });
    let both = |template: Value| json!({ "type": "Sequence", "processors": [bytes.clone(), template] });
    let (before, plain) = (template(&["<s>", "$"]), template(&["$"]));
    let cases: [(Value, Value, &[u32]); 13] = [
        (json!(null), json!({}), &[99]),
        (before.clone(), json!({}), &[0, 99]),
        (bytes.clone(), json!({ "add_bos_token": true }), &[0, 99]),
        (json!(null), json!({ "add_bos_token": true }), &[0, 99]),
        (plain, json!({ "add_bos_token": true }), &[0, 99]),
        (before.clone(), json!({ "add_bos_token": true }), &[0, 99]),
        (before.clone(), json!({ "add_bos_token": false }), &[99]),
        (both(before.clone()), json!({ "add_bos_token": false }), &[99]),
        (both(before.clone()), json!({ "add_bos_token": null }), &[0, 99]),
        (before.clone(), json!({ "add_eos_token": true }), &[0, 99, 1]),
        (template(&["<s>", "$", "<|im_end|>"]), json!({ "add_eos_token": false }), &[0, 99]),
        // A template with other tokens is not one of BOS and EOS.
        (template(&["ab", "$"]), json!({ "add_bos_token": false }), &[258, 99]),
        // There is no BOS to add.
        (json!(null), json!({ "add_bos_token": true, "bos_token": null }), &[99]),
    ];
    for (post_processor, fields, expected) in cases {
        let mut config = json!({ "bos_token": "<s>", "eos_token": "<|im_end|>" });
        config.as_object_mut().expect("an object").append(&mut fields.as_object().expect("an object").clone());
        let dir = directory(&[(CONFIG, config)]);
        let path = dir.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
        json["post_processor"] = post_processor.clone();
        std::fs::write(&path, json.to_string()).expect("writable");
        let texts = TextFiles::read(dir.path()).expect("readable");
        assert_eq!(load(&texts).encode("a").expect("ids"), expected, "{post_processor} {fields}");
    }
}
