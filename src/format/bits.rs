//! Between bit planes and codes, eight channels at a time.

/// Byte `i` is bit `7 − i` of the index.
const HIGH_FIRST: [u64; 256] = spread(8, true);

/// Byte `i` is bit `i` of the index.
const LOW_FIRST: [u64; 256] = spread(8, false);

const fn spread(step: u32, high_first: bool) -> [u64; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut i = 0;
        while i < 8 {
            let bit = if high_first { 7 - i } else { i };
            table[index] |= ((index as u64 >> bit) & 1) << (step * i);
            i += 1;
        }
        index += 1;
    }
    table
}

/// Nibbles in place of bytes.
const NIBBLES_HIGH_FIRST: [u64; 256] = spread(4, true);
const NIBBLES_LOW_FIRST: [u64; 256] = spread(4, false);

/// Eight bytes, the first of them the highest bit of `byte`.
pub(super) fn bytes_high_first(byte: u8) -> u64 {
    HIGH_FIRST[usize::from(byte)]
}

/// Eight bytes, the first of them the lowest bit of `byte`.
pub(super) fn bytes_low_first(byte: u8) -> u64 {
    LOW_FIRST[usize::from(byte)]
}

/// Eight nibbles, the first of them the highest bit of `byte`.
pub(super) fn nibbles_high_first(byte: u8) -> u32 {
    NIBBLES_HIGH_FIRST[usize::from(byte)] as u32
}

/// Eight nibbles, the first of them the lowest bit of `byte`.
pub(super) fn nibbles_low_first(byte: u8) -> u32 {
    NIBBLES_LOW_FIRST[usize::from(byte)] as u32
}

/// Bit `plane` of eight codes, the first of them as the highest bit. Bit `8i` times `2^(63 − 9i)` is bit `63 − i`, and
/// no two of the other products meet, so nothing is carried.
pub(super) fn gather_high_first(codes: u64, plane: usize) -> u8 {
    ((codes >> plane & 0x0101_0101_0101_0101).wrapping_mul(0x8040_2010_0804_0201) >> 56) as u8
}

/// Bit `plane` of eight codes, the first of them as the lowest bit; likewise with `2^(56 − 7i)`.
pub(super) fn gather_low_first(codes: u64, plane: usize) -> u8 {
    ((codes >> plane & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

/// Eight codes as one word, the first of them lowest.
pub(super) fn eight(codes: &[u8]) -> u64 {
    u64::from_le_bytes(codes.try_into().expect("eight codes"))
}

/// The index of the first code that needs more than `bits` bits.
pub(super) fn too_large(codes: &[u8], bits: usize) -> Option<usize> {
    use rayon::prelude::*;
    let wrong = |code: &u8| u32::from(*code) >> bits != 0;
    // A whole piece at a time: nearly always there is none.
    let piece = codes.par_chunks(1 << 16).position_first(|piece| piece.iter().fold(false, |any, c| any | wrong(c)))?;
    let start = piece << 16;
    codes[start..].iter().position(wrong).map(|i| start + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_spreads_and_gathers() {
        for byte in 0..=255u8 {
            for plane in 0..8 {
                assert_eq!(gather_high_first(bytes_high_first(byte) << plane, plane), byte);
                assert_eq!(gather_low_first(bytes_low_first(byte) << plane, plane), byte);
                // Other planes do not matter.
                assert_eq!(
                    gather_high_first(bytes_high_first(byte) << plane | !(0x0101_0101_0101_0101 << plane), plane),
                    byte
                );
                assert_eq!(
                    gather_low_first(bytes_low_first(byte) << plane | !(0x0101_0101_0101_0101 << plane), plane),
                    byte
                );
            }
            for i in 0..8 {
                let (low, high) = (u64::from(byte >> i & 1), u64::from(byte >> (7 - i) & 1));
                assert_eq!(bytes_low_first(byte) >> (8 * i) & 0xff, low);
                assert_eq!(bytes_high_first(byte) >> (8 * i) & 0xff, high);
                assert_eq!(u64::from(nibbles_low_first(byte) >> (4 * i) & 15), low);
                assert_eq!(u64::from(nibbles_high_first(byte) >> (4 * i) & 15), high);
            }
        }
    }

    #[test]
    fn the_first_code_too_large_is_found() {
        let mut codes = vec![7u8; 200_000];
        assert_eq!(too_large(&codes, 3), None);
        codes[150_001] = 8;
        codes[150_002] = 9;
        assert_eq!(too_large(&codes, 3), Some(150_001));
        assert_eq!(too_large(&[255; 9], 8), None);
    }
}
