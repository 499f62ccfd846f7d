//! Codebooks as bytes: a row's centroids as `scale · q + offset`, where `q` is a whole number of one byte or two.
//!
//! With bytes for weights a product is one of whole numbers: `Σ w·x = scale · Σ q·x + offset · Σ x`. One byte, a
//! *plane*, divides the row's range into 254 steps, two divide it into 65,278 (32,766 for 16 centroids). Where `q` is 0
//! is the *zero point*.
//!
//! One plane says a codebook *exactly*: in single precision `scale · q + offset`, rounded once, is every centroid as it
//! is stored, so that all devices multiply by the same weights. Half-precision numbers are whole numbers of 2^-24, and
//! so are their differences; the greatest common divisor of these is the longest step that there is, and if the row has
//! more than 254 of it, no step will do. [`round`] moves such a row to the nearest grid that is exact. Its step is a
//! whole number of *units*, what the last bit of the row's largest centroid stands for, because up to 2^11 units every
//! whole number of them is one of half precision. A row that reaches as far below 0 as above has 2^11 to 2^12 units, so
//! that its step is 9 to 17 of them.
//!
//! Of 16 centroids an even number has a negative `q` (with two planes, a negative high byte), so that a look-up of eight
//! bytes at a time may pair entries of one sign. So the zero point is not always where it makes offsets smallest, and where
//! it is far from the middle of the range, steps are up to twice as long.

use half::f16;

/// Centroids that a row has at most: those of 4 bits.
pub const MOST: usize = 16;

/// Steps from the zero point to the farther end: of one plane, of two, and of two with 16 centroids.
const ONE: i32 = 127;
const TWO: i32 = 127 * 256 + 127;
const TWO_OF_16: i32 = 127 * 128 + 127;

/// The smallest number of half precision: all others are whole numbers of it.
const SMALLEST: f64 = 1.0 / (1u32 << 24) as f64;

/// A row's centroids in one byte each: centroid `i` is `scale · q[i] + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OnePlane {
    /// The step, 0 where all centroids are alike.
    pub scale: f32,
    /// The zero point: of those that leave the row within its bytes, the one nearest to 0.
    pub offset: f32,
    /// `[2^bits]` in −127..=127, zeros behind; of 16 an even number is negative.
    pub q: [i8; MOST],
    /// True: what is not exact is not said.
    pub exact: bool,
}

/// A row's centroids in two bytes each: centroid `i` is about `scale · q(i) + offset`, with [`TwoPlanes::q`] of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TwoPlanes {
    /// The step, 0 where all centroids are alike; a power of two if that says half-precision centroids exactly.
    pub scale: f32,
    /// The zero point.
    pub offset: f32,
    /// `[2^bits]`, zeros behind; of 16 an even number is negative.
    pub high: [i8; MOST],
    /// `[2^bits]`, zeros behind; of 16 none is negative.
    pub low: [i8; MOST],
    /// What `high` counts: 256, or of 16 centroids 128.
    pub radix: i32,
}

impl OnePlane {
    /// The grid of a row's 2, 4, 8 or 16 `centroids`, in any order. `None` if no grid says them exactly, or one is not a
    /// number of half precision.
    ///
    /// # Panics
    /// With another number of centroids.
    pub fn new(centroids: &[f32]) -> Option<Self> {
        let row = whole(centroids)?;
        let row = &row[..centroids.len()];
        let line = Line::exact(row, longest_step(row), ONE)?;
        Some(Self { scale: line.scale, offset: line.offset, q: line.q.map(|q| q as i8), exact: true })
    }
}

