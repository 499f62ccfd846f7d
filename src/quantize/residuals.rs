//! Residuals and thresholds for a model that someone else quantized, given the original (spec §2.3, §2.4).
//!
//! The original runs over calibration text, layer by layer, as when decdec quantizes; what the quantized weights
//! lost of it becomes the residual, what enters its projections the thresholds.
//!
//! AWQ multiplies the input channels of a matrix and folds the inverse into what feeds it (Lin et al. 2023, §3.2), so
//! that a model it quantized is comparable only with an original that is scaled alike. Where norms before projections
//! differ, the scales of what they feed are their ratio; other norms (of queries and keys, behind attention and
//! feed-forward) feed no projection and must be equal. The scales of `o` and `down` went into rows of `v` and `up`, of
//! which only the quantized form is left: a row `w` became `w / s`, rounded to `q`, and since rounding errors are about
//! perpendicular to `w`, `s ≈ |w|² / ⟨w, q⟩`.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::compute::{Compute, Entered};
use super::forward::{Affine, Inputs, Layer, Norms};
use super::host::Host;
use super::job::{self, Job, Made};
use super::{Calibration, Options, Refine, Report, awq, ensure_running, estimate, finish};
use crate::checkpoint::{CheckpointWriter, Manifest, Unquantized};
use crate::config::{Attention, ModelConfig, Projection};
use crate::fingerprint::Fingerprint;
use crate::progress::Progress;
use crate::tensors::{norm_name, stored_modules};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights, Weight};

/// Norms that differ by less were only stored in another type (f16 has 2^-11).
const SAME_NORM: f32 = 1.0 / 256.0;

/// Rows that were not scaled all lose about the same to rounding and clipping; AWQ's scales spread over factors. Where
/// chance spreads the others, the function is still the model's: what divides a row multiplies the channel that it feeds.
const UNSCALED: f32 = 0.03;

/// The largest energy of `W_original − W_quantized` against that of both, `|W − Q|² / (|W|² + |Q|²)`, of two
/// matrices that belong together.
///
/// It is `1 − 2⟨W, Q⟩ / (|W|² + |Q|²)`: 1 for matrices that have nothing to do with each other, give or take
/// `2 / √weights`, and nearly 1 too where one is many times the other. Where rounding adds noise of `n` times the
/// energy of `W`, it is `n / (2 + n)`: 0.06 for 2 bits in the best places a row can have, 0.2 for 2 bits between the
/// smallest and the largest of 4096 normal weights (`n` ≈ 0.5). One half is noise of twice the energy of the weights,
/// more than any rounding to 2 bits leaves and half of what strangers have.
const RELATED: f64 = 0.5;

/// What to make.
#[derive(Debug, Clone, PartialEq)]
pub struct ResidualOptions {
    /// What the original reads while it is watched.
    pub calibration: Calibration,
    /// What the quantized model is called, for the record.
    pub source: String,
    /// Replace an existing checkpoint.
    pub overwrite: bool,
}

