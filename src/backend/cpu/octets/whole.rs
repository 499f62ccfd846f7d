//! A row's centroids as whole numbers.

use crate::format::bytes::OnePlane;

/// The largest number that so many bytes say, each between −128 and 127.
const MOST: [f64; 4] = [127.0, 32_639.0, 8_355_711.0, 2_139_062_143.0];

/// What a row's codes stand for: exactly `Σ a · q + offset` over the planes.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct WholeRow {
    /// `q` of every code, and `a`.
    pub(in super::super) planes: Vec<([i8; 16], f32)>,
    pub(in super::super) offset: f32,
}

impl WholeRow {
    /// A row that one plane says, as [`bytes`](crate::format::bytes) means it: half precision is how its centroids are
    /// stored, the line is what they are. Every device multiplies by the line.
    pub(in super::super) fn on_a_line(centroids: &[f32]) -> Option<Self> {
        let OnePlane { scale, offset, q, exact } = OnePlane::new(centroids)?;
        exact.then(|| Self { planes: vec![(q, scale)], offset })
    }

    /// A row's 16 or fewer `centroids`; `None` if four bytes do not say them exactly.
    pub(in super::super) fn new(centroids: &[f32]) -> Option<Self> {
        // All in the smallest unit that any of them needs. Further apart, they are not exact in f64 either.
        let unit = centroids.iter().filter(|&&c| c != 0.0).map(|&c| lowest_bit(c)).min().unwrap_or(0);
        let power = f64::exp2(f64::from(unit));
        let wholes: Vec<f64> = centroids.iter().map(|&c| f64::from(c) / power).collect();
        let (low, high) = wholes.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &n| (l.min(n), h.max(n)));
        if !(high - low < f64::exp2(40.0) && high.abs().max(low.abs()) < f64::exp2(52.0)) {
            return None;
        }
        // What all steps between centroids are multiples of.
        let divisor = wholes.iter().map(|n| (n - low) as u64).fold(0, greatest_common_divisor).max(1);
        let step = divisor as f64;
        let middle = low + step * ((high - low) / step / 2.0).floor();
        let mut best: Option<(usize, f64, f64)> = None;
        for offset in [0.0, middle].into_iter().chain(wholes.iter().copied()) {
            let farthest = (high - offset).abs().max((low - offset).abs()) / step;
            let count = MOST.iter().position(|&most| farthest <= most);
            let is_exact = (offset - low) as i64 % divisor as i64 == 0 && is_single(offset * power);
            if let Some(count) = count.filter(|_| is_exact)
                && best.is_none_or(|(fewest, ..)| count < fewest)
            {
                best = Some((count, offset, farthest));
            }
        }
        let (count, offset, mut farthest) = best?;
        let mut step = step;
        // The first planes are used to the full: of the others' products lower digits are left out.
        while 2.0 * farthest <= MOST[count] && count > 0 && farthest > 0.0 {
            (farthest, step) = (2.0 * farthest, step / 2.0);
        }
        let mut rest = [0i64; 16];
        let steps = wholes.iter().map(|n| ((n - offset) / step) as i64);
        rest.iter_mut().zip(steps.cycle()).for_each(|(rest, n)| *rest = n);
        let mut planes = Vec::with_capacity(count + 1);
        for p in 0..=count {
            let q = rest.map(|n| n as i8);
            rest.iter_mut().zip(q).for_each(|(rest, q)| *rest = (*rest - i64::from(q)) >> 8);
            let a = step * power * f64::exp2(8.0 * p as f64);
            planes.push((q, Some(a as f32).filter(|_| is_single(a))?));
        }
        planes.reverse();
        Some(Self { planes, offset: (offset * power) as f32 })
    }
}

/// True if `x` is exact in f32, and none of the smallest.
fn is_single(x: f64) -> bool {
    x == 0.0 || f64::from(x as f32) == x && x.abs() >= f64::from(f32::MIN_POSITIVE)
}

/// The power of two of the lowest bit of `x`, which is not 0.
fn lowest_bit(x: f32) -> i32 {
    let (exponent, fraction) = ((x.to_bits() >> 23 & 0xff) as i32, x.to_bits() & 0x7f_ffff);
    let (exponent, significand) = if exponent == 0 { (1, fraction) } else { (exponent, fraction | 0x80_0000) };
    exponent - 150 + significand.trailing_zeros() as i32
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    fn values(row: &WholeRow) -> [f64; 16] {
        std::array::from_fn(|i| {
            let plane = |(q, a): &([i8; 16], f32)| f64::from(*a) * f64::from(q[i]);
            row.planes.iter().map(plane).sum::<f64>() + f64::from(row.offset)
        })
    }

    #[test]
    fn half_precision_is_said_exactly() {
        let draws = crate::sampling::draws(3, 16 * 4000);
        let mut planes = [0; 5];
        for (i, draws) in draws.chunks_exact(16).enumerate() {
            let scale = f32::exp2((i % 24) as f32 - 16.0);
            let row: Vec<f32> = draws.iter().map(|u| f16::from_f32((2.0 * u - 1.0) * scale).to_f32()).collect();
            for len in [2, 4, 8, 16] {
                let made = WholeRow::new(&row[..len]).expect("16-bit numbers, at most 2^23 apart");
                planes[made.planes.len()] += 1;
                for (i, value) in values(&made).into_iter().enumerate() {
                    assert_eq!(value, f64::from(row[i % len]), "{:?}", &row[..len]);
                }
            }
        }
        assert!(planes[2] > 1000 && planes[3] > 1000 && planes[1] + planes[4] > 0, "{planes:?}");
    }

    #[test]
    fn steps_of_a_line_are_found() {
        // Three bits of scale, eight of steps: eleven, as many as half precision has.
        let row: Vec<f32> = [-127, -80, -31, -5, 9, 44, 90, 127].iter().map(|q| 5.0 / 4096.0 * *q as f32).collect();
        let made = WholeRow::new(&row).unwrap();
        assert_eq!((made.planes.len(), made.planes[0].1), (1, 5.0 / 4096.0));
        assert_eq!(values(&made)[..8], row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        // One centroid beside the line.
        let mut beside = row.clone();
        beside[3] += 1.0 / 4096.0;
        assert_eq!(WholeRow::new(&beside).unwrap().planes.len(), 2);
        // A line that does not go through zero; a row of one value; too far apart.
        let shifted: Vec<f32> = row.iter().map(|x| x + 1.0 + 1.0 / 16_384.0).collect();
        assert_eq!(WholeRow::new(&shifted).unwrap().planes.len(), 1);
        assert_eq!(values(&WholeRow::new(&[0.3; 8]).unwrap()), [f64::from(0.3f32); 16]);
        assert_eq!(values(&WholeRow::new(&[0.0; 4]).unwrap()), [0.0; 16]);
        assert_eq!(WholeRow::new(&[1e9, 1e-9]), None);
    }
}
