//! Where a model's numbers come from: one interface over full-precision sources and checkpoints.

use std::borrow::Cow;

use anyhow::Result;

use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::format::{AnyPrec, Dense, Floats, Format, LutGemm, Numbers, Residual, Size, Storage, Tensor};

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

impl<'a> Weight<'a> {
    /// Takes the tensors of `format`, or of full precision, in the order of their description.
    ///
    /// # Errors
    /// What the format refuses.
    pub(crate) fn from_tensors(format: Option<Format>, size: Size, mut tensors: Vec<Numbers<'a>>) -> Result<Self> {
        Ok(match format {
            None => {
                let Size { in_features, out_features, .. } = size;
                Self::Dense(Dense { in_features, out_features, values: tensors.remove(0).into_floats() })
            }
            Some(Format::AnyPrec) => Self::AnyPrec(AnyPrec::from_tensors(size, tensors)?),
            Some(Format::LutGemm) => Self::LutGemm(LutGemm::from_tensors(size, tensors)?),
        })
    }

    /// What is stored, each tensor with its description.
    pub fn tensors(&self) -> Vec<(&'static Tensor, Numbers<'_>)> {
        let numbers = match self {
            Self::Dense(w) => vec![Numbers::Floats(w.values.borrowed())],
            Self::AnyPrec(AnyPrec(w)) | Self::LutGemm(LutGemm(w)) => w.borrowed().tensors,
        };
        tensors_of(self.format()).iter().zip(numbers).collect()
    }

    /// How it is quantized; `None` for full precision.
    pub fn format(&self) -> Option<Format> {
        match self {
            Self::Dense(_) => None,
            Self::AnyPrec(_) => Some(Format::AnyPrec),
            Self::LutGemm(_) => Some(Format::LutGemm),
        }
    }

    /// Its format with the size of groups; `None` for full precision.
    pub fn storage(&self) -> Option<Storage> {
        self.format().map(|format| Storage { format, group_size: self.size().group_size })
    }

    /// What the shapes of its tensors follow from.
    pub fn size(&self) -> Size {
        match self {
            Self::Dense(Dense { in_features, out_features, .. }) => {
                Size { in_features: *in_features, out_features: *out_features, bits: 0, group_size: None }
            }
            Self::AnyPrec(AnyPrec(w)) | Self::LutGemm(LutGemm(w)) => w.size(),
        }
    }

    /// Input channels.
    pub fn in_features(&self) -> usize {
        self.size().in_features
    }

    /// Output rows.
    pub fn out_features(&self) -> usize {
        self.size().out_features
    }

    /// Bytes as stored.
    pub fn bytes(&self) -> usize {
        self.tensors().iter().map(|(_, numbers)| numbers.bytes()).sum()
    }

    /// Row `row`, dequantized, written over `out` (`in_features` long).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Dense(w) => w.values.read_f32(row * w.in_features, out),
            Self::AnyPrec(w) => w.row(row, out),
            Self::LutGemm(w) => w.row(row, out),
        }
    }

    /// The same matrix, borrowed.
    pub fn borrowed(&self) -> Weight<'_> {
        match self {
            Self::Dense(w) => Weight::Dense(Dense { values: w.values.borrowed(), ..*w }),
            Self::AnyPrec(w) => Weight::AnyPrec(AnyPrec(w.borrowed())),
            Self::LutGemm(w) => Weight::LutGemm(LutGemm(w.borrowed())),
        }
    }
}

/// The tensors of a matrix in `format`, or in full precision.
pub(crate) fn tensors_of(format: Option<Format>) -> &'static [Tensor] {
    format.map_or(&[Tensor::WEIGHT], Format::tensors)
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

    /// What is stored, each tensor with its description: the matrix, then what there is beside it.
    pub fn tensors(&self) -> Vec<(&'static Tensor, Numbers<'_>)> {
        let singles = |values| Numbers::Floats(Floats::F32(Cow::Borrowed(values)));
        let mut list = self.weight.tensors();
        list.extend(self.bias.as_deref().map(|bias| (&Tensor::BIAS, singles(bias))));
        if let Some(residual) = &self.residual {
            list.extend([&Tensor::RESIDUAL, &Tensor::SCALES].into_iter().zip(residual.borrowed().tensors));
        }
        list.extend(self.thresholds.as_deref().map(|thresholds| (&Tensor::THRESHOLDS, singles(thresholds))));
        list
    }

    /// The same layer with row `order[r]` as row `r` of everything that has rows.
    ///
    /// # Errors
    /// None for an order of all rows.
    pub(crate) fn reordered(&self, order: &[usize]) -> Result<Linear<'a>> {
        let size = self.weight.size();
        let tensors = self.weight.tensors();
        let tensors = tensors.iter().map(|(tensor, numbers)| tensor.reorder(&size, numbers, order)).collect();
        let residual = self.residual.as_ref().map(|residual| {
            let words = Tensor::RESIDUAL.reorder(&size, &residual.tensors()[0], order).into_words();
            let scales = Tensor::SCALES.reorder(&size, &residual.tensors()[1], order).into_floats();
            Residual::new(size.in_features, size.out_features, words, scales)
        });
        Ok(Linear {
            weight: Weight::from_tensors(self.weight.format(), size, tensors)?,
            bias: self.bias.as_ref().map(|bias| order.iter().map(|&row| bias[row]).collect()),
            residual: residual.transpose()?,
            thresholds: self.thresholds.clone(),
        })
    }

    /// The same layer, borrowed.
    pub fn borrowed(&self) -> Linear<'_> {
        Linear {
            weight: self.weight.borrowed(),
            bias: self.bias.as_deref().map(Cow::Borrowed),
            residual: self.residual.as_ref().map(|residual| Residual(residual.borrowed())),
            thresholds: self.thresholds.as_deref().map(Cow::Borrowed),
        }
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
    /// γ of the last norm with [`ModelConfig::logit_scale`] in it.
    pub(crate) fn final_gamma(&self) -> Result<Vec<f32>> {
        let scale = self.config().logit_scale as f32;
        Ok(self.final_norm()?.into_iter().map(|gamma| gamma * scale).collect())
    }

    /// γ of every norm of a layer, in the order of [`LayerNorm::ALL`]; empty where there is none.
    pub(crate) fn norms(&self, layer: usize) -> Result<[Vec<f32>; 6]> {
        let mut norms = [const { Vec::new() }; 6];
        for (norm, _) in self.config().layers[layer].norms(self.config().hidden_size) {
            norms[norm.index()] = self.norm(layer, norm)?;
        }
        Ok(norms)
    }
}
