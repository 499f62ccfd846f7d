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
        let (row, channel) = (at / linear.in_features, at % linear.in_features);
        let mut row = config.row_order(index, projection, None).map_or(row, |stored| stored[row]);
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

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;
    use crate::config::Pairing;

    /// The place is that in the file, whatever order rows of queries and keys are kept in.
    #[test]
    fn the_place_of_a_huge_weight_is_that_in_its_tensor() {
        let mut config = fixture::config();
        let head_dim = config.layers[0].attention().head_dim;
        for (pairing, stored) in [(Pairing::Halves, [1, 9]), (Pairing::Neighbours, [2, 3])] {
            config.ropes[0].pairing = pairing;
            for (second, stored) in [0, 1].into_iter().zip(stored) {
                let mut layer = fixture::layer(&config, 0.2);
                ensure_storable(&config, 0, &layer).unwrap();
                // The second pair of the last key head: channels 1 and 9 as they are kept.
                let row = 5 * head_dim + 1 + second * head_dim / 2;
                layer.linears[0].weight[row * 64 + 7] = 1e5;
                let message = ensure_storable(&config, 0, &layer).unwrap_err().to_string();
                let place = format!("k_proj.weight: 1e5 (at [{}, 7])", head_dim + stored);
                assert!(message.contains(&place), "{message}");
            }
        }
    }
}
