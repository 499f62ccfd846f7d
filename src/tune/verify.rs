//! Whether the promise holds: real tokens at the chosen values, and another search where it does not.
//!
//! The search adds up the four projections of a layer. A token has more: attention, norms, the head, which
//! compensation does not slow down, and sums that a compensated layer passes on, which it does. Only whole tokens
//! say what comes of it.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::report::per_cent;
use super::search::{Choice, Timings};
use super::{Outcome, Tuning};
use crate::backend::record::median;
use crate::dec::Selection;
use crate::engine::{Engine, Session, Settings};
use crate::model::{Compensation, LayerCompensation};

/// Tokens that are not counted: the first ones compile, allocate and record.
const WARM: usize = 12;

/// Searches before compensation is given up for a target.
const SEARCHES: usize = 8;

/// How tokens are measured.
#[derive(Debug, Clone, Copy)]
pub struct Verification {
    /// Tokens counted in each text.
    pub tokens: usize,
    /// Texts without and with compensation in turn, so that a drifting clock moves both.
    pub rounds: usize,
    /// How channels are selected.
    pub selection: Selection,
}

/// What real tokens took.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// Real slowdown of a token (if all its layers are compensated alike), per cent; at most the target. 0 where nothing is compensated in the end.
    pub slowdown: f64,
    /// A token without compensation, ms.
    pub base_ms: f64,
    /// A token at the chosen values in all its layers, ms.
    pub tuned_ms: f64,
    /// What came of choices that were too slow, before this one: `k_chunk` of the four modules, real slowdown.
    pub missed: Vec<([usize; 4], f64)>,
}

impl Verification {
    /// Tokens of a text that are not counted: its prompt, and those before it has got under way.
    pub const OVERHEAD: usize = 1 + WARM;

    /// The longest text that is made.
    pub fn max_seq_len(&self) -> usize {
        Self::OVERHEAD + self.tokens
    }
}

/// Measures whole tokens of `engine` at every target's values; where they are slower than the target, searches
/// again with a target that is lower by as much, until one holds.
///
/// Of a model with two bit widths, the layers of the profile's width are compensated and the others not. What that adds
/// to a token is held against these layers' share of the weights: where both widths keep their target, a token does
/// whose layers are all compensated.
///
/// # Errors
/// No tokens or rounds, another device or model than the one profiled, what the device says.
pub fn verify(outcome: &mut Outcome, engine: &Engine<'_>, how: &Verification) -> Result<()> {
    ensure!(how.tokens > 0 && how.rounds > 0, "0 tokens or rounds were to be measured, at least 1 is needed");
    let (widths, bits) = (engine.bit_widths(), outcome.identity.bits);
    ensure!(!widths.is_empty(), "a full-precision model has nothing to compensate");
    ensure!(
        widths.contains(&bits),
        "the profile is of {bits}-bit layers, the model has {}-bit ones: give the --bitwidth of one of these",
        widths.iter().map(u32::to_string).collect::<Vec<_>>().join("- and ")
    );
    let share = share(engine.layer_bits().into_iter(), bits);
    for tuning in &outcome.tunings {
        outcome.tuned(tuning).check(engine.device(), outcome.shapes, bits)?;
    }
    ensure!(
        how.max_seq_len() <= engine.max_seq_len(),
        "{} tokens are to be made, a session's context is {}",
        how.max_seq_len(),
        engine.max_seq_len()
    );
    let (max_new_tokens, ignore_eos) = (WARM + how.tokens, true);
    let mut session = engine.session(Settings { max_new_tokens, ignore_eos, ..Settings::default() })?;
    let timings = &outcome.timings;
    // Targets near each other arrive at the same values.
    let mut measured: Vec<(Choice, (f64, f64))> = Vec::new();
    let mut measure = |choice: &Choice| {
        if let Some((_, times)) = measured.iter().find(|(before, _)| before == choice) {
            return Ok(*times);
        }
        let own = LayerCompensation { n_tb: choice.n_tb, k_chunks: choice.k_chunks() };
        let none = LayerCompensation { k_chunks: [0; 4], ..own };
        let by_bits = widths.iter().map(|&width| if width == bits { own } else { none }).collect();
        let compensation = (choice.sum_k() > 0).then_some(Compensation { by_bits, selection: how.selection });
        let (base, tuned) = measure(engine, &mut session, how, compensation.as_ref())?;
        let times = (base, base + (tuned - base) / share);
        measured.push((choice.clone(), times));
        Ok(times)
    };
    outcome.tunings.iter_mut().try_for_each(|tuning| hold(timings, tuning, &mut measure))
}

