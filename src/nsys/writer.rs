//! Writing a profile: every configuration is one transaction, so that an interrupted sweep goes on.
//!
//! Until the last configuration is in, everything lies in `….sqlite.partial`: kernel rows in Nsight's schema,
//! and each configuration's trace lines in a table of our own, which [`Writer::finish`] turns into the trace. One
//! process at a time has it; `….sqlite.lock` says so.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rusqlite::{Connection, OptionalExtension, params};

use super::trace::{Line, Role};
use super::{Capture, KernelRecord, PREFIX, TokenTime, tokens};
use crate::files::{self, Lock};

/// Tables of the export schema with the columns that describe a kernel, in Nsight's order.
const SCHEMA: &str = "
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT);
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE TARGET_INFO_GPU (vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT,
    isDiscrete INTEGER, l2CacheSize INTEGER, totalMemory INTEGER, memoryBandwidth INTEGER, clockRate INTEGER,
    smCount INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER,
    cacheConfig INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL,
    gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL,
    staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL,
    localMemoryPerThread INTEGER NOT NULL, localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL,
    sharedMemoryExecuted INTEGER, graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER);
CREATE TABLE DECDEC_TOKENS (n_tb INTEGER NOT NULL, qkv INTEGER NOT NULL, o INTEGER NOT NULL, gu INTEGER NOT NULL,
    d INTEGER NOT NULL, token_ns INTEGER NOT NULL, base_ns INTEGER NOT NULL);
CREATE TABLE DECDEC_SWEEP (configuration INTEGER PRIMARY KEY, pairs INTEGER NOT NULL, trace TEXT NOT NULL);
";

const INSERT_KERNEL: &str = "
INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL (start, end, deviceId, contextId, streamId, correlationId, globalPid,
    demangledName, shortName, registersPerThread, gridX, gridY, gridZ, blockX, blockY, blockZ, staticSharedMemory,
    dynamicSharedMemory, localMemoryPerThread, localMemoryTotal, gridId, graphNodeId)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, 0, 0, 0, ?18)";

/// A profile that is being written.
pub struct Writer {
    db: Connection,
    partial: PathBuf,
    capture: Capture,
    strings: HashMap<String, i64>,
    configurations: usize,
    pairs: usize,
    last_end: u64,
    _lock: Lock,
}

impl Writer {
    /// Goes on with the interrupted sweep at `sqlite`, if there is one that can be read; otherwise `None`.
    ///
    /// # Errors
    /// Another process is writing it.
    pub fn resume(sqlite: &Path) -> Result<Option<Self>> {
        let partial = partial_path(sqlite);
        if !partial.exists() {
            return Ok(None);
        }
        let lock = lock(sqlite)?;
        Ok(Self::go_on(&partial, lock).unwrap_or_else(|error| {
            tracing::warn!("{}: {error:#}, the sweep starts over", partial.display());
            None
        }))
    }

    fn go_on(partial: &Path, lock: Lock) -> Result<Option<Self>> {
        let db = open(partial)?;
        let rows = meta_rows(&db, "META_DATA_CAPTURE")?;
        let Some(capture) = Capture::from_rows(&rows)? else { return Ok(None) };
        let strings = db
            .prepare("SELECT value, id FROM StringIds")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<_>>()?;
        let (configurations, pairs) =
            db.query_row("SELECT count(*), coalesce(sum(pairs), 0) FROM DECDEC_SWEEP", [], |row| {
                Ok((row.get::<_, i64>(0)? as usize, row.get::<_, i64>(1)? as usize))
            })?;
        let last_end = db.query_row("SELECT coalesce(max(end), 0) FROM CUPTI_ACTIVITY_KIND_KERNEL", [], |row| {
            row.get::<_, i64>(0)
        })?;
        let (last_end, partial) = (last_end as u64, partial.to_owned());
        Ok(Some(Self { db, partial, capture, strings, configurations, pairs, last_end, _lock: lock }))
    }

