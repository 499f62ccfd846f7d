//! The command line. Doc comments here are the help texts.
//!
//! Flags that users of the reference know are accepted in their spelling too (`--max_new_tokens`).

mod bench;
mod convert;
mod flags;
mod profile;

use std::ops::Range;
use std::path::PathBuf;

use crate::commands::devices::Target;
use clap::{Args, Parser, Subcommand, ValueEnum};
use decdec::checkpoint::{BitWidth, WeightFormat};
use decdec::dec::Selection;

pub(crate) use bench::BenchArgs;
pub(crate) use convert::{CalibrationArgs, ConvertArgs, ResidualsArgs};
pub(crate) use profile::{ProfileArgs, ProfileName, TuneArgs};

/// What the list of commands does not say: in which order they come.
const ROAD: &str = "\
From a model to its answers:
  decdec quantize MODEL --backend ap --bitwidth 3 --out my-model
  decdec generate --checkpoint-path my-model --chat --prompt TEXT

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
#[command(name = "decdec", version, max_term_width = 100, after_help = ROAD)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The command line of this process; a wrong one ends it, with what may have been meant.
pub(crate) fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| flags::better(error).exit())
}

/// One variant for each command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Quantize a full-precision model into a decdec checkpoint
    Quantize(QuantizeArgs),
    /// Turn a quantized model of another program into a decdec checkpoint, number for number
    Convert(ConvertArgs),
    /// Make residuals and thresholds for a quantized model, given the original
    Residuals(ResidualsArgs),
    /// Generate text and measure how fast
    Generate(GenerateArgs),
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
    Devices(DevicesArgs),
    /// Say what this machine can do: drivers, libraries, host link, memory, cores
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell that is to complete
        shell: clap_complete::Shell,
    },
}

/// How weights are stored and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// AnyPrec: one codebook per row
    Ap,
    /// LUT-GEMM: binary-coded groups of channels
    Lutgemm,
}

impl From<BackendArg> for WeightFormat {
    fn from(backend: BackendArg) -> Self {
        match backend {
            BackendArg::Ap => Self::AnyPrec,
            BackendArg::Lutgemm => Self::LutGemm,
        }
    }
}

/// The type that products are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// IEEE half precision
    #[value(alias = "fp16")]
    Float16,
    /// bfloat16
    #[value(alias = "bf16")]
    Bfloat16,
    /// IEEE single precision
    #[value(alias = "fp32")]
    Float32,
}

/// How salient channels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SelectionArg {
    /// By calibrated buckets of |x|, as in the paper
    Bucket,
    /// The largest |x| of each chunk
    Exact,
}

impl From<SelectionArg> for Selection {
    fn from(selection: SelectionArg) -> Self {
        match selection {
            SelectionArg::Bucket => Self::Bucket,
            SelectionArg::Exact => Self::Exact,
        }
    }
}

/// `decdec quantize`
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// A Hugging Face directory, a .gguf file, or a wheel or zip that contains one
    pub(crate) source: PathBuf,
    /// Storage of the weights
    #[arg(long, value_enum)]
    pub(crate) backend: BackendArg,
    /// Bits of a weight: 2 to 8, or 3.5 (half the layers at 4 bits)
    #[arg(long)]
    pub(crate) bitwidth: BitWidth,
    /// Where the checkpoint goes
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Channels that share a scale in lutgemm [default: the largest of 128, 64, 32 that divides]
    #[arg(long, alias = "group_size")]
    pub(crate) group_size: Option<usize>,
    /// Plain rounding instead of AWQ's scale and clipping search, in lutgemm
    #[arg(long, alias = "no_awq")]
    pub(crate) no_awq: bool,
    /// What codes are fitted to: every weight by itself, a projection's output, or its output beside compensation
    #[arg(long, value_enum, default_value_t = RefineArg::Compensated)]
    pub(crate) refine: RefineArg,
    /// For --refine compensated: channels that will be compensated per 1024, for qkv, o, gu, d [default: 8 8 8 8]
    #[arg(long, alias = "for_k_chunks", num_args = 4, value_name = "K")]
    pub(crate) for_k_chunks: Option<Vec<usize>>,
    /// The same from what decdec tune found
    #[arg(long, alias = "for_tuned", value_name = "FILE", conflicts_with = "for_k_chunks")]
    pub(crate) for_tuned: Option<PathBuf>,
    /// Print sizes and time estimates, write nothing
    #[arg(long, alias = "dry_run")]
    pub(crate) dry_run: bool,
    /// Replace the checkpoint that is there
    #[arg(long)]
    pub(crate) overwrite: bool,
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

/// Where residuals wait on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum ResidualsArg {
    /// In pinned host memory, fetched over the host link
    #[default]
    Host,
    /// In device memory, for cards with room
    Device,
}

/// Where a model runs and how it is compensated.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// auto, cpu, wgpu[:N] or cuda[:N]
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Type of the products [default: float16 on cuda, float32 elsewhere]
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DtypeArg>,
    /// Where residuals wait (cuda)
    #[arg(long, value_enum, default_value_t = ResidualsArg::Host)]
    pub(crate) residuals: ResidualsArg,
    /// Thread blocks that compensate: one number, or one for each bit width of a mixed checkpoint
    #[arg(long, alias = "n_tbs", num_args = 1..=2, value_name = "N")]
    pub(crate) n_tbs: Option<Vec<usize>>,
    /// Channels compensated per 1024, for qkv, o, gu, d: four numbers, or four for each bit width
    #[arg(long, alias = "k_chunks", num_args = 1..=8, value_name = "K")]
    pub(crate) k_chunks: Option<Vec<usize>>,
    /// What decdec tune found, in place of --n-tbs and --k-chunks [default: tuned.json of the checkpoint]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["n_tbs", "k_chunks"])]
    pub(crate) tuned: Option<PathBuf>,
    /// How channels are found
    #[arg(long, value_enum, default_value_t = SelectionArg::Bucket)]
    pub(crate) selection: SelectionArg,
    /// Bits of the head: 16 as it is stored, 8 or 4 rounded while loading, which moves fewer bytes for each token
    #[arg(long, alias = "head_bits", value_name = "BITS", default_value_t = 16, value_parser = bench::parse_head_bits)]
    pub(crate) head_bits: usize,
}

