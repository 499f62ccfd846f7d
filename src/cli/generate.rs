//! Arguments of `decdec generate`.

use std::path::PathBuf;

use clap::Args;
use decdec::engine::Speculate;

use super::numbers::{mode, speculate, whole};
use super::{JsonArg, ModelArgs, RunArgs, SamplingArgs};

/// `decdec generate`
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to go on from; without one, a single BOS token
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// Independent generations [default: 1 with --prompt, 5 without]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) num_samples: Option<usize>,
    /// The most tokens to make in each, the prompt not counted
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = whole(0..=usize::MAX))]
    pub(crate) max_new_tokens: usize,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// 0 generic kernels, 1 specialized kernels, 2 specialized and recorded in a graph (cuda)
    #[arg(long, value_name = "MODE", default_value_t = 2, value_parser = mode)]
    pub(crate) compile: u8,
    /// Guess tokens from the text so far and verify several in one pass: auto (as many as pays), off, or 1 to 7; the text
    /// is the same
    #[arg(long, value_name = "auto|off|N", default_value = "off", value_parser = speculate)]
    pub(crate) speculate: Speculate,
    /// A smaller model with the same tokenizer makes the guesses
    #[arg(long, value_name = "DIR")]
    pub(crate) draft: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Put the prompt into the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,
    /// System message of the chat
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "chat")]
    pub(crate) system: Option<String>,
    /// End where this text appears; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Go on after tokens that end a text
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Compensate the prompt too
    #[arg(long)]
    pub(crate) compensate_prompt: bool,
    /// The longest context, prompt included [default: what the prompt and --max-new-tokens need]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) max_seq_len: Option<usize>,
    /// Print the text although there is no --prompt
    #[arg(long)]
    pub(crate) print_result: bool,
    #[command(flatten)]
    pub(crate) output: JsonArg,
}
