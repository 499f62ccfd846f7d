//! Text to ids and back: SmolLM2's known answers, and small tokenizers written here.

#[path = "../answers/mod.rs"]
mod answers;
#[path = "../devices/mod.rs"]
mod devices;
#[path = "../fixtures/mod.rs"]
mod fixtures;

mod files;
mod gguf;
mod streams;

use decdec::config::ModelConfig;
use decdec::source::Source;
use decdec::tokenizer::{Message, TextFiles, Tokenizer};
use decdec::weights::ModelWeights;
use fixtures::{Gguf, Meta};
use serde_json::{Value, json};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn golden_smollm2_ids_and_texts() {
    let Some(path) = answers::smollm2() else { return };
    let cases = std::fs::read(answers::reference("smollm2/greedy.json")).expect("readable");
    let cases: Value = serde_json::from_slice(&cases).expect("JSON");
    let source = Source::open(&path).expect("the model opens");
    let tokenizer = Tokenizer::new(source.texts(), source.config()).expect("its tokenizer loads");
    assert_eq!(tokenizer.stop_ids(), [2]);
    assert_eq!(tokenizer.bos(), Some(1));
    for case in cases.as_array().expect("a list") {
        let text = |key: &str| case[key].as_str().expect("a text");
        assert_eq!(tokenizer.encode(text("prompt")).expect("ids"), ids(&case["ids"]), "{}", text("prompt"));

        let chat = tokenizer.chat(&[Message::new("user", text("prompt"))], true).expect("the template works");
        assert_eq!(chat, text("chat"));
        assert_eq!(tokenizer.encode_chat(&chat).expect("ids"), ids(&case["chat_ids"]));
        let messages = [Message::new("user", text("prompt"))];
        assert_eq!(tokenizer.chat_ids(&messages, true).expect("ids"), ids(&case["chat_ids"]));
        assert_eq!(tokenizer.encode(&chat).expect("ids"), ids(&case["chat_ids"]), "BOS is there already");

        for (tokens, expected) in [("ids", "prompt"), ("greedy", "greedy_text"), ("chat_greedy", "chat_text")] {
            assert_eq!(tokenizer.decode(&ids(&case[tokens])).expect("a text"), text(expected));
            assert_eq!(streamed(&tokenizer, &ids(&case[tokens])), text(expected));
        }
    }
    let wrong = tokenizer.encode("What is the capital of  France?").expect("ids");
    assert_ne!(wrong, ids(&cases[0]["ids"]), "a space more is another text");
}

/// What a stream hands out, put together.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().filter_map(|&id| stream.push(id).expect("a token")).collect();
    text.extend(stream.flush().expect("the rest"));
    text
}

const VOCAB: usize = 300;

/// The tokenizer of a small GGUF model, its metadata completed by `more`.
fn small(pre: &str, merges: &[&str], more: impl FnOnce(Gguf) -> Gguf) -> Tokenizer {
    let (gguf, _) = fixtures::byte_level(fixtures::small_config("llama"), pre, merges);
    tokenizer(more(gguf)).expect("it loads")
}

fn source(gguf: Gguf) -> Source {
    open(fixtures::small_tensors(gguf, VOCAB))
}

fn open(gguf: Gguf) -> Source {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("small.gguf");
    std::fs::write(&path, gguf.bytes()).expect("writable");
    Source::open(&path).expect("it opens")
}

fn tokenizer(gguf: Gguf) -> anyhow::Result<Tokenizer> {
    let source = source(gguf);
    Tokenizer::new(source.texts(), source.config())
}

/// The words that a text is cut into, told by tokens that whole words have.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode_chat(text).expect("ids");
    ids.iter().map(|&id| tokenizer.decode(&[id]).expect("a text")).collect()
}

