//! Matrix products in f32: strides checked, on all cores where asked for, the same bits on all processors.

mod tiles;

use std::sync::OnceLock;

use self::tiles::Target;
use crate::processor::Path;

/// Overwrites `y` `[tokens, out_features]` with `x · Wᵀ`, for `x` `[tokens, depth]` and `w` `[out_features,
/// depth]`, on all cores.
pub(crate) fn product(x: &[f32], w: &[f32], depth: usize, y: &mut [f32]) {
    product_beside(x, w, depth, y, w.len() / depth);
}

/// A matrix: element `(i, j)` is `values[i · row + j · column]`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl Strided<'_> {
    /// The matrix from row `first` on.
    pub(crate) fn below(self, first: usize) -> Self {
        Self { values: &self.values[first * self.row..], ..self }
    }

    /// The matrix from column `first` on.
    pub(crate) fn right(self, first: usize) -> Self {
        Self { values: &self.values[first * self.column..], ..self }
    }

    /// The matrix from row `i` and column `j` on.
    fn from(self, i: usize, j: usize) -> Self {
        Self { values: &self.values[i * self.row + j * self.column..], ..self }
    }

    /// Rows for columns.
    pub(crate) fn turned(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    fn assert_holds(&self, rows: usize, columns: usize) {
        assert!((rows - 1) * self.row + (columns - 1) * self.column < self.values.len(), "matrix out of bounds");
    }
}

/// Overwrites `y`, row-major `[m, n]`, with `a · b` for `a` `[m, depth]` and `b` `[depth, n]`; sizes are `[m, n, depth]`.
pub(crate) fn multiply(sizes: [usize; 3], a: Strided<'_>, b: Strided<'_>, y: &mut [f32], on: Threads) {
    let row = sizes[1];
    general_product(sizes, a, b, (y, row), false, on);
}

/// Overwrites the columns of `y`, a row-major matrix of `row` columns, from the first on with `x · Wᵀ`, for `x` `[tokens,
/// depth]` and `w` `[columns, depth]`, on all cores.
pub(crate) fn product_beside(x: &[f32], w: &[f32], depth: usize, y: &mut [f32], row: usize) {
    let (tokens, columns) = (x.len() / depth, w.len() / depth);
    let x = Strided { values: x, row: depth, column: 1 };
    let w = Strided { values: w, row: 1, column: depth };
    general_product([tokens, columns, depth], x, w, (y, row), false, Threads::All);
}

/// The same, added to `y`.
pub(crate) fn accumulate(sizes: [usize; 3], a: Strided<'_>, b: Strided<'_>, y: &mut [f32], on: Threads) {
    accumulate_beside(sizes, a, b, (y, sizes[1]), on);
}

/// The same, added to the first columns of `y`, a row-major matrix of `row` columns.
pub(crate) fn accumulate_beside(
    sizes: [usize; 3],
    a: Strided<'_>,
    b: Strided<'_>,
    to: (&mut [f32], usize),
    on: Threads,
) {
    general_product(sizes, a, b, to, true, on);
}

/// Who multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The caller alone, which is one of many.
    One,
    /// All cores.
    All,
}

fn general_product(
    [m, n, depth]: [usize; 3],
    a: Strided<'_>,
    b: Strided<'_>,
    (y, row): (&mut [f32], usize),
    add: bool,
    on: Threads,
) {
    if m == 0 || n == 0 {
        return;
    }
    let len = (m - 1) * row + n;
    assert!(y.len() >= len && row >= n && depth > 0, "matrix product: {} results, {m} x {n} expected", y.len());
    a.assert_holds(m, depth);
    b.assert_holds(depth, n);
    tiles::multiply(path(), [m, n, depth], (a, b), Target { y, row, add }, on == Threads::All);
}

/// The instructions that products use.
pub(super) fn path() -> Path {
    static PATH: OnceLock<Path> = OnceLock::new();
    *PATH.get_or_init(Path::detect)
}
