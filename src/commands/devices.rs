//! `decdec devices`, and the step from `--device` to a device.

use anyhow::Result;
use decdec::device::{self, Device, Found, Options};

use crate::cli::{CalibrationArgs, JsonArg, RunArgs};
use crate::output;

/// The device of a run; a job that asked for [`stop_flag`](super::interrupt::stop_flag) ends soon after Ctrl-C.
///
/// # Errors
/// Those of [`Device::open`].
pub(crate) fn open(args: &RunArgs, options: Options) -> Result<Device> {
    let options = Options { dtype: args.dtype.map(Into::into), residuals: args.residuals.into(), ..options };
    Device::open_with(&args.on.device, &Options { interrupt: Some(super::interrupt::heard()), ..options })
}

/// The device that a model is quantized on.
///
/// # Errors
/// Those of [`Device::open`].
pub(crate) fn quantizing(args: &CalibrationArgs) -> Result<Device> {
    Device::open_with(&args.device, &Options { interrupt: Some(super::interrupt::heard()), ..Options::default() })
}

/// Prints what can run here, and why not otherwise.
pub(crate) fn run(args: &JsonArg) -> Result<()> {
    let found = device::find();
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
