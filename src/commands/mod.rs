//! One file for each command: arguments in, library calls, results out.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod convert;
pub(crate) mod devices;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod interrupt;
pub(crate) mod locate;
pub(crate) mod profile;
pub(crate) mod quantize;
pub(crate) mod run;
#[cfg(feature = "serve")]
pub(crate) mod serve;
pub(crate) mod tune;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use decdec::backend::{DeviceInfo, KvBits};
use decdec::config::{ModelConfig, Projection};
use decdec::device::Device;
use decdec::engine::{self, Compensate, Engine};
use decdec::format::{Format, Storage};
use decdec::model::LayerCompensation;
use decdec::open::Opened;
use decdec::progress::Progress;
use decdec::random::RandomWeights;
use decdec::tokenizer::{TextReader, Tokenizer};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{ModelArgs, RunArgs};

/// The result of a job that goes on where it was interrupted: that it was is said once, as a note, and ends the
/// program with its own exit code.
pub(crate) fn resumable<T>(result: Result<T>) -> Result<T> {
    result.map_err(|error| match error.is::<decdec::quantize::Interrupted>() {
        true => {
            tracing::info!("{error}");
            interrupt::Interrupted.into()
        }
        false => error,
    })
}

/// A bar on stderr that knows the time left; hidden off a terminal. It goes when it is dropped.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new(steps: usize, what: &'static str) -> Self {
        let style = ProgressStyle::with_template("{msg:<24} {wide_bar} {percent:>3} %, {eta} left");
        Self(ProgressBar::new(steps as u64).with_style(style.expect("a valid template")).with_message(what))
    }

    /// A bar whose steps are bytes.
    #[cfg(feature = "hub")]
    pub(crate) fn of_bytes() -> Self {
        let template = "{msg:<24} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(template).expect("a valid template");
        Self(ProgressBar::new(0).with_style(style))
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Progress for Bar {
    fn set_length(&self, steps: u64) {
        self.0.set_length(steps);
    }

    fn set_message(&self, what: &str) {
        self.0.set_message(what.to_owned());
    }

    fn inc(&self, steps: u64) {
        self.0.inc(steps);
    }

    fn reset_eta(&self) {
        self.0.reset_eta();
    }
}

/// The engine of a run, for texts of at most `max_seq_len` tokens, loaded layer by layer with a bar; `text` says
/// whether tokens are to become text, `otherwise` how the model is compensated where no flag does.
///
/// # Errors
/// Those of [`Engine::load`] and [`asked`].
pub(crate) fn engine<'d>(
    device: &'d Device,
    opened: &Opened,
    args: &RunArgs,
    max_seq_len: usize,
    text: bool,
    otherwise: Compensate,
) -> Result<Engine<'d>> {
    load(device, opened, &options(device, opened, args, max_seq_len, text, otherwise)?)
}

/// How the flags of a run set an engine up.
///
/// # Errors
/// Those of [`asked`].
pub(crate) fn options(
    device: &Device,
    opened: &Opened,
    args: &RunArgs,
    max_seq_len: usize,
    text: bool,
    otherwise: Compensate,
) -> Result<engine::Options> {
    Ok(engine::Options {
        max_seq_len: Some(max_seq_len),
        compensate: asked(opened, device.info(), args, otherwise)?,
        selection: args.on.selection.into(),
        head_bits: args.head_bits,
        kv_bits: if args.kv_bits == 8 { KvBits::Eight } else { KvBits::Whole },
        text,
        ..engine::Options::default()
    })
}

/// An engine, loaded layer by layer with a bar.
///
/// # Errors
/// Those of [`Engine::load`].
pub(crate) fn load<'d>(device: &'d Device, opened: &Opened, options: &engine::Options) -> Result<Engine<'d>> {
    Ok(Engine::load(device, opened, options, &Bar::new(0, "loading"))?)
}

/// How the flags say that a model is compensated: a set for all layers, or one for each bit width; `otherwise` where none
/// does.
///
/// # Errors
/// Counts that do not fit the model's bit widths, `n_tb` above what the device holds, anything for a full-precision
/// model.
fn asked(opened: &Opened, device: &DeviceInfo, args: &RunArgs, otherwise: Compensate) -> Result<Compensate> {
    let weights = opened.weights();
    let widths = decdec::model::widths((0..weights.config().layers.len()).map(|layer| weights.bits(layer)));
    if widths.is_empty() {
        let given = args.k_chunks.iter().flatten().any(|&k| k > 0) || args.tuned.is_some();
        ensure!(!given, "a full-precision model has nothing to compensate, leave --k-chunks and --tuned out");
        return Ok(Compensate::Off);
    }
    if args.n_tbs.is_none() && args.k_chunks.is_none() {
        return Ok(args.tuned.clone().map_or(otherwise, Compensate::File));
    }
    let sets = by_flags(&widths, device, args)?;
    if args.n_tbs.is_none() || args.k_chunks.is_none() {
        tracing::info!("compensating with {} (not tuned for this device)", LayerCompensation::spelled(&sets));
    }
    Ok(Compensate::Sets(sets))
}

