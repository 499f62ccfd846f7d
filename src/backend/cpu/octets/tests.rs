use half::f16;

use super::*;
use crate::backend::cpu::kernels;
use crate::format::bytes;
use crate::sampling::draws;

/// A matrix, and the codes and values that it was made of.
struct Case {
    matrix: Octets,
    codes: Vec<u8>,
    values: Vec<f32>, // [out_features, in_features]
    what: String,
}

fn codes(seed: u64, len: usize, bits: usize) -> Vec<u8> {
    draws(seed, len).into_iter().map(|u| (u * (1u32 << bits) as f32) as u8).collect()
}

/// Codebooks of half precision, on lines of bytes or anywhere; the second row's are far apart.
fn tabulated(seed: u64, (n, rows): (usize, usize), bits: usize, lines: bool) -> Case {
    let mut lut: Vec<f32> =
        draws(seed, rows << bits).iter().map(|u| f16::from_f32(2.0 * u - 1.0).to_f32() / 16.0).collect();
    lut[1 << bits] = f16::from_f32(3e-6).to_f32();
    let book = |row: usize| row << bits..(row + 1) << bits;
    let whole = match lines {
        true => WholeRow::on_a_line,
        false => WholeRow::new,
    };
    if lines {
        (0..rows).for_each(|row| bytes::round(&mut lut[book(row)]));
    }
    let whole: Vec<WholeRow> = (0..rows).map(|row| whole(&lut[book(row)]).expect("whole")).collect();
    let codes = codes(seed + 1, n * rows, bits);
    let matrix = Octets::tabulated(n, bits, &whole, |row, out| out.copy_from_slice(&codes[row * n..][..n]));
    let values = (0..n * rows).map(|i| matrix.value(i / n, 0, codes[i].into())).collect();
    let most = whole.iter().map(|row| row.planes.len()).max().unwrap_or(0);
    assert!(if lines { most == 1 } else { bits == 2 || most > 1 }, "{most} planes");
    Case { matrix, codes, values, what: format!("{n} x {rows}, {bits} bits, {most} planes") }
}

/// Even steps in groups.
fn even(seed: u64, (n, rows): (usize, usize), bits: usize, group: usize) -> Case {
    let (codes, factors) = (codes(seed, n * rows, bits), draws(seed + 1, 2 * rows * (n / group)));
    let at = |row: usize, g: usize| 2 * (row * (n / group) + g);
    let factors = |row, g| [factors[at(row, g)] / 64.0, factors[at(row, g) + 1] - 0.5];
    let matrix = Octets::even((n, rows), bits, group, factors, |row, out| out.copy_from_slice(&codes[row * n..][..n]));
    let values = (0..n * rows).map(|i| matrix.value(i / n, i % n / group, codes[i].into())).collect();
    Case { matrix, codes, values, what: format!("{n} x {rows}, {bits} bits, groups of {group}") }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, n) in [32, 96, 128, 160, 256, 288, 384, 576, 1056, 2080].into_iter().enumerate() {
        for bits in 2..=4 {
            for lines in [false, true] {
                cases.push(tabulated(i as u64, (n, [8, 24][i % 2]), bits, lines));
            }
        }
    }
    for (n, group) in [(32, 32), (576, 64), (1056, 96), (1536, 128), (1056, 1056), (2048, 1024), (512, 256)] {
        for bits in 2..=8 {
            cases.push(even(group as u64, (n, 16), bits, group));
        }
    }
    cases
}

/// Numbers of which a few are far larger than the rest.
fn activations(n: usize) -> Vec<f32> {
    draws(7, n).iter().map(|u| (u - 0.5) / (1.001 - u)).collect()
}

fn product(case: &Case, path: Path, x: &[f32]) -> Vec<f32> {
    let digits = Digits::new(path, x, case.matrix.segment).expect("finite");
    let mut y = vec![f32::NAN; case.codes.len() / x.len()];
    case.matrix.product(path, 0, &[&digits], &mut y);
    y
}

/// The f64 product, and how far it may be missed: half a step of every activation; 2^14.01 steps times what later planes
/// hold, where they leave digits out; the rounding of the result and of the values themselves.
fn oracle(case: &Case, row: usize, x: &[f32]) -> (f64, f64) {
    let digits = Digits::new(Path::SCALAR, x, case.matrix.segment).expect("finite");
    let planes = case.matrix.planes_of(row / ROWS);
    let later: f64 = planes.skip(2).map(|p| 128.0 * f64::from(case.matrix.steps[p][row % ROWS])).sum();
    let values = &case.values[row * x.len()..][..x.len()];
    let (mut sum, mut off, mut size) = (0.0, 0.0, 0.0);
    for (k, (&w, &x)) in values.iter().zip(x).enumerate() {
        let (w, x) = (f64::from(w), f64::from(x));
        sum += w * x;
        off += digits.steps[k / case.matrix.segment] * (w.abs() / 2.0 + 16_448.0 * later);
        size += (w * x).abs();
    }
    // Values themselves are rounded to f32 where steps are even.
    (sum, off + 2f64.powi(-24) * (sum.abs() + size))
}

