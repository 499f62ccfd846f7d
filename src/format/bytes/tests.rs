//! What bytes say of a codebook, for codebooks of every kind.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// The unit in the last place of half precision at `x`.
fn unit(x: f64) -> f64 {
    2f64.powi((x.abs().max(f64::from(f16::MIN_POSITIVE)).log2().floor() as i32) - 10)
}

fn negative(q: &[i8]) -> usize {
    q.iter().filter(|&&q| q < 0).count()
}

fn rounded(row: &[f32]) -> Vec<f32> {
    let mut rounded = row.to_vec();
    round(&mut rounded);
    rounded
}

/// What the bytes are, in single precision.
fn said(plane: &OnePlane, len: usize) -> Vec<u32> {
    plane.q[..len].iter().map(|&q| plane.scale.mul_add(f32::from(q), plane.offset).to_bits()).collect()
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|c| c.to_bits()).collect()
}

/// Rows of 8 or 16 numbers: around 0, on one side, far from 0, with an outlier, with few distinct numbers, so small or
/// so large that half precision ends.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let row = |number: BoxedStrategy<f32>| prop_oneof![vec(number.clone(), 8), vec(number, 16)];
    let outlier = (row((-1f32..1.0).boxed()), 0usize..8, -300f32..300.0);
    let scaled = (row((-1f32..1.0).boxed()), -20i32..14, -4f32..4.0);
    prop_oneof![
        row((-1f32..1.0).boxed()),
        row((-0.01f32..0.03).boxed()),
        row((5f32..5.3).boxed()),
        outlier.prop_map(|(mut row, i, c)| {
            row[i] = c;
            row
        }),
        scaled.prop_map(|(row, e, c)| row.iter().map(|x| (x + c) * 2f32.powi(e)).collect()),
        row(prop_oneof![Just(0f32), Just(-0.0), Just(-0.5), Just(0.3), Just(6e-8)].boxed()),
        row((-65504f32..65504.0).boxed()),
    ]
}

/// Rows of whole numbers that are seldom and often on a grid.
fn whole_rows() -> impl Strategy<Value = Vec<i64>> {
    let row = |most: i64| prop_oneof![vec(-most..=most, 2), vec(-most..=most, 8), vec(-most..=most, 16)];
    (prop_oneof![row(90), row(135), row(300)], 1i64..=6, -900i64..900)
        .prop_map(|(row, step, shift)| row.iter().map(|n| (n * step + shift).clamp(-2048, 2048)).collect())
}

