//! From full precision to a checkpoint, one layer at a time (spec §2).
//!
//! Calibration texts go through the layers in full precision. What enters a layer's projections says which
//! channels matter; the layer is quantized, what that lost is quantized to 4 bits, and both go to disk before
//! the next layer is read. Memory holds one layer in f32, the texts' activations, and a few copies of one matrix.
//!
//! Each weight's best code by itself is only where quantization begins: codes, and what they stand for, are then
//! fitted to what a projection puts out beside the compensation that will be there ([`Refine`]), and in the end, all
//! layers together, to what full precision says.

mod attention;
mod awq;
pub(crate) mod backward;
pub(crate) mod calibrate;
mod calibration;
pub(crate) mod compute;
mod divergence;
mod estimate;
pub(crate) mod exponential;
mod fit;
#[cfg(test)]
pub(crate) mod fixture;
pub(crate) mod forward;
pub(crate) mod gram;
pub(crate) mod head;
mod host;
mod job;
mod mixed;
mod openings;
mod polish;
mod product;
mod reading;
pub(crate) mod refine;
pub(crate) mod regress;
mod residuals;
pub(crate) mod sample;
mod scripts;
mod sqllm;
mod storable;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use crate::checkpoint::{BitWidth, CheckpointWriter, FORMAT_VERSION, Manifest, Unquantized};
use crate::config::{ModelConfig, Projection};
use crate::dec::CHUNK;
use crate::format::lutgemm::ensure_group_size;
use crate::format::{Dense, Floats, Format, Residual};
use crate::interrupted::ensure_running;
use crate::progress::Progress;
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights, Weight};

pub use crate::interrupted::Interrupted;
pub use calibration::{Calibration, Own, Text};
use compute::{Compute, Entered};
pub use estimate::{Estimate, estimate};
pub(crate) use estimate::{estimate_on_gpu, gpu};
use fit::Fit;
use forward::{Affine, Layer, Norms};
pub use head::head;
pub(crate) use host::Host;
use job::Job;
pub use reading::read_text;
use regress::Together;
pub(crate) use residuals::residuals_on;
pub use residuals::{ResidualOptions, residuals};
pub use scripts::one_script;

/// What to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// How weights are stored.
    pub backend: Format,
    /// Bits of a weight.
    pub bits: BitWidth,
    /// Channels of a group, for [`Format::LutGemm`]; `None` takes the largest of 128, 64, 32 that fits.
    pub group_size: Option<usize>,
    /// For [`Format::LutGemm`]: AWQ's scales and clipping; without, plain rounding.
    pub awq: bool,
    /// What codes are fitted to.
    pub refine: Refine,
    /// What the model reads while it is watched.
    pub calibration: Calibration,
    /// What the model was made from, for the record.
    pub source: String,
    /// Replace an existing checkpoint.
    pub overwrite: bool,
}

/// What codes, and the weights that they stand for, are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refine {
    /// The weights, each by itself.
    None,
    /// What a projection puts out.
    Output,
    /// What a projection puts out once it is compensated.
    Compensated {
        /// Channels of 1024 that will be compensated, for qkv, o, gate-up and down: in layers of the width asked for, and,
        /// where half of the layers have one bit more, in those.
        k_chunks: [[usize; 4]; 2],
    },
}

impl Refine {
    /// For `k_chunk` 8 everywhere.
    pub const DEFAULT: Self = Self::Compensated { k_chunks: [[8; 4]; 2] };

    /// What will be compensated in layers of `bits`, where the model has `all`.
    fn k_chunks(self, bits: u32, all: BitWidth) -> [usize; 4] {
        match self {
            Self::None | Self::Output => [0; 4],
            Self::Compensated { k_chunks } => k_chunks[usize::from(bits > all.low())],
        }
    }

    /// For the record.
    fn describe(self, bits: BitWidth) -> String {
        match self {
            Self::None => String::new(),
            Self::Output => ", refined for no compensation".into(),
            Self::Compensated { k_chunks: [low, high] } => {
                let spell = |k_chunks: [usize; 4]| k_chunks.map(|k| k.to_string()).join(" ");
                let raised =
                    if bits.is_mixed() && low != high { format!(" and {}", spell(high)) } else { String::new() };
                format!("{REFINED_FOR}{}{raised}", spell(low))
            }
        }
    }
}

const REFINED_FOR: &str = ", refined for k_chunk ";

