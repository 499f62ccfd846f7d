//! `decdec quantize`

use anyhow::{Result, ensure};
use decdec::quantize::{Calibration, Interrupted, Options, Refine, estimate, quantize};
use decdec::source::Source;
use decdec::tokenizer::Tokenizer;
use decdec::tune::Tuned;
use decdec::weights::ModelWeights;

use crate::cli::{QuantizeArgs, RefineArg};

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs) -> Result<()> {
    let source = Source::open(&args.source)?;
    let options = Options {
        backend: args.backend.into(),
        bits: args.bitwidth,
        group_size: args.group_size,
        awq: !args.no_awq,
        refine: refine(args)?,
        calibration: calibration(args, &source)?,
        source: args.source.file_name().unwrap_or(args.source.as_os_str()).to_string_lossy().into_owned(),
        overwrite: args.overwrite,
    };
    if args.dry_run {
        return dry_run(&source, &options);
    }
    let stop = super::interrupt_flag()?;
    let bar = super::progress(0, "");
    let report = match quantize(&source, source.texts(), &options, &args.out, stop, &bar) {
        Err(error) if error.is::<Interrupted>() => {
            tracing::info!("{error}");
            return Err(super::Interrupted.into());
        }
        report => report?,
    };
    bar.finish_and_clear();
    tracing::info!(
        "quantized {} layers in {:.1} s ({} calibration tokens) into {}",
        report.bits.len(),
        report.elapsed.as_secs_f64(),
        report.tokens,
        args.out.display()
    );
    if let Some(peak) = peak_memory() {
        tracing::info!("peak memory {peak} MB");
    }
    Ok(())
}

/// Prints what the job would take and leave.
#[allow(clippy::print_stdout, reason = "the command's result")]
fn dry_run(source: &Source, options: &Options) -> Result<()> {
    let estimate = estimate(source.config(), options)?;
    let megabytes = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
    let mut table = super::table();
    table.add_row(["weights, on the device".into(), megabytes(estimate.device_bytes)]);
    table.add_row(["residuals and thresholds, on the host".into(), megabytes(estimate.host_bytes)]);
    table.add_row(["disk while it is made".into(), megabytes(estimate.disk_bytes)]);
    table.add_row(["memory while it is made".into(), megabytes(estimate.memory_bytes)]);
    table.add_row(["time on this machine".into(), format!("{:.0} s", estimate.time.as_secs_f64())]);
    println!("{table}");
    Ok(())
}

fn refine(args: &QuantizeArgs) -> Result<Refine> {
    let chosen = args.for_k_chunks.is_some() || args.for_tuned.is_some();
    ensure!(
        !chosen || args.refine == RefineArg::Compensated,
        "--for-k-chunks and --for-tuned are for --refine compensated, leave them out or choose that"
    );
    Ok(match (args.refine, &args.for_k_chunks, &args.for_tuned) {
        (RefineArg::None, ..) => Refine::None,
        (RefineArg::Output, ..) => Refine::Output,
        (RefineArg::Compensated, _, Some(path)) => Refine::Compensated { k_chunks: Tuned::read(path)?.k_chunks },
        (RefineArg::Compensated, Some(k), None) => Refine::Compensated { k_chunks: std::array::from_fn(|i| k[i]) },
        (RefineArg::Compensated, None, None) => Refine::DEFAULT,
    })
}

fn calibration(args: &QuantizeArgs, source: &Source) -> Result<Calibration> {
    let Some(path) = &args.calib else {
        return Ok(Calibration::Sampled {
            seq_len: args.seq_len.unwrap_or(Calibration::SAMPLED_SEQ_LEN),
            samples: args.samples.unwrap_or(Calibration::SAMPLED_SAMPLES),
            seed: args.seed,
        });
    };
    let text = super::read_text(path)?;
    Ok(Calibration::Text {
        tokens: Tokenizer::new(source.texts(), source.config())?.encode(&text)?,
        seq_len: args.seq_len.unwrap_or(Calibration::TEXT_SEQ_LEN),
        samples: args.samples.unwrap_or(Calibration::TEXT_SAMPLES),
        name: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
    })
}

/// The most memory that this process has had at once, in MB, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb / 1000)
}
