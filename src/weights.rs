//! Where a model's numbers come from: one interface over full-precision sources and checkpoints.

use std::borrow::Cow;

use anyhow::Result;

use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::format::{AnyPrec, Dense, LutGemm, Residual};

/// The matrix of one linear layer, in the form in which it is stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight<'a> {
    /// Full precision.
    Dense(Dense<'a>),
    /// Non-uniform codes with one codebook per row (spec: `--backend ap`).
    AnyPrec(AnyPrec<'a>),
    /// Binary-coded, group-wise (spec: `--backend lutgemm`).
    LutGemm(LutGemm<'a>),
}

impl Weight<'_> {
    /// Input channels.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Dense(w) => w.in_features,
            Self::AnyPrec(w) => w.in_features(),
            Self::LutGemm(w) => w.in_features(),
        }
    }

    /// Output rows.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Dense(w) => w.out_features,
            Self::AnyPrec(w) => w.out_features(),
            Self::LutGemm(w) => w.out_features(),
        }
    }

    /// Bytes as stored.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.values.bytes(),
            Self::AnyPrec(w) => w.bytes(),
            Self::LutGemm(w) => w.bytes(),
        }
    }

    /// Row `row`, dequantized, written over `out` (`in_features` long).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Dense(w) => w.values.read_f32(row * w.in_features, out),
            Self::AnyPrec(w) => w.row(row, out),
            Self::LutGemm(w) => w.row(row, out),
        }
    }
}

/// One linear layer: `y = W·x + bias`, and what is needed to compensate it.
#[derive(Debug, Clone)]
pub struct Linear<'a> {
    /// The matrix.
    pub weight: Weight<'a>,
    /// `[out_features]`
    pub bias: Option<Cow<'a, [f32]>>,
    /// What quantization lost; absent for full precision.
    pub residual: Option<Residual<'a>>,
    /// Calibrated boundaries of `|x|`, `[in_features]`, non-increasing; present whenever `residual` is.
    pub thresholds: Option<Cow<'a, [f32]>>,
}

impl<'a> Linear<'a> {
    /// A linear layer of nothing but its matrix.
    pub fn plain(weight: Weight<'a>) -> Self {
        Self { weight, bias: None, residual: None, thresholds: None }
    }
}

/// A model's tensors, read when asked for. Shapes are checked against [`ModelConfig`] by the reader.
pub trait ModelWeights: Sync {
    /// Shapes and constants.
    fn config(&self) -> &ModelConfig;
    /// `[vocab_size, hidden_size]`
    fn embedding(&self) -> Result<Dense<'_>>;
    /// `[vocab_size, hidden_size]`; `None` when it is the embedding.
    fn head(&self) -> Result<Option<Dense<'_>>>;
    /// γ of the last norm, `[hidden_size]`
    fn final_norm(&self) -> Result<Vec<f32>>;
    /// γ of one of the norms of a layer, as it multiplies; lengths are those of
    /// [`LayerConfig::norms`](crate::config::LayerConfig::norms).
    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>>;
    /// One projection of one layer, fused as [`Projection`] says.
    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>>;
    /// Bits of a weight in this layer; `None` for full precision.
    fn bits(&self, layer: usize) -> Option<u32>;
}

impl dyn ModelWeights + '_ {
    /// γ of every norm of a layer, in the order of [`LayerNorm::ALL`]; empty where there is none.
    pub(crate) fn norms(&self, layer: usize) -> Result<[Vec<f32>; 6]> {
        let mut norms = [const { Vec::new() }; 6];
        for (norm, _) in self.config().layers[layer].norms(self.config().hidden_size) {
            norms[norm.index()] = self.norm(layer, norm)?;
        }
        Ok(norms)
    }
}