#[test]
fn every_path_makes_the_same_bits_and_the_right_ones() {
    for case in cases() {
        let x = activations(case.matrix.in_features);
        let y = product(&case, Path::SCALAR, &x);
        let mut codes = vec![0; x.len()];
        for (row, &got) in y.iter().enumerate() {
            case.matrix.codes(row, &mut codes);
            assert_eq!(codes, &case.codes[row * x.len()..][..x.len()], "{}", case.what);
            let (want, off) = oracle(&case, row, &x);
            assert!((f64::from(got) - want).abs() <= off, "{}, row {row}: {got}, {want} within {off:e}", case.what);
        }
        for path in Path::all() {
            let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&product(&case, path, &x)), bits(&y), "{}, {path}", case.what);
            // Octets one by one.
            let digits = Digits::new(path, &x, case.matrix.segment).expect("finite");
            let mut one = vec![0.0; y.len()];
            one.chunks_exact_mut(ROWS).enumerate().for_each(|(i, y)| case.matrix.product(path, i, &[&digits], y));
            assert_eq!(bits(&one), bits(&y), "{}, {path}", case.what);
        }
    }
}

#[test]
fn a_wrong_code_shows_on_every_path() {
    for case in cases() {
        let mut x = activations(case.matrix.in_features);
        let last = x.len() - 1;
        x[last] = 1.0;
        let (row, mut changed) = (5, case.codes.clone());
        changed[row * x.len() + last] ^= 1;
        for path in Path::all() {
            let mut wrong = Octets { lines: Vec::new(), ..clone(&case.matrix) };
            wrong.pack(case.codes.len() / x.len(), |r, out| out.copy_from_slice(&changed[r * x.len()..][..x.len()]));
            let other = Case { matrix: wrong, codes: changed.clone(), values: Vec::new(), what: String::new() };
            let (y, wrong) = (product(&case, path, &x), product(&other, path, &x));
            let differ: Vec<usize> = (0..y.len()).filter(|&r| y[r] != wrong[r]).collect();
            assert!(
                differ == [row] || differ.is_empty() && case.is_alike(row, last),
                "{}, {path}: {differ:?}",
                case.what
            );
        }
    }
}

impl Case {
    /// True if the code at that place and its neighbour mean nearly the same.
    fn is_alike(&self, row: usize, k: usize) -> bool {
        let n = self.matrix.in_features;
        let group = k / self.matrix.group_size();
        let value = |code: u8| self.matrix.value(row, group, code.into());
        let code = self.codes[row * n + k];
        (value(code) - value(code ^ 1)).abs() < 1e-4
    }
}

fn clone(matrix: &Octets) -> Octets {
    let Octets { in_features, bits, segment, group, .. } = *matrix;
    Octets {
        in_features,
        bits,
        segment,
        group,
        lines: matrix.lines.clone(),
        planes: matrix.planes.clone(),
        tables: matrix.tables.clone(),
        steps: matrix.steps.clone(),
        offsets: matrix.offsets.clone(),
    }
}

/// Sums of f32, which the backend makes of full precision, are the yardstick.
#[test]
fn products_are_at_least_as_near_as_those_of_f32() {
    for (i, (n, rows)) in [(576, 960), (1536, 576)].into_iter().enumerate() {
        for case in [tabulated(i as u64, (n, rows), 3, false), tabulated(i as u64, (n, rows), 4, true)] {
            let normal: Vec<f32> = draws(9, 12 * n).chunks_exact(12).map(|u| u.iter().sum::<f32>() - 6.0).collect();
            for x in [normal, activations(n)] {
                let y = product(&case, Path::detect(), &x);
                let (mut whole, mut single) = (0.0, 0.0);
                for (row, &y) in y.iter().enumerate() {
                    let values = &case.values[row * n..][..n];
                    let want: f64 = values.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                    whole += (f64::from(y) - want).powi(2);
                    single += (f64::from(kernels::dot(Path::detect(), values, &x)) - want).powi(2);
                }
                assert!(whole <= single, "{}: {:e}, {:e} of f32", case.what, whole.sqrt(), single.sqrt());
            }
        }
    }
}

/// Rows of any number are what each is alone, bit for bit, on every path; and not what another is.
#[test]
fn several_rows_are_each_alone() {
    for case in cases() {
        let n = case.matrix.in_features;
        let all: Vec<f32> = draws(11, 17 * n).iter().map(|u| (u - 0.5) / (1.001 - u)).collect();
        let alone: Vec<_> = all.chunks_exact(n).map(|x| product(&case, Path::SCALAR, x)).collect();
        for path in Path::all().filter(|&path| path != Path::SCALAR || n < 200) {
            let digits: Vec<_> =
                all.chunks_exact(n).map(|x| Digits::new(path, x, case.matrix.segment).expect("finite")).collect();
            for count in [2, 3, 4, 5, 17] {
                let x: Vec<_> = digits[..count].iter().collect();
                let mut y = vec![f32::NAN; count * alone[0].len()];
                case.matrix.product(path, 0, &x, &mut y);
                for (t, y) in y.chunks_exact(alone[0].len()).enumerate() {
                    assert!(y == alone[t], "{}, {path}: row {t} of {count}", case.what);
                    assert!(y != alone[(t + 1) % 17], "{}: another row goes unseen", case.what);
                }
            }
        }
    }
}