#[test]
fn each_pre_tokenizer_cuts_its_way() {
    let merges = ["1 2", "12 3", "123 4", "L L", "' LL", "' l", "'l l", "Ċ Ċ", "Ġ !", "Ġ a"];
    let cases: [(&str, &str, &[&str]); 15] = [
        ("gpt-2", "1234", &["1234"]),
        ("llama-bpe", "1234", &["123", "4"]),
        ("qwen2", "1234", &["1", "2", "3", "4"]),
        ("smollm", "1234", &["1", "2", "3", "4"]),
        ("default", "1234", &["123", "4"]),
        ("gpt-2", "a'LL", &["a", "'", "LL"]),
        ("llama-bpe", "a'LL", &["a", "'LL"]),
        ("qwen2", "a'LL", &["a", "'LL"]),
        ("smollm", "a'LL", &["a", "'", "LL"]),
        ("gpt-2", "a'll", &["a", "'ll"]),
        ("default", "a'll", &["a", "'", "l", "l"]),
        ("llama-bpe", "!\n\n", &["!", "\n\n"]),
        ("gpt-2", " ! a", &[" !", " a"]),
        ("default", " ! a", &[" ", "!", " a"]),
        ("smollm", " a", &[" a"]),
    ];
    for (pre, text, expected) in cases {
        assert_eq!(pieces(&small(pre, &merges, |gguf| gguf), text), expected, "{pre} {text:?}");
    }
    let composed = |pre| small(pre, &merges, |gguf| gguf).encode("e\u{301}").expect("ids").len();
    assert_eq!((composed("qwen2"), composed("gpt-2")), (2, 3), "Qwen 2 composes, é is two bytes");
}

#[test]
fn bos_is_added_once_where_the_model_says_so() {
    let plain = |tokenizer: &Tokenizer, text| tokenizer.encode(text).expect("ids");
    let [without, with] = ["gpt-2", "llama-bpe"].map(|pre| small(pre, &["a b"], |gguf| gguf));
    let ab = 2 + 256;
    assert_eq!(plain(&without, "ab"), [ab]);
    assert_eq!(plain(&with, "ab"), [0, ab]);
    assert_eq!(plain(&with, "<s>ab"), [0, ab], "not twice");
    assert_eq!(plain(&without, "<s><s>ab"), [0, 0, ab], "what is written stays");
    assert_eq!(with.encode_chat("ab").expect("ids"), [ab]);
    let told = small("llama-bpe", &["a b"], |gguf| gguf.meta("tokenizer.ggml.add_bos_token", Meta::Bool(false)));
    assert_eq!(plain(&told, "ab<|im_end|>"), [ab, 1]);
    assert_eq!((told.bos(), told.stop_ids()), (Some(0), &[1][..]), "a known turn end stops");
}

#[test]
fn sentence_piece_as_the_original() {
    let file = "tests/data/sentencepiece.json";
    let known: Value = serde_json::from_slice(&std::fs::read(file).expect("readable")).expect("JSON");
    let tokens: Vec<&str> =
        known["tokens"].as_array().expect("tokens").iter().map(|t| t.as_str().expect("text")).collect();
    let scores: Vec<f32> =
        known["scores"].as_array().expect("scores").iter().map(|s| s.as_f64().expect("a score") as f32).collect();
    let types: Vec<i32> = ids(&known["types"]).into_iter().map(|t| t as i32).collect();
    let gguf = |scores: Vec<f32>| {
        let gguf = fixtures::small_config("llama")
            .meta("tokenizer.ggml.model", Meta::Text("llama"))
            .meta("tokenizer.ggml.tokens", Meta::Texts(tokens.clone()))
            .meta("tokenizer.ggml.scores", Meta::F32s(scores))
            .meta("tokenizer.ggml.token_type", Meta::I32s(types.clone()))
            .meta("tokenizer.ggml.bos_token_id", Meta::U32(1))
            .meta("tokenizer.ggml.eos_token_id", Meta::U32(2))
            .meta("tokenizer.ggml.unknown_token_id", Meta::U32(0));
        let source = source(gguf);
        let config = ModelConfig { vocab_size: tokens.len(), ..source.config().clone() };
        Tokenizer::new(source.texts(), &config).expect("it loads")
    };
    let tokenizer = gguf(scores.clone());
    assert_eq!(tokenizer.stop_ids(), [2]);
    for case in known["cases"].as_array().expect("cases") {
        let (text, expected) = (case["text"].as_str().expect("a text"), ids(&case["ids"]));
        assert_eq!(tokenizer.encode_chat(text).expect("ids"), expected, "{text:?}");
        assert_eq!(tokenizer.encode(text).expect("ids"), [&[1], &expected[..]].concat());
        assert_eq!(tokenizer.decode(&expected).expect("a text"), text);
        assert_eq!(streamed(&tokenizer, &expected), text);
    }
    let reversed = gguf(scores.iter().map(|s| -s).collect());
    let differs =
        |case: &Value| reversed.encode_chat(case["text"].as_str().expect("a text")).expect("ids") != ids(&case["ids"]);
    assert!(known["cases"].as_array().expect("cases").iter().any(differs), "scores matter");
}

/// Special tokens by name.
fn named(tokens: &[(&str, Option<&str>)]) -> std::collections::BTreeMap<String, Option<String>> {
    tokens.iter().map(|(name, token)| ((*name).to_owned(), token.map(str::to_owned))).collect()
}

