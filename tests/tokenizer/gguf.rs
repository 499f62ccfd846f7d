//! A tokenizer from GGUF's metadata against the `tokenizer.json` that its family publishes.

use decdec::config::ModelConfig;
use decdec::source::Source;
use decdec::tokenizer::{TextFiles, Tokenizer};
use decdec::weights::ModelWeights;
use serde_json::{Value, json};

use super::fixtures::{self, Gguf, Meta};
use super::{VOCAB, ids};

const MERGES: [&str; 14] =
    ["a b", "1 2", "12 3", "123 4", "L L", "' LL", "' l", "'l l", "Ċ Ċ", "Ġ !", "Ġ a", "o W", "! /", "Ã ©"];

/// Plain texts and chats in which families cut words, compose characters and treat special tokens differently.
const TEXTS: [&str; 12] = [
    "ab",
    "a 1234567 12",
    "a'LL b'll c",
    "x !\n\n  y",
    "HelloWorld HELLOWorld",
    "e\u{301}é \u{1F600} 日本",
    " !/\n/ a",
    "",
    "<s>ab<|im_end|> a",
    "  <|im_end|>\n\n<|im_end|>ab ",
    "<|im_end|>user\n1234 <|im_end|>\n",
    "[PAD0]<unk>\u{a0}\t\r\n",
];

/// How a family's `tokenizer.json` differs from the others'.
struct Family {
    pre: &'static str,
    normalizer: Value,
    words: Vec<Value>,
    ignore_merges: bool,
    starts_with_bos: bool,
}

const NUMBERS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MISTRAL: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// As the Hugging Face directories have it: GPT-2, SmolLM2, Granite code, Llama 3, Phi-4, Qwen2.5, DeepSeek-R1's
/// distillations of it, GLM-4, Mistral Nemo, Phi-4-mini.
fn families() -> Vec<Family> {
    let bytes = |words: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words });
    let split = |pattern: &str, behavior: &str, invert: bool| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": behavior, "invert": invert });
    let by_regex = |pattern: &str| vec![split(pattern, "Isolated", false), bytes(false)];
    let digits = || vec![json!({ "type": "Digits", "individual_digits": true }), bytes(true)];
    let three = NUMBERS.replace("DIGITS", r"\p{N}{1,3}");
    let one = NUMBERS.replace("DIGITS", r"\p{N}");
    let nfc = || json!({ "type": "NFC" });
    let family = |pre, normalizer, words, ignore_merges, starts_with_bos| Family {
        pre,
        normalizer,
        words,
        ignore_merges,
        starts_with_bos,
    };
    vec![
        family("gpt-2", Value::Null, vec![bytes(true)], false, false),
        family("smollm", Value::Null, digits(), false, false),
        family("refact", Value::Null, digits(), false, false),
        family("starcoder", Value::Null, digits(), false, false),
        family("llama-bpe", Value::Null, by_regex(&three), true, true),
        family("dbrx", Value::Null, vec![split(&three, "Removed", true), bytes(false)], false, false),
        family("qwen2", nfc(), by_regex(&one), false, false),
        family("deepseek-r1-qwen", nfc(), by_regex(&one), false, true),
        family("glm4", Value::Null, by_regex(&three), false, false),
        family("tekken", Value::Null, by_regex(MISTRAL), true, true),
        family("gpt-4o", Value::Null, by_regex(GPT_4O), false, false),
    ]
}

/// The directory of a byte-level family with the vocabulary of the small GGUF.
fn directory(family: &Family, tokens: &[String]) -> TextFiles {
    let special = |id: usize| {
        json!({ "id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let vocab: serde_json::Map<_, _> = tokens.iter().zip(0..).map(|(token, id)| (token.clone(), json!(id))).collect();
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true });
    let bos = [json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } })];
    let text = [json!({ "Sequence": { "id": "A", "type_id": 0 } })];
    let template = json!({ "type": "TemplateProcessing", "single": ([&bos[..], &text].concat()),
        "pair": ([&bos[..], &text].concat()),
        "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } } });
    let processors = if family.starts_with_bos { vec![bytes.clone(), template] } else { vec![bytes.clone()] };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0), special(1)],
        "normalizer": family.normalizer,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": family.words },
        "post_processor": { "type": "Sequence", "processors": processors },
        "decoder": bytes,
        "model": { "type": "BPE", "vocab": vocab, "merges": MERGES, "ignore_merges": family.ignore_merges },
    });
    read(&json, &json!({ "bos_token": "<s>", "eos_token": "<|im_end|>" }))
}

