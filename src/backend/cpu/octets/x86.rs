//! The product in vector instructions.

use std::arch::x86_64::*;

use super::{BLOCK, Digits, LANE, Line, Octets, ROWS, Sums};

/// What bytes are multiplied by which digits: codes as they are; one of the first two planes; a later one, which leaves
/// the lower digits out.
const CODES: u8 = 0;
const FIRST: u8 = 1;
const LATER: u8 = 2;

/// How many digits that are.
const fn digits(kind: u8) -> usize {
    if kind == LATER { 2 } else { 4 }
}

/// Bytes ahead of what is multiplied that are asked for: memory takes longer than the processor's own guess reaches.
const AHEAD: usize = 4096;

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

/// The product in 256 bits, two rows of both quads at once. `$features` are enabled; `$add` adds the products of one code
/// of four rows to their sums, `$close` makes those of `upper` and of `lower` of a quad's sums.
macro_rules! narrow {
    ($name:ident, $features:literal, $sums:literal, $digits:ident: $x:ty, $add:item, $close:item) => {
        pub(super) mod $name {
            use super::*;

            /// Of one quad.
            type Accumulators = [__m256i; $sums];

            #[target_feature(enable = $features)]
            #[inline]
            $add

            #[target_feature(enable = $features)]
            #[inline]
            $close

            /// Codes that were read for the first of `x` are near for the others.
            #[target_feature(enable = $features)]
            pub(in super::super) fn product(matrix: &Octets, first: usize, x: &[&Digits], y: &mut [f32]) {
                let rows = y.len() / x.len();
                for (octet, at) in (first..).zip((0..rows / ROWS * ROWS).step_by(ROWS)) {
                    for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
                        y[at..at + ROWS].copy_from_slice(&product_of(matrix, octet, x));
                    }
                }
            }

            /// `W·x` of one octet.
            #[target_feature(enable = $features)]
            #[inline]
            fn product_of(matrix: &Octets, octet: usize, x: &Digits) -> [f32; ROWS] {
                let octet_lines = matrix.octet_lines();
                let mut sums = Sums::new(matrix, x, octet);
                let lines = &matrix.lines[octet * octet_lines..][..octet_lines];
                let lines = lines.chunks(2 * matrix.segment_lines(matrix.segment));
                let planes = matrix.planes_of(octet);
                for (s, (these, x_s)) in lines.zip(x.$digits.chunks(matrix.segment / LANE)).enumerate() {
                    if planes.is_empty() {
                        let [upper, lower] = both::<CODES>(matrix, these, &[], x_s, [0; 2]);
                        sums.take(s, None, &upper, &lower);
                    }
                    let excess = x.sums[s].map(|sum| -128 * sum);
                    for plane in planes.clone() {
                        let table = &matrix.tables[plane][..];
                        let [upper, lower] = match plane < planes.start + 2 {
                            true => both::<FIRST>(matrix, these, table, x_s, excess),
                            false => both::<LATER>(matrix, these, table, x_s, [excess[0], 0]),
                        };
                        sums.take(s, Some(plane), &upper, &lower);
                    }
                }
                sums.rounded()
            }

            /// The sums of `upper` and of `lower` of all rows, `excess` added.
            #[target_feature(enable = $features)]
            #[inline]
            fn both<const KIND: u8>(
                matrix: &Octets,
                lines: &[Line],
                tables: &[[u8; 16]],
                x: &[$x],
                excess: [i32; 2],
            ) -> [[i32; ROWS]; 2] {
                let mut out = [[0; ROWS]; 2];
                for half in 0..2 {
                    let sums = segment::<KIND>(matrix, lines, half, tables, x);
                    for (i, sums) in sums.into_iter().enumerate() {
                        for d in 0..2 {
                            out[d][i / 2 + 2 * half + 4 * (i % 2)] = sums[d].wrapping_add(excess[d]);
                        }
                    }
                }
                out
            }

            /// Sums of a half of both quads: of its first row in the first quad and in the second, then of its second.
            #[target_feature(enable = $features)]
            #[inline]
            fn segment<const KIND: u8>(
                matrix: &Octets,
                lines: &[Line],
                half: usize,
                tables: &[[u8; 16]],
                x: &[$x],
            ) -> [[i32; 2]; 4] {
                let mut table = [_mm256_setzero_si256(); 2];
                if KIND != CODES {
                    for (q, table) in table.iter_mut().enumerate() {
                        let tables: &[[u8; 16]; 2] = tables[4 * q + 2 * half..].first_chunk().expect("two rows");
                        // SAFETY: two tables are 32 bytes.
                        *table = unsafe { _mm256_loadu_si256(tables.as_ptr().cast()) };
                    }
                }
                let load = |pair: &[Line; 2]| {
                    [0, 1].map(|q| {
                        let half: &[u8; 32] = pair[q].0[32 * half..].first_chunk().expect("half a line");
                        // SAFETY: 32 bytes are there; the load needs no alignment. What lies AHEAD is not read.
                        unsafe {
                            _mm_prefetch::<_MM_HINT_T0>(half.as_ptr().wrapping_add(AHEAD).cast());
                            _mm256_loadu_si256(half.as_ptr().cast())
                        }
                    })
                };
                let mut sums = [[_mm256_setzero_si256(); $sums]; 2];
                let (three, four) = (_mm256_set1_epi8(7), _mm256_set1_epi8(15));
                let step = |sums: &mut [Accumulators; 2], codes: [__m256i; 2], mask: __m256i, x: &[$x; 2]| {
                    let lower = codes.map(|codes| _mm256_and_si256(codes, mask));
                    let upper = codes.map(|codes| _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask));
                    for (codes, x) in [lower, upper].into_iter().zip(x) {
                        let byte =
                            |q: usize| if KIND == CODES { codes[q] } else { _mm256_shuffle_epi8(table[q], codes[q]) };
                        add::<KIND>(sums, [byte(0), byte(1)], x);
                    }
                };
                let packed = matrix.packed_channels(LANE * x.len());
                let (blocks, rest) = x.split_at(packed / LANE);
                let (packed, nibbles) = lines.split_at(packed / BLOCK * 6);
                for (x, lines) in blocks.as_chunks::<{ BLOCK / LANE }>().0.iter().zip(packed.as_chunks::<6>().0) {
                    let (x, lines) = (x.as_chunks::<2>().0, lines.as_chunks::<2>().0);
                    let mut spare = [_mm256_setzero_si256(); 2];
                    for j in 0..3 {
                        let codes = load(&lines[j]);
                        for q in 0..2 {
                            let bits = _mm256_and_si256(codes[q], _mm256_set1_epi8(0x88u8 as i8));
                            let bits = match j {
                                0 => _mm256_srli_epi16::<3>(bits),
                                1 => _mm256_srli_epi16::<2>(bits),
                                _ => _mm256_srli_epi16::<1>(bits),
                            };
                            spare[q] = _mm256_or_si256(spare[q], bits);
                        }
                        step(&mut sums, codes, three, &x[j]);
                    }
                    step(&mut sums, spare, three, &x[3]);
                }
                if matrix.is_wide() {
                    rest.iter().zip(nibbles.as_chunks::<2>().0).for_each(|(x, lines)| add::<KIND>(&mut sums, load(lines), x));
                } else {
                    for (x, lines) in rest.as_chunks::<2>().0.iter().zip(nibbles.as_chunks::<2>().0) {
                        step(&mut sums, load(lines), four, x);
                    }
                }
                let [a, b] = [close(sums[0]), close(sums[1])].map(|[upper, lower]| _mm256_hadd_epi32(upper, lower));
                let sums = _mm256_hadd_epi32(a, b);
                let mut out = [[0; 2]; 4];
                // SAFETY: eight numbers; the store needs no alignment.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sums) };
                out
            }
        }
    };
}

