//! What the CUDA tests share: the device if it is under test, and noise.

use decdec::backend::cuda::{Cuda, Dtype, Options};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Options of one type and `--compile`.
pub(crate) fn options(dtype: Dtype, compile: u8) -> Options {
    Options { dtype, compile, ..Options::default() }
}

/// The first CUDA device, if `DECDEC_TEST_DEVICES` names `cuda`.
pub(crate) fn cuda(options: Options) -> Option<Cuda> {
    let devices = std::env::var("DECDEC_TEST_DEVICES").unwrap_or_default();
    if !devices.split(',').any(|d| d.trim() == "cuda") {
        eprintln!("skipped: cuda not in DECDEC_TEST_DEVICES");
        return None;
    }
    Some(Cuda::new(0, options).unwrap_or_else(|e| panic!("cuda is under test, but: {e:#}")))
}

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

    /// Activations that are easy to select wrongly: ties, values on edges, zeros, infinities, NaN.
    pub(crate) fn awkward(&mut self, len: usize, kind: usize, thresholds: &[f32]) -> Vec<f32> {
        let mut x = self.activations(len);
        match kind {
            1 => x.iter_mut().for_each(|v| *v = v.round()),
            2 => x.fill(-1.5),
            3 => x.iter_mut().for_each(|v| *v = thresholds[(v.abs() * 100.0) as usize % len] * v.signum()),
            4 => {
                for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, f32::MIN_POSITIVE / 4.0] {
                    for _ in 0..len / 30 {
                        x[self.0.next_u32() as usize % len] = special;
                    }
                }
            }
            5 => x.iter_mut().for_each(|v| *v = if v.abs() > 2.0 { *v } else { 0.0 }),
            _ => {}
        }
        x
    }
}
