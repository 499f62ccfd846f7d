//! Codebooks as bytes: a row's centroids as `scale · q + offset`, where `q` is a whole number of one byte or two.
//!
//! With bytes for weights a product is one of whole numbers: `Σ w·x = scale · Σ q·x + offset · Σ x`. One byte, a
//! *plane*, divides the row's range into 254 steps, two divide it into 65,278 (32,766 for 16 centroids). Where `q` is 0
//! is the *zero point*. It is the middle of the range, which takes all steps there are.
//!
//! Of 16 centroids an even number has a negative `q` (with two planes, a negative high byte): a GPU that looks bytes up
//! eight at a time pairs entries of one sign. Where the middle would leave an odd number below, the zero point moves to
//! the entry nearest to the middle that leaves an even one, and the longer side of the range takes 127 steps.
//!
//! One plane says a codebook *exactly* if `scale · q + offset`, rounded to half precision as codebooks are stored, is
//! every centroid. No tolerance is needed: ends and zero point of a codebook that [`round`] made are centroids
//! themselves, so that fitting it again finds the very grid that it was rounded to.

use half::f16;

/// Centroids that a row has at most: those of 4 bits.
pub const MOST: usize = 16;

/// Steps from the zero point to the farther end: of one plane, of two, and of two with 16 centroids.
const ONE: i32 = 127;
const TWO: i32 = 127 * 256 + 127;
const TWO_OF_16: i32 = 127 * 128 + 127;
/// Roundings until a codebook is its own rounding: the second changes something only where steps are as small as half
/// precision is coarse.
const ROUNDS: usize = 8;

/// A row's centroids in one byte each: centroid `i` is about `scale · q[i] + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OnePlane {
    /// The step, 0 where all centroids are alike.
    pub scale: f32,
    /// The zero point.
    pub offset: f32,
    /// `[2^bits]` in −127..=127, zeros behind; of 16 an even number is negative.
    pub q: [i8; MOST],
    /// True if these are the centroids, once rounded to half precision.
    pub exact: bool,
}

/// A row's centroids in two bytes each: centroid `i` is about `scale · q(i) + offset`, with [`TwoPlanes::q`] of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TwoPlanes {
    /// The step, 0 where all centroids are alike.
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
    /// The grid of a row's 2, 4, 8 or 16 `centroids`, in any order. `None` if one is not finite in half precision.
    ///
    /// # Panics
    /// With another number of centroids.
    pub fn new(centroids: &[f32]) -> Option<Self> {
        let (row, line) = settle(centroids)?;
        let q = line.q.map(|q| q as i8);
        let exact = line.exact && row[..centroids.len()] == *centroids;
        Some(Self { scale: line.scale as f32, offset: line.zero as f32, q, exact })
    }
}

impl TwoPlanes {
    /// The grid of a row's 2, 4, 8 or 16 `centroids`, in any order. `None` if one is not finite.
    ///
    /// # Panics
    /// With another number of centroids.
    pub fn new(centroids: &[f32]) -> Option<Self> {
        let (radix, most) = if centroids.len() == MOST { (128, TWO_OF_16) } else { (256, TWO) };
        ensure_len(centroids.len());
        if !centroids.iter().all(|c| c.is_finite()) {
            return None;
        }
        let line = Line::fit(centroids, most);
        // The low byte is the remainder from −128 on, or of 16 centroids from 0 on.
        let below = if radix == 256 { 128 } else { 0 };
        let high = line.q.map(|q| (q + below).div_euclid(radix) as i8);
        let low = line.q.map(|q| ((q + below).rem_euclid(radix) - below) as i8);
        Some(Self { scale: line.scale as f32, offset: line.zero as f32, high, low, radix })
    }

    /// Steps of centroid `i` from the zero point: `radix · high + low`.
    pub fn q(&self, i: usize) -> i32 {
        self.radix * i32::from(self.high[i]) + i32::from(self.low[i])
    }
}

