//! `decdec quantize`

use std::path::Path;

use anyhow::{Result, bail, ensure};
use decdec::config::ModelConfig;
use decdec::device::Device;
use decdec::quantize::{Calibration, Options, Own, Refine, one_script, read_text};
use decdec::source::Source;
use decdec::tokenizer::{TextFiles, Tokenizer};
use decdec::tuned::Tuned;
use decdec::weights::ModelWeights;

use super::interrupt::stop_flag;
use crate::cli::{CalibrationArgs, QuantizeArgs, RefineArg};
use crate::output;

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs) -> Result<()> {
    let source = Source::open(&super::locate::path(&args.source)?)?;
    let device = super::devices::quantizing(&args.calibration)?;
    let options = Options {
        backend: args.backend,
        bits: args.bitwidth,
        group_size: args.group_size,
        awq: !args.no_awq,
        refine: refine(args, source.config())?,
        calibration: calibration(&args.calibration, &device, source.texts(), source.config())?,
        source: args.source.file_name().unwrap_or(args.source.as_os_str()).to_string_lossy().into_owned(),
        overwrite: args.to.overwrite,
    };
    if args.dry_run {
        return dry_run(&source, &options, &device);
    }
    let stop = stop_flag(decdec::quantize::Interrupted);
    let bar = super::Bar::new(0, "");
    let report = super::resumable(device.quantize(&source, source.texts(), &options, &args.to.out, stop, &bar))?;
    drop(bar);
    tracing::info!(
        "quantized {} layers in {:.1} s ({} calibration tokens) into {}",
        report.bits.len(),
        report.elapsed.as_secs_f64(),
        report.tokens,
        args.to.out.display()
    );
    if let Some(peak) = decdec::host::peak_memory() {
        tracing::info!("peak memory {} MB", peak / 1_000_000);
    }
    Ok(())
}

/// Prints what the job would take and leave.
fn dry_run(source: &Source, options: &Options, device: &Device) -> Result<()> {
    let estimate = device.estimate(source.config(), options)?;
    let megabytes = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
    let mut table = super::table();
    table.add_row(["weights, on the device".into(), megabytes(estimate.device_bytes)]);
    table.add_row(["residuals and thresholds, on the host".into(), megabytes(estimate.host_bytes)]);
    table.add_row(["disk while it is made".into(), megabytes(estimate.disk_bytes)]);
    table.add_row(["memory while it is made, mapped files aside".into(), megabytes(estimate.memory_bytes)]);
    table.add_row(["memory of a GPU that makes it, at most".into(), megabytes(estimate.gpu_bytes)]);
    table.add_row([format!("time on {}", device.info().id), format!("{:.0} s", estimate.time.as_secs_f64())]);
    output::line(&table)
}

fn refine(args: &QuantizeArgs, config: &ModelConfig) -> Result<Refine> {
    let chosen = args.for_k_chunks.is_some() || args.for_tuned.is_some();
    ensure!(
        !chosen || args.refine == RefineArg::Compensated,
        "--for-k-chunks and --for-tuned are for --refine compensated, leave them out or choose that"
    );
    Ok(match (args.refine, &args.for_k_chunks, &args.for_tuned) {
        (RefineArg::None, ..) => Refine::None,
        (RefineArg::Output, ..) => Refine::Output,
        (RefineArg::Compensated, _, Some(path)) => Refine::Compensated { k_chunks: tuned(path, args, config)? },
        (RefineArg::Compensated, Some(k), None) => Refine::Compensated { k_chunks: [std::array::from_fn(|i| k[i]); 2] },
        (RefineArg::Compensated, None, None) => {
            tracing::info!(
                "codes are fitted for k_chunk 8 of all projections (--for-k-chunks or --for-tuned say otherwise)"
            );
            Refine::DEFAULT
        }
    })
}

/// What was tuned for this model, for each of its widths; of several devices, the first.
fn tuned(path: &Path, args: &QuantizeArgs, config: &ModelConfig) -> Result<[[usize; 4]; 2]> {
    let shapes = config.shapes(0);
    let all = Tuned::read(path)?;
    let of_width = |bits| {
        let Some(tuned) = all.iter().find(|tuned| tuned.shapes == shapes && tuned.bits == bits) else {
            bail!(
                "{} was tuned for {} at {} bits with projections {:?}, {bits} bits and {shapes:?} are expected: give this \
                 model's own file or --for-k-chunks",
                path.display(),
                all[0].model,
                all.iter().map(|tuned| tuned.bits.to_string()).collect::<Vec<_>>().join(" and "),
                all[0].shapes
            )
        };
        Ok(tuned.k_chunks)
    };
    Ok([of_width(args.bitwidth.low())?, of_width(args.bitwidth.high())?])
}

/// The text that the flags ask for, in the model's tokens.
pub(crate) fn calibration(
    args: &CalibrationArgs,
    device: &Device,
    texts: &TextFiles,
    config: &ModelConfig,
) -> Result<Calibration> {
    let seq_len = args.seq_len.unwrap_or(Calibration::SEQ_LEN.min(config.max_position_embeddings));
    let on_gpu = device.info().id.starts_with("cuda");
    let usual = if on_gpu { Calibration::SAMPLES_OF_A_GPU } else { Calibration::SAMPLES };
    let samples = args.samples.unwrap_or(usual);
    if args.calib.is_empty() {
        return Ok(Calibration::of_own(seq_len, samples, args.seed));
    }
    let own = ((samples as f64 * args.own_share).round() as usize).min(samples.saturating_sub(1));
    let tokenizer = Tokenizer::new(texts, config)?;
    let text = read_text(&args.calib, &tokenizer, seq_len, samples - own)?;
    if let Some(note) = one_script(&text, &tokenizer) {
        tracing::info!("{note}");
    }
    let found = text.tokens.len() / seq_len.max(1);
    if found > 0 && found < text.samples && args.samples.is_some() {
        tracing::warn!("{} calibration samples of the text wanted, it has {found}: all are taken", text.samples);
    }
    let own = (own > 0).then_some(Own { samples: own, seed: args.seed });
    Ok(Calibration { seq_len, text: Some(text), own })
}
