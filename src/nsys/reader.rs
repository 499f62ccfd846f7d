//! Reading a profile, of our writing or exported by a real Nsight Systems of any version: columns are probed,
//! never assumed, and whatever does not fit together is refused with what was found.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};

use super::trace::{self, Line};
use super::writer::meta_rows;
use super::{Algo, Capture, DEC_KERNEL, Identity, KernelRecord};

const KERNELS: &str = "CUPTI_ACTIVITY_KIND_KERNEL";

/// Both files of a profile, joined.
#[derive(Debug, Clone)]
pub struct Profile {
    /// How it was taken, if we took it.
    pub capture: Option<Capture>,
    /// The card's name, if the file tells.
    pub device_name: Option<String>,
    /// Every line of the trace and when its kernel ran, in the order of launch.
    pub kernels: Vec<(Line, KernelRecord)>,
}

/// Reads the trace and the SQLite file that belong to `identity`.
///
/// # Errors
/// A file that is missing, is no SQLite file, lacks a table or column, belongs to another model, algorithm or
/// width; a trace line that is not of the format; counts of kernels that disagree between the two files; a
/// kernel without a time.
pub fn read(trace: &Path, sqlite: &Path, identity: &Identity) -> Result<Profile> {
    let missing = |path: &Path| format!("cannot read {}: run decdec profile with the same names first", path.display());
    let text = fs::read_to_string(trace).with_context(|| missing(trace))?;
    let lines = trace::parse(&text, identity.algo).with_context(|| trace.display().to_string())?;
    check_header(sqlite).with_context(|| missing(sqlite))?;
    let db = Connection::open_with_flags(sqlite, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    join(&db, &lines, identity).with_context(|| sqlite.display().to_string())
}

fn join(db: &Connection, lines: &[Line], identity: &Identity) -> Result<Profile> {
    let tables = tables(db)?;
    let has = |table: &str| tables.iter().any(|t| t == table);
    let meta = if has("META_DATA_CAPTURE") { meta_rows(db, "META_DATA_CAPTURE").unwrap_or_default() } else { vec![] };
    let capture = Capture::from_rows(&meta)?;
    if let Some(capture) = &capture {
        check_identity(&capture.identity, identity)?;
    }
    ensure!(
        has(KERNELS),
        "no table {KERNELS}, only {}: export a trace of CUDA kernels with nsys export --type sqlite",
        if tables.is_empty() { "nothing".into() } else { tables.join(", ") }
    );
    let gpu = has("TARGET_INFO_GPU").then(|| db.query_row("SELECT name FROM TARGET_INFO_GPU", [], |row| row.get(0)));
    let device_name = gpu.and_then(Result::ok).flatten();
    let mut found = kernels(db, has("StringIds"), identity.algo)?;
    let gemv = identity.algo.gemv_kernel();
    for name in [gemv, DEC_KERNEL] {
        let named = lines.iter().filter(|line| line.kernel_name(identity.algo) == name).count();
        let ran = found.get(name).map_or(0, Vec::len);
        let other = identity.algo.other();
        if name == gemv && ran == 0 && found.contains_key(other.gemv_kernel()) {
            bail!("it holds {} but no {gemv}: the profile was taken with --algo {}", other.gemv_kernel(), other.name());
        }
        ensure!(
            named == ran,
            "the trace names {name} {named} times, but {ran} such kernels ran: the two files are not of one run"
        );
    }
    let mut queues: HashMap<_, _> =
        found.iter_mut().map(|(name, records)| (name.as_str(), records.drain(..))).collect();
    let mut next = |line: &Line| queues.get_mut(line.kernel_name(identity.algo)).and_then(Iterator::next);
    let kernels =
        lines.iter().map(|line| Ok((*line, next(line).context("counts were checked")?))).collect::<Result<_>>()?;
    Ok(Profile { capture, device_name, kernels })
}

/// All rows of the kernels that a trace can name, by name, in the order of their starts.
fn kernels(db: &Connection, has_strings: bool, algo: Algo) -> Result<HashMap<String, Vec<KernelRecord>>> {
    let columns = columns(db, KERNELS)?;
    let has = |column: &str| columns.iter().any(|c| c == column);
    for column in ["start", "end", "gridX"] {
        ensure!(has(column), "{KERNELS} has no column {column}, only {}", columns.join(", "));
    }
    let names: Vec<_> = ["shortName", "demangledName"].into_iter().filter(|name| has(name)).collect();
    ensure!(!names.is_empty(), "{KERNELS} has neither shortName nor demangledName, only {}", columns.join(", "));
    let strings = if has_strings { wanted_strings(db, algo)? } else { HashMap::new() };
    const OPTIONAL: [&str; 13] = [
        "gridY",
        "gridZ",
        "blockX",
        "blockY",
        "blockZ",
        "registersPerThread",
        "staticSharedMemory",
        "dynamicSharedMemory",
        "deviceId",
        "contextId",
        "streamId",
        "correlationId",
        "graphNodeId",
    ];
    let optional: Vec<_> = OPTIONAL.into_iter().map(|column| if has(column) { column } else { "0" }).collect();
    let sql = format!(
        "SELECT coalesce({}, 0), start, \"end\", gridX, {} FROM {KERNELS} ORDER BY start, rowid",
        names.join(", "),
        optional.join(", ")
    );
    let mut found: HashMap<String, Vec<KernelRecord>> = HashMap::new();
    let mut statement = db.prepare(&sql).context("cannot read the kernels")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next().context("cannot read the kernels: the file is damaged")? {
        let name = match row.get_ref(0)? {
            ValueRef::Integer(id) => match strings.get(&id) {
                Some(&name) => name,
                None => continue,
            },
            ValueRef::Text(text) => match wanted(&String::from_utf8_lossy(text), algo) {
                Some(name) => name,
                None => continue,
            },
            other => bail!("{KERNELS}: a kernel's name is {:?}, an id or a text is expected", other.data_type()),
        };
        let record = record(row, name).with_context(|| format!("{KERNELS}: a row of {name}"))?;
        ensure!(
            record.start_ns > 0 && record.end_ns > record.start_ns,
            "{name} ran from {} to {} ns: a kernel without a time spoils the profile, take it again",
            record.start_ns,
            record.end_ns
        );
        found.entry(name.into()).or_default().push(record);
    }
    Ok(found)
}

fn record(row: &rusqlite::Row<'_>, name: &str) -> Result<KernelRecord> {
    let big = |i: usize| -> Result<u64> {
        let value = row.get::<_, Option<i64>>(i)?.unwrap_or(0);
        u64::try_from(value).with_context(|| format!("column {i} is {value}, a number of at least 0 is expected"))
    };
    let small = |i: usize| -> Result<u32> { Ok(u32::try_from(big(i)?)?) };
    Ok(KernelRecord {
        name: name.into(),
        start_ns: big(1)?,
        end_ns: big(2)?,
        grid: [small(3)?, small(4)?, small(5)?],
        block: [small(6)?, small(7)?, small(8)?],
        registers: small(9)?,
        static_shared: small(10)?,
        dynamic_shared: small(11)?,
        device_id: small(12)?,
        context_id: small(13)?,
        stream_id: small(14)?,
        correlation_id: big(15)?,
        graph_node_id: big(16)?,
    })
}

/// The strings that name a kernel which a trace can name: id to the bare name.
fn wanted_strings(db: &Connection, algo: Algo) -> Result<HashMap<i64, &'static str>> {
    let mut statement = db.prepare("SELECT id, value FROM StringIds").context("cannot read StringIds")?;
    let mut rows = statement.query([])?;
    let mut strings = HashMap::new();
    while let Some(row) = rows.next().context("cannot read StringIds: the file is damaged")? {
        let value: String = row.get(1)?;
        if let Some(name) = wanted(&value, algo) {
            strings.insert(row.get(0)?, name);
        }
    }
    Ok(strings)
}

