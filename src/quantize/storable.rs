//! Whether weights fit the numbers in which quantized ones are stored.

use anyhow::{Context, Result, bail};
use half::f16;

use super::forward::Layer;
use crate::config::{ModelConfig, Projection};
use crate::tensors::stored_modules;

/// Checks that every weight of the layer fits half precision, which codebooks, steps and centres are stored in.
///
/// # Errors
/// The first weight that does not, with its tensor and its place in it.
pub(super) fn ensure_storable(config: &ModelConfig, index: usize, layer: &Layer) -> Result<()> {
    const LARGEST: f32 = f16::MAX.to_f32_const();
    for projection in Projection::ALL {
        let linear = layer.linear(projection);
        let Some(at) = linear.weight.iter().position(|w| w.abs() > LARGEST) else { continue };
        let (mut row, channel) = (at / linear.in_features, at % linear.in_features);
        let mut modules = stored_modules(config, index, projection).into_iter();
        let found = modules.find(|(_, rows)| {
            let inside = row < *rows;
            row -= if inside { 0 } else { *rows };
            inside
        });
        let (name, _) = found.context("a row outside its projection")?;
        bail!(
            "tensor {name}: {:e} (at [{row}, {channel}]) is beyond half precision, in which quantized weights are \
             stored: {LARGEST} at most is expected, a model with such a weight is hardly sound",
            linear.weight[at]
        );
    }
    Ok(())
}
