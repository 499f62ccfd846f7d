//! `decdec devices`, and the step from `--device` to a backend.

use anyhow::{Result, bail};
use decdec::backend::cpu::Cpu;
use decdec::backend::cuda::{self, Cuda};
use decdec::backend::{DecodeBackend, DeviceInfo};
use decdec::weights::ModelWeights;

use crate::cli::{DtypeArg, JsonArg, ResidualsArg, RunArgs};
use crate::output;

/// What is to be done on a device, whatever its backend.
pub(crate) trait Job {
    /// What comes of it.
    type Output;
    /// The model that it will load and the longest text, for a device whose memory may be short.
    fn needs(&self) -> Option<(&dyn ModelWeights, usize)> {
        None
    }
    /// Does it.
    fn run<B: DecodeBackend>(self, backend: &B) -> Result<Self::Output>;
}

/// A kind of device that may or may not be here.
struct Found {
    kind: &'static str,
    devices: Result<Vec<DeviceInfo>>,
}

/// The device that a job runs on, and how it is set up.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) device: &'a str,
    pub(crate) dtype: Option<DtypeArg>,
    pub(crate) residuals: ResidualsArg,
    pub(crate) compile: u8,
    /// Fused launches note when they pass from one part of a layer to the next.
    pub(crate) watch: bool,
}

impl Default for Target<'_> {
    fn default() -> Self {
        Self { device: "auto", dtype: None, residuals: ResidualsArg::Host, compile: 2, watch: false }
    }
}

impl<'a> Target<'a> {
    /// The device of a run, set up with everything recorded.
    pub(crate) fn of(args: &'a RunArgs) -> Self {
        Self { device: &args.on.device, dtype: args.dtype, residuals: args.residuals, ..Self::default() }
    }
}

/// Opens the device that `--device` names and runs `job` on it.
///
/// # Errors
/// A device that is unknown, missing, or not built in; each says what to do.
pub(crate) fn on_device<J: Job>(target: &Target<'_>, job: J) -> Result<J::Output> {
    let (kind, index) = parse(target.device)?;
    match kind {
        "auto" => match cuda_device(0, target) {
            Ok(backend) => on_cuda(&backend, job),
            Err(error) => {
                tracing::info!("running on cpu ({error:#})");
                note_dtype("cpu", target.dtype);
                job.run(&Cpu::new())
            }
        },
        "cpu" => {
            note_dtype("cpu", target.dtype);
            job.run(&Cpu::new())
        }
        "cuda" => on_cuda(&cuda_device(index.unwrap_or(0), target)?, job),
        #[cfg(feature = "reference-wgpu")]
        "wgpu" => {
            note_dtype("wgpu", target.dtype);
            job.run(&decdec::backend::wgsl::Wgpu::open(index)?)
        }
        #[cfg(not(feature = "reference-wgpu"))]
        "wgpu" => bail!("this program was built without wgpu, build it with --features reference-wgpu"),
        _ => bail!("no device '{}', auto, cpu, wgpu[:N] and cuda[:N] are known", target.device),
    }
}

fn cuda_device(index: usize, target: &Target<'_>) -> Result<Cuda> {
    let mut cuda = Cuda::new(index, options(target))?;
    cuda.heed(super::interrupt::heard());
    if target.watch {
        cuda.watch_layers()?;
    }
    Ok(cuda)
}

fn options(target: &Target<'_>) -> cuda::Options {
    cuda::Options {
        dtype: match target.dtype {
            None | Some(DtypeArg::Float16) => cuda::Dtype::Float16,
            Some(DtypeArg::Bfloat16) => cuda::Dtype::Bfloat16,
            Some(DtypeArg::Float32) => cuda::Dtype::Float32,
        },
        residuals: match target.residuals {
            ResidualsArg::Host => cuda::Residuals::Host,
            ResidualsArg::Device => cuda::Residuals::Device,
        },
        compile: target.compile,
        ..cuda::Options::default()
    }
}

/// What will be taken is told, and checked, before anything is.
fn on_cuda<J: Job>(backend: &Cuda, job: J) -> Result<J::Output> {
    if let Some((weights, max_seq_len)) = job.needs() {
        let memory = backend.memory_table(weights, max_seq_len)?;
        tracing::info!("{memory}");
        memory.check()?;
    }
    job.run(backend)
}

/// `kind[:index]`
fn parse(device: &str) -> Result<(&str, Option<usize>)> {
    let Some((kind, index)) = device.split_once(':') else { return Ok((device, None)) };
    match index.parse() {
        Ok(index) if kind == "wgpu" || kind == "cuda" => Ok((kind, Some(index))),
        _ => bail!("no device '{device}', auto, cpu, wgpu[:N] and cuda[:N] are known"),
    }
}

fn note_dtype(device: &str, dtype: Option<DtypeArg>) {
    if matches!(dtype, Some(DtypeArg::Float16 | DtypeArg::Bfloat16)) {
        tracing::info!("{device} computes in float32, --dtype changes nothing");
    }
}

fn find() -> Vec<Found> {
    use decdec::backend::GemvBackend;
    let mut found = vec![Found { kind: "cpu", devices: Ok(vec![Cpu::new().device().clone()]) }];
    found.push(Found { kind: "cuda", devices: cuda::devices() });
    found.push(Found { kind: "wgpu", devices: vulkan() });
    found
}

/// Every Vulkan adapter.
pub(crate) fn vulkan() -> Result<Vec<DeviceInfo>> {
    #[cfg(feature = "reference-wgpu")]
    return decdec::backend::wgsl::adapters();
    #[cfg(not(feature = "reference-wgpu"))]
    bail!("built without wgpu, build with --features reference-wgpu")
}

/// Prints what can run here, and why not otherwise.
pub(crate) fn run(args: &JsonArg) -> Result<()> {
    let found = find();
    if args.json {
        let rows: Vec<_> = found
            .iter()
            .flat_map(|found| {
                match &found.devices {
                Ok(devices) => devices
                    .iter()
                    .map(|d| {
                        serde_json::json!({"device": d.id, "name": d.name, "driver": d.driver, "max_n_tb": d.max_n_tb})
                    })
                    .collect(),
                Err(error) => vec![serde_json::json!({"device": found.kind, "missing": format!("{error:#}")})],
            }
            })
            .collect();
        return output::line(serde_json::to_string_pretty(&rows)?);
    }
    let mut table = super::table();
    table.set_header(["device", "name", "driver", "n_tb at most"]);
    for Found { kind, devices } in found {
        match devices {
            Ok(devices) => {
                for d in devices {
                    table.add_row([d.id, d.name, d.driver, d.max_n_tb.to_string()]);
                }
            }
            Err(error) => {
                table.add_row([kind.to_owned(), format!("not here: {error:#}"), String::new(), String::new()]);
            }
        }
    }
    output::line(&table)
}
