//! One file for each command: arguments in, library calls, results out.

pub(crate) mod devices;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod profile;
pub(crate) mod quantize;
pub(crate) mod tune;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use decdec::backend::DecodeBackend;
use decdec::dec::Selection;
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::weights::ModelWeights;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::RunArgs;

/// `n_tb` and `k_chunk` where neither the user nor a tuned file says otherwise.
const DEFAULT_COMPENSATION: LayerCompensation = LayerCompensation { n_tb: 8, k_chunks: [8; 4] };

/// The program was interrupted; what could be saved has been.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Becomes true at the first Ctrl-C; a second one ends the program at once.
pub(crate) fn interrupt_flag() -> Result<&'static AtomicBool> {
    static FLAG: AtomicBool = AtomicBool::new(false);
    static INSTALLED: OnceLock<()> = OnceLock::new();
    if INSTALLED.set(()).is_ok() {
        let handler = || {
            if FLAG.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        };
        ctrlc::set_handler(handler).context("cannot listen for ctrl-c")?;
    }
    Ok(&FLAG)
}

/// A bar on stderr that knows the time left; hidden off a terminal.
pub(crate) fn progress(len: usize, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}").expect("a valid template");
    ProgressBar::new(len as u64).with_style(style).with_message(what)
}

/// Uploads a model layer by layer, with a bar.
pub(crate) fn load<'b, B: DecodeBackend>(backend: &'b B, weights: &dyn ModelWeights) -> Result<Model<'b, B>> {
    let bar = progress(weights.config().num_layers, "loading");
    let model = Model::load(backend, weights, |layers| bar.set_position(layers as u64))?;
    bar.finish_and_clear();
    Ok(model)
}

/// How a model is to be compensated, from the flags; says on stderr what it chose for lack of them.
///
/// # Errors
/// Counts that do not fit the model's bit widths, `k_chunk` above 1024, `n_tb` above what the device holds.
pub(crate) fn compensation<B: DecodeBackend>(model: &Model<'_, B>, args: &RunArgs) -> Result<Option<Compensation>> {
    let widths = model.bit_widths();
    if widths.is_empty() {
        let given = args.k_chunks.iter().flatten().any(|&k| k > 0);
        ensure!(!given, "--k-chunks is given, but a full-precision model has nothing to compensate, leave it out");
        return Ok(None);
    }
    let max = model.backend().device().max_n_tb;
    let n_tbs = args.n_tbs.clone().unwrap_or_else(|| vec![DEFAULT_COMPENSATION.n_tb.min(max)]);
    if let Some(n_tb) = n_tbs.iter().find(|&&n| n == 0 || n > max) {
        bail!("--n-tbs is {n_tb}, 1 to {max} are allowed on {}", model.backend().device().id);
    }
    let k_chunks = args.k_chunks.clone().unwrap_or_else(|| DEFAULT_COMPENSATION.k_chunks.to_vec());
    if let Some(k) = k_chunks.iter().find(|&&k| k > decdec::dec::CHUNK) {
        bail!("--k-chunks has {k}, 0 to {} are allowed", decdec::dec::CHUNK);
    }
    ensure!(
        k_chunks.len() == 4 || k_chunks.len() == 4 * widths.len(),
        "--k-chunks has {} numbers, {} are expected: one each for qkv, o, gu, d{}",
        k_chunks.len(),
        if widths.len() == 1 { "4".into() } else { format!("4 or {}", 4 * widths.len()) },
        if widths.len() == 1 { "" } else { ", for each bit width" },
    );
    ensure!(
        n_tbs.len() == 1 || n_tbs.len() == widths.len(),
        "--n-tbs has {} numbers, 1 or {} are expected: one for all layers or one for each bit width",
        n_tbs.len(),
        widths.len()
    );
    let sets = n_tbs.len().max(k_chunks.len() / 4);
    let by_bits: Vec<_> = (0..sets)
        .map(|i| LayerCompensation {
            n_tb: n_tbs[i.min(n_tbs.len() - 1)],
            k_chunks: std::array::from_fn(|p| k_chunks[(4 * i + p) % k_chunks.len()]),
        })
        .collect();
    if args.n_tbs.is_none() || args.k_chunks.is_none() {
        tracing::info!("compensating with n_tb {n_tbs:?}, k_chunk {k_chunks:?} (not tuned for this device)");
    }
    let selection: Selection = args.selection.into();
    Ok(Some(Compensation { by_bits, selection }))
}

/// A plain table for stdout.
pub(crate) fn table() -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    table
}
