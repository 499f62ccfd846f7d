//! Calibration text from the model itself, for those who have none: texts sampled at temperature 1, many at a time (the
//! idea is data-free calibration as in LLM-QAT, Liu et al. 2023).

use std::sync::atomic::AtomicBool;

use anyhow::{Result, ensure};

use super::calibrate::Activations;
use super::calibration::Own;
use super::compute::Compute;
use super::exponential::{exp, largest};
use super::forward::{Layer, Placed, Ropes};
use super::head::LmHead;
use super::openings::Openings;
use crate::config::{Attention, LayerConfig, ModelConfig, Projection};
use crate::progress::Progress;
use crate::sampling;
use crate::weights::ModelWeights;

/// Layers stay in memory as f32 between tokens if all of them together take no more than this.
const HELD_BYTES: usize = 4 << 30;
/// Keys and values of the texts that are written together take about so much at most.
const KEPT_BYTES: usize = 1 << 30;
/// Texts that are written together at most: products of more rows are no faster for each.
const TOGETHER: usize = 128;

/// Sampling a token takes about as long as this many do that are known before.
pub(crate) const SAMPLED_TOKEN: u64 = 2;

/// What is said of logits that no token can be drawn from.
pub(crate) const NOT_FINITE: &str = "text cannot be sampled, the model's largest logit is not a finite number: give a \
                                     calibration text, or check the model's weights";

