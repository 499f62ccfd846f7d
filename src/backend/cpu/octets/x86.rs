//! The product in 512-bit instructions, and what it shares with that in 256-bit ones.

use std::arch::x86_64::*;

use super::{BLOCK, Digits, LANE, Line, Octets, ROWS, Sums};

/// What bytes are multiplied by which digits: codes as they are; one of the first two planes; a later one, which leaves
/// the lower digits out.
pub(super) const CODES: u8 = 0;
pub(super) const FIRST: u8 = 1;
pub(super) const LATER: u8 = 2;

/// How many digits that are.
pub(super) const fn digits(kind: u8) -> usize {
    if kind == LATER { 2 } else { 4 }
}

/// Bytes ahead of what is multiplied that are asked for: memory takes longer than the processor's own guess reaches.
pub(super) const AHEAD: usize = 4096;

/// 512 bits: a line at once, products of bytes by VNNI.
pub(super) mod wide {
    use super::*;

    /// 16 digits, once for every row of a quad.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn four(digits: &[i8; LANE]) -> __m512i {
        // SAFETY: 16 bytes are there; the load needs no alignment.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(digits.as_ptr().cast()) })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn load(line: &Line) -> __m512i {
        // SAFETY: a line is 64 bytes; what lies AHEAD of it is asked for and not read, so that it may lie anywhere.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(line.0.as_ptr().wrapping_add(AHEAD).cast());
            _mm512_loadu_si512(line.0.as_ptr().cast())
        }
    }

    /// `mask`'s bits of both quads. No closure does this: what calls it would have to be compiled for the same instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn masked([a, b]: [__m512i; 2], mask: __m512i) -> [__m512i; 2] {
        [_mm512_and_si512(a, mask), _mm512_and_si512(b, mask)]
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn shift_right<const BITS: u32>([a, b]: [__m512i; 2]) -> [__m512i; 2] {
        [_mm512_srli_epi16::<BITS>(a), _mm512_srli_epi16::<BITS>(b)]
    }

    /// Sums by digit of both quads.
    type Accumulators = [[__m512i; 4]; 2];

    /// Adds the products of one code of every row with the `i`-th 16 channels of each of `x`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn add<const KIND: u8, const T: usize>(
        sums: &mut [Accumulators; T],
        tables: [__m512i; 2],
        codes: [__m512i; 2],
        x: &[&[[[i8; LANE]; 4]]; T],
        i: usize,
    ) {
        let bytes = |q: usize| if KIND == CODES { codes[q] } else { _mm512_shuffle_epi8(tables[q], codes[q]) };
        let bytes = [bytes(0), bytes(1)];
        for (sums, x) in sums.iter_mut().zip(x) {
            for (d, x) in x[i].iter().enumerate().take(digits(KIND)) {
                let x = four(x);
                for (sums, bytes) in sums.iter_mut().zip(bytes) {
                    sums[d] = _mm512_dpbusd_epi32(sums[d], bytes, x);
                }
            }
        }
    }

    /// The tables of a quad.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn table(tables: &[[u8; 16]]) -> __m512i {
        let tables: &[[u8; 16]; 4] = tables.first_chunk().expect("four rows");
        // SAFETY: four tables are 64 bytes.
        unsafe { _mm512_loadu_si512(tables.as_ptr().cast()) }
    }

    /// Two of `x` at a time: their sums are as many as there are registers for.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(in super::super) fn product(matrix: &Octets, first: usize, x: &[&Digits], y: &mut [f32]) {
        let rows = y.len() / x.len();
        let (pairs, last) = x.as_chunks::<2>();
        for octet in 0..rows / ROWS {
            for (p, &x) in pairs.iter().enumerate() {
                let made = product_of(matrix, first + octet, x);
                for (t, made) in made.iter().enumerate() {
                    y[(2 * p + t) * rows + octet * ROWS..][..ROWS].copy_from_slice(made);
                }
            }
            if let [x] = last {
                let [made] = product_of(matrix, first + octet, [x]);
                y[2 * pairs.len() * rows + octet * ROWS..][..ROWS].copy_from_slice(&made);
            }
        }
    }

    /// `W·x` of one octet for each of `x`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn product_of<const T: usize>(matrix: &Octets, octet: usize, x: [&Digits; T]) -> [[f32; ROWS]; T] {
        let octet_lines = matrix.octet_lines();
        let mut sums = x.map(|x| Sums::new(matrix, x, octet));
        let lines = &matrix.lines[octet * octet_lines..][..octet_lines];
        let planes = matrix.planes_of(octet);
        let mut digits = x.map(|x| x.digits.chunks(matrix.segment / LANE));
        for (s, these) in lines.chunks(2 * matrix.segment_lines(matrix.segment)).enumerate() {
            let mut x_s = [&[][..]; T];
            for (x_s, digits) in x_s.iter_mut().zip(&mut digits) {
                *x_s = digits.next().expect("as many segments as of lines");
            }
            if planes.is_empty() {
                let all = segment::<CODES, T>(matrix, [_mm512_setzero_si512(); 2], these, x_s);
                for (sums, all) in sums.iter_mut().zip(all) {
                    let (upper, lower) = reduce(all, [0; 2]);
                    sums.take(s, None, &upper, &lower);
                }
            }
            for plane in planes.clone() {
                let tables = [table(&matrix.tables[plane]), table(&matrix.tables[plane][4..])];
                let is_first = plane < planes.start + 2;
                let all = match is_first {
                    true => segment::<FIRST, T>(matrix, tables, these, x_s),
                    false => segment::<LATER, T>(matrix, tables, these, x_s),
                };
                for ((sums, all), x) in sums.iter_mut().zip(all).zip(x) {
                    let [upper, lower] = x.sums[s].map(|sum| -128 * sum);
                    let (upper, lower) = reduce(all, [upper, if is_first { lower } else { 0 }]);
                    sums.take(s, Some(plane), &upper, &lower);
                }
            }
        }
        sums.map(Sums::rounded)
    }

    /// The sums of one segment for each of `x`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn segment<const KIND: u8, const T: usize>(
        matrix: &Octets,
        tables: [__m512i; 2],
        lines: &[Line],
        x: [&[[[i8; LANE]; 4]]; T],
    ) -> [Accumulators; T] {
        let packed = matrix.packed_channels(LANE * x[0].len()) / LANE;
        let mut lines = lines.as_chunks::<2>().0.iter();
        let mut sums = [[[_mm512_setzero_si512(); 4]; 2]; T];
        let (three, four) = (_mm512_set1_epi8(7), _mm512_set1_epi8(15));
        for at in (0..packed).step_by(BLOCK / LANE) {
            let mut block = [&x[0][..0]; T];
            for (block, x) in block.iter_mut().zip(&x) {
                *block = &x[at..at + BLOCK / LANE];
            }
            let x = block;
            let mut spare = [_mm512_setzero_si512(); 2];
            for j in 0..3 {
                let pair = lines.next().expect("three lines to a block");
                let pair = [load(&pair[0]), load(&pair[1])];
                // The spare bits of line `j` become bits `j` and `j + 4`; what else is there is masked out below.
                let (ones, shifted) = match j {
                    0 => (0x11, shift_right::<3>(pair)),
                    1 => (0x22, shift_right::<2>(pair)),
                    _ => (0x44, shift_right::<1>(pair)),
                };
                let ones = _mm512_set1_epi8(ones);
                for q in 0..2 {
                    // ones ? shifted : spare
                    spare[q] = _mm512_ternarylogic_epi32::<0xca>(ones, shifted[q], spare[q]);
                }
                let lower = masked(pair, three);
                add::<KIND, T>(&mut sums, tables, lower, &x, 2 * j);
                let upper = masked(shift_right::<4>(pair), three);
                add::<KIND, T>(&mut sums, tables, upper, &x, 2 * j + 1);
            }
            let lower = masked(spare, three);
            add::<KIND, T>(&mut sums, tables, lower, &x, 6);
            let upper = masked(shift_right::<4>(spare), three);
            add::<KIND, T>(&mut sums, tables, upper, &x, 7);
        }
        if matrix.is_wide() {
            for at in packed..x[0].len() {
                let pair = lines.next().expect("a line to 16 channels");
                add::<KIND, T>(&mut sums, tables, [load(&pair[0]), load(&pair[1])], &x, at);
            }
            return sums;
        }
        for at in (packed..x[0].len()).step_by(2) {
            let pair = lines.next().expect("a line to 32 channels");
            let pair = [load(&pair[0]), load(&pair[1])];
            let lower = masked(pair, four);
            add::<KIND, T>(&mut sums, tables, lower, &x, at);
            let upper = masked(shift_right::<4>(pair), four);
            add::<KIND, T>(&mut sums, tables, upper, &x, at + 1);
        }
        sums
    }

    /// The sums of every row with `excess` added, of `upper` and of `lower`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn reduce(sums: Accumulators, excess: [i32; 2]) -> ([i32; ROWS], [i32; ROWS]) {
        let [a, b] = sums;
        let upper = |q: [__m512i; 4]| _mm512_add_epi32(_mm512_slli_epi32::<8>(q[0]), q[1]);
        let lower = |q: [__m512i; 4]| _mm512_add_epi32(_mm512_slli_epi32::<7>(q[2]), q[3]);
        let halves = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (upper, lower) = (halves(upper(a), upper(b)), halves(lower(a), lower(b)));
        // Four numbers of every row of a quad: upper and lower sum of both quads, in turns.
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(upper, lower), _mm512_unpackhi_epi64(upper, lower));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let all = _mm512_permutexvar_epi32(order, all);
        let excess = excess.map(|excess| _mm256_set1_epi32(excess));
        let upper = _mm256_add_epi32(_mm512_castsi512_si256(all), excess[0]);
        let lower = _mm256_add_epi32(_mm512_extracti64x4_epi64::<1>(all), excess[1]);
        let mut out = ([0; ROWS], [0; ROWS]);
        // SAFETY: eight numbers each; the stores need no alignment.
        unsafe {
            _mm256_storeu_si256(out.0.as_mut_ptr().cast(), upper);
            _mm256_storeu_si256(out.1.as_mut_ptr().cast(), lower);
        }
        out
    }
}
