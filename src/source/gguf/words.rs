//! How byte-level tokenizers cut a text into words, by the name that a GGUF gives: `tokenizer.ggml.pre`.

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// What a name stands for. Names are llama.cpp's; what they mean is what the original `tokenizer.json` of their
/// models says.
pub(super) struct Words {
    /// The steps of the pre-tokenizer; the last one writes bytes as characters.
    pub(super) steps: Vec<Value>,
    /// What is done to a text before, or null.
    pub(super) normalizer: Value,
    /// A word that is a token is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Texts start with BOS unless the file says otherwise.
    pub(super) starts_with_bos: bool,
}

/// GPT-2's way of cutting text into words.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

impl Words {
    pub(super) fn named(name: &str) -> Result<Self> {
        let plain = |steps| Self { steps, normalizer: Value::Null, ignore_merges: false, starts_with_bos: false };
        Ok(match name {
            "gpt-2" | "phi-2" | "gigachat" | "a.x-4.0" | "mellum" | "trillion" => plain(vec![bytes(true)]),
            "smollm" | "starcoder" | "refact" | "minerva-7b" => {
                plain(vec![json!({ "type": "Digits", "individual_digits": true }), bytes(true)])
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => Self {
                ignore_merges: true,
                starts_with_bos: true,
                ..plain(vec![split(&with_numbers_of(r"\p{N}{1,3}")), bytes(false)])
            },
            "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => {
                plain(vec![split(&with_numbers_of(r"\p{N}{1,3}")), bytes(false)])
            }
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" => Self {
                normalizer: json!({ "type": "NFC" }),
                ..plain(vec![split(&with_numbers_of(r"\p{N}")), bytes(false)])
            },
            "tekken" => Self {
                ignore_merges: true,
                starts_with_bos: true,
                ..plain(vec![split(&by_capitals("", r"\p{N}")), bytes(false)])
            },
            "gpt-4o" => {
                let contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
                plain(vec![split(&by_capitals(contractions, r"\p{N}{1,3}")), bytes(false)])
            }
            "default" => {
                let patterns = [r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"];
                plain(patterns.into_iter().map(split).chain([bytes(false)]).collect())
            }
            other => bail!(
                "tokenizer.ggml.pre {other:?} is unknown, smollm, llama-bpe, gpt-2, qwen2, tekken, gpt-4o, dbrx, \
                 smaug-bpe, glm4, starcoder, refact, deepseek-r1-qwen or default is expected; quantize from the Hugging Face directory \
                 instead"
            ),
        })
    }
}

/// Words as Llama 3 and Qwen 2 cut them; they differ in how many digits stay together.
fn with_numbers_of(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// Words as Mistral and GPT-4o cut them: they end where capitals begin after small letters, and at what `ends` them.
fn by_capitals(ends: &str, digits: &str) -> String {
    let (capitals, small) = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]");
    let before = r"[^\r\n\p{L}\p{N}]?";
    let words = format!("{before}{capitals}*{small}+{ends}|{before}{capitals}+{small}*{ends}|{digits}");
    words + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

/// Bytes as characters that can be seen, cut into words as GPT-2 does if `words`.
pub(super) fn bytes(words: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words })
}
