//! A model that says what it is told to: one token a byte, so that every text comes in as many parts as it has bytes.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use decdec::config::ModelConfig;
use decdec::engine::{Engine, Options, Result};
use decdec::model::LayerCompensation;
use decdec::sampling::Sampling;
use decdec::serve::{Choose, Chosen, Reading, Texts};
use decdec::tokenizer::{TextFiles, Tokenizer};
use serde_json::{Map, json};

/// Tokens that are no text, behind the 256 bytes.
pub(crate) const SPECIALS: [&str; 6] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "<|tool_call|>"];

/// Ids of the vocabulary.
pub(crate) const VOCAB: usize = 256 + SPECIALS.len();

/// Turns between marks, as ChatML has them.
pub(crate) const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
                                   <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The character that a byte-level vocabulary spells a byte with.
fn spelled(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => char::from_u32(256 + (0..byte).filter(|&b| !printable(b)).count() as u32).expect("a character"),
    }
}

/// A vocabulary of single bytes; BOS before each text.
pub(crate) fn texts(template: &str) -> TextFiles {
    let vocab: Map<_, _> = (0..=255u8).map(|byte| (spelled(byte).to_string(), json!(byte))).collect();
    let added = SPECIALS.iter().enumerate().map(|(i, token)| {
        json!({ "id": 256 + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    });
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [256], "tokens": ["<s>"] } } },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [] },
    });
    TextFiles {
        tokenizer_json: json.to_string().into_bytes(),
        chat_template: Some(template.to_owned()),
        special_tokens: [("bos_token", "<s>"), ("eos_token", "</s>")]
            .map(|(name, token)| (name.to_owned(), Some(token.to_owned())))
            .into(),
        eos_token_ids: vec![259],
    }
}

/// A small model's shapes with this vocabulary.
pub(crate) fn config() -> ModelConfig {
    ModelConfig::from_json(&json!({
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "sliding_window": null, "max_position_embeddings": 1024,
        "tie_word_embeddings": false, "bos_token_id": 256, "eos_token_id": 257,
    }))
    .expect("a small configuration")
}

pub(crate) fn tokenizer(template: &str) -> Tokenizer {
    Tokenizer::new(&texts(template), &config()).expect("a tokenizer")
}

/// What a script has been asked for.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Slot and tokens of each reading, step by step.
    pub(crate) steps: Vec<Vec<(usize, usize)>>,
    pub(crate) compensation: Vec<LayerCompensation>,
}

/// A model that says what stands between `[[` and `]]` in its prompt, and then ends; without that, `a` for ever.
///
/// `FAIL` in a prompt is an error, `PANIC` a panic; with `RANDOM` every token is as likely as the text before says.
pub(crate) struct Script {
    tokenizer: Arc<Tokenizer>,
    slots: Vec<Vec<u32>>,
    rules: Vec<(Sampling, Vec<f32>)>,
    room: usize,
    delay: Duration,
    seen: Arc<Mutex<Seen>>,
}

impl Script {
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        slots: usize,
        room: usize,
        delay: Duration,
    ) -> (Self, Arc<Mutex<Seen>>) {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let rules = vec![(Sampling::GREEDY, Vec::new()); slots];
        (Self { tokenizer, slots: vec![Vec::new(); slots], rules, room, delay, seen: Arc::clone(&seen) }, seen)
    }

    fn logits(&self, text: &[u32]) -> Vec<f32> {
        let said = self.tokenizer.decode(text).expect("text");
        let mut logits = vec![0.0; VOCAB];
        if said.contains("RANDOM") {
            let mut state = text.iter().fold(7u64, |h, &id| (h ^ u64::from(id)).wrapping_mul(0x100_0000_01b3));
            for logit in &mut logits[97..123] {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *logit = 20.0 + (state >> 40) as f32 / (1u32 << 22) as f32;
            }
            return logits;
        }
        let next = match (said.find("[["), said.rfind("]]")) {
            (Some(from), Some(to)) => {
                let answer = self.tokenizer.encode_chat(&said[from + 2..to]).expect("ids");
                let marks = self.tokenizer.encode_chat(&said[to..to + 2]).expect("ids");
                let end = text.windows(2).rposition(|pair| pair == marks).expect("it is there");
                // What the template writes behind a message is no answer.
                let prompt = text.iter().rposition(|&id| id == 258).map_or(end + 2, |at| at + 11);
                answer.get(text.len().saturating_sub(prompt)).copied().unwrap_or(257)
            }
            _ => u32::from(b'a'),
        };
        logits[next as usize] = 20.0;
        logits
    }
}

impl Texts for Script {
    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn max_seq_len(&self) -> usize {
        self.room
    }

    fn max_tokens(&self) -> usize {
        16
    }

    fn begin(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<usize> {
        self.slots[slot].truncate(kept);
        // What is drawn first is taken from the end.
        self.rules[slot] = (*sampling, draws.iter().rev().copied().collect());
        Ok(self.slots[slot].len())
    }

    fn step(&mut self, readings: &[Reading<'_>]) -> Result<Vec<Result<Chosen>>> {
        std::thread::sleep(self.delay);
        let step = readings.iter().map(|reading| (reading.slot, reading.tokens.len())).collect();
        self.seen.lock().expect("no panic").steps.push(step);
        let mut results = Vec::new();
        for reading in readings {
            assert!((1..=16).contains(&reading.tokens.len()), "{} tokens", reading.tokens.len());
            let before = self.slots[reading.slot].len();
            self.slots[reading.slot].extend(reading.tokens);
            let text = self.slots[reading.slot].clone();
            assert!(text.len() <= self.room, "the context is full");
            let said = self.tokenizer.decode(&text).expect("text");
            assert!(!said.contains("PANIC"), "as the prompt says");
            results.push(match reading.choose {
                _ if said.contains("FAIL") => Err(failure()),
                Choose::Nothing => Ok(Chosen::Nothing),
                Choose::Token => {
                    let (sampling, draws) = &mut self.rules[reading.slot];
                    let (sampling, draw) = (*sampling, draws.pop().unwrap_or(0.0));
                    Ok(Chosen::Token(sampling.choose(&self.logits(&text), draw).expect("a token")))
                }
                Choose::Logits => Ok(Chosen::Logits(self.logits(&text))),
                Choose::AllLogits => {
                    Ok(Chosen::Logits((before..text.len()).flat_map(|i| self.logits(&text[..=i])).collect()))
                }
            });
        }
        Ok(results)
    }

    fn is_compensated(&self) -> bool {
        true
    }

    fn fetched(&self) -> usize {
        100
    }

    fn compensation(&self) -> Vec<LayerCompensation> {
        self.seen.lock().expect("no panic").compensation.clone()
    }

    fn compensate(&mut self, sets: &[LayerCompensation]) -> Result<()> {
        if sets.iter().any(|set| set.n_tb > 8) {
            return Err(failure());
        }
        self.seen.lock().expect("no panic").compensation = sets.to_vec();
        Ok(())
    }
}

/// An error as engines make them.
fn failure() -> decdec::engine::Error {
    let device = decdec::device::Device::open("cpu").expect("a CPU");
    let error = Engine::open(&device, "/nowhere".as_ref(), &Options::default()).err();
    error.expect("there is nothing")
}
