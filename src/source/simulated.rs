//! Models whose quantization was only simulated: full-precision files in which every row of a projection holds few
//! different values, as the scripts around quantizers save them. Told by counting, kept exactly as AnyPrec.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use half::f16;
use rayon::prelude::*;

use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::format::{AnyPrec, Dense, Floats};
use crate::weights::{Linear, ModelWeights, Weight};

/// Codes of at most this many bits are looked for.
const MAX_BITS: u32 = 8;

/// In a quantized row, every value stands for this many weights at least, on average: any row is a few values if it
/// is short enough.
const SHARED: usize = 4;

/// A full-precision model, read as the quantized one that it stands for.
pub struct Simulated {
    dense: Box<dyn ModelWeights>,
    bits: Vec<u32>, // [num_layers]
}

impl Simulated {
    /// Counts the values of every row; the widths of layers are those that hold the most of any row, and no more than
    /// one below the widest layer's.
    ///
    /// # Errors
    /// A row with more than 256 different values, or more than a quarter of its channels, by name: the model is not
    /// quantized, or by groups of channels.
    pub fn recover(dense: Box<dyn ModelWeights>) -> Result<Self> {
        let layers = dense.config().layers.len();
        let bits: Vec<u32> = (0..layers).map(|layer| width(dense.as_ref(), layer)).collect::<Result<_>>()?;
        let widest = bits.iter().copied().max().context("the model has no layers")?;
        let bits = bits.into_iter().map(|bits| bits.max(widest - 1).max(2)).collect();
        Ok(Self { dense, bits })
    }

    /// Bits of every layer, `[num_layers]`.
    pub fn layer_bits(&self) -> &[u32] {
        &self.bits
    }
}

/// Bits that tell the values of any row of a layer apart.
fn width(dense: &dyn ModelWeights, layer: usize) -> Result<u32> {
    let mut bits = 2;
    for projection in Projection::ALL {
        let weight = dense.projection(layer, projection)?.weight;
        let counts = (0..weight.out_features()).into_par_iter().map(|row| (values(&weight, row).1.len(), row));
        let (most, row) = counts.max().context("a projection without rows")?;
        let limit = (1 << MAX_BITS).min(weight.in_features() / SHARED);
        ensure!(
            most <= limit,
            "row {row} of layer {layer}'s {projection} has {most} different values, at most {limit} are expected of a \
             quantized model with one codebook per row"
        );
        bits = bits.max(most.next_power_of_two().trailing_zeros());
    }
    Ok(bits)
}

/// A row, and its different values in rising order.
fn values(weight: &Weight<'_>, row: usize) -> (Vec<f32>, Vec<f32>) {
    let mut all = vec![0.0; weight.in_features()];
    weight.row(row, &mut all);
    let mut different = all.clone();
    different.sort_unstable_by(f32::total_cmp);
    different.dedup_by_key(|value| value.to_bits());
    (all, different)
}

/// The matrix in codes of `bits` bits.
fn encode(weight: &Weight<'_>, bits: u32) -> Result<AnyPrec<'static>> {
    let (inputs, outputs) = (weight.in_features(), weight.out_features());
    let rows: Vec<(Vec<u8>, Vec<f32>)> = (0..outputs)
        .into_par_iter()
        .map(|row| {
            let (all, mut book) = values(weight, row);
            let code = |value: &f32| book.partition_point(|other| other.total_cmp(value).is_lt()) as u8;
            let codes = all.iter().map(code).collect();
            book.resize(1 << bits, book.last().copied().unwrap_or(0.0));
            (codes, book)
        })
        .collect();
    let codes: Vec<u8> = rows.iter().flat_map(|(codes, _)| codes).copied().collect();
    let book: Vec<f32> = rows.into_iter().flat_map(|(_, book)| book).collect();
    // In half precision where that changes nothing.
    let halves: Vec<f16> = book.iter().map(|&value| f16::from_f32(value)).collect();
    let exact = halves.iter().zip(&book).all(|(half, value)| half.to_f32().to_bits() == value.to_bits());
    let lut = if exact { Floats::F16(Cow::Owned(halves)) } else { Floats::F32(Cow::Owned(book)) };
    AnyPrec::pack(inputs, outputs, bits as usize, &codes, lut)
}

impl ModelWeights for Simulated {
    fn config(&self) -> &ModelConfig {
        self.dense.config()
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.dense.embedding()
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        self.dense.head()
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.dense.final_norm()
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.dense.norm(layer, norm)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let linear = self.dense.projection(layer, projection)?;
        let weight = Weight::AnyPrec(encode(&linear.weight, self.bits[layer])?);
        Ok(Linear { weight, bias: linear.bias, residual: None, thresholds: None })
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        Some(self.bits[layer])
    }
}
