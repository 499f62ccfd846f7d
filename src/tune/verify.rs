//! Whether the promise holds: real tokens at the chosen values, and another search where it does not.
//!
//! Where single products were measured, the search adds up the four projections of a layer. A token has more: attention,
//! norms, the head, which compensation does not slow down, and sums that a compensated layer passes on, which it does.
//! Where whole tokens were, it adds up what each projection costs by itself. Only tokens as they are made say what comes
//! of it; where they are quicker than expected, more is tried as well.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::report::per_cent;
use super::search::{Choice, Timings};
use super::{Outcome, Tuning};
use crate::backend::record::median;
use crate::dec::Selection;
use crate::engine::{Engine, Session, Settings};
use crate::model::{Compensation, LayerCompensation, share};

/// Tokens that are not counted: the first ones compile, allocate and record.
const WARM: usize = 12;

/// Searches before compensation is given up for a target.
const SEARCHES: usize = 8;

/// Choices that are measured for a target at most, where what was measured decides what is looked at next.
const TRIED: usize = 12;

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
    let weights = outcome.objective.weights(timings);
    // Targets near each other arrive at the same values.
    let mut measured: Vec<(Choice, (f64, f64))> = Vec::new();
    let mut measure = |choice: &Choice, again: bool| {
        let before = measured.iter().find(|(before, _)| before.is_same(choice));
        if let Some((_, times)) = before.filter(|_| !again) {
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
    match weights {
        Some(weights) => {
            outcome.tunings.iter_mut().try_for_each(|tuning| settle(timings, weights, tuning, &mut measure))?;
            let slowdown = |(base, tuned): (f64, f64)| (tuned / base - 1.0) * 100.0;
            for tuning in &mut outcome.tunings {
                let (target, worth) = (tuning.target, tuning.found.fine.worth(weights));
                // What was tried for another target, and held for this one each time that it was measured.
                let holds = |choice: &Choice| {
                    measured
                        .iter()
                        .filter(|(same, _)| same.is_same(choice))
                        .all(|(_, times)| slowdown(*times) <= target)
                };
                let others = measured.iter().filter(|(choice, _)| choice.worth(weights) > worth && holds(choice));
                let best = others.max_by(|a, b| a.0.worth(weights).total_cmp(&b.0.worth(weights)));
                if let (Some((choice, times)), Some(verified)) = (best, &mut tuning.verified) {
                    tuning.found.fine = choice.clone();
                    (verified.base_ms, verified.tuned_ms) = *times;
                    verified.slowdown = slowdown(*times);
                    verified.missed.retain(|(k_chunks, _)| *k_chunks != choice.k_chunks());
                }
            }
            Ok(())
        }
        None => outcome
            .tunings
            .iter_mut()
            .try_for_each(|tuning| search_until_within(timings, tuning, &mut |choice| measure(choice, false))),
    }
}

/// A budget that a choice of this time does not fit, in whatever order its parts are added up.
fn below(us: f64) -> f64 {
    us * (1.0 - 1e-9)
}

/// What was measured of a choice.
struct Tried {
    choice: Choice,
    times: (f64, f64),
    slowdown: f64,
}

impl Tried {
    fn of(choice: Choice, times: (f64, f64)) -> Self {
        let slowdown = if choice.sum_k() == 0 { 0.0 } else { (times.1 / times.0 - 1.0) * 100.0 };
        Self { choice, times, slowdown }
    }
}

/// Milliseconds of a token without and with a choice's compensation; anew, if the second argument says so.
pub type Measure<'a> = dyn FnMut(&Choice, bool) -> Result<(f64, f64)> + 'a;

/// Looks for the choice that is worth most by `weights` among those whose tokens really are at most `tuning.target`
/// slower, `measure` (milliseconds of a token without and with compensation; anew, if the second argument says so) being
/// asked of 12 choices at most. How far expectations at an `n_tb` were off corrects the next ones, up as well as down.
/// What is kept was measured twice.
///
/// # Errors
/// What `measure` says.
pub fn settle(timings: &Timings, weights: [f64; 4], tuning: &mut Tuning, measure: &mut Measure<'_>) -> Result<()> {
    let (base, target) = (timings.base_us(), tuning.target);
    let expected = |choice: &Choice| (choice.us() / base - 1.0) * 100.0;
    let mut tried: Vec<Tried> = Vec::new();
    // Budgets below what was found and failed, so that it is not found again.
    let mut closed: BTreeMap<usize, f64> = BTreeMap::new();
    let mut best: Option<usize> = None;
    while tried.len() < TRIED {
        let budget = |n_tb: usize| {
            let off = correction(&tried, target, n_tb, &expected);
            (base * (1.0 + (target - off) / 100.0)).min(closed.get(&n_tb).copied().unwrap_or(f64::INFINITY))
        };
        let found = timings.search_weighted(&budget, weights);
        let choice = found.fine.clone();
        let worth = |i: usize| tried[i].choice.worth(weights);
        if choice.sum_k() == 0 || best.is_some_and(|best| choice.worth(weights) <= worth(best)) {
            break;
        }
        if tried.iter().any(|tried| tried.choice.is_same(&choice)) {
            closed.insert(choice.n_tb, below(choice.us()));
            continue;
        }
        let mut now = Tried::of(choice.clone(), measure(&choice, false)?);
        if now.slowdown <= target {
            // A promise is not made on one measurement.
            let again = Tried::of(choice.clone(), measure(&choice, true)?);
            if again.slowdown > now.slowdown {
                now = again;
            }
        }
        let (base_ms, tuned_ms) = now.times;
        tracing::info!(
            "target {} %: n_tb {}, k_chunk {:?}: expected {:.2} %, token {:.2} % ({base_ms:.4} to {tuned_ms:.4} ms)",
            per_cent(target),
            choice.n_tb,
            choice.k_chunks(),
            expected(&choice),
            now.slowdown
        );
        if now.slowdown <= target {
            best = Some(tried.len());
            tuning.found = found;
        }
        tried.push(now);
    }
    if best.is_none() {
        tuning.found = timings.search_weighted(&|_| 0.0, weights);
        let none = &tuning.found.fine;
        tried.push(Tried::of(none.clone(), measure(none, false)?));
    }
    let kept = best.unwrap_or(tried.len() - 1);
    let missed = tried.iter().filter(|tried| tried.slowdown > target);
    tuning.verified = Some(Verified {
        slowdown: tried[kept].slowdown,
        base_ms: tried[kept].times.0,
        tuned_ms: tried[kept].times.1,
        missed: missed.map(|tried| (tried.choice.k_chunks(), tried.slowdown)).collect(),
    });
    Ok(())
}

/// By how many per cent more than expected tokens at an `n_tb` are slower, as far as the choices tried say: the latest
/// one; between the latest that held and the latest that did not, their middle. Where none was tried, what others say.
fn correction(tried: &[Tried], target: f64, n_tb: usize, expected: &dyn Fn(&Choice) -> f64) -> f64 {
    let here = || tried.iter().rev().filter(|tried| tried.choice.n_tb == n_tb);
    let off = |tried: &Tried| tried.slowdown - expected(&tried.choice);
    let held = here().find(|tried| tried.slowdown <= target).map(off);
    let failed = here().find(|tried| tried.slowdown > target).map(off);
    match (held, failed) {
        (Some(held), Some(failed)) => (held + failed) / 2.0,
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) if tried.is_empty() => 0.0,
        (None, None) => tried.iter().map(off).sum::<f64>() / tried.len() as f64,
    }
}

/// Searches until `measure` (milliseconds of a token without and with compensation) says that `tuning` holds.
///
/// # Errors
/// What `measure` says.
pub fn search_until_within(
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
