//! Arguments of `decdec eval`.

use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use decdec::dec::CHUNK;

use super::numbers::whole;
use super::{JsonArg, RunArgs, WidthArg};

/// `decdec eval perplexity`
#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// A checkpoint, a directory as the reference's scripts write it, or a full-precision source
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) width: WidthArg,
    /// The text: any plain text, wikitext's raw files too
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = whole(2..=usize::MAX))]
    pub(crate) seq_len: usize,
    /// Which windows, the end excluded, as in 100..112 [default: all]
    #[arg(long, value_name = "A..B", value_parser = parse_range)]
    pub(crate) windows: Option<Range<usize>>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// A full-precision source to measure divergence from
    #[arg(long, value_name = "SOURCE")]
    pub(crate) compare: Option<PathBuf>,
    /// Also measure what compensating each projection by itself gives back of the divergence, and put it into the
    /// checkpoint, where tune --objective kl finds it
    #[arg(long, requires = "compare")]
    pub(crate) write_weights: bool,
    /// Count the second half of every window alone, as llama-perplexity does
    #[arg(long)]
    pub(crate) second_half: bool,
    #[command(flatten)]
    pub(crate) output: JsonArg,
}

/// `decdec eval compare`
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Checkpoints, or directories as the reference's scripts write them
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    /// The full-precision source that all were made from
    #[arg(long, value_name = "SOURCE")]
    pub(crate) source: PathBuf,
    /// Texts
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = whole(2..=usize::MAX))]
    pub(crate) seq_len: usize,
    /// Which windows of each text, the end excluded, as in 100..112 [default: all]
    #[arg(long, value_name = "A..B", value_parser = parse_range)]
    pub(crate) windows: Option<Range<usize>>,
    /// Channels compensated per 1024, each 8 for all projections or 0,0,8,8 for qkv, o, gu, d
    #[arg(long, value_name = "K", num_args = 1.., default_values = ["0", "8"], value_parser = k_chunks)]
    pub(crate) k_chunks: Vec<[usize; 4]>,
    /// Tokens that are made to measure the speed; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = whole(0..=4096))]
    pub(crate) tokens: usize,
    /// Draw divergence over bytes and over tokens/s
    #[arg(long, value_name = "PNG")]
    pub(crate) picture: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) on: super::shared::DeviceArgs,
    #[command(flatten)]
    pub(crate) output: JsonArg,
}

/// One number for all projections, or four.
fn k_chunks(text: &str) -> Result<[usize; 4], String> {
    let numbers = text.split(',').map(whole(0..=CHUNK)).collect::<Result<Vec<_>, _>>()?;
    match numbers[..] {
        [k] => Ok([k; 4]),
        [qkv, o, gu, d] => Ok([qkv, o, gu, d]),
        _ => Err(format!("{} numbers, one or four (qkv,o,gu,d) are expected", numbers.len())),
    }
}

/// `A..B`
fn parse_range(text: &str) -> Result<Range<usize>, String> {
    let (start, end) = text.split_once("..").ok_or("two numbers are expected, as in 100..112")?;
    let number = |part: &str| part.parse::<usize>().map_err(|_| format!("'{part}' is not a number"));
    let (start, end) = (number(start)?, number(end)?);
    if start < end { Ok(start..end) } else { Err(format!("{start}..{end} is empty, the end is excluded")) }
}
