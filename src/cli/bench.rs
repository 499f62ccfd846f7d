//! `decdec bench`

use std::path::PathBuf;

use clap::Args;
use decdec::checkpoint::BitWidth;

use super::{BackendArg, RunArgs};

/// `decdec bench`
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// A checkpoint, a directory as the reference's scripts write it, a full-precision source, or random:SEED
    /// (with --model-name, --backend and --bitwidth)
    #[arg(long, alias = "checkpoint_path", value_name = "PATH")]
    pub(crate) checkpoint_path: PathBuf,
    /// The model's name: the preset of random weights
    #[arg(long, alias = "model_name", value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Bits of a weight
    #[arg(long)]
    pub(crate) bitwidth: Option<BitWidth>,
    /// Storage of the weights
    #[arg(long, value_enum)]
    pub(crate) backend: Option<BackendArg>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Tokens of the text that is already there
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) context: usize,
    /// Tokens measured
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) tokens: usize,
    /// Also say where a token's time goes: bytes, the least time they take, and the time of every part
    #[arg(long)]
    pub(crate) timeline: bool,
    /// Draw the timeline, as a PNG
    #[arg(long, value_name = "FILE", requires = "timeline")]
    pub(crate) picture: Option<PathBuf>,
}

/// Bits of a head.
pub(super) fn parse_head_bits(text: &str) -> Result<usize, String> {
    match text {
        "16" => Ok(16),
        "8" => Ok(8),
        "4" => Ok(4),
        _ => Err("16, 8 and 4 are allowed".into()),
    }
}
