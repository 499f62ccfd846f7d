//! Arguments of `decdec serve`.

use std::path::PathBuf;

use clap::Args;

use super::numbers::whole;
use super::{ModelArgs, RunArgs};

/// `decdec serve`
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Address to listen on: 0.0.0.0 lets other machines ask
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 for any that is free
    #[arg(long, value_name = "N", default_value_t = 8000, value_parser = whole(0..=65_535))]
    pub(crate) port: usize,
    /// Texts that are made at the same time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = whole(1..=1024))]
    pub(crate) slots: usize,
    /// The longest text, prompt and answer together [default: the model's context, 8192 at most]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) max_seq_len: Option<usize>,
    /// Texts that wait for a slot before others are refused
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = whole(1..=usize::MAX))]
    pub(crate) queue: usize,
    /// How long a text in the making may wait while prompts are read, milliseconds a step
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = whole(1..=60_000))]
    pub(crate) max_wait: usize,
    /// Keys, one a line, of which every request has to have one
    #[arg(long, value_name = "FILE", env = "DECDEC_API_KEY_FILE", hide_env_values = true)]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Names of the model, the first of which answers tell [default: what the model's directory is called]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) served_model_name: Option<Vec<String>>,
    /// A directory whose tokenizer and chat template stand in for the model's own: random weights have none
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Let web pages of this origin ask, * for any; may be given several times
    #[arg(long, value_name = "ORIGIN")]
    pub(crate) cors: Vec<String>,
    /// The largest request, MiB
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = whole(1..=1024))]
    pub(crate) body_limit: usize,
    /// Connections at a time; others wait
    #[arg(long, value_name = "N", default_value_t = 16_384, value_parser = whole(1..=1_000_000))]
    pub(crate) connections: usize,
    /// Compensate the prompt too
    #[arg(long)]
    pub(crate) compensate_prompt: bool,
    /// Let whoever may ask change how the model is compensated, for everybody [default: on a loopback address without
    /// keys]
    #[arg(long)]
    pub(crate) adjustable: bool,
    /// After SIGTERM: how long /ready says no before no new texts are taken, seconds
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = whole(0..=3600))]
    pub(crate) drain_notice: usize,
    /// After that: how long texts in the making may take, seconds
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = whole(0..=86_400))]
    pub(crate) drain_limit: usize,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}
