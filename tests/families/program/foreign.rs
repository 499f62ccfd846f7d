//! Directories that another program could have made of a model.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// A tensor: its name, type, shape and bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// Copies a directory, its tensors as `change` leaves them.
fn copy(from: &Path, to: &Path, change: impl FnOnce(&mut Vec<Stored>)) {
    fs::create_dir(to).expect("made");
    for entry in fs::read_dir(from).expect("there") {
        let path = entry.expect("readable").path();
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
    let bytes = fs::read(from.join("model.safetensors")).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let owned =
        |(name, view): (String, TensorView<'_>)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec());
    let mut tensors: Vec<Stored> = tensors.tensors().into_iter().map(owned).collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(views, Some(metadata)).expect("serializable");
    fs::write(to.join("model.safetensors"), bytes).expect("writable");
}

fn is_projection(name: &str) -> bool {
    name.contains("layers.") && name.ends_with("_proj.weight") && !name.contains("vision")
}

/// Simulated quantization: every row of a projection is left with eight of its own values, evenly among the sorted
/// ones; each other becomes the nearest of them.
pub(super) fn coarse(from: &Path, to: &Path) {
    copy(from, to, |tensors| {
        let mut rows = 0;
        for (_, dtype, shape, bytes) in tensors.iter_mut().filter(|(name, ..)| is_projection(name)) {
            let dtype = *dtype;
            let number = |bytes: [u8; 2]| match dtype {
                Dtype::F16 => f16::from_le_bytes(bytes).to_f32(),
                Dtype::BF16 => bf16::from_le_bytes(bytes).to_f32(),
                other => panic!("{other:?}, 16-bit numbers are expected"),
            };
            for row in bytes.chunks_exact_mut(2 * shape[1]) {
                let own: Vec<[u8; 2]> = row.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]).collect();
                let mut sorted = own.clone();
                sorted.sort_by(|a, b| number(*a).total_cmp(&number(*b)));
                let kept: Vec<_> = (0..8).map(|i| sorted[(2 * i + 1) * sorted.len() / 16]).collect();
                let far = |a: [u8; 2], b: [u8; 2]| (number(a) - number(b)).abs();
                let nearest = |value: [u8; 2]| {
                    let nearer = |a: &&[u8; 2], b: &&[u8; 2]| far(**a, value).total_cmp(&far(**b, value));
                    *kept.iter().min_by(nearer).expect("eight")
                };
                row.chunks_exact_mut(2).zip(own).for_each(|(bytes, value)| bytes.copy_from_slice(&nearest(value)));
                rows += 1;
            }
        }
        assert!(rows > 100, "{rows} rows of projections");
    });
}

/// The first two layers in each other's place.
pub(super) fn other_layers(from: &Path, to: &Path) {
    copy(from, to, |tensors| {
        for (name, ..) in tensors.iter_mut().filter(|(name, ..)| is_projection(name)) {
            *name = match name.contains("layers.0.") {
                true => name.replace("layers.0.", "layers.1."),
                false => name.replace("layers.1.", "layers.0."),
            };
        }
    });
}
