//! What goes through a model together: rows of one or several texts.

/// Rows of a pass that a token can be chosen after, at most; also those that are fast together where each is of another
/// text.
pub const DECODE_ROWS: usize = 16;

/// Consecutive tokens of one text, as they stand in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Which text of the cache.
    pub slot: usize,
    /// Where the first of them stands in it, which is how long it is.
    pub position: usize,
    /// How many they are.
    pub count: usize,
}

/// What goes through the model together: `[rows, features]`, text by text.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// The texts' rows, in their order.
    pub rows: &'a [Rows],
    /// So many of all rows, the first ones, are compensated.
    pub compensated: usize,
}

impl Pass<'_> {
    /// How many rows there are.
    pub fn count(&self) -> usize {
        count(self.rows)
    }
}

/// How many rows there are in all.
pub fn count(rows: &[Rows]) -> usize {
    rows.iter().map(|rows| rows.count).sum()
}

/// Each text's rows, and the number of the first of them in the pass.
pub fn numbered(rows: &[Rows]) -> impl Iterator<Item = (usize, Rows)> {
    let mut next = 0;
    rows.iter().map(move |&rows| {
        next += rows.count;
        (next - rows.count, rows)
    })
}

/// What enters the model.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// These tokens, one a row.
    Tokens(&'a [u32]),
    /// The token that [`DecodeBackend::sample`](super::DecodeBackend::sample) chose last in each slot; each has one row.
    Sampled,
}