/// The bare name of a kernel, without return type, namespaces, template arguments and parameters, if a trace
/// can name it.
fn wanted(value: &str, algo: Algo) -> Option<&'static str> {
    let value = value.replace("(anonymous namespace)::", "");
    let head = value.split(['<', '(']).next()?.trim_end();
    let bare = head.rsplit([' ', ':', '*', '&']).next()?;
    [algo.gemv_kernel(), algo.other().gemv_kernel(), DEC_KERNEL].into_iter().find(|&name| name == bare)
}

fn check_identity(found: &Identity, asked: &Identity) -> Result<()> {
    for (what, found, asked) in [
        ("the model", &found.model, &asked.model),
        ("--algo", &found.algo.name().into(), &asked.algo.name().into()),
        ("--bitwidth", &found.bits.to_string(), &asked.bits.to_string()),
        ("--fp-dtype", &found.precision.name().into(), &asked.precision.name().into()),
    ] {
        ensure!(found == asked, "{what} of this profile is {found}, not {asked}: give the names it was taken with");
    }
    Ok(())
}

/// Refuses what is no SQLite file by its first bytes, which say more than SQLite's own message.
fn check_header(path: &Path) -> Result<()> {
    const MAGIC: &[u8] = b"SQLite format 3\0";
    let mut head = Vec::new();
    File::open(path)?.take(MAGIC.len() as u64).read_to_end(&mut head)?;
    ensure!(head == MAGIC, "it begins with {:?}, not as a SQLite file does", String::from_utf8_lossy(&head));
    Ok(())
}

fn tables(db: &Connection) -> Result<Vec<String>> {
    let mut statement = db
        .prepare("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        .context("the file is damaged")?;
    let names = statement.query_map([], |row| row.get(0))?;
    names.collect::<rusqlite::Result<_>>().context("the file is damaged")
}

fn columns(db: &Connection, table: &str) -> Result<Vec<String>> {
    let mut statement = db.prepare(&format!("PRAGMA table_info({table})"))?;
    let names = statement.query_map([], |row| row.get(1))?;
    Ok(names.collect::<rusqlite::Result<_>>()?)
}
