//! From a name to a device: the one place above backends that tells them apart.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda};
use crate::backend::{DecodeBackend, DeviceInfo, GemvBackend, Interrupted};
use crate::config::ModelConfig;
use crate::progress::Progress;
use crate::quantize::compute::Compute;
use crate::quantize::{self, Estimate, Report, ResidualOptions};
use crate::tokenizer::TextFiles;
use crate::weights::ModelWeights;

pub use crate::backend::cuda::{Dtype, Occupied, Residuals};

/// How a device is set up.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The type of products; `None` is float16 on CUDA. Other devices compute in float32, whatever is asked for.
    pub dtype: Option<Dtype>,
    /// Where residuals wait (CUDA).
    pub residuals: Residuals,
    /// 0 generic kernels, 1 specialized kernels, 2 specialized and recorded in a graph (CUDA).
    pub compile: u8,
    /// Fused launches note when they pass from one part of a layer to the next (CUDA).
    pub watch: bool,
    /// Whoever works on the device ends soon after this becomes true.
    pub interrupt: Option<&'static AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Self { dtype: None, residuals: Residuals::Host, compile: 2, watch: false, interrupt: None }
    }
}

/// A device that models run on. It stays on the thread that opened it.
pub struct Device {
    backend: Backend,
    interrupt: Option<&'static AtomicBool>,
}

enum Backend {
    Cpu(Cpu),
    Cuda(Box<Cuda>),
    #[cfg(feature = "reference-wgpu")]
    Wgpu(Box<crate::backend::wgsl::Wgpu>),
}

/// What is to be done on a device, whatever its backend.
pub trait Job<'d> {
    /// What comes of it.
    type Output;
    /// Does it.
    fn run<B: DecodeBackend + 'd>(self, backend: &'d B) -> Self::Output;
}

/// A kind of device that may or may not be here.
pub struct Found {
    /// `cpu`, `cuda` or `wgpu`.
    pub kind: &'static str,
    /// All that are here, or why there are none.
    pub devices: Result<Vec<DeviceInfo>>,
}

/// What can run here, and why not otherwise.
pub fn find() -> Vec<Found> {
    let cpu = Found { kind: "cpu", devices: Ok(vec![Cpu::new().device().clone()]) };
    [cpu, Found { kind: "cuda", devices: cuda::devices() }, Found { kind: "wgpu", devices: vulkan() }].into()
}

/// Every Vulkan adapter.
///
/// # Errors
/// No driver, or a build without the feature `reference-wgpu`.
pub fn vulkan() -> Result<Vec<DeviceInfo>> {
    #[cfg(feature = "reference-wgpu")]
    return crate::backend::wgsl::adapters();
    #[cfg(not(feature = "reference-wgpu"))]
    bail!("built without wgpu, build with --features reference-wgpu")
}

impl Device {
    /// Opens `auto`, `cpu`, `cuda[:N]` or `wgpu[:N]`; `auto` is the first CUDA device if there is one, and the CPU
    /// otherwise.
    ///
    /// # Errors
    /// A device that is unknown, missing, or not built in; each says what to do.
    pub fn open(name: &str) -> Result<Self> {
        Self::open_with(name, &Options::default())
    }

    /// [`Device::open`], set up as `options` say.
    ///
    /// # Errors
    /// Those of [`Device::open`].
    pub fn open_with(name: &str, options: &Options) -> Result<Self> {
        let (kind, index) = parse(name)?;
        let backend = match kind {
            "auto" => match open_cuda(0, options) {
                Ok(cuda) => Backend::Cuda(cuda),
                Err(error) => {
                    tracing::info!("running on cpu ({error:#})");
                    open_cpu(options)
                }
            },
            "cpu" => open_cpu(options),
            "cuda" => Backend::Cuda(open_cuda(index.unwrap_or(0), options)?),
            #[cfg(feature = "reference-wgpu")]
            "wgpu" => {
                note_dtype("wgpu", options.dtype);
                Backend::Wgpu(Box::new(crate::backend::wgsl::Wgpu::open(index)?))
            }
            #[cfg(not(feature = "reference-wgpu"))]
            "wgpu" => bail!("this program was built without wgpu, build it with --features reference-wgpu"),
            _ => bail!("no device '{name}', auto, cpu, wgpu[:N] and cuda[:N] are known"),
        };
        Ok(Self { backend, interrupt: options.interrupt })
    }