impl TwoPlanes {
    /// The grid of a row's 2, 4, 8 or 16 `centroids`, in any order: an exact one with a power of two for a step, else
    /// one within half a step of all. `None` if a centroid is not finite.
    ///
    /// # Panics
    /// With another number of centroids.
    pub fn new(centroids: &[f32]) -> Option<Self> {
        let (radix, most) = if centroids.len() == MOST { (128, TWO_OF_16) } else { (256, TWO) };
        let exact = whole(centroids).and_then(|row| {
            let row = &row[..centroids.len()];
            let step = longest_step(row);
            // Its lowest bit: the longest power of two.
            Line::exact(row, step & step.wrapping_neg(), most)
        });
        if !centroids.iter().all(|c| c.is_finite()) {
            return None;
        }
        let line = exact.unwrap_or_else(|| Line::near(centroids, most));
        // The low byte is the remainder from −128 on, or of 16 centroids from 0 on.
        let below = if radix == 256 { 128 } else { 0 };
        let high = line.q.map(|q| (q + below).div_euclid(radix) as i8);
        let low = line.q.map(|q| ((q + below).rem_euclid(radix) - below) as i8);
        Some(Self { scale: line.scale, offset: line.offset, high, low, radix })
    }

    /// Steps of centroid `i` from the zero point: `radix · high + low`.
    pub fn q(&self, i: usize) -> i32 {
        self.radix * i32::from(self.high[i]) + i32::from(self.low[i])
    }
}

/// True if one plane says every row of `codebooks` `[rows, levels]` exactly; more than [`MOST`] levels are never said.
pub fn one_plane_is_exact(codebooks: &[f32], levels: usize) -> bool {
    levels <= MOST && codebooks.chunks_exact(levels).all(|row| OnePlane::new(row).is_some())
}

/// Overwrites a row's `centroids` with what is stored of them, in half precision: of [`MOST`] at most a codebook that one
/// plane says exactly. What is in order stays in order; a row that is not finite in half precision stays as it is.
///
/// # Panics
/// With fewer than [`MOST`] centroids, but not 2, 4 or 8.
pub fn round(centroids: &mut [f32]) {
    // Sums have no −0, and adding 0 leaves none.
    let half = |c: f32| f16::from_f32(c).to_f32() + 0.0;
    if centroids.len() > MOST {
        centroids.iter_mut().for_each(|c| *c = half(*c));
        return;
    }
    let mut row = [0.0; MOST];
    let row = &mut row[..centroids.len()];
    row.iter_mut().zip(&*centroids).for_each(|(stored, &c)| *stored = half(c));
    if row.iter().all(|c| c.is_finite()) {
        if OnePlane::new(row).is_none() {
            to_grid(centroids, row);
        }
        centroids.copy_from_slice(row);
    }
}

/// Moves `row`, which is `centroids` in half precision, onto the nearest grid of the shortest step that one plane says.
fn to_grid(centroids: &[f32], row: &mut [f32]) {
    let largest = row.iter().fold(0f32, |largest, c| largest.max(c.abs()));
    let exponent = i32::from(f16::from_f32(largest).to_bits() >> 10).max(1);
    // What the last of its eleven bits stands for.
    let unit = 2f64.powi(exponent - 25);
    let (low, high) = ends(centroids);
    let shortest = ((high - low) / unit / f64::from(2 * ONE + 1)).max(1.0) as u32;
    // One number for all is always a grid, so that this ends.
    for step in (shortest..).map(f64::from) {
        let mut least = f64::INFINITY;
        let mut shift = 0.0;
        while shift < step {
            let nearest = |&c: &f32| (((f64::from(c) / unit - shift) / step).round() * step + shift) * unit;
            let error: f64 = centroids.iter().map(|c| (nearest(c) - f64::from(*c)).powi(2)).sum();
            if error < least {
                let mut moved = [0.0; MOST];
                moved.iter_mut().zip(centroids).for_each(|(moved, c)| *moved = nearest(c) as f32);
                let moved = &moved[..row.len()];
                if OnePlane::new(moved).is_some() {
                    row.copy_from_slice(moved);
                    least = error;
                }
            }
            shift += 1.0;
        }
        if least.is_finite() {
            return;
        }
    }
}

/// `centroids` as whole numbers of [`SMALLEST`], zeros behind; `None` if one is not a number of half precision.
fn whole(centroids: &[f32]) -> Option<[i64; MOST]> {
    assert!(matches!(centroids.len(), 2 | 4 | 8 | MOST), "{} centroids, 2, 4, 8 or 16 are expected", centroids.len());
    let mut row = [0; MOST];
    for (whole, &c) in row.iter_mut().zip(centroids) {
        if !c.is_finite() || f16::from_f32(c).to_f32() != c {
            return None;
        }
        *whole = (f64::from(c) / SMALLEST) as i64;
    }
    Some(row)
}

