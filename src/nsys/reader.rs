//! Reading a profile, of our writing or exported by a real Nsight Systems of any version: columns are probed,
//! never assumed, and whatever does not fit together is refused with what was found.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rusqlite::Connection;

use super::trace::{self, Line};
use super::writer::meta_rows;
use super::{Capture, DEC_KERNEL, Identity, KernelRecord, TokenTime, rows, tokens};
use crate::files;
use crate::format::Format;

/// Bytes of a trace; a sweep of 100,000 kernels writes some 4 MB.
const MAX_TRACE: u64 = 256 << 20;

/// Both files of a profile, joined.
#[derive(Debug, Clone)]
pub struct Profile {
    /// How it was taken, if we took it.
    pub capture: Option<Capture>,
    /// The card's name, if the file tells.
    pub device_name: Option<String>,
    /// Every line of the trace and when its kernel ran, in the order of launch.
    pub kernels: Vec<(Line, KernelRecord)>,
    /// What whole tokens took, in the order of measurement; empty where products were measured.
    pub tokens: Vec<TokenTime>,
}

/// Reads the trace and the SQLite file that belong to `identity`.
///
/// # Errors
/// A file that is missing, is no SQLite file, lacks a table or column, belongs to another model, algorithm or
/// width; a trace line that is not of the format; counts of kernels that disagree between the two files; a
/// kernel without a time.
pub fn read(trace: &Path, sqlite: &Path, identity: &Identity) -> Result<Profile> {
    let missing = |path: &Path| format!("cannot read {}: run decdec profile with the same names first", path.display());
    let text = files::read_text(trace, MAX_TRACE).with_context(|| missing(trace))?;
    let lines = trace::parse(&text, identity.format).with_context(|| trace.display().to_string())?;
    let db = rows::open(sqlite).with_context(|| missing(sqlite))?;
    join(&db, &lines, identity).with_context(|| sqlite.display().to_string())
}

/// How the profile at `sqlite` was taken, finished or not; `None` where it does not say.
///
/// # Errors
/// A file that is there but is no profile.
pub(crate) fn capture(sqlite: &Path) -> Result<Option<Capture>> {
    let in_file = || format!("cannot read {}", sqlite.display());
    let db = rows::open(sqlite).with_context(in_file)?;
    if !rows::tables(&db).with_context(in_file)?.iter().any(|table| table == "META_DATA_CAPTURE") {
        return Ok(None);
    }
    Capture::from_rows(&meta_rows(&db, "META_DATA_CAPTURE").with_context(in_file)?).with_context(in_file)
}

fn join(db: &Connection, lines: &[Line], identity: &Identity) -> Result<Profile> {
    let tables = rows::tables(db)?;
    let has = |table: &str| tables.iter().any(|t| t == table);
    let meta = if has("META_DATA_CAPTURE") { meta_rows(db, "META_DATA_CAPTURE").unwrap_or_default() } else { vec![] };
    let capture = Capture::from_rows(&meta)?;
    if let Some(capture) = &capture {
        check_identity(&capture.identity, identity)?;
    }
    let gpu = has("TARGET_INFO_GPU").then(|| db.query_row("SELECT name FROM TARGET_INFO_GPU", [], |row| row.get(0)));
    let device_name = gpu.and_then(Result::ok).flatten();
    let gemv = identity.format.gemv_kernel();
    let mut found = rows::kernels(db, &tables, &[&Format::ALL.map(Format::gemv_kernel)[..], &[DEC_KERNEL]].concat())?;
    for name in [gemv, DEC_KERNEL] {
        let named = lines.iter().filter(|line| line.kernel_name(identity.format) == name).count();
        let ran = found.get(name).map_or(0, Vec::len);
        let mut others = Format::ALL.into_iter().filter(|other| found.contains_key(other.gemv_kernel()));
        if name == gemv
            && ran == 0
            && let Some(other) = others.next()
        {
            bail!("it holds {} but no {gemv}: the profile was taken with --algo {}", other.gemv_kernel(), other.algo());
        }
        ensure!(
            named == ran,
            "the trace names {name} {named} times, but {ran} such kernels ran: the two files are not of one run"
        );
    }
    let mut queues: HashMap<_, _> =
        found.iter_mut().map(|(name, records)| (name.as_str(), records.drain(..))).collect();
    let mut next = |line: &Line| queues.get_mut(line.kernel_name(identity.format)).and_then(Iterator::next);
    let kernels =
        lines.iter().map(|line| Ok((*line, next(line).context("counts were checked")?))).collect::<Result<_>>()?;
    let tokens = if has(tokens::TABLE) { tokens::read(db)? } else { Vec::new() };
    Ok(Profile { capture, device_name, kernels, tokens })
}

fn check_identity(found: &Identity, asked: &Identity) -> Result<()> {
    for (what, found, asked) in [
        ("the model", &found.model, &asked.model),
        ("--algo", &found.format.algo().into(), &asked.format.algo().into()),
        ("--bitwidth", &found.bits.to_string(), &asked.bits.to_string()),
        ("--fp-dtype", &found.precision.name().into(), &asked.precision.name().into()),
    ] {
        ensure!(found == asked, "{what} of this profile is {found}, not {asked}: give the names it was taken with");
    }
    Ok(())
}
