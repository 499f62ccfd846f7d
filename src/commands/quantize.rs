//! `decdec quantize`

use anyhow::Result;
use decdec::quantize::{Calibration, Interrupted, Options, estimate, quantize};
use decdec::source::Source;
use decdec::tokenizer::Tokenizer;
use decdec::weights::ModelWeights;

use crate::cli::QuantizeArgs;

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs) -> Result<()> {
    let source = Source::open(&args.source)?;
    let options = Options {
        backend: args.backend.into(),
        bits: args.bitwidth,
        group_size: args.group_size,
        awq: !args.no_awq,
        refine: args.refine.into(),
        for_k_chunks: args.for_k_chunks.as_slice().try_into().expect("four numbers"),
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
