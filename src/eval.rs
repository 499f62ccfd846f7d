//! Perplexity, and how far a quantized model strays from its source.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use crate::backend::DecodeBackend;
use crate::format::Floats;
use crate::model::{Model, State};
use crate::sampling::{Sampling, argmax};

/// What to make of a logit that is no number: weights are finite, so something was too large on the way.
const OVERFLOW: &str = "the logits are not finite numbers, try --dtype bfloat16 or --dtype float32; if they stay so, \
                        the weights are damaged";

/// What was measured over all windows.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// `exp` of the mean negative log likelihood of a token.
    pub perplexity: f64,
    /// Tokens predicted.
    pub predictions: usize,
    /// Mean Kullback-Leibler divergence of the source's next-token distribution from this one, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_divergence: Option<f64>,
    /// Share of tokens where both find the same token most likely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Perplexity of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_perplexity: Option<f64>,
    /// Perplexity of the same model without compensation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_perplexity: Option<f64>,
    /// Share of the log-perplexity lost to quantization that compensation gives back: 1 where it is as good as the
    /// source, below 0 where it is worse than none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovered: Option<f64>,
}

/// Windows of `seq_len` tokens: `tokens[w · seq_len ..][.. seq_len]` for every `w` of `windows`.
///
/// # Errors
/// Windows of fewer than two tokens, none at all, or the text is too short; the message says how many it has.
pub fn windows(tokens: &[u32], seq_len: usize, windows: Range<usize>) -> Result<Vec<&[u32]>> {
    ensure!(seq_len >= 2, "a window of {seq_len} tokens predicts nothing, at least 2 are needed");
    ensure!(windows.start < windows.end, "windows {}..{} are empty", windows.start, windows.end);
    let whole = tokens.len() / seq_len;
    ensure!(
        windows.end <= whole,
        "windows {}..{} are asked for, the text has {whole} of {seq_len} tokens ({} in all)",
        windows.start,
        windows.end,
        tokens.len()
    );
    Ok(windows.map(|w| &tokens[w * seq_len..(w + 1) * seq_len]).collect())
}

/// Perplexity over `windows`, each read from an empty context, every token of them compensated as the model
/// says; with a `source`, also how far the two stray, and how much of what was lost compensation gives back (for
/// which the windows are read once more without it). `done` hears of every window and may end it all.
///
/// # Errors
/// No windows, windows of different lengths or of fewer than two tokens, an id outside the vocabulary, a source of
/// another vocabulary, logits that are not finite numbers, what `done` says, or what the device says.
pub fn perplexity<B: DecodeBackend>(
    model: &Model<'_, B>,
    source: Option<&Model<'_, B>>,
    windows: &[&[u32]],
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    let vocab = model.config().vocab_size;
    let seq_len = check(windows, vocab)?;
    if let Some(theirs) = source.map(|source| source.config().vocab_size) {
        ensure!(theirs == vocab, "a source of {theirs} tokens for a model of {vocab}, give the model's own source");
    }
    let mut reader = Reader::new(model, seq_len, true)?;
    let mut source = source.map(|source| Reader::new(source, seq_len, true)).transpose()?;
    let mut base = match source.is_some() && model.is_compensated() {
        true => Some(Reader::new(model, seq_len, false)?),
        false => None,
    };
    let (mut sums, mut source_sums, mut base_sums) = (Sums::default(), Sums::default(), Sums::default());
    for (w, window) in windows.iter().enumerate() {
        for reader in [Some(&mut reader), base.as_mut()].into_iter().flatten() {
            reader.begin()?;
        }
        if let Some(source) = &mut source {
            source.begin()?;
        }
        let step = reader.state.max_tokens();
        for first in (0..seq_len).step_by(step) {
            let tokens = &window[first..(first + step).min(seq_len)];
            // The last token of a window has nothing to predict.
            let targets = &window[first + 1..(first + step + 1).min(seq_len)];
            let place = || format!("window {w} of the text, tokens from {first} on");
            let logits = reader.read(tokens).with_context(place)?;
            let source_logits = source.as_mut().map(|source| source.read(tokens)).transpose();
            let source_logits = source_logits.context("the source").with_context(place)?;
            if let Some(logits) = source_logits {
                source_sums.add(logits, None, targets, vocab);
            }
            sums.add(logits, source_logits, targets, vocab);
            if let Some(base) = &mut base {
                base_sums.add(base.read(tokens).with_context(place)?, None, targets, vocab);
            }
        }
        done(w + 1)?;
    }
    let n = sums.predictions as f64;
    let (ours, theirs, alone) = (sums.nll / n, source_sums.nll / n, base_sums.nll / n);
    let compared = source.is_some();
    Ok(Evaluation {
        perplexity: ours.exp(),
        predictions: sums.predictions,
        kl_divergence: compared.then_some(sums.kl / n),
        top1_agreement: compared.then_some(sums.agree / n),
        source_perplexity: compared.then_some(theirs.exp()),
        base_perplexity: base.is_some().then_some(alone.exp()),
        recovered: (base.is_some() && alone != theirs).then(|| (alone - ours) / (alone - theirs)),
    })
}

