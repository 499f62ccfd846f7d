//! AutoAWQ's `gemm` layout: 4 bits, `qweight` `int32 [in, out/8]`, `qzeros` `int32 [in/group_size, out/8]`; nibble `i`
//! of word `c` belongs to row `8c + ORDER[i]`.

use anyhow::{Result, ensure};

use super::BIT_KEYS;
use super::quantization::Quantization;

/// Bits of a code, the only width of the layout.
pub(super) const BITS: u32 = 4;

/// The rows of a word, from its lowest nibble up.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Checks what is said of the quantization.
pub(super) fn understood(quantization: &Quantization) -> Result<()> {
    let bits = quantization.field(&BIT_KEYS)?;
    ensure!(bits == BITS, "bits is {bits}, {BITS} is expected");
    let version = quantization.field(&["version", "checkpoint_format", "format"])?;
    let is_gemm = version.is_null() || version == "gemm";
    ensure!(is_gemm, "version is {version}, \"gemm\" is expected: save it with that layout");
    let zero_point = quantization.field(&["zero_point"])?;
    ensure!(zero_point.is_null() || zero_point == true, "zero_point is {zero_point}, true is expected");
    Ok(())
}

/// The nibbles of `words` `[columns, rows / 8]` as `[rows, columns]`.
pub(super) fn codes(words: &[u32], rows: usize, columns: usize) -> Vec<u8> {
    let mut codes = vec![0; rows * columns];
    for (column, words) in words.chunks_exact(rows / 8).enumerate() {
        for (c, word) in words.iter().enumerate() {
            for (i, within) in ORDER.into_iter().enumerate() {
                codes[(8 * c + within) * columns + column] = (word >> (4 * i) & 15) as u8;
            }
        }
    }
    codes
}
