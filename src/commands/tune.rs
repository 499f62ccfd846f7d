//! `decdec tune`

use anyhow::{Result, bail, ensure};
use decdec::config::{ModelConfig, Projection};
use decdec::engine::{self, Compensate};
use decdec::tune::{self, Directories, Objective, Options, Verification};
use decdec::tuned::KlWeights;

use super::profile::{Named, device, one_width};
use crate::cli::{ObjectiveArg, TuneArgs};
use crate::output;

/// Runs the command.
pub(crate) fn run(args: &TuneArgs) -> Result<()> {
    if let Some(stray) = args.stray.first() {
        let flag = stray.replace('_', "-");
        bail!("{stray:?} stands after a lone --: write --{flag} with no space in between");
    }
    let given = [&args.qkv, &args.o, &args.gu, &args.d];
    let mut shapes = given.map(|shape| shape.as_ref().map(|s| (s[0], s[1])));
    // With all names given, nothing has to be opened: a profile may have come from another machine.
    let name = &args.name;
    let identity = match (&name.named.model_name, name.algo, one_width(name)?) {
        (Some(model), Some(format), Some(bits)) => {
            let (prefix, model) = (name.prefix.clone(), model.clone());
            decdec::nsys::Identity { prefix, model, precision: name.fp_dtype, format, bits: bits.low() }
        }
        _ => Named::resolve(name)?.identity,
    };
    if let Some(preset) = ModelConfig::preset(&identity.model) {
        for projection in Projection::ALL {
            shapes[projection.index()].get_or_insert(preset.shape(0, projection));
        }
    }
    ensure!(
        !args.save || args.target_slowdown.len() == 1,
        "--save keeps one result, but {} targets are given: give one --target-slowdown",
        args.target_slowdown.len()
    );
    let checkpoint = &name.named.checkpoint_path;
    ensure!(
        !args.save || checkpoint.is_dir(),
        "--save needs the --checkpoint-path of a directory, not {}",
        checkpoint.display()
    );
    let mut outcome = tune::run(&Options {
        identity,
        dir: name.nsys_dir.clone(),
        shapes,
        targets: args.target_slowdown.clone(),
        exhaustive: args.exhaustive,
        objective: objective(args)?,
    })?;
    let to = Directories { csv: args.csv_dir.clone(), plots: args.plots_dir.clone(), tuned: args.tuned_dir.clone() };
    if args.verify {
        // Whole tokens of a large model take minutes, and may be ended from outside: what was found stays.
        outcome.write(&to)?;
        output::line(format_args!("found, to be verified:\n{}", outcome.summary()))?;
        let named = Named::resolve(name)?;
        let context = named.opened.weights().config().max_position_embeddings;
        let tokens = args.verify_tokens.min(context.saturating_sub(Verification::OVERHEAD));
        let how = Verification { tokens, rounds: ROUNDS, selection: args.on.selection.into() };
        let device = device(&args.on.device, name.fp_dtype, false)?;
        let options = engine::Options {
            max_seq_len: Some(how.max_seq_len()),
            compensate: Compensate::Off,
            text: false,
            ..engine::Options::default()
        };
        tune::verify(&mut outcome, &super::load(&device, &named.opened, &options)?, &how)?;
    }
    let written = outcome.write(&to)?;
    for path in written {
        tracing::info!("wrote {}", path.display());
    }
    if args.save {
        for tuning in &outcome.tunings {
            tracing::info!("wrote {}", outcome.tuned(tuning).save(checkpoint)?.display());
        }
    }
    // Last, so that all is written where the reader of the report has gone.
    output::text(outcome.to_string())
}

/// What is asked for; where nothing is, what the checkpoint has weights for.
fn objective(args: &TuneArgs) -> Result<Objective> {
    let checkpoint = &args.name.named.checkpoint_path;
    let weights = match args.objective {
        Some(ObjectiveArg::K) => None,
        _ => KlWeights::read(checkpoint)?,
    };
    ensure!(
        weights.is_some() || args.objective != Some(ObjectiveArg::Kl),
        "--objective kl needs weights, but {} has none: measure them with decdec eval perplexity {} --compare SOURCE \
         --write-weights",
        checkpoint.display(),
        checkpoint.display()
    );
    Ok(weights.map_or(Objective::Channels, |weights| Objective::Divergence(weights.per_k_chunk)))
}

/// Texts that a choice is measured with.
const ROUNDS: usize = 3;
