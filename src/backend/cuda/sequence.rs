//! Texts in the making: caches, positions and sampled tokens, all on the device.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Cuda;
use super::attention;
use super::buffer::Buffer;
use super::driver::{Arguments, Launch};
use super::host::Mapped;
use super::vector::Vector;
use crate::backend::{ensure_slot, holds_no_text};
use crate::config::{Attention, ModelConfig};
use crate::sampling::{self, NO_TOKEN, Sampling};

/// What the host finds where no token has been written yet.
const NONE: u32 = u32::MAX;

/// Tokens whose weights `sample.cu` adds up in 64 bits: 2^44 each.
const MOST_VOCABULARY: usize = 1 << 19;

/// How often a wait for a token asks the driver.
const CHECK: Duration = Duration::from_millis(1);

/// How long a token may take, and how much longer a pass for each of its tokens: generic kernels take one after the other.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_PER_TOKEN: Duration = Duration::from_millis(250);

/// Blocks that look for the largest logit.
const SAMPLE_BLOCKS: usize = 64;

/// Slots for texts.
pub struct Cache {
    max_seq_len: usize,
    config: ModelConfig,
    slots: Vec<Option<Sequence>>,
}

impl Cache {
    pub(super) fn new(config: &ModelConfig, slots: usize, max_seq_len: usize) -> Result<Self> {
        ensure!(max_seq_len > 0, "a sequence of 0 tokens, at least 1 is expected");
        attention::check(config)?;
        ensure!(
            config.vocab_size < MOST_VOCABULARY,
            "cuda: a vocabulary of {} tokens, fewer than {MOST_VOCABULARY} are supported, use --device cpu",
            config.vocab_size
        );
        Ok(Self { max_seq_len, config: config.clone(), slots: (0..slots).map(|_| None).collect() })
    }

    pub(super) fn begin(&mut self, cuda: &Cuda, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        ensure_slot(slot, self.slots.len())?;
        if self.slots[slot].is_none() {
            self.slots[slot] = Some(Sequence::new(cuda, &self.config, self.max_seq_len)?);
        }
        self.text(slot)?.begin(cuda, sampling, draws)
    }

    /// The text in a slot.
    pub(super) fn text(&self, slot: usize) -> Result<&Sequence> {
        self.slots.get(slot).and_then(Option::as_ref).with_context(|| holds_no_text(slot))
    }

    /// The attention of a layer.
    pub(super) fn attention(&self, layer: usize) -> &Attention {
        self.config.layers[layer].attention()
    }
}

/// One text: its key-value cache, its length, its sampled tokens.
pub(super) struct Sequence {
    pub(super) max_seq_len: usize,
    vocab_size: usize,
    pub(super) cache: attention::Cache,
    pub(super) state: Buffer,
    rules: Buffer,
    draws: Buffer,  // f32 [max_seq_len + 1]
    best: Buffer,   // u64 [SAMPLE_BLOCKS], then the ticket
    list: Buffer,   // (u64, u64) [vocab_size]
    tokens: Mapped, // u32 [max_seq_len + 1], then how far prompts are
    begun: Cell<bool>,
    /// The most tokens that were queued at once.
    longest_pass: Cell<usize>,
}

impl Sequence {
    pub(super) fn new(cuda: &Cuda, config: &ModelConfig, max_seq_len: usize) -> Result<Self> {
        let driver = &cuda.driver;
        let tokens = Mapped::new(driver, (max_seq_len + 2) * 4)?;
        Ok(Self {
            max_seq_len,
            vocab_size: config.vocab_size,
            cache: attention::Cache::new(cuda, config, max_seq_len)?,
            state: Buffer::new(driver, 16)?,
            rules: Buffer::new(driver, 16)?,
            draws: Buffer::new(driver, (max_seq_len + 1) * 4)?,
            best: Buffer::new(driver, (SAMPLE_BLOCKS + 1) * 8)?,
            list: Buffer::new(driver, config.vocab_size * 16)?,
            tokens,
            begun: Cell::new(false),
            longest_pass: Cell::new(1),
        })
    }

