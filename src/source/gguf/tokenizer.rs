//! The tokenizer in a GGUF's metadata, written as the `tokenizer.json` that it was made from.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::file::File;
use super::words::{self, Words};
use crate::tokenizer::{TextFiles, post_processor};

/// Token types (`tokenizer.ggml.token_type`). Normal ones and bytes are what texts are made of; unused ones fill the
/// vocabulary up and stand for no text; the others are found in a text before it is cut into words.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// Special tokens that end a turn in the chat formats of the supported models. A GGUF names one end of text;
/// the rest of what `generation_config.json` listed is lost, these names bring it back.
const TURN_ENDS: [&str; 5] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"];

/// Bytes of a SentencePiece token; its trainer makes none longer than 16 characters unless told to.
const LONGEST_PIECE: usize = 256;

/// Phi-3's special tokens that leave the white space behind them to the text.
const PHI_3_KEEPS_SPACE: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// The vocabulary as the metadata has it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i32>,
    /// The last token of each text: where padding repeats a text, only one of them can be found.
    ids: BTreeMap<&'a str, usize>,
}

/// Tokenizer, chat template, special tokens and ends of text.
pub(super) fn texts(file: &File) -> Result<TextFiles> {
    let model = file.text("tokenizer.ggml.model")?;
    let model = model.context("tokenizer.ggml.model is missing: the file has no tokenizer")?;
    let special = |name: &str| {
        let (id, stored) = (special_id(file, name)?, file.integer(&special_key(name))?);
        if let (None, Some(stored)) = (id, stored) {
            tracing::warn!("{} is {stored}, which no token has: taken as none", special_key(name));
        }
        anyhow::Ok(id)
    };
    let (bos, eos, unknown) = (special("bos")?, special("eos")?, special("unknown")?);
    let mut ends: Vec<u32> = [eos, special("eot")?, special("eom")?].into_iter().flatten().collect();
    let named: Vec<u32> = [bos, unknown].into_iter().flatten().chain(ends.iter().copied()).collect();
    let vocabulary = Vocabulary::read(file, &named)?;
    let (mut tokenizer, starts_with_bos, strips) = match model {
        "gpt2" => {
            let (tokenizer, starts_with_bos) = byte_level(file, &vocabulary)?;
            (tokenizer, starts_with_bos, false)
        }
        "llama" => (sentence_piece(file, &vocabulary, unknown)?, true, is_phi_3(file)?),
        other => bail!("tokenizer.ggml.model {other:?} is unknown, gpt2 or llama is expected"),
    };
    tokenizer["version"] = "1.0".into();
    tokenizer["added_tokens"] = vocabulary.special_tokens(strips);
    let adds = |name: &str| file.boolean(&format!("tokenizer.ggml.add_{name}_token"));
    let around = |token: Option<u32>, adds: bool| token.filter(|_| adds).map(|id| (id, vocabulary.text(id)));
    let before = around(bos, adds("bos")?.unwrap_or(starts_with_bos));
    tokenizer["post_processor"] = post_processor(before, around(eos, adds("eos")?.unwrap_or(false)));

    ends.extend(vocabulary.turn_ends());
    ends.sort_unstable();
    ends.dedup();
    let text = |id: Option<u32>| id.map(|id| vocabulary.text(id).to_owned());
    Ok(TextFiles {
        tokenizer_json: serde_json::to_vec(&tokenizer)?,
        chat_template: file.text("tokenizer.chat_template")?.map(str::to_owned),
        special_tokens: [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown)]
            .map(|(name, id)| (name.to_owned(), text(id)))
            .into(),
        eos_token_ids: ends,
    })
}

fn special_key(name: &str) -> String {
    format!("tokenizer.ggml.{name}_token_id")
}

/// The id of the token that is BOS, EOS or whatever `name` says; none if the key is missing or the vocabulary has no
/// such token, which some files say on purpose and llama.cpp passes over too.
pub(super) fn special_id(file: &File, name: &str) -> Result<Option<u32>> {
    let Some(id) = file.integer(&special_key(name))? else { return Ok(None) };
    let is_there = id < file.len("tokenizer.ggml.tokens") as u64;
    Ok(Some(id as u32).filter(|_| is_there))
}

/// Whether the special tokens take the white space behind them along. No key of the metadata says so, and of the
/// families that are read only Phi-3's tokens do; models made from it may have another architecture.
fn is_phi_3(file: &File) -> Result<bool> {
    let architecture = file.text("general.architecture")?.unwrap_or_default();
    let name = file.text("general.name")?.unwrap_or_default().to_lowercase().replace([' ', '-', '_'], "");
    Ok(architecture == "phi3" || name.contains("phi3"))
}

