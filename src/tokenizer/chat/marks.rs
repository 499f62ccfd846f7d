//! Marks: private characters that stand for those of a message, to follow them through a template.

use std::collections::{BTreeMap, BTreeSet};

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
    pub(super) fn new(specials: &'a [String], messages: &[Message], others: &[&str]) -> Self {
        let texts = messages.iter().map(|m| m.content.as_str()).chain(others.iter().copied());
        let taken: BTreeSet<char> = texts.chain(specials.iter().map(String::as_str)).flat_map(str::chars).collect();
        let alphabet: BTreeSet<char> =
            specials.iter().flat_map(|token| token.chars()).filter(|c| !c.is_whitespace()).collect();
        let free = private().filter(|c| !taken.contains(c));
        Self { specials, marks: alphabet.into_iter().zip(free).collect() }
    }

    /// The messages with marks, as many as a template that looks into messages may bear: for every character of a
    /// special token; for those that have no case, so that other case does not matter; for the first of each special
    /// token that is spelled out.
    pub(super) fn choices(&self, messages: &[Message]) -> impl Iterator<Item = Vec<Message>> {
        let choices: [fn(&Self, &str, char) -> bool; 3] =
            [|_, _, _| true, |_, _, c| !c.is_alphabetic(), |marks, rest, _| marks.starts(rest)];
        choices.into_iter().map(|is_marked| {
            let content = |text: &str| {
                let mark = |(at, c)| match is_marked(self, &text[at..], c) {
                    true => self.marks.get(&c).copied().unwrap_or(c),
                    false => c,
                };
                text.char_indices().map(mark).collect()
            };
            messages.iter().map(|m| Message { role: m.role.clone(), content: content(&m.content) }).collect()
        })
    }

    /// Whether `text` starts with a special token, white space aside.
    fn starts(&self, text: &str) -> bool {
        self.specials.iter().map(|token| token.trim_start()).any(|token| !token.is_empty() && text.starts_with(token))
    }

    /// A special token that a message spells out.
    pub(super) fn spelled(&self, messages: &[Message]) -> Option<&'a str> {
        let found = self.specials.iter().find(|token| messages.iter().any(|m| m.content.contains(*token)));
        found.map(String::as_str)
    }

    /// The text without marks.
    pub(super) fn remove(&self, marked: &str) -> String {
        let originals: BTreeMap<char, char> = self.marks.iter().map(|(&original, &mark)| (mark, original)).collect();
        marked.chars().map(|c| originals.get(&c).copied().unwrap_or(c)).collect()
    }
}