/// The windows of `own`, `tokens` ids each, one after the other: in turns of the kinds that there are.
///
/// `progress` grows by [`SAMPLED_TOKEN`] for every token and layer.
///
/// # Errors
/// [`super::Interrupted`], a tensor that cannot be read, or logits that are not finite numbers.
pub(super) fn sample(
    on: &dyn Compute,
    weights: &dyn ModelWeights,
    openings: &Openings,
    own: Own,
    tokens: usize,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Vec<u32>> {
    let config = weights.config();
    let layers = if on.holds_layers(config) { config.layers.len() } else { 0 };
    let placed = (0..layers).map(|layer| Placed::owned(on, Layer::read(weights, layer)?));
    let placed = placed.collect::<Result<Vec<_>>>()?;
    let (embedding, head) = (weights.embedding()?, weights.head()?);
    let head = LmHead::new(weights, head.as_ref().unwrap_or(&embedding))?;
    let (head, ropes) = (on.head(&head)?, Ropes::new(config, tokens));
    // Two numbers for each token: which it is, and how a text opens.
    let draws = sampling::draws(own.seed, 2 * own.samples * tokens);
    let draw = |text: usize, step: usize| (draws[2 * (text * tokens + step)], draws[2 * (text * tokens + step) + 1]);
    let together = on.texts_at_once(config, tokens).min(own.samples);
    let mut ids = vec![0; own.samples * tokens];
    for (group, ids) in ids.chunks_mut(together * tokens).enumerate() {
        let count = ids.len() / tokens;
        let numbers = group * together..group * together + count;
        let kind = |text: usize| openings.kinds()[text % openings.kinds().len()];
        let mut texts: Vec<_> = numbers.clone().map(|text| openings.text(kind(text))).collect();
        let caches = config.layers.iter().map(|layer| on.cache(layer, count, tokens));
        let mut caches = caches.collect::<Result<Vec<_>>>()?;
        let mut said = vec![0; count];
        for step in 0..tokens {
            let each = texts.iter_mut().zip(&said).zip(numbers.clone());
            let last: Vec<u32> = each.map(|((text, &said), number)| text.next(said, draw(number, step).1)).collect();
            ids.iter_mut().skip(step).step_by(tokens).zip(&last).for_each(|(id, &last)| *id = last);
            progress.inc(SAMPLED_TOKEN * (count * config.layers.len()) as u64);
            if step + 1 == tokens {
                break;
            }
            super::ensure_running(stop)?;
            let mut h = on.put(Activations::embed(config, &embedding, &last, 1)?.h)?;
            for (i, cache) in caches.iter_mut().enumerate() {
                match placed.get(i) {
                    Some(layer) => layer.forward(on, config, &ropes, cache, count, &mut h)?,
                    None => {
                        let layer = Placed::owned(on, Layer::read(weights, i)?)?;
                        layer.forward(on, config, &ropes, cache, count, &mut h)?
                    }
                };
            }
            let draws: Vec<f32> = numbers.clone().map(|text| draw(text, step).0).collect();
            said = head.draw(&h, &draws)?;
        }
    }
    Ok(ids)
}

/// Texts of `tokens` tokens that are written together.
pub(super) fn together(config: &ModelConfig, tokens: usize) -> usize {
    let of_layer = |layer: &LayerConfig| {
        let Attention { num_kv_heads, head_dim, .. } = *layer.attention();
        2 * 4 * tokens * num_kv_heads * head_dim
    };
    let bytes: usize = config.layers.iter().map(of_layer).sum();
    (KEPT_BYTES / bytes.max(1)).clamp(1, TOGETHER)
}

/// True if all layers in f32 are small enough to stay in memory while text is made.
pub(crate) fn layers_stay(config: &ModelConfig) -> bool {
    4 * (0..config.layers.len()).map(|layer| layer_weights(config, layer)).sum::<usize>() <= HELD_BYTES
}

/// Weights in the projections of one layer.
pub(crate) fn layer_weights(config: &ModelConfig, layer: usize) -> usize {
    Projection::ALL.iter().map(|&p| config.shape(layer, p)).map(|(inputs, outputs)| inputs * outputs).sum()
}

/// The token that `draw`, uniform in `[0, 1)`, chooses from the distribution of `logits`, which are used up. As in
/// [`sampling::Sampling::choose`], but in the order of the ids: nothing is sorted.
///
/// # Errors
/// The largest logit is not a finite number.
pub(super) fn draw_from(logits: &mut [f32], draw: f32) -> Result<u32> {
    let top = largest(logits);
    ensure!(top.is_finite(), "{NOT_FINITE}");
    for l in logits.iter_mut() {
        *l = if l.is_finite() { exp(*l - top) } else { 0.0 };
    }
    let mut left = f64::from(draw) * logits.iter().map(|&p| f64::from(p)).sum::<f64>();
    let chosen = logits.iter().position(|&p| {
        left -= f64::from(p);
        left < 0.0
    });
    let last = || logits.iter().rposition(|&p| p > 0.0);
    Ok(chosen.or_else(last).unwrap_or(0) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.5f32, 0.125, 0.25, 0.125];
        let mut counts = [0; 4];
        for draw in sampling::draws(7, 8000) {
            let mut logits = probabilities.map(f32::ln);
            counts[draw_from(&mut logits, draw).unwrap() as usize] += 1;
        }
        for (count, p) in counts.into_iter().zip(probabilities) {
            // Five standard deviations of a binomial count.
            let (mean, deviation) = (8000.0 * p, (8000.0 * p * (1.0 - p)).sqrt());
            assert!((count as f32 - mean).abs() < 5.0 * deviation, "{counts:?}");
        }
    }

    #[test]
    fn only_finite_logits_are_drawn() {
        const NONE: f32 = f32::NEG_INFINITY;
        let draws = [0.0, 0.3, 0.6, 0.999_999_9];
        for (logits, legal) in [
            (vec![f32::NAN, 1.0, NONE, 1.0, f32::NAN], vec![1, 3]),
            (vec![NONE, NONE, -3e38, NONE], vec![2]),
            (vec![f32::MAX; 40], (0..40).collect()),
            (vec![5.0, f32::NAN, NONE], vec![0]),
        ] {
            let drawn = draws.map(|draw| draw_from(&mut logits.clone(), draw).unwrap());
            assert!(drawn.iter().all(|id| legal.contains(id)), "{logits:?}: {drawn:?}");
            assert!(legal.len() == 1 || drawn[0] != drawn[3], "{logits:?}: the draw does not decide");
        }
        for logits in [vec![f32::NAN; 3], vec![NONE; 40], vec![1.0, f32::INFINITY, 2.0], vec![f32::NAN, NONE]] {
            let error = draw_from(&mut logits.clone(), 0.5).unwrap_err().to_string();
            assert!(error.contains("not a finite number") && error.contains("calibration text"), "{error}");
        }
    }
}