fn read(tokenizer_json: &Value, config: &Value) -> TextFiles {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, json: &Value| std::fs::write(dir.path().join(name), json.to_string()).expect("writable");
    write("tokenizer.json", tokenizer_json);
    write("tokenizer_config.json", config);
    TextFiles::read(dir.path()).expect("readable")
}

/// The small GGUF of a family, filled up with padding as converters do, and its tokens.
fn byte_level(pre: &str) -> (Gguf, Vec<String>) {
    let (gguf, tokens) = fixtures::byte_level(fixtures::small_config("llama"), pre, &MERGES);
    let gguf = gguf.meta("tokenizer.ggml.eos_token_id", Meta::U32(1));
    (padded(gguf, &tokens, |i| format!("[PAD{i}]")), tokens)
}

fn padded(gguf: Gguf, tokens: &[String], name: impl Fn(usize) -> String) -> Gguf {
    let padding: Vec<String> = (tokens.len()..VOCAB).map(|i| name(i - tokens.len())).collect();
    let all = tokens.iter().chain(&padding).map(String::as_str).collect();
    let mut types = vec![1; VOCAB];
    types[..2].fill(3);
    types[tokens.len()..].fill(5);
    gguf.meta("tokenizer.ggml.tokens", Meta::Texts(all)).meta("tokenizer.ggml.token_type", Meta::I32s(types))
}

fn encoded(tokenizer: &Tokenizer, text: &str) -> [Vec<u32>; 2] {
    [tokenizer.encode(text).expect("ids"), tokenizer.encode_chat(text).expect("ids")]
}

#[test]
fn each_byte_level_family_as_its_directory() {
    let mut all = Vec::new();
    for family in families() {
        let (gguf, tokens) = byte_level(family.pre);
        let source = super::source(gguf.meta("tokenizer.ggml.add_bos_token", Meta::Bool(family.starts_with_bos)));
        let ours = Tokenizer::new(source.texts(), source.config()).expect("it loads");
        let theirs = Tokenizer::new(&directory(&family, &tokens), source.config()).expect("it loads");
        for text in TEXTS {
            assert_eq!(encoded(&ours, text), encoded(&theirs, text), "{} {text:?}", family.pre);
            let ids = ours.encode_chat(text).expect("ids");
            assert_eq!(ours.decode(&ids).expect("a text"), theirs.decode(&ids).expect("a text"), "{}", family.pre);
        }
        assert_eq!((ours.bos(), ours.stop_ids()), (theirs.bos(), theirs.stop_ids()), "{}", family.pre);
        all.push((family.pre, TEXTS.map(|text| encoded(&ours, text))));
    }
    // Families that share nothing but a name would all agree with anything.
    let of = |name: &str| all.iter().find(|(pre, _)| *pre == name).expect("a family").1.clone();
    let apart = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o"];
    for (i, a) in apart.iter().enumerate() {
        apart[i + 1..].iter().for_each(|b| assert_ne!(of(a), of(b), "{a} and {b}"));
    }
}

