//! Tokens that other files than `tokenizer.json` name, and what goes around a text.
//!
//! Three generations of files describe the same tokens. The order is that of transformers: where
//! `tokenizer_config.json` has an `added_tokens_decoder`, it has the last word on every token it lists, and the older
//! `special_tokens_map.json` and `added_tokens.json` are not read; else the former replaces the names that
//! `tokenizer_config.json` gives, and both add tokens. Special tokens that no list gives an id come last.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::guard::guard;

/// Names of special tokens (`bos_token`, `pad_token`, ...) and their texts; none where a file says that there is none.
pub(super) type SpecialTokens = BTreeMap<String, Option<String>>;

/// The names that every tokenizer may have; models have more (`image_token`).
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The files beside `tokenizer.json`; null where there is none.
pub(super) struct Beside {
    /// `tokenizer_config.json`
    pub(super) config: Value,
    /// `special_tokens_map.json`
    pub(super) special_tokens_map: Value,
    /// `added_tokens.json`
    pub(super) added_tokens: Value,
}

/// What they say.
#[derive(Default)]
struct Said {
    named: BTreeMap<String, Option<AddedToken>>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// Tokens with the id that a file gives them, by id.
    listed: Vec<(u32, AddedToken)>,
    /// The file that lists them.
    list: &'static str,
}

/// The parts of `tokenizer.json` that this concerns. The rest is not looked at: a vocabulary is large.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    post_processor: Value,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

/// `tokenizer.json` with everything that the files beside it say, and the special tokens by name.
///
/// # Errors
/// A description that is no token, and two files that disagree about a token's id.
pub(super) fn merge(tokenizer_json: Vec<u8>, beside: &Beside) -> Result<(Vec<u8>, SpecialTokens)> {
    let said = Said::read(beside)?;
    let text = |token: &Option<AddedToken>| token.as_ref().map(|token| token.content.clone());
    let special = said.named.iter().map(|(name, token)| (name.clone(), text(token))).collect();
    // A file that is damaged is refused when its tokenizer is needed.
    let Ok(parts) = serde_json::from_slice::<Parts>(&tokenizer_json) else { return Ok((tokenizer_json, special)) };
    let tokens = said.missing(&parts.added_tokens);
    let around = around_texts(&beside.config, &special, &parts.post_processor);
    if tokens.is_empty() && around.is_none() {
        return Ok((tokenizer_json, special));
    }
    let load = || tokenizers::Tokenizer::from_bytes(&tokenizer_json).map_err(|e| anyhow!("{e}"));
    let Ok(mut tokenizer) = guard(load) else { return Ok((tokenizer_json, special)) };
    said.check(&tokenizer)?;
    guard(|| tokenizer.add_tokens(tokens).map_err(|e| anyhow!("cannot add tokens: {e}")))?;
    said.check_ids(&tokenizer)?;
    if let Some((bos, eos)) = around {
        // Both are special tokens, and so were added above where they were missing.
        let id = |token: &str| tokenizer.token_to_id(token).unwrap_or_default();
        let json = post_processor(bos.map(|bos| (id(bos), bos)), eos.map(|eos| (id(eos), eos)));
        tokenizer.with_post_processor(serde_json::from_value::<Option<PostProcessorWrapper>>(json)?);
    }
    let json = tokenizer.to_string(false).map_err(|e| anyhow!("cannot write the merged tokenizer.json: {e}"))?;
    Ok((json.into_bytes(), special))
}

/// The library numbers added tokens itself and overlooks what `tokenizer.json` says.
///
/// # Errors
/// A token that has another id in `tokenizer` than its description in `tokenizer_json` says.
pub(super) fn check_added(tokenizer_json: &[u8], tokenizer: &tokenizers::Tokenizer) -> Result<()> {
    let Ok(parts) = serde_json::from_slice::<Parts>(tokenizer_json) else { return Ok(()) };
    for Added { id, token } in parts.added_tokens {
        let found = tokenizer.token_to_id(&token.content);
        ensure!(
            found == Some(id) || token.content.is_empty(),
            "tokenizer.json gives the added token {:?} the id {id}, its vocabulary {}",
            token.content,
            found.unwrap_or_default()
        );
    }
    Ok(())
}

impl Said {
    fn read(beside: &Beside) -> Result<Self> {
        let (config, map) = (&beside.config, &beside.special_tokens_map);
        let mut said = Self::default();
        said.name_tokens(config).context("in tokenizer_config.json")?;
        let list = |file: &'_ Value, key: &str| file[key].as_array().cloned().unwrap_or_default();
        let (new, old) = ("extra_special_tokens", "additional_special_tokens");
        let mut extra = list(config, new);
        if extra.is_empty() {
            extra = list(config, old);
        }
        let decoder = config.get("added_tokens_decoder").filter(|decoder| !decoder.is_null());
        if decoder.is_none() {
            said.name_tokens(map).context("in special_tokens_map.json")?;
            extra.extend(list(map, new));
            extra.extend(list(map, old));
        }
        said.extra = extra.iter().map(|value| token(value, true)).collect::<Result<_>>()?;
        (said.list, said.listed) = match decoder {
            Some(decoder) => ("tokenizer_config.json", decoder_tokens(decoder)?),
            None => ("added_tokens.json", said.older_tokens(&beside.added_tokens)?),
        };
        // A token that has a name is special, whatever its list says.
        let names: HashSet<&str> = said.named.values().flatten().map(|token| token.content.as_str()).collect();
        let named = said.listed.iter_mut().filter(|(_, token)| names.contains(token.content.as_str()));
        named.for_each(|(_, token)| token.special = true);
        said.listed.sort_by_key(|(id, _)| *id);
        if decoder.is_some() {
            said.warn_of_older(beside);
        }
        Ok(said)
    }