    /// What it says of itself.
    pub fn info(&self) -> &DeviceInfo {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.device(),
            Backend::Cuda(cuda) => cuda.device(),
            #[cfg(feature = "reference-wgpu")]
            Backend::Wgpu(wgpu) => wgpu.device(),
        }
    }

    /// The flag that ends whoever works on it.
    pub fn interrupt(&self) -> Option<&'static AtomicBool> {
        self.interrupt
    }

    /// Runs `job` on it.
    pub fn run<'d, J: Job<'d>>(&'d self, job: J) -> J::Output {
        match &self.backend {
            Backend::Cpu(cpu) => job.run(cpu),
            Backend::Cuda(cuda) => job.run(cuda.as_ref()),
            #[cfg(feature = "reference-wgpu")]
            Backend::Wgpu(wgpu) => job.run(wgpu.as_ref()),
        }
    }

    /// Makes a checkpoint of `source` at `out` as [`quantize::quantize`] says, computing here: on a GPU of CUDA's, else on the
    /// cores of this machine.
    ///
    /// # Errors
    /// Those of [`quantize::quantize`]; a GPU that fails or has no room, with the way out: what is finished is kept.
    pub fn quantize(
        &self,
        source: &dyn ModelWeights,
        texts: &TextFiles,
        options: &quantize::Options,
        out: &Path,
        stop: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<Report> {
        self.quantizing(source, |on| quantize::quantize_on(on, source, texts, options, out, stop, progress))
    }

    /// Makes a checkpoint at `out` of `quantized` with residuals against `original`, as [`quantize::residuals`] says,
    /// computing here: on a GPU of CUDA's, else on the cores of this machine.
    ///
    /// # Errors
    /// Those of [`quantize::residuals`]; a GPU that fails or has no room, with the way out: what is finished is kept.
    #[allow(clippy::too_many_arguments, reason = "those of `residuals`, and the device")]
    pub fn residuals(
        &self,
        original: &dyn ModelWeights,
        quantized: &dyn ModelWeights,
        texts: &TextFiles,
        options: &ResidualOptions,
        out: &Path,
        stop: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<Report> {
        let work =
            |on: &dyn Compute| quantize::residuals_on(on, original, quantized, texts, options, out, stop, progress);
        self.quantizing(original, work)
    }

    /// What [`Device::quantize`] would take of a model of `config`, as [`quantize::estimate`] says, with the time here.
    ///
    /// # Errors
    /// Options that do not fit the model; a GPU that fails.
    pub fn estimate(&self, config: &ModelConfig, options: &quantize::Options) -> Result<Estimate> {
        match &self.backend {
            Backend::Cuda(cuda) => quantize::estimate_on_gpu(config, options, cuda.quantizer(config, None)?.rates()?),
            _ => quantize::estimate(config, options),
        }
    }

    /// Quantization's arithmetic here.
    fn quantizing<T>(&self, source: &dyn ModelWeights, work: impl FnOnce(&dyn Compute) -> Result<T>) -> Result<T> {
        let Backend::Cuda(cuda) = &self.backend else {
            if !matches!(self.backend, Backend::Cpu(_)) {
                tracing::info!("quantizing on the cores of this machine, cpu and cuda[:N] are what it knows");
            }
            return work(&quantize::Host);
        };
        let on = cuda.quantizer(source.config(), None)?;
        let done = work(&on);
        tracing::info!("peak device memory {} MB", on.peak() / 1_000_000);
        // A job that keeps what it has finished says so itself.
        done.map_err(|error| if error.is::<Interrupted>() { quantize::Interrupted.into() } else { error })
    }

    /// Holds what the card that this device acts as does not have, for at most `most`, while something is measured: see
    /// [`Cuda::occupy_rest`]; `None` for a device that acts as itself.
    ///
    /// # Errors
    /// Those of [`Cuda::occupy_rest`].
    pub fn occupy_rest(&self, most: Duration) -> Result<Option<Occupied>> {
        let Backend::Cuda(cuda) = &self.backend else { return Ok(None) };
        cuda.occupy_rest(most)
    }

    /// Says what a model will take with texts of `max_seq_len` tokens, where that is short: in a GPU's memory.
    ///
    /// # Errors
    /// What is too much, with both numbers and the way out; tensors that cannot be read.
    pub(crate) fn ensure_memory(&self, weights: &dyn ModelWeights, max_seq_len: usize) -> Result<()> {
        let Backend::Cuda(cuda) = &self.backend else { return Ok(()) };
        let memory = cuda.memory_table(weights, max_seq_len)?;
        tracing::info!("{memory}");
        memory.check()
    }
}

fn open_cpu(options: &Options) -> Backend {
    note_dtype("cpu", options.dtype);
    Backend::Cpu(Cpu::new())
}

fn open_cuda(index: usize, options: &Options) -> Result<Box<Cuda>> {
    let own = cuda::Options {
        dtype: options.dtype.unwrap_or(Dtype::Float16),
        residuals: options.residuals,
        compile: options.compile,
        ..cuda::Options::default()
    };
    let mut cuda = Cuda::new(index, own)?;
    if let Some(flag) = options.interrupt {
        cuda.heed(flag);
    }
    if options.watch {
        cuda.watch_layers()?;
    }
    Ok(Box::new(cuda))
}

/// `kind[:index]`
fn parse(name: &str) -> Result<(&str, Option<usize>)> {
    let Some((kind, index)) = name.split_once(':') else { return Ok((name, None)) };
    match index.parse() {
        Ok(index) if kind == "wgpu" || kind == "cuda" => Ok((kind, Some(index))),
        _ => bail!("no device '{name}', auto, cpu, wgpu[:N] and cuda[:N] are known"),
    }
}

fn note_dtype(device: &str, dtype: Option<Dtype>) {
    if matches!(dtype, Some(Dtype::Float16 | Dtype::Bfloat16)) {
        tracing::info!("{device} computes in float32, --dtype changes nothing");
    }
}
