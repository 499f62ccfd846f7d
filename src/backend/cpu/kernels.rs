//! The inner loops: AVX2 where the processor has it, otherwise loops that the compiler vectorizes.
//!
//! All sums are f32. A sum's order depends on the instruction set, never on the number of threads.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Instructions that the loops may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the target guarantees.
    Portable,
}

impl Isa {
    /// The best that this processor has.
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Self::Avx2;
        }
        Self::Portable
    }

    /// For device listings.
    pub(super) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// Independent partial sums of the portable loops: enough to fill a vector unit's pipeline.
const LANES: usize = 16;

/// `Σ a·b`; `b` is at least as long as `a`.
pub(super) fn dot(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx2` exists only where the processor has the features.
        Isa::Avx2 => unsafe { avx2::dot(a, b) },
        Isa::Portable => {
            let mut sums = [0.0; LANES];
            let (whole, rest) = a.split_at(a.len() / LANES * LANES);
            for (a, b) in whole.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
                for i in 0..LANES {
                    sums[i] += a[i] * b[i];
                }
            }
            let rest: f32 = rest.iter().zip(&b[whole.len()..]).map(|(a, b)| a * b).sum();
            sums.iter().sum::<f32>() + rest
        }
    }
}

/// `Σ a·b`; `b` is at least as long as `a`.
pub(super) fn dot_f16(isa: Isa, a: &[f16], b: &[f32]) -> f32 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx2` exists only where the processor has the features.
        Isa::Avx2 => unsafe { avx2::dot_f16(a, b) },
        Isa::Portable => {
            let mut values = vec![0.0; a.len()];
            a.convert_to_f32_slice(&mut values);
            dot(isa, &values, b)
        }
    }
}

/// `y += factor · x`, equally long.
pub(super) fn add_scaled(isa: Isa, factor: f32, x: &[f32], y: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx2` exists only where the processor has the features.
        Isa::Avx2 => unsafe { avx2::add_scaled(factor, x, y) },
        Isa::Portable => y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x),
    }
}

/// `sums[8·c + i] += x · (nibble i of words[c] − 8)`; `sums` is eight times as long as `words`.
pub(super) fn add_residual(isa: Isa, words: &[u32], x: f32, sums: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx2` exists only where the processor has the features.
        Isa::Avx2 => unsafe { avx2::add_residual(words, x, sums) },
        Isa::Portable => {
            for (&word, sums) in words.iter().zip(sums.chunks_exact_mut(8)) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum += x * ((word >> (4 * i) & 15) as i32 - 8) as f32;
                }
            }
        }
    }
}

/// One row of 4-bit codes and the codebooks that its groups look up; see [`super::codes`] for the layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct CodeRow<'a> {
    /// `[in_features / 64, rounded up][8]`
    pub(super) words: &'a [u32],
    /// `[groups, 16]` for AnyPrec (one group); `[groups, 1 + bits]`, bias first, for LUT-GEMM.
    pub(super) tables: &'a [f32],
    /// Channels of a group: a multiple of 32.
    pub(super) group_size: usize,
    /// 2 to 4.
    pub(super) bits: usize,
    /// How `tables` is read.
    pub(super) binary: bool,
}