    /// Takes the tokens that `file` gives names to; they replace what was known under these names.
    fn name_tokens(&mut self, file: &Value) -> Result<()> {
        let named = file.as_object().into_iter().flatten();
        let more = file["extra_special_tokens"].as_object().into_iter().flatten();
        for (name, value) in named.filter(|(name, _)| name.ends_with("_token")).chain(more) {
            let token = match value {
                Value::Null => None,
                Value::String(_) | Value::Object(_) => Some(token(value, true).context(name.clone())?),
                // `add_bos_token` and its like are no tokens.
                other => {
                    let is_token = NAMES.contains(&name.as_str());
                    ensure!(!is_token, "{name} is {other}, a string or an object with content is expected");
                    continue;
                }
            };
            self.named.insert(name.clone(), token);
        }
        Ok(())
    }

    /// The tokens of `added_tokens.json`: texts and their ids.
    fn older_tokens(&self, file: &Value) -> Result<Vec<(u32, AddedToken)>> {
        let special = texts(self.special());
        let read = |(text, id): (&String, &Value)| {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let number = number.with_context(|| format!("added_tokens.json: {id} is no token id"))?;
            Ok((number, AddedToken::from(text.as_str(), special.contains(text.as_str()))))
        };
        file.as_object().into_iter().flatten().map(read).collect()
    }

    /// The special tokens, in the order in which those get ids that have none.
    fn special(&self) -> impl Iterator<Item = &AddedToken> {
        let usual = NAMES.iter().filter_map(|&name| self.named.get(name));
        let own = self.named.iter().filter(|(name, _)| !NAMES.contains(&name.as_str())).map(|(_, token)| token);
        usual.chain(own).flatten().chain(&self.extra)
    }

    /// Says which token only a file has that is not read.
    fn warn_of_older(&self, beside: &Beside) {
        let mut older = Self::default();
        // Whatever is wrong with these files does no harm: nothing else is taken from them.
        let _ = older.name_tokens(&beside.special_tokens_map);
        let known = texts(self.special().chain(self.listed.iter().map(|(_, token)| token)));
        let named = older.special().map(|token| ("special_tokens_map.json", token.content.as_str()));
        let added = beside.added_tokens.as_object().into_iter().flatten();
        let added = added.map(|(text, _)| ("added_tokens.json", text.as_str()));
        if let Some((file, text)) = named.chain(added).find(|(_, text)| !known.contains(text)) {
            tracing::warn!(
                "{file} names the token {text:?}, tokenizer_config.json does not: as in transformers, {file} is not \
                 read where tokenizer_config.json has an added_tokens_decoder"
            );
        }
    }

    /// The tokens that `tokenizer.json`, which has `added`, lacks or describes in another way.
    fn missing(&self, added: &[Added]) -> Vec<AddedToken> {
        let by_text: HashMap<&str, &Added> = added.iter().map(|a| (a.token.content.as_str(), a)).collect();
        let is_same = |id: u32, token: &AddedToken| {
            by_text.get(token.content.as_str()).is_some_and(|a| {
                // The oldest file knows ids only: what a token is stands in tokenizer.json.
                a.id == id && (a.token == *token || self.list == "added_tokens.json")
            })
        };
        let in_list = texts(self.listed.iter().map(|(_, token)| token));
        let is_new = |token: &&AddedToken| {
            let text = token.content.as_str();
            !by_text.contains_key(text) && !in_list.contains(text)
        };
        let listed = self.listed.iter().filter(|(id, token)| !is_same(*id, token)).map(|(_, token)| token);
        listed.chain(self.special().filter(is_new)).cloned().collect()
    }