#[test]
fn names_that_llama_cpp_takes_for_the_same() {
    let groups: [&[&str]; 5] = [
        &["gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "trillion"],
        &["smollm", "starcoder", "refact", "minerva-7b"],
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"],
    ];
    for group in groups {
        let tokenizers = group.iter().map(|pre| super::tokenizer(byte_level(pre).0).expect("it loads"));
        let ids: Vec<_> = tokenizers.map(|tokenizer| TEXTS.map(|text| encoded(&tokenizer, text))).collect();
        ids.iter().zip(group).for_each(|(found, pre)| assert_eq!(*found, ids[0], "{pre} and {}", group[0]));
    }
    let error = refusal(byte_level("mistral-bpe").0);
    let expected = "tokenizer.ggml.pre \"mistral-bpe\" is unknown, smollm, llama-bpe, gpt-2, qwen2, tekken, \
                    gpt-4o, dbrx, smaug-bpe, glm4, starcoder, refact, deepseek-r1-qwen or default is expected; \
                    quantize from the Hugging Face directory instead";
    assert!(error.ends_with(expected) && !error.contains('\n'), "{error}");
}

fn refusal(gguf: Gguf) -> String {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("small.gguf");
    std::fs::write(&path, fixtures::small_tensors(gguf, VOCAB).bytes()).expect("writable");
    format!("{:#}", Source::open(&path).expect_err("it is refused"))
}

/// What llama.cpp reads too.
#[test]
fn incomplete_metadata() {
    let (gguf, tokens) = byte_level("gpt-2");
    let whole = super::tokenizer(gguf).expect("it loads");
    let same = |gguf: Gguf, what: &str| {
        let tokenizer = super::tokenizer(gguf).expect("it loads");
        for text in TEXTS {
            assert_eq!(encoded(&tokenizer, text), encoded(&whole, text), "{what}: {text:?}");
        }
        tokenizer
    };
    // Padding is no text, and only one of equal names can be found.
    assert!(whole.encode("[PAD0]").expect("ids").len() > 1);
    same(padded(byte_level("gpt-2").0, &tokens, |_| "[PAD]".to_owned()), "padding of one name");

    // Without types, the tokens that have a part to play are special.
    let untyped = fixtures::small_config("llama")
        .meta("tokenizer.ggml.model", Meta::Text("gpt2"))
        .meta("tokenizer.ggml.pre", Meta::Text("gpt-2"))
        .meta("tokenizer.ggml.tokens", Meta::Texts(tokens.iter().map(String::as_str).collect()))
        .meta("tokenizer.ggml.merges", Meta::Texts(MERGES.to_vec()))
        .meta("tokenizer.ggml.bos_token_id", Meta::U32(0));
    assert_eq!(same(untyped, "no types").stop_ids(), [1]);

    // An id that the vocabulary does not have is none.
    let outside = byte_level("gpt-2").0.meta("tokenizer.ggml.eos_token_id", Meta::U32(300));
    let outside = outside.meta("tokenizer.ggml.bos_token_id", Meta::U32(u32::MAX));
    let source = super::source(outside);
    assert_eq!((source.config().bos_token_id, &source.config().eos_token_ids[..]), (None, &[][..]));
    let tokenizer = Tokenizer::new(source.texts(), source.config()).expect("it loads");
    assert_eq!((tokenizer.bos(), tokenizer.stop_ids()), (None, &[1][..]), "a known turn end stops");

    let ends = byte_level("gpt-2").0.meta("tokenizer.ggml.add_eos_token", Meta::Bool(true));
    assert_eq!(super::tokenizer(ends).expect("it loads").encode("ab").expect("ids"), [258, 1]);
}

const PHI_3: [&str; 5] = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"];

/// A SentencePiece vocabulary with Phi-3's special tokens, in a GGUF of this architecture and name.
fn sentence_piece(architecture: &str, name: Option<&str>) -> (Source, ModelConfig) {
    let known: Value = serde_json::from_str(include_str!("../data/sentencepiece.json")).expect("JSON");
    let list = |key: &str| known[key].as_array().expect("a list").clone();
    let texts = list("tokens");
    let tokens: Vec<&str> = texts.iter().map(|t| t.as_str().expect("a text")).chain(PHI_3).collect();
    let scores = list("scores").iter().map(|s| s.as_f64().expect("a score") as f32).chain([0.0; 5]).collect();
    let mut types: Vec<i32> = ids(&known["types"]).into_iter().map(|t| t as i32).chain([3; 5]).collect();
    // `</s>` is no special token in Phi-3's directory.
    types[2] = 4;
    let vocab_size = tokens.len();
    let mut gguf = fixtures::small_config(architecture)
        .meta("tokenizer.ggml.model", Meta::Text("llama"))
        .meta("tokenizer.ggml.tokens", Meta::Texts(tokens))
        .meta("tokenizer.ggml.scores", Meta::F32s(scores))
        .meta("tokenizer.ggml.token_type", Meta::I32s(types))
        .meta("tokenizer.ggml.bos_token_id", Meta::U32(1))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(600))
        .meta("tokenizer.ggml.unknown_token_id", Meta::U32(0));
    if let Some(name) = name {
        gguf = gguf.meta("general.name", Meta::Text(name));
    }
    let is_phi_3 = architecture == "phi3";
    let source = super::open(if is_phi_3 { fused(gguf) } else { fixtures::small_tensors(gguf, VOCAB) });
    let config = ModelConfig { vocab_size, ..source.config().clone() };
    (source, config)
}

