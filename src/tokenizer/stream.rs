//! A text that grows token by token.
//!
//! What a decoder makes of a token may depend on the tokens around it: bytes make a character together, the first
//! word of a text loses its space. Each step of the decoder runs on its own here, on tokens as they come, and holds
//! back what a later token can still change.

use anyhow::{Result, anyhow};
use tokenizers::Decoder;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::strip::Strip;

use super::Tokenizer;
use super::guard::guard;

/// Turns tokens into text as they come. The pieces, put together, are what [`Tokenizer::decode`] makes of all the
/// tokens at once, whatever they are.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    steps: Vec<Step<'a>>,
}

/// One step of a decoder, and what it holds back.
#[derive(Debug)]
enum Step<'a> {
    /// Treats each token by itself.
    Each(&'a DecoderWrapper),
    /// Treats the first token of a text in another way than the rest.
    First { decoder: &'a DecoderWrapper, begun: bool },
    /// Treats the last token of a text in another way than the rest.
    Last { decoder: &'a DecoderWrapper, held: Option<String> },
    /// Takes equal neighbours for one.
    Distinct { decoder: &'a DecoderWrapper, before: Option<String> },
    /// Tokens that stand for bytes become characters if their whole run is UTF-8, else each becomes U+FFFD: nothing
    /// of a run is known before its end.
    ByteRuns { decoder: &'a DecoderWrapper, run: Vec<String> },
    /// Tokens spell bytes; those of a character that is not complete wait, three at most.
    Bytes { waiting: Vec<u8> },
    /// There is no decoder: a space goes between tokens.
    Spaced { begun: bool },
    /// Cuts characters off both ends of the whole text.
    Ends { strip: &'a Strip, cut: usize, held: usize },
    /// Needs the whole text.
    Whole { decoder: &'a DecoderWrapper, text: String },
}

impl<'a> TextStream<'a> {
    /// `begun`: text came before.
    pub(super) fn new(tokenizer: &'a Tokenizer, begun: bool) -> Self {
        let mut steps = Vec::new();
        match tokenizer.inner.get_decoder() {
            None => steps.push(Step::Spaced { begun }),
            Some(decoder) => add(decoder, begun, &mut false, &mut steps),
        }
        Self { tokenizer, steps }
    }

    /// The next token; what can be shown now, if anything.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        // As when all is decoded at once, an id that the tokenizer does not know is passed over.
        let Some(token) = self.tokenizer.inner.id_to_token(id) else { return Ok(None) };
        self.run(vec![token], false)
    }

    /// The rest, when no token comes any more.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn flush(&mut self) -> Result<Option<String>> {
        self.run(Vec::new(), true)
    }

    fn run(&mut self, mut tokens: Vec<String>, is_end: bool) -> Result<Option<String>> {
        let text = guard(|| {
            for step in &mut self.steps {
                let mut out = Vec::new();
                for token in tokens {
                    step.push(token, &mut out)?;
                }
                if is_end {
                    step.flush(&mut out)?;
                }
                tokens = out;
            }
            Ok(tokens.concat())
        })?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

/// Adds the steps of `decoder`. Once they are `joined`, tokens are pieces of one text, cut anywhere.
fn add<'a>(decoder: &'a DecoderWrapper, begun: bool, joined: &mut bool, steps: &mut Vec<Step<'a>>) {
    use DecoderWrapper::{BPE, ByteFallback, ByteLevel, CTC, Fuse, Metaspace, Replace, Sequence, Strip, WordPiece};
    steps.push(match decoder {
        Sequence(sequence) => {
            return sequence.get_decoders().iter().for_each(|decoder| add(decoder, begun, joined, steps));
        }
        Fuse(_) => {
            *joined = true;
            return;
        }
        Strip(strip) if *joined => Step::Ends { strip, cut: if begun { 0 } else { strip.start }, held: 0 },
        _ if *joined => Step::Whole { decoder, text: String::new() },
        ByteLevel(_) => {
            *joined = true;
            Step::Bytes { waiting: Vec::new() }
        }
        Replace(_) | Strip(_) => Step::Each(decoder),
        Metaspace(_) | WordPiece(_) => Step::First { decoder, begun },
        BPE(_) => Step::Last { decoder, held: None },
        CTC(_) => Step::Distinct { decoder, before: None },
        ByteFallback(_) => Step::ByteRuns { decoder, run: Vec::new() },
    });
}

impl Step<'_> {
    /// Takes one token, and adds to `out` what is certain now.
    fn push(&mut self, token: String, out: &mut Vec<String>) -> Result<()> {
        match self {
            Self::Each(decoder) => out.extend(decode(decoder, vec![token])?),
            Self::First { decoder, begun } => {
                let before = if *begun { vec![String::new()] } else { Vec::new() };
                let skipped = before.len();
                *begun = true;
                out.extend(decode(decoder, [before, vec![token]].concat())?.into_iter().skip(skipped));
            }
            Self::Last { decoder, held } => {
                if let Some(before) = held.take() {
                    out.extend(decode(decoder, vec![before, String::new()])?);
                }
                *held = Some(token);
            }
            Self::Distinct { decoder, before } => {
                if before.as_ref() != Some(&token) {
                    out.extend(decode(decoder, vec![token.clone()])?);
                    *before = Some(token);
                }
            }
            Self::ByteRuns { decoder, run } => {
                // What stands for no byte comes out as it went in.
                let alone = decode(decoder, vec![token.clone()])?;
                if alone == [token.as_str()] {
                    out.extend(decode(decoder, std::mem::take(run))?);
                    out.push(token);
                } else {
                    run.push(token);
                }
            }
            Self::Bytes { waiting } => {
                waiting.extend(bytes(&token));
                out.push(certain(waiting));
            }
            Self::Spaced { begun } => {
                out.push(if *begun { format!(" {token}") } else { token });
                *begun = true;
            }
            Self::Ends { strip, cut, held } => out.push(ends(strip, cut, held, &token)),
            Self::Whole { text, .. } => text.push_str(&token),
        }
        Ok(())
    }

    /// Adds what was held back: no token comes any more.
    fn flush(&mut self, out: &mut Vec<String>) -> Result<()> {
        match self {
            Self::Last { decoder, held } => {
                if let Some(last) = held.take() {
                    out.extend(decode(decoder, vec![last])?);
                }
            }
            Self::ByteRuns { decoder, run } => out.extend(decode(decoder, std::mem::take(run))?),
            Self::Bytes { waiting } => out.push(String::from_utf8_lossy(&std::mem::take(waiting)).into_owned()),
            Self::Whole { decoder, text } => out.extend(decode(decoder, vec![std::mem::take(text)])?),
            // What `Ends` holds is what it cuts off.
            Self::Each(_) | Self::First { .. } | Self::Distinct { .. } | Self::Spaced { .. } | Self::Ends { .. } => {}
        }
        Ok(())
    }
}

fn decode(decoder: &DecoderWrapper, tokens: Vec<String>) -> Result<Vec<String>> {
    if tokens.is_empty() {
        return Ok(tokens);
    }
    decoder.decode_chain(tokens).map_err(|e| anyhow!("cannot decode the tokens: {e}"))
}

/// The bytes that a token of a byte-level vocabulary spells, one a character; a token with any other character
/// stands for its own text.
pub(super) fn bytes(token: &str) -> Vec<u8> {
    token.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a character stands for. Printable ones of Latin-1 stand for themselves; the others, in order, have
/// the characters from U+0100 on.
fn byte(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '¡'..='¬' | '®'..='ÿ' => u8::try_from(u32::from(c)).ok(),
        _ => (0..=b' ').chain(0x7f..=0xa0).chain([0xad]).nth((u32::from(c)).checked_sub(0x100)? as usize),
    }
}

/// The text that no later byte can change; the beginning of a character at the end stays in `waiting`.
fn certain(waiting: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in waiting.utf8_chunks() {
        text.push_str(chunk.valid());
        let invalid = chunk.invalid();
        taken += chunk.valid().len() + invalid.len();
        let is_open = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if taken == waiting.len() && is_open {
            taken -= invalid.len();
        } else if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    waiting.drain(..taken);
    text
}

/// What `piece` adds to a text whose ends are stripped: `cut` characters at its start may still go, and `held` at
/// the end of what came go unless another character follows.
fn ends(strip: &Strip, cut: &mut usize, held: &mut usize, piece: &str) -> String {
    let mut text = String::new();
    for c in piece.chars() {
        if c == strip.content && *cut > 0 {
            *cut -= 1;
            continue;
        }
        *cut = 0;
        if c == strip.content && *held < strip.stop {
            *held += 1;
            continue;
        }
        // The last `stop` of a longer run are held: of equal characters it does not matter which.
        if c != strip.content {
            text.extend(std::iter::repeat_n(strip.content, std::mem::take(held)));
        }
        text.push(c);
    }
    text
}
