//! Activations as whole numbers, so that products with whole weights are exact.
//!
//! The channels of a segment share a step, a power of two: `x ≈ step · n` with `|n| < 2^30`, off by half a step at most,
//! 2^-30 of the segment's largest magnitude: less than what sums of f32 lose. `n` is `32768·upper + lower`
//! of 16 bits each, and these are `256·high + middle` and `128·third + fourth` of signed bytes, its *digits*: what
//! instructions that multiply bytes take.

use crate::processor::{Path, on_every_path};

/// The largest `n`: the upper digits are 127.
const MOST: f64 = (32_639 * 32_768 + 16_319) as f64;

/// What `upper` counts.
pub(super) const UPPER: f64 = 32_768.0;

/// Channels that the vectors below hold side by side.
pub(super) const LANE: usize = 16;

/// One token's activations.
#[derive(Debug)]
pub(super) struct Digits {
    /// High, middle, third and fourth digits of every 16 channels, `[in_features / 16][4][16]`
    pub(super) digits: Vec<[[i8; LANE]; 4]>,
    /// The same for instructions that multiply 16-bit numbers: of every 16 channels `upper` of the even and of the odd
    /// ones, then `lower` likewise, `[in_features / 16][4][8]`. Empty where no path asks for it.
    pub(super) words: Vec<[[i16; LANE / 2]; 4]>,
    /// `[segments]`
    pub(super) steps: Vec<f64>,
    /// Sums of `upper` and of `lower`, `[segments]`
    pub(super) sums: Vec<[i32; 2]>,
    /// `Σ x`, as the digits say it.
    pub(super) sum: f64,
}

impl Digits {
    /// The digits of `x`, in segments of `segment` channels (a multiple of 32, at most 256; the last may be shorter).
    /// `None` if a number is not finite.
    pub(super) fn new(path: Path, x: &[f32], segment: usize) -> Option<Self> {
        let n = x.len();
        let mut made = Self {
            digits: vec![[[0; LANE]; 4]; n / LANE],
            words: if path.multiplies_words() { vec![[[0; LANE / 2]; 4]; n / LANE] } else { Vec::new() },
            steps: Vec::with_capacity(n.div_ceil(segment)),
            sums: Vec::with_capacity(n.div_ceil(segment)),
            sum: 0.0,
        };
        segments(path, &mut made, x, segment)?;
        made.sum = (0..made.steps.len()).map(|s| made.segment_sum(s)).sum();
        Some(made)
    }

    /// `Σ x` of segment `s`.
    pub(super) fn segment_sum(&self, s: usize) -> f64 {
        let [upper, lower] = self.sums[s].map(f64::from);
        (upper * UPPER + lower) * self.steps[s]
    }

    #[inline(always)]
    fn segment(&mut self, at: usize, x: &[f32]) -> Option<()> {
        // Magnitudes are in the order of their bit patterns.
        let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)));
        if !largest.is_finite() {
            return None;
        }
        let step = step(largest);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let mut sums = [0; 2];
        for (x, [high, middle, third, fourth]) in x.as_chunks::<LANE>().0.iter().zip(&mut self.digits[at / LANE..]) {
            for i in 0..LANE {
                let n = nearest(f64::from(x[i]) * inverse);
                fourth[i] = (((n + 64) & 127) - 64) as i8;
                let rest = (n - i32::from(fourth[i])) >> 7;
                third[i] = rest as i8;
                let upper = (rest - i32::from(third[i])) >> 8;
                middle[i] = upper as i8;
                high[i] = ((upper - i32::from(middle[i])) >> 8) as i8;
                sums[0] += upper;
                sums[1] += n - (upper << 15);
            }
        }
        if let Some(words) = self.words.get_mut(at / LANE..(at + x.len()) / LANE) {
            for (words, [high, middle, third, fourth]) in words.iter_mut().zip(&self.digits[at / LANE..]) {
                for i in 0..LANE {
                    words[i % 2][i / 2] = 256 * i16::from(high[i]) + i16::from(middle[i]);
                    words[2 + i % 2][i / 2] = 128 * i16::from(third[i]) + i16::from(fourth[i]);
                }
            }
        }
        self.steps.push(step);
        self.sums.push(sums);
        Some(())
    }
}

