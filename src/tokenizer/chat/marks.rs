//! Marks: private characters that stand for those of a message, to follow them through a template.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Message;

/// A mark for each character that special tokens are spelled with.
pub(super) struct Marks<'a> {
    specials: &'a [String],
    marks: BTreeMap<char, char>,
}

/// The private characters of Unicode, beyond those that fonts use.
pub(in crate::tokenizer) fn private() -> impl Iterator<Item = char> {
    ('\u{f0000}'..='\u{ffffd}').chain('\u{100000}'..='\u{10fffd}')
}

impl<'a> Marks<'a> {
    /// Marks for the characters of `specials`, none of which are in the messages or in `others`. White space has
    /// none: templates trim it.
    pub(super) fn new(specials: &'a [String], (messages, tools): (&[Message], &Value), others: &[&str]) -> Self {
        let texts = texts(messages, tools).into_iter().chain(others.iter().copied());
        let taken: BTreeSet<char> = texts.chain(specials.iter().map(String::as_str)).flat_map(str::chars).collect();
        let alphabet: BTreeSet<char> =
            specials.iter().flat_map(|token| token.chars()).filter(|c| !c.is_whitespace()).collect();
        let free = private().filter(|c| !taken.contains(c));
        Self { specials, marks: alphabet.into_iter().zip(free).collect() }
    }

    /// The messages with marks, as many as a template that looks into messages may bear: for every character of a
    /// special token; for those that have no case, so that other case does not matter; for the first of each special
    /// token that is spelled out.
    pub(super) fn choices(&self, messages: &[Message], tools: &Value) -> impl Iterator<Item = (Vec<Message>, Value)> {
        let choices: [fn(&Self, &str, char) -> bool; 3] =
            [|_, _, _| true, |_, _, c| !c.is_alphabetic(), |marks, rest, _| marks.starts(rest)];
        choices.into_iter().map(|is_marked| {
            let content = |text: &str| -> String {
                let mark = |(at, c)| match is_marked(self, &text[at..], c) {
                    true => self.marks.get(&c).copied().unwrap_or(c),
                    false => c,
                };
                text.char_indices().map(mark).collect()
            };
            let marked = |m: &Message| Message {
                role: m.role.clone(),
                content: content(&m.content),
                more: m.more.iter().map(|(name, value)| (name.clone(), with_texts(value, &content))).collect(),
            };
            (messages.iter().map(marked).collect(), with_texts(tools, &content))
        })
    }

    /// Whether `text` starts with a special token, white space aside.
    fn starts(&self, text: &str) -> bool {
        self.specials.iter().map(|token| token.trim_start()).any(|token| !token.is_empty() && text.starts_with(token))
    }

    /// A special token that a message spells out.
    pub(super) fn spelled(&self, messages: &[Message], tools: &Value) -> Option<&'a str> {
        let texts = texts(messages, tools);
        let found = self.specials.iter().find(|token| texts.iter().any(|text| text.contains(*token)));
        found.map(String::as_str)
    }

    /// A special token that the name of a field spells out: names cannot be marked, since templates look for them.
    pub(super) fn named(&self, messages: &[Message], tools: &Value) -> Option<&'a str> {
        fn spells(value: &Value, token: &str) -> bool {
            match value {
                Value::Array(list) => list.iter().any(|value| spells(value, token)),
                Value::Object(map) => map.iter().any(|(name, value)| name.contains(token) || spells(value, token)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
            }
        }
        let mut tokens = self.specials.iter().filter(|token| !token.is_empty());
        let found = tokens.find(|token| {
            let more = |m: &Message| m.more.iter().any(|(name, value)| name.contains(*token) || spells(value, token));
            spells(tools, token) || messages.iter().any(more)
        });
        found.map(String::as_str)
    }

    /// The text without marks.
    pub(super) fn remove(&self, marked: &str) -> String {
        let originals: BTreeMap<char, char> = self.marks.iter().map(|(&original, &mark)| (mark, original)).collect();
        marked.chars().map(|c| originals.get(&c).copied().unwrap_or(c)).collect()
    }
}

/// Every text of messages and tools that came from others, and the names of their fields.
fn texts<'m>(messages: &'m [Message], tools: &'m Value) -> Vec<&'m str> {
    let mut texts = Vec::new();
    for message in messages {
        texts.push(message.content.as_str());
        message.more.values().for_each(|value| gather(value, &mut texts));
    }
    gather(tools, &mut texts);
    texts
}

fn gather<'m>(value: &'m Value, texts: &mut Vec<&'m str>) {
    match value {
        Value::String(text) => texts.push(text),
        Value::Array(list) => list.iter().for_each(|value| gather(value, texts)),
        Value::Object(map) => {
            for (name, value) in map {
                texts.push(name);
                gather(value, texts);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// `value` with other texts; names of fields stay, since templates look for them.
fn with_texts(value: &Value, text: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::String(old) => text(old).into(),
        Value::Array(list) => list.iter().map(|value| with_texts(value, text)).collect(),
        Value::Object(map) => map.iter().map(|(name, value)| (name.clone(), with_texts(value, text))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}