/// Makes a checkpoint at `out` of the weights of `quantized`, as they are, with residuals against `original` and
/// thresholds. Finished layers are kept in `OUT.partial` until the end; a job that was interrupted goes on from
/// there. Setting `stop` ends it soon, with [`super::Interrupted`]. Computes on the cores of this machine;
/// [`Device::residuals`](crate::device::Device::residuals) on any device.
///
/// # Errors
/// Models of different shapes or weights, an `original` that is not full precision or a `quantized` that is, an
/// existing `out`, tensors that cannot be read, a disk that is full. `out` is as it was then.
pub fn residuals(
    original: &dyn ModelWeights,
    quantized: &dyn ModelWeights,
    texts: &TextFiles,
    options: &ResidualOptions,
    out: &Path,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Report> {
    residuals_on(&Host, original, quantized, texts, options, out, stop, progress)
}

/// [`residuals`] on a device.
#[allow(clippy::too_many_arguments, reason = "those of `residuals`, and the device")]
pub(crate) fn residuals_on(
    on: &dyn Compute,
    original: &dyn ModelWeights,
    quantized: &dyn ModelWeights,
    texts: &TextFiles,
    options: &ResidualOptions,
    out: &Path,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Report> {
    let start = Instant::now();
    ensure_pair(original, quantized)?;
    let config = quantized.config();
    options.calibration.validate(config)?;
    // Said at once, not after calibration text was made.
    Pair::new(original, quantized, 0, Cow::Owned(Layer::read(original, 0)?), Cow::Owned(Inputs::default()))?;
    let manifest = Manifest::describe(quantized, options.source.clone(), options.calibration.describe())?;
    let manifest = Manifest { residual_bits: 4, ..manifest };
    let job_options = Options {
        backend: manifest.backend,
        bits: manifest.bits,
        group_size: manifest.group_size,
        awq: false,
        refine: Refine::None,
        calibration: options.calibration.clone(),
        source: options.source.clone(),
        overwrite: options.overwrite,
    };
    estimate::ensure_memory(config, &job_options, &manifest)?;
    CheckpointWriter::ensure_free(out, options.overwrite)?;
    progress.set_message("reading the models");
    let mut fingerprint = Fingerprint::default();
    fingerprint.model(quantized, stop)?;
    let key = job::key(original, texts, &manifest, &job_options, stop)?;
    let key = format!("residuals of {}\n{key}", fingerprint.digits());
    let writer = CheckpointWriter::create(out, &key, options.overwrite)?;
    let job = Job { on, source: original, options: &job_options, manifest: &manifest, writer: &writer, stop, progress };
    progress.set_length(job.work_once());
    let ids = job.calibration(texts)?;
    let bits: Vec<u32> = (0..config.layers.len()).filter_map(|layer| quantized.bits(layer)).collect();
    job.layers_once(&ids, &bits, |index, layer, entered| complete(&job, quantized, index, layer, entered))?;
    progress.set_message("writing");
    // Embedding and head are the quantized model's own.
    let rest = Unquantized::of(quantized)?;
    writer.finish(config, &manifest, &bits, &rest, texts)?;
    Ok(Report { manifest, bits, divergences: Vec::new(), tokens: ids.len(), elapsed: start.elapsed() })
}

/// The two models have the same layers.
fn ensure_pair(original: &dyn ModelWeights, quantized: &dyn ModelWeights) -> Result<()> {
    ensure!(original.bits(0).is_none(), "the original is quantized itself, a full-precision model is expected");
    ensure!(quantized.bits(0).is_some(), "the quantized model is full precision, quantize it first");
    let (a, b) = (original.config(), quantized.config());
    ensure!(
        a.layers.len() == b.layers.len(),
        "the original has {} layers, the quantized model {}: they are not the same model",
        a.layers.len(),
        b.layers.len()
    );
    for (layer, projection) in a.projections() {
        let (a, b) = (a.shape(layer, projection), b.shape(layer, projection));
        ensure!(
            a == b,
            "{projection} of layer {layer} has {} channels and {} rows in the original, {} and {} in the quantized \
             model: they are not the same model",
            a.0,
            a.1,
            b.0,
            b.1
        );
    }
    for layer in 0..a.layers.len() {
        let [own, theirs] = [describe(a, layer)?, describe(b, layer)?];
        ensure!(
            own == theirs,
            "layer {layer} of the original has {own}; of the quantized model, {theirs}: they are not the same model"
        );
    }
    Ok(())
}

/// What shapes of matrices leave open: `4 heads on 2 of width 16, norms input_layernorm [64], …`.
fn describe(config: &ModelConfig, layer: usize) -> Result<String> {
    let Attention { num_heads, num_kv_heads, head_dim, .. } = *config.layers[layer].attention();
    let norms = config.layers[layer].norms(config.hidden_size).into_iter();
    let norms: Result<Vec<_>> = norms.map(|(norm, len)| Ok(format!("{} [{len}]", config.family.norm(norm)?))).collect();
    Ok(format!("{num_heads} heads on {num_kv_heads} of width {head_dim}, norms {}", norms?.join(", ")))
}

/// A layer of `quantized` with what it lost of `layer`.
fn complete<'a>(
    job: &Job<'_>,
    quantized: &'a dyn ModelWeights,
    index: usize,
    layer: &Layer,
    entered: &[Box<dyn Entered + '_>; 4],
) -> Result<Made<'a>> {
    let inputs = entered.each_ref().map(|entered| entered.all().to_vec());
    let pair = Pair::new(job.source, quantized, index, Cow::Borrowed(layer), Cow::Owned(inputs))?;
    let entered = job.enter(&pair.layer, pair.inputs.into_owned())?;
    let finished = pair.linears.into_iter().zip(&pair.layer.linears).zip(&entered);
    let finished = finished.map(|((quantized, linear), x)| {
        ensure_running(job.stop)?;
        let Linear { weight, bias, .. } = quantized;
        Ok(Linear { bias, ..finish(linear, weight, x.thresholds()?, &vec![1.0; linear.in_features], None)? })
    });
    let finished: Vec<_> = finished.collect::<Result<_>>()?;
    let finished = finished.try_into().ok().context("four projections")?;
    Ok((pair.norms, finished))
}

/// A layer of the original, scaled as the quantized one was, and that one.
struct Pair<'a, 'b> {
    layer: Cow<'b, Layer>,
    inputs: Cow<'b, Inputs>,
    norms: Norms,
    linears: [Linear<'a>; 4],
}

impl<'a, 'b> Pair<'a, 'b> {
    /// # Errors
    /// Layers of models that have nothing to do with each other.
    fn new(
        original: &dyn ModelWeights,
        quantized: &'a dyn ModelWeights,
        index: usize,
        mut layer: Cow<'b, Layer>,
        mut inputs: Cow<'b, Inputs>,
    ) -> Result<Self> {
        let norms = quantized.norms(index)?;
        let linears = Projection::each(|projection| quantized.projection(index, projection))?;
        ensure_same_norms(original.config(), index, &layer, &norms)?;
        let mut feeding = Projection::ALL.iter().filter_map(|&p| layer.config.norm_before(p)).peekable();
        // Where no norm feeds a projection, none can tell whether anything is scaled.
        let alone = feeding.peek().is_none();
        if alone || feeding.any(|n| !same(layer.norm(n), &norms[n.index()])) {
            scale_alike(layer.to_mut(), inputs.to_mut(), &norms, &linears)?;
        }
        for (projection, theirs) in Projection::ALL.into_iter().zip(&linears) {
            let mut first = 0;
            for (name, rows) in stored_modules(original.config(), index, projection) {
                ensure_related(&name, layer.linear(projection), &theirs.weight, first..first + rows)?;
                first += rows;
            }
        }
        Ok(Self { layer, inputs, norms, linears })
    }
}

/// Checks that these rows, of the tensor `name`, are roughly what they were quantized to.
fn ensure_related(name: &str, own: &Affine, theirs: &Weight<'_>, rows: Range<usize>) -> Result<()> {
    let energies: Vec<[f64; 3]> = rows
        .into_par_iter()
        .map(|row| {
            let mut quantized = vec![0.0; own.in_features];
            theirs.row(row, &mut quantized);
            own.row(row).iter().zip(&quantized).fold([0.0; 3], |[a, b, lost], (&w, &q)| {
                let (w, q) = (f64::from(w), f64::from(q));
                [a + w * w, b + q * q, lost + (w - q) * (w - q)]
            })
        })
        .collect();
    let [own, theirs, lost] = [0, 1, 2].map(|i| energies.iter().map(|row| row[i]).sum::<f64>());
    // Weights that were rounded away altogether say nothing.
    let share = if own == 0.0 || theirs == 0.0 { 0.0 } else { lost / (own + theirs) };
    ensure!(
        share <= RELATED,
        "tensor {name}: what the quantized model lost of the original has {share:.2} of the energy of both, up to \
         {RELATED} is expected and 1 is what two unrelated models have: give the very model that was quantized"
    );
    Ok(())
}

/// Checks that norms that feed no projection are alike: no scale went into them.
fn ensure_same_norms(config: &ModelConfig, index: usize, layer: &Layer, theirs: &Norms) -> Result<()> {
    let feeding = Projection::ALL.map(|p| layer.config.norm_before(p));
    for (norm, _) in
        layer.config.norms(config.hidden_size).into_iter().filter(|(norm, _)| !feeding.contains(&Some(*norm)))
    {
        let (own, theirs) = (layer.norm(norm), &theirs[norm.index()]);
        let Some(k) = (0..own.len()).find(|&k| !same(&own[k..=k], &theirs[k..=k])) else { continue };
        bail!(
            "tensor {}: channel {k} is {} in the original and {} in the quantized model, the same is expected of a norm \
             that feeds no matrix: give the very model that was quantized",
            norm_name(config, index, norm)?,
            own[k],
            theirs[k]
        );
    }
    Ok(())
}

/// True if two norms are equal but for the type that they were stored in.
fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= SAME_NORM * a.abs().max(b.abs()))
}

