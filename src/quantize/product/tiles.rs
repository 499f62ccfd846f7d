//! Products of matrices whose sums run in one order, on every processor and any number of threads.
//!
//! `y[i, j] (+)= Σ_k a[i, k]·b[k, j]`: terms are added one after the other within [`DEPTH`] of them, those sums likewise,
//! and no product is fused with a sum. A tile of `y` is a block of registers; what it reads of `a` and `b` is copied
//! beside each other before, `a` in columns of the tile's height, `b` in rows of its width, with zeros beyond the edges.

use std::array;

use rayon::prelude::*;

use super::Strided;
use crate::processor::{Kind, Path};

/// Terms that are summed up in registers.
const DEPTH: usize = 256;
/// Rows of `y` that are made with one copy of `a`, at most.
const ROWS: usize = 96;
/// Columns of `y` of which `b` is copied at once.
const COLUMNS: usize = 1024;
/// Columns of `b` that are turned at once; every width is a multiple.
const SIDE: usize = 8;

/// Where a product goes: a row-major matrix of `row` columns, of which the first are overwritten or added to.
pub(super) struct Target<'a> {
    pub(super) y: &'a mut [f32],
    pub(super) row: usize,
    pub(super) add: bool,
}

/// Writes the product of `sizes` `[m, n, depth]`; on all cores if `parallel`.
pub(super) fn multiply(
    path: Path,
    sizes: [usize; 3],
    (a, b): (Strided<'_>, Strided<'_>),
    to: Target<'_>,
    parallel: bool,
) {
    match path.kind() {
        // As many registers as there are, 16, 8 and 4 numbers each.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => Tiles::<6, 64>(path).multiply(sizes, a, b, to, parallel),
        #[cfg(target_arch = "x86_64")]
        Kind::AvxVnni | Kind::Avx2 => Tiles::<6, 16>(path).multiply(sizes, a, b, to, parallel),
        Kind::Scalar => Tiles::<4, 8>(path).multiply(sizes, a, b, to, parallel),
    }
}

/// Tiles of `H` rows and `W` columns.
struct Tiles<const H: usize, const W: usize>(Path);

impl<const H: usize, const W: usize> Tiles<H, W> {
    fn multiply(&self, sizes: [usize; 3], a: Strided<'_>, b: Strided<'_>, to: Target<'_>, parallel: bool) {
        let [m, n, depth] = sizes;
        let Target { y, row, add } = to;
        let threads = if parallel { rayon::current_num_threads() } else { 1 };
        if threads > 1 && m < 2 * H * threads {
            return self.by_columns(sizes, a, b, Target { y, row, add }, threads);
        }
        let height = m.div_ceil(2 * threads).next_multiple_of(H).clamp(H, ROWS);
        let mut strip = Vec::new();
        for first in (0..depth).step_by(DEPTH) {
            let terms = DEPTH.min(depth - first);
            for left in (0..n).step_by(COLUMNS) {
                let columns = COLUMNS.min(n - left);
                let from = b.from(first, left);
                strip.resize(columns.div_ceil(W) * W * terms, 0.0);
                let panels = |(i, panel): (usize, &mut [f32])| {
                    self.lay::<W, SIDE>(panel, from.from(0, i * W).turned(), W.min(columns - i * W));
                };
                if threads > 1 {
                    strip.par_chunks_exact_mut(W * terms).enumerate().for_each(panels);
                } else {
                    strip.chunks_exact_mut(W * terms).enumerate().for_each(panels);
                }
                let block = |(i, y): (usize, &mut [f32])| {
                    let rows = height.min(m - i * height);
                    let over = add || first > 0;
                    self.block(a.from(i * height, first), &strip, (rows, columns, terms), y, (row, left, over));
                };
                if threads > 1 {
                    y[..(m - 1) * row + n].par_chunks_mut(height * row).enumerate().for_each(block);
                } else {
                    y[..(m - 1) * row + n].chunks_mut(height * row).enumerate().for_each(block);
                }
            }
        }
    }

