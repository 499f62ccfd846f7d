//! `decdec devices`, and the step from `--device` to a backend.

use anyhow::{Result, bail};
use decdec::backend::cpu::Cpu;
use decdec::backend::{DecodeBackend, DeviceInfo};

use crate::cli::{DevicesArgs, DtypeArg};

/// What is to be done on a device, whatever its backend.
pub(crate) trait Job {
    /// What comes of it.
    type Output;
    /// Does it.
    fn run<B: DecodeBackend>(self, backend: &B) -> Result<Self::Output>;
}

/// A kind of device that may or may not be here.
struct Found {
    kind: &'static str,
    devices: Result<Vec<DeviceInfo>>,
}

/// Opens the device that `--device` and `--dtype` name and runs `job` on it.
///
/// # Errors
/// A device that is unknown, missing, or not built in; each says what to do.
pub(crate) fn on_device<J: Job>(device: &str, dtype: Option<DtypeArg>, job: J) -> Result<J::Output> {
    let (kind, index) = parse(device)?;
    match kind {
        "auto" | "cpu" => {
            if kind == "auto" {
                tracing::info!("running on cpu");
            }
            note_dtype("cpu", dtype);
            job.run(&Cpu::new())
        }
        #[cfg(feature = "reference-wgpu")]
        "wgpu" => {
            note_dtype("wgpu", dtype);
            job.run(&decdec::backend::wgsl::Wgpu::open(index)?)
        }
        #[cfg(not(feature = "reference-wgpu"))]
        "wgpu" => {
            let _ = index;
            bail!("this program was built without wgpu, build it with --features reference-wgpu")
        }
        _ => bail!("no device '{device}', auto, cpu, wgpu[:N] and cuda[:N] are known"),
    }
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
    #[cfg(feature = "reference-wgpu")]
    found.push(Found { kind: "wgpu", devices: decdec::backend::wgsl::adapters() });
    #[cfg(not(feature = "reference-wgpu"))]
    found.push(Found {
        kind: "wgpu",
        devices: Err(anyhow::anyhow!("built without wgpu, build with --features reference-wgpu")),
    });
    found
}

/// Prints what can run here, and why not otherwise.
#[allow(clippy::print_stdout, reason = "the command's result")]
pub(crate) fn run(args: &DevicesArgs) -> Result<()> {
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
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
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
    println!("{table}");
    Ok(())
}
