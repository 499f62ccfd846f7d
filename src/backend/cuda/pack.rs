//! From the stored formats to what the kernels read: tiles of 16 rows, units of channels, 16 bytes per lane.
//!
//! The layouts are described where they are read, at the top of `kernels-cuda/gemv_*.cu`. Pure; the bytes of
//! weights stay the same but for padding to whole tiles and units.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::cuda::Dtype;
use crate::format::{AnyPrec, Dense, Floats, LutGemm};

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Channels of a unit of codes.
pub(super) const CODE_UNIT: usize = 256;

/// Channels of a unit of 16-bit numbers.
pub(super) const DENSE_UNIT: usize = 64;

/// Which nibble of a word holds channel 0 to 3 of rows g (first four) and g + 8 (last four).
type Nibbles = [u32; 8];

/// Nibbles in the order in which byte permutations take them.
const LOOK_UP: Nibbles = [0, 1, 2, 3, 4, 5, 6, 7];

/// Pairs of channels 16 bits apart, so that two of them become integers together.
const INTEGERS: Nibbles = [0, 4, 1, 5, 2, 6, 3, 7];

/// A packed matrix: codes, and what a unit needs besides them.
pub(super) struct Packed {
    pub(super) codes: Vec<u32>,
    pub(super) aux: Vec<u8>,
}

/// Words of a unit of codes.
fn unit_words(bits: usize) -> usize {
    if bits == 3 { 384 } else { 512 }
}

/// Packs codes row by row: `codes(row, out)` writes `in_features` of them.
fn pack_codes(
    in_features: usize,
    out_features: usize,
    bits: usize,
    nibbles: Nibbles,
    codes: impl Fn(usize, &mut [u8]) + Sync,
) -> Vec<u32> {
    let units = in_features.div_ceil(CODE_UNIT);
    let tiles = out_features.div_ceil(TILE);
    let words = unit_words(bits);
    let mut packed = vec![0u32; tiles * units * words];
    packed.par_chunks_exact_mut(units * words).enumerate().for_each(|(tile, packed)| {
        let width = units * CODE_UNIT;
        let mut rows = vec![0u8; TILE * width];
        for (r, row) in rows.chunks_exact_mut(width).enumerate() {
            if tile * TILE + r < out_features {
                codes(tile * TILE + r, &mut row[..in_features]);
            }
        }
        for (u, packed) in packed.chunks_exact_mut(words).enumerate() {
            for product in 0..16 {
                for lane in 0..32 {
                    let k = u * CODE_UNIT + product / 2 * 32 + lane % 4 * 8 + product % 2 * 4;
                    let mut word = 0;
                    for (e, &nibble) in nibbles.iter().enumerate() {
                        let code = rows[(lane / 4 + e / 4 * 8) * width + k + e % 4];
                        word |= u32::from(code) << (4 * nibble);
                    }
                    place(packed, bits, product, lane, word);
                }
            }
        }
    });
    packed
}

/// Puts the eight codes of a lane and product in their place; of every fourth 3-bit word, into spare bits.
fn place(packed: &mut [u32], bits: usize, product: usize, lane: usize, word: u32) {
    let at = |vector: usize, component: usize| (vector * 32 + lane) * 4 + component;
    let (group, member) = (product / 4, product % 4);
    if bits != 3 {
        packed[at(group, member)] = word;
    } else if member < 3 {
        packed[at(member, group)] |= word;
    } else {
        for bit in 0..3 {
            packed[at(bit, group)] |= (word >> bit & 0x1111_1111) << 3;
        }
    }
}

/// One 16-bit number.
fn narrow(value: f32, dtype: Dtype) -> u16 {
    match dtype {
        Dtype::Bfloat16 => bf16::from_f32(value).to_bits(),
        Dtype::Float16 | Dtype::Float32 => f16::from_f32(value).to_bits(),
    }
}

/// AnyPrec of 3 or 4 bits; codebooks as bytes, low ones before high ones.
pub(super) fn anyprec(w: &AnyPrec<'_>, dtype: Dtype) -> Packed {
    let (bits, rows) = (w.bits(), w.out_features());
    let codes = pack_codes(w.in_features(), rows, bits, LOOK_UP, |row, out| w.codes(row, out));
    let size = 1usize << bits;
    let mut aux = vec![0u8; rows.div_ceil(TILE) * TILE * 2 * size];
    let mut centroids = vec![0f32; size];
    for (row, book) in aux.chunks_exact_mut(2 * size).take(rows).enumerate() {
        w.lut().read_f32(row * size, &mut centroids);
        for (i, &centroid) in centroids.iter().enumerate() {
            let [low, high] = narrow(centroid, dtype).to_le_bytes();
            book[i] = low;
            book[size + i] = high;
        }
    }
    Packed { codes, aux }
}

/// True if the steps of every group are powers of two apart, as a uniform quantizer makes them.
pub(super) fn is_uniform(w: &LutGemm<'_>) -> bool {
    let (rows, bits) = (w.out_features(), w.bits());
    let alpha = w.alpha().to_f32();
    alpha.par_chunks_exact(bits * rows).all(|group| {
        let (first, others) = group.split_at(rows);
        others
            .chunks_exact(rows)
            .enumerate()
            .all(|(b, alphas)| alphas.iter().zip(first).all(|(a, first)| *a == first * (2u32 << b) as f32))
    })
}

