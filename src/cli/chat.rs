//! Arguments of `decdec chat` and `decdec run`.

use std::path::PathBuf;

use clap::Args;

use super::numbers::whole;
use super::{ModelArgs, RunArgs, SamplingArgs};

/// `decdec chat`
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) talk: TalkArgs,
}

/// How one talks with a model.
#[derive(Debug, Args)]
pub(crate) struct TalkArgs {
    /// A message to answer before the program ends; without one, messages are typed, or read from stdin line by line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
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

/// `decdec run`
#[derive(Debug, Args)]
pub(crate) struct RunByNameArgs {
    /// A model on the Hugging Face Hub, ORG/MODEL, with :BITS of a weight if not 4 (2 to 8, or 3.25, 3.5, ...); or the
    /// directory of a quantized model
    #[arg(value_name = "MODEL[:BITS]")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) talk: TalkArgs,
}
