//! From a quantized model that other programs made to a checkpoint of ours, number for number.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};

use crate::checkpoint::{CheckpointWriter, Manifest, Unquantized};
use crate::config::Projection;
use crate::fingerprint::Fingerprint;
use crate::format::Storage;
use crate::interrupted::ensure_running;
use crate::open::Opened;
use crate::progress::Progress;
use crate::weights::Linear;

/// Writes a checkpoint at `out` that holds the numbers of `opened`, each in the type that it has there. Norms and
/// biases become f32, q, k, v and gate, up are stored below each other. Converting the result again gives the same
/// bytes.
///
/// Finished layers are kept in `OUT.partial` until the end. Setting `stop` ends it soon, with
/// [`crate::interrupted::Interrupted`].
///
/// # Errors
/// A full-precision model, or one that a checkpoint cannot hold (layers that differ by more than a bit, groups of
/// several sizes); an existing `out`; a disk that is full. `out` is as it was then.
pub fn convert(
    opened: &Opened,
    out: &Path,
    overwrite: bool,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Manifest> {
    let weights = opened.weights();
    let config = weights.config();
    let manifest = match opened.manifest() {
        Some(own) => own.clone(),
        None => foreign(opened)?,
    };
    let texts = opened.texts().context("random weights cannot be converted, give a checkpoint")?;
    CheckpointWriter::ensure_free(out, overwrite)?;
    let mut fingerprint = Fingerprint::default();
    fingerprint.model(weights, stop)?;
    fingerprint.texts(texts);
    let (version, manifest_json) = (env!("CARGO_PKG_VERSION"), serde_json::to_string(&manifest)?);
    let key = format!("convert\n{version}\n{manifest_json}\n{}\n", fingerprint.digits());
    let writer = CheckpointWriter::create(out, &key, overwrite)?;
    progress.set_length(config.layers.len() as u64);
    let mut bits = Vec::with_capacity(config.layers.len());
    for layer in 0..config.layers.len() {
        ensure_running(stop)?;
        let width = weights.bits(layer).context("the model is full precision, quantize it first")?;
        if !writer.has_layer(layer, width) {
            let linears = Projection::each(|p| weights.projection(layer, p))?;
            ensure_fits(&manifest, layer, &linears)?;
            writer.write_layer(config, (layer, width), &weights.norms(layer)?, &linears)?;
        }
        bits.push(width);
        progress.inc(1);
    }
    let rest = Unquantized::of(weights)?;
    writer.finish(config, &manifest, &bits, &rest, texts)?;
    Ok(manifest)
}

/// What a checkpoint of someone else's model says of itself.
fn foreign(opened: &Opened) -> Result<Manifest> {
    let manifest = Manifest::describe(opened.weights(), opened.name().to_owned(), String::new())?;
    let calibration = if manifest.has_residuals() { "as the source has it" } else { "none" };
    Ok(Manifest { calibration: calibration.into(), ..manifest })
}

/// Every projection is stored as the first one is: a checkpoint says it once for all.
fn ensure_fits(manifest: &Manifest, layer: usize, linears: &[Linear<'_>; 4]) -> Result<()> {
    for (projection, linear) in Projection::ALL.into_iter().zip(linears) {
        let storage = linear.weight.storage();
        let Storage { format, group_size } =
            storage.with_context(|| format!("layer {layer}: {projection} is not quantized"))?;
        ensure!(
            storage == Some(manifest.storage()),
            "layer {layer}: {projection} is {format} with groups of {group_size:?}, the first projection {} with \
             {:?}: a checkpoint has one kind",
            manifest.backend,
            manifest.group_size
        );
        ensure!(
            linear.residual.is_some() == manifest.has_residuals(),
            "layer {layer}: {projection} has {} residual, the first projection has {}: all or none are expected",
            if linear.residual.is_some() { "a" } else { "no" },
            if manifest.has_residuals() { "one" } else { "none" },
        );
    }
    Ok(())
}
