//! Flags that several commands have, each defined once.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use decdec::checkpoint::BitWidth;
use decdec::dec::{CHUNK, Selection};
use decdec::device::{Dtype, Residuals};
use decdec::format::Format;
use decdec::quantize::Calibration;
use decdec::sampling::Sampling;

use super::numbers::{head_bits, kv_bits, own_share, seed, share, temperature, whole};

/// A parser of the names of formats, which help lists.
pub(super) fn backend() -> impl TypedValueParser<Value = Format> {
    let names = Format::ALL.map(|format| PossibleValue::new(format.name()).help(format.about()));
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Format>())
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

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::Float16 => Self::Float16,
            DtypeArg::Bfloat16 => Self::Bfloat16,
            DtypeArg::Float32 => Self::Float32,
        }
    }
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

/// Where residuals wait on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum ResidualsArg {
    /// In pinned host memory, fetched over the host link
    #[default]
    Host,
    /// In device memory, for cards with room
    Device,
}

impl From<ResidualsArg> for Residuals {
    fn from(residuals: ResidualsArg) -> Self {
        match residuals {
            ResidualsArg::Host => Self::Host,
            ResidualsArg::Device => Self::Device,
        }
    }
}

/// Which model.
#[derive(Debug, Args)]
pub(crate) struct NamedArgs {
    /// A checkpoint, a directory as the reference's scripts write it, a full-precision source, ORG/MODEL on the Hugging
    /// Face Hub, or random:SEED for random numbers in the shapes of the preset --model-name, to measure speed without
    /// weights
    #[arg(long, value_name = "PATH", env = "DECDEC_CHECKPOINT_PATH", hide_env_values = true)]
    pub(crate) checkpoint_path: PathBuf,
    /// The model's name: checked against the checkpoint, or the preset of random weights
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
}

/// Which of the precisions that a model is stored in.
#[derive(Debug, Args)]
pub(crate) struct WidthArg {
    /// Bits of a weight: which of the precisions that are stored, else checked against the checkpoint
    #[arg(long, value_name = "BITS")]
    pub(crate) bitwidth: Option<BitWidth>,
}

/// Which model, and what it is.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) named: NamedArgs,
    #[command(flatten)]
    pub(crate) width: WidthArg,
    /// Storage of the weights, checked against the checkpoint
    #[arg(long, value_parser = backend())]
    pub(crate) backend: Option<Format>,
}

/// Which device, and how channels are found there.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// auto, cpu, wgpu[:N] or cuda[:N]
    #[arg(long, default_value = "auto", env = "DECDEC_DEVICE", hide_env_values = true)]
    pub(crate) device: String,
    /// How channels are found
    #[arg(long, value_enum, default_value_t = SelectionArg::Bucket)]
    pub(crate) selection: SelectionArg,
}

/// Where a model runs and how it is compensated.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) on: DeviceArgs,
    /// Type of the products [default: float16 on cuda, float32 elsewhere]
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DtypeArg>,
    /// Where residuals wait (cuda)
    #[arg(long, value_enum, default_value_t = ResidualsArg::Host)]
    pub(crate) residuals: ResidualsArg,
    /// Thread blocks that compensate: one number, or one for each bit width of a mixed checkpoint
    #[arg(long, num_args = 1..=2, value_name = "N", value_parser = whole(0..=usize::MAX))]
    pub(crate) n_tbs: Option<Vec<usize>>,
    /// Channels compensated per 1024, for qkv, o, gu, d: four numbers, or four for each bit width
    #[arg(long, num_args = 1..=8, value_name = "K", value_parser = whole(0..=CHUNK))]
    pub(crate) k_chunks: Option<Vec<usize>>,
    /// What decdec tune found, in place of --n-tbs and --k-chunks [default: tuned.json of the checkpoint]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["n_tbs", "k_chunks"])]
    pub(crate) tuned: Option<PathBuf>,
    /// Bits of the head: 16 as it is stored, 8 or 4 rounded while loading, which moves fewer bytes for each token
    #[arg(long, value_name = "BITS", default_value_t = 16, value_parser = head_bits)]
    pub(crate) head_bits: usize,
    /// Bits of keys and values: 16 keeps them in the type of products, 8 rounds them, so that a text takes half the memory
    #[arg(long, value_name = "BITS", default_value_t = 16, value_parser = kv_bits)]
    pub(crate) kv_bits: usize,
    /// Leave the residual scales of a reference directory in the order in which the reference leaves them
    #[arg(long)]
    pub(crate) compat_scale_order: bool,
}

/// Where a checkpoint goes.
#[derive(Debug, Args)]
pub(crate) struct OutArgs {
    /// Where the checkpoint goes
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Replace the checkpoint that is there
    #[arg(long)]
    pub(crate) overwrite: bool,
}

/// What a model reads while it is watched.
#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Calibration text: text files, .jsonl files with text or messages, directories; when absent, the model writes all
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) calib: Vec<PathBuf>,
    /// With --calib: the share of calibration samples that the model still writes, 0 to 0.95
    #[arg(long, value_name = "SHARE", default_value_t = Calibration::OWN_SHARE, value_parser = own_share)]
    pub(crate) own_share: f64,
    /// Tokens of a calibration sample [default: 512, or the model's context]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) seq_len: Option<usize>,
    /// Calibration samples in all [default: 32, on a GPU 392]
    #[arg(long, value_name = "N", value_parser = whole(1..=usize::MAX))]
    pub(crate) samples: Option<usize>,
    /// Decides the calibration text that the model writes
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = seed)]
    pub(crate) seed: u64,
    /// Where to compute: auto, cpu or cuda[:N]
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// Sample among this many of the most probable tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = whole(0..=usize::MAX))]
    pub(crate) top_k: usize,
    /// Sample among the fewest tokens whose probabilities reach this sum
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    pub(crate) top_p: f32,
    /// Sample among tokens at least this share as probable as the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    pub(crate) min_p: f32,
    /// 0 takes the most probable token; above, tokens are sampled
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub(crate) temperature: f32,
    /// Decides what is sampled; printed when it was not given
    #[arg(long, value_name = "N", value_parser = seed)]
    pub(crate) seed: Option<u64>,
}

impl SamplingArgs {
    /// The rules that they are.
    pub(crate) fn rules(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, min_p: self.min_p }
    }

    /// What decides choices: as it was given, or a seed that differs from run to run and is said where it matters.
    pub(crate) fn seed(&self) -> u64 {
        let fresh = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            // Short enough to be typed back.
            let seed = u64::from(now.subsec_nanos()) ^ (now.as_secs() & 0xffff_ffff);
            if self.temperature > 0.0 {
                tracing::info!("--seed {seed}");
            }
            seed
        };
        self.seed.unwrap_or_else(fresh)
    }
}

/// How a result is printed.
#[derive(Debug, Args)]
pub(crate) struct JsonArg {
    /// Print JSON in place of text
    #[arg(long)]
    pub(crate) json: bool,
}
