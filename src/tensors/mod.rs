//! Where a model's tensors lie: sets of named tensors, whatever kind of file holds them, and what makes a decoder of
//! them.
//!
//! Names are those of Hugging Face (`model.layers.0.self_attn.q_proj.weight`) with the suffixes of our own formats; a
//! set whose files have other names translates. [`StoredModel`] checks a set against the configuration, and joins what
//! is stored module by module to the projections that a decoder multiplies by.

mod layout;
mod model;
mod modules;
mod shards;

use std::borrow::Cow;
use std::fmt;

use anyhow::Result;

use crate::config::Pairing;
use crate::format::{Floats, Format, Kind, Numbers, Size, Tensor};
use crate::weights::tensors_of;

pub(crate) use layout::{Layout, Stored};
pub use model::StoredModel;
pub(crate) use model::{EMBEDDING, FINAL_NORM, HEAD, is_stored_model, norm_name};
pub(crate) use modules::{Module, fused_module, modules, stored_modules};
pub(crate) use shards::{Shards, numbers};

/// What a tensor has to be.
#[derive(Debug)]
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: Kind,
}

/// Tensors by name.
pub(crate) trait TensorSet: fmt::Debug + Sync {
    /// True if there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// Checks that a tensor is there, in its shape and a type that can be read.
    fn check(&self, expected: &Expected) -> Result<()>;

    /// The numbers of a tensor, all of them finite.
    fn floats(&self, name: &str) -> Result<Floats<'_>>;

    /// The numbers of thresholds, which have a check of their own.
    fn thresholds(&self, name: &str) -> Result<Floats<'_>> {
        self.floats(name)
    }

    /// The bit patterns of a tensor.
    fn words(&self, name: &str) -> Result<Cow<'_, [u32]>>;

    /// Checks all tensors of a model.
    fn check_all(&self, expected: &[Expected]) -> Result<()> {
        expected.iter().try_for_each(|expected| self.check(expected))
    }

    /// Channels of a group of `module`, where that is told by its tensors.
    fn group_size(&self, _module: &Module, _in_features: usize) -> Result<Option<usize>> {
        Ok(None)
    }

    /// What has to be there for the matrix of `module`, which is of this size.
    fn expected(&self, module: &Module, format: Option<Format>, size: &Size) -> Result<Vec<Expected>> {
        let described = tensors_of(format).iter();
        Ok(described.map(|tensor| module.expected(tensor, size)).collect())
    }

    /// The numbers of the matrix of `module`, as the format describes them.
    fn weight(&self, module: &Module, format: Option<Format>, _size: &Size) -> Result<Vec<Numbers<'_>>> {
        let described = tensors_of(format).iter();
        described.map(|tensor| self.numbers(&module.tensor(tensor.suffix), tensor)).collect()
    }

    /// Nibbles and scales of the residual of `modules`, joined, which is of this size.
    fn residual(&self, modules: &[Module], size: &Size) -> Result<[Numbers<'_>; 2]> {
        let [words, scales] = [&Tensor::RESIDUAL, &Tensor::SCALES].map(|tensor| {
            let parts = modules.iter().map(|module| self.numbers(&module.tensor(tensor.suffix), tensor));
            anyhow::Ok(tensor.join(size, parts.collect::<Result<_>>()?))
        });
        Ok([words?, scales?])
    }

    /// Which channels of a head turn together in these files, where that is not what the configuration says.
    fn pairing(&self) -> Option<Pairing> {
        None
    }

    /// True if norms are stored as they multiply, rather than as transformers stores them.
    fn has_gammas(&self) -> bool {
        false
    }

    /// The numbers of a tensor as it is described.
    fn numbers(&self, name: &str, tensor: &Tensor) -> Result<Numbers<'_>> {
        Ok(match tensor.kind {
            Kind::Float => Numbers::Floats(self.floats(name)?),
            Kind::I32 | Kind::U32 => Numbers::Words(self.words(name)?),
        })
    }
}
