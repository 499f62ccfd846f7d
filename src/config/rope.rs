//! Rotary position embedding: the one table of angles that every device and quantization rotate by.

use std::f64::consts::TAU;

use rayon::prelude::*;

/// How queries and keys of some layers are rotated.
///
/// Channel `i` of a head always turns with channel `i + head_dim / 2`: where a family pairs others or turns a part of
/// a head only, the rows of q and k are put in that order when a model is read ([`Rope::order`]). Scores do not notice,
/// since queries and keys change alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Width of a head.
    pub head_dim: usize,
    /// Channels of a head that turn; even.
    pub rotary_dim: usize,
    /// Which channels turn together as the model is stored.
    pub pairing: Pairing,
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// Which channels of a stored head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// `i` with `i + rotary_dim / 2`.
    Halves,
    /// `2i` with `2i + 1`.
    Neighbours,
}

/// How the rotary frequencies are stretched for contexts longer than the model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama-3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` count as low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context of the first training, in tokens.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al. 2023): frequencies that turn fewer than `beta_slow` times in the original context are divided
    /// by `factor`, those that turn more than `beta_fast` times are kept, a ramp between.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// The context of the first training, in tokens.
        original_max_position_embeddings: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which a frequency is divided.
        beta_slow: f64,
        /// The ends of the ramp are rounded to whole pairs.
        truncate: bool,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
    },
    /// LongRoPE (Ding et al. 2024): each frequency has its own divisor, by whether the context is longer than the
    /// original one.
    LongRope {
        /// Divisors within the original context, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors beyond it, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// The context of the first training, in tokens.
        original_max_position_embeddings: usize,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
    },
}

