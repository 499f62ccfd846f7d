//! Arguments of `decdec profile` and `decdec tune`.

use std::path::PathBuf;

use clap::Args;
use decdec::nsys::{Algo, Precision};
use decdec::profile::Clock;

use super::SelectionArg;

/// What a profile is called: the same for `profile` and `tune`.
#[derive(Debug, Args)]
pub(crate) struct ProfileName {
    /// Tells profiles apart; the files' names begin with it
    pub(crate) prefix: String,
    /// The model's name; one of the presets needs no checkpoint [default: the checkpoint's directory]
    #[arg(long, alias = "model_name", value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Quantizer: sqllm (one codebook per row) or awq (groups of channels) [default: the checkpoint's]
    #[arg(long)]
    pub(crate) algo: Option<Algo>,
    /// Bits of a weight; of a mixed checkpoint, the layers to measure [default: the checkpoint's]
    #[arg(long)]
    pub(crate) bitwidth: Option<u32>,
    /// A checkpoint, a directory as the reference's scripts write it, or random:SEED
    #[arg(long, alias = "checkpoint_path", value_name = "PATH", default_value = "random:0")]
    pub(crate) checkpoint_path: String,
    /// Type of the products: fp16, bf16 or fp32
    #[arg(long, alias = "fp_dtype", default_value = "fp16")]
    pub(crate) fp_dtype: Precision,
    /// Where profiles lie
    #[arg(long, alias = "nsys_dir", value_name = "DIR", default_value = "nsys")]
    pub(crate) nsys_dir: PathBuf,
}

/// `decdec profile`
#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) name: ProfileName,
    /// Tokens measured per configuration
    #[arg(long, default_value_t = 10)]
    pub(crate) tokens: usize,
    /// Measure again even if there is a profile of this name
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Keep half as many layers on the device, for small memory
    #[arg(long, alias = "halve_layers")]
    pub(crate) halve_layers: bool,
    /// Fewest thread blocks that compensate [default: 4]
    #[arg(long, alias = "min_n_tb", value_name = "N")]
    pub(crate) min_n_tb: Option<usize>,
    /// Most thread blocks that compensate [default: half of what the device holds]
    #[arg(long, alias = "max_n_tb", value_name = "N")]
    pub(crate) max_n_tb: Option<usize>,
    /// Largest k_chunk [default: twice the knee that the measured bandwidths promise]
    #[arg(long, alias = "max_k_chunk", value_name = "K")]
    pub(crate) max_k_chunk: Option<usize>,
    /// Take the times with this nsys instead of CUPTI
    #[arg(long, alias = "nsys_path", value_name = "PROGRAM")]
    pub(crate) nsys_path: Option<PathBuf>,
    /// What takes the times on cuda: auto (CUPTI, or events where it is missing), cupti, or events
    #[arg(long, default_value = "auto")]
    pub(crate) clock: Clock,
    /// Measure only what decdec tune found, and say what it costs now
    #[arg(long, value_name = "FILE", conflicts_with_all = ["min_n_tb", "max_n_tb", "max_k_chunk"])]
    pub(crate) tuned: Option<PathBuf>,
    /// auto, cpu, wgpu[:N] or cuda[:N]
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// How channels are found
    #[arg(long, value_enum, default_value_t = SelectionArg::Bucket)]
    pub(crate) selection: SelectionArg,
}

/// `decdec tune`
#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    #[command(flatten)]
    pub(crate) name: ProfileName,
    /// Channels and rows of the fused q, k, v [default: the profile's or the model's]
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"])]
    pub(crate) qkv: Option<Vec<usize>>,
    /// Channels and rows of the attention output
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"])]
    pub(crate) o: Option<Vec<usize>>,
    /// Channels and rows of the fused gate and up
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"])]
    pub(crate) gu: Option<Vec<usize>>,
    /// Channels and rows of down
    #[arg(long, num_args = 2, value_names = ["IN", "OUT"])]
    pub(crate) d: Option<Vec<usize>>,
    /// Slowdowns to aim for, per cent: one, or several as in 2.5,5,10,20
    #[arg(long, alias = "target_slowdown", value_delimiter = ',', value_name = "PERCENT")]
    pub(crate) target_slowdown: Vec<f64>,
    /// Also find the true optimum over everything measured
    #[arg(long)]
    pub(crate) exhaustive: bool,
    /// Measure real tokens at what was found, and search again where they are slower than the target
    #[arg(long)]
    pub(crate) verify: bool,
    /// Tokens of each text that --verify measures
    #[arg(long, alias = "verify_tokens", value_name = "N", default_value_t = 128)]
    pub(crate) verify_tokens: usize,
    /// Where --verify runs: auto, cpu, wgpu[:N] or cuda[:N]
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// How --verify finds channels
    #[arg(long, value_enum, default_value_t = SelectionArg::Bucket)]
    pub(crate) selection: SelectionArg,
    /// Also put the one target's result into the checkpoint's tuned.json, which generate takes by itself
    #[arg(long)]
    pub(crate) save: bool,
    /// Where the measured table goes
    #[arg(long, alias = "csv_dir", value_name = "DIR", default_value = "csv")]
    pub(crate) csv_dir: PathBuf,
    /// Where the pictures go
    #[arg(long, alias = "plots_dir", value_name = "DIR", default_value = "plots")]
    pub(crate) plots_dir: PathBuf,
    /// Where the files for generate --tuned go
    #[arg(long, alias = "tuned_dir", value_name = "DIR", default_value = "tuned")]
    pub(crate) tuned_dir: PathBuf,
    /// Catches `-- target_slowdown 2.5`
    #[arg(last = true, hide = true)]
    pub(crate) stray: Vec<String>,
}
