//! A sweep under a real Nsight Systems: the program runs itself under `nsys`, whose times replace its own.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Options;
use crate::nsys;

/// Runs `child` under `nsys` and writes the two files with the times that `nsys` took; returns their paths.
///
/// `child` makes the command line (program first) of the same sweep, without `--nsys-path`, whose files go to
/// the directory that it is given.
///
/// # Errors
/// As [`super::run`] for files that are there already; `nsys` that cannot be started, fails, or leaves no export
/// that fits what was launched.
pub fn under_nsight(
    nsys: &Path,
    options: &Options,
    child: impl FnOnce(&Path) -> Vec<OsString>,
) -> Result<(PathBuf, PathBuf)> {
    options.identity.validate()?;
    let identity = &options.identity;
    let (trace, sqlite) = (identity.trace(&options.dir), identity.sqlite(&options.dir));
    if !options.overwrite && (trace.exists() || sqlite.exists()) {
        anyhow::bail!("{} is there: use --overwrite to measure again", trace.with_extension("*").display());
    }
    let version = output(Command::new(nsys).arg("--version"), nsys)?;
    let version = version.lines().next().unwrap_or_default().trim().to_owned();
    fs::create_dir_all(&options.dir).with_context(|| format!("cannot create {}", options.dir.display()))?;
    let prefix = identity.stem() + ".nsys.";
    let staging = tempfile::Builder::new().prefix(&prefix).tempdir_in(&options.dir);
    let staging = staging.with_context(|| format!("cannot write to {}", options.dir.display()))?;
    let report = staging.path().join("report");
    let mut command = Command::new(nsys);
    command.args(["profile", "--trace=cuda", "--cuda-graph-trace=node", "--export=sqlite", "--force-overwrite=true"]);
    command.arg("--output").arg(&report).args(child(staging.path()));
    output(&mut command, nsys)?;
    let export = report.with_extension("sqlite");
    let clock = if version.is_empty() { "Nsight Systems".into() } else { version };
    nsys::adopt(identity, staging.path(), &export, &options.dir, &clock)?;
    staging.close().context("cannot remove what nsys left")?;
    Ok((trace, sqlite))
}

/// Runs `command` and returns what it printed; its errors and progress go to ours.
fn output(command: &mut Command, nsys: &Path) -> Result<String> {
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}: --nsys-path is the program nsys of Nsight Systems", nsys.display()))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{} ended with {}: {}", nsys.display(), output.status, printed.trim());
    Ok(printed)
}
