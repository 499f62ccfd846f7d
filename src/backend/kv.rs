//! How the numbers of keys and values are kept.

/// How a text's keys and values are kept in its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvBits {
    /// In the type of products: 16 bits on a GPU, f32 elsewhere.
    #[default]
    Whole,
    /// In 8 bits, with an f32 step for each head of each token: its largest number over 127.
    Eight,
}

/// A head's numbers in bytes: `step · bytes[i]`, −127 to 127 each, rounded to the nearest.
pub(crate) struct InBytes {
    step: f32,
    inverse: f32,
}

impl InBytes {
    /// The step for these numbers. One that is no number makes it infinite, and what it is kept as NaN.
    pub(crate) fn of(numbers: &[f32]) -> Self {
        let size = |x: &f32| if x.abs() < f32::INFINITY { x.abs() } else { f32::INFINITY };
        let most = numbers.iter().map(size).fold(0.0, f32::max);
        Self { step: most / 127.0, inverse: if most > 0.0 { 127.0 / most } else { 0.0 } }
    }

    /// What a byte is a multiple of.
    pub(crate) fn step(&self) -> f32 {
        self.step
    }

    /// A number's byte.
    pub(crate) fn byte(&self, number: f32) -> i8 {
        (number * self.inverse).round_ties_even().clamp(-127.0, 127.0) as i8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers as their bytes say them.
    fn round(numbers: &mut [f32]) {
        let bytes = InBytes::of(numbers);
        numbers.iter_mut().for_each(|x| *x = bytes.step() * f32::from(bytes.byte(*x)));
    }

    /// The largest number is kept as it is, but for the rounding of its step, every other one within half a step, zeros as
    /// zeros, and NaN is not lost.
    #[test]
    fn bytes_are_within_half_a_step() {
        for most in [1e-30f32, 0.03, 1.0, 700.0, 1e30] {
            let numbers: Vec<f32> = (0..255).map(|i| most * (i as f32 - 127.0) / 127.3).chain([-most]).collect();
            let mut rounded = numbers.clone();
            round(&mut rounded);
            let step = f64::from(most) / 127.0;
            let errors = || numbers.iter().zip(&rounded).map(|(&x, &r)| (f64::from(x) - f64::from(r)).abs() / step);
            assert!(errors().all(|error| error <= 0.5 + 1e-4), "{most}");
            assert!(errors().any(|error| error > 0.25), "{most}: a coarser step is not seen");
            assert!((rounded[255] + most).abs() <= most * 2f32.powi(-22), "{most}: {}", rounded[255]);
        }
        let mut zeros = [0.0f32; 8];
        round(&mut zeros);
        assert_eq!(zeros, [0.0; 8]);
        let mut bad = [1.0, f32::NAN, 0.5];
        round(&mut bad);
        assert!(bad.iter().all(|x| x.is_nan()), "{bad:?}");
    }
}
