//! Rotary position embedding: the one table of angles that every device and quantization rotate by.

use rayon::prelude::*;

use super::ModelConfig;

impl ModelConfig {
    /// The inverse frequencies of RoPE, `[head_dim / 2]`, scaling applied.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let frequency = |i: usize| self.rope_theta.powf(-((2 * i) as f64) / self.head_dim as f64);
        (0..self.head_dim / 2).map(|i| self.rope_scaling.apply(frequency(i))).collect()
    }

    /// Cosine and sine of each position's angles, `[positions, head_dim / 2]` pairs.
    ///
    /// Angles are products in f64, and only their cosines and sines are rounded: at the end of a context of 131072
    /// tokens an angle of f32 is off by up to 4 mrad, a frequency of f32 by as much again.
    pub fn rope_table(&self, positions: usize) -> Vec<[f32; 2]> {
        let frequencies = self.rope_frequencies();
        let mut table = vec![[0.0; 2]; positions * frequencies.len()];
        table.par_chunks_exact_mut(frequencies.len().max(1)).enumerate().for_each(|(position, row)| {
            for (pair, frequency) in row.iter_mut().zip(&frequencies) {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                *pair = [cos as f32, sin as f32];
            }
        });
        table
    }
}

#[cfg(test)]
mod tests {
    use super::super::RopeScaling;
    use super::*;

    /// The last position of the longest contexts.
    const FAR: usize = 131_071;

    fn config(rope_theta: f64, head_dim: usize, rope_scaling: RopeScaling) -> ModelConfig {
        let preset = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
        ModelConfig { rope_theta, head_dim, rope_scaling, ..preset }
    }

    /// A pair of channels, and the cosine and sine that it is rotated by.
    type Rotation = (usize, f64, f64);

    /// Known answers at position [`FAR`], from decimal arithmetic with 80 digits. Of Llama 3.1's frequencies, the second
    /// and the 29th are kept, the 32nd lies on the ramp, the 36th and the last are divided.
    fn known() -> Vec<(ModelConfig, Vec<Rotation>)> {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        vec![
            (
                config(10_000.0, 128, RopeScaling::None),
                vec![
                    (0, -0.817983499388, -0.575241683755),
                    (1, -0.978270912936, -0.207330704196),
                    (17, -0.957302329414, 0.289088654392),
                    (63, -0.840754892839, 0.541415930840),
                ],
            ),
            (
                config(500_000.0, 64, RopeScaling::None),
                vec![(1, 0.736023631155, 0.676955843746), (31, 0.922985249888, 0.384835326457)],
            ),
            (
                config(10_000.0, 128, RopeScaling::Linear { factor: 4.0 }),
                vec![(1, 0.669240942752, 0.743045463309), (40, -0.998656930918, 0.051810561958)],
            ),
            (
                config(500_000.0, 128, llama3),
                vec![
                    (1, -0.817316150024, 0.576189474835),
                    (28, 0.998943216204, -0.045961405546),
                    (31, 0.695219509708, -0.718797491176),
                    (35, 0.999161767439, -0.040936078073),
                    (63, 0.999191095035, 0.040213873252),
                ],
            ),
        ]
    }

    #[test]
    fn angles_are_exact_at_the_end_of_the_longest_context() {
        for (config, pairs) in known() {
            let half = config.head_dim / 2;
            let table = config.rope_table(FAR + 1);
            let row = &table[FAR * half..];
            assert_eq!(row.len(), half);
            assert_eq!(table[..half], vec![[1.0, 0.0]; half], "position 0");
            let mut of_f32 = 0f64;
            for (i, cos, sin) in pairs {
                // Half a unit in the last place of a number up to 1, and what f64 loses of an angle of 131071.
                let off = (f64::from(row[i][0]) - cos).abs().max((f64::from(row[i][1]) - sin).abs());
                assert!(
                    off < 2f64.powi(-25) + 1e-9,
                    "{:?}, pair {i}: {:?} is off by {off}",
                    config.rope_scaling,
                    row[i]
                );
                let angle = FAR as f32 * config.rope_frequencies()[i] as f32;
                of_f32 = of_f32.max((f64::from(angle).sin() - sin).abs().max((f64::from(angle).cos() - cos).abs()));
            }
            assert!(of_f32 > 1e-4, "{:?}: f32 would do, which is off by {of_f32}", config.rope_scaling);
        }
    }
}
