//! The rows of an export of Nsight Systems, whatever version wrote it.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row};

use super::KernelRecord;
use crate::files;

const KERNELS: &str = "CUPTI_ACTIVITY_KIND_KERNEL";

/// Columns that not every version has, in the order in which [`record`] takes them.
#[rustfmt::skip]
const OPTIONAL: [&str; 13] = [
    "gridY", "gridZ", "blockX", "blockY", "blockZ", "registersPerThread", "staticSharedMemory", "dynamicSharedMemory",
    "deviceId", "contextId", "streamId", "correlationId", "graphNodeId",
];

/// Bytes of a kernel's name, template arguments included.
const MAX_NAME: usize = 1 << 12;

/// Bytes of all names together, as they are kept.
const MAX_STRINGS: usize = 24 << 20;

/// Characters of a name that every record of its kernel keeps.
const KEPT_NAME: usize = 256;

/// Bytes of any other value that is looked at.
const MAX_VALUE: i32 = 1 << 20;

/// Steps of SQLite's virtual machine that reading a file may take, for every byte and at least. A row of a dozen
/// bytes takes some 60 steps; more are needed only where the pages of a damaged file lead back to each other.
const STEPS: (u64, u64) = (16, 100_000);

/// Opens a file to read, none of whose content is trusted (SQLite, "Defense Against The Dark Arts"); refuses what
/// is no SQLite file by its first bytes, which say more than SQLite's own message.
pub(super) fn open(path: &Path) -> Result<Connection> {
    const MAGIC: &[u8] = b"SQLite format 3\0";
    let mut head = Vec::new();
    let file = files::open(path)?;
    let size = file.metadata()?.len();
    file.take(MAGIC.len() as u64).read_to_end(&mut head)?;
    ensure!(head == MAGIC, "it begins with {:?}, not as a SQLite file does", String::from_utf8_lossy(&head));
    let mut db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    db.set_limit(Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE)?;
    const PERIOD: u64 = 1_000;
    let mut left = (size.saturating_mul(STEPS.0).saturating_add(STEPS.1)) / PERIOD;
    let is_too_much = move || {
        left = left.saturating_sub(1);
        left == 0
    };
    db.progress_handler(PERIOD as i32, Some(is_too_much))?;
    Ok(db)
}

/// The names of all tables.
pub(super) fn tables(db: &Connection) -> Result<Vec<String>> {
    let sql = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name";
    let mut statement = db.prepare(sql).context("the file is damaged")?;
    let names = statement.query_map([], |row| row.get(0))?;
    names.collect::<rusqlite::Result<_>>().context("the file is damaged")
}

/// All kernels whose bare name is one of `wanted`, by that name, in the order of their starts.
///
/// # Errors
/// A table or column that is missing, with those that are there; a kernel without a time.
pub(super) fn kernels(
    db: &Connection,
    tables: &[String],
    wanted: &[&str],
) -> Result<HashMap<String, Vec<KernelRecord>>> {
    ensure!(
        tables.iter().any(|table| table == KERNELS),
        "no table {KERNELS}, only {}: export a trace of CUDA kernels with nsys export --type sqlite",
        if tables.is_empty() { "nothing".into() } else { tables.join(", ") }
    );
    let has_strings = tables.iter().any(|table| table == "StringIds");
    let strings = if has_strings { strings(db)? } else { HashMap::new() };
    let mut found: HashMap<String, Vec<KernelRecord>> = HashMap::new();
    let mut statement = db.prepare(&query(db)?).context("cannot read the kernels")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next().context("cannot read the kernels: the file is damaged")? {
        let Some(name) = text(row, 0, &strings)? else { continue };
        let Some(&bare) = wanted.iter().find(|&&wanted| wanted == bare(&name)) else { continue };
        let full = text(row, 1, &strings)?.unwrap_or(name).chars().take(KEPT_NAME).collect();
        let record = record(row, full).with_context(|| format!("{KERNELS}: a row of {bare}"))?;
        ensure!(
            record.start_ns > 0 && record.end_ns > record.start_ns,
            "{bare} ran from {} to {} ns: a kernel without a time spoils the profile, take it again",
            record.start_ns,
            record.end_ns
        );
        found.entry(bare.into()).or_default().push(record);
    }
    Ok(found)
}

