//! `decdec convert` and `decdec residuals`

use std::path::Path;

use anyhow::{Context, Result, bail};
use decdec::checkpoint::BitWidth;
use decdec::convert;
use decdec::open::Opened;
use decdec::quantize::{self, ResidualOptions};
use decdec::source::Source;

use crate::cli::{CalibrationArgs, ConvertArgs, OutArgs, ResidualsArgs};

/// Runs `decdec convert`.
pub(crate) fn convert(args: &ConvertArgs) -> Result<()> {
    let opened = open(&args.path, args.width.bitwidth)?;
    if let Some(original) = &args.original {
        return complete(original, &opened, &args.to, &args.calibration);
    }
    if !args.calibration.calib.is_empty() {
        bail!("--calib is for --original, which makes residuals and thresholds: give both or neither");
    }
    let stop = super::interrupt::stop_flag(quantize::Interrupted);
    let bar = super::Bar::new(0, "converting");
    let manifest = super::resumable(convert::convert(&opened, &args.to.out, args.to.overwrite, stop, &bar))?;
    drop(bar);
    tracing::info!(
        "converted {} layers ({} {} bits) into {}",
        opened.weights().config().layers.len(),
        manifest.backend,
        manifest.bits,
        args.to.out.display()
    );
    if !manifest.has_residuals() {
        tracing::info!("there are no residuals: give --original SOURCE to make them");
    }
    Ok(())
}

/// Runs `decdec residuals`.
pub(crate) fn residuals(args: &ResidualsArgs) -> Result<()> {
    let opened = open(&args.quantized, args.width.bitwidth)?;
    complete(&args.original, &opened, &args.to, &args.calibration)
}

/// The quantized model, in the precision that was asked for.
fn open(path: &Path, bits: Option<BitWidth>) -> Result<Opened> {
    let opened = Opened::open(path, bits, false)?.quantized()?;
    opened.expect(None, bits, None)?;
    Ok(opened)
}

/// Writes the quantized weights with residuals and thresholds against `original`.
fn complete(original: &Path, opened: &Opened, to: &OutArgs, args: &CalibrationArgs) -> Result<()> {
    let source = Source::open(original)?;
    let weights = opened.weights();
    let texts = opened.texts().context("the quantized model has no tokenizer")?;
    let device = super::devices::quantizing(args)?;
    let options = ResidualOptions {
        calibration: super::quantize::calibration(args, &device, texts, weights.config())?,
        source: opened.manifest().map_or(opened.name(), |manifest| &manifest.source).to_owned(),
        overwrite: to.overwrite,
    };
    let stop = super::interrupt::stop_flag(quantize::Interrupted);
    let bar = super::Bar::new(0, "");
    let report = super::resumable(device.residuals(&source, weights, texts, &options, &to.out, stop, &bar))?;
    drop(bar);
    tracing::info!(
        "made residuals and thresholds of {} layers in {:.1} s ({} calibration tokens) into {}",
        report.bits.len(),
        report.elapsed.as_secs_f64(),
        report.tokens,
        to.out.display()
    );
    Ok(())
}