/// Uniform LUT-GEMM of 3 or 4 bits; steps and centres per tile and unit.
pub(super) fn lutgemm(w: &LutGemm<'_>) -> Packed {
    let (bits, rows, group) = (w.bits(), w.out_features(), w.group_size());
    let codes = pack_codes(w.in_features(), rows, bits, INTEGERS, |row, out| w.codes(row, out));
    let units = w.in_features().div_ceil(CODE_UNIT);
    let groups = units * (CODE_UNIT / group);
    let (alpha, q_bias) = (w.alpha().to_f32(), w.q_bias().to_f32());
    let mut steps = vec![0f32; rows.div_ceil(TILE) * groups * TILE * 2];
    steps.par_chunks_exact_mut(groups * TILE * 2).enumerate().for_each(|(tile, steps)| {
        for (g, steps) in steps.chunks_exact_mut(TILE * 2).take(w.in_features() / group).enumerate() {
            for (r, step) in steps.chunks_exact_mut(2).enumerate() {
                let row = tile * TILE + r;
                if row < rows {
                    let first = alpha[g * bits * rows + row];
                    step[0] = 2.0 * first;
                    step[1] = q_bias[g * rows + row] + first;
                }
            }
        }
    });
    Packed { codes, aux: bytemuck::cast_vec::<f32, u32>(steps).iter().flat_map(|w| w.to_le_bytes()).collect() }
}

/// 16-bit numbers in the order in which lanes take them.
pub(super) fn dense(w: &Dense<'_>, dtype: Dtype) -> Vec<u16> {
    let (width, rows) = (w.in_features, w.out_features);
    let units = width.div_ceil(DENSE_UNIT);
    let mut packed = vec![0u16; rows.div_ceil(TILE) * units * TILE * DENSE_UNIT];
    packed.par_chunks_exact_mut(units * TILE * DENSE_UNIT).enumerate().for_each(|(tile, packed)| {
        let mut row = vec![0f32; units * DENSE_UNIT];
        for r in 0..TILE.min(rows - tile * TILE) {
            w.values.read_f32((tile * TILE + r) * width, &mut row[..width]);
            for (piece, values) in row.chunks_exact(8).enumerate() {
                let (u, p, t) = (piece / 8, piece / 4 % 2, piece % 4);
                let at = ((u * 4 + p * 2 + r / 8) * 32 + r % 8 * 4 + t) * 8;
                for (to, &value) in packed[at..at + 8].iter_mut().zip(values) {
                    *to = narrow(value, dtype);
                }
            }
        }
    });
    packed
}

/// Codes, a byte each, `[out_features, in_features]`.
pub(super) fn bytes(in_features: usize, out_features: usize, codes: impl Fn(usize, &mut [u8]) + Sync) -> Vec<u8> {
    let mut all = vec![0u8; in_features * out_features];
    all.par_chunks_exact_mut(in_features).enumerate().for_each(|(row, out)| codes(row, out));
    all
}

/// `[groups, planes, rows]` as `[rows, groups, planes]`.
pub(super) fn by_row(values: &Floats<'_>, planes: usize, rows: usize) -> Vec<f32> {
    let values = values.to_f32();
    let groups = values.len() / (planes * rows);
    let mut all = vec![0f32; values.len()];
    for (row, out) in all.chunks_exact_mut(groups * planes).enumerate() {
        for (i, out) in out.iter_mut().enumerate() {
            *out = values[i * rows + row];
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(in_features: usize, out_features: usize, bits: usize) -> Vec<u8> {
        (0..in_features * out_features).map(|i| ((i * 2654435761) >> 7) as u8 & ((1 << bits) - 1)).collect()
    }

    /// What the kernels do: product `m` of lane (g, t), nibble by nibble.
    fn unpack(packed: &[u32], bits: usize, m: usize, lane: usize) -> u32 {
        let word = |vector: usize, component: usize| packed[(vector * 32 + lane) * 4 + component];
        if bits == 4 {
            return word(m / 4, m % 4);
        }
        let [a, b, c] = [word(0, m / 4), word(1, m / 4), word(2, m / 4)];
        let spare = a >> 3 & 0x1111_1111 | b >> 2 & 0x2222_2222 | c >> 1 & 0x4444_4444;
        [a, b, c, spare][m % 4] & 0x7777_7777
    }

    #[test]
    fn every_code_is_where_its_lane_looks() {
        for (in_features, out_features, bits) in [(576, 24, 3), (576, 24, 4), (1024, 16, 3), (256, 8, 4)] {
            let codes = codes(in_features, out_features, bits);
            for nibbles in [LOOK_UP, INTEGERS] {
                let packed = pack_codes(in_features, out_features, bits, nibbles, |row, out| {
                    out.copy_from_slice(&codes[row * in_features..][..in_features]);
                });
                let units = in_features.div_ceil(CODE_UNIT);
                for row in 0..out_features {
                    for k in 0..in_features {
                        let unit = &packed[(row / TILE * units + k / CODE_UNIT) * unit_words(bits)..];
                        let (c, e) = (k % CODE_UNIT, k % 4 + row % TILE / 8 * 4);
                        let (product, lane) = (c / 32 * 2 + c % 8 / 4, row % 8 * 4 + c % 32 / 8);
                        let got = unpack(unit, bits, product, lane) >> (4 * nibbles[e]) & 15;
                        assert_eq!(got, u32::from(codes[row * in_features + k]), "row {row}, channel {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn uniform_steps_are_recognized() {
        let codes = codes(128, 16, 3);
        let scale: Vec<f32> = (0..32).map(|i| 0.01 + i as f32 * 0.001).collect();
        let zero = vec![3.0; 32];
        let uniform = LutGemm::from_uniform(128, 16, 3, 64, &codes, &scale, &zero).unwrap();
        assert!(is_uniform(&uniform));
        let mut alpha = uniform.alpha().to_f32().into_owned();
        alpha[20] *= 1.001;
        let other =
            LutGemm::new(128, 16, 3, 64, uniform.binary().to_vec().into(), alpha.into(), uniform.q_bias().clone());
        assert!(!is_uniform(&other.unwrap()));
    }
}
