//! The tokenizer in a GGUF's metadata, written as the `tokenizer.json` that it was made from.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::file::File;
use crate::tokenizer::TextFiles;

/// Token types (`tokenizer.ggml.token_type`) that take part in tokenizing; all others are special tokens.
const NORMAL: i32 = 1;
const BYTE: i32 = 6;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Special tokens that end a turn in the chat formats of the supported models. A GGUF names one end of text;
/// the rest of what `generation_config.json` listed is lost, these names bring it back.
const TURN_ENDS: [&str; 4] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"];

/// GPT-2's way of cutting text into words.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// Bytes of a SentencePiece token; its trainer makes none longer than 16 characters unless told to.
const LONGEST_PIECE: usize = 256;

/// The vocabulary as the metadata has it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i32>,
}

/// Tokenizer, chat template, special tokens and ends of text.
pub(super) fn texts(file: &File) -> Result<TextFiles> {
    let vocabulary = Vocabulary::read(file)?;
    let model = file.text("tokenizer.ggml.model")?.context("tokenizer.ggml.model is missing")?;
    let bos = vocabulary.token(file.integer("tokenizer.ggml.bos_token_id")?)?;
    let eos = vocabulary.token(file.integer("tokenizer.ggml.eos_token_id")?)?;
    let (mut tokenizer, starts_with_bos) = match model {
        "gpt2" => byte_level(file, &vocabulary)?,
        "llama" => (sentence_piece(file, &vocabulary)?, true),
        other => bail!("tokenizer.ggml.model {other:?} is unknown, gpt2 or llama is expected"),
    };
    tokenizer["version"] = "1.0".into();
    tokenizer["added_tokens"] = vocabulary.special_tokens();
    if let (true, Some((id, token))) = (file.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(starts_with_bos), bos) {
        tokenizer["post_processor"] = start_with(id, token);
    }

    let mut ends = vocabulary.turn_ends();
    for key in ["eos", "eot", "eom"] {
        let end = vocabulary.token(file.integer(&format!("tokenizer.ggml.{key}_token_id"))?)?;
        ends.extend(end.map(|(id, _)| id));
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(TextFiles {
        tokenizer_json: serde_json::to_vec(&tokenizer)?,
        chat_template: file.text("tokenizer.chat_template")?.map(str::to_owned),
        bos_token: bos.map(|(_, token)| token.to_owned()),
        eos_token: eos.map(|(_, token)| token.to_owned()),
        eos_token_ids: ends,
    })
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a File) -> Result<Self> {
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        ensure!(!tokens.is_empty(), "tokenizer.ggml.tokens is missing: the file has no tokenizer");
        let types = file.i32s("tokenizer.ggml.token_type")?;
        ensure!(types.len() == tokens.len(), "{} token types for {} tokens", types.len(), tokens.len());
        Ok(Self { tokens, types })
    }

    /// A token and its id.
    fn token(&self, id: Option<u64>) -> Result<Option<(u32, &'a str)>> {
        let Some(id) = id else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        let token = token.with_context(|| format!("token {id} is not one of {} tokens", self.tokens.len()))?;
        Ok(Some((id as u32, token)))
    }

    fn ids(&self) -> Result<HashMap<&'a str, usize>> {
        let ids: HashMap<_, _> = self.tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect();
        ensure!(ids.len() == self.tokens.len(), "tokenizer.ggml.tokens has a token twice");
        Ok(ids)
    }

    fn special_tokens(&self) -> Value {
        let special = self.types.iter().enumerate().filter(|(_, kind)| !matches!(**kind, NORMAL | BYTE));
        let token = |(id, kind): (usize, &i32)| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind != USER_DEFINED,
            })
        };
        special.map(token).collect()
    }

    fn turn_ends(&self) -> Vec<u32> {
        let typed = self.tokens.iter().zip(&self.types).enumerate();
        let ends =
            typed.filter(|(_, (token, kind))| matches!(**kind, CONTROL | USER_DEFINED) && TURN_ENDS.contains(*token));
        ends.map(|(id, _)| id as u32).collect()
    }

    fn json(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), id.into())).collect()
    }
}

