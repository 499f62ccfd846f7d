//! Text to ids and back, chat templates, and the ids that end a text.

mod chat;
mod contents;
mod files;
#[cfg(test)]
mod fixture;
mod guard;
mod merge;
mod openings;
mod stream;
mod text;
mod tokens;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, bail};
use tokenizers::ModelWrapper;

use crate::config::ModelConfig;
use chat::Chat;
pub use chat::{Extras, Message};
pub use files::TextFiles;
use guard::guard;
pub(crate) use merge::post_processor;
pub(crate) use openings::Turns;
pub use stream::TextStream;
pub use text::TextReader;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    chat: Option<Chat>,
    vocab_size: usize,
    bos: Option<u32>,
    stop_ids: Vec<u32>,
    /// Special tokens by name, such as `bos_token`.
    named: Vec<(String, String)>,
}

impl Tokenizer {
    /// Loads the tokenizer.
    ///
    /// # Errors
    /// A `tokenizer.json` of an unknown kind.
    pub fn new(files: &TextFiles, config: &ModelConfig) -> Result<Self> {
        let mut inner = guard(|| {
            tokenizers::Tokenizer::from_bytes(&files.tokenizer_json)
                .map_err(|e| anyhow!("tokenizer.json is damaged or of an unknown kind: {e}"))
        })?;
        inner.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
        inner.with_padding(None);
        merge::check_added(&files.tokenizer_json, &inner)?;
        without_dropout(&mut inner);
        // A file that says "none" has the last word; where all are silent, the model's configuration counts.
        let named = |name: &str, id: Option<u32>| match files.special_tokens.get(name) {
            Some(token) => token.clone(),
            None => inner.id_to_token(id?),
        };
        let bos = named("bos_token", config.bos_token_id);
        let eos = named("eos_token", config.eos_token_ids.first().copied());
        let id = |token: &Option<String>| inner.token_to_id(token.as_deref()?);
        let ends: BTreeSet<u32> =
            config.eos_token_ids.iter().chain(&files.eos_token_ids).copied().chain(id(&eos)).collect();
        let bos_id = id(&bos);
        let mut tokens: BTreeMap<_, _> =
            files.special_tokens.iter().filter_map(|(name, token)| Some((name.clone(), token.clone()?))).collect();
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            tokens.extend(token.map(|token| (name.to_owned(), token)));
        }
        let named: Vec<_> = tokens.into_iter().collect();
        let tokens = named.clone();
        Ok(Self {
            named,
            chat: files.chat_template.as_deref().map(|template| Chat::new(template, tokens)),
            vocab_size: config.vocab_size,
            bos: bos_id,
            stop_ids: ends.into_iter().collect(),
            inner,
        })
    }

    /// The ids of a text. Special tokens written in it are recognised; the tokenizer's own post-processor says
    /// whether BOS comes first, and never adds it to a text that already starts with it.
    ///
    /// # Errors
    /// A token outside the model's vocabulary: the tokenizer belongs to another model.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.encode_with(text, true)?;
        let (ids, added) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        let twice = ids.len() > 1 && ids[..2].iter().all(|&id| Some(id) == self.bos) && added[0] == 1;
        Ok(ids[usize::from(twice)..].to_vec())
    }

    /// The ids of a text that is trusted as a whole: special tokens written in it are recognised, nothing is added.
    /// For a conversation, part of which others wrote, there is [`Tokenizer::chat_ids`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_with(text, false)?.get_ids().to_vec())
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<tokenizers::Encoding> {
        let encode = || self.inner.encode_fast(text, add_special_tokens);
        let encoding = guard(|| encode().map_err(|e| anyhow!("cannot tokenize the text: {e}")))?;
        self.known(encoding.get_ids())?;
        Ok(encoding)
    }

    /// Refuses ids that the model does not have.
    fn known(&self, ids: &[u32]) -> Result<()> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            let token = self.inner.id_to_token(id).unwrap_or_default();
            bail!(
                "the text has the token {token:?} with id {id}, the model knows ids below {}: \
                 tokenizer.json belongs to another model",
                self.vocab_size
            );
        }
        Ok(())
    }

    /// The text of `ids`, special tokens included; incomplete characters become U+FFFD.
    ///
    /// # Errors
    /// What the tokenizer's decoder refuses.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guard(|| self.inner.decode(ids, false).map_err(|e| anyhow!("cannot decode the tokens: {e}")))
    }

    /// A conversation as the model's chat template writes it, with the opening of the answer if
    /// `add_generation_prompt`; [`Tokenizer::chat_ids`] makes ids of the conversation.
    ///
    /// # Errors
    /// No template or one that is not Jinja, a message that the template refuses, or a template that takes more time
    /// or memory than a template may.
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.template()?.render(messages, add_generation_prompt)
    }

    fn template(&self) -> Result<&Chat> {
        self.chat.as_ref().context("the model has no chat template, give the prompt without --chat")
    }

    /// Whether [`Tokenizer::chat`] has a template.
    pub fn has_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// The ids that end a text, ascending: of configuration, generation configuration and tokenizer together.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The id that a text starts with, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// A text that grows token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self, false)
    }

    /// What grows after `prompt`: with the prompt's text before it, it is what [`Tokenizer::decode`] makes of both
    /// together. So a first word keeps the space that it would lose at the start of a text; behind BOS alone, a text
    /// starts.
    pub fn stream_after(&self, prompt: &[u32]) -> TextStream<'_> {
        TextStream::new(self, prompt.iter().any(|&id| Some(id) != self.bos))
    }
}

/// BPE may leave out merges at random, which makes training more robust: a prompt is read as it is.
fn without_dropout(tokenizer: &mut tokenizers::Tokenizer) {
    if let ModelWrapper::BPE(model) = tokenizer.get_model()
        && model.dropout.is_some()
    {
        let mut model = model.clone();
        model.dropout = None;
        tokenizer.with_model(model);
    }
}
