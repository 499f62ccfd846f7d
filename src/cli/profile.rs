//! Arguments of `decdec profile` and `decdec tune`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use decdec::dec::CHUNK;
use decdec::format::Format;
use decdec::nsys::{Kind, Precision};
use decdec::profile::{Clock, Options};

use super::numbers::{MOST_FEATURES, MOST_PROFILED, slowdown, whole};
use super::shared::{DeviceArgs, NamedArgs, WidthArg};

/// What a profile is called: the same for `profile` and `tune`. A preset needs no checkpoint.
#[derive(Debug, Args)]
#[command(
    mut_arg("checkpoint_path", |path| path.required(false).default_value("random:0")),
    mut_arg("model_name", |name| name.help(
        "The model's name, in the files' names too; a preset needs no checkpoint [default: the checkpoint's directory]"
    )),
)]
pub(crate) struct ProfileName {
    /// Tells profiles apart; the files' names begin with it
    pub(crate) prefix: String,
    #[command(flatten)]
    pub(crate) named: NamedArgs,
    /// Quantizer: sqllm (one codebook per row) or awq (groups of channels) [default: the checkpoint's]
    #[arg(long, value_parser = Format::of_algo)]
    pub(crate) algo: Option<Format>,
    #[command(flatten)]
    pub(crate) width: WidthArg,
    /// Type of the products: fp16, bf16 or fp32
    #[arg(long, default_value = "fp16")]
    pub(crate) fp_dtype: Precision,
    /// Where profiles lie
    #[arg(long, value_name = "DIR", default_value = "nsys")]
    pub(crate) nsys_dir: PathBuf,
}

/// `decdec profile`
#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) name: ProfileName,
    /// Tokens measured per configuration
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = whole(1..=MOST_PROFILED))]
    pub(crate) tokens: usize,
    /// Measure again even if there is a profile of this name
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Keep half as many layers on the device, for small memory
    #[arg(long)]
    pub(crate) halve_layers: bool,
    /// Fewest thread blocks that compensate [default: 4]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) min_n_tb: Option<usize>,
    /// Most thread blocks that compensate [default: half of what the device holds]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) max_n_tb: Option<usize>,
    /// Largest k_chunk [default: twice the knee that the measured bandwidths promise]
    #[arg(long, value_name = "K", value_parser = whole(1..=CHUNK))]
    pub(crate) max_k_chunk: Option<usize>,
    /// Take the times with this nsys instead of CUPTI
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) nsys_path: Option<PathBuf>,
    /// What takes the times on cuda: auto (CUPTI, or events where it is missing), cupti, or events
    #[arg(long, default_value = "auto")]
    pub(crate) clock: Clock,
    /// Measure only what decdec tune found, and say what it costs now
    #[arg(long, value_name = "FILE", conflicts_with_all = ["min_n_tb", "max_n_tb", "max_k_chunk"])]
    pub(crate) tuned: Option<PathBuf>,
    /// What is measured: whole tokens, or single products [default: tokens where the device runs layers as one launch]
    #[arg(long, value_name = "tokens|products")]
    pub(crate) measure: Option<Kind>,
    /// Of whole tokens: k_chunk is raised no further where a token is slower by so many per cent already
    #[arg(long, value_name = "PERCENT", default_value_t = 100.0 * Options::DEAREST, value_parser = slowdown)]
    pub(crate) max_slowdown: f64,
    /// Of whole tokens: also measure every mix of these k_chunk, as in 0,4,8: an exhaustive search finds the best
    #[arg(long, value_name = "K", value_delimiter = ',', value_parser = whole(0..=CHUNK))]
    pub(crate) mixes: Option<Vec<usize>>,
    #[command(flatten)]
    pub(crate) on: DeviceArgs,
}

/// What a search makes the most of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ObjectiveArg {
    /// Channels: the sum of k_chunk, times bytes where whole tokens were measured
    K,
    /// What compensation gives back of the divergence from the source, by the weights of the checkpoint
    Kl,
}

/// `decdec tune`
#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    #[command(flatten)]
    pub(crate) name: ProfileName,
    /// Channels and rows of the fused q, k, v [default: the profile's or the model's]
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"], value_parser = whole(1..=MOST_FEATURES))]
    pub(crate) qkv: Option<Vec<usize>>,
    /// Channels and rows of the attention output
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"], value_parser = whole(1..=MOST_FEATURES))]
    pub(crate) o: Option<Vec<usize>>,
    /// Channels and rows of the fused gate and up
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"], value_parser = whole(1..=MOST_FEATURES))]
    pub(crate) gu: Option<Vec<usize>>,
    /// Channels and rows of down
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"], value_parser = whole(1..=MOST_FEATURES))]
    pub(crate) d: Option<Vec<usize>>,
    /// Slowdowns to aim for, per cent: one, or several as in 2.5,5,10,20
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', value_parser = slowdown)]
    pub(crate) target_slowdown: Vec<f64>,
    /// Also find the true optimum over everything measured; of whole tokens, over the choices measured as they are
    #[arg(long)]
    pub(crate) exhaustive: bool,
    /// What to make the most of [default: kl if the checkpoint has weights for it, else k]
    #[arg(long, value_enum)]
    pub(crate) objective: Option<ObjectiveArg>,
    /// Measure real tokens at what was found, on --device, and search again where they are slower than the target
    #[arg(long)]
    pub(crate) verify: bool,
    /// Tokens of each text that --verify measures
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = whole(1..=usize::MAX))]
    pub(crate) verify_tokens: usize,
    #[command(flatten)]
    pub(crate) on: DeviceArgs,
    /// Also put the one target's result into the checkpoint's tuned.json, which generate takes by itself
    #[arg(long)]
    pub(crate) save: bool,
    /// Where the measured table goes
    #[arg(long, value_name = "DIR", default_value = "csv")]
    pub(crate) csv_dir: PathBuf,
    /// Where the pictures go
    #[arg(long, value_name = "DIR", default_value = "plots")]
    pub(crate) plots_dir: PathBuf,
    /// Where the files for generate --tuned go
    #[arg(long, value_name = "DIR", default_value = "tuned")]
    pub(crate) tuned_dir: PathBuf,
    /// Catches `-- target_slowdown 2.5`
    #[arg(last = true, hide = true)]
    pub(crate) stray: Vec<String>,
}