/// What a checkpoint of this `calibration` ([`Manifest::calibration`]) was made to be compensated with: `k_chunk` of qkv,
/// o, gu and d in the layers with fewest bits and in those with most; `None` where its codes were fitted to weights alone.
pub fn made_for(calibration: &str) -> Option<[[usize; 4]; 2]> {
    if calibration.contains(", refined for no compensation") {
        return Some([[0; 4]; 2]);
    }
    let (_, k_chunks) = calibration.rsplit_once(REFINED_FOR)?;
    let k_chunks = k_chunks.split(',').next()?;
    let set = |text: &str| -> Option<[usize; 4]> {
        let k_chunk = |k: &str| k.parse().ok().filter(|k| *k <= CHUNK);
        text.split(' ').map(k_chunk).collect::<Option<Vec<usize>>>()?.try_into().ok()
    };
    let (low, high) = k_chunks.split_once(" and ").unwrap_or((k_chunks, k_chunks));
    Some([set(low)?, set(high)?])
}

/// What was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What the checkpoint says of itself.
    pub manifest: Manifest,
    /// Bits of every layer.
    pub bits: Vec<u32>,
    /// For mixed widths: mean KL divergence, in nats, from full precision with this one layer raised and all
    /// others not; empty otherwise.
    pub divergences: Vec<f64>,
    /// Calibration tokens.
    pub tokens: usize,
    /// Time of this run.
    pub elapsed: Duration,
}