impl<'a> Vocabulary<'a> {
    /// `named`: tokens that have a part to play, as BOS. They are special tokens whatever their type.
    fn read(file: &'a File, named: &[u32]) -> Result<Self> {
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        ensure!(!tokens.is_empty(), "tokenizer.ggml.tokens is missing: the file has no tokenizer");
        let ids: BTreeMap<_, _> = tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect();
        let mut types = file.i32s("tokenizer.ggml.token_type")?;
        if types.is_empty() {
            types = tokens.iter().map(|token| guessed_type(token)).collect();
        }
        ensure!(types.len() == tokens.len(), "{} token types for {} tokens", types.len(), tokens.len());
        for &id in named {
            let kind = &mut types[id as usize];
            *kind = if *kind == NORMAL { CONTROL } else { *kind };
        }
        Ok(Self { tokens, types, ids })
    }

    fn text(&self, id: u32) -> &'a str {
        self.tokens[id as usize]
    }

    /// `strips`: the special tokens take the white space behind them along.
    fn special_tokens(&self, strips: bool) -> Value {
        let is_special = |id: usize| matches!(self.types[id], UNKNOWN | CONTROL | USER_DEFINED);
        let special = (0..self.tokens.len()).filter(|&id| is_special(id) && self.ids[self.tokens[id]] == id);
        let token = |id: usize| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": strips && !PHI_3_KEEPS_SPACE.contains(&self.tokens[id]),
                "normalized": false,
                "special": self.types[id] != USER_DEFINED,
            })
        };
        special.map(token).collect()
    }

    fn turn_ends(&self) -> impl Iterator<Item = u32> {
        let typed = self.tokens.iter().zip(&self.types).enumerate();
        let ends =
            typed.filter(|(_, (token, kind))| matches!(**kind, CONTROL | USER_DEFINED) && TURN_ENDS.contains(*token));
        ends.map(|(id, _)| id as u32)
    }

    fn json(&self) -> Map<String, Value> {
        self.ids.iter().map(|(&token, &id)| (token.to_owned(), id.into())).collect()
    }
}

/// What a token is likely to be in a file without types.
fn guessed_type(token: &str) -> i32 {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    if byte.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok()) {
        BYTE
    } else if TURN_ENDS.contains(&token) {
        CONTROL
    } else {
        NORMAL
    }
}

/// BPE over bytes; the second value says whether its texts start with BOS unless the file says otherwise.
fn byte_level(file: &File, vocabulary: &Vocabulary<'_>) -> Result<(Value, bool)> {
    let merges = file.texts("tokenizer.ggml.merges")?;
    ensure!(!merges.is_empty(), "tokenizer.ggml.merges is missing");
    let merges = merges
        .iter()
        .map(|merge| merge.split_once(' ').with_context(|| format!("the merge {merge:?} is not two tokens")))
        .collect::<Result<Vec<_>>>()?;
    let words = Words::named(file.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let tokenizer = json!({
        "normalizer": words.normalizer,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": words.steps },
        "decoder": words::bytes(false),
        "model": {
            "type": "BPE",
            "vocab": vocabulary.json(),
            "merges": merges,
            "ignore_merges": words.ignore_merges,
        },
    });
    Ok((tokenizer, words.starts_with_bos))
}

/// SentencePiece's BPE: the pair whose union has the best score is merged first, and characters without a
/// token fall back to bytes.
fn sentence_piece(file: &File, vocabulary: &Vocabulary<'_>, unknown: Option<u32>) -> Result<Value> {
    let scores = file.f32s("tokenizer.ggml.scores")?;
    let tokens = &vocabulary.tokens;
    ensure!(scores.len() == tokens.len(), "{} token scores for {} tokens", scores.len(), tokens.len());
    let is_normal = |id: &usize| vocabulary.types[*id] == NORMAL && vocabulary.ids[tokens[*id]] == *id;

    let mut order: Vec<usize> = (0..tokens.len()).filter(is_normal).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut merges = Vec::new();
    for id in order {
        let token = tokens[id];
        // Every way to cut a token in two is looked up: the work grows with the square of its length.
        let len = token.len();
        ensure!(len <= LONGEST_PIECE, "token {id} has {len} bytes, at most {LONGEST_PIECE} are expected");
        let halves = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let find = |half: &str| vocabulary.ids.get(half).copied().filter(is_normal);
        let mut found: Vec<_> =
            halves.filter_map(|(left, right)| Some((find(left)?, find(right)?, (left, right)))).collect();
        found.sort_unstable();
        merges.extend(found.into_iter().map(|(_, _, pair)| pair));
    }
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
            "unk_token": unknown.map(|id| vocabulary.text(id)),
            "fuse_unk": true,
            "byte_fallback": true,
        },
    }))
}