/// One set of `n_tb` and `k_chunk` for all layers, or one for each bit width.
fn by_flags(widths: &[u32], device: &DeviceInfo, args: &RunArgs) -> Result<Vec<LayerCompensation>> {
    let max = device.max_n_tb;
    let default = LayerCompensation::by_default(device);
    let n_tbs = args.n_tbs.clone().unwrap_or_else(|| vec![default.n_tb]);
    if let Some(n_tb) = n_tbs.iter().find(|&&n| n == 0 || n > max) {
        bail!("--n-tbs is {n_tb}, 1 to {max} are allowed on {}", device.id);
    }
    let k_chunks = args.k_chunks.clone().unwrap_or_else(|| default.k_chunks.to_vec());
    ensure!(
        k_chunks.len() == 4 || k_chunks.len() == 4 * widths.len(),
        "--k-chunks has {} numbers, {} are expected: one each for qkv, o, gu, d{}",
        k_chunks.len(),
        if widths.len() == 1 { "4".into() } else { format!("4 or {}", 4 * widths.len()) },
        if widths.len() == 1 { "" } else { ", for each bit width" },
    );
    ensure!(
        n_tbs.len() == 1 || n_tbs.len() == widths.len(),
        "--n-tbs has {} numbers, {} expected: one for all layers{}",
        n_tbs.len(),
        if widths.len() == 1 { "1 is".into() } else { format!("1 or {} are", widths.len()) },
        if widths.len() == 1 { "" } else { " or one for each bit width" },
    );
    let set = |i: usize| LayerCompensation {
        n_tb: n_tbs[i.min(n_tbs.len() - 1)],
        k_chunks: std::array::from_fn(|p| k_chunks[(4 * i + p) % k_chunks.len()]),
    };
    Ok((0..n_tbs.len().max(k_chunks.len() / 4)).map(set).collect())
}

/// The model that is named, or for `random:SEED` one of random numbers with the shapes of the named preset.
pub(crate) fn open(args: &ModelArgs, compat_scale_order: bool) -> Result<Opened> {
    let (path, name) = (args.named.checkpoint_path.as_path(), args.named.model_name.as_deref());
    let (backend, bits) = (args.backend, args.width.bitwidth);
    let Some(seed) = random_seed(path)? else {
        return locate::open(path, bits, compat_scale_order);
    };
    let (Some(name), Some(backend), Some(bits)) = (name, backend, bits) else {
        bail!("random weights need --model-name, --backend and --bitwidth");
    };
    let presets = ModelConfig::PRESETS.join(", ");
    let config = ModelConfig::preset(name).with_context(|| format!("--model-name is {name}, {presets} are known"))?;
    ensure!(!bits.is_mixed(), "--bitwidth is {bits}, random weights have the same bits in every layer");
    let weights = random(config, backend, bits.low() as usize, seed)?;
    Ok(Opened::random(weights, backend, bits, name))
}

/// The seed of `random:SEED`; none where the path is another one.
pub(crate) fn random_seed(path: &Path) -> Result<Option<u64>> {
    let Some(seed) = path.to_str().and_then(|path| path.strip_prefix("random:")) else { return Ok(None) };
    let number = seed.parse().ok();
    Ok(Some(number.with_context(|| format!("random:{seed}, a whole number is expected, as in random:0"))?))
}

/// A random model of `config`'s shapes; groups are the largest that divide.
pub(crate) fn random(config: ModelConfig, format: Format, bits: usize, seed: u64) -> Result<RandomWeights> {
    let divides = |&group: &usize| Projection::ALL.iter().all(|&p| config.shape(0, p).0.is_multiple_of(group));
    let largest = || [128, 64, 32].into_iter().find(divides).context("no group size of 32 or more divides");
    let group_size = format.is_grouped().then(largest).transpose()?;
    RandomWeights::new(config, Storage { format, group_size }, bits, seed)
}

/// The first `wanted` tokens of a text file, and perhaps some more; all, if there are fewer. No more is read than
/// that takes.
pub(crate) fn read_tokens(path: &Path, tokenizer: &Tokenizer, wanted: usize) -> Result<Vec<u32>> {
    let cannot = || format!("cannot read the text {}", path.display());
    let file = std::fs::File::open(path).with_context(cannot)?;
    tokenizer.encode_first(&mut TextReader::new(file), wanted).with_context(cannot)
}

/// A plain table for stdout.
pub(crate) fn table() -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    table
}
