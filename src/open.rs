//! From a path to a model, whatever it is: our checkpoint, a full-precision source.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::checkpoint::{BitWidth, Checkpoint, WeightFormat};
use crate::source::Source;
use crate::tokenizer::TextFiles;
use crate::weights::ModelWeights;

/// A model on disk.
#[derive(Debug)]
pub enum Opened {
    /// A decdec checkpoint directory.
    Checkpoint(Checkpoint),
    /// Full precision.
    Source(Source),
}

impl Opened {
    /// Opens whatever lies at `path`.
    ///
    /// # Errors
    /// Nothing there, or what [`Checkpoint::open`] and [`Source::open`] refuse.
    pub fn open(path: &Path) -> Result<Self> {
        std::fs::metadata(path).with_context(|| format!("cannot open the model {}", path.display()))?;
        if Checkpoint::is_at(path) {
            return Ok(Self::Checkpoint(Checkpoint::open(path)?));
        }
        Ok(Self::Source(Source::open(path)?))
    }

    /// Its tensors.
    pub fn weights(&self) -> &dyn ModelWeights {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint,
            Self::Source(source) => source,
        }
    }

    /// Tokenizer, chat template, special tokens.
    pub fn texts(&self) -> &TextFiles {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.texts(),
            Self::Source(source) => source.texts(),
        }
    }

    /// How its weights are stored and in how many bits; `None` for full precision.
    pub fn quantization(&self) -> Option<(WeightFormat, BitWidth)> {
        match self {
            Self::Checkpoint(checkpoint) => Some((checkpoint.manifest().backend, checkpoint.manifest().bits)),
            Self::Source(_) => None,
        }
    }

    /// Holds what the user said of the model against what it is.
    ///
    /// # Errors
    /// The first difference, with both values.
    pub fn expect(&self, backend: Option<WeightFormat>, bits: Option<BitWidth>) -> Result<()> {
        let Some((own_backend, own_bits)) = self.quantization() else {
            ensure!(backend.is_none(), "--backend is given, but the model is full precision, leave it out");
            ensure!(bits.is_none(), "--bitwidth is given, but the model is full precision, leave it out");
            return Ok(());
        };
        if let Some(backend) = backend {
            ensure!(backend == own_backend, "--backend is {backend}, the checkpoint is {own_backend}, leave it out");
        }
        if let Some(bits) = bits {
            ensure!(bits == own_bits, "--bitwidth is {bits}, the checkpoint has {own_bits} bits, leave it out");
        }
        Ok(())
    }
}
