//! Texts that have to look like something: JSON, a schema, a regular expression, a grammar. `llguidance` says which
//! tokens may come next.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// What a text has to look like.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    /// Any JSON object.
    Json,
    /// JSON of a schema.
    Schema(Value),
    /// A regular expression matches all of it.
    Regex(String),
    /// A grammar in llguidance's Lark.
    Grammar(String),
}

/// Levels of the deepest form. llguidance reads forms by recursion, and a stack that overflows ends the whole process.
const DEEPEST: usize = 64;

impl Form {
    /// How deep it is: objects and lists in each other, or brackets.
    fn levels(&self) -> usize {
        match self {
            Self::Json => 1,
            Self::Schema(schema) => levels(schema),
            Self::Regex(text) | Self::Grammar(text) => brackets(text),
        }
    }
}

/// Whether a schema names the least number of 64 bits, whose negation llguidance seeks until its stack overflows.
fn names_the_least(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(names_the_least),
        Value::Object(fields) => fields.values().any(names_the_least),
        other => other.as_i64() == Some(i64::MIN),
    }
}

/// Objects and lists in each other; JSON that has been read is not too deep for this.
fn levels(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(levels).max().unwrap_or(0),
        Value::Object(fields) => {
            1 + fields.iter().map(|(name, value)| levels(value).max(brackets(name))).max().unwrap_or(0)
        }
        // It may be a regular expression.
        Value::String(text) => brackets(text),
        _ => 0,
    }
}

/// The most brackets that are open at once, those that stand for themselves among them.
fn brackets(text: &str) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for c in text.chars() {
        match c {
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

/// Makes guides for one vocabulary.
pub(super) struct Guides {
    factory: ParserFactory,
    vocab_size: usize,
}

impl Guides {
    /// Takes note of every token's bytes.
    ///
    /// # Errors
    /// A model without a token that ends texts.
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let ends = tokenizer.stop_ids();
        let end = *ends.first().context("the model names no token that ends a text")?;
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            // llguidance tells special tokens from text by this byte, which no text has.
            if tokenizer.is_special(id) { [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat() } else { bytes }
        };
        let vocab_size = tokenizer.vocab_size();
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, end), &words).with_eos_tokens(ends);
        let env: TokEnv = Arc::new(Env(ApproximateTokEnv::new(trie)));
        let mut factory = ParserFactory::new_simple(&env)?;
        factory.quiet();
        Ok(Self { factory, vocab_size })
    }

    /// A guide to `form`.
    ///
    /// # Errors
    /// What is no schema, regular expression or grammar, what is too deep, and what llguidance has no way to hold a text to.
    pub(super) fn guide(&self, form: &Form) -> Result<Guide> {
        let levels = form.levels();
        ensure!(levels <= DEEPEST, "it is {levels} levels deep, at most {DEEPEST} are allowed");
        if let Form::Schema(schema) = form {
            ensure!(!names_the_least(schema), "{} is not supported, name a number nearer to 0", i64::MIN);
        }
        let grammar = match form {
            Form::Json => TopLevelGrammar::from_json_schema(spaced(json!({ "type": "object" }))),
            Form::Schema(schema) => TopLevelGrammar::from_json_schema(spaced(schema.clone())),
            Form::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Form::Grammar(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let parser = self.factory.create_parser(grammar).map_err(|error| anyhow!("{}", line(&error.to_string())))?;
        let mut matcher = Matcher::new(Ok(parser));
        let warnings = matcher.grammar_warnings();
        ensure!(warnings.is_empty(), "{}", line(&warnings.join("; ")));
        // What no text begins with is told now, not when the first token is chosen.
        matcher.compute_mask_or_eos().map_err(|error| anyhow!("{}", line(&error.to_string())))?;
        Ok(Guide { matcher, vocab_size: self.vocab_size })
    }
}

/// A schema whose texts have a blank, or a line's end and some blanks, between any two of their parts, and no more: a
/// model that does not know what to say would else say white space for ever.
fn spaced(mut schema: Value) -> Value {
    if let Some(map) = schema.as_object_mut() {
        map.insert("x-guidance".into(), json!({ "whitespace_pattern": r"(\x20|\x0A\x20{0,16})" }));
    }
    schema
}

/// A message in one line of bearable length, without the state of the parser behind it.
fn line(message: &str) -> String {
    let said = ["<state>", "<backtrace>"].iter().fold(message, |said, mark| said.split(mark).next().unwrap_or(said));
    said.replace("panic:", "llguidance fails:")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(300)
        .collect()
}

/// A vocabulary as llguidance sees it.
struct Env(ApproximateTokEnv);

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        self.0.tok_trie()
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.0.tokenize_bytes(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// Which tokens may come next in one text.
pub(super) struct Guide {
    matcher: Matcher,
    vocab_size: usize,
}

impl Clone for Guide {
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), vocab_size: self.vocab_size }
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Guide {
    /// Leaves the logits of what may come next.
    ///
    /// # Errors
    /// A form that needs more time or memory than it may, or that no token fits.
    pub(super) fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| anyhow!("{}", line(&error.to_string())))?;
        ensure!(allowed.num_set() > 0, "no token of the vocabulary fits what was asked for");
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= self.vocab_size || !allowed.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes note of a token; true where nothing may follow.
    ///
    /// # Errors
    /// A token that may not come.
    pub(super) fn took(&mut self, id: u32) -> Result<bool> {
        self.matcher.consume_token(id).map_err(|error| anyhow!("{}", line(&error.to_string())))?;
        Ok(self.matcher.is_stopped())
    }
}
