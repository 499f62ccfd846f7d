//! The ids of a conversation: special tokens come from the template, never from what a message says.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType};

use super::Tokenizer;
use super::chat::{Message, Rendering, private};
use super::guard::guard;

/// A special token in a text: its id, and the characters that it takes, white space that it strips included.
type Place = (u32, (usize, usize));

impl Tokenizer {
    /// The ids of a conversation as the model's chat template writes it, with the opening of the answer if
    /// `add_generation_prompt`. They are those of the text that [`Tokenizer::chat`] returns, except where a message
    /// spells a special token: that stays text, so that nobody who writes into a conversation can end a turn in it.
    ///
    /// # Errors
    /// As [`Tokenizer::chat`] and [`Tokenizer::encode`]; a template that looks for special tokens in messages, and a
    /// message that has one.
    pub fn chat_ids(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let specials = self.specials();
        let spellings = specials.values().cloned().collect();
        let rendering = self.template()?.render_marked(messages, add_generation_prompt, spellings)?;
        let Rendering { text, marked } = &rendering;
        let own = guard(|| self.special_places(marked, &specials))?;
        let encoding = guard(|| self.inner.encode_char_offsets(text.as_str(), false).map_err(|e| anyhow!("{e}")))?;
        let mut tokens = encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().copied());
        let ids = match tokens.all(|token| !specials.contains_key(&token.0) || own.contains(&token)) {
            true => encoding.get_ids().to_vec(),
            false => guard(|| self.encode_but(text, &own, &specials))?,
        };
        self.known(&ids)?;
        Ok(ids)
    }

    /// Added tokens that are marked as special, or that start or end texts.
    fn specials(&self) -> BTreeMap<u32, String> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let is_special = |id: u32| Some(id) == self.bos || self.stop_ids.contains(&id);
        added.filter(|(id, token)| token.special || is_special(*id)).map(|(id, token)| (id, token.content)).collect()
    }

    /// Where `text` has special tokens.
    fn special_places(&self, text: &str, specials: &BTreeMap<u32, String>) -> Result<BTreeSet<Place>> {
        let vocabulary = self.inner.get_added_vocabulary();
        let parts = vocabulary.extract_and_normalize(self.inner.get_normalizer(), text);
        let parts = parts.get_splits(OffsetReferential::Original, OffsetType::Char);
        let places = parts.into_iter().filter_map(|(_, place, tokens)| Some((tokens.as_ref()?.first()?.id, place)));
        Ok(places.filter(|(id, _)| specials.contains_key(id)).collect())
    }

    /// The ids of `text` with special tokens at the places `own` and nowhere else.
    ///
    /// A second tokenizer knows each special token by a private character that the text does not have. With those
    /// characters in their places, it reads the rest as text, and everything else as the first one does.
    fn encode_but(&self, text: &str, own: &BTreeSet<Place>, specials: &BTreeMap<u32, String>) -> Result<Vec<u32>> {
        let free = private().filter(|&c| !text.contains(c) && self.inner.token_to_id(&c.to_string()).is_none());
        let stand_ins: BTreeMap<u32, char> = specials.keys().copied().zip(free).collect();
        let blind = self.blind(specials, &stand_ins).context("cannot tell messages from special tokens")?;
        let mut places: Vec<&Place> = own.iter().collect();
        places.sort_by_key(|(_, place)| *place);
        let mut places = places.into_iter().peekable();
        let mut replaced = String::with_capacity(text.len());
        for (i, c) in text.chars().enumerate() {
            while places.next_if(|(_, (_, end))| *end <= i).is_some() {}
            match places.peek() {
                Some((id, (start, _))) if *start == i => replaced.push(stand_ins[id]),
                Some((_, (start, _))) if *start < i => (),
                _ => replaced.push(c),
            }
        }
        let encoding = blind.encode_fast(replaced, false).map_err(|e| anyhow!("cannot tokenize the text: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// This tokenizer with other names for its special tokens, also in the vocabulary of its model.
    fn blind(
        &self,
        specials: &BTreeMap<u32, String>,
        stand_ins: &BTreeMap<u32, char>,
    ) -> Result<tokenizers::Tokenizer> {
        let json = self.inner.to_string(false).map_err(|e| anyhow!("{e}"))?;
        let mut json: Value = serde_json::from_str(&json)?;
        let names: BTreeMap<&str, String> =
            specials.iter().map(|(id, name)| (name.as_str(), stand_ins[id].to_string())).collect();
        json["post_processor"] = Value::Null;
        for token in json["added_tokens"].as_array_mut().into_iter().flatten() {
            if let Some(name) = token["content"].as_str().and_then(|name| names.get(name)) {
                token["content"] = name.as_str().into();
                // The template wrote it where it is, next to whatever word.
                token["single_word"] = false.into();
            }
        }
        rename(&mut json["model"], &names);
        let blind = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&json)?).map_err(|e| anyhow!("{e}"))?;
        for (id, stand_in) in stand_ins {
            let found = blind.token_to_id(&stand_in.to_string());
            ensure!(found == Some(*id), "special token {id} becomes {found:?} under another name");
        }
        Ok(blind)
    }
}

/// Gives tokens of a model other names; merges that make one of them go.
fn rename(model: &mut Value, names: &BTreeMap<&str, String>) {
    if let Some(vocabulary) = model["vocab"].as_object_mut() {
        for (&old, new) in names {
            if let Some(id) = vocabulary.remove(old) {
                vocabulary.insert(new.clone(), id);
            }
        }
    }
    for piece in model["vocab"].as_array_mut().into_iter().flatten() {
        if let Some(new) = piece[0].as_str().and_then(|old| names.get(old)) {
            piece[0] = new.as_str().into();
        }
    }
    if let Some(new) = model["unk_token"].as_str().and_then(|old| names.get(old)) {
        model["unk_token"] = new.as_str().into();
    }
    if let Some(merges) = model["merges"].as_array_mut() {
        merges.retain(|merge| {
            let (left, right) = (merge[0].as_str().unwrap_or_default(), merge[1].as_str().unwrap_or_default());
            ![left, right, &format!("{left}{right}")].iter().any(|token| names.contains_key(token))
        });
    }
}

#[cfg(test)]
mod tests;
