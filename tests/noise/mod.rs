//! Random numbers for tests, the same every time, and activations that are easy to select wrongly.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Random numbers, the same every time.
pub(crate) struct Noise(ChaCha8Rng);

#[allow(dead_code, reason = "not every test file needs every kind")]
impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// 0 to `end - 1`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end as u64) as usize
    }

    /// Uniform in `[0, 1)`.
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1u32 << 24) as f32
    }

    /// Normal, mean 0 and deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        let r = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        r * (2.0 * std::f32::consts::PI * self.uniform()).cos()
    }

    /// Normal, with a few channels far out, as in real models.
    pub(crate) fn activations(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal() * if self.0.next_u32().is_multiple_of(50) { 10.0 } else { 1.0 }).collect()
    }

    /// Non-increasing.
    pub(crate) fn thresholds(&mut self, len: usize) -> Vec<f32> {
        let mut values: Vec<f32> = self.activations(len).iter().map(|v| v.abs()).collect();
        values.sort_unstable_by(|a, b| b.total_cmp(a));
        values
    }

    /// Activations that are easy to select wrongly, `kind` below [`Self::KINDS`]: heavy-tailed; ties; all the same;
    /// on thresholds and beside them; infinities and NaN among numbers; mostly zeros; subnormal numbers; all zeros of
    /// both signs; of very different sizes; NaN of many payloads.
    pub(crate) fn awkward(&mut self, len: usize, kind: usize, thresholds: &[f32]) -> Vec<f32> {
        let mut x = self.activations(len);
        match kind {
            1 => x.iter_mut().for_each(|v| *v = v.round()),
            2 => x.fill(-1.5),
            3 => x.iter_mut().for_each(|v| {
                let at = thresholds[(v.abs() * 100.0) as usize % len];
                *v = [at, at.next_up(), at.next_down()][(v.abs() * 1000.0) as usize % 3] * v.signum();
            }),
            4 => {
                for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, f32::MIN_POSITIVE / 4.0] {
                    for _ in 0..len / 30 {
                        x[self.below(len)] = special;
                    }
                }
            }
            5 => x.iter_mut().for_each(|v| *v = if v.abs() > 2.0 { *v } else { 0.0 }),
            6 => x.iter_mut().for_each(|v| *v = f32::from_bits((self.0.next_u32() & 0x8000_ffff) | v.to_bits() >> 31)),
            7 => x.iter_mut().for_each(|v| *v = if *v < 0.0 { -0.0 } else { 0.0 }),
            8 => x.iter_mut().for_each(|v| *v *= 2f32.powi(self.below(24) as i32 - 16)),
            9 => x.iter_mut().for_each(|v| *v = f32::from_bits(0x7f80_0001 | v.to_bits() & 0x803f_ffff)),
            _ => {}
        }
        x
    }

    /// Kinds of [`Self::awkward`] activations.
    pub(crate) const KINDS: usize = 10;
}