    /// A product of few rows: every thread makes some of the columns, beside `y`.
    fn by_columns(
        &self,
        [m, n, depth]: [usize; 3],
        a: Strided<'_>,
        b: Strided<'_>,
        Target { y, row, add }: Target<'_>,
        threads: usize,
    ) {
        let width = n.div_ceil(4 * threads).next_multiple_of(W);
        let made: Vec<Vec<f32>> = (0..n.div_ceil(width))
            .into_par_iter()
            .map(|i| {
                let (left, columns) = (i * width, width.min(n - i * width));
                let mut part = vec![0.0; m * columns];
                if add {
                    let rows = part.chunks_exact_mut(columns).zip(y.chunks(row));
                    rows.for_each(|(part, y)| part.copy_from_slice(&y[left..left + columns]));
                }
                let to = Target { y: &mut part, row: columns, add };
                self.multiply([m, columns, depth], a, b.from(0, left), to, false);
                part
            })
            .collect();
        for (part, left) in made.iter().zip((0..n).step_by(width)) {
            let columns = part.len() / m;
            let rows = y.chunks_mut(row).zip(part.chunks_exact(columns));
            rows.for_each(|(y, part)| y[left..left + columns].copy_from_slice(part));
        }
    }

    /// Some rows of `y`, from column `left` on, with `strip`, the copy of `b`; added to `y` if `over`.
    fn block(
        &self,
        a: Strided<'_>,
        strip: &[f32],
        (rows, columns, terms): (usize, usize, usize),
        y: &mut [f32],
        (row, left, over): (usize, usize, bool),
    ) {
        let mut stack = vec![0.0; rows.div_ceil(H) * H * terms];
        for (i, panel) in stack.chunks_exact_mut(H * terms).enumerate() {
            self.lay::<H, H>(panel, a.from(i * H, 0), H.min(rows - i * H));
        }
        let mut sums = [[0.0; W]; H];
        for (j, b) in strip.chunks_exact(W * terms).enumerate() {
            let (from, width) = (left + j * W, W.min(columns - j * W));
            for (i, a) in stack.chunks_exact(H * terms).enumerate() {
                self.tile(a, b, &mut sums);
                for (sums, y) in sums.iter().zip(y[i * H * row..].chunks_mut(row)) {
                    let y = &mut y[from..from + width];
                    match y.first_chunk_mut::<W>() {
                        Some(y) if !over => *y = *sums,
                        Some(y) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                        None if !over => y.copy_from_slice(&sums[..width]),
                        None => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                    }
                }
            }
        }
    }

    fn lay<const P: usize, const G: usize>(&self, panel: &mut [f32], from: Strided<'_>, count: usize) {
        match self.0.kind() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a path exists only where the processor has its instructions.
            Kind::Avx512 => unsafe { lay_avx512::<P, G>(panel, from, count) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Kind::AvxVnni | Kind::Avx2 => unsafe { lay_avx2::<P, G>(panel, from, count) },
            Kind::Scalar => lay::<P, G>(panel, from, count),
        }
    }

    fn tile(&self, a: &[f32], b: &[f32], sums: &mut [[f32; W]; H]) {
        match self.0.kind() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a path exists only where the processor has its instructions.
            Kind::Avx512 => unsafe { tile_avx512(a, b, sums) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Kind::AvxVnni | Kind::Avx2 => unsafe { tile_avx2(a, b, sums) },
            Kind::Scalar => tile(a, b, sums),
        }
    }
}

