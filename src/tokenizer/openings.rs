//! What a model that writes text by itself begins with, and which tokens are words at all.

use anyhow::Result;

use super::Tokenizer;
use super::chat::Message;

/// How an end of text is spelled where the model's own end is that of a turn; in the order in which they are looked for.
const ENDS_OF_TEXT: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>"];

/// The tokens around the messages of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Turns {
    /// All before the first message of the user.
    pub(crate) before: Vec<u32>,
    /// From the end of what the user said to the beginning of the answer.
    pub(crate) to_assistant: Vec<u32>,
    /// From the end of an answer to the beginning of what the user says next.
    pub(crate) to_user: Vec<u32>,
}

impl Tokenizer {
    /// The ids that stand for text: neither special nor unused.
    pub(crate) fn words(&self) -> Vec<u32> {
        let specials = self.specials();
        let known = |id: &u32| !specials.contains_key(id) && self.inner.id_to_token(*id).is_some();
        (0..self.vocab_size as u32).filter(known).collect()
    }

    /// The token between two texts; of the tokens that end a turn, the first, where there is no other.
    pub(crate) fn end_of_text(&self) -> Option<u32> {
        let known = |spelled: &&str| self.inner.token_to_id(spelled).filter(|&id| (id as usize) < self.vocab_size);
        ENDS_OF_TEXT.iter().find_map(known).or_else(|| self.stop_ids.first().copied())
    }

    /// What the chat template writes around messages, as it writes around those of a conversation of three.
    ///
    /// # Errors
    /// As [`Tokenizer::chat`]; a template that does not write messages as they are.
    pub(crate) fn turns(&self) -> Result<Turns> {
        // Words that no template has.
        let said = ["firstquestion", "firstanswer", "secondquestion"];
        let roles = ["user", "assistant", "user"];
        let messages: Vec<Message> = roles.iter().zip(said).map(|(role, said)| Message::new(role, said)).collect();
        let text = self.chat(&messages, false)?;
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        for said in said {
            let found = rest.split_once(said).filter(|(_, after)| !after.contains(said));
            let (before, after) = found.ok_or_else(|| {
                anyhow::anyhow!(
                    "the chat template does not write every message once, as it is: no chat can be begun with it"
                )
            })?;
            parts.push(self.encode_chat(before)?);
            rest = after;
        }
        let [before, to_assistant, to_user] = parts.try_into().expect("three parts");
        Ok(Turns { before, to_assistant, to_user })
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{SPECIALS, kinds, with_template};

    #[test]
    fn turns_are_what_the_template_writes_around_messages() {
        let template =
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}";
        let (_, kind) = kinds().swap_remove(1);
        let json = kind.inner.to_string(false).unwrap();
        let tokenizer = |template: &str| with_template(json.clone().into_bytes(), Some(template));
        let plain = tokenizer(template);
        let turns = plain.turns().unwrap();
        let text = |ids: &[u32]| plain.decode(ids).unwrap();
        assert_eq!(text(&turns.before), "<|im_start|>user\n");
        assert_eq!(text(&turns.to_assistant), "<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(text(&turns.to_user), "<|im_end|>\n<|im_start|>user\n");
        // Messages in capitals are not there as they were, and one that is there twice does not say where it begins.
        for wrong in ["{{ messages[0].content | upper }}", "{{ messages[0].content }}{{ messages[0].content }}"] {
            let error = tokenizer(wrong).turns().unwrap_err().to_string();
            assert!(error.contains("chat template"), "{error}");
        }
    }

    #[test]
    fn words_are_no_special_tokens() {
        for (name, tokenizer) in kinds() {
            let words = tokenizer.words();
            for special in SPECIALS {
                assert!(
                    tokenizer.inner.token_to_id(special).is_none_or(|id| !words.contains(&id)),
                    "{name}: {special}"
                );
            }
            assert!(words.len() > 100 && words.is_sorted(), "{name}");
            assert_eq!(tokenizer.end_of_text(), tokenizer.inner.token_to_id("</s>"), "{name}");
        }
    }
}
