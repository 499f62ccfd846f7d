//! Matrices of whole weights: codes that stand for bytes, times the digits of activations.
//!
//! A weight is `a · q + c` with a whole `q`: one byte where codebooks are such, else up to four bytes, each a *plane* that
//! codes look up, and `a` has one value a plane. Or `q` is odd and follows from the code (LUT-GEMM with even steps).
//! `Σ w·x = Σ_s step_s · (a · Σ q·n + c · Σ n)` over segments `s` of channels whose activations share a step; the sums of
//! whole numbers are exact, the rest is f64, always in one order. Planes after the second leave the lower half of `n` out,
//! which is 2^-32 of the largest product.
//!
//! # The layout
//! Rows are taken by eights, two *quads*. A line of 64 bytes has 16 bytes of each of a quad's four rows. Byte `i` of a
//! row's 16 has the codes of channels `k + i` and `k + 16 + i` as nibbles. Codes of 3 bits leave a bit of every nibble
//! free: three lines take a fourth's codes there, so that 128 channels take three lines. Codes of more than 4 bits take
//! a byte. The lines of both quads alternate: what is read is one stream.

#[cfg(target_arch = "x86_64")]
mod narrow;
mod portable;
mod whole;
#[cfg(target_arch = "x86_64")]
mod x86;

use rayon::prelude::*;

pub(super) use whole::WholeRow;

use super::digits::{Digits, LANE, UPPER};
use crate::processor::{Kind, Path};

/// Rows that belong together.
pub(super) const ROWS: usize = 8;

/// Channels whose codes of 3 bits are packed together.
const BLOCK: usize = 128;

/// Channels of a line of nibbles.
const LINE: usize = 32;

/// Channels of a segment at most: sums of more would not fit 32 bits.
const SEGMENT: usize = 256;

/// 64 bytes as the processor fetches them.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A quantized matrix in host memory.
#[derive(Debug)]
pub(super) struct Octets {
    in_features: usize,
    bits: usize,
    /// Channels that share a step: 256, or a divisor of the group's size.
    pub(super) segment: usize,
    /// Segments of a group; 0 where each row has one `a` and `c`.
    group: usize,
    lines: Vec<Line>, // [out_features / 8][lines of a row][2 quads]
    /// Where the planes of an octet begin; empty where codes are multiplied as they are.
    planes: Vec<usize>, // [out_features / 8 + 1]
    /// Bytes of the codebooks, 128 added.
    tables: Vec<[[u8; 16]; ROWS]>, // [planes]
    /// `a` of every plane, or of every octet and group.
    steps: Vec<[f32; ROWS]>, // [planes], or [out_features / 8][groups]
    /// `c` of every octet, or of every octet and group.
    offsets: Vec<[f32; ROWS]>, // [out_features / 8][groups]
}