/// Copies `count` rows of `from` into a panel, number by number beside each other: `[terms][P]`; `G` of them at once.
#[inline(always)]
fn lay<const P: usize, const G: usize>(panel: &mut [f32], from: Strided<'_>, count: usize) {
    /// Numbers of a row that are copied at once.
    const AT_ONCE: usize = 8;
    if count < P {
        panel.fill(0.0);
    }
    let panel = panel.as_chunks_mut::<P>().0;
    if from.row == 1 {
        for (k, panel) in panel.iter_mut().enumerate() {
            let row = &from.values[k * from.column..];
            match row.first_chunk() {
                Some(row) if count == P => *panel = *row,
                _ => panel[..count].copy_from_slice(&row[..count]),
            }
        }
        return;
    }
    // Blocks that stay in registers on their way.
    let (rows, terms) = if from.column == 1 { (count / G * G, panel.len() / AT_ONCE * AT_ONCE) } else { (0, 0) };
    for (first, panel) in panel.as_chunks_mut::<AT_ONCE>().0[..terms / AT_ONCE].iter_mut().enumerate() {
        for i in (0..rows).step_by(G) {
            let block: [[f32; AT_ONCE]; G] = array::from_fn(|j| {
                let row = &from.values[(i + j) * from.row + first * AT_ONCE..];
                *row.first_chunk().expect("a block of a row")
            });
            for (k, panel) in panel.iter_mut().enumerate() {
                let to: &mut [f32; G] = panel[i..].first_chunk_mut().expect("a block of a panel");
                to.iter_mut().zip(&block).for_each(|(to, row)| *to = row[k]);
            }
        }
    }
    for (k, panel) in panel.iter_mut().enumerate() {
        for i in if k < terms { rows..count } else { 0..count } {
            panel[i] = from.values[i * from.row + k * from.column];
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn lay_avx512<const P: usize, const G: usize>(panel: &mut [f32], from: Strided<'_>, count: usize) {
    lay::<P, G>(panel, from, count);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn lay_avx2<const P: usize, const G: usize>(panel: &mut [f32], from: Strided<'_>, count: usize) {
    lay::<P, G>(panel, from, count);
}

#[inline(always)]
fn tile<const H: usize, const W: usize>(a: &[f32], b: &[f32], sums: &mut [[f32; W]; H]) {
    let mut local = [[0f32; W]; H];
    for (a, b) in a.as_chunks::<H>().0.iter().zip(b.as_chunks::<W>().0) {
        for i in 0..H {
            for j in 0..W {
                local[i][j] += a[i] * b[j];
            }
        }
    }
    *sums = local;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn tile_avx512<const H: usize, const W: usize>(a: &[f32], b: &[f32], sums: &mut [[f32; W]; H]) {
    tile(a, b, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile_avx2<const H: usize, const W: usize>(a: &[f32], b: &[f32], sums: &mut [[f32; W]; H]) {
    tile(a, b, sums);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling;

    /// Sizes around the edges of tiles, blocks and strips.
    const SIZES: [[usize; 3]; 8] = [
        [1, 1, 1],
        [3, 70, 5],
        [7, 64, 256],
        [13, 65, 257],
        [40, 1100, 31],
        [97, 17, 600],
        [200, 130, 64],
        [6, 1025, 513],
    ];

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        sampling::draws(seed, len).iter().map(|x| x - 0.5).collect()
    }

    /// `a · b` as `path` makes it on `threads`, added to ones if `add`; `y` has three columns more than asked for.
    fn made(path: Path, sizes: [usize; 3], turned: bool, add: bool, threads: usize) -> Vec<f32> {
        let [m, n, depth] = sizes;
        let (a, b) = (numbers(1, m * depth), numbers(2, depth * n));
        let of = |values, row, column| match turned {
            true => Strided { values, row: 1, column: row },
            false => Strided { values, row: column, column: 1 },
        };
        let mut y = vec![1.0; m * (n + 3)];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let pair = (of(&a, m, depth), of(&b, depth, n));
        pool.install(|| multiply(path, sizes, pair, Target { y: &mut y, row: n + 3, add }, threads > 1));
        y
    }

    #[test]
    fn every_path_and_any_number_of_threads_makes_the_same_bits() {
        for sizes in SIZES {
            for (turned, add) in [(false, false), (true, false), (false, true), (true, true)] {
                let want = made(Path::SCALAR, sizes, turned, add, 1);
                for (path, threads) in Path::all().flat_map(|path| [1, 2, 5].map(|threads| (path, threads))) {
                    let got = made(path, sizes, turned, add, threads);
                    assert!(got == want, "{path}, {threads} threads: {sizes:?}, turned {turned}, add {add}");
                }
            }
        }
        let [mut one, other] = [false, true].map(|turned| made(Path::SCALAR, SIZES[4], turned, false, 1));
        assert_ne!(one, other, "other matrices give others");
        one[5] = f32::from_bits(one[5].to_bits() + 1);
        assert_ne!(one, made(Path::SCALAR, SIZES[4], false, false, 1), "one bit is seen");
    }

    /// A sum of `depth` products, each rounded once, as is every sum: `|got − want| ≤ 2·depth·2^-24·Σ|a·b|`.
    #[test]
    fn products_are_those_of_the_definition() {
        for sizes in SIZES {
            let [m, n, depth] = sizes;
            let (a, b) = (numbers(1, m * depth), numbers(2, depth * n));
            for add in [false, true] {
                let got = made(Path::detect(), sizes, false, add, 2);
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let term = |k: usize| f64::from(a[i * depth + k]) * f64::from(b[k * n + j]);
                    let start = f64::from(u8::from(add));
                    let want = start + (0..depth).map(term).sum::<f64>();
                    let sum = start + (0..depth).map(|k| term(k).abs()).sum::<f64>();
                    let off = (f64::from(got[i * (n + 3) + j]) - want).abs();
                    assert!(off <= 2.0 * (depth + 1) as f64 * 2f64.powi(-24) * sum, "{sizes:?} at {i}, {j}: {off}");
                    assert!(
                        depth == 1 || j == 0 || off < (want - f64::from(got[i * (n + 3)])).abs(),
                        "a neighbour passes"
                    );
                }
                assert!((0..m).all(|i| got[i * (n + 3) + n..][..3] == [1.0; 3]), "what is beside it stays");
            }
        }
    }
}
