//! Arguments of `decdec chat`.

use clap::Args;

use super::numbers::whole;
use super::{ModelArgs, RunArgs, SamplingArgs};

/// `decdec chat`
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// System message of the chat
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
    /// The most tokens to make in each, the prompt not counted
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = whole(1..=usize::MAX))]
    pub(crate) max_new_tokens: usize,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// The longest conversation, in tokens [default: the model's context, 8192 at most]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) max_seq_len: Option<usize>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}