impl Octets {
    /// A matrix with a codebook of whole numbers for every row; `codes(row, out)` writes a row's codes.
    pub(super) fn tabulated(
        in_features: usize,
        bits: usize,
        rows: &[WholeRow],
        codes: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Self {
        let (mut planes, mut tables, mut steps, mut offsets) = (vec![0], Vec::new(), Vec::new(), Vec::new());
        for rows in rows.as_chunks::<ROWS>().0 {
            let most = rows.iter().map(|row| row.planes.len()).max().unwrap_or(0);
            for p in 0..most {
                // Rows of fewer planes have zeros in the others.
                let plane = |row: &WholeRow| row.planes.get(p).copied().unwrap_or(([0; 16], 0.0));
                tables.push(rows.each_ref().map(|row| plane(row).0.map(|q| q.wrapping_add(-128) as u8)));
                steps.push(rows.each_ref().map(|row| plane(row).1));
            }
            planes.push(tables.len());
            offsets.push(rows.each_ref().map(|row| row.offset));
        }
        let (segment, group, lines) = (SEGMENT, 0, Vec::new());
        let mut made = Self { in_features, bits, segment, group, lines, planes, tables, steps, offsets };
        made.pack(rows.len(), codes);
        made
    }

    /// A matrix whose weights are `a · (2·code − (2^bits − 1)) + c` in groups of `group_size` channels; `factors(row,
    /// group)` are `a` and `c`.
    pub(super) fn even(
        (in_features, out_features): (usize, usize),
        bits: usize,
        group_size: usize,
        factors: impl Fn(usize, usize) -> [f32; 2],
        codes: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Self {
        // Whole segments to a group, as long as they can be.
        let lines = (1..=SEGMENT / LINE).rev().find(|&lines| group_size.is_multiple_of(LINE * lines));
        let segment = LINE * lines.expect("a group is whole lines");
        let groups = in_features / group_size;
        let of_octet =
            |i: usize, which: usize| std::array::from_fn(|r| factors(ROWS * (i / groups) + r, i % groups)[which]);
        let all = 0..out_features / ROWS * groups;
        let mut made = Self {
            in_features,
            bits,
            segment,
            group: group_size / segment,
            lines: Vec::new(),
            planes: Vec::new(),
            tables: Vec::new(),
            steps: all.clone().map(|i| of_octet(i, 0)).collect(),
            offsets: all.map(|i| of_octet(i, 1)).collect(),
        };
        made.pack(out_features, codes);
        made
    }

    /// The planes of an octet: their numbers.
    fn planes_of(&self, octet: usize) -> std::ops::Range<usize> {
        if self.planes.is_empty() { 0..0 } else { self.planes[octet]..self.planes[octet + 1] }
    }

    /// Channels in blocks of three lines, from the start of every segment.
    fn packed_channels(&self, segment: usize) -> usize {
        if self.bits == 3 { segment / BLOCK * BLOCK } else { 0 }
    }

    /// True if a code takes a byte.
    fn is_wide(&self) -> bool {
        self.bits > 4
    }

    /// Lines of a quad for a segment of that many channels.
    fn segment_lines(&self, segment: usize) -> usize {
        let packed = self.packed_channels(segment);
        packed / BLOCK * 3 + (segment - packed) / if self.is_wide() { LANE } else { LINE }
    }

    /// Lines of an octet.
    fn octet_lines(&self) -> usize {
        let (whole, rest) = (self.in_features / self.segment, self.in_features % self.segment);
        2 * (whole * self.segment_lines(self.segment) + self.segment_lines(rest))
    }

    fn pack(&mut self, rows: usize, codes_of: impl Fn(usize, &mut [u8]) + Sync) {
        let (n, octet_lines) = (self.in_features, self.octet_lines());
        let mut lines = vec![Line([0; 64]); rows / ROWS * octet_lines];
        lines.par_chunks_exact_mut(octet_lines).enumerate().for_each_init(
            || vec![0; n],
            |codes, (octet, lines)| {
                for row in 0..ROWS {
                    codes_of(ROWS * octet + row, codes);
                    self.pack_row(row, codes, lines);
                }
            },
        );
        self.lines = lines;
    }

    fn pack_row(&self, row: usize, codes: &[u8], lines: &mut [Line]) {
        let at = LANE * (row % 4);
        let mut lines = lines[row / 4..].iter_mut().step_by(2).map(|line| &mut line.0[at..at + LANE]);
        for segment in codes.chunks(self.segment) {
            let (packed, rest) = segment.split_at(self.packed_channels(segment.len()));
            for block in packed.chunks_exact(BLOCK) {
                for j in 0..3 {
                    let line = lines.next().expect("three lines to a block");
                    for (i, byte) in line.iter_mut().enumerate() {
                        let spare = |channel: usize| block[channel + i] >> j & 1;
                        *byte = block[LINE * j + i] | block[LINE * j + LANE + i] << 4;
                        *byte |= spare(3 * LINE) << 3 | spare(3 * LINE + LANE) << 7;
                    }
                }
            }
            if self.is_wide() {
                rest.chunks_exact(LANE).zip(&mut lines).for_each(|(codes, line)| line.copy_from_slice(codes));
                continue;
            }
            for (codes, line) in rest.chunks_exact(LINE).zip(&mut lines) {
                line.iter_mut().enumerate().for_each(|(i, byte)| *byte = codes[i] | codes[LANE + i] << 4);
            }
        }
    }

    /// The codes of one row, written over `out`.
    #[inline(always)]
    pub(super) fn codes(&self, row: usize, out: &mut [u8]) {
        let lines = &self.lines[row / ROWS * self.octet_lines()..][..self.octet_lines()];
        let at = LANE * (row % 4);
        let mut lines = lines[row % ROWS / 4..].iter().step_by(2).map(|line| &line.0[at..at + LANE]);
        for segment in out.chunks_mut(self.segment) {
            let (packed, rest) = segment.split_at_mut(self.packed_channels(segment.len()));
            for block in packed.chunks_exact_mut(BLOCK) {
                let (direct, spare) = block.split_at_mut(3 * LINE);
                spare.fill(0);
                for (j, direct) in direct.chunks_exact_mut(LINE).enumerate() {
                    let line = lines.next().expect("three lines to a block");
                    for (i, byte) in line.iter().enumerate() {
                        (direct[i], direct[LANE + i]) = (byte & 7, byte >> 4 & 7);
                        spare[i] |= (byte >> 3 & 1) << j;
                        spare[LANE + i] |= byte >> 7 << j;
                    }
                }
            }
            if self.is_wide() {
                rest.chunks_exact_mut(LANE).zip(&mut lines).for_each(|(out, line)| out.copy_from_slice(line));
                continue;
            }
            for (out, line) in rest.chunks_exact_mut(LINE).zip(&mut lines) {
                for (i, byte) in line.iter().enumerate() {
                    (out[i], out[LANE + i]) = (byte & 15, byte >> 4);
                }
            }
        }
    }

    /// What makes twice a code odd.
    fn odd(&self) -> f64 {
        f64::from((1 << self.bits) - 1)
    }

    /// Groups of channels with factors of their own.
    pub(super) fn groups(&self) -> usize {
        if self.group == 0 { 1 } else { self.in_features / (self.group * self.segment) }
    }

    /// Bits of a code.
    pub(super) fn bits(&self) -> usize {
        self.bits
    }

    /// Channels of a group.
    pub(super) fn group_size(&self) -> usize {
        self.in_features / self.groups()
    }

    /// The value that a code of a row stands for in one group.
    pub(super) fn value(&self, row: usize, group: usize, code: usize) -> f32 {
        let (octet, r) = (row / ROWS, row % ROWS);
        let at = octet * self.groups() + group;
        let sum = if self.planes.is_empty() {
            f64::from(self.steps[at][r]) * (2.0 * code as f64 - self.odd())
        } else {
            let plane = |p: usize| f64::from(self.steps[p][r]) * (f64::from(self.tables[p][r][code]) - 128.0);
            self.planes_of(octet).map(plane).sum()
        };
        (sum + f64::from(self.offsets[at][r])) as f32
    }

    /// `y[t] = W·x[t]` of the octets from `first` on that each of `x` has room for in `y` `[x.len(), rows]`. Codes are read
    /// once for several of `x`, and sums are those of each alone.
    pub(super) fn product(&self, path: Path, first: usize, x: &[&Digits], y: &mut [f32]) {
        if x.is_empty() {
            return;
        }
        match path.kind() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a path exists only where the processor has its instructions.
            Kind::Avx512 => unsafe { x86::wide::product(self, first, x, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Kind::AvxVnni => unsafe { narrow::vnni::product(self, first, x, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Kind::Avx2 => unsafe { narrow::words::product(self, first, x, y) },
            Kind::Scalar => portable::product(self, first, x, y),
        }
    }
}

/// An octet's sums on their way to `y`: what the exact sums of a segment become, the same on every path.
#[derive(Debug)]
struct Sums<'a> {
    matrix: &'a Octets,
    x: &'a Digits,
    octet: usize,
    y: [f64; ROWS],
}

impl<'a> Sums<'a> {
    fn new(matrix: &'a Octets, x: &'a Digits, octet: usize) -> Self {
        let offset = |r: usize| f64::from(matrix.offsets[octet][r]) * x.sum;
        let y = if matrix.group == 0 { std::array::from_fn(offset) } else { [0.0; ROWS] };
        Self { matrix, x, octet, y }
    }

    /// Takes the exact sums `32768·upper + lower` of `q·n` over segment `s`, of a plane or of codes.
    #[inline(always)]
    fn take(&mut self, s: usize, plane: Option<usize>, upper: &[i32; ROWS], lower: &[i32; ROWS]) {
        let step = self.x.steps[s];
        if let Some(plane) = plane {
            let a = &self.matrix.steps[plane];
            for r in 0..ROWS {
                self.y[r] += f64::from(a[r]) * ((f64::from(upper[r]) * UPPER + f64::from(lower[r])) * step);
            }
            return;
        }
        let at = self.octet * self.matrix.groups() + s / self.matrix.group;
        let (a, c) = (&self.matrix.steps[at], &self.matrix.offsets[at]);
        let sum = self.x.segment_sum(s);
        let odd = self.matrix.odd() * sum;
        for r in 0..ROWS {
            let product = 2.0 * ((f64::from(upper[r]) * UPPER + f64::from(lower[r])) * step) - odd;
            self.y[r] += f64::from(a[r]) * product + f64::from(c[r]) * sum;
        }
    }

    fn rounded(self) -> [f32; ROWS] {
        self.y.map(|sum| sum as f32)
    }
}

#[cfg(test)]
mod tests;
