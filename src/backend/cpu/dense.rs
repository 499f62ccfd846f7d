//! Products of full precision with several activations at once: weights are read, and made f32, once for all of them.
//!
//! Each sum has the lanes and the order of [`super::kernels`], whatever it is made beside.

use half::f16;

use super::kernels::dot;
use crate::format::Floats;
use crate::processor::{Kind, Path};

/// Weights of one row as they are stored.
#[derive(Clone, Copy)]
pub(super) enum Row<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// `y[t] = W·x[t]` for the rows from `first` on that each of `x` has room for in `y` `[x.len(), rows]`.
pub(super) fn products(path: Path, w: &Floats<'_>, first: usize, x: &[&[f32]], y: &mut [f32]) {
    let Some(n) = x.first().map(|x| x.len()) else { return };
    let rows = y.len() / x.len();
    for row in 0..rows {
        let place = (first + row) * n..(first + row + 1) * n;
        let w = match w {
            Floats::F32(w) => Row::F32(&w[place]),
            Floats::F16(w) => Row::F16(&w[place]),
            Floats::Bf16(_) => unreachable!("made f32 when uploaded"),
        };
        products_of_row(path, w, x, &mut y[row..], rows);
    }
}

/// `y[t · stride] = w·x[t]`
pub(super) fn products_of_row(path: Path, w: Row<'_>, x: &[&[f32]], y: &mut [f32], stride: usize) {
    match path.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a path exists only where the processor has its instructions.
        Kind::Avx512 => unsafe { avx512::row(w, x, y, stride) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Kind::AvxVnni | Kind::Avx2 => unsafe { avx2::row(w, x, y, stride) },
        Kind::Scalar => {
            let widened: Vec<f32>;
            let w = match w {
                Row::F32(w) => w,
                Row::F16(w) => {
                    widened = w.iter().map(|w| w.to_f32()).collect();
                    &widened
                }
            };
            x.iter().enumerate().for_each(|(t, x)| y[t * stride] = dot(path, w, x));
        }
    }
}

/// `row` of one path, and its parts: `$most` activations at a time, as many sums as there are registers for, each of
/// `$parts` vectors of `$width` numbers, which `$total` adds up; `$half` makes a vector of f16 numbers.
#[cfg(target_arch = "x86_64")]
macro_rules! on_path {
    ($name:ident, $features:literal, $most:literal, $width:literal, $parts:literal, $total:ident, $zero:ident,
     $multiply_add:ident, $half:item) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::*;

            use half::f16;

            use super::super::kernels::$name::{load, $total};
            use super::super::kernels::{LANES, rest};
            use super::Row;

            #[target_feature(enable = $features)]
            #[inline]
            $half

            #[target_feature(enable = $features)]
            pub(super) fn row(w: Row<'_>, x: &[&[f32]], y: &mut [f32], stride: usize) {
                let (several, others) = x.as_chunks::<$most>();
                for (i, x) in several.iter().enumerate() {
                    let made = match w {
                        Row::F32(w) => of_f32(w, *x),
                        Row::F16(w) => of_f16(w, *x),
                    };
                    made.iter().enumerate().for_each(|(t, made)| y[($most * i + t) * stride] = *made);
                }
                for (i, x) in others.iter().enumerate() {
                    let [made] = match w {
                        Row::F32(w) => of_f32(w, [*x]),
                        Row::F16(w) => of_f16(w, [*x]),
                    };
                    y[($most * several.len() + i) * stride] = made;
                }
            }

            on_path!(@of of_f32, f32, $features, $width, $parts, $total, $zero, $multiply_add, load, |w: &f32| *w);
            on_path!(@of of_f16, f16, $features, $width, $parts, $total, $zero, $multiply_add, half, |w: &f16| w.to_f32());
        }
    };
    (@of $name:ident, $number:ty, $features:literal, $width:literal, $parts:literal, $total:ident, $zero:ident,
     $multiply_add:ident, $load:ident, $widened:expr) => {
        #[target_feature(enable = $features)]
        #[inline]
        fn $name<const T: usize>(w: &[$number], x: [&[f32]; T]) -> [f32; T] {
            let mut sums = [[$zero(); $parts]; T];
            let (whole, left) = w.as_chunks::<LANES>();
            for (i, w) in whole.iter().enumerate() {
                let mut parts = [$zero(); $parts];
                for (p, part) in parts.iter_mut().enumerate() {
                    *part = $load(&w[$width * p..]);
                }
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x: &[f32; LANES] = x[LANES * i..].first_chunk().expect("as long as w");
                    for (p, sum) in sums.iter_mut().enumerate() {
                        *sum = $multiply_add(parts[p], load(&x[$width * p..]), *sum);
                    }
                }
            }
            let left: Vec<f32> = left.iter().map($widened).collect();
            let mut made = [0.0; T];
            for ((made, sums), x) in made.iter_mut().zip(sums).zip(x) {
                *made = $total(sums) + rest(&left, &x[w.len() - left.len()..]);
            }
            made
        }
    };
}

#[cfg(target_arch = "x86_64")]
on_path!(
    avx512,
    "avx512f,avx512dq,avx2,fma,f16c",
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
