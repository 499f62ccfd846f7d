//! Residuals of the selected channels, times their activations.
//!
//! A row's sum is a chain of fused multiply-adds in the order of the channels, on every path; eight rows or more are
//! summed side by side, so that sums stay in registers.

use crate::processor::{Kind, Path};

/// Selected channels of a residual, for some of its rows.
pub(super) struct Lines<'a> {
    /// `[in_features, stride]`: eight rows' codes in a word.
    pub(super) words: &'a [u32],
    /// Words of a channel.
    pub(super) stride: usize,
    /// The first word of each channel that is asked for.
    pub(super) first: usize,
    /// Channels and their activations.
    pub(super) selected: &'a [(usize, f32)],
}

impl Lines<'_> {
    /// Activations, and `n` words of their channels from word `at` on.
    fn from(&self, at: usize, n: usize) -> impl Iterator<Item = (f32, &[u32])> {
        self.selected.iter().map(move |&(k, x)| (x, &self.words[k * self.stride + self.first + at..][..n]))
    }

    /// Has `rows` rows of every channel brought near, while something else is done.
    pub(super) fn prefetch(&self, rows: usize) {
        #[cfg(target_arch = "x86_64")]
        for (_, words) in self.from(0, rows / 8) {
            for line in words.chunks(16) {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                // SAFETY: every x86-64 processor has the instruction, which changes nothing that can be seen.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = rows;
    }

    /// `y[r] += scales[r] · Σ x·(code − 8)`; there are as many rows as `y` is long, a multiple of eight.
    pub(super) fn add_to(&self, path: Path, scales: &[f32], y: &mut [f32]) {
        match path.kind() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a path exists only where the processor has its instructions.
            Kind::Avx512 => unsafe { wide::add_to(self, scales, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Kind::AvxVnni | Kind::Avx2 => unsafe { narrow::add_to(self, 0, scales, y) },
            Kind::Scalar => {
                for (at, (y, scales)) in y.as_chunks_mut::<8>().0.iter_mut().zip(scales.as_chunks::<8>().0).enumerate()
                {
                    let mut sums = [0f32; 8];
                    for (x, words) in self.from(at, 1) {
                        for (i, sum) in sums.iter_mut().enumerate() {
                            *sum = x.mul_add(((words[0] >> (4 * i) & 15) as i32 - 8) as f32, *sum);
                        }
                    }
                    y.iter_mut().zip(scales).zip(sums).for_each(|((y, s), sum)| *y += s * sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod narrow {
    use std::arch::x86_64::*;

    use super::Lines;
    use crate::backend::cpu::kernels::avx2::load;

    /// Rows from word `at` on.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn add_to(lines: &Lines<'_>, at: usize, scales: &[f32], y: &mut [f32]) {
        let (fours, rest) = y.as_chunks_mut::<32>();
        let whole = 4 * fours.len();
        for (i, y) in fours.iter_mut().enumerate() {
            words::<4>(lines, at + 4 * i, &scales[32 * i..], y);
        }
        for (i, y) in rest.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            words::<1>(lines, at + whole + i, &scales[8 * (whole + i)..], y);
        }
    }

    /// `N` words of every channel.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn words<const N: usize>(lines: &Lines<'_>, at: usize, scales: &[f32], y: &mut [f32]) {
        let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        let (low, eight) = (_mm256_set1_epi32(15), _mm256_set1_epi32(8));
        let mut sums = [_mm256_setzero_ps(); N];
        for (x, words) in lines.from(at, N) {
            let x = _mm256_set1_ps(x);
            for (sum, &word) in sums.iter_mut().zip(words) {
                let codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts), low);
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, eight)), x, *sum);
            }
        }
        for ((sum, y), scales) in sums.into_iter().zip(y.as_chunks_mut::<8>().0).zip(scales.as_chunks::<8>().0) {
            let sum = _mm256_add_ps(load(y), _mm256_mul_ps(load(scales), sum));
            // SAFETY: `y` has eight numbers; the store needs no alignment.
            unsafe { _mm256_storeu_ps(y.as_mut_ptr(), sum) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;

    use super::Lines;
    use crate::backend::cpu::kernels::avx512::load;

    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    pub(super) fn add_to(lines: &Lines<'_>, scales: &[f32], y: &mut [f32]) {
        let (blocks, rest) = y.as_chunks_mut::<64>();
        let whole = blocks.len();
        for (i, y) in blocks.iter_mut().enumerate() {
            eight_words(lines, 8 * i, &scales[64 * i..], y);
        }
        super::narrow::add_to(lines, 8 * whole, &scales[64 * whole..], rest);
    }

    /// Eight words of every channel: codes are moved to the low bits of each lane, which look their values up.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    #[inline]
    fn eight_words(lines: &Lines<'_>, at: usize, scales: &[f32], y: &mut [f32; 64]) {
        let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        let values = _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.);
        let pairs: [__m512i; 4] = std::array::from_fn(|i| {
            let first = 2 * i as i32;
            _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, first + 1)
        });
        let mut sums = [_mm512_setzero_ps(); 4];
        for (x, words) in lines.from(at, 8) {
            // SAFETY: eight words are there; the load needs no alignment.
            let words = _mm512_castsi256_si512(unsafe { _mm256_loadu_si256(words.as_ptr().cast()) });
            let x = _mm512_set1_ps(x);
            for (sum, pair) in sums.iter_mut().zip(pairs) {
                let codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(pair, words), shifts);
                *sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(codes, values), x, *sum);
            }
        }
        for ((sum, y), scales) in sums.into_iter().zip(y.as_chunks_mut::<16>().0).zip(scales.as_chunks::<16>().0) {
            let sum = _mm512_add_ps(load(y), _mm512_mul_ps(load(scales), sum));
            // SAFETY: `y` has 16 numbers; the store needs no alignment.
            unsafe { _mm512_storeu_ps(y.as_mut_ptr(), sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::draws;

    /// Rows of a residual of random codes, added to ones, and what an exact sum of one row is.
    fn rows(path: Path, rows: usize, first: usize, selected: &[(usize, f32)]) -> (Vec<f32>, f64) {
        let (channels, stride) = (20, rows / 8 + first + 3);
        let words: Vec<u32> =
            draws(5, channels * stride).iter().map(|u| u.to_bits().wrapping_mul(0x9e37_79b1)).collect();
        let scales: Vec<f32> = draws(6, rows).iter().map(|u| u - 0.4).collect();
        let mut y = vec![1.0; rows];
        Lines { words: &words, stride, first, selected }.add_to(path, &scales, &mut y);
        let row = rows - 3;
        let code = |k: usize| f64::from(words[k * stride + first + row / 8] >> (4 * (row % 8)) & 15) - 8.0;
        let sum: f64 = selected.iter().map(|&(k, x)| code(k) * f64::from(x)).sum();
        (y, 1.0 + f64::from(scales[row]) * sum)
    }

    #[test]
    fn every_path_adds_the_same_bits() {
        let selected: Vec<_> = draws(7, 9).iter().enumerate().map(|(i, u)| (2 * i + 1, 3.0 * u - 1.0)).collect();
        for (n, first) in [(8, 0), (24, 1), (32, 0), (64, 2), (72, 5), (184, 0), (576, 3)] {
            let (scalar, exact) = rows(Path::SCALAR, n, first, &selected);
            assert!((f64::from(scalar[n - 3]) - exact).abs() < 1e-4, "{n} rows: {}, {exact}", scalar[n - 3]);
            for path in Path::all() {
                let (made, _) = rows(path, n, first, &selected);
                assert!(made.iter().zip(&scalar).all(|(a, b)| a.to_bits() == b.to_bits()), "{path}, {n} rows");
            }
            // Negative control: a channel less.
            assert!(rows(Path::SCALAR, n, first, &selected[1..]).0 != scalar, "{n} rows");
        }
    }
}
