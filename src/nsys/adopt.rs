//! The times of a real Nsight Systems for a profile that a program running under it took with its own clock.
//!
//! The program's own files say what every launch was for and what its kernel is called; the export says when
//! those kernels ran. The sweep is the last thing that the program launches, so of every name the last kernels
//! of the export are the sweep's.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::rows::{self, bare};
use super::trace::{Kernel, Line};
use super::{Capture, DEC_KERNEL, Identity, KernelRecord, Writer, read};

/// Reads the profile of `identity` in `staging`, replaces its times by those of `export`, and writes it to `dir`
/// as taken by `clock`.
///
/// Each launch must have run exactly once. A compensation that has no kernel of its own keeps its place within
/// the launch that contains it.
///
/// # Errors
/// As [`read`]; a kernel that the export has fewer times than the profile.
pub fn adopt(identity: &Identity, staging: &Path, export: &Path, dir: &Path, clock: &str) -> Result<()> {
    let own = read(&identity.trace(staging), &identity.sqlite(staging), identity)?;
    let capture = own.capture.context("the profile taken under nsys does not say how it was taken")?;
    let db = rows::open(export).with_context(|| format!("cannot read {}", export.display()))?;
    let kernels = with_times(&db, own.kernels).with_context(|| export.display().to_string())?;
    let sqlite = identity.sqlite(dir);
    let mut writer = Writer::create(&sqlite, &Capture { clock: clock.into(), ..capture })?;
    writer.append(&kernels)?;
    writer.finish(&identity.trace(dir), &sqlite)
}

fn with_times(db: &rusqlite::Connection, own: Vec<(Line, KernelRecord)>) -> Result<Vec<(Line, KernelRecord)>> {
    let inside =
        |line: &Line, record: &KernelRecord| matches!(line.kernel, Kernel::Dec(_)) && bare(&record.name) == DEC_KERNEL;
    let launches = || own.iter().filter(|(line, record)| !inside(line, record));
    let names: BTreeSet<&str> = launches().map(|(_, record)| bare(&record.name)).collect();
    let names: Vec<_> = names.into_iter().collect();
    let mut queues = HashMap::new();
    for (name, ran) in rows::kernels(db, &rows::tables(db)?, &names)? {
        let launched = launches().filter(|(_, record)| bare(&record.name) == name).count();
        ensure!(ran.len() >= launched, "{name} was launched {launched} times, but only {} of them ran", ran.len());
        let before = ran.len() - launched;
        queues.insert(name, ran.into_iter().skip(before));
    }
    let mut next = |name: &str| -> Result<KernelRecord> {
        queues.get_mut(bare(name)).and_then(Iterator::next).with_context(|| format!("{name} never ran"))
    };
    // A compensation inside a launch stands right before that launch in our traces.
    let mut times: Vec<(Line, KernelRecord)> = Vec::with_capacity(own.len());
    let mut waiting: Option<&(Line, KernelRecord)> = None;
    for launched in &own {
        let (line, record) = launched;
        if inside(line, record) {
            waiting = Some(launched);
            continue;
        }
        let mut time = next(&record.name)?;
        if let Some((line, dec)) = waiting.take() {
            times.push((*line, moved(dec, record, &time)));
        }
        if matches!(line.kernel, Kernel::Dec(_)) {
            time.grid = record.grid;
        }
        times.push((*line, time));
    }
    ensure!(waiting.is_none(), "the last compensation has no launch");
    Ok(times)
}

/// `dec` as far behind the start of `now` as it was behind that of `before`, and no longer than `now`.
fn moved(dec: &KernelRecord, before: &KernelRecord, now: &KernelRecord) -> KernelRecord {
    let lead = dec.start_ns.saturating_sub(before.start_ns);
    let start_ns = (now.start_ns + lead).min(now.end_ns - 1);
    let end_ns = (start_ns + (dec.end_ns - dec.start_ns)).min(now.end_ns);
    KernelRecord { start_ns, end_ns, ..dec.clone() }
}
