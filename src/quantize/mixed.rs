//! Which layers get more bits: those whose raising brings the model nearest to full precision (DecDEC, Park et al.
//! 2025, §6 chooses by KL divergence too).
//!
//! Every layer is raised alone, all others staying at the lower width, and the divergence of the predictions from
//! those of the full-precision model is measured. All these models go through the layers side by side: before the
//! layer that tells them apart they are one, so `n` layers cost as much as `n²/2 + 2n` passes through a layer,
//! and only one layer is in memory at a time.

use anyhow::Result;

use super::calibrate::Activations;
use super::forward::{Layer, Placed, Ropes};
use super::head::LmHead;
use super::job::Job;
use super::{Calibration, divergence};
use crate::checkpoint::{BitWidth, LayerFile};

/// Tokens on which the divergence is measured, and of one text of them: texts of all kinds have a say.
const TOKENS: usize = 512;
const OF_TEXT: usize = 128;

/// Texts, and tokens of each, on which the divergence is measured.
pub(super) fn windows(calibration: &Calibration) -> (usize, usize) {
    let tokens = calibration.seq_len.min(OF_TEXT);
    ((TOKENS / tokens).min(calibration.samples()), tokens)
}

/// Tokens that go through a layer, summed over layers.
pub(super) fn work(calibration: &Calibration, layers: u64) -> u64 {
    let (texts, tokens) = windows(calibration);
    (texts * tokens) as u64 * (2 * layers + layers * (layers + 1) / 2)
}

/// Bits of every layer, some of them raised, and the divergence with each layer raised alone (nats, the mean over
/// tokens).
pub(super) fn choose(job: &Job<'_>, ids: &[u32]) -> Result<(Vec<u32>, Vec<f64>)> {
    let config = job.source.config();
    let (low, high) = (job.manifest.bits.low(), job.manifest.bits.high());
    job.progress.set_message("choosing layers");
    let seq_len = job.options.calibration.seq_len;
    let (texts, tokens) = windows(&job.options.calibration);
    let apart = job.options.calibration.samples() / texts;
    // Own texts of one kind are four apart: one further each time, all kinds are among them.
    let place = |text: usize| (text * apart + text % apart) * seq_len;
    let ids: Vec<u32> = (0..texts).flat_map(|text| &ids[place(text)..][..tokens]).copied().collect();
    let ropes = Ropes::new(config, tokens);
    let mut full = Activations::embed(config, &job.source.embedding()?, &ids, tokens)?;
    let mut base = full.clone();
    let mut raised: Vec<Activations> = Vec::new();
    for index in 0..config.layers.len() {
        let advance = |activations: &mut Activations, layer: &Placed<'_>| {
            activations.advance(job.on, config, layer, &ropes, &mut [], job.stop, job.progress)
        };
        let once = |activations, layer: Layer| advance(activations, &Placed::new(job.on, &layer)?);
        once(&mut full, Layer::read(job.source, index)?)?;
        raised.push(base.clone());
        let last = raised.len() - 1;
        once(&mut raised[last], read(job, &job.writer.layer(index, high)?)?)?;
        let lower = read(job, &job.writer.layer(index, low)?)?;
        let lower = Placed::new(job.on, &lower)?;
        for activations in raised[..last].iter_mut().chain([&mut base]) {
            advance(activations, &lower)?;
        }
    }
    let (embedding, head) = (job.source.embedding()?, job.source.head()?);
    let head = LmHead::new(job.source, head.as_ref().unwrap_or(&embedding))?;
    let head = job.on.head(&head)?;
    let truth = head.logits(&job.on.put(full.h)?)?;
    let divergences = raised
        .into_iter()
        .map(|activations| {
            super::ensure_running(job.stop)?;
            Ok(divergence::mean(&truth, head.logits(&job.on.put(activations.h)?)?, config.vocab_size))
        })
        .collect::<Result<Vec<f64>>>()?;
    Ok((raise(&divergences, job.manifest.bits), divergences))
}

fn read(job: &Job<'_>, file: &LayerFile) -> Result<Layer> {
    let config = job.source.config();
    Layer::collect(config.layers[file.layer()].clone(), file.norms(config)?, |projection| {
        file.projection(projection, config, job.manifest.storage())
    })
}

/// As many layers as `bits` says get one bit more: those that leave the least divergence when raised alone, the first ones
/// among equals.
fn raise(divergences: &[f64], bits: BitWidth) -> Vec<u32> {
    let mut order: Vec<usize> = (0..divergences.len()).collect();
    order.sort_by(|&a, &b| divergences[a].total_cmp(&divergences[b]));
    let mut widths = vec![bits.low(); divergences.len()];
    order[..bits.raised(divergences.len())].iter().for_each(|&layer| widths[layer] = bits.high());
    widths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_that_help_most_are_raised() {
        let raised = |divergences: &[f64], bits: f64| raise(divergences, BitWidth::try_from(bits).unwrap());
        assert_eq!(raised(&[0.5, 0.1, 0.4, 0.2], 3.5), [3, 4, 3, 4]);
        assert_eq!(raised(&[0.5, 0.1, 0.4, 0.2], 3.25), [3, 4, 3, 3]);
        assert_eq!(raised(&[0.5, 0.1, 0.4, 0.2], 4.75), [4, 5, 5, 5]);
        assert_eq!(raised(&[0.5, 0.1, 0.4], 3.5), [3, 4, 3]);
        assert_eq!(raised(&[1.0, 1.0], 3.5), [4, 3]);
    }
}
