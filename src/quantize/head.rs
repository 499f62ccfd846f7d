//! The head: what it says in f32, and a head of fewer bits.

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::awq;
use super::exponential::softcap;
use super::forward::{Affine, norm};
use super::product::product_beside;
use crate::format::{Dense, Floats};
use crate::weights::{Linear, ModelWeights, Weight};

/// Rows of the head that are in f32 at once.
pub(super) const HEAD_ROWS: usize = 4096;

/// What comes behind the last layer.
pub(crate) struct LmHead<'a> {
    pub(crate) weight: &'a Dense<'a>, // [vocab_size, hidden_size]
    pub(crate) final_norm: Vec<f32>,  // [hidden_size]
    pub(crate) eps: f32,
    pub(crate) softcap: Option<f32>,
}

impl<'a> LmHead<'a> {
    /// That of a model, with this matrix.
    pub(super) fn new(weights: &dyn ModelWeights, weight: &'a Dense<'a>) -> Result<Self> {
        let config = weights.config();
        let (final_norm, softcap) = (weights.final_gamma()?, config.logit_softcap.map(|cap| cap as f32));
        Ok(Self { weight, final_norm, eps: config.stream_eps(), softcap })
    }

    /// `[tokens, vocab_size]` from `h` `[tokens, hidden_size]` as it leaves the last layer.
    pub(super) fn logits(&self, h: &[f32]) -> Vec<f32> {
        let mut logits = vec![0.0; h.len() / self.weight.in_features * self.weight.out_features];
        self.write_logits(&self.normed(h), &mut logits);
        logits
    }

    /// `h` through the last norm.
    pub(super) fn normed(&self, h: &[f32]) -> Vec<f32> {
        norm(h, &self.final_norm, self.eps)
    }

    /// Overwrites `logits` with those of `x`, which has been through the last norm.
    pub(super) fn write_logits(&self, x: &[f32], logits: &mut [f32]) {
        let (n, vocab) = (self.weight.in_features, self.weight.out_features);
        self.each_rows(|start, rows| product_beside(x, rows, n, &mut logits[start..], vocab));
        if let Some(cap) = self.softcap {
            logits.par_chunks_mut(1 << 14).for_each(|logits| softcap(cap, logits));
        }
    }

    /// Calls `with` for the head's rows in f32, some at a time: where they begin, and the rows.
    pub(super) fn each_rows(&self, mut with: impl FnMut(usize, &[f32])) {
        let Dense { in_features: n, out_features: vocab, ref values } = *self.weight;
        let mut converted = vec![0.0; HEAD_ROWS.min(vocab) * n];
        for start in (0..vocab).step_by(HEAD_ROWS) {
            let range = start * n..vocab.min(start + HEAD_ROWS) * n;
            if let Floats::F32(values) = values {
                with(start, &values[range]);
                continue;
            }
            let rows = &mut converted[..range.len()];
            let each = rows.par_chunks_exact_mut(n).enumerate();
            each.for_each(|(i, out)| values.read_f32((start + i) * n, out));
            with(start, rows);
        }
    }
}

/// Largest first: fewer numbers beside the codes.
const GROUPS: [usize; 3] = [128, 64, 32];

/// The head `[vocab_size, hidden_size]` of `weights`, or the embedding where that is the head, rounded to `bits`, in
/// the LUT-GEMM format. The embedding itself stays as it is.
///
/// # Errors
/// Bits other than 8 and 4, a hidden size that no group divides, a tensor that cannot be read.
pub fn head(weights: &dyn ModelWeights, bits: usize) -> Result<Weight<'static>> {
    ensure!(matches!(bits, 4 | 8), "a head of {bits} bits, 8 and 4 are made, or 16 to leave it as it is");
    let dense = weights.head()?.map_or_else(|| weights.embedding(), Ok)?;
    let inputs = dense.in_features;
    let group = GROUPS.into_iter().find(|&group| inputs.is_multiple_of(group));
    let group = group.with_context(|| {
        format!("the head has {inputs} input channels, a multiple of 32 is needed to quantize it: use --head-bits 16")
    })?;
    awq::quantize(&Affine::new(&Linear::plain(Weight::Dense(dense))), bits, group, None).context("quantizing the head")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_is_the_same_in_every_type() {
        let (depth, vocab) = (8, HEAD_ROWS + 3);
        let halves: Vec<half::f16> = (0..depth * vocab).map(|i| half::f16::from_f32((i % 61) as f32 - 30.0)).collect();
        let floats: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        let x: Vec<f32> = (0..2 * depth).map(|i| i as f32 - 7.0).collect();
        let logits = |values, softcap| {
            let weight = Dense { in_features: depth, out_features: vocab, values };
            let head = LmHead { weight: &weight, final_norm: vec![1.0; depth], eps: 1e-5, softcap };
            let mut logits = vec![0.0; 2 * vocab];
            head.write_logits(&x, &mut logits);
            logits
        };
        // Small whole numbers: every sum is exact.
        let plain = logits(halves.clone().into(), None);
        assert_eq!(plain, logits(floats.into(), None));
        let capped = logits(halves.into(), Some(30.0));
        for (got, z) in capped.iter().zip(&plain) {
            let want = 30.0 * (f64::from(*z) / 30.0).tanh();
            assert!((f64::from(*got) - want).abs() < 1e-5, "{z}: {got}, {want}");
        }
        assert!(plain.iter().any(|z| z.abs() > 30.0));
    }
}
