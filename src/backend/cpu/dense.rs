//! Products of full precision with several activations at once: weights are read, and made f32, once for all of them.
//!
//! Each sum has the lanes and the order of [`super::kernels`], whatever it is made beside.

use half::f16;

use super::kernels::dot;
use crate::format::Floats;
use crate::processor::{Kind, Path};

/// Bytes ahead of what is multiplied that are asked for: memory takes longer than the processor's own guess reaches.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Weights of some rows, one after the other, as they are stored.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// `y[t] = W·x[t]` for the rows from `first` on that each of `x` has room for in `y` `[x.len(), rows]`.
pub(super) fn products(path: Path, w: &Floats<'_>, first: usize, x: &[&[f32]], y: &mut [f32]) {
    let Some(n) = x.first().map(|x| x.len()) else { return };
    let rows = y.len() / x.len();
    let place = first * n..(first + rows) * n;
    let w = match w {
        Floats::F32(w) => Rows::F32(&w[place]),
        Floats::F16(w) => Rows::F16(&w[place]),
        Floats::Bf16(_) => unreachable!("made f32 when uploaded"),
    };
    products_of_rows(path, w, x, y, rows);
}

/// `y[t · stride + r] = w[r]·x[t]`
pub(super) fn products_of_rows(path: Path, w: Rows<'_>, x: &[&[f32]], y: &mut [f32], stride: usize) {
    match path.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a path exists only where the processor has its instructions.
        Kind::Avx512 => unsafe { avx512::rows(w, x, y, stride) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Kind::AvxVnni | Kind::Avx2 => unsafe { avx2::rows(w, x, y, stride) },
        Kind::Scalar => {
            let widened: Vec<f32>;
            let w = match w {
                Rows::F32(w) => w,
                Rows::F16(w) => {
                    widened = w.iter().map(|w| w.to_f32()).collect();
                    &widened
                }
            };
            for (t, x) in x.iter().enumerate() {
                w.chunks_exact(x.len()).enumerate().for_each(|(r, w)| y[t * stride + r] = dot(path, w, x));
            }
        }
    }
}

