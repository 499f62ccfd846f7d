//! The inner loops in f32: vector instructions where the processor has them, otherwise loops that say the same.
//!
//! A sum has 32 lanes, channel `k` in lane `k % 32`, each a chain of fused multiply-adds; then lanes are added in pairs.
//! So all paths make the same bits, whatever the number of threads.

use crate::config::Activation;
use crate::dec::DecPlan;
use crate::processor::{Kind, Path, on_every_path};
use crate::quantize::exponential::exp;

/// Partial sums.
pub(super) const LANES: usize = 32;

/// What is left behind the last whole vectors.
#[inline(always)]
pub(super) fn rest(a: &[f32], b: &[f32]) -> f32 {
    let rest = a.as_chunks::<LANES>().1;
    rest.iter().zip(&b[a.len() - rest.len()..]).map(|(a, b)| a * b).sum()
}

/// `Σ a·b`, as every path sums it up.
#[inline(always)]
fn dot_in_lanes(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    let eight: [f32; 8] = std::array::from_fn(|i| (sums[i] + sums[8 + i]) + (sums[16 + i] + sums[24 + i]));
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[4 + i]);
    ((four[0] + four[2]) + (four[1] + four[3])) + rest(a, b)
}

/// `Σ a·b`; `b` is at least as long as `a`.
pub(super) fn dot(path: Path, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = [0.0];
    dots(path, a, a.len(), &b[..a.len()], &mut sum);
    sum[0]
}

/// `y[i] = Σ w[i]·x` for rows `w[i]` as long as `x`, `stride` from one to the next.
pub(super) fn dots(path: Path, w: &[f32], stride: usize, x: &[f32], y: &mut [f32]) {
    match path.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a path exists only where the processor has its instructions.
        Kind::Avx512 => unsafe { avx512::dots(w, stride, x, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Kind::AvxVnni | Kind::Avx2 => unsafe { avx2::dots(w, stride, x, y) },
        Kind::Scalar => {
            y.iter_mut().zip(w.chunks(stride)).for_each(|(y, w)| *y = dot_in_lanes(&w[..x.len()], x));
        }
    }
}

on_every_path! {
    /// `out += Σ shares[i]·rows[i]` for rows as long as `out`, `stride` from one to the next, one after the other.
    pub(super) fn add_weighted(shares: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
        let n = out.len();
        let whole = n / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            let out: &mut [f32; LANES] = (&mut out[at..at + LANES]).try_into().expect("as many as there are lanes");
            let mut sums = *out;
            for (share, row) in shares.iter().zip(rows.chunks(stride)) {
                let row: &[f32; LANES] = row[at..at + LANES].try_into().expect("as many as there are lanes");
                for i in 0..LANES {
                    sums[i] = share.mul_add(row[i], sums[i]);
                }
            }
            *out = sums;
        }
        for (share, row) in shares.iter().zip(rows.chunks(stride)) {
            out[whole..].iter_mut().zip(&row[whole..n]).for_each(|(out, x)| *out = share.mul_add(*x, *out));
        }
    }
}

on_every_path! {
    /// Scores to shares.
    pub(super) fn softmax(scores: &mut [f32]) {
        let mut largest = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = scores.as_chunks::<LANES>();
        for chunk in chunks {
            largest.iter_mut().zip(chunk).for_each(|(most, &x)| *most = if x > *most { x } else { *most });
        }
        let largest = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &x| most.max(x));
        let mut sums = [0f32; LANES];
        let (chunks, rest) = scores.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (x, sum) in chunk.iter_mut().zip(&mut sums) {
                *x = exp(*x - largest);
                *sum += *x;
            }
        }
        rest.iter_mut().for_each(|x| *x = exp(*x - largest));
        let share = 1.0 / (sums.iter().sum::<f32>() + rest.iter().sum::<f32>());
        scores.iter_mut().for_each(|x| *x *= share);
    }
}

on_every_path! {
    /// `out = activation(gate) ⊙ up`, as long as each other.
    pub(super) fn gated(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp(-activation.exponent(gate))) * up;
        }
    }
}

on_every_path! {
    /// `x = x / √(mean(x²) + ε) · γ`
    pub(super) fn rms_norm(gamma: &[f32], eps: f32, x: &mut [f32]) {
        let scale = 1.0 / (dot_in_lanes(x, x) / x.len() as f32 + eps).sqrt();
        x.iter_mut().zip(gamma).for_each(|(x, gamma)| *x = *x * scale * gamma);
    }
}

on_every_path! {
    /// `y += x`, equally long.
    pub(super) fn add(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }
}

on_every_path! {
    /// The channels that are compensated.
    pub(super) fn select(plan: &DecPlan, x: &[f32], out: &mut Vec<u32>) {
        plan.select(x, out);
    }
}

