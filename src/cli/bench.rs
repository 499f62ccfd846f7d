//! Arguments of `decdec bench`.

use std::path::PathBuf;

use clap::Args;

use super::numbers::whole;
use super::{ModelArgs, RunArgs};

/// `decdec bench`
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Tokens of the text that is already there
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole(1..=usize::MAX))]
    pub(crate) context: usize,
    /// Tokens measured
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = whole(2..=usize::MAX))]
    pub(crate) tokens: usize,
    /// Also say where a token's time goes: bytes, the least time they take, and the time of every part
    #[arg(long)]
    pub(crate) timeline: bool,
    /// Draw the timeline, as a PNG
    #[arg(long, value_name = "FILE", requires = "timeline")]
    pub(crate) picture: Option<PathBuf>,
}
