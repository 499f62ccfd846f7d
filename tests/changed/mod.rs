//! Models that are another model but for something: what tests change of one.
#![allow(dead_code, reason = "each test program uses a part of it")]

use anyhow::Result;
use decdec::config::{LayerNorm, ModelConfig, Projection};
use decdec::format::Dense;
use decdec::weights::{Linear, ModelWeights};

/// What a model says in place of another one; all that is not said is the other's.
pub(crate) trait Change: Sync {
    fn of(&self) -> &dyn ModelWeights;

    fn head(&self) -> Result<Option<Dense<'_>>> {
        self.of().head()
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.of().final_norm()
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.of().norm(layer, norm)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        self.of().projection(layer, projection)
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        self.of().bits(layer)
    }
}

/// The model with the change.
pub(crate) struct Changed<T>(pub(crate) T);

impl<T: Change> ModelWeights for Changed<T> {
    fn config(&self) -> &ModelConfig {
        self.0.of().config()
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.0.of().embedding()
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        self.0.head()
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.0.final_norm()
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.0.norm(layer, norm)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        self.0.projection(layer, projection)
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        self.0.bits(layer)
    }
}
