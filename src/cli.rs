//! The command line. Doc comments here are the help texts.
//!
//! Flags that users of the reference know are accepted in their spelling too (`--max_new_tokens`): `flags` replaces
//! underscores before anything is parsed.

mod bench;
mod chat;
mod convert;
mod eval;
mod flags;
mod generate;
mod numbers;
mod profile;
#[cfg(feature = "serve")]
mod serve;
mod shared;
mod version;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use decdec::checkpoint::BitWidth;
use decdec::dec::CHUNK;
use decdec::format::Format;

use crate::output;
pub(crate) use bench::BenchArgs;
pub(crate) use chat::{ChatArgs, RunByNameArgs, TalkArgs};
pub(crate) use convert::{ConvertArgs, ResidualsArgs};
pub(crate) use eval::{CompareArgs, PerplexityArgs};
pub(crate) use generate::GenerateArgs;
use numbers::whole;
pub(crate) use profile::{ObjectiveArg, ProfileArgs, ProfileName, TuneArgs};
#[cfg(feature = "serve")]
pub(crate) use serve::ServeArgs;
pub(crate) use shared::{CalibrationArgs, JsonArg, ModelArgs, OutArgs, RunArgs, SamplingArgs, WidthArg};

/// What the list of commands does not say: in which order they come.
const ROAD: &str = "\
From a name to a chat, in one step:
  decdec run ORG/MODEL:4

From a model (a path, or ORG/MODEL) to its answers:
  decdec quantize MODEL --backend ap --bitwidth 3 --out my-model
  decdec generate --checkpoint-path my-model --chat --prompt TEXT
  decdec serve --checkpoint-path my-model

The n_tb and k_chunk that suit this machine:
  decdec profile RUN --checkpoint-path my-model
  decdec tune RUN --checkpoint-path my-model --target-slowdown 5
  decdec generate --checkpoint-path my-model --tuned tuned/FILE.json

Coming from the reference:
  generate.py                     decdec generate
  run_profile.py                  decdec profile
  tuner.py                        decdec tune
  cheatsheet.py, thresholds.py    decdec residuals
Their flags are accepted in their own spelling, too (--max_new_tokens), and their directories as they are.";

/// Low-bit language models that decode at the speed of their compressed weights and answer like bigger ones.
#[derive(Debug, Parser)]
#[command(name = "decdec", version, long_version = version::LONG.as_str(), max_term_width = 100, after_help = ROAD)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The command line of this process, or what to print in its place: a help text, or an error with what may have been
/// meant.
pub(crate) fn parse() -> Result<Cli, clap::Error> {
    let mut root = flags::with_negative_numbers(Cli::command());
    let line = flags::Line::new(&root, std::env::args_os());
    let matches = root.try_get_matches_from_mut(&line.words).map_err(|error| line.better(&root, error))?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut root))?;
    for note in line.notes {
        tracing::warn!("{note}");
    }
    Ok(cli)
}