    /// No listed token has another id in `tokenizer`, and no other token its id.
    fn check(&self, tokenizer: &tokenizers::Tokenizer) -> Result<()> {
        for (id, token) in &self.listed {
            let (list, text) = (self.list, &token.content);
            match (tokenizer.token_to_id(text), tokenizer.id_to_token(*id)) {
                (Some(found), _) if found != *id => {
                    bail!("{list} gives the token {text:?} the id {id}, in tokenizer.json it has {found}");
                }
                (None, Some(other)) => {
                    bail!("{list} gives the id {id} to the token {text:?}, tokenizer.json to {other:?}");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Every listed token got the id that its list says.
    fn check_ids(&self, tokenizer: &tokenizers::Tokenizer) -> Result<()> {
        for (id, token) in &self.listed {
            let found = tokenizer.token_to_id(&token.content);
            ensure!(
                found == Some(*id),
                "{} gives the token {:?} the id {id}, the tokenizer {}: ids before it are missing, or another token \
                 has the same",
                self.list,
                token.content,
                found.unwrap_or_default()
            );
        }
        Ok(())
    }
}

/// The tokens of an `added_tokens_decoder`: ids and what they are.
fn decoder_tokens(decoder: &Value) -> Result<Vec<(u32, AddedToken)>> {
    let place = "in added_tokens_decoder of tokenizer_config.json";
    let tokens = decoder.as_object().with_context(|| format!("{place}: tokens by id are expected"))?;
    let read = |(id, value): (&String, &Value)| {
        let number = id.parse().with_context(|| format!("{place}: {id:?} is no token id"))?;
        Ok((number, token(value, false).with_context(|| format!("{place}: token {id}"))?))
    };
    tokens.iter().map(read).collect()
}

fn texts<'a>(tokens: impl Iterator<Item = &'a AddedToken>) -> HashSet<&'a str> {
    tokens.map(|token| token.content.as_str()).collect()
}

/// A token, spelled as a string or as an object with `content`. `is_special`: it stands where only special ones do.
fn token(value: &Value, is_special: bool) -> Result<AddedToken> {
    #[derive(Deserialize)]
    struct Described {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        normalized: Option<bool>,
        #[serde(default)]
        special: bool,
    }
    if let Value::String(text) = value {
        return Ok(AddedToken::from(text.as_str(), is_special));
    }
    let described = Described::deserialize(value)
        .map_err(|e| anyhow!("{value} is no token, a string or an object with content is expected: {e}"))?;
    let special = described.special || is_special;
    Ok(AddedToken {
        content: described.content,
        single_word: described.single_word,
        lstrip: described.lstrip,
        rstrip: described.rstrip,
        normalized: described.normalized.unwrap_or(!special),
        special,
    })
}

/// The tokens that go before and behind a text by `add_bos_token` and `add_eos_token` of `tokenizer_config.json`,
/// if `post_processor` does otherwise.
///
/// GGUF files have these two fields and no post-processor, llama.cpp and transformers 4 follow them; transformers 5
/// drops them where there is a `tokenizer.json`. A model must get the same tokens whichever file it comes in, so they
/// count here too.
fn around_texts<'a>(
    config: &Value,
    special: &'a SpecialTokens,
    post_processor: &Value,
) -> Option<(Option<&'a str>, Option<&'a str>)> {
    let [add_bos, add_eos] = ["add_bos_token", "add_eos_token"].map(|key| config[key].as_bool());
    let named = |name: &str| special.get(name)?.as_deref();
    let (bos, eos) = (named("bos_token"), named("eos_token"));
    let steps = match &post_processor["processors"] {
        Value::Array(steps) => steps.as_slice(),
        _ if post_processor.is_null() => &[],
        _ => std::slice::from_ref(post_processor),
    };
    let (mut before, mut behind) = (None, None);
    for step in steps.iter().filter(|step| step["type"] != "ByteLevel") {
        // Other kinds than templates, and templates with other tokens, stay as they are.
        let single = step["single"].as_array()?;
        let text = single.iter().position(|item| !item["Sequence"].is_null())?;
        (before, behind) = (at_most(&single[..text], bos)?, at_most(&single[text + 1..], eos)?);
    }
    let wanted = |add: Option<bool>, now: Option<&str>| add.unwrap_or(now.is_some());
    let around = (bos.filter(|_| wanted(add_bos, before)), eos.filter(|_| wanted(add_eos, behind)));
    (around != (before, behind)).then_some(around)
}

/// `token` if it is all that `items` of a template have, nothing if there are none of them.
fn at_most<'a>(items: &[Value], token: Option<&'a str>) -> Option<Option<&'a str>> {
    match items {
        [] => Some(None),
        [item] if token.is_some() && item["SpecialToken"]["id"].as_str() == token => Some(token),
        _ => None,
    }
}

/// The post-processor that puts one token before every text, and one behind it; null where there is none of them.
pub(crate) fn post_processor(bos: Option<(u32, &str)>, eos: Option<(u32, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |token: Option<(u32, &str)>, text: u32| {
        token.map(|(_, token)| json!({ "SpecialToken": { "id": token, "type_id": text } }))
    };
    let around = |name: &str, text: u32| {
        let sequence = json!({ "Sequence": { "id": name, "type_id": text } });
        [special(bos, text), Some(sequence), special(eos, text)].into_iter().flatten().collect::<Vec<_>>()
    };
    let ids = |(id, token): (u32, &str)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": ([around("A", 0), around("B", 1)].concat()),
        "special_tokens": bos.into_iter().chain(eos).map(ids).collect::<serde_json::Map<_, _>>(),
    })
}