/// The share of layers of `bits` in what a token reads of all layers' weights.
fn share(layers: impl Iterator<Item = Option<u32>>, bits: u32) -> f64 {
    let (own, all) =
        layers.flatten().fold((0, 0), |(own, all), width| (own + if width == bits { width } else { 0 }, all + width));
    f64::from(own) / f64::from(all)
}

/// Searches until `measure` (milliseconds of a token without and with compensation) says that `tuning` holds.
///
/// # Errors
/// What `measure` says.
pub fn hold(
    timings: &Timings,
    tuning: &mut Tuning,
    measure: &mut dyn FnMut(&Choice) -> Result<(f64, f64)>,
) -> Result<()> {
    let base = timings.base_us();
    let mut missed = Vec::new();
    loop {
        let choice = tuning.found.fine.clone();
        let (base_ms, tuned_ms) = measure(&choice)?;
        let slowdown = if choice.sum_k() == 0 { 0.0 } else { (tuned_ms / base_ms - 1.0) * 100.0 };
        let expected = (choice.us() / base - 1.0) * 100.0;
        tracing::info!(
            "target {} %: n_tb {}, k_chunk {:?}: layer {expected:.2} %, token {slowdown:.2} % ({base_ms:.4} to {tuned_ms:.4} ms)",
            per_cent(tuning.target),
            choice.n_tb,
            choice.k_chunks(),
        );
        if slowdown <= tuning.target {
            tuning.verified = Some(Verified { slowdown, base_ms, tuned_ms, missed });
            return Ok(());
        }
        missed.push((choice.k_chunks(), slowdown));
        // As much less as was too much, and a little more, so that the same choice does not fit again.
        let less = expected.min(tuning.target) * (tuning.target / slowdown) - 0.02;
        let budget = base * (1.0 + less / 100.0);
        let next = timings.search(budget);
        let same = next.fine.k_chunks() == choice.k_chunks() && next.fine.n_tb == choice.n_tb;
        // Below the base nothing fits: a search there compensates nothing.
        let budget = if same || less < 0.0 || missed.len() >= SEARCHES { 0.0 } else { budget };
        tuning.found = timings.search(budget);
        tuning.exhaustive = tuning.exhaustive.is_some().then(|| timings.exhaustive(budget));
    }
}

/// Milliseconds of a token without and with compensation, if there is one: medians over the rounds.
fn measure(
    engine: &Engine<'_>,
    session: &mut Session<'_, '_>,
    how: &Verification,
    compensation: Option<&Compensation>,
) -> Result<(f64, f64)> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..how.rounds {
        for (times, own) in times.iter_mut().zip([Some(None), compensation.map(Some)]) {
            if let Some(own) = own {
                engine.compensate(own)?;
                times.push(token_ms(engine, session, how.tokens)?);
            }
        }
    }
    let [base, tuned] = &mut times;
    if tuned.is_empty() {
        tuned.clone_from(base);
    }
    Ok((median(base), median(tuned)))
}

/// The mean time of `tokens` tokens of a text, after it has got under way.
fn token_ms(engine: &Engine<'_>, session: &mut Session<'_, '_>, tokens: usize) -> Result<f64> {
    session.clear();
    session.prompt(&[engine.config().bos_token_id.unwrap_or(0)])?;
    let mut arrived = Vec::with_capacity(WARM + tokens);
    while session.next()?.is_some() {
        arrived.push(Instant::now());
    }
    ensure!(arrived.len() == WARM + tokens, "the text ended after {} of {} tokens", arrived.len(), WARM + tokens);
    Ok((arrived[WARM + tokens - 1] - arrived[WARM - 1]).as_secs_f64() * 1e3 / tokens as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_share_a_token_by_what_is_read_of_them() {
        let of = |widths: &[u32], bits| share(widths.iter().map(|&width| Some(width)), bits);
        assert_eq!(of(&[3, 3], 3), 1.0);
        assert_eq!((of(&[3, 4, 3, 4], 3), of(&[3, 4, 3, 4], 4)), (6.0 / 14.0, 8.0 / 14.0));
        assert_eq!(of(&[4, 3, 3, 3], 3) + of(&[4, 3, 3, 3], 4), 1.0);
    }
}
