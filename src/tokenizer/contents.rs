//! The ids of a conversation: special tokens come from the template, never from what a message says.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use super::Tokenizer;
use super::chat::{Extras, Message, Rendering, private};
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
        self.chat_ids_with(messages, &Extras::default(), add_generation_prompt)
    }

    /// As [`Tokenizer::chat_ids`], with tools and variables for the template.
    ///
    /// # Errors
    /// As [`Tokenizer::chat_ids`].
    pub fn chat_ids_with(
        &self,
        messages: &[Message],
        extras: &Extras,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let specials = self.specials();
        let spellings = specials.values().cloned().collect();
        let rendering = self.template()?.render_marked(messages, extras, add_generation_prompt, spellings)?;
        let encode = || self.inner.encode_char_offsets(rendering.text.as_str(), false);
        let encoding = guard(|| encode().map_err(|e| anyhow!("cannot tokenize the text: {e}")))?;
        let ids = match own_places(&encoding, &rendering, &specials) {
            None => encoding.get_ids().to_vec(),
            Some(own) => guard(|| self.encode_but(&rendering.text, &own, &specials))?,
        };
        self.known(&ids)?;
        Ok(ids)
    }

    /// Added tokens that are marked as special, or that start or end texts.
    pub(super) fn specials(&self) -> BTreeMap<u32, String> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let is_special = |id: u32| Some(id) == self.bos || self.stop_ids.contains(&id);
        added.filter(|(id, token)| token.special || is_special(*id)).map(|(id, token)| (id, token.content)).collect()
    }

    /// The ids of `text` with special tokens at the places `own` and nowhere else.
    ///
    /// A second tokenizer knows each special token by a private character that the text does not have. With those
    /// characters in their places, it reads the rest as text, and everything else as the first one does.
    fn encode_but(&self, text: &str, own: &[Place], specials: &BTreeMap<u32, String>) -> Result<Vec<u32>> {
        let free = private().filter(|&c| !text.contains(c) && self.inner.token_to_id(&c.to_string()).is_none());
        let stand_ins: BTreeMap<u32, char> = specials.keys().copied().zip(free).collect();
        let blind = self.blind(specials, &stand_ins).context("cannot tell messages from special tokens")?;
        let mut places = own.iter().peekable();
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

/// Where the template wrote special tokens, if there are others that have a character of a message; none if all are
/// its own.
fn own_places(
    encoding: &tokenizers::Encoding,
    rendering: &Rendering,
    specials: &BTreeMap<u32, String>,
) -> Option<Vec<Place>> {
    let text: Vec<char> = rendering.text.chars().collect();
    let from_message: Vec<bool> = text.iter().zip(rendering.marked.chars()).map(|(&c, marked)| c != marked).collect();
    let places = encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().copied());
    let places = places.filter(|(id, _)| specials.contains_key(id));
    let (own, others): (Vec<Place>, Vec<Place>) =
        places.partition(|&(_, (start, end))| from_message.get(start..end).is_some_and(|c| !c.contains(&true)));
    // A character that the vocabulary does not have becomes a special token too, and need not be replaced.
    let is_spelled = |&(id, (start, end)): &Place| {
        let spelling: String = text[start..end].iter().collect();
        spelling.trim().eq_ignore_ascii_case(specials[&id].trim())
    };
    (!others.is_empty()).then(|| own.into_iter().filter(is_spelled).collect())
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
