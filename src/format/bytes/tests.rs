//! What bytes say of a codebook, for codebooks of every kind.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Half of what half precision cannot tell from `x`: what rounding to it may take.
fn half_ulp(x: f64) -> f64 {
    let exponent = x.abs().max(f64::from(f16::MIN_POSITIVE)).log2().floor();
    // Beside a power of two the coarser side counts.
    2f64.powf(exponent - 11.0) * 1.000_001
}

fn ends(row: &[f32]) -> (f64, f64) {
    let ends = row.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &c| (l.min(c), h.max(c)));
    (f64::from(ends.0), f64::from(ends.1))
}

fn negative(q: &[i8]) -> usize {
    q.iter().filter(|&&q| q < 0).count()
}

/// Rows of 8 or 16 numbers: around 0, far from 0, with an outlier, with few distinct numbers.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let row = |number: BoxedStrategy<f32>| prop_oneof![vec(number.clone(), 8), vec(number, 16)];
    let outlier = (row((-1f32..1.0).boxed()), 0usize..8, -300f32..300.0);
    let scaled = (row((-1f32..1.0).boxed()), -20i32..14, -4f32..4.0);
    prop_oneof![
        row((-1f32..1.0).boxed()),
        row((-0.01f32..0.03).boxed()),
        outlier.prop_map(|(mut row, i, c)| {
            row[i] = c;
            row
        }),
        scaled.prop_map(|(row, e, c)| row.iter().map(|x| (x + c) * 2f32.powi(e)).collect()),
        row(prop_oneof![Just(0f32), Just(-0.5), Just(0.3), Just(6e-8)].boxed()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn one_plane_is_within_half_a_step(row in rows()) {
        let plane = OnePlane::new(&row).unwrap();
        let (low, high) = ends(&row);
        for (&c, &q) in row.iter().zip(&plane.q) {
            prop_assert!(q >= -127);
            let got = f64::from(plane.scale) * f64::from(q) + f64::from(plane.offset);
            // Rounded to half precision first and, where that is as coarse as the steps, a few times more.
            let noise = half_ulp(low.abs().max(high.abs()));
            let most = 0.5 * f64::from(plane.scale) * 1.000_001 + noise * if noise > 0.2 * f64::from(plane.scale) { 8.0 } else { 2.0 };
            prop_assert!((got - f64::from(c)).abs() <= most, "{c} as {got}, {plane:?}");
        }
        prop_assert!(plane.q[row.len()..].iter().all(|&q| q == 0));
        let farthest = plane.q.iter().map(|q| q.unsigned_abs()).max();
        prop_assert_eq!(farthest, Some(if plane.scale == 0.0 { 0 } else { 127 }));
        if row.len() == 16 {
            prop_assert!(negative(&plane.q).is_multiple_of(2));
        } else if plane.scale > 0.0 {
            prop_assert!(plane.q.contains(&-127) && plane.q.contains(&127), "all of the steps are used");
        }
    }

    /// Fitting what the bytes say gives the same bytes, and they say it exactly.
    #[test]
    fn rounding_twice_is_rounding_once(row in rows()) {
        let first = OnePlane::new(&row).unwrap();
        let mut rounded = row.clone();
        round(&mut rounded);
        let said = rounded.iter().zip(first.q);
        for (&c, q) in said {
            prop_assert_eq!(f16::from_f32(c).to_f32(), c);
            let exact = f64::from(first.scale) * f64::from(q) + f64::from(first.offset);
            let single = 2f64.powi(-22) * f64::from(first.offset.abs()).max(127.0 * f64::from(first.scale));
            prop_assert!((exact - f64::from(c)).abs() <= half_ulp(exact) + single);
        }
        let again = OnePlane::new(&rounded).unwrap();
        prop_assert!(again.exact, "{rounded:?}");
        prop_assert_eq!(OnePlane { exact: true, ..first }, again);
        let mut twice = rounded.clone();
        round(&mut twice);
        prop_assert_eq!(&twice, &rounded);
        prop_assert_eq!(first.exact, rounded == row);
        let order = |row: &[f32]| row.is_sorted();
        let mut sorted = row.clone();
        sorted.sort_by(f32::total_cmp);
        round(&mut sorted);
        prop_assert!(order(&sorted));
    }

    /// Bytes are found again behind half precision, whatever scale and offset they were stored with.
    #[test]
    fn bytes_are_found_again(q in vec(-126i32..127, 16), scale in 1e-4f64..0.1, shift in -0.5f64..0.5, few in any::<bool>()) {
        let mut q = q;
        (q[0], q[1]) = (-127, 127);
        q.truncate(if few { 8 } else { 16 });
        if !few && q.iter().filter(|&&q| q < 0).count() % 2 == 1 {
            let at = (2..16).find(|&i| q[i] < 0).unwrap_or(2);
            q[at] = if q[at] < 0 { 5 } else { -5 };
        }
        // Offsets of half a range at most: noise of half precision is then below an eighth of a step.
        let offset = 127.0 * scale * shift;
        let row: Vec<f32> =
            q.iter().map(|&q| f16::from_f64(scale * f64::from(q) + offset).to_f32()).collect();
        let line = Line::through(&row, f64::midpoint(ends(&row).0, ends(&row).1), ONE);
        prop_assert_eq!(&line.q[..q.len()], &q[..]);
        if few {
            let plane = OnePlane::new(&row).unwrap();
            prop_assert!(plane.q.iter().zip(&q).all(|(&got, &want)| i32::from(got) == want));
        }
    }

    /// One centroid off by a third of a step is no longer what the bytes say.
    #[test]
    fn one_moved_centroid_shows(row in vec(-1f32..1.0, 16), few in any::<bool>(), at in 0usize..8) {
        let mut row = row;
        row.truncate(if few { 8 } else { 16 });
        round(&mut row);
        let plane = OnePlane::new(&row).unwrap();
        prop_assume!(plane.exact && plane.q[at].unsigned_abs() < 127 && f64::from(row[at]) != f64::from(plane.offset));
        prop_assert!(one_plane_is_exact(&row, row.len()));
        row[at] = f16::from_f32(row[at] + 0.34 * plane.scale).to_f32();
        prop_assert!(!OnePlane::new(&row).unwrap().exact);
        prop_assert!(!one_plane_is_exact(&row, row.len()));
    }

    #[test]
    fn two_planes_are_256_times_nearer(row in rows()) {
        let planes = TwoPlanes::new(&row).unwrap();
        let (low, high) = ends(&row);
        let (steps, radix) = if row.len() == 16 { (2 * TWO_OF_16, 128) } else { (2 * TWO, 256) };
        prop_assert_eq!(planes.radix, radix);
        let single = 2f64.powi(-22) * (high - low).max(high.abs()).max(low.abs());
        for (i, &c) in row.iter().enumerate() {
            let got = f64::from(planes.scale) * f64::from(planes.q(i)) + f64::from(planes.offset);
            prop_assert!((got - f64::from(c)).abs() <= 0.5 * f64::from(planes.scale) + single, "{c} as {got}");
        }
        // A moved zero point makes steps twice as long at most.
        let scale = f64::from(planes.scale) * f64::from(steps);
        prop_assert!(scale >= (high - low) * 0.999_999 && scale <= 2.000_001 * (high - low));
        if row.len() == 16 {
            prop_assert!(planes.low.iter().all(|&low| low >= 0));
            prop_assert!(negative(&planes.high).is_multiple_of(2));
        } else {
            prop_assert!(scale <= (high - low) * 1.000_001);
        }
    }
}

/// By hand: the zero point stays in the middle where that leaves an even number below, and moves to an entry else.
#[test]
fn the_zero_point_moves_as_little_as_it_may() {
    let row = |below: &[f32], above: &[f32]| -> Vec<f32> { below.iter().chain(above).copied().collect() };
    let low: Vec<f32> = (0..8).map(|i| -1.0 + i as f32 / 10.0).collect();
    let high: Vec<f32> = low.iter().map(|c| -c).collect();
    let even = OnePlane::new(&row(&low, &high)).unwrap();
    assert_eq!((even.offset, negative(&even.q)), (0.0, 8));
    assert_eq!(even.scale, 1.0 / 127.0);
    // Nine below: the highest of them, the nearest to the middle, is 0 then, and the way to the other end is longer.
    let odd = row(&[&low[..], &[-0.0625]].concat(), &high[..7]);
    let moved = OnePlane::new(&odd).unwrap();
    assert_eq!((moved.offset, negative(&moved.q)), (-0.0625, 8));
    assert_eq!((moved.q[8], moved.q[9], moved.scale), (0, 127, 1.0625 / 127.0));
    // The entry above the middle's neighbour, where that is nearer.
    let odd = row(&[&low[..], &[-0.25]].concat(), &[&[0.0625, 0.125], &high[..5]].concat());
    let moved = OnePlane::new(&odd).unwrap();
    assert_eq!((moved.offset, negative(&moved.q)), (0.125, 10));
    // Two alike move together: one of them is no even number.
    let odd = row(&[&low[..7], &[-0.0625, -0.0625]].concat(), &high[..7]);
    assert!(negative(&OnePlane::new(&odd).unwrap().q).is_multiple_of(2));
}

#[test]
fn rows_without_a_range_are_their_offset() {
    for len in [2, 4, 8, 16] {
        for c in [0.0, -0.0, 1.5, -65504.0, 6e-8f32] {
            let row = vec![f16::from_f32(c).to_f32(); len];
            let plane = OnePlane::new(&row).unwrap();
            assert_eq!((plane.scale, plane.offset, plane.q, plane.exact), (0.0, row[0], [0; MOST], true));
            let planes = TwoPlanes::new(&row).unwrap();
            assert_eq!((planes.scale, planes.offset, planes.q(0), planes.q(len - 1)), (0.0, row[0], 0, 0));
        }
    }
    // 1.6 is no half.
    assert!(!OnePlane::new(&[1.6; 8]).unwrap().exact);
}

#[test]
fn what_is_not_finite_is_not_said() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut row = [0.5; 8];
        row[3] = bad;
        assert_eq!((OnePlane::new(&row), TwoPlanes::new(&row)), (None, None));
        assert!(!one_plane_is_exact(&row, 8));
        let before = row.map(f32::to_bits);
        round(&mut row);
        assert_eq!(row.map(f32::to_bits), before);
    }
    // Beyond half precision, in which one plane is measured; two are not.
    let row = [7e4, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
    assert!(OnePlane::new(&row).is_none() && TwoPlanes::new(&row).is_some());
    assert!(OnePlane::new(&[65504.0, -65504.0, 0.0, 1.0]).is_some());
}

#[test]
#[should_panic(expected = "5 centroids, 2, 4, 8 or 16 are expected")]
fn other_numbers_of_centroids_are_a_mistake() {
    OnePlane::new(&[0.0; 5]);
}