/// Text files around the tokenizer of a small model.
fn texts(change: impl FnOnce(&mut TextFiles)) -> (TextFiles, ModelConfig) {
    let (gguf, _) = fixtures::byte_level(fixtures::small_config("llama"), "gpt-2", &["a b"]);
    let source = source(gguf);
    let mut texts = source.texts().clone();
    change(&mut texts);
    (texts, source.config().clone())
}

fn with_template(template: &str) -> anyhow::Result<Tokenizer> {
    let (texts, config) = texts(|texts| {
        texts.chat_template = Some(template.to_owned());
        texts.special_tokens.insert("eos_token".to_owned(), Some("</s>".to_owned()));
    });
    Tokenizer::new(&texts, &config)
}

#[test]
fn chat_templates() {
    let messages = [Message::new("system", "Be brief."), Message::new("user", " Hello ")];
    let render = |template: &str, prompt| with_template(template).expect("it compiles").chat(&messages, prompt);
    let template = "{{ bos_token }}
{%- for message in messages %}
    {%- if message.role.startswith('sys') %}
{{ 'S:' + message['content'].strip() }}
    {% else %}
{{ loop.index0 ~ message.content | trim | upper }}{{ eos_token }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt and tools is none %}
A:
{% endif %}";
    assert_eq!(render(template, true).expect("text"), "<s>S:Be brief.\n1HELLO</s>A:\n");
    assert_eq!(render(template, false).expect("text"), "<s>S:Be brief.\n1HELLO</s>");
    let year = render("{{ strftime_now('%Y') }}", true).expect("text");
    assert!((2025..2200).contains(&year.parse::<u32>().expect("a year")), "{year}");

    let refused = render("\n{{ raise_exception('roles must alternate') }}", true).expect_err("it refuses");
    assert_eq!(refused.to_string(), "the chat template fails in line 2: roles must alternate");
    let broken = with_template("{% for %}").expect("a template that is not Jinja stands in nobody's way");
    assert!(broken.has_chat() && broken.encode("a").is_ok());
    let error = broken.chat(&messages, true).expect_err("no Jinja").to_string();
    assert!(error.starts_with("the chat template fails in line 1: ") && !error.contains('\n'), "{error}");
    assert_eq!(broken.chat_ids(&messages, true).expect_err("no Jinja").to_string(), error);
    let (plain, config) = texts(|_| ());
    let tokenizer = Tokenizer::new(&plain, &config).expect("it loads");
    let none = tokenizer.chat(&messages, true).expect_err("no template").to_string();
    assert!(none.contains("no chat template") && !tokenizer.has_chat(), "{none}");
}

/// Renders every conversation of `tests/data/chat` with `template`, and compares with what Jinja2 made of it.
fn assert_renders(name: &str, template: &str, known: &Value) {
    let family = &known["families"][name];
    let text = |key: &str| (key.to_owned(), Some(family[key].as_str().expect("a text").to_owned()));
    let (texts, config) = texts(|texts| {
        texts.chat_template = Some(template.to_owned());
        texts.special_tokens = [text("bos_token"), text("eos_token")].into();
    });
    let tokenizer = Tokenizer::new(&texts, &config).unwrap_or_else(|e| panic!("{name}: {e}"));
    let today = with_template("{{ strftime_now('%d %b %Y') }}").expect("it compiles").chat(&[], true).expect("a date");
    let conversations = known["conversations"].as_array().expect("a list");
    for (conversation, wanted) in conversations.iter().zip(family["renderings"].as_array().expect("a list")) {
        let turns = conversation.as_array().expect("turns").iter();
        let messages: Vec<_> =
            turns.map(|t| Message::new(t[0].as_str().expect("a role"), t[1].as_str().expect("a text"))).collect();
        for (prompt, wanted) in [true, false].into_iter().zip(wanted.as_array().expect("two")) {
            let got = tokenizer.chat(&messages, prompt);
            match wanted.as_str() {
                Some(wanted) => {
                    let got = got.unwrap_or_else(|e| panic!("{name}: {e}"));
                    assert_eq!(got, wanted.replace("{date}", &today), "{name}");
                }
                None => {
                    let refusal = got.expect_err("Jinja2 refuses this conversation").to_string();
                    let says_why = ["alternate", "system"].iter().any(|word| refusal.contains(word));
                    assert!(says_why, "{name}: {refusal}");
                }
            }
        }
    }
}