    /// Starts a sweep whose files will be at `sqlite` and its trace; an interrupted one there is dropped.
    ///
    /// # Errors
    /// Another process is writing it; what the file system says.
    pub fn create(sqlite: &Path, capture: &Capture) -> Result<Self> {
        let partial = partial_path(sqlite);
        if let Some(dir) = partial.parent() {
            files::make_directory(dir)?;
        }
        let lock = lock(sqlite)?;
        if partial.exists() {
            fs::remove_file(&partial).with_context(|| format!("cannot replace {}", partial.display()))?;
        }
        let mut db = open(&partial)?;
        let transaction = db.transaction()?;
        transaction.execute_batch(SCHEMA)?;
        for (name, value) in capture.rows() {
            transaction.execute("INSERT INTO META_DATA_CAPTURE VALUES (?1, ?2)", [name, value])?;
        }
        let version = env!("CARGO_PKG_VERSION");
        for (name, value) in [("EXPORT_PRODUCT_NAME", "decdec"), ("EXPORT_PRODUCT_VERSION", version)] {
            transaction.execute("INSERT INTO META_DATA_EXPORT VALUES (?1, ?2)", [name, value])?;
        }
        transaction.execute(
            "INSERT INTO TARGET_INFO_GPU (vmId, id, name, memoryBandwidth) VALUES (0, 0, ?1, ?2)",
            params![capture.device_name, capture.device_memory as i64],
        )?;
        transaction.commit()?;
        let (capture, strings) = (capture.clone(), HashMap::new());
        Ok(Self { db, partial, capture, strings, configurations: 0, pairs: 0, last_end: 0, _lock: lock })
    }

    /// How the sweep is taken, as its first run began it.
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Configurations that are in.
    pub fn configurations(&self) -> usize {
        self.configurations
    }

    /// What whole tokens took, as far as that is in.
    ///
    /// # Errors
    /// A damaged file.
    pub fn tokens(&self) -> Result<Vec<TokenTime>> {
        tokens::read(&self.db)
    }

    /// The number of the next pair.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Adds one configuration: its kernels in the order of launch, all or none of them.
    ///
    /// Times are moved behind those that are already in, since a resumed sweep's clock may have started anew.
    ///
    /// # Errors
    /// A record without a time (start or end 0, or an end that is not after its start), or the disk is full.
    pub fn append(&mut self, kernels: &[(Line, KernelRecord)]) -> Result<()> {
        self.append_token(kernels, None)
    }

    /// The same with what a whole token took, of which `kernels` are stretches.
    ///
    /// # Errors
    /// Those of [`Writer::append`].
    pub fn append_token(&mut self, kernels: &[(Line, KernelRecord)], token: Option<&TokenTime>) -> Result<()> {
        for (line, record) in kernels {
            ensure!(
                record.start_ns > 0 && record.end_ns > record.start_ns,
                "{} has no time (start {}, end {}): this configuration was not recorded",
                line.display(self.capture.identity.format),
                record.start_ns,
                record.end_ns
            );
        }
        let first = kernels.iter().map(|(_, record)| record.start_ns).min().unwrap_or(0);
        let shift = (self.last_end + 1).saturating_sub(first);
        let format = self.capture.identity.format;
        let mut trace = String::new();
        let mut pairs = 0;
        let transaction = self.db.transaction()?;
        {
            let mut insert = transaction.prepare_cached(INSERT_KERNEL)?;
            for (line, r) in kernels {
                let short = intern(&transaction, &mut self.strings, line.kernel_name(format))?;
                let name = if r.name.is_empty() { line.kernel_name(format) } else { &r.name };
                let demangled = intern(&transaction, &mut self.strings, name)?;
                let (start, end) = ((r.start_ns + shift) as i64, (r.end_ns + shift) as i64);
                #[rustfmt::skip]
                insert.execute(params![
                    start, end, r.device_id, r.context_id, r.stream_id, r.correlation_id as i64, demangled, short,
                    r.registers, r.grid[0], r.grid[1], r.grid[2], r.block[0], r.block[1], r.block[2], r.static_shared,
                    r.dynamic_shared, r.graph_node_id as i64,
                ])?;
                self.last_end = self.last_end.max(r.end_ns + shift);
                trace += &format!("{}\n", line.display(format));
                pairs += usize::from(matches!(line.role, Role::Concurrent(pair) if pair == self.pairs + pairs));
            }
        }
        if let Some(token) = token {
            tokens::insert(&transaction, token)?;
        }
        transaction.execute("INSERT INTO DECDEC_SWEEP (pairs, trace) VALUES (?1, ?2)", params![pairs as i64, trace])?;
        transaction.commit()?;
        self.configurations += 1;
        self.pairs += pairs;
        Ok(())
    }