/// Phi-3 stores q, k and v in one matrix, and gate and up in one that has the name of up.
fn fused(gguf: Gguf) -> Gguf {
    let (hidden, kv) = (fixtures::HIDDEN, fixtures::KV);
    let is_fused = |name: &str| ["_q.", "_k.", "_v.", "_gate.", "_up."].iter().any(|part| name.contains(part));
    let mut shapes = fixtures::small_tensor_shapes(VOCAB);
    shapes.retain(|(name, _)| !is_fused(name));
    for layer in 0..fixtures::LAYERS {
        shapes.push((format!("blk.{layer}.attn_qkv.weight"), vec![hidden + 2 * kv, hidden]));
        shapes.push((format!("blk.{layer}.ffn_up.weight"), vec![2 * fixtures::INTERMEDIATE, hidden]));
    }
    shapes
        .iter()
        .fold(gguf, |gguf, (name, shape)| gguf.floats(name, shape, &fixtures::values(name, shape.iter().product())))
}

/// The directory of Phi-3 or Llama 2 with this vocabulary; its merges are those that the test against the original
/// covers.
fn sentence_piece_directory(source: &Source, strips: bool) -> TextFiles {
    let ours: Value = serde_json::from_slice(&source.texts().tokenizer_json).expect("JSON");
    let added = |id: usize, content: &str, rstrip: bool, special: bool| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": rstrip && strips,
                "normalized": false, "special": special })
    };
    let mut tokens = vec![added(0, "<unk>", false, true), added(1, "<s>", false, true), added(2, "</s>", true, false)];
    tokens.extend(PHI_3.iter().enumerate().map(|(i, token)| added(600 + i, token, i > 0, true)));
    let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let decoders = [
        replace("▁", " "),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
        json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }),
    ];
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": tokens,
        "normalizer": { "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, replace(" ", "▁")] },
        "pre_tokenizer": null,
        "post_processor": { "type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": ours["model"],
    });
    read(
        &json,
        &json!({ "bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "add_bos_token": true }),
    )
}

/// The ids are those of the package tokenizers 0.23, with merges made by transformers 5.24.
#[test]
fn sentence_piece_as_its_directory() {
    let texts = [
        "<|user|>\nHello  <|end|>\n<|assistant|>\n",
        "<|system|>\n Be 日 <|end|>\n\n<|user|> a<|end|>",
        "<s> the</s>  the<|endoftext|> the<unk>\nthe",
        "  the house ",
    ];
    let stripped: [&[u32]; 4] = [
        &[1, 604, 422, 397, 537, 533, 533, 603, 601],
        &[1, 602, 435, 534, 533, 233, 154, 168, 533, 603, 604, 261, 603],
        &[1, 533, 266, 2, 266, 600, 533, 266, 0, 533, 13, 535, 260],
        &[1, 533, 533, 266, 433, 533],
    ];
    let kept: [&[u32]; 4] = [
        &[1, 604, 533, 13, 567, 397, 537, 533, 533, 603, 533, 13, 601, 533, 13],
        &[1, 602, 533, 13, 435, 534, 533, 233, 154, 168, 533, 603, 533, 13, 13, 604, 533, 261, 603],
        &[1, 533, 266, 2, 533, 533, 266, 600, 533, 266, 0, 533, 13, 535, 260],
        &[1, 533, 533, 266, 433, 533],
    ];
    let cases = [
        ("phi3", None, stripped),
        ("phi3", Some("My own"), stripped),
        ("llama", Some("Phi 3 Mini 4k Instruct"), stripped),
        ("llama", Some("phi-3.5-mini"), stripped),
        ("llama", Some("Unsloth_Phi3"), stripped),
        ("llama", None, kept),
        ("llama", Some("Llama 2 7B"), kept),
    ];
    for (architecture, name, expected) in cases {
        let (source, config) = sentence_piece(architecture, name);
        let ours = Tokenizer::new(source.texts(), &config).expect("it loads");
        let directory = sentence_piece_directory(&source, expected == stripped);
        let theirs = Tokenizer::new(&directory, &config).expect("it loads");
        for (text, expected) in texts.into_iter().zip(expected) {
            assert_eq!(ours.encode(text).expect("ids"), expected, "{architecture} {name:?} {text:?}");
            assert_eq!(encoded(&ours, text), encoded(&theirs, text), "{architecture} {name:?} {text:?}");
            assert_eq!(ours.decode(expected).expect("a text"), theirs.decode(expected).expect("a text"));
        }
        assert_eq!((ours.bos(), ours.stop_ids()), (Some(1), &[600, 603][..]));
        assert_eq!(source.texts().special_tokens, directory.special_tokens);
    }
}