/// The length of all `windows`.
fn check(windows: &[&[u32]], vocab: usize) -> Result<usize> {
    let seq_len = windows.first().map_or(0, |window| window.len());
    ensure!(seq_len >= 2, "windows of {seq_len} tokens predict nothing, at least 2 are needed");
    for (w, window) in windows.iter().enumerate() {
        ensure!(window.len() == seq_len, "window {w} has {} tokens, the first has {seq_len}", window.len());
        if let Some(id) = window.iter().find(|&&id| id as usize >= vocab) {
            anyhow::bail!("window {w} has token id {id}, the vocabulary ends at {}", vocab - 1);
        }
    }
    Ok(seq_len)
}

/// A model that reads windows and hands out logits in host memory.
struct Reader<'m, 'b, B: DecodeBackend> {
    model: &'m Model<'b, B>,
    state: State<B>,
    logits: B::Vector, // [max_tokens, vocab_size]
    host: Vec<f32>,    // likewise
    compensated: bool,
}

impl<'m, 'b, B: DecodeBackend> Reader<'m, 'b, B> {
    fn new(model: &'m Model<'b, B>, seq_len: usize, compensated: bool) -> Result<Self> {
        let state = model.state(seq_len)?;
        let len = state.max_tokens() * model.config().vocab_size;
        Ok(Self { model, state, logits: model.backend().vector(len)?, host: vec![0.0; len], compensated })
    }

    fn begin(&mut self) -> Result<()> {
        self.model.begin(&mut self.state, &Sampling::GREEDY, &[])
    }

    fn read(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.model.logits(&mut self.state, tokens, self.compensated, &mut self.logits)?;
        let host = &mut self.host[..tokens.len() * self.model.config().vocab_size];
        self.model.backend().read(&self.logits, host)?;
        let logits: &[f32] = host;
        // A sum with one of them would be no number either, and say nothing of the model.
        Floats::F32(Cow::Borrowed(logits)).ensure_finite("logit").context(OVERFLOW)?;
        Ok(logits)
    }
}

#[derive(Default)]
struct Sums {
    predictions: usize,
    nll: f64,
    kl: f64,
    agree: f64,
}

impl Sums {
    fn add(&mut self, logits: &[f32], source: Option<&[f32]>, targets: &[u32], vocab: usize) {
        let of_one = |(i, &target): (usize, &u32)| {
            let row = &logits[i * vocab..(i + 1) * vocab];
            let log_sum = log_sum_exp(row);
            let nll = log_sum - f64::from(row[target as usize]);
            let Some(source) = source else { return [nll, 0.0, 0.0] };
            let theirs = &source[i * vocab..(i + 1) * vocab];
            let their_log_sum = log_sum_exp(theirs);
            let terms = theirs.iter().zip(row).map(|(&p, &q)| {
                let log_p = f64::from(p) - their_log_sum;
                log_p.exp() * (log_p - (f64::from(q) - log_sum))
            });
            let agree = if argmax(row) == argmax(theirs) { 1.0 } else { 0.0 };
            [nll, terms.sum(), agree]
        };
        // Collected before they are added: the sum must not depend on the number of threads.
        let each: Vec<[f64; 3]> = targets.par_iter().enumerate().map(of_one).collect();
        for [nll, kl, agree] in each {
            self.nll += nll;
            self.kl += kl;
            self.agree += agree;
        }
        self.predictions += targets.len();
    }
}

/// `ln Σ exp(row)`
fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln()
}