on_every_path! {
    /// Fills in all segments; `None` if a number is not finite.
    fn segments(made: &mut Digits, x: &[f32], segment: usize) -> Option<()> {
        for (s, x) in x.chunks(segment).enumerate() {
            made.segment(s * segment, x)?;
        }
        Some(())
    }
}

/// The smallest power of two that `largest` is at most [`MOST`] of; 0 for 0.
#[inline(always)]
fn step(largest: f32) -> f64 {
    if largest == 0.0 {
        return 0.0;
    }
    let largest = f64::from(largest);
    // `largest` is at least this power of two, and less than twice it.
    let power = f64::from_bits(largest.to_bits() & 0x7ff0_0000_0000_0000);
    let step = power / f64::from(1 << 29);
    if largest / step <= MOST { step } else { 2.0 * step }
}

/// The whole number nearest to `x`, ties to even: a sum with 1.5 · 2^52 has no bits left behind the point.
#[inline(always)]
fn nearest(x: f64) -> i32 {
    const WHOLE: f64 = 6_755_399_441_055_744.0;
    (x + WHOLE).to_bits() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(x: &[f32], segment: usize) -> Vec<f64> {
        let made = Digits::new(Path::SCALAR, x, segment).unwrap();
        let digit = |k: usize, d: usize| i32::from(made.digits[k / LANE][d][k % LANE]);
        let upper = |k: usize| 256 * digit(k, 0) + digit(k, 1);
        let n = |k: usize| 32_768 * upper(k) + 128 * digit(k, 2) + digit(k, 3);
        (0..x.len()).map(|k| f64::from(n(k)) * made.steps[k / segment]).collect()
    }

    #[test]
    fn digits_are_near_and_exact_where_they_can_be() {
        let draws = crate::sampling::draws(1, 4096);
        for scale in [1e-44f32, 1e-20, 1.0, 3e20, 3.3e38] {
            let mut x: Vec<f32> = draws.iter().map(|u| (2.0 * u - 1.0) * scale).collect();
            // An outlier makes the steps of its own segment larger, and of no other.
            x[300] *= 0.9 / (2.0 * draws[300] - 1.0).abs();
            for (s, (x, got)) in x.chunks(256).zip(values(&x, 256).chunks(256)).enumerate() {
                let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                for (x, got) in x.iter().zip(got) {
                    let off = (f64::from(*x) - got).abs();
                    assert!(off <= f64::from(largest) * 2f64.powi(-30), "segment {s}: {x} became {got}");
                }
            }
        }
        // Whole numbers of 11 bits, as f16 has them, beside one 2^18 times as large.
        let x: Vec<f32> = (0..256).map(|k| if k == 7 { 2f32.powi(28) } else { (k * 8) as f32 }).collect();
        let exact = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        assert_eq!(values(&x, 256), exact(&x));
        // Some bits more are lost: the comparison above can fail.
        let mut finer = x.clone();
        finer[7] = 2f32.powi(34);
        assert_ne!(values(&finer, 256), exact(&finer));
        assert!(values(&[0.0; 64], 32).iter().all(|&x| x == 0.0));
    }

    #[test]
    fn every_path_makes_the_same_digits() {
        let x: Vec<f32> = crate::sampling::draws(2, 1056).iter().map(|u| (u - 0.5) / (1.001 - u)).collect();
        for segment in [32, 96, 256] {
            let scalar = Digits::new(Path::SCALAR, &x, segment).unwrap();
            for path in Path::all() {
                let made = Digits::new(path, &x, segment).unwrap();
                assert_eq!(made.digits, scalar.digits, "{path}");
                assert_eq!((&made.steps, &made.sums), (&scalar.steps, &scalar.sums), "{path}");
                assert_eq!(made.words.is_empty(), !path.multiplies_words(), "{path}");
                for (words, [high, middle, third, fourth]) in made.words.iter().zip(&made.digits) {
                    for i in 0..LANE {
                        assert_eq!(words[i % 2][i / 2], 256 * i16::from(high[i]) + i16::from(middle[i]));
                        assert_eq!(words[2 + i % 2][i / 2], 128 * i16::from(third[i]) + i16::from(fourth[i]));
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_has_no_digits() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 288];
            assert!(Digits::new(Path::SCALAR, &x, 256).is_some());
            x[287] = bad;
            assert!(Digits::new(Path::SCALAR, &x, 256).is_none());
        }
    }
}