impl CodeRow<'_> {
    /// The 16 values of group `g` (those beyond `2^bits` are repetitions).
    pub(super) fn codebook(&self, g: usize) -> [f32; 16] {
        if !self.binary {
            return std::array::from_fn(|code| self.tables[g * 16 + code]);
        }
        let steps = &self.tables[g * (1 + self.bits)..][..1 + self.bits];
        std::array::from_fn(|code| {
            let signed = |(b, &alpha): (usize, &f32)| if code >> b & 1 == 1 { alpha } else { -alpha };
            steps[1..].iter().enumerate().map(signed).fold(steps[0], |sum, alpha| sum + alpha)
        })
    }

    /// The code of channel `k`.
    pub(super) fn code(&self, k: usize) -> usize {
        (self.words[k / 64 * 8 + k % 8] >> (4 * (k % 64 / 8)) & 15) as usize
    }

    /// Dequantizes the row.
    pub(super) fn dequantize(&self, out: &mut [f32]) {
        for (g, out) in out.chunks_mut(self.group_size).enumerate() {
            let codebook = self.codebook(g);
            for (i, value) in out.iter_mut().enumerate() {
                *value = codebook[self.code(g * self.group_size + i)];
            }
        }
    }

    /// `Σ w·x`; `x` has one number per channel.
    pub(super) fn dot(&self, isa: Isa, x: &[f32]) -> f32 {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::Avx2` exists only where the processor has the features.
            Isa::Avx2 => unsafe {
                if self.bits == 4 { avx2::dot_codes::<true>(self, x) } else { avx2::dot_codes::<false>(self, x) }
            },
            Isa::Portable => {
                let mut sums = [0.0; 8];
                for (g, x) in x.chunks(self.group_size).enumerate() {
                    let codebook = self.codebook(g);
                    for (j, x) in x.chunks_exact(8).enumerate() {
                        let k = g * self.group_size + 8 * j;
                        for i in 0..8 {
                            sums[i] += codebook[self.code(k + i)] * x[i];
                        }
                    }
                }
                sums.iter().sum()
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::CodeRow;

    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum4(v: [__m256; 4]) -> f32 {
        sum(_mm256_add_ps(_mm256_add_ps(v[0], v[1]), _mm256_add_ps(v[2], v[3])))
    }

    /// Eight numbers of a slice.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load(values: &[f32]) -> __m256 {
        let values: &[f32; 8] = values.first_chunk().expect("a multiple of eight");
        // SAFETY: eight numbers are there; the load needs no alignment.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 4];
        let whole = a.len() / 32 * 32;
        for (a, b) in a.chunks_exact(32).zip(b.chunks_exact(32)) {
            for i in 0..4 {
                sums[i] = _mm256_fmadd_ps(load(&a[8 * i..]), load(&b[8 * i..]), sums[i]);
            }
        }
        let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
        sum4(sums) + rest
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_f16(a: &[f16], b: &[f32]) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 4];
        let whole = a.len() / 32 * 32;
        for (a, b) in a.chunks_exact(32).zip(b.chunks_exact(32)) {
            for i in 0..4 {
                // SAFETY: `a` has 32 numbers, eight from 8·i ≤ 24 on are read; no alignment is needed.
                let a = unsafe { _mm_loadu_si128(a.as_ptr().add(8 * i).cast()) };
                sums[i] = _mm256_fmadd_ps(_mm256_cvtph_ps(a), load(&b[8 * i..]), sums[i]);
            }
        }
        let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a.to_f32() * b).sum();
        sum4(sums) + rest
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn add_scaled(factor: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor.mul_add(*x, *y);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn add_residual(words: &[u32], x: f32, sums: &mut [f32]) {
        let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        let (low, eight, x) = (_mm256_set1_epi32(15), _mm256_set1_epi32(8), _mm256_set1_ps(x));
        for (&word, sums) in words.iter().zip(sums.chunks_exact_mut(8)) {
            let codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts), low);
            let values = _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, eight));
            let sum = _mm256_fmadd_ps(values, x, load(sums));
            // SAFETY: `sums` has eight numbers; the store needs no alignment.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), sum) };
        }
    }

    /// A codebook in registers: codes 0 to 7 and, for 4 bits, 8 to 15.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn codebook<const FOUR: bool>(row: &CodeRow<'_>, g: usize) -> [__m256; 2] {
        if !row.binary {
            let table = &row.tables[g * 16..][..16];
            return [load(table), load(&table[8..])];
        }
        let steps = &row.tables[g * (1 + row.bits)..][..1 + row.bits];
        let zero = _mm256_setzero_si256();
        let mut low = _mm256_set1_ps(steps[0]);
        for (b, &alpha) in steps[1..].iter().take(3).enumerate() {
            // Flips the sign of alpha in the lanes whose number lacks bit b.
            let bit = _mm256_and_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(1 << b));
            let negative = _mm256_and_si256(_mm256_cmpeq_epi32(bit, zero), _mm256_set1_epi32(i32::MIN));
            low = _mm256_add_ps(low, _mm256_xor_ps(_mm256_set1_ps(alpha), _mm256_castsi256_ps(negative)));
        }
        if !FOUR {
            return [low, low];
        }
        let alpha = _mm256_set1_ps(steps[4]);
        [_mm256_sub_ps(low, alpha), _mm256_add_ps(low, alpha)]
    }

    /// Eight channels a step: the low bits of eight lanes are codes, the next ones four bits further up.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_codes<const FOUR: bool>(row: &CodeRow<'_>, x: &[f32]) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut table = codebook::<FOUR>(row, 0);
        let mut until_next = row.group_size;
        let mut group = 0;
        for (words, x) in row.words.chunks_exact(8).zip(x.chunks(64)) {
            // SAFETY: `words` has eight words; the load needs no alignment.
            let mut codes = unsafe { _mm256_loadu_si256(words.as_ptr().cast()) };
            for x in x.chunks_exact(32) {
                if until_next == 0 {
                    group += 1;
                    table = codebook::<FOUR>(row, group);
                    until_next = row.group_size;
                }
                until_next -= 32;
                for i in 0..4 {
                    let low = _mm256_permutevar8x32_ps(table[0], codes);
                    let weights = if FOUR {
                        let high = _mm256_permutevar8x32_ps(table[1], codes);
                        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
                    } else {
                        low
                    };
                    sums[i] = _mm256_fmadd_ps(weights, load(&x[8 * i..]), sums[i]);
                    codes = _mm256_srli_epi32::<4>(codes);
                }
            }
        }
        sum4(sums)
    }
}
