//! `decdec quantize`

use anyhow::Result;

use crate::cli::QuantizeArgs;

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs) -> Result<()> {
    let _ = args;
    anyhow::bail!("wip")
}
