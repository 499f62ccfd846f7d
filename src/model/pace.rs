//! How long whole tokens take, by the device's clock: what the tuner and the default compensation measure.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Model, State};
use crate::backend::{DecodeBackend, Input, Pass, Rows};
use crate::sampling::Sampling;

/// Tokens that are not counted: the first compiles and allocates, the second is recorded, the third is the first replay.
const WARM: usize = 3;

/// Times that the counted tokens are taken; the least counts, since nothing makes a token too fast.
const ROUNDS: usize = 2;

/// Tokens that a text to be timed grows by, beyond its context.
pub(crate) const fn growth(tokens: usize) -> usize {
    WARM + ROUNDS * tokens
}

/// The share of layers of `bits` in what a token reads of all layers' weights.
pub fn share(layers: impl Iterator<Item = Option<u32>>, bits: u32) -> f64 {
    let (own, all) =
        layers.flatten().fold((0, 0), |(own, all), width| (own + if width == bits { width } else { 0 }, all + width));
    f64::from(own) / f64::from(all)
}

impl<B: DecodeBackend> Model<'_, B> {
    /// What a token takes behind a text of the `context`, compensated as the model is: the mean of `tokens` that follow
    /// it, one after the other as they are decoded. Greedy choices; the first slot of `state` holds the text afterwards.
    ///
    /// # Errors
    /// Those of [`Model::prompt`] and [`Model::step`]; no tokens; a clock that stands still.
    pub fn time_tokens(&self, state: &mut State<B>, context: &[u32], tokens: usize) -> Result<Duration> {
        ensure!(tokens > 0, "0 tokens are to be timed, at least 1 is needed");
        let (last, before) = context.split_last().unwrap_or((&0, &[]));
        if state.len(0) >= context.len() && state.keeps(0, before.len()) {
            self.resume(state, 0, before.len(), &Sampling::GREEDY, &[])?;
        } else {
            self.begin(state, 0, &Sampling::GREEDY, &[])?;
            if !before.is_empty() {
                self.extend(state, 0, before, false)?;
            }
        }
        self.prompt(state, 0, &[*last], false)?;
        (0..WARM).try_for_each(|_| self.step(state, &[0]))?;
        let mut least = Duration::MAX;
        for _ in 0..ROUNDS {
            least = least.min(self.backend.time(&mut || (0..tokens).try_for_each(|_| self.step(state, &[0])))?);
        }
        ensure!(!least.is_zero(), "the clock of {} stands still: tokens took no time", self.backend.device().id);
        Ok(least / tokens as u32)
    }

    /// Makes ready, all at once, what tokens need that are compensated in each of so many ways, which `compensate` gives
    /// the model one after the other: such as compiled kernels. What `state` holds is lost, and the model may be left
    /// compensated in any of the ways.
    ///
    /// # Errors
    /// What `compensate` says, and those of [`Model::prepare`].
    pub fn prepare_ways(
        &mut self,
        state: &mut State<B>,
        ways: usize,
        compensate: &mut dyn FnMut(&mut Self, usize) -> Result<()>,
    ) -> Result<()> {
        self.begin(state, 0, &Sampling::GREEDY, &[])?;
        let backend = self.backend;
        // Without effect on the device: the text stays empty.
        state.grow(&[(0, 0, 0)], |state| {
            backend.prepare(&mut || {
                (0..ways).try_for_each(|way| {
                    compensate(self, way)?;
                    let rows = [Rows { slot: 0, position: 0, count: 1 }];
                    self.run(state, Input::Sampled, Pass { rows: &rows, compensated: 1 }, (&[0], &[0]))
                })
            })
        })
    }
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
