//! Matrix products in f32: strides checked, on all cores where asked for.

/// Overwrites `y` `[tokens, out_features]` with `x · Wᵀ`, for `x` `[tokens, depth]` and `w` `[out_features,
/// depth]`, on all cores.
pub(crate) fn product(x: &[f32], w: &[f32], depth: usize, y: &mut [f32]) {
    let (tokens, out_features) = (x.len() / depth, w.len() / depth);
    let x = Strided { values: x, row: depth, column: 1 };
    let w = Strided { values: w, row: 1, column: depth };
    multiply(tokens, out_features, depth, 1.0, x, w, y, gemm::Parallelism::Rayon(0));
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

    fn assert_holds(&self, rows: usize, columns: usize) {
        assert!((rows - 1) * self.row + (columns - 1) * self.column < self.values.len(), "matrix out of bounds");
    }
}

/// Overwrites `y`, row-major `[m, n]`, with `scale · a · b` for `a` `[m, depth]` and `b` `[depth, n]`.
#[allow(clippy::too_many_arguments, reason = "a matrix product: three sizes, a factor, three matrices")]
pub(crate) fn multiply(
    m: usize,
    n: usize,
    depth: usize,
    scale: f32,
    a: Strided<'_>,
    b: Strided<'_>,
    y: &mut [f32],
    parallelism: gemm::Parallelism,
) {
    general_product([m, n, depth], scale, a, b, (y, n), false, parallelism);
}

/// Overwrites the columns of `y`, a row-major matrix of `row` columns, from the first on with `x · Wᵀ`, for `x` `[tokens,
/// depth]` and `w` `[columns, depth]`, on all cores.
pub(crate) fn product_beside(x: &[f32], w: &[f32], depth: usize, y: &mut [f32], row: usize) {
    let (tokens, columns) = (x.len() / depth, w.len() / depth);
    let x = Strided { values: x, row: depth, column: 1 };
    let w = Strided { values: w, row: 1, column: depth };
    general_product([tokens, columns, depth], 1.0, x, w, (y, row), false, gemm::Parallelism::Rayon(0));
}

/// The same, added to `y`.
#[allow(clippy::too_many_arguments, reason = "a matrix product: three sizes, a factor, three matrices")]
pub(crate) fn accumulate(
    m: usize,
    n: usize,
    depth: usize,
    scale: f32,
    a: Strided<'_>,
    b: Strided<'_>,
    y: &mut [f32],
    parallelism: gemm::Parallelism,
) {
    general_product([m, n, depth], scale, a, b, (y, n), true, parallelism);
}

fn general_product(
    [m, n, depth]: [usize; 3],
    scale: f32,
    a: Strided<'_>,
    b: Strided<'_>,
    (y, row): (&mut [f32], usize),
    add: bool,
    parallelism: gemm::Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    let len = (m - 1) * row + n;
    assert!(y.len() >= len && row >= n && depth > 0, "matrix product: {} results, {m} x {n} expected", y.len());
    a.assert_holds(m, depth);
    b.assert_holds(depth, n);
    let stride = |s: usize| s as isize;
    let (a_data, b_data) = (a.values.as_ptr(), b.values.as_ptr());
    let keep = if add { 1.0 } else { 0.0 };
    // SAFETY: the assertions above keep every element that the strides and sizes reach inside its slice, and `y`,
    // borrowed mutably, overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            depth,
            y.as_mut_ptr(),
            1,
            stride(row),
            add,
            a_data,
            stride(a.column),
            stride(a.row),
            b_data,
            stride(b.column),
            stride(b.row),
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