/// `out[k] = table[codes[k]]`, equally long; codes are below 16.
pub(super) fn look_up(path: Path, table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    match path.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a path exists only where the processor has its instructions.
        Kind::Avx512 => unsafe { avx512::look_up(table, codes, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Kind::AvxVnni | Kind::Avx2 => unsafe { avx2::look_up(table, codes, out) },
        Kind::Scalar => out.iter_mut().zip(codes).for_each(|(out, &code)| *out = table[usize::from(code & 15)]),
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use std::arch::x86_64::*;

    use super::{LANES, rest};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn sum(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) fn sum4(v: [__m256; 4]) -> f32 {
        sum(_mm256_add_ps(_mm256_add_ps(v[0], v[1]), _mm256_add_ps(v[2], v[3])))
    }

    /// Eight numbers of a slice.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(in super::super) fn load(values: &[f32]) -> __m256 {
        let values: &[f32; 8] = values.first_chunk().expect("a multiple of eight");
        // SAFETY: eight numbers are there; the load needs no alignment.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dots(w: &[f32], stride: usize, x: &[f32], y: &mut [f32]) {
        for (y, w) in y.iter_mut().zip(w.chunks(stride)) {
            let mut sums = [_mm256_setzero_ps(); 4];
            let w = &w[..x.len()];
            for (w, x) in w.as_chunks::<LANES>().0.iter().zip(x.as_chunks::<LANES>().0) {
                for i in 0..4 {
                    sums[i] = _mm256_fmadd_ps(load(&w[8 * i..]), load(&x[8 * i..]), sums[i]);
                }
            }
            *y = sum4(sums) + rest(w, x);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn look_up(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        let table = [load(table), load(&table[8..])];
        for (codes, out) in codes.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<8>().0) {
            // SAFETY: eight bytes are read and eight numbers written; no alignment is needed.
            unsafe {
                let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
                // Both look up three bits; the fourth, as a sign, chooses.
                let [low, high] = table.map(|half| _mm256_permutevar8x32_ps(half, codes));
                let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(low, high, fourth));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use std::arch::x86_64::*;

    use super::{LANES, rest};

    /// The sum of lanes 0 to 15 and 16 to 31.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    pub(in super::super) fn sum([a, b]: [__m512; 2]) -> f32 {
        let halves = |v: __m512| _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        super::avx2::sum(_mm256_add_ps(halves(a), halves(b)))
    }

    /// 16 numbers of a slice.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    #[inline]
    pub(in super::super) fn load(values: &[f32]) -> __m512 {
        let values: &[f32; 16] = values.first_chunk().expect("a multiple of sixteen");
        // SAFETY: 16 numbers are there; the load needs no alignment.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    pub(super) fn dots(w: &[f32], stride: usize, x: &[f32], y: &mut [f32]) {
        for (y, w) in y.iter_mut().zip(w.chunks(stride)) {
            let mut sums = [_mm512_setzero_ps(); 2];
            let w = &w[..x.len()];
            for (w, x) in w.as_chunks::<LANES>().0.iter().zip(x.as_chunks::<LANES>().0) {
                for i in 0..2 {
                    sums[i] = _mm512_fmadd_ps(load(&w[16 * i..]), load(&x[16 * i..]), sums[i]);
                }
            }
            *y = sum(sums) + rest(w, x);
        }
    }

    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    pub(super) fn look_up(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        let table = load(table);
        for (codes, out) in codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            // SAFETY: 16 bytes are read and 16 numbers written; no alignment is needed.
            unsafe {
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(codes, table));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::draws;

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        draws(seed, len).iter().map(|u| (u - 0.5) / (1.001 - u)).collect()
    }

    /// What every loop makes of `n` numbers.
    fn everything(path: Path, n: usize) -> Vec<u32> {
        let (a, b) = (numbers(1, n), numbers(2, n));
        let mut out = vec![dot(path, &a, &b)];
        let (rows, stride) = (numbers(3, 5 * (n + 3)), n + 3);
        let mut y = vec![0.0; 5];
        dots(path, &rows, stride, &a, &mut y);
        let mut sum = b.clone();
        add_weighted(path, &y, &rows, stride, &mut sum);
        softmax(path, &mut y);
        let mut made = vec![0.0; n];
        for activation in [Activation::Silu, Activation::GeluTanh] {
            gated(path, activation, &a, &b, &mut made);
            out.extend(&made);
        }
        rms_norm(path, &b, 1e-5, &mut made);
        add(path, &a, &mut sum);
        let codes: Vec<u8> = (0..n / 16 * 16).map(|i| (i * 7 % 16) as u8).collect();
        let mut looked = vec![0.0; codes.len()];
        look_up(path, rows[..16].first_chunk().unwrap(), &codes, &mut looked);
        out.into_iter().chain(y).chain(sum).chain(made).chain(looked).map(f32::to_bits).collect()
    }

    #[test]
    fn every_path_makes_the_same_bits() {
        for n in [32, 48, 64, 80, 96, 100, 576, 1031] {
            let scalar = everything(Path::SCALAR, n);
            Path::all().for_each(|path| assert!(everything(path, n) == scalar, "{path}, {n} numbers"));
            assert!(everything(Path::SCALAR, n + 1)[0] != scalar[0], "{n}: a number more goes unseen");
        }
    }

    #[test]
    fn loops_say_what_their_formulas_say() {
        let (path, n) = (Path::detect(), 100);
        let (a, b) = (numbers(1, n), numbers(2, n));
        let near = |got: f32, want: f64, size: f64| {
            assert!((f64::from(got) - want).abs() <= 2e-6 * size, "{got}, {want}");
        };
        let size: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(a * b).abs()).sum();
        near(dot(path, &a, &b), a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum(), size);
        let (mut shares, total) = (a.clone(), a.iter().map(|&a| f64::from(a).exp()).sum::<f64>());
        softmax(path, &mut shares);
        shares.iter().zip(&a).for_each(|(&share, &a)| near(share, f64::from(a).exp() / total, 1.0));
        let mut made = vec![0.0; n];
        gated(path, Activation::Silu, &a, &b, &mut made);
        for i in 0..n {
            let (gate, up) = (f64::from(a[i]), f64::from(b[i]));
            let want = gate / (1.0 + (-gate).exp()) * up;
            near(made[i], want, want.abs());
        }
        let mut normed = a.clone();
        rms_norm(path, &b, 1e-5, &mut normed);
        let scale = (a.iter().map(|&a| f64::from(a).powi(2)).sum::<f64>() / n as f64 + 1e-5).sqrt();
        (0..n).for_each(|i| near(normed[i], f64::from(a[i]) / scale * f64::from(b[i]), f64::from(b[i]).abs() * 10.0));
    }
}
