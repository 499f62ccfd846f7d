//! Perplexity, and how far a quantized model strays from its source.

#[cfg(feature = "cli")]
mod picture;
mod statistics;

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use crate::dec::{CHUNK, Selection};
use crate::engine::{Engine, Session, Settings};
use crate::format::Floats;
use crate::model::{Compensation, LayerCompensation};
use crate::sampling::argmax;
use crate::tuned::KlWeights;

#[cfg(feature = "cli")]
pub use picture::{Choice, draw};
use statistics::Token;
pub use statistics::{Figure, Figures};

/// What to make of a logit that is no number: weights are finite, so something was too large on the way.
const OVERFLOW: &str = "the logits are not finite numbers, try --dtype bfloat16 or --dtype float32; if they stay so, \
                        the weights are damaged";

/// What was measured over all windows.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
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
    /// What llama-perplexity says of a model and its source, under its names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub figures: Option<Figures>,
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
/// Windows longer than a session's text, no windows, windows of different lengths or of fewer than two tokens, an id outside the vocabulary, a source of
/// another vocabulary, logits that are not finite numbers, what `done` says, or what the device says.
pub fn perplexity(
    model: &Engine<'_>,
    source: Option<&Engine<'_>>,
    windows: &[&[u32]],
    done: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    perplexity_behind(model, source, windows, 0, done)
}

/// As [`perplexity`], of the predictions behind the first `uncounted` tokens of every window alone: llama-perplexity counts
/// those of the second half.
///
/// # Errors
/// Those of [`perplexity`], and windows that end with what is not counted.
pub fn perplexity_behind(
    model: &Engine<'_>,
    source: Option<&Engine<'_>>,
    windows: &[&[u32]],
    uncounted: usize,
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    let vocab = model.config().vocab_size;
    let seq_len = check(windows, vocab)?;
    ensure!(
        uncounted + 1 < seq_len,
        "{uncounted} of {seq_len} tokens of a window are not counted, nothing is left to predict"
    );
    if let Some(theirs) = source.map(|source| source.config().vocab_size) {
        ensure!(theirs == vocab, "a source of {theirs} tokens for a model of {vocab}, give the model's own source");
    }
    let mut ours = session(model, true)?;
    let mut source = source.map(|source| session(source, true)).transpose()?;
    let mut base = (source.is_some() && model.is_compensated()).then(|| session(model, false)).transpose()?;
    let step = model.max_tokens();
    let (mut sums, mut source_sums, mut base_sums) = (Sums::default(), Sums::default(), Sums::default());
    for (w, window) in windows.iter().enumerate() {
        ours.clear();
        base.iter_mut().for_each(Session::clear);
        source.iter_mut().for_each(Session::clear);
        for first in (0..seq_len).step_by(step) {
            let tokens = &window[first..(first + step).min(seq_len)];
            // The last token of a window has nothing to predict.
            let targets = &window[first + 1..(first + step + 1).min(seq_len)];
            let from = uncounted.saturating_sub(first).min(targets.len());
            let place = || format!("window {w} of the text, tokens from {first} on");
            let logits = read(&mut ours, tokens).with_context(place)?;
            let source_logits = source.as_mut().map(|source| read(source, tokens)).transpose();
            let source_logits = source_logits.context("the source").with_context(place)?;
            if let Some(logits) = source_logits {
                source_sums.add(logits, None, targets, from, vocab);
            }
            sums.add(logits, source_logits, targets, from, vocab);
            if let Some(base) = &mut base {
                base_sums.add(read(base, tokens).with_context(place)?, None, targets, from, vocab);
            }
        }
        done(w + 1)?;
    }
    let n = sums.predictions as f64;
    let (own, theirs, alone) = (sums.nll / n, source_sums.nll / n, base_sums.nll / n);
    let compared = source.is_some();
    Ok(Evaluation {
        perplexity: own.exp(),
        predictions: sums.predictions,
        kl_divergence: compared.then_some(sums.kl / n),
        top1_agreement: compared.then_some(sums.agree / n),
        source_perplexity: compared.then_some(theirs.exp()),
        base_perplexity: base.is_some().then_some(alone.exp()),
        recovered: (base.is_some() && alone != theirs).then(|| (alone - own) / (alone - theirs)),
        figures: (sums.compared.len() > 1).then(|| Figures::of(&sums.compared)),
    })
}

/// The `k_chunk` that [`kl_weights`] compensates each projection with; more, where that is no channel of a narrow one.
const WEIGHED_K_CHUNK: usize = 8;