/// The greatest common divisor of a row's differences, 0 where there are none.
fn longest_step(row: &[i64]) -> i64 {
    row.iter().fold(0, |divisor, c| {
        let (mut a, mut b) = (divisor, (c - row[0]).abs());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    })
}

fn ends(row: &[f32]) -> (f64, f64) {
    let ends = row.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &c| (l.min(c), h.max(c)));
    (f64::from(ends.0), f64::from(ends.1))
}

/// An even grid and where a row's centroids are on it.
#[derive(Debug, Clone, Copy)]
struct Line {
    scale: f32,
    offset: f32,
    q: [i32; MOST],
}

impl Line {
    /// The grid of `step` that a `row` of whole numbers of [`SMALLEST`] is on, with `most` steps from the zero point at
    /// most. `None` if there are more, if no zero point leaves an even number of 16 below, or if single precision does
    /// not have scale and offset.
    fn exact(row: &[i64], step: i64, most: i32) -> Option<Self> {
        let lowest = *row.iter().min()?;
        let mut steps = [0; MOST];
        steps.iter_mut().zip(row).for_each(|(steps, c)| *steps = (c - lowest).checked_div(step).unwrap_or(0));
        let on_grid = &steps[..row.len()];
        // Zero points, counted from the lowest centroid.
        let allowed = on_grid.iter().max()? - i64::from(most)..=i64::from(most);
        if allowed.is_empty() {
            return None;
        }
        let nearest = (step / 2 - lowest).checked_div_euclid(step).unwrap_or(0);
        let wanted = nearest.clamp(*allowed.start(), *allowed.end());
        let is_paired = |zero: i64| row.len() < MOST || on_grid.iter().filter(|&&n| n < zero).count().is_multiple_of(2);
        // How many are below changes from an entry to the next number only.
        let zero = std::iter::once(wanted)
            .chain(on_grid.iter().flat_map(|&n| [n, n + 1]))
            .filter(|&zero| allowed.contains(&zero) && is_paired(zero))
            .min_by_key(|zero| (zero - wanted).abs())?;
        let mut q = [0; MOST];
        q.iter_mut().zip(on_grid).for_each(|(q, n)| *q = (n - zero) as i32);
        Some(Self { scale: single(step)?, offset: single(lowest + zero * step)?, q })
    }

    /// The grid with `most` steps from the zero point to the farther end of `row`. The zero point is the middle, or,
    /// where that leaves an odd number of 16 below, the nearest centroid to it that leaves an even one.
    fn near(row: &[f32], most: i32) -> Self {
        let (low, high) = ends(row);
        let middle = f64::midpoint(low, high);
        let mut entries: Vec<f64> = row.iter().map(|&c| f64::from(c)).collect();
        let distance = |entry: &f64| (entry - middle).abs();
        entries.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.total_cmp(b)));
        let mut grids =
            std::iter::once(middle).chain(entries).map(|zero| Self::counted_from(zero, row, (low, high), most));
        let is_paired = |line: &Self| row.len() < MOST || line.q.iter().filter(|&&q| q < 0).count().is_multiple_of(2);
        // Nothing is below the lowest centroid, and none is an even number.
        grids.find(is_paired).unwrap_or_else(|| Self::counted_from(low, row, (low, high), most))
    }

    fn counted_from(zero: f64, row: &[f32], (low, high): (f64, f64), most: i32) -> Self {
        let scale = (high - zero).max(zero - low) / f64::from(most);
        let mut q = [0; MOST];
        if scale > 0.0 {
            q.iter_mut().zip(row).for_each(|(q, &c)| *q = ((f64::from(c) - zero) / scale).round() as i32);
        }
        Self { scale: scale as f32, offset: zero as f32, q }
    }
}

/// A whole number of [`SMALLEST`], if single precision has it.
fn single(whole: i64) -> Option<f32> {
    let number = whole as f64 * SMALLEST;
    (f64::from(number as f32) == number).then_some(number as f32)
}

#[cfg(test)]
mod fixed_point;
#[cfg(test)]
mod tests;