impl RunArgs {
    /// The device, set up with everything recorded.
    pub(crate) fn target(&self) -> Target<'_> {
        Target { device: &self.device, dtype: self.dtype, residuals: self.residuals, ..Target::default() }
    }
}

/// `decdec generate`
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// A checkpoint, a directory as the reference's scripts write it, a full-precision source, or random:SEED
    /// (with --model-name, --backend and --bitwidth) to measure speed without weights
    #[arg(long, alias = "checkpoint_path", value_name = "PATH")]
    pub(crate) checkpoint_path: PathBuf,
    /// Text to go on from; without one, a single BOS token
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Independent generations [default: 1 with --prompt, 5 without]
    #[arg(long, alias = "num_samples", value_name = "N")]
    pub(crate) num_samples: Option<usize>,
    /// The most tokens to make in each, the prompt not counted
    #[arg(long, alias = "max_new_tokens", value_name = "N", default_value_t = 200)]
    pub(crate) max_new_tokens: usize,
    /// Sample among this many of the most probable tokens; 0 for all
    #[arg(long, alias = "top_k", value_name = "K", default_value_t = 200)]
    pub(crate) top_k: usize,
    /// Sample among the fewest tokens whose probabilities reach this sum
    #[arg(long, alias = "top_p", value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Sample among tokens at least this share as probable as the most probable one
    #[arg(long, alias = "min_p", value_name = "P", default_value_t = 0.0)]
    pub(crate) min_p: f32,
    /// 0 takes the most probable token; above, tokens are sampled
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Decides what is sampled; printed when it was not given
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// 0 generic kernels, 1 specialized kernels, 2 specialized and recorded in a graph (cuda)
    #[arg(long, value_name = "MODE", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub(crate) compile: u8,
    /// The model's name, checked against the checkpoint
    #[arg(long, alias = "model_name", value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Bits of a weight: which of the precisions that are stored, else checked against the checkpoint
    #[arg(long)]
    pub(crate) bitwidth: Option<BitWidth>,
    /// Storage of the weights, checked against the checkpoint
    #[arg(long, value_enum)]
    pub(crate) backend: Option<BackendArg>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Leave the residual scales of a reference directory in the order in which the reference leaves them
    #[arg(long, alias = "compat_scale_order")]
    pub(crate) compat_scale_order: bool,
    /// Put the prompt into the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,
    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
    /// End where this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Go on after tokens that end a text
    #[arg(long, alias = "ignore_eos")]
    pub(crate) ignore_eos: bool,
    /// Compensate the prompt too
    #[arg(long, alias = "compensate_prompt")]
    pub(crate) compensate_prompt: bool,
    /// The longest context, prompt included [default: what the prompt and --max-new-tokens need]
    #[arg(long, alias = "max_seq_len", value_name = "N")]
    pub(crate) max_seq_len: Option<usize>,
    /// Print the text although there is no --prompt
    #[arg(long, alias = "print_result")]
    pub(crate) print_result: bool,
    /// Print one JSON object per generation instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// `decdec eval …`
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Perplexity on a text, in windows that share no context
    Perplexity(PerplexityArgs),
}

/// `decdec eval perplexity`
#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// A checkpoint, a directory as the reference's scripts write it, or a full-precision source
    pub(crate) path: PathBuf,
    /// Bits of a weight: which of the precisions that are stored, else checked against the checkpoint
    #[arg(long)]
    pub(crate) bitwidth: Option<BitWidth>,
    /// The text
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens of a window
    #[arg(long, alias = "seq_len", default_value_t = 512)]
    pub(crate) seq_len: usize,
    /// Which windows, the end excluded, as in 100..112 [default: all]
    #[arg(long, value_parser = parse_range)]
    pub(crate) windows: Option<Range<usize>>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Leave the residual scales of a reference directory in the order in which the reference leaves them
    #[arg(long, alias = "compat_scale_order")]
    pub(crate) compat_scale_order: bool,
    /// A full-precision source to measure divergence from
    #[arg(long, value_name = "SOURCE")]
    pub(crate) compare: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `decdec inspect`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A checkpoint, a directory as the reference's scripts write it, or a full-precision source
    pub(crate) path: PathBuf,
    /// Bits of a weight: which of the precisions that are stored
    #[arg(long)]
    pub(crate) bitwidth: Option<BitWidth>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `decdec devices`
#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// `decdec doctor`
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `A..B`
fn parse_range(text: &str) -> Result<Range<usize>, String> {
    let (start, end) = text.split_once("..").ok_or("two numbers are expected, as in 100..112")?;
    let number = |part: &str| part.parse::<usize>().map_err(|_| format!("'{part}' is not a number"));
    let (start, end) = (number(start)?, number(end)?);
    if start < end { Ok(start..end) } else { Err(format!("{start}..{end} is empty, the end is excluded")) }
}
