//! Single tokens: their bytes, and which of them are special.

use tokenizers::decoders::DecoderWrapper;

use super::Tokenizer;
use super::stream::bytes;

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// One character a byte.
    ByteLevel,
    /// Pieces of text, `▁` for a space, `<0x0A>` for a byte.
    Pieces,
}

impl Tokenizer {
    /// The bytes that a token adds to a text, by itself; those of its name for a special one. None for an id that there
    /// is no token for.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.is_added(id) {
            return Some(token.into_bytes());
        }
        Some(match self.spelling() {
            Spelling::ByteLevel => bytes(&token),
            Spelling::Pieces => byte(&token).map_or_else(|| token.replace('▁', " ").into_bytes(), |byte| vec![byte]),
        })
    }

    /// Whether a token is no text: it starts, ends or separates what others say.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id);
        Some(id) == self.bos || self.stop_ids.contains(&id) || added.is_some_and(|token| token.special)
    }

    /// Whether a token was added to the vocabulary that was trained.
    fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The token that a text names, if the vocabulary has it as a whole.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary spells it.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids of the model, whether or not there is a token for each.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The special tokens that have a name, such as `eos_token`, with their texts.
    pub fn named_tokens(&self) -> impl Iterator<Item = (String, String)> {
        self.named.iter().cloned()
    }

    fn spelling(&self) -> Spelling {
        fn is_byte_level(decoder: &DecoderWrapper) -> bool {
            match decoder {
                DecoderWrapper::ByteLevel(_) => true,
                DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(is_byte_level),
                _ => false,
            }
        }
        if self.inner.get_decoder().is_some_and(is_byte_level) { Spelling::ByteLevel } else { Spelling::Pieces }
    }
}

/// The byte of `<0x0A>`.
fn byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::fixture;

    /// A text's tokens, put together by their bytes, are the text again.
    #[test]
    fn bytes_of_tokens_make_the_text() {
        for (kind, tokenizer) in fixture::kinds() {
            for text in ["the red house, and then 12 more", "naïve café 東京 🙂\n\ttab"] {
                let ids = tokenizer.encode_chat(text).expect("ids");
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).expect("a token")).collect();
                let made = String::from_utf8_lossy(&bytes).into_owned();
                // NFC, and a space that some put before each text, are not the vocabulary's doing.
                let unknown = made.contains("<unk>");
                assert!(made.trim_start() == text || (kind == "unigram" && unknown), "{kind}: {made:?} of {text:?}");
            }
            assert!(tokenizer.token_bytes(u32::MAX).is_none());
            let special = tokenizer.token_id("<|im_end|>").expect("it was added");
            assert!(
                tokenizer.is_special(special) && !tokenizer.is_special(tokenizer.token_id("<tool>").expect("added"))
            );
            assert_eq!(tokenizer.token_bytes(special).expect("a token"), b"<|im_end|>", "{kind}");
        }
    }
}
