//! How near a product of bytes comes to exact arithmetic when activations are fixed-point numbers.
//!
//! A *group* is 256 channels that share a step. An activation is a whole number of steps, written in signed digits of
//! base 256, and the largest of a group takes all of them: `step = max |x| / most`, `most` = 127·256 + 127 with two
//! digits (16 bits), 127·65536 + 127·256 + 127 with three (24 bits). Every activation is off by half a step at most, so
//!
//! ```text
//! |Σ q·x̂ − Σ q·x| ≤ Σ over groups of step / 2 · Σ |q|          fixed point
//! |Σ q·x̂ − Σ q·x| ≤ 2^-11 · Σ |q·x|                            half precision, of numbers in its normal range
//! ```
//!
//! The first bound is the smaller one where the mean of |x| in a group, weighted by |q|, is at least `2^10 / most` of
//! its largest: a 32nd with two digits, an 8160th with three. So a group with an outlier takes three digits.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Channels of a group.
const GROUP: usize = 256;

/// A group in fixed point: its step and the digits of every activation, most significant first.
fn fixed_point(x: &[f32], digits: usize) -> (f64, Vec<Vec<i8>>) {
    let most = (0..digits).fold(0i64, |most, _| most * 256 + 127);
    let step = x.iter().fold(0f64, |m, &x| m.max(f64::from(x).abs())) / most as f64;
    let digits_of = |&x: &f32| {
        let mut steps = if step > 0.0 { (f64::from(x) / step).round() as i64 } else { 0 };
        let mut split: Vec<i8> = (0..digits)
            .map(|_| {
                let digit = (steps + 128).rem_euclid(256) - 128;
                steps = (steps - digit) / 256;
                digit as i8
            })
            .collect();
        assert_eq!(steps, 0, "{digits} digits hold {x}");
        split.reverse();
        split
    };
    (step, x.iter().map(digits_of).collect())
}

/// `Σ q·x̂` of one row, as a device adds it up: whole numbers digit by digit, then the step.
fn product(q: &[i8], (step, x): &(f64, Vec<Vec<i8>>)) -> f64 {
    let digits = x.first().map_or(0, Vec::len);
    let sums = (0..digits).map(|d| q.iter().zip(x).map(|(&q, x)| i32::from(q) * i32::from(x[d])).sum::<i32>());
    step * sums.fold(0f64, |sum, digit| sum * 256.0 + f64::from(digit))
}

fn exact(q: &[i8], x: &[f32]) -> f64 {
    q.iter().zip(x).map(|(&q, &x)| f64::from(q) * f64::from(x)).sum()
}

/// A group of activations of which one is `2^outlier` times as large as others may be, and rows of bytes.
fn groups(outlier: std::ops::Range<f32>) -> impl Strategy<Value = (Vec<f32>, Vec<Vec<i8>>)> {
    let x = (vec(-1f32..1.0, GROUP), 0..GROUP, outlier, 0.5f32..1.0);
    let x = x.prop_map(|(mut x, at, outlier, share)| {
        x[at] = 2f32.powf(outlier) * share;
        x
    });
    (x, vec(vec(-127i8..=127, GROUP), 32))
}

fn root_mean_square(errors: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = errors.fold((0.0, 0.0), |(sum, count), e| (sum + e * e, count + 1.0));
    (sum / count).sqrt()
}

/// What half precision and fixed point of two and of three digits are off, the root mean square over rows.
fn errors(x: &[f32], rows: &[Vec<i8>]) -> [f64; 3] {
    let halves: Vec<f32> = x.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
    let half = root_mean_square(rows.iter().map(|q| exact(q, &halves) - exact(q, x)));
    let [two, three] = [2, 3].map(|digits| {
        let fixed = fixed_point(x, digits);
        root_mean_square(rows.iter().map(|q| product(q, &fixed) - exact(q, x)))
    });
    [half, two, three]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The bound holds, and of three digits it is below that of half precision up to outliers of 2^11.
    #[test]
    fn fixed_point_is_within_its_bound((x, rows) in groups(-1.0..11.0)) {
        let largest = x.iter().fold(0f64, |m, &x| m.max(f64::from(x).abs()));
        for (digits, most) in [(2, 32_639.0), (3, 8_355_711.0)] {
            let fixed = fixed_point(&x, digits);
            for q in &rows {
                let weight: f64 = q.iter().map(|&q| f64::from(q).abs()).sum();
                let bound = largest / most / 2.0 * weight;
                let error = (product(q, &fixed) - exact(q, &x)).abs();
                prop_assert!(error <= bound * 1.000_001, "{error} with {digits} digits, {bound} is allowed");
                let half: f64 = q.iter().zip(&x).map(|(&q, &x)| f64::from(q).abs() * f64::from(x).abs()).sum();
                if digits == 3 {
                    prop_assert!(bound < half / 2048.0, "{bound} with three digits, half precision {}", half / 2048.0);
                }
            }
        }
    }

    /// With outliers of up to a thousand times the others, three digits are at least as near as half precision.
    #[test]
    fn three_digits_are_as_near_as_half_precision((x, rows) in groups(-1.0..10.0)) {
        let [half, _, three] = errors(&x, &rows);
        prop_assert!(three <= half, "{three} with three digits, {half} in half precision");
    }

    /// Two digits are enough where no activation stands out.
    #[test]
    fn two_digits_are_as_near_without_outliers((x, rows) in groups(-1.0..1.0)) {
        let [half, two, _] = errors(&x, &rows);
        prop_assert!(two <= half, "{two} with two digits, {half} in half precision");
    }

    /// The control for both: with an outlier two digits are not enough, so that these comparisons can fail.
    #[test]
    fn two_digits_are_not_enough_for_outliers((x, rows) in groups(9.0..10.0)) {
        let [_, two, three] = errors(&x, &rows);
        let others: Vec<f32> = x.iter().map(|&x| if x.abs() > 1.0 { 0.0 } else { x }).collect();
        let half = errors(&others, &rows)[0];
        prop_assert!(two > 2.0 * half, "{two} with two digits, {half} in half precision without the outlier");
        prop_assert!(three < half, "{three} with three digits");
    }
}

/// What is beyond half precision, or vanishes in it, is as near as all else.
#[test]
fn the_range_of_activations_does_not_matter() {
    let q: Vec<i8> = (0..GROUP).map(|k| (k * 37 % 255) as i8).collect();
    for scale in [1e6f32, 1e-9] {
        let x: Vec<f32> = (0..GROUP).map(|k| scale * (k as f32 * 0.7).sin()).collect();
        let halves: Vec<f32> = x.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
        let (want, fixed) = (exact(&q, &x), product(&q, &fixed_point(&x, 3)));
        let weight: f64 = q.iter().map(|&q| f64::from(q).abs()).sum();
        assert!((fixed - want).abs() <= f64::from(scale) / 8_355_711.0 / 2.0 * weight, "{fixed}, {want}");
        let half = exact(&q, &halves);
        assert!(!half.is_finite() || half == 0.0, "half precision has no such numbers: {half}");
    }
    assert_eq!(product(&q, &fixed_point(&[0.0; GROUP], 3)), 0.0);
}