#[test]
fn chat_templates_of_every_family() {
    let ours = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat");
    let read = |path: std::path::PathBuf| std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let known: Value = serde_json::from_str(&read(ours.join("renderings.json"))).expect("JSON");
    // The published templates, where somebody has them.
    let originals = std::env::var_os("DECDEC_CHAT_TEMPLATES").map(std::path::PathBuf::from);
    let families = known["families"].as_object().expect("an object");
    assert_eq!(families.len(), 20);
    for name in families.keys() {
        for dir in [Some(&ours), originals.as_ref()].into_iter().flatten() {
            let template = dir.join(format!("{name}.jinja"));
            if dir == &ours || template.exists() {
                assert_renders(name, &read(template), &known);
            }
        }
    }
    let other = read(ours.join("llama-3.jinja")).replace("| trim", "");
    assert!(std::panic::catch_unwind(|| assert_renders("llama-3", &other, &known)).is_err(), "a space shows");
    if let Some(path) = answers::smollm2() {
        let source = Source::open(&path).expect("the model opens");
        assert_renders("smollm2", source.texts().chat_template.as_deref().expect("its own"), &known);
    }
}

#[test]
fn text_files_survive_a_directory() {
    let (full, config) = texts(|texts| {
        texts.chat_template = Some("{{ messages[0].content }}\n".into());
        texts.eos_token_ids = vec![1, 5];
        texts.special_tokens.insert("eos_token".into(), Some("<s>".into()));
    });
    let dir = tempfile::tempdir().expect("a temporary directory");
    full.write(dir.path()).expect("writable");
    assert_eq!(TextFiles::read(dir.path()).expect("readable"), full);
    let config = ModelConfig { eos_token_ids: vec![9, 5], ..config };
    let tokenizer = Tokenizer::new(&full, &config).expect("it loads");
    assert_eq!(tokenizer.stop_ids(), [0, 1, 5, 9], "all that say so, together");

    // As other tools write them: objects for tokens, several templates, no generation configuration.
    std::fs::remove_file(dir.path().join("chat_template.jinja")).expect("removable");
    std::fs::remove_file(dir.path().join("generation_config.json")).expect("removable");
    let write =
        |json: Value| std::fs::write(dir.path().join("tokenizer_config.json"), json.to_string()).expect("writable");
    write(json!({
        "bos_token": null, "eos_token": { "content": "<|im_end|>", "special": true },
        "chat_template": [{ "name": "tools", "template": "no" }, { "name": "default", "template": "yes" }],
    }));
    let read = TextFiles::read(dir.path()).expect("readable");
    assert_eq!(read.special_tokens, named(&[("bos_token", None), ("eos_token", Some("<|im_end|>"))]));
    assert_eq!((read.chat_template.as_deref(), read.eos_token_ids), (Some("yes"), vec![]));
    write(json!({ "chat_template": { "tools": "no", "default": "yes" } }));
    assert_eq!(TextFiles::read(dir.path()).expect("readable").chat_template.as_deref(), Some("yes"));
    write(json!({ "chat_template": 3 }));
    let error = format!("{:#}", TextFiles::read(dir.path()).expect_err("no template"));
    assert_eq!(error, "in tokenizer_config.json: chat_template is 3, a string or a list of named strings is expected");
    std::fs::remove_file(dir.path().join("tokenizer.json")).expect("removable");
    std::fs::write(dir.path().join("tokenizer.model"), b"").expect("writable");
    let error = TextFiles::read(dir.path()).expect_err("none").to_string();
    assert!(error.starts_with("tokenizer.json is missing") && error.contains("tokenizer.model is there"), "{error}");
}

#[test]
fn a_tokenizer_of_another_model() {
    let (full, config) = texts(|_| ());
    let small = ModelConfig { vocab_size: 100, ..config.clone() };
    let tokenizer = Tokenizer::new(&full, &small).expect("it loads");
    assert!(tokenizer.encode("!").is_ok());
    let error = tokenizer.encode("ab").expect_err("a large id").to_string();
    assert!(error.contains("\"ab\" with id 258") && error.contains("below 100"), "{error}");

    for damaged in [&b"{"[..], b"", b"{\"version\": \"1.0\", \"model\": {\"type\": \"Other\"}}"] {
        let damaged = TextFiles { tokenizer_json: damaged.to_vec(), ..full.clone() };
        let error = Tokenizer::new(&damaged, &config).expect_err("damaged").to_string();
        assert!(
            error.starts_with("tokenizer.json is damaged or of an unknown kind") && !error.contains('\n'),
            "{error}"
        );
    }
}