impl Rope {
    /// The inverse frequencies, `[rotary_dim / 2]`, scaling applied; `context` is the longest that a text may become,
    /// which decides once for all of it where there are two sets of divisors.
    pub fn frequencies(&self, context: usize) -> Vec<f64> {
        let dim = self.rotary_dim as f64;
        let plain = (0..self.rotary_dim / 2).map(|i| self.theta.powf(-((2 * i) as f64) / dim));
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let between = [low_freq_factor, high_freq_factor].map(|turns| original_max_position_embeddings / turns);
                plain.map(|frequency| llama3(frequency, factor, between)).collect()
            }
            &RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
                // The pair that turns so often in the original context.
                let pair = |turns: f64| {
                    dim * (original_max_position_embeddings / (turns * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (low, high) = (pair(beta_fast), pair(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let divided = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain.enumerate().map(|(i, f)| f / factor * divided(i) + f * (1.0 - divided(i))).collect()
            }
            RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
                let long = context > *original_max_position_embeddings;
                plain.zip(if long { long_factor } else { short_factor }).map(|(f, divisor)| f / divisor).collect()
            }
        }
    }

    /// What cosines and sines are multiplied by.
    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// Cosine and sine of each position's angles, `[positions, head_dim / 2]` pairs; (1, 0) for channels that do not
    /// turn. The table is that of a text of at most `positions` tokens.
    ///
    /// Angles are products in f64, and only their cosines and sines are rounded: at the end of a context of 131072
    /// tokens an angle of f32 is off by up to 4 mrad, a frequency of f32 by as much again.
    pub fn table(&self, positions: usize) -> Vec<[f32; 2]> {
        let (frequencies, factor) = (self.frequencies(positions), self.attention_factor());
        let mut table = vec![[1.0, 0.0]; positions * self.head_dim / 2];
        table.par_chunks_exact_mut((self.head_dim / 2).max(1)).enumerate().for_each(|(position, row)| {
            for (pair, frequency) in row.iter_mut().zip(&frequencies) {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                *pair = [(factor * cos) as f32, (factor * sin) as f32];
            }
        });
        table
    }

    /// For each channel of a head as it is kept, the channel as it is stored; `None` where nothing moves.
    ///
    /// The first `head_dim / 2` are the first of each pair: those that turn, then those that do not.
    pub fn order(&self) -> Option<Vec<usize>> {
        if self.pairing == Pairing::Halves && self.rotary_dim == self.head_dim {
            return None;
        }
        let (turning, still) = (self.rotary_dim / 2, (self.head_dim - self.rotary_dim) / 2);
        let of = |second: usize, i: usize| match self.pairing {
            _ if i >= turning => self.rotary_dim + second * still + i - turning,
            Pairing::Halves => second * turning + i,
            Pairing::Neighbours => 2 * i + second,
        };
        Some((0..2).flat_map(|second| (0..turning + still).map(move |i| (second, i))).map(|(s, i)| of(s, i)).collect())
    }
}

/// Llama 3.1's frequency: divided where its wavelength is beyond the first of `between`, kept below the second.
fn llama3(frequency: f64, factor: f64, between: [f64; 2]) -> f64 {
    let (wavelength, [long, short]) = (TAU / frequency, between);
    if wavelength > long {
        frequency / factor
    } else if wavelength < short {
        frequency
    } else {
        // How far it turns in the original context, from the lower number of turns to the higher.
        let smooth = (1.0 / wavelength - 1.0 / long) / (1.0 / short - 1.0 / long);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last position of the longest contexts.
    const FAR: usize = 131_071;

    fn rope(theta: f64, head_dim: usize, scaling: RopeScaling) -> Rope {
        Rope { theta, head_dim, rotary_dim: head_dim, pairing: Pairing::Halves, scaling }
    }

    /// A pair of channels, and the cosine and sine that it is rotated by.
    type Rotation = (usize, f64, f64);

    /// Known answers at position [`FAR`], from decimal arithmetic with 80 digits. Of Llama 3.1's frequencies, the second
    /// and the 29th are kept, the 32nd lies on the ramp, the 36th and the last are divided; of YaRN's, those to the 24th
    /// are kept and those from the 41st divided. LongRoPE's divisors are 1, 1.5, 2 and so on.
    fn known() -> Vec<(Rope, Vec<Rotation>)> {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let yarn = |truncate, attention_factor| RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32_768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate,
            attention_factor,
        };
        let longrope = RopeScaling::LongRope {
            short_factor: vec![1.0; 48],
            long_factor: (0..48).map(|i| 1.0 + f64::from(i) / 2.0).collect(),
            original_max_position_embeddings: 4096,
            attention_factor: (1.0 + 32f64.ln() / 4096f64.ln()).sqrt(),
        };
        vec![
            (
                rope(10_000.0, 128, RopeScaling::None),
                vec![
                    (0, -0.817983499388, -0.575241683755),
                    (1, -0.978270912936, -0.207330704196),
                    (17, -0.957302329414, 0.289088654392),
                    (63, -0.840754892839, 0.541415930840),
                ],
            ),
            (
                rope(500_000.0, 64, RopeScaling::None),
                vec![(1, 0.736023631155, 0.676955843746), (31, 0.922985249888, 0.384835326457)],
            ),
            (
                rope(10_000.0, 128, RopeScaling::Linear { factor: 4.0 }),
                vec![(1, 0.669240942752, 0.743045463309), (40, -0.998656930918, 0.051810561958)],
            ),
            (
                rope(500_000.0, 128, llama3),
                vec![
                    (1, -0.817316150024, 0.576189474835),
                    (28, 0.998943216204, -0.045961405546),
                    (31, 0.695219509708, -0.718797491176),
                    (35, 0.999161767439, -0.040936078073),
                    (63, 0.999191095035, 0.040213873252),
                ],
            ),
            (
                rope(1_000_000.0, 128, yarn(true, 0.1 * 4f64.ln() + 1.0)),
                vec![
                    (1, -0.666746340214, 0.922998543115),
                    (20, 0.481311942033, 1.031899126483),
                    (24, 0.766744073413, 0.841772248691),
                    (30, 0.329971593539, 1.089768663634),
                    (39, -0.691838267823, 0.904343299835),
                    (45, -0.453186291671, 1.044556928952),
                    (63, 1.137688227672, 0.046287032719),
                ],
            ),
            (
                rope(1_000_000.0, 128, yarn(false, 1.0)),
                vec![
                    (1, -0.585569210727, 0.810622414845),
                    (20, 0.422711662608, 0.906264227637),
                    (24, 0.832135976102, 0.554571652068),
                    (30, -0.996381126395, -0.084997946820),
                    (39, -0.253637259640, 0.967299405832),
                    (45, -0.398010342345, 0.917380928179),
                ],
            ),
            (
                Rope { rotary_dim: 96, ..rope(10_000.0, 128, longrope) },
                vec![
                    (0, -0.973595102768, -0.684674552275),
                    (1, 1.131244443514, -0.370071176511),
                    (20, 0.741770981740, -0.930828919466),
                    (30, 0.852460598298, 0.830648899966),
                    (47, 0.948861991227, 0.718559383956),
                    (48, 1.0, 0.0),
                    (63, 1.0, 0.0),
                ],
            ),
            (
                Rope { rotary_dim: 64, pairing: Pairing::Neighbours, ..rope(10_000.0, 128, RopeScaling::None) },
                vec![
                    (0, -0.817983499388, -0.575241683755),
                    (1, 0.054617930938, 0.998507326773),
                    (17, -0.911178268044, 0.412012334579),
                    (31, 0.198511702907, -0.980098517400),
                    (32, 1.0, 0.0),
                    (63, 1.0, 0.0),
                ],
            ),
        ]
    }

    #[test]
    fn angles_are_exact_at_the_end_of_the_longest_context() {
        for (rope, pairs) in known() {
            let half = rope.head_dim / 2;
            let table = rope.table(FAR + 1);
            let row = &table[FAR * half..];
            assert_eq!(row.len(), half);
            let factor = rope.attention_factor();
            let turning = rope.rotary_dim / 2;
            assert_eq!(table[..turning], vec![[factor as f32, 0.0]; turning], "position 0");
            assert_eq!(table[turning..half], vec![[1.0, 0.0]; half - turning], "position 0");
            let mut of_f32 = 0f64;
            for (i, cos, sin) in pairs {
                // Half a unit in the last place of a number up to the factor, and what f64 loses of an angle of 131071.
                let off = (f64::from(row[i][0]) - cos).abs().max((f64::from(row[i][1]) - sin).abs());
                let unit = if factor > 1.0 { 2f64.powi(-24) } else { 2f64.powi(-25) };
                assert!(off < unit + 1e-9, "{:?}, pair {i}: {:?} is off by {off}", rope.scaling, row[i]);
                let Some(&frequency) = rope.frequencies(FAR + 1).get(i) else { continue };
                let angle = FAR as f32 * frequency as f32;
                let (wrong_sin, wrong_cos) = (factor * f64::from(angle).sin(), factor * f64::from(angle).cos());
                of_f32 = of_f32.max((wrong_sin - sin).abs().max((wrong_cos - cos).abs()));
            }
            assert!(of_f32 > 1e-4, "{:?}: f32 would do, which is off by {of_f32}", rope.scaling);
        }
    }

    /// Whether a text may become longer than the original context is asked once, of the whole table.
    #[test]
    fn long_divisors_are_those_of_long_texts() {
        let scaling = RopeScaling::LongRope {
            short_factor: vec![1.0, 2.0],
            long_factor: vec![4.0, 8.0],
            original_max_position_embeddings: 24,
            attention_factor: 1.25,
        };
        let rope = rope(16.0, 4, scaling);
        let sines = |frequencies: [f64; 2]| frequencies.map(|frequency| (1.25 * (3.0 * frequency).sin()) as f32);
        let third = |positions| [0, 1].map(|i| rope.table(positions)[3 * 2 + i][1]);
        assert_eq!(third(24), sines([1.0, 0.25 / 2.0]));
        assert_eq!(third(25), sines([0.25, 0.25 / 8.0]));
        assert_eq!(third(4), third(24));
    }

    /// Channels that turn come first in each half, then those that do not; both halves together have every channel.
    #[test]
    fn channels_that_turn_together_are_half_a_head_apart() {
        let order = |head_dim, rotary_dim, pairing| {
            Rope { head_dim, rotary_dim, pairing, theta: 10.0, scaling: RopeScaling::None }.order()
        };
        assert_eq!(order(8, 8, Pairing::Halves), None);
        assert_eq!(order(8, 4, Pairing::Halves), Some(vec![0, 1, 4, 5, 2, 3, 6, 7]));
        assert_eq!(order(8, 4, Pairing::Neighbours), Some(vec![0, 2, 4, 5, 1, 3, 6, 7]));
        assert_eq!(order(8, 8, Pairing::Neighbours), Some(vec![0, 2, 4, 6, 1, 3, 5, 7]));
        assert_eq!(order(8, 6, Pairing::Halves), Some(vec![0, 1, 2, 6, 3, 4, 5, 7]));
    }
}