narrow!(
    vnni,
    "avx2,avxvnni",
    4,
    digits: [[i8; LANE]; 4],
    fn add<const KIND: u8>(sums: &mut [Accumulators; 2], bytes: [__m256i; 2], x: &[[i8; LANE]; 4]) {
        for (d, digits) in x.iter().enumerate().take(digits(KIND)) {
            // SAFETY: 16 bytes are there; the load needs no alignment.
            let digits = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(digits.as_ptr().cast()) });
            for q in 0..2 {
                sums[q][d] = _mm256_dpbusd_avx_epi32(sums[q][d], bytes[q], digits);
            }
        }
    },
    fn close([high, middle, third, fourth]: Accumulators) -> [__m256i; 2] {
        let upper = _mm256_add_epi32(_mm256_slli_epi32::<8>(high), middle);
        [upper, _mm256_add_epi32(_mm256_slli_epi32::<7>(third), fourth)]
    }
);

narrow!(
    words,
    "avx2",
    2,
    words: [[i16; LANE / 2]; 4],
    fn add<const KIND: u8>(sums: &mut [Accumulators; 2], bytes: [__m256i; 2], x: &[[i16; LANE / 2]; 4]) {
        // Bytes of even and of odd channels as 16-bit numbers.
        let even = bytes.map(|bytes| _mm256_and_si256(bytes, _mm256_set1_epi16(255)));
        let odd = bytes.map(|bytes| _mm256_srli_epi16::<8>(bytes));
        for (i, words) in x.iter().enumerate().take(digits(KIND)) {
            // SAFETY: eight numbers are 16 bytes; the load needs no alignment.
            let words = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(words.as_ptr().cast()) });
            let bytes = if i % 2 == 0 { even } else { odd };
            for q in 0..2 {
                sums[q][i / 2] = _mm256_add_epi32(sums[q][i / 2], _mm256_madd_epi16(bytes[q], words));
            }
        }
    },
    fn close(sums: Accumulators) -> [__m256i; 2] {
        sums
    }
);