/// What a unit of each projection's `k_chunk` gives back of the divergence of `model` from `source`: each is compensated
/// by itself and held against none. One that makes nothing better is worth nothing. `done` hears of every window, 5 times.
///
/// # Errors
/// Those of [`perplexity`]; a model without residuals; compensation that gives nothing back, of which projection ever.
pub fn kl_weights(
    model: &Engine<'_>,
    source: &Engine<'_>,
    windows: &[&[u32]],
    selection: Selection,
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<KlWeights> {
    let before = model.compensation();
    let n_tb = LayerCompensation::by_default(model.device()).n_tb;
    let narrowest = model.config().shapes(0).map(|(inputs, _)| inputs).into_iter().min().unwrap_or(1);
    let k_chunk = WEIGHED_K_CHUNK.max(CHUNK.div_ceil(narrowest.clamp(1, CHUNK)));
    let mut divergence = |k_chunks: [usize; 4]| -> Result<(f64, usize)> {
        let by_bits = vec![LayerCompensation { n_tb, k_chunks }];
        model.compensate(Some(&Compensation { by_bits, selection }))?;
        let read = perplexity(model, Some(source), windows, &mut done)?;
        Ok((read.kl_divergence.context("a source was given")?, read.predictions))
    };
    let (uncompensated, tokens) = divergence([0; 4])?;
    let mut per_k_chunk = [0.0; 4];
    for (i, worth) in per_k_chunk.iter_mut().enumerate() {
        let mut k_chunks = [0; 4];
        k_chunks[i] = k_chunk;
        *worth = ((uncompensated - divergence(k_chunks)?.0) / k_chunk as f64).max(0.0);
    }
    model.compensate(before.as_ref())?;
    ensure!(
        per_k_chunk != [0.0; 4],
        "compensating {k_chunk} of 1024 channels of any projection gives back nothing of the divergence {uncompensated:.5}: \
         read more windows"
    );
    Ok(KlWeights { format: KlWeights::FORMAT, per_k_chunk, k_chunk, uncompensated, tokens })
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

/// A session that reads windows, every token of them compensated if `compensated`.
fn session<'e, 'd>(engine: &'e Engine<'d>, compensated: bool) -> Result<Session<'e, 'd>> {
    Ok(engine.session(Settings { compensate_prompt: compensated, ..Settings::default() })?)
}

/// The logits of what follows each of `tokens`.
fn read<'s>(session: &'s mut Session<'_, '_>, tokens: &[u32]) -> Result<&'s [f32]> {
    let logits = session.read(tokens)?;
    // A sum with one of them would be no number either, and say nothing of the model.
    Floats::F32(Cow::Borrowed(logits)).ensure_finite("logit").context(OVERFLOW)?;
    Ok(logits)
}

#[derive(Default)]
struct Sums {
    predictions: usize,
    nll: f64,
    kl: f64,
    agree: f64,
    /// Every token, where there is a source.
    compared: Vec<Token>,
}

impl Sums {
    /// Adds the predictions of `targets` behind the first `from` of them.
    fn add(&mut self, logits: &[f32], source: Option<&[f32]>, targets: &[u32], from: usize, vocab: usize) {
        let of_one = |(i, &target): (usize, &u32)| {
            let row = &logits[i * vocab..(i + 1) * vocab];
            let log_sum = log_sum_exp(row);
            let nll = log_sum - f64::from(row[target as usize]);
            let Some(source) = source else { return Token { nll, source_nll: 0.0, kld: 0.0, same_top: false } };
            let theirs = &source[i * vocab..(i + 1) * vocab];
            let their_log_sum = log_sum_exp(theirs);
            let terms = theirs.iter().zip(row).map(|(&p, &q)| {
                let log_p = f64::from(p) - their_log_sum;
                log_p.exp() * (log_p - (f64::from(q) - log_sum))
            });
            let source_nll = their_log_sum - f64::from(theirs[target as usize]);
            Token { nll, source_nll, kld: terms.sum(), same_top: argmax(row) == argmax(theirs) }
        };
        // Collected before they are added: the sum must not depend on the number of threads.
        let each: Vec<Token> = targets.par_iter().enumerate().skip(from).map(of_one).collect();
        for token in &each {
            self.nll += token.nll;
            self.kl += token.kld;
            self.agree += f64::from(u8::from(token.same_top));
        }
        self.predictions += each.len();
        if source.is_some() {
            self.compared.extend(each);
        }
    }
}

/// `ln Σ exp(row)`
fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln()
}
