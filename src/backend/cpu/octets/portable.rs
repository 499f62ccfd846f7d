//! The product in whatever instructions the target guarantees: the slow, obvious twin.

use super::{Digits, LANE, Octets, ROWS, Sums};

pub(super) fn product(matrix: &Octets, first: usize, x: &[&Digits], y: &mut [f32]) {
    let rows = y.len() / x.len();
    x.iter().zip(y.chunks_exact_mut(rows)).for_each(|(x, y)| product_of_one(matrix, first, x, y));
}

fn product_of_one(matrix: &Octets, first: usize, x: &Digits, y: &mut [f32]) {
    let mut codes = vec![0; matrix.in_features];
    for (octet, y) in (first..).zip(y.chunks_exact_mut(ROWS)) {
        let mut sums = Sums::new(matrix, x, octet);
        let planes = matrix.planes_of(octet);
        let mut all = vec![[[0; ROWS]; 2]; planes.len().max(1) * x.steps.len()];
        for row in 0..ROWS {
            matrix.codes(ROWS * octet + row, &mut codes);
            for (k, &code) in codes.iter().enumerate() {
                let [high, middle, third, fourth] =
                    x.digits[k / LANE].each_ref().map(|digits| i32::from(digits[k % LANE]));
                let mut add = |p: usize, q: i32| {
                    let [upper, lower] = &mut all[k / matrix.segment * planes.len().max(1) + p];
                    upper[row] += q * (256 * high + middle);
                    lower[row] += if p < 2 { q * (128 * third + fourth) } else { 0 };
                };
                if planes.is_empty() {
                    add(0, i32::from(code));
                }
                let tables = matrix.tables[planes.clone()].iter().enumerate();
                tables.for_each(|(p, table)| add(p, i32::from(table[row][usize::from(code)]) - 128));
            }
        }
        for (i, [upper, lower]) in all.iter().enumerate() {
            let (s, p) = (i / planes.len().max(1), i % planes.len().max(1));
            sums.take(s, (!planes.is_empty()).then(|| planes.start + p), upper, lower);
        }
        y.copy_from_slice(&sums.rounded());
    }
}
