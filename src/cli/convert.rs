//! Arguments of `decdec convert` and `decdec residuals`, and of calibration.

use std::path::PathBuf;

use clap::Args;
use decdec::checkpoint::BitWidth;

/// What a model reads while it is watched.
#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Calibration text; when absent, the model's own
    #[arg(long, value_name = "FILE")]
    pub(crate) calib: Option<PathBuf>,
    /// Tokens of a calibration sample [default: 512 with --calib, 256 without]
    #[arg(long, alias = "seq_len")]
    pub(crate) seq_len: Option<usize>,
    /// Calibration samples [default: 24 with --calib, 16 without]
    #[arg(long)]
    pub(crate) samples: Option<usize>,
    /// Decides the calibration text that the model makes
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// `decdec convert`
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// A directory as the reference's scripts write it, an AWQ or GPTQ checkpoint, a full-precision one whose
    /// quantization is simulated, or a decdec checkpoint
    pub(crate) path: PathBuf,
    /// Where the checkpoint goes
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Which of the precisions that are stored, where there are several
    #[arg(long)]
    pub(crate) bitwidth: Option<BitWidth>,
    /// The full-precision model, to make residuals and thresholds against
    #[arg(long, value_name = "SOURCE")]
    pub(crate) original: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Replace the checkpoint that is there
    #[arg(long)]
    pub(crate) overwrite: bool,
}

/// `decdec residuals`
#[derive(Debug, Args)]
pub(crate) struct ResidualsArgs {
    /// The full-precision model: a Hugging Face directory or a .gguf file
    #[arg(long, value_name = "SOURCE")]
    pub(crate) original: PathBuf,
    /// The quantized model: whatever decdec convert takes
    #[arg(long, value_name = "DIR")]
    pub(crate) quantized: PathBuf,
    /// Where the checkpoint goes: the quantized weights as they are, residuals, thresholds
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Which of the precisions that are stored, where there are several
    #[arg(long)]
    pub(crate) bitwidth: Option<BitWidth>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Replace the checkpoint that is there
    #[arg(long)]
    pub(crate) overwrite: bool,
}