/// Asks for name, full name, start, end, gridX and the optional columns, of the columns that are there.
fn query(db: &Connection) -> Result<String> {
    let mut statement = db.prepare(&format!("PRAGMA table_info({KERNELS})"))?;
    let columns: Vec<String> =
        statement.query_map([], |row| row.get(1))?.collect::<rusqlite::Result<_>>().context("the file is damaged")?;
    let has = |column: &str| columns.iter().any(|c| c == column);
    for column in ["start", "end", "gridX"] {
        ensure!(has(column), "{KERNELS} has no column {column}, only {}", columns.join(", "));
    }
    let names: Vec<_> = ["shortName", "demangledName"].into_iter().filter(|name| has(name)).collect();
    let (Some(&short), Some(&full)) = (names.first(), names.last()) else {
        bail!("{KERNELS} has neither shortName nor demangledName, only {}", columns.join(", "));
    };
    let optional = OPTIONAL.map(|column| if has(column) { column } else { "0" }).join(", ");
    Ok(format!(
        "SELECT coalesce({short}, {full}), {full}, start, \"end\", gridX, {optional} FROM {KERNELS} ORDER BY start, rowid"
    ))
}

/// The strings that are short enough to be names.
fn strings(db: &Connection) -> Result<HashMap<i64, String>> {
    let sql = format!("SELECT id, value FROM StringIds WHERE octet_length(value) <= {MAX_NAME}");
    let mut statement = db.prepare(&sql).context("cannot read StringIds")?;
    let mut rows = statement.query([])?;
    let (mut strings, mut size) = (HashMap::new(), 0);
    while let Some(row) = rows.next().context("cannot read StringIds: the file is damaged")? {
        let (id, value): (i64, String) = (row.get(0)?, row.get(1)?);
        // What an entry takes besides its text.
        size += value.len() + 64;
        ensure!(size <= MAX_STRINGS, "the strings of StringIds take more than {MAX_STRINGS} bytes");
        strings.insert(id, value);
    }
    Ok(strings)
}

/// A name: an id of StringIds, or the text itself.
fn text(row: &Row<'_>, column: usize, strings: &HashMap<i64, String>) -> Result<Option<String>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        ValueRef::Integer(id) => Ok(strings.get(&id).cloned()),
        ValueRef::Text(text) if text.len() > MAX_NAME => Ok(None),
        ValueRef::Text(text) => Ok(Some(String::from_utf8_lossy(text).into_owned())),
        other => bail!("{KERNELS}: a kernel's name is {:?}, an id or a text is expected", other.data_type()),
    }
}

fn record(row: &Row<'_>, name: String) -> Result<KernelRecord> {
    let big = |i: usize| -> Result<u64> {
        let value = row.get::<_, Option<i64>>(i)?.unwrap_or(0);
        u64::try_from(value).with_context(|| format!("column {i} is {value}, a number of at least 0 is expected"))
    };
    let small = |i: usize| -> Result<u32> { Ok(u32::try_from(big(i)?)?) };
    Ok(KernelRecord {
        name,
        start_ns: big(2)?,
        end_ns: big(3)?,
        grid: [small(4)?, small(5)?, small(6)?],
        block: [small(7)?, small(8)?, small(9)?],
        registers: small(10)?,
        static_shared: small(11)?,
        dynamic_shared: small(12)?,
        device_id: small(13)?,
        context_id: small(14)?,
        stream_id: small(15)?,
        correlation_id: big(16)?,
        graph_node_id: big(17)?,
    })
}

/// The name of a kernel without return type, namespaces, template arguments and parameters.
pub(super) fn bare(name: &str) -> &str {
    let name = name.split("(anonymous namespace)::").last().unwrap_or(name);
    let head = name.split(['<', '(']).next().unwrap_or(name).trim_end();
    head.rsplit([' ', ':', '*', '&']).next().unwrap_or(head)
}
