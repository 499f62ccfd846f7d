//! What is packed is where the kernels look for it.

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

/// The nibble of a word that holds channel 0 to 3 of rows g (first four) and g + 8 (last four).
const LOOK_UP: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const BYTES: [u32; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// All tiles, into memory that was not zero.
fn packed(packing: &Packing<'_>) -> (Vec<u32>, Vec<u8>) {
    let mut codes = vec![0xa5a5_a5a5u32; packing.tiles() * packing.code_bytes() / 4];
    for (tile, out) in codes.chunks_exact_mut(packing.code_bytes() / 4).enumerate() {
        packing.codes(tile, bytemuck::cast_slice_mut(out));
    }
    let mut aux = vec![0xa5a5_a5a5u32; packing.tiles() * packing.aux_bytes() / 4];
    for tile in 0..packing.tiles() {
        let bytes = packing.aux_bytes();
        packing.aux(tile, &mut bytemuck::cast_slice_mut(&mut aux)[tile * bytes..(tile + 1) * bytes]);
    }
    (codes, bytemuck::cast_slice(&aux).to_vec())
}

/// Hands on every code where its lane looks: (row, channel, code). Padding too.
fn each_code(packing: &Packing<'_>, bits: usize, nibbles: [u32; 8], mut each: impl FnMut(usize, usize, u32)) {
    let (packed, _) = packed(packing);
    let units = packing.shape().0.div_ceil(CODE_UNIT);
    for row in 0..packing.tiles() * TILE {
        for k in 0..units * CODE_UNIT {
            let unit = &packed[(row / TILE * units + k / CODE_UNIT) * unit_words(bits)..];
            let (c, e) = (k % CODE_UNIT, k % 4 + row % TILE / 8 * 4);
            let (product, lane) = (c / 32 * 2 + c % 8 / 4, row % 8 * 4 + c % 32 / 8);
            each(row, k, unpack(unit, bits, product, lane) >> (4 * nibbles[e]) & 15);
        }
    }
}

/// What byte permutations make of a code, as `anyprec.cuh` adds them: the entry.
fn looked_up(plane: &[u8], code: usize) -> i32 {
    let half = |entries: &[u8], code: usize| {
        let byte = entries[code & 7] as i8;
        i32::from(if code & 8 == 0 { byte } else { byte >> 7 })
    };
    if plane.len() == 8 { half(plane, code) } else { half(plane, code) + half(&plane[8..], code ^ 8) }
}

#[test]
fn halves_of_a_codebook_add_up_to_it() {
    for x in -128..=126i8 {
        for y in -128..=126i8 {
            let mut bytes = [0; MOST];
            (bytes[3], bytes[11]) = (x, y);
            halves(&mut bytes);
            let bytes = bytes.map(|byte| byte as u8);
            assert_eq!((looked_up(&bytes, 3), looked_up(&bytes, 11)), (i32::from(x), i32::from(y)));
            assert_eq!((looked_up(&bytes, 2), looked_up(&bytes, 12)), (0, 0));
        }
    }
}

#[test]
fn every_code_looks_its_centroid_up() {
    for (in_features, out_features, bits, planes) in [
        (576, 24, 3, Planes::One),
        (576, 24, 3, Planes::Two),
        (1376, 24, 4, Planes::Two),
        (1024, 16, 4, Planes::One),
        (32, 8, 3, Planes::Two),
    ] {
        let (codes, size) = (codes(in_features, out_features, bits), 1usize << bits);
        let noise = |i: usize| ((i * 2654435761) >> 9 & 0xffff) as f32 / 65536.0 - 0.4;
        let mut lut: Vec<f32> = (0..out_features << bits).map(|i| f16::from_f32(noise(i)).to_f32()).collect();
        if planes == Planes::One {
            lut.chunks_exact_mut(size).for_each(crate::format::bytes::round);
        }
        let w = AnyPrec::pack(in_features, out_features, bits, &codes, lut.clone().into()).unwrap();
        let packing = Packing::of(&Weight::AnyPrec(w.clone()), Dtype::Float16).map(|p| p.format());
        assert_eq!(packing.flatten(), Some(Format::AnyPrec { bits, planes: planes.count() }));
        let packing = Packing::AnyPrec(&w, Dtype::Float16, planes);
        let (_, books) = packed(&packing);
        let mut halves = vec![0xa5a5u16; packing.tiles() * packing.lut_bytes() / 2];
        for (tile, out) in halves.chunks_exact_mut(packing.lut_bytes() / 2).enumerate() {
            packing.lut(tile, bytemuck::cast_slice_mut(out));
        }
        each_code(&packing, bits, LOOK_UP, |row, k, code| {
            let code = code as usize;
            let half = f16::from_bits(halves[row * size + code]).to_f32();
            let book = &books[row / TILE * packing.aux_bytes()..];
            let r = row % TILE;
            let byte = |plane: usize| looked_up(&book[(plane * TILE + r) * size..][..size], code);
            let q = if planes == Planes::One { byte(0) } else { radix(bits) * byte(0) + byte(1) };
            let at = planes.count() * TILE * size + r * 8;
            let number = |at: usize| f32::from_le_bytes(book[at..at + 4].try_into().unwrap());
            let value = number(at) * q as f32 + number(at + 4);
            if row >= out_features {
                return assert_eq!((half, value), (0.0, 0.0));
            }
            if k < in_features {
                let centroid = lut[(row << bits) + usize::from(codes[row * in_features + k])];
                assert_eq!(half, centroid, "row {row}, channel {k}");
                // Half a step of two planes; of one, half of the last place of float16.
                let bound = number(at) * if planes == Planes::One { 0.0 } else { 0.5 } + centroid.abs() / 2048.0;
                assert!((value - centroid).abs() <= bound, "row {row}, channel {k}: {value}, not {centroid}");
            }
        });
    }
}

#[test]
fn every_uniform_code_is_where_its_lane_looks() {
    for (in_features, out_features, bits) in [(576, 24, 3), (1376, 24, 4), (1024, 16, 3), (256, 8, 4), (32, 8, 3)] {
        let codes = codes(in_features, out_features, bits);
        let groups = in_features / 32;
        let scale: Vec<f32> = (0..out_features * groups).map(|i| 1.0 + i as f32 / 64.0).collect();
        let zero: Vec<f32> = (0..out_features * groups).map(|i| (i % 7) as f32).collect();
        let w = LutGemm::from_uniform(in_features, out_features, bits, 32, &codes, &scale, &zero).unwrap();
        each_code(&Packing::LutGemm(&w), bits, BYTES, |row, k, got| {
            let inside = row < out_features && k < in_features;
            let want = if inside { codes[row * in_features + k] } else { 0 };
            assert_eq!(got, u32::from(want), "row {row}, channel {k}");
        });
        let (_, steps) = packed(&Packing::LutGemm(&w));
        let steps: Vec<f32> = bytemuck::pod_collect_to_vec(&steps);
        let padded = in_features.next_multiple_of(CODE_UNIT) / 32;
        for (i, step) in steps.chunks_exact(2).enumerate() {
            let (row, g) = (i / (padded * TILE) * TILE + i % TILE, i / TILE % padded);
            let inside = row < out_features && g < groups;
            let step_of = |row: usize, g: usize| (scale[row * groups + g], zero[row * groups + g]);
            let (scale, zero) = if inside { step_of(row, g) } else { (0.0, 0.0) };
            // alpha_b is scale / 2 doubled from plane to plane.
            assert_eq!(step, [scale, -scale * zero], "row {row}, group {g}");
        }
    }
}

#[test]
fn every_byte_is_where_its_lane_looks() {
    for (in_features, rows, group) in [(576, 24, 64), (1376, 40, 32), (256, 16, 128)] {
        let codes = codes(in_features, rows, 8);
        let groups = in_features / group;
        let scale: Vec<f32> = (0..rows * groups).map(|i| 1.0 + i as f32 / 64.0).collect();
        let w =
            LutGemm::from_uniform(in_features, rows, 8, group, &codes, &scale, &vec![128.0; rows * groups]).unwrap();
        let packing = Packing::LutGemm(&w);
        let (packed, steps) = packed(&packing);
        let packed: &[u8] = bytemuck::cast_slice(&packed);
        let steps: Vec<f32> = bytemuck::pod_collect_to_vec(&steps);
        let padded = in_features.next_multiple_of(BYTE_UNIT);
        assert_eq!(steps.len(), packing.tiles() * TILE * padded / group * 2);
        for row in 0..packing.tiles() * TILE {
            for k in 0..padded {
                let (tile, r, c) = (row / TILE, row % TILE, k % BYTE_UNIT);
                let unit = tile * padded / BYTE_UNIT + k / BYTE_UNIT;
                let lane = r % 8 * 4 + c / 8 % 4;
                let got = packed[((unit * 4 + c / 32) * 32 + lane) * 16 + r / 8 * 8 + c % 8];
                let step = steps[((unit * (BYTE_UNIT / group) + c / group) * TILE + r) * 2];
                let inside = row < rows && k < in_features;
                let want =
                    if inside { (codes[row * in_features + k], scale[row * groups + k / group]) } else { (0, 0.0) };
                assert_eq!((got, step), want, "row {row}, channel {k}");
            }
        }
    }
}

#[test]
fn numbers_are_where_their_lanes_look() {
    for (width, rows) in [(72, 24), (128, 16)] {
        let values: Vec<f32> = (0..width * rows).map(|i| (i % 2003) as f32 / 8.0).collect();
        for dtype in [Dtype::Float16, Dtype::Bfloat16] {
            let bits: Vec<u16> = values.iter().map(|&v| narrow(v, dtype)).collect();
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            for values in [Floats::from(values.clone()), Floats::from(halves)] {
                let w = Dense { in_features: width, out_features: rows, values };
                let packing = Packing::Dense(&w, dtype);
                let (packed, _) = packed(&packing);
                let packed: &[u16] = bytemuck::cast_slice(&packed);
                let units = width.div_ceil(DENSE_UNIT);
                for row in 0..packing.tiles() * TILE {
                    for k in 0..units * DENSE_UNIT {
                        let (tile, r, c) = (row / TILE, row % TILE, k % DENSE_UNIT);
                        let lane = r % 8 * 4 + c / 8 % 4;
                        let vector = c / 32 * 2 + r / 8;
                        let at = (((tile * units + k / DENSE_UNIT) * 4 + vector) * 32 + lane) * 8 + c % 8;
                        let inside = row < rows && k < width;
                        assert_eq!(packed[at], if inside { bits[row * width + k] } else { 0 }, "row {row}, {k}");
                    }
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
    let other = LutGemm::new(128, 16, 3, 64, uniform.binary().to_vec().into(), alpha.into(), uniform.q_bias().clone());
    assert!(!is_uniform(&other.unwrap()));
}