/// Prints what there is in place of a command, and says how the program ends.
///
/// # Errors
/// A help text that cannot be written.
pub(crate) fn show(instead: &clap::Error) -> Result<ExitCode> {
    let printed = output::sent(instead.print());
    if !instead.use_stderr() {
        printed?;
    }
    Ok(u8::try_from(instead.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// What `decdec quantize` does of itself with a model, at so many bits.
///
/// # Errors
/// Arguments that the command refuses.
pub(crate) fn quantize_by_default(source: &Path, bits: BitWidth, out: &Path, device: &str) -> Result<QuantizeArgs> {
    let command = QuantizeArgs::augment_args(clap::Command::new("quantize"));
    let (source, out, bits) = (source.as_os_str(), out.as_os_str(), bits.to_string());
    let words = ["quantize", "--backend", "ap", "--bitwidth", &bits, "--device", device].map(OsStr::new);
    let matches = command.try_get_matches_from(words.into_iter().chain([OsStr::new("--out"), out, source]))?;
    Ok(QuantizeArgs::from_arg_matches(&matches)?)
}

/// The completion script of a shell.
pub(crate) fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "decdec", &mut script);
    script
}

/// Writes a page of the manual for every command into a directory.
///
/// # Errors
/// A directory that cannot be written to.
pub(crate) fn manual(directory: &Path) -> Result<()> {
    let written = std::fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
    written.with_context(|| format!("cannot write the manual into {}", directory.display()))
}

/// One variant for each command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Talk with a model by its name: download, quantize, keep and chat, each where it has not been done yet
    Run(RunByNameArgs),
    /// Quantize a full-precision model into a decdec checkpoint
    Quantize(QuantizeArgs),
    /// Turn a quantized model of another program into a decdec checkpoint, number for number
    Convert(ConvertArgs),
    /// Make residuals and thresholds for a quantized model, given the original
    Residuals(ResidualsArgs),
    /// Generate text and measure how fast
    Generate(GenerateArgs),
    /// Talk with a model in the terminal
    Chat(ChatArgs),
    /// Answer OpenAI's and Anthropic's requests over HTTP
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
    /// Measure how good a model is: eval perplexity
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Measure how fast whole tokens are, and with --timeline where their time goes
    Bench(BenchArgs),
    /// Measure every useful n_tb and k_chunk on this device
    Profile(ProfileArgs),
    /// Find n_tb and k_chunk for a slowdown, from a profile
    Tune(TuneArgs),
    /// Show what a checkpoint or a source holds
    Inspect(InspectArgs),
    /// List what can run here, and what is missing otherwise
    Devices(JsonArg),
    /// Say what this machine can do: drivers, libraries, host link, memory, cores
    Doctor(JsonArg),
    /// Print a completion script for a shell
    Completions {
        /// The shell that is to complete
        shell: clap_complete::Shell,
    },
    /// Write a page of the manual for every command
    #[command(hide = true)]
    Man {
        /// The directory that they go into
        directory: PathBuf,
    },
}

/// `decdec quantize`
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// A Hugging Face directory, a .gguf file, a wheel or zip that contains one, or ORG/MODEL on the Hugging Face Hub
    pub(crate) source: PathBuf,
    /// Storage of the weights
    #[arg(long, value_parser = shared::backend())]
    pub(crate) backend: Format,
    /// Bits of a weight: 2 to 8, or 3.25 (4 bits in a quarter of the layers, those where they bring most), 3.5, ...
    #[arg(long, value_name = "BITS", visible_alias = "bits-per-weight")]
    pub(crate) bitwidth: BitWidth,
    #[command(flatten)]
    pub(crate) to: OutArgs,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Channels that share a scale in lutgemm [default: the largest of 128, 64, 32 that divides]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) group_size: Option<usize>,
    /// Plain rounding instead of AWQ's scale and clipping search, in lutgemm
    #[arg(long)]
    pub(crate) no_awq: bool,
    /// What codes are fitted to: every weight by itself, a projection's output, or its output beside compensation
    #[arg(long, value_enum, default_value_t = RefineArg::Compensated)]
    pub(crate) refine: RefineArg,
    /// For --refine compensated: channels that will be compensated per 1024, for qkv, o, gu, d [default: 8 8 8 8]
    #[arg(long, num_args = 4, value_name = "K", value_parser = whole(0..=CHUNK))]
    pub(crate) for_k_chunks: Option<Vec<usize>>,
    /// The same from what decdec tune found
    #[arg(long, value_name = "FILE", conflicts_with = "for_k_chunks")]
    pub(crate) for_tuned: Option<PathBuf>,
    /// Print sizes and time estimates, write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// What codes are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RefineArg {
    /// Every weight by itself
    None,
    /// What a projection puts out
    Output,
    /// What a projection puts out beside compensation
    Compensated,
}

/// `decdec eval …`
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Perplexity on a text, in windows that share no context
    Perplexity(PerplexityArgs),
    /// Several checkpoints and k_chunks beside each other: divergence, bytes and speed
    Compare(CompareArgs),
}

/// `decdec inspect`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A checkpoint, a directory as the reference's scripts write it, or a full-precision source
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) width: WidthArg,
    #[command(flatten)]
    pub(crate) output: JsonArg,
}
