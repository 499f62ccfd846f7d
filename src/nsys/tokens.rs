//! What whole tokens took: a table of our own, which readers of the export schema do not look at.

use anyhow::{Context, Result};
use rusqlite::{Connection, params};

/// The table's name.
pub(super) const TABLE: &str = "DECDEC_TOKENS";

/// One way to compensate all layers, and what a token took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenTime {
    /// Thread blocks that compensate; they were there even where nothing was selected.
    pub n_tb: usize,
    /// Channels per chunk of qkv, o, gu and d.
    pub k_chunks: [usize; 4],
    /// A token, ns.
    pub token_ns: u64,
    /// A token without compensation, measured beside it, ns.
    pub base_ns: u64,
}

pub(super) fn insert(db: &Connection, token: &TokenTime) -> Result<()> {
    let TokenTime { n_tb, k_chunks, token_ns, base_ns } = token;
    let [qkv, o, gu, d] = k_chunks.map(|k| k as i64);
    db.execute(
        "INSERT INTO DECDEC_TOKENS VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![*n_tb as i64, qkv, o, gu, d, *token_ns as i64, *base_ns as i64],
    )?;
    Ok(())
}

/// All rows, in the order in which they were written.
///
/// # Errors
/// A file that is damaged, or holds what no sweep writes.
pub(super) fn read(db: &Connection) -> Result<Vec<TokenTime>> {
    let cannot = || format!("cannot read {TABLE}: the file is damaged");
    let sql = format!("SELECT n_tb, qkv, o, gu, d, token_ns, base_ns FROM {TABLE} ORDER BY rowid");
    let mut statement = db.prepare(&sql).with_context(cannot)?;
    let row = |row: &rusqlite::Row<'_>| -> rusqlite::Result<[i64; 7]> {
        let mut numbers = [0; 7];
        for (i, number) in numbers.iter_mut().enumerate() {
            *number = row.get(i)?;
        }
        Ok(numbers)
    };
    let rows: Vec<[i64; 7]> = statement.query_map([], row)?.collect::<rusqlite::Result<_>>().with_context(cannot)?;
    let token = |row: [i64; 7]| {
        let k_chunk = |k: i64| usize::try_from(k).ok().filter(|&k| k <= crate::dec::CHUNK);
        let time = |ns: i64| u64::try_from(ns).ok().filter(|&ns| ns > 0);
        let [Some(qkv), Some(o), Some(gu), Some(d)] = [row[1], row[2], row[3], row[4]].map(k_chunk) else {
            return None;
        };
        Some(TokenTime {
            n_tb: usize::try_from(row[0]).ok().filter(|&n_tb| n_tb > 0)?,
            k_chunks: [qkv, o, gu, d],
            token_ns: time(row[5])?,
            base_ns: time(row[6])?,
        })
    };
    let read = |row: [i64; 7]| {
        token(row).with_context(|| {
            format!("{TABLE} has the row {row:?}: an n_tb and times above 0 and k_chunk up to 1024 are expected")
        })
    };
    rows.into_iter().map(read).collect()
}