/// Scales `layer` and what enters it as the quantized layer of these `norms` and `linears` was.
fn scale_alike(layer: &mut Layer, inputs: &mut Inputs, norms: &Norms, linears: &[Linear<'_>; 4]) -> Result<()> {
    let ratio = |own: &[f32], theirs: &[f32]| -> Result<Vec<f32>> {
        let scale = |(k, (own, theirs)): (usize, (&f32, &f32))| {
            let scale = if *own == 0.0 && *theirs == 0.0 { 1.0 } else { own / theirs };
            ensure!(
                scale.is_finite() && scale > 0.0,
                "the norm of channel {k} is {own} in the original and {theirs} in the quantized model, which no scale \
                 explains: they are not the same model"
            );
            Ok(scale)
        };
        own.iter().zip(theirs).enumerate().map(scale).collect()
    };
    for projection in Projection::ALL {
        if let Some(norm) = layer.config.norm_before(projection) {
            let scales = ratio(layer.norm(norm), &norms[norm.index()])?;
            awq::apply(layer, projection, &scales, &mut inputs[projection.index()]);
        }
    }
    let of_rows = |layer: &Layer, projection: Projection, first: usize| {
        let (own, theirs) = (layer.linear(projection), &linears[projection.index()].weight);
        row_scales(|row| own.row(row), theirs, first)
    };
    if let Some(scales) = of_rows(layer, Projection::GateUp, layer.config.intermediate_size()) {
        awq::apply(layer, Projection::Down, &scales, &mut inputs[Projection::Down.index()]);
    }
    let Attention { num_heads, num_kv_heads, head_dim: d, .. } = *layer.config.attention();
    if let Some(by_value) = of_rows(layer, Projection::Qkv, (num_heads + num_kv_heads) * d) {
        let shared = num_heads / num_kv_heads;
        let scales: Vec<f32> = (0..num_heads * d).map(|i| by_value[i / d / shared * d + i % d]).collect();
        awq::apply(layer, Projection::O, &scales, &mut inputs[Projection::O.index()]);
    }
    Ok(())
}

/// What the rows from `first` on were divided by before they were quantized; `None` if they were not.
fn row_scales<'a>(own: impl Fn(usize) -> &'a [f32] + Sync, theirs: &Weight<'_>, first: usize) -> Option<Vec<f32>> {
    let scales: Vec<f32> = (first..theirs.out_features())
        .into_par_iter()
        .map(|row| {
            let own = own(row);
            let mut quantized = vec![0.0; own.len()];
            theirs.row(row, &mut quantized);
            let squares: f64 = own.iter().map(|&w| f64::from(w).powi(2)).sum();
            let product: f64 = own.iter().zip(&quantized).map(|(&w, &q)| f64::from(w) * f64::from(q)).sum();
            // A row of zeros, or one that was rounded away, says nothing.
            if product > 0.0 { (squares / product) as f32 } else { 1.0 }
        })
        .collect();
    let median = |mut values: Vec<f32>| {
        let middle = values.len() / 2;
        *values.select_nth_unstable_by(middle, f32::total_cmp).1
    };
    let usual = median(scales.clone());
    let off = median(scales.iter().map(|s| (s / usual - 1.0).abs()).collect());
    (off > UNSCALED).then_some(scales)
}