/// All grids tried: steps up to the range, zero points within reach.
fn is_on_a_grid(row: &[i64]) -> bool {
    let (low, high) = (*row.iter().min().unwrap(), *row.iter().max().unwrap());
    let is_paired = |zero: i64| row.len() < 16 || row.iter().filter(|&&c| c < zero).count() % 2 == 0;
    let mut steps = (1..=(high - low).max(1)).filter(|step| row.iter().all(|c| (c - low) % step == 0));
    steps.any(|step| {
        let zeros = (-127..=127).map(|n| low + n * step);
        zeros.filter(|zero| (high - zero) / step <= 127).any(is_paired)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Bit for bit, and what is rounded is its own rounding.
    #[test]
    fn what_round_stores_is_what_one_plane_says(row in rows()) {
        let stored = rounded(&row);
        let plane = OnePlane::new(&stored).unwrap();
        prop_assert!(plane.exact);
        prop_assert_eq!(said(&plane, row.len()), bits(&stored), "{:?}", plane);
        prop_assert!(stored.iter().all(|&c| f16::from_f32(c).to_f32() == c));
        prop_assert!(plane.q.iter().all(|&q| q >= -127));
        prop_assert!(plane.q[row.len()..].iter().all(|&q| q == 0));
        prop_assert!(row.len() < 16 || negative(&plane.q).is_multiple_of(2));
        prop_assert_eq!(bits(&rounded(&stored)), bits(&stored));
        let mut sorted = row;
        sorted.sort_by(f32::total_cmp);
        prop_assert!(rounded(&sorted).is_sorted());
    }

    /// A step that leaves all of the range to one plane, and no more than half precision adds: a whole number of the
    /// units of the largest centroid, and one more where the ends are between two. Of 16 centroids all may have to be
    /// above the zero point.
    #[test]
    fn rounding_is_within_half_a_step(row in rows()) {
        let (low, high) = ends(&row);
        let steps = if row.len() == 16 { 127.0 } else { 254.0 };
        let most = ((high - low) / steps + 2.0 * unit(low.abs().max(high.abs()))) / 2.0;
        for (&c, stored) in row.iter().zip(rounded(&row)) {
            prop_assert!((f64::from(c) - f64::from(stored)).abs() <= most, "{c} as {stored}, {most} is allowed");
        }
    }

    /// What is on a grid stays as it is, and what is on none is not said; tried grid by grid.
    #[test]
    fn grids_are_found_where_there_are_any(whole in whole_rows(), exponent in -14i32..=4) {
        let row: Vec<f32> = whole.iter().map(|&n| n as f32 * 2f32.powi(exponent)).collect();
        // Beyond 2048 half precision has no such numbers.
        prop_assert!(row.iter().all(|&c| f16::from_f32(c).to_f32() == c));
        let plane = OnePlane::new(&row);
        prop_assert_eq!(plane.is_some(), is_on_a_grid(&whole));
        prop_assert_eq!(one_plane_is_exact(&row, row.len()), plane.is_some());
        prop_assert_eq!(rounded(&row) == row, plane.is_some());
        if let Some(plane) = plane {
            prop_assert_eq!(said(&plane, row.len()), bits(&row));
        }
    }

    /// One centroid off by what half precision just tells apart is no longer what the bytes say.
    #[test]
    fn one_moved_centroid_shows(row in vec(-1f32..1.0, 16), few in any::<bool>(), at in 0usize..8) {
        let mut row = row;
        row.truncate(if few { 8 } else { 16 });
        round(&mut row);
        let before = OnePlane::new(&row).unwrap();
        row[at] = f16::from_bits(f16::from_f32(row[at]).to_bits() ^ 1).to_f32();
        prop_assert_ne!(said(&before, row.len()), bits(&row));
        // Steps are several units here, so that no other grid says it either.
        prop_assert!(OnePlane::new(&row).is_none());
        prop_assert!(!one_plane_is_exact(&row, row.len()));
    }

    #[test]
    fn two_planes_are_256_times_nearer(row in rows()) {
        let planes = TwoPlanes::new(&row).unwrap();
        let (low, high) = ends(&row);
        let (steps, radix) = if row.len() == 16 { (2 * TWO_OF_16, 128) } else { (2 * TWO, 256) };
        prop_assert_eq!(planes.radix, radix);
        // A moved zero point makes steps twice as long at most.
        let longest = (high - low) / f64::from(steps) * if row.len() == 16 { 2.0 } else { 1.0 };
        let most = 0.5 * longest + 2f64.powi(-22) * (high - low).max(high.abs()).max(low.abs());
        for (i, &c) in row.iter().enumerate() {
            let got = f64::from(planes.scale) * f64::from(planes.q(i)) + f64::from(planes.offset);
            prop_assert!((got - f64::from(c)).abs() <= most, "{c} as {got}");
        }
        if row.len() == 16 {
            prop_assert!(planes.low.iter().all(|&low| low >= 0));
            prop_assert!(negative(&planes.high).is_multiple_of(2));
        }
    }

    /// Half-precision numbers within 2^14 units of the finest of them are what two planes say, bit for bit.
    #[test]
    fn two_planes_are_exact_where_they_reach(row in prop_oneof![vec(0.3f32..2.0, 8), vec(0.3f32..2.0, 16)], far in -9i32..9) {
        let row: Vec<f32> = row.iter().map(|c| f16::from_f32(c * 2f32.powi(far)).to_f32()).collect();
        let planes = TwoPlanes::new(&row).unwrap();
        for (i, c) in row.iter().enumerate() {
            let got = planes.scale.mul_add(planes.q(i) as f32, planes.offset);
            prop_assert_eq!(got.to_bits(), c.to_bits());
        }
        prop_assert_eq!(planes.scale.log2().fract(), 0.0);
        // Numbers between those of half precision are not.
        let between: Vec<f32> = row.iter().map(|c| c * 1.000_3).collect();
        let planes = TwoPlanes::new(&between).unwrap();
        let said = between.iter().enumerate().filter(|&(i, &c)| planes.scale.mul_add(planes.q(i) as f32, planes.offset) == c);
        prop_assert!(said.count() < row.len());
    }
}

/// Normal numbers, as sums of uniform ones.
fn normal(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    };
    let mut numbers: Vec<f64> = (0..count).map(|_| (0..12).map(|_| uniform()).sum()).collect();
    numbers.sort_unstable_by(f64::total_cmp);
    numbers
}

/// `levels` centroids of ascending `weights`, each the mean of those nearest to it, and the square of what that loses.
fn clusters(weights: &[f64], levels: usize) -> (Vec<f64>, f64) {
    let mut centroids: Vec<f64> = (0..levels).map(|i| weights[(2 * i + 1) * weights.len() / (2 * levels)]).collect();
    let code = |centroids: &[f64], w: f64| {
        let distance = |&i: &usize| (centroids[i] - w).abs();
        (0..levels).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap()
    };
    for _ in 0..20 {
        let mut sums = vec![(0.0, 0.0); levels];
        for &w in weights {
            let (sum, count) = &mut sums[code(&centroids, w)];
            (*sum, *count) = (*sum + w, *count + 1.0);
        }
        centroids.iter_mut().zip(sums).filter(|(_, (_, count))| *count > 0.0).for_each(|(c, (sum, n))| *c = sum / n);
    }
    let lost = weights.iter().map(|w| (w - centroids[code(&centroids, *w)]).powi(2)).sum::<f64>();
    (centroids, lost / weights.len() as f64)
}

/// Beside what quantization loses of normal weights, what bytes and half precision lose of the centroids is little: of
/// 3 bits a thousandth of the power, of 4 bits, which lose a quarter as much, less than a hundredth.
#[test]
fn bytes_lose_little_beside_quantization() {
    for (bits, most) in [(2, 0.0003), (3, 0.001), (4, 0.006)] {
        let (mut lost, mut moved, mut in_half) = (0.0, 0.0, 0.0);
        for seed in 0..200 {
            let (centroids, loss) = clusters(&normal(512, seed), 1 << bits);
            let row: Vec<f32> = centroids.iter().map(|&c| (c * 0.02 * (1.0 + seed as f64 / 200.0)) as f32).collect();
            let scale = f64::from(row[0]) / centroids[0];
            let power = |stored: &[f32]| {
                let squares = row.iter().zip(stored).map(|(c, s)| ((f64::from(*c) - f64::from(*s)) / scale).powi(2));
                squares.sum::<f64>() / row.len() as f64
            };
            lost += loss;
            moved += power(&rounded(&row));
            in_half += power(&row.iter().map(|&c| f16::from_f32(c).to_f32()).collect::<Vec<_>>());
        }
        assert!(moved < most * lost, "{bits} bits: {} of what quantization loses", moved / lost);
        // What the measure says of half precision alone, and of a quarter of the steps.
        assert!(
            in_half < 0.1 * moved && 16.0 * moved > most * lost,
            "{bits} bits: {}, {}",
            in_half / lost,
            moved / lost
        );
    }
}

/// By hand: the zero point is as near to 0 as bytes allow, but for leaving an even number of 16 below.
#[test]
fn the_zero_point_moves_as_little_as_it_may() {
    let row = |q: &[i32]| -> Vec<f32> { q.iter().map(|&q| q as f32 * 0.75).collect() };
    let plane = |q: &[i32]| OnePlane::new(&row(q)).map(|plane| (plane.scale, plane.offset, negative(&plane.q)));
    let even = [-127, -90, -70, -50, -30, -20, -10, -3, 2, 10, 20, 30, 50, 70, 90, 127];
    assert_eq!(plane(&even), Some((0.75, 0.0, 8)));
    // Nine below with all steps taken: there is no other zero point, and no grid.
    let mut odd = even;
    odd[8] = -1;
    assert_eq!(plane(&odd), None);
    // With three steps to spare: the zero point is the highest of the nine.
    (odd[0], odd[15]) = (-126, 125);
    assert_eq!(plane(&odd), Some((0.75, -0.75, 8)));
    // With two there, which move together, it is one above the entry at the other side.
    odd[7] = -1;
    odd[9] = 0;
    assert_eq!(plane(&odd), Some((0.75, 0.75, 10)));
    // Fewer centroids need not be paired.
    assert_eq!(plane(&[-127, -2, 5, 127]), Some((0.75, 0.0, 2)));
    // All above 0: the zero point is as near as 127 steps reach.
    assert_eq!(plane(&[200, 201, 210, 300]), Some((0.75, 173.0 * 0.75, 0)));
    assert_eq!(plane(&[0, 1, 254, 255]), None);
    // Not 0, but of another step's numbers the nearest.
    let plane = OnePlane::new(&[5.0, 9.0, 13.0, 25.0]).unwrap();
    assert_eq!((plane.scale, plane.offset, &plane.q[..4]), (4.0, 1.0, &[1, 2, 3, 6][..]));
}

#[test]
fn rows_without_a_range_are_their_offset() {
    for len in [2, 4, 8, 16] {
        for c in [0.0, -0.0, 1.5, -65504.0, 6e-8f32] {
            let row = vec![f16::from_f32(c).to_f32(); len];
            let plane = OnePlane::new(&row).unwrap();
            assert_eq!((plane.scale, plane.offset, plane.q, plane.exact), (0.0, row[0], [0; MOST], true));
            assert_eq!(said(&plane, len), bits(&rounded(&row)));
            let planes = TwoPlanes::new(&row).unwrap();
            assert_eq!((planes.scale, planes.offset, planes.q(0), planes.q(len - 1)), (0.0, row[0], 0, 0));
        }
    }
    // 1.6 is no number of half precision.
    assert_eq!((OnePlane::new(&[1.6; 8]), rounded(&[1.6; 8])), (None, vec![f16::from_f32(1.6).to_f32(); 8]));
}

#[test]
fn what_is_not_finite_is_not_said() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut row = [0.5; 8];
        row[3] = bad;
        assert_eq!((OnePlane::new(&row), TwoPlanes::new(&row)), (None, None));
        assert!(!one_plane_is_exact(&row, 8));
        assert_eq!(bits(&rounded(&row)), bits(&row));
    }
    // Beyond half precision, in which centroids are stored; two planes take other numbers, too.
    let row = [7e4, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
    assert!(OnePlane::new(&row).is_none() && TwoPlanes::new(&row).is_some());
    assert_eq!(rounded(&row), row);
    // Next to the end the nearest grid may be beyond it, and is not taken.
    let row = rounded(&[65504.0, -65504.0, 0.0, 1.0]);
    assert!(OnePlane::new(&row).is_some() && row.iter().all(|c| c.abs() <= 65504.0));
}

#[test]
#[should_panic(expected = "5 centroids, 2, 4, 8 or 16 are expected")]
fn other_numbers_of_centroids_are_a_mistake() {
    OnePlane::new(&[0.0; 5]);
}
