//! A head of fewer bits: uniform in groups of channels, made from full precision when a model is loaded.

use anyhow::{Context, Result, ensure};

use super::awq;
use super::forward::Affine;
use crate::weights::{Linear, ModelWeights, Weight};

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
