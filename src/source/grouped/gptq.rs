//! AutoGPTQ's layout, 3 or 4 bits: `qweight` `int32 [in·bits/32, out]`, `qzeros` `int32 [in/group_size, out·bits/32]`,
//! `g_idx` `int32 [in]`, the group of each channel.
//!
//! Codes of a row follow each other from the lowest bit of the first word up, 3-bit ones across the ends of words;
//! zeros of a group likewise, row by row. The layout `gptq` stores zeros less one, `gptq_v2` as they are.

use std::borrow::Cow;

use anyhow::{Result, bail, ensure};

use super::BIT_KEYS;
use super::quantization::Quantization;

/// What differs between checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packing {
    pub(super) bits: u32,
    less_one: bool,
    /// `desc_act`: channels may have been taken out of order.
    act_order: bool,
}

impl Packing {
    /// Reads what is said of the quantization.
    pub(super) fn understood(quantization: &Quantization) -> Result<Self> {
        let bits = quantization.field(&BIT_KEYS)?;
        let known = bits.as_u64().filter(|bits| matches!(bits, 3 | 4));
        ensure!(known.is_some(), "bits is {bits}, 3 or 4 is expected");
        // Newer versions of GPTQModel write the second of these.
        let format = quantization.field(&["checkpoint_format", "format"])?;
        let less_one = match format.as_str() {
            None if format.is_null() => true,
            Some("gptq") => true,
            Some("gptq_v2") => false,
            _ => bail!("checkpoint_format is {format}, \"gptq\" or \"gptq_v2\" is expected: save it as one of them"),
        };
        let act_order = quantization.field(&["desc_act"])? == true;
        Ok(Self { bits: known.unwrap_or(4) as u32, less_one, act_order })
    }

    /// Shapes of `qweight` and `qzeros`, for channels and rows in multiples of 32.
    pub(super) fn shapes(self, channels: usize, groups: usize, rows: usize) -> ([usize; 2], [usize; 2]) {
        let bits = self.bits as usize;
        ([channels / 32 * bits, rows], [groups, rows / 32 * bits])
    }

    /// Checks that groups are runs of channels, which is all that LUT-GEMM has: `order` is `g_idx`.
    pub(super) fn ensure_in_order(
        self,
        order: Option<Cow<'_, [u32]>>,
        channels: usize,
        group_size: usize,
    ) -> Result<()> {
        const OUT: &str = "quantize it again with desc_act false";
        let Some(order) = order else {
            ensure!(!self.act_order, "act-order (desc_act true) without g_idx is not supported, {OUT}");
            return Ok(());
        };
        ensure!(order.len() == channels, "g_idx has {} channels, {channels} are expected", order.len());
        let moved = order.iter().enumerate().find(|&(k, &group)| group as usize != k / group_size);
        if let Some((k, group)) = moved {
            bail!(
                "act-order (desc_act) is not supported: g_idx puts channel {k} into group {group}, {} is expected, {OUT}",
                k / group_size
            );
        }
        Ok(())
    }

    /// The codes of `qweight` as `[rows, channels]`.
    pub(super) fn codes(self, words: &[u32], rows: usize, channels: usize) -> Vec<u8> {
        let row = |row| (0..channels).map(move |k| self.field(|word| words[word * rows + row], k));
        (0..rows).flat_map(row).collect()
    }

    /// The zeros of `qzeros` as `[rows, groups]`.
    pub(super) fn zeros(self, words: &[u32], rows: usize, groups: usize) -> Vec<u8> {
        let line = rows / 32 * self.bits as usize;
        let zero = |row, group| {
            let stored = self.field(|word| words[group * line + word], row);
            // A zero of 0, less one, has all bits set.
            if self.less_one { (stored + 1) & ((1 << self.bits) - 1) } else { stored }
        };
        (0..rows * groups).map(|i| zero(i / groups, i % groups)).collect()
    }

    /// Field `i` of a run of words.
    fn field(self, word: impl Fn(usize) -> u32, i: usize) -> u8 {
        let (bits, at) = (self.bits, i * self.bits as usize);
        let (first, shift) = (at / 32, (at % 32) as u32);
        let low = word(first) >> shift;
        let high = if shift + bits > 32 { word(first + 1) << (32 - shift) } else { 0 };
        ((low | high) & ((1 << bits) - 1)) as u8
    }
}