    /// Writes the trace and gives both files their names, the trace first.
    ///
    /// # Errors
    /// What the file system says; the sweep can then be resumed.
    pub fn finish(self, trace: &Path, sqlite: &Path) -> Result<()> {
        let beside = trace.with_extension("trace.partial");
        let cannot = || format!("cannot write {}", beside.display());
        let mut file = std::io::BufWriter::new(fs::File::create(&beside).with_context(cannot)?);
        {
            let mut lines = self.db.prepare("SELECT trace FROM DECDEC_SWEEP ORDER BY configuration")?;
            let mut lines = lines.query([])?;
            while let Some(row) = lines.next()? {
                file.write_all(row.get_ref(0)?.as_bytes()?).with_context(cannot)?;
            }
        }
        file.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all()).with_context(cannot)?;
        // A copy without our own table: dropping it here would leave nothing to resume from if a rename failed.
        let finished = sqlite.with_extension("sqlite.finished");
        if finished.exists() {
            fs::remove_file(&finished)?;
        }
        self.db.execute("VACUUM INTO ?1", [finished.to_string_lossy()])?;
        Connection::open(&finished)?.execute_batch("DROP TABLE DECDEC_SWEEP; VACUUM;")?;
        fs::File::open(&finished).and_then(|file| file.sync_all()).with_context(|| finished.display().to_string())?;
        let named = |from: &Path, to: &Path| {
            let renamed = files::rename(from, to).and_then(|()| files::sync_directory(to.parent().unwrap_or(to)));
            renamed.with_context(|| format!("cannot write {}", to.display()))
        };
        named(&beside, trace)?;
        named(&finished, sqlite)?;
        drop(self.db);
        files::remove_file(&self.partial).with_context(|| format!("cannot remove {}", self.partial.display()))
    }
}

/// Our rows of a two-column table of Nsight's metadata.
pub(super) fn meta_rows(db: &Connection, table: &str) -> Result<Vec<(String, String)>> {
    let mut rows = db.prepare(&format!(
        "SELECT name, CAST(value AS TEXT) FROM {table} \
         WHERE value IS NOT NULL AND name GLOB '{PREFIX}*' AND octet_length(value) < 65536 LIMIT 64"
    ))?;
    let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

fn partial_path(sqlite: &Path) -> PathBuf {
    sqlite.with_extension("sqlite.partial")
}

/// The right to write the files of this name.
fn lock(sqlite: &Path) -> Result<Lock> {
    Lock::take(&sqlite.with_extension("sqlite.lock"))?.with_context(|| {
        format!("another process is writing {}, wait for it or choose another prefix or --nsys-dir", sqlite.display())
    })
}

/// Every transaction is on the disk before the next one, as SQLite does by itself: a power cut costs one configuration.
fn open(path: &Path) -> Result<Connection> {
    Connection::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn intern(db: &Connection, strings: &mut HashMap<String, i64>, value: &str) -> Result<i64> {
    if let Some(&id) = strings.get(value) {
        return Ok(id);
    }
    let last: Option<i64> = db.query_row("SELECT max(id) FROM StringIds", [], |row| row.get(0)).optional()?.flatten();
    let id = last.map_or(0, |id| id + 1);
    db.execute("INSERT INTO StringIds VALUES (?1, ?2)", params![id, value])?;
    strings.insert(value.into(), id);
    Ok(id)
}