/// True if one plane says every row of `codebooks` `[rows, levels]` exactly; more than [`MOST`] levels are never said.
pub fn one_plane_is_exact(codebooks: &[f32], levels: usize) -> bool {
    let exact = |row| OnePlane::new(row).is_some_and(|plane| plane.exact);
    levels <= MOST && codebooks.chunks_exact(levels).all(exact)
}

/// Overwrites a row's `centroids` with what is stored of them, in half precision: of [`MOST`] at most a codebook that one
/// plane says exactly. What is in order stays in order; a row that is not finite in half precision stays as it is.
pub fn round(centroids: &mut [f32]) {
    if centroids.len() > MOST {
        centroids.iter_mut().for_each(|c| *c = f16::from_f32(*c).to_f32());
    } else if let Some((row, _)) = settle(centroids) {
        centroids.copy_from_slice(&row[..centroids.len()]);
    }
}

fn ensure_len(len: usize) {
    assert!(matches!(len, 2 | 4 | 8 | MOST), "{len} centroids, 2, 4, 8 or 16 are expected");
}

/// `centroids` rounded to half precision and onto one plane, again until that changes nothing, and their grid.
fn settle(centroids: &[f32]) -> Option<([f32; MOST], Line)> {
    ensure_len(centroids.len());
    let mut row = [0.0; MOST];
    row.iter_mut().zip(centroids).for_each(|(half, &c)| *half = f16::from_f32(c).to_f32());
    let values = &mut row[..centroids.len()];
    if !values.iter().all(|c| c.is_finite()) {
        return None;
    }
    let mut line = Line::fit(values, ONE);
    for _ in 0..ROUNDS {
        if line.exact {
            break;
        }
        values.iter_mut().zip(line.q).for_each(|(c, q)| *c = line.stored(q));
        line = Line::fit(values, ONE);
    }
    Some((row, line))
}

/// An even grid and where a row's centroids are on it.
#[derive(Debug, Clone, Copy)]
struct Line {
    scale: f64,
    zero: f64,
    q: [i32; MOST],
    exact: bool,
}

impl Line {
    /// The grid of `row` with `most` steps from the zero point to the farther end: one that says the row exactly, else
    /// that with the zero point nearest to the middle.
    fn fit(row: &[f32], most: i32) -> Self {
        let (low, high) = row.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &c| (l.min(c), h.max(c)));
        let middle = f64::midpoint(f64::from(low), f64::from(high));
        let centred = Self::through(row, middle, most);
        if row.len() < MOST || centred.is_paired() && centred.exact {
            return centred;
        }
        let mut entries = [0.0; MOST];
        entries.iter_mut().zip(row).for_each(|(entry, &c)| *entry = f64::from(c));
        let distance = |entry: &f64| (entry - middle).abs();
        entries.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.total_cmp(b)));
        let mut nearest = centred.is_paired().then_some(centred);
        for zero in entries {
            let line = Self::through(row, zero, most);
            if line.is_paired() {
                if line.exact {
                    return line;
                }
                nearest.get_or_insert(line);
            }
        }
        // Nothing is below the lowest entry, and none is an even number.
        nearest.unwrap_or_else(|| Self::through(row, f64::from(low), most))
    }

    /// The grid with this zero point.
    fn through(row: &[f32], zero: f64, most: i32) -> Self {
        let farthest = row.iter().map(|&c| (f64::from(c) - zero).abs()).fold(0.0, f64::max);
        let mut line = Self { scale: farthest / f64::from(most), zero, q: [0; MOST], exact: true };
        for (i, &c) in row.iter().enumerate() {
            if line.scale > 0.0 {
                line.q[i] = ((f64::from(c) - zero) / line.scale).round() as i32;
            }
            line.exact &= line.stored(line.q[i]) == c;
        }
        line
    }

    /// Step `q` in half precision, by way of single precision, so that every machine rounds alike.
    fn stored(&self, q: i32) -> f32 {
        f16::from_f32((self.scale * f64::from(q) + self.zero) as f32).to_f32()
    }

    /// True if an even number is negative.
    fn is_paired(&self) -> bool {
        self.q.iter().filter(|&&q| q < 0).count().is_multiple_of(2)
    }
}

#[cfg(test)]
mod fixed_point;
#[cfg(test)]
mod tests;