/// Puts one token before every text.
fn start_with(id: u32, token: &str) -> Value {
    let special = |type_id: u32| json!({ "SpecialToken": { "id": token, "type_id": type_id } });
    let sequence = |name: &str, type_id: u32| json!({ "Sequence": { "id": name, "type_id": type_id } });
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}

/// BPE over bytes; the second value says whether its texts start with BOS unless the file says otherwise.
fn byte_level(file: &File, vocabulary: &Vocabulary<'_>) -> Result<(Value, bool)> {
    vocabulary.ids()?;
    let merges = file.texts("tokenizer.ggml.merges")?;
    ensure!(!merges.is_empty(), "tokenizer.ggml.merges is missing");
    let merges = merges
        .iter()
        .map(|merge| merge.split_once(' ').with_context(|| format!("the merge {merge:?} is not two tokens")))
        .collect::<Result<Vec<_>>>()?;

    let name = file.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let words = match name {
        "gpt-2" => vec![bytes(true)],
        "smollm" => vec![json!({ "type": "Digits", "individual_digits": true }), bytes(true)],
        "llama-bpe" => vec![split(&words_with_numbers_of(r"\p{N}{1,3}")), bytes(false)],
        "qwen2" => vec![split(&words_with_numbers_of(r"\p{N}")), bytes(false)],
        "default" => {
            let patterns = [r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"];
            patterns.into_iter().map(split).chain([bytes(false)]).collect()
        }
        other => {
            bail!(
                "tokenizer.ggml.pre {other:?} is unknown, smollm, llama-bpe, gpt-2, qwen2 or default is expected; \
                 quantize from the Hugging Face directory instead"
            )
        }
    };
    let is_llama = name == "llama-bpe";
    let tokenizer = json!({
        "normalizer": if name == "qwen2" { json!({ "type": "NFC" }) } else { Value::Null },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": words },
        "decoder": bytes(false),
        "model": {
            "type": "BPE",
            "vocab": vocabulary.json(),
            "merges": merges,
            "ignore_merges": is_llama,
        },
    });
    Ok((tokenizer, is_llama))
}

/// Words as Llama 3 and Qwen 2 cut them; they differ in how many digits stay together.
fn words_with_numbers_of(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

/// Bytes as characters that can be seen, cut into words as GPT-2 does if `words`.
fn bytes(words: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words })
}

/// SentencePiece's BPE: the pair whose union has the best score is merged first, and characters without a
/// token fall back to bytes.
fn sentence_piece(file: &File, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let ids = vocabulary.ids()?;
    let scores = file.f32s("tokenizer.ggml.scores")?;
    let tokens = &vocabulary.tokens;
    ensure!(scores.len() == tokens.len(), "{} token scores for {} tokens", scores.len(), tokens.len());
    let is_normal = |id: &usize| vocabulary.types[*id] == NORMAL;

    let mut order: Vec<usize> = (0..tokens.len()).filter(is_normal).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut merges = Vec::new();
    for id in order {
        let token = tokens[id];
        // Every way to cut a token in two is looked up: the work grows with the square of its length.
        let len = token.len();
        ensure!(len <= LONGEST_PIECE, "token {id} has {len} bytes, at most {LONGEST_PIECE} are expected");
        let halves = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let find = |half: &str| ids.get(half).copied().filter(is_normal);
        let mut found: Vec<_> =
            halves.filter_map(|(left, right)| Some((find(left)?, find(right)?, (left, right)))).collect();
        found.sort_unstable();
        merges.extend(found.into_iter().map(|(_, _, pair)| pair));
    }
    let unknown = vocabulary.token(file.integer("tokenizer.ggml.unknown_token_id")?)?;
    let prefix = file.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let (space, mark) = (" ", "\u{2581}");
    let mut normalizers = vec![json!({ "type": "Replace", "pattern": { "String": space }, "content": mark })];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": mark }, "content": space }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": mark }));
        decoders.push(json!({ "type": "Strip", "content": space, "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "vocab": vocabulary.json(),
            "merges": merges,
            "unk_token": unknown.map(|(_, token)| token),
            "fuse_unk": true,
            "byte_fallback": true,
        },
    }))
}
