//! `decdec tune`

use anyhow::{Result, bail};
use decdec::config::{ModelConfig, Projection};
use decdec::tune::{self, Directories, Options};

use super::profile::Named;
use crate::cli::TuneArgs;

/// Runs the command.
#[allow(clippy::print_stdout, reason = "the command's result")]
pub(crate) fn run(args: &TuneArgs) -> Result<()> {
    if let Some(stray) = args.stray.first() {
        let flag = stray.replace('_', "-");
        bail!("{stray:?} stands after a lone --: write --{flag} with no space in between");
    }
    let given = [&args.qkv, &args.o, &args.gu, &args.d];
    let mut shapes = given.map(|shape| shape.as_ref().map(|s| (s[0], s[1])));
    // With all names given, nothing has to be opened: a profile may have come from another machine.
    let name = &args.name;
    let identity = match (&name.model_name, name.algo, name.bitwidth) {
        (Some(model), Some(algo), Some(bits)) => {
            let (prefix, model) = (name.prefix.clone(), model.clone());
            decdec::nsys::Identity { prefix, model, precision: name.fp_dtype, algo, bits }
        }
        _ => Named::resolve(name)?.identity,
    };
    if let Some(preset) = ModelConfig::preset(&identity.model) {
        for projection in Projection::ALL {
            shapes[projection.index()].get_or_insert(preset.shape(projection));
        }
    }
    let outcome = tune::run(&Options {
        identity,
        dir: name.nsys_dir.clone(),
        shapes,
        targets: args.target_slowdown.clone(),
        exhaustive: args.exhaustive,
    })?;
    let to = Directories { csv: args.csv_dir.clone(), plots: args.plots_dir.clone(), tuned: args.tuned_dir.clone() };
    let written = outcome.write(&to)?;
    print!("{outcome}");
    for path in written {
        tracing::info!("wrote {}", path.display());
    }
    Ok(())
}
