//! `decdec eval perplexity` and `decdec eval compare`

mod compare;

use anyhow::{Result, bail, ensure};
use decdec::checkpoint::Manifest;
use decdec::device;
use decdec::engine::{Compensate, Options};
use decdec::eval::{self, Evaluation};
use decdec::open::Opened;
use decdec::progress::Progress;

use crate::cli::PerplexityArgs;
use crate::output;

pub(crate) use compare::compare;

/// Runs the command.
pub(crate) fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let opened = super::locate::open(&args.path, args.width.bitwidth, args.run.compat_scale_order)?;
    opened.expect(None, args.width.bitwidth, None)?;
    let context = opened.weights().config().max_position_embeddings;
    ensure!(args.seq_len <= context, "--seq-len is {}, 2 to {context} (the model's context) are allowed", args.seq_len);
    let source = args.compare.as_deref().map(|path| super::locate::open(path, None, false)).transpose()?;
    if let Some(source) = &source {
        let (ours, theirs) = (opened.weights().config().vocab_size, source.weights().config().vocab_size);
        ensure!(ours == theirs, "the models have vocabularies of {ours} and {theirs}, they cannot be compared");
    }
    let wanted = args.windows.as_ref().map_or(usize::MAX, |windows| windows.end.saturating_mul(args.seq_len));
    let tokens = super::read_tokens(&args.text, &*opened.tokenizer()?, wanted)?;
    let range = args.windows.clone().unwrap_or(0..tokens.len() / args.seq_len.max(1));
    let windows = eval::windows(&tokens, args.seq_len, range)?;
    let writable = opened.manifest().is_some_and(Manifest::has_residuals);
    ensure!(
        !args.write_weights || writable,
        "--write-weights needs a checkpoint with residuals, {} is none: make one with decdec quantize or convert",
        args.path.display()
    );
    let evaluation = measure(args, (&opened, source.as_ref()), &windows)?;
    let Evaluation { perplexity, kl_divergence, source_perplexity, base_perplexity, recovered, .. } =
        evaluation.clone();
    let numbers = [Some(perplexity), kl_divergence, source_perplexity, base_perplexity, recovered];
    if let Some(number) = numbers.into_iter().flatten().find(|number| !number.is_finite()) {
        bail!("{number} comes out where a number should: the model's logits are not finite, or far too large");
    }
    if args.output.json {
        return output::line(serde_json::to_string(&evaluation)?);
    }
    output::line(format_args!("perplexity {perplexity:.3} over {} predictions", evaluation.predictions))?;
    if let (Some(kl), Some(agreement)) = (kl_divergence, evaluation.top1_agreement) {
        output::line(format_args!("KL divergence {kl:.5} nats, top-1 agreement {:.2} %", 100.0 * agreement))?;
    }
    if let Some(source) = source_perplexity {
        output::line(format_args!("source: perplexity {source:.3}"))?;
    }
    if let (Some(base), Some(recovered)) = (base_perplexity, recovered) {
        output::line(format_args!(
            "without compensation: perplexity {base:.3}; compensation recovers {:.1} % of the lost log-perplexity",
            100.0 * recovered
        ))?;
    }
    let Some(figures) = evaluation.figures else { return Ok(()) };
    output::line("as llama-perplexity --kl-divergence names them:")?;
    for (name, figure) in &figures.0 {
        // Padded by characters: some names have others than ASCII.
        let error = figure.error.map_or_else(String::new, |error| format!(" ± {error:10.6}"));
        output::line(format_args!("{name:<32}: {:12.6}{error}", figure.value))?;
    }
    Ok(())
}

/// Reads the windows, with a bar.
fn measure(
    args: &PerplexityArgs,
    (opened, source): (&Opened, Option<&Opened>),
    windows: &[&[u32]],
) -> Result<Evaluation> {
    let device = super::devices::open(&args.run, device::Options::default())?;
    let engine = super::engine(&device, opened, &args.run, args.seq_len, false, Compensate::AsMade)?;
    let plain =
        Options { max_seq_len: Some(args.seq_len), compensate: Compensate::Off, text: false, ..Options::default() };
    let source = source.map(|source| super::load(&device, source, &plain)).transpose()?;
    let bar = super::Bar::new(windows.len(), "reading");
    let uncounted = if args.second_half { args.seq_len / 2 } else { 0 };
    let evaluation = eval::perplexity_behind(&engine, source.as_ref(), windows, uncounted, |_| {
        bar.inc(1);
        Ok(())
    })?;
    drop(bar);
    if let Some(source) = source.as_ref().filter(|_| args.write_weights) {
        let bar = super::Bar::new(5 * windows.len(), "weighing projections");
        let weights = eval::kl_weights(&engine, source, windows, args.run.on.selection.into(), |_| {
            bar.inc(1);
            Ok(())
        })?;
        drop(bar);
        tracing::info!("wrote {}", weights.save(&args.path)?.display());
    }
    Ok(evaluation)
}