/// `rows` of one path, and its parts: `$rows` rows with `$most` activations at a time, as many sums as there are registers
/// for, each of `$parts` vectors of `$width` numbers, which `$total` adds up; `$half` makes a vector of f16 numbers.
#[cfg(target_arch = "x86_64")]
macro_rules! on_path {
    ($name:ident, $features:literal, $rows:literal, $most:literal, $width:literal, $parts:literal, $total:ident,
     $zero:ident, $multiply_add:ident, $half:item) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::*;

            use half::f16;

            use super::super::kernels::$name::{load, $total};
            use super::super::kernels::{LANES, rest};
            use super::{AHEAD, Rows};

            #[target_feature(enable = $features)]
            #[inline]
            $half

            #[target_feature(enable = $features)]
            pub(super) fn rows(w: Rows<'_>, x: &[&[f32]], y: &mut [f32], stride: usize) {
                match w {
                    Rows::F32(w) => all_f32::all(w, x, y, stride),
                    Rows::F16(w) => all_f16::all(w, x, y, stride),
                }
            }

            on_path!(@of all_f32, f32, $features, $rows, $most, $width, $parts, $total, $zero, $multiply_add, load,
                |w: &f32| *w);
            on_path!(@of all_f16, f16, $features, $rows, $most, $width, $parts, $total, $zero, $multiply_add, half,
                |w: &f16| w.to_f32());
        }
    };
    (@of $name:ident, $number:ty, $features:literal, $rows:literal, $most:literal, $width:literal, $parts:literal,
     $total:ident, $zero:ident, $multiply_add:ident, $load:ident, $widened:expr) => {
        mod $name {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) fn all(w: &[$number], x: &[&[f32]], y: &mut [f32], stride: usize) {
                let Some(n) = x.first().map(|x| x.len()) else { return };
                // One activation is near as it is: rows of their own are read fastest.
                let first = if x.len() < $most { 0 } else { w.len() / n / $rows * $rows };
                let (w, left) = w.split_at(first * n);
                let together = w.chunks_exact($rows * n);
                for (i, w) in together.enumerate() {
                    let w: [&[$number]; $rows] = std::array::from_fn(|r| &w[r * n..][..n]);
                    with_all(w, x, &mut y[$rows * i..], stride);
                }
                for (i, w) in left.chunks_exact(n).enumerate() {
                    with_all([w], x, &mut y[first + i..], stride);
                }
            }

            /// Some rows with every one of `x`.
            #[target_feature(enable = $features)]
            #[inline]
            fn with_all<const R: usize>(w: [&[$number]; R], x: &[&[f32]], y: &mut [f32], stride: usize) {
                let (several, others) = x.as_chunks::<$most>();
                for (i, x) in several.iter().enumerate() {
                    for (t, made) in of(w, *x).into_iter().enumerate() {
                        y[($most * i + t) * stride..][..R].copy_from_slice(&made);
                    }
                }
                for (i, x) in others.iter().enumerate() {
                    let [made] = of(w, [*x]);
                    y[($most * several.len() + i) * stride..][..R].copy_from_slice(&made);
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn of<const R: usize, const T: usize>(w: [&[$number]; R], x: [&[f32]; T]) -> [[f32; R]; T] {
                let mut sums = [[[$zero(); $parts]; R]; T];
                let n = w[0].len();
                for at in (0..n / LANES * LANES).step_by(LANES) {
                    let mut parts = [[$zero(); $parts]; R];
                    for (parts, w) in parts.iter_mut().zip(w) {
                        let w: &[$number; LANES] = w[at..].first_chunk().expect("as many as there are lanes");
                        // What lies AHEAD is asked for and not read, so that it may lie anywhere.
                        _mm_prefetch::<_MM_HINT_T0>(w.as_ptr().cast::<i8>().wrapping_add(AHEAD));
                        for (p, part) in parts.iter_mut().enumerate() {
                            *part = $load(&w[$width * p..]);
                        }
                    }
                    for (sums, x) in sums.iter_mut().zip(x) {
                        let x: &[f32; LANES] = x[at..].first_chunk().expect("as long as w");
                        for p in 0..$parts {
                            let x = load(&x[$width * p..]);
                            for (sums, parts) in sums.iter_mut().zip(&parts) {
                                sums[p] = $multiply_add(parts[p], x, sums[p]);
                            }
                        }
                    }
                }
                let mut made = [[0.0; R]; T];
                for (r, w) in w.iter().enumerate() {
                    let left: Vec<f32> = w.as_chunks::<LANES>().1.iter().map($widened).collect();
                    for ((made, sums), x) in made.iter_mut().zip(sums).zip(x) {
                        made[r] = $total(sums[r]) + rest(&left, &x[n - left.len()..]);
                    }
                }
                made
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
on_path!(
    avx512,
    "avx512f,avx512dq,avx2,fma,f16c",
    2,
    4,
    16,
    2,
    sum,
    _mm512_setzero_ps,
    _mm512_fmadd_ps,
    fn half(w: &[f16]) -> __m512 {
        let w: &[f16; 16] = w.first_chunk().expect("a multiple of sixteen");
        // SAFETY: 16 numbers are there; the load needs no alignment.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(w.as_ptr().cast()) })
    }
);

#[cfg(target_arch = "x86_64")]
on_path!(
    avx2,
    "avx2,fma,f16c",
    1,
    2,
    8,
    4,
    sum4,
    _mm256_setzero_ps,
    _mm256_fmadd_ps,
    fn half(w: &[f16]) -> __m256 {
        let w: &[f16; 8] = w.first_chunk().expect("a multiple of eight");
        // SAFETY: eight numbers are there; the load needs no alignment.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(w.as_ptr().cast()) })
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::draws;

    /// Rows of any number, in both types, are what `dot` makes of each, bit for bit, on every path.
    #[test]
    fn several_rows_are_each_alone() {
        let numbers = |seed, len| draws(seed, len).iter().map(|u| (u - 0.5) / (1.001 - u)).collect::<Vec<f32>>();
        for n in [8, 32, 40, 96, 100, 576] {
            let halves: Vec<f16> = numbers(1, 3 * n).iter().map(|&w| f16::from_f32(w)).collect();
            let widened: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
            for count in [1, 2, 3, 4, 5, 7, 16] {
                let x: Vec<Vec<f32>> = (0..count).map(|t| numbers(2 + t as u64, n)).collect();
                let x: Vec<&[f32]> = x.iter().map(|x| &x[..]).collect();
                for path in Path::all() {
                    for w in [Floats::F32((&widened[..]).into()), Floats::F16((&halves[..]).into())] {
                        let mut y = vec![f32::NAN; 2 * count];
                        products(path, &w, 1, &x, &mut y);
                        for (t, x) in x.iter().enumerate() {
                            for row in 0..2 {
                                let own = &widened[(1 + row) * n..(2 + row) * n];
                                let want = dot(Path::SCALAR, own, x);
                                assert_eq!(y[2 * t + row].to_bits(), want.to_bits(), "{path}, {n}, row {t} of {count}");
                                assert_ne!(want, dot(Path::SCALAR, &widened[..n], x), "another row goes unseen");
                            }
                        }
                    }
                }
            }
        }
    }
}