    pub(super) fn begin(&self, cuda: &Cuda, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        // Nothing may still write tokens of the text before.
        cuda.driver.wait()?;
        self.state.write(0, &[0, 0, NO_TOKEN])?;
        self.cache.begin()?;
        self.best.clear()?;
        let rules = [
            sampling.temperature.to_bits(),
            u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
            sampling.top_p.to_bits(),
            sampling.min_p.to_bits(),
        ];
        self.rules.write(0, &rules)?;
        self.draws.clear()?;
        self.draws.write(0, &draws[..draws.len().min(self.max_seq_len + 1)])?;
        self.tokens.write(&vec![NONE; self.max_seq_len + 1]);
        self.begun.set(true);
        Ok(())
    }

    /// Cuts the text to its first tokens and choices, of which nothing more is queued when all have been read.
    pub(super) fn cut(&self, cuda: &Cuda, tokens: usize, sampled: usize) -> Result<()> {
        cuda.driver.wait()?;
        let last = sampled.checked_sub(1).map_or(NO_TOKEN, |i| self.word(i).load(Ordering::Acquire));
        for i in sampled..=self.max_seq_len {
            self.word(i).store(NONE, Ordering::Release);
        }
        self.state.write(0, &[tokens as u32, sampled as u32, last])
    }

    pub(super) fn advance(&self, cuda: &Cuda, tokens: usize) -> Result<()> {
        self.longest_pass.set(self.longest_pass.get().max(tokens));
        // A single token is progress itself.
        let progress = if tokens > 1 { self.tokens.pointer() + 4 * (self.max_seq_len as u64 + 1) } else { 0 };
        let (state, tokens) = (self.state.pointer(), tokens as u32);
        cuda.driver.launch(
            &cuda.kernel("rows.cu", "advance", &[])?,
            Launch::new(1, 32),
            &mut Arguments::new().with(&state).with(&tokens).with(&progress),
        )
    }

    /// Chooses a token from row `row` of `logits`.
    pub(super) fn sample(&self, cuda: &Cuda, logits: &Vector, row: usize) -> Result<()> {
        let at = logits.at() + (row * self.vocab_size * 4) as u64;
        let (delta, vocab) = (logits.delta(), self.vocab_size as u32);
        let (rules, draws, state) = (self.rules.pointer(), self.draws.pointer(), self.state.pointer());
        let (best, list, tokens) = (self.best.pointer(), self.list.pointer(), self.tokens.pointer());
        let (ticket, most) = (best + (SAMPLE_BLOCKS * 8) as u64, self.max_seq_len as u32 + 1);
        cuda.driver.launch(
            &cuda.kernel("sample.cu", "sample", &[format!("NO_TOKEN={NO_TOKEN}")])?,
            Launch::new(SAMPLE_BLOCKS, 512),
            &mut Arguments::new()
                .with(&at)
                .with(&delta)
                .with(&vocab)
                .with(&rules)
                .with(&draws)
                .with(&state)
                .with(&best)
                .with(&ticket)
                .with(&list)
                .with(&tokens)
                .with(&most),
        )
    }

    pub(super) fn sampled(&self, cuda: &Cuda, i: usize) -> Result<u32> {
        ensure!(i <= self.max_seq_len, "token {i} of a sequence of at most {}", self.max_seq_len);
        ensure!(self.begun.get(), "a token of a sequence that has not begun");
        let (word, progress) = (self.word(i), self.word(self.max_seq_len + 1));
        let most = PATIENCE + PATIENCE_PER_TOKEN * self.longest_pass.get() as u32;
        let mut waiting = cuda.driver.waiting(most);
        let mut done = progress.load(Ordering::Relaxed);
        let mut next_check = Instant::now() + CHECK;
        loop {
            let token = word.load(Ordering::Acquire);
            if token != NONE {
                cuda.tell_if_beyond();
                return sampling::token(i, token);
            }
            if Instant::now() > next_check {
                // A failed kernel would leave the word as it is for ever; so would one that was never queued.
                if cuda.driver.idle()? && word.load(Ordering::Acquire) == NONE {
                    bail!("token {i} was read before it was sampled");
                }
                let now = progress.load(Ordering::Relaxed);
                if now != done {
                    done = now;
                    waiting.restart();
                }
                next_check = Instant::now() + CHECK;
            }
            cuda.driver.pause(&waiting)?;
        }
    }

    /// A word that the device writes.
    fn word(&self, i: usize) -> &AtomicU32 {
        assert!(i <= self.max_seq_len + 1, "word {i} of {}", self.max_seq_len + 2);
        // SAFETY: the word is in this allocation and aligned; the device writes it whole, tokens with release order.
        unsafe { &*self.tokens.host().cast::<AtomicU32>().add(i) }
    }
}