/// Makes a checkpoint of `source` at `out`. Finished layers are kept in `OUT.partial` until the end; a job that was
/// interrupted goes on from there. Setting `stop` ends it soon, with [`Interrupted`].
///
/// # Errors
/// Options that do not fit the model, an existing `out`, a source that cannot be read, a disk that is full. `out`
/// is as it was then.
pub fn quantize(
    source: &dyn ModelWeights,
    texts: &TextFiles,
    options: &Options,
    out: &Path,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Report> {
    quantize_on(&Host, source, texts, options, out, stop, progress)
}

/// [`quantize`] on a device.
pub(crate) fn quantize_on(
    on: &dyn Compute,
    source: &dyn ModelWeights,
    texts: &TextFiles,
    options: &Options,
    out: &Path,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Report> {
    let start = Instant::now();
    let config = source.config();
    ensure!(source.bits(0).is_none(), "the source is already quantized, a full-precision model is expected");
    let manifest = plan(config, options)?;
    estimate::ensure_memory(config, options, &manifest)?;
    CheckpointWriter::ensure_free(out, options.overwrite)?;
    progress.set_message("reading the model");
    let key = job::key(source, texts, &manifest, options, stop)?;
    let writer = CheckpointWriter::create(out, &key, options.overwrite)?;
    let job = Job { on, source, options, manifest: &manifest, writer: &writer, stop, progress };
    progress.set_length(job.work());
    let ids = job.calibration(texts)?;
    job.layers(&ids)?;
    let (bits, divergences) = match manifest.bits.is_mixed() {
        true => job.chosen(&ids)?,
        false => (vec![manifest.bits.low(); config.layers.len()], Vec::new()),
    };
    if job.trains_codebooks() {
        polish::polish(&job, &ids, &bits)?;
    }
    progress.set_message("writing");
    let rest = unquantized(source)?;
    writer.finish(config, &manifest, &bits, &rest, texts)?;
    Ok(Report { manifest, bits, divergences, tokens: ids.len(), elapsed: start.elapsed() })
}

/// Checks the options against the model and settles what they leave open.
fn plan(config: &ModelConfig, options: &Options) -> Result<Manifest> {
    options.calibration.validate(config)?;
    if let Refine::Compensated { k_chunks } = options.refine {
        for k in k_chunks.concat() {
            ensure!(k <= CHUNK, "--for-k-chunks has {k}, 0 to {CHUNK} are allowed");
        }
    }
    for (layer, projection) in config.projections() {
        let (inputs, outputs) = config.shape(layer, projection);
        ensure!(
            inputs.is_multiple_of(32) && outputs.is_multiple_of(8),
            "{projection} of layer {layer} has {inputs} input channels and {outputs} rows, multiples of 32 and 8 are \
             expected: this model cannot be quantized"
        );
    }
    let group_size = if options.backend.is_grouped() {
        Some(group_size(config, options.group_size)?)
    } else {
        ensure!(options.group_size.is_none(), "a group size is for --backend lutgemm, ap has one codebook per row");
        None
    };
    Ok(Manifest {
        version: FORMAT_VERSION,
        backend: options.backend,
        bits: options.bits,
        group_size,
        residual_bits: 4,
        source: options.source.clone(),
        calibration: format!("{}{}", options.calibration.describe(), options.refine.describe(options.bits)),
    })
}

/// The group size asked for, or the largest usual one, that tiles every projection's input.
fn group_size(config: &ModelConfig, asked: Option<usize>) -> Result<usize> {
    let inputs: BTreeSet<usize> = config.projections().map(|(layer, p)| config.shape(layer, p).0).collect();
    let fits = |group: usize| inputs.iter().all(|&inputs| ensure_group_size(inputs, group).is_ok());
    let usual: Vec<usize> = [128, 64, 32].into_iter().filter(|&g| fits(g)).collect();
    let listed =
        |numbers: &mut dyn Iterator<Item = &usize>, and| numbers.map(usize::to_string).collect::<Vec<_>>().join(and);
    match asked {
        None => usual.first().copied().context("no group size of 128, 64 or 32 divides the model's input channels"),
        Some(group) if fits(group) => Ok(group),
        Some(group) => bail!(
            "group size {group} does not divide {} input channels in multiples of 32, use --group-size {}",
            listed(&mut inputs.iter(), " and "),
            listed(&mut usual.iter(), " or ")
        ),
    }
}

/// Quantizes one layer to `bits`, from what `entered` its projections: norms and projections as they are stored.
fn quantize_layer(
    job: &Job<'_>,
    bits: u32,
    layer: &Layer,
    entered: &[Box<dyn Entered + '_>; 4],
) -> Result<(Norms, [Linear<'static>; 4])> {
    let (group_size, bits) = (job.manifest.group_size, bits as usize);
    let (mut layer, mut scaled) = (Cow::Borrowed(layer), None);
    let awq = job.options.awq;
    if let (Some(group_size), true) = (group_size, awq) {
        let mut inputs = entered.each_ref().map(|entered| entered.all().to_vec());
        awq::scale(layer.to_mut(), &mut inputs, bits, group_size);
        scaled = Some(job.enter(&layer, inputs)?);
    }
    let entered = scaled.as_ref().unwrap_or(entered);
    let linears = Projection::each(|projection| {
        ensure_running(job.stop)?;
        let (linear, x) = (layer.linear(projection), &*entered[projection.index()]);
        if let Some(fit) = Fit::new(job, bits, projection) {
            return fit.quantize(linear, x);
        }
        let weight = match group_size {
            None => sqllm::quantize(linear, bits, &x.energy()?)?,
            Some(group_size) => awq::quantize(linear, bits, group_size, awq.then(|| x.all()))?,
        };
        finish(linear, weight, x.thresholds()?, &vec![1.0; linear.in_features], None)
    })?;
    Ok((layer.norms.clone(), linears))
}

/// Adds what compensation needs: the residual against what is stored and the thresholds of what comes in. An error in
/// channel `k` of the residual counts `importance[k]` times its square; what the taken channels predict of the others is
/// corrected too, where it is known which are `taken` of what entered.
fn finish<'a>(
    linear: &Affine,
    weight: Weight<'a>,
    thresholds: Vec<f32>,
    importance: &[f32],
    taken: Option<(Together, &dyn Entered)>,
) -> Result<Linear<'a>> {
    let mut lost = lost(linear, &weight);
    if let Some((taken, x)) = taken {
        taken.regress(|across, triangle, lost| x.predicted(across, triangle, lost), &mut lost)?;
    }
    let residual = Some(Residual::quantize_weighted(linear.in_features, linear.out_features, &lost, importance)?);
    let bias = linear.bias.clone().map(Cow::Owned);
    Ok(Linear { weight, bias, residual, thresholds: Some(Cow::Owned(thresholds)) })
}

/// `linear − weight`, `[out_features, in_features]`.
fn lost(linear: &Affine, weight: &Weight<'_>) -> Vec<f32> {
    let mut lost = vec![0.0; linear.weight.len()];
    lost.par_chunks_exact_mut(linear.in_features).enumerate().for_each(|(row, lost)| {
        weight.row(row, lost);
        lost.iter_mut().zip(linear.row(row)).for_each(|(lost, w)| *lost = w - *lost);
    });
    lost
}

/// What stays as it is. Single precision becomes half precision where that only rounds.
fn unquantized(source: &dyn ModelWeights) -> Result<Unquantized<'_>> {
    let rest = Unquantized::of(source)?;
    Ok(Unquantized { embedding: halved(rest.embedding), head: rest.head.map(halved), ..rest })
}

/// The same in half precision, unless a row would overflow or vanish: the norm behind an embedding makes up for any
/// scale, so that a row of numbers around 1e-9 says as much as one around 1.
fn halved(dense: Dense<'_>) -> Dense<'_> {
    /// Rounding a number to 11 bits takes 2^-22 of its energy at most; numbers below half precision's normal range may
    /// take as much again, and some more.
    const ROUNDED: f64 = 1.0 / (1 << 20) as f64;
    let Floats::F32(values) = &dense.values else { return dense };
    let only_rounds = |row: &[f32]| {
        let (lost, all) = row.iter().fold((0.0, 0.0), |(lost, all), &x| {
            let error = f64::from(half::f16::from_f32(x).to_f32()) - f64::from(x);
            (lost + error * error, all + f64::from(x) * f64::from(x))
        });
        lost <= ROUNDED * all
    };
    if !values.par_chunks_exact(dense.in_features).all(only_rounds) {
        return dense;
    }
    let halves: Vec<_> = values.par_iter().map(|&x| half::f16::from_f32(x)).collect();
    Dense { values: halves.into(), ..dense }
}
