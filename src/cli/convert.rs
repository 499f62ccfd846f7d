//! Arguments of `decdec convert` and `decdec residuals`.

use std::path::PathBuf;

use clap::Args;

use super::{CalibrationArgs, OutArgs, WidthArg};

/// `decdec convert`
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// A directory as the reference's scripts write it, an AWQ or GPTQ checkpoint, a full-precision one whose
    /// quantization is simulated, or a decdec checkpoint
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) to: OutArgs,
    #[command(flatten)]
    pub(crate) width: WidthArg,
    /// The full-precision model, which residuals and thresholds are made against
    #[arg(long, value_name = "SOURCE")]
    pub(crate) original: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
}

/// `decdec residuals`
#[derive(Debug, Args)]
pub(crate) struct ResidualsArgs {
    /// The full-precision model, which residuals and thresholds are made against
    #[arg(long, value_name = "SOURCE")]
    pub(crate) original: PathBuf,
    /// The quantized model: whatever decdec convert takes
    #[arg(long, value_name = "DIR")]
    pub(crate) quantized: PathBuf,
    #[command(flatten)]
    pub(crate) to: OutArgs,
    #[command(flatten)]
    pub(crate) width: WidthArg,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
}
