//! The product in 256-bit instructions, two rows of both quads at once.
//!
//! A segment's codes are looked up once and kept, then multiplied by the digits of every token.

use std::arch::x86_64::*;

use super::x86::{AHEAD, CODES, FIRST, LATER, digits};
use super::{BLOCK, Digits, LANE, Line, Octets, ROWS, SEGMENT, Sums};

/// A module of products. `$features` are enabled; `$sums` sums are kept for a quad, and what was looked up for 16
/// channels takes `$kept` vectors, which `$keep` makes of a vector of bytes of each quad; `$add` adds the products of
/// those to the sums, `$close` makes the sums of `upper` and of `lower`.
macro_rules! narrow {
    (
        $name:ident, $features:literal, $sums:literal, $kept:literal, $digits:ident: $x:ty,
        $keep:item, $add:item, $close:item
    ) => {
        pub(super) mod $name {
            use super::*;

            /// Of one quad.
            type Accumulators = [__m256i; $sums];
            /// Of 16 channels.
            type Kept = [__m256i; $kept];
            /// Of a segment.
            type Segment = [Kept; SEGMENT / LANE];

            #[target_feature(enable = $features)]
            #[inline]
            $keep

            #[target_feature(enable = $features)]
            #[inline]
            $add

            #[target_feature(enable = $features)]
            #[inline]
            $close

            #[target_feature(enable = $features)]
            pub(in super::super) fn product(matrix: &Octets, first: usize, x: &[&Digits], y: &mut [f32]) {
                let rows = y.len() / x.len();
                let octet_lines = matrix.octet_lines();
                let mut sums = Vec::with_capacity(x.len());
                let mut kept: [Segment; 2] = [[[_mm256_setzero_si256(); $kept]; SEGMENT / LANE]; 2];
                for (octet, at) in (first..).zip((0..rows / ROWS * ROWS).step_by(ROWS)) {
                    sums.clear();
                    sums.extend(x.iter().map(|x| Sums::new(matrix, x, octet)));
                    let lines = &matrix.lines[octet * octet_lines..][..octet_lines];
                    let planes = matrix.planes_of(octet);
                    for (s, lines) in lines.chunks(2 * matrix.segment_lines(matrix.segment)).enumerate() {
                        if planes.is_empty() {
                            segment::<CODES>(matrix, lines, s, None, x, &mut kept, &mut sums);
                        }
                        for plane in planes.clone() {
                            match plane < planes.start + 2 {
                                true => segment::<FIRST>(matrix, lines, s, Some(plane), x, &mut kept, &mut sums),
                                false => segment::<LATER>(matrix, lines, s, Some(plane), x, &mut kept, &mut sums),
                            }
                        }
                    }
                    for (sums, y) in sums.drain(..).zip(y.chunks_exact_mut(rows)) {
                        y[at..at + ROWS].copy_from_slice(&sums.rounded());
                    }
                }
            }

            /// Has the sums take segment `s`, of a plane or of the codes themselves.
            #[target_feature(enable = $features)]
            #[inline]
            fn segment<const KIND: u8>(
                matrix: &Octets,
                lines: &[Line],
                s: usize,
                plane: Option<usize>,
                x: &[&Digits],
                kept: &mut [Segment; 2],
                sums: &mut [Sums<'_>],
            ) {
                let channels = s * matrix.segment..(s * matrix.segment + matrix.segment).min(matrix.in_features);
                let groups = channels.start / LANE..channels.end / LANE;
                for (half, kept) in kept.iter_mut().enumerate() {
                    let tables = plane.map_or(&[][..], |plane| &matrix.tables[plane]);
                    look_up::<KIND>(matrix, lines, half, tables, &mut kept[..groups.len()]);
                }
                for (x, sums) in x.iter().zip(sums) {
                    let [upper, lower] = x.sums[s].map(|sum| if KIND == CODES { 0 } else { -128 * sum });
                    let excess = [upper, if KIND == LATER { 0 } else { lower }];
                    let mut out = [[0i32; ROWS]; 2];
                    for (half, kept) in kept.iter().enumerate() {
                        let sums = multiply::<KIND>(&kept[..groups.len()], &x.$digits[groups.clone()]);
                        for (i, sums) in sums.into_iter().enumerate() {
                            for d in 0..2 {
                                out[d][i / 2 + 2 * half + 4 * (i % 2)] = sums[d].wrapping_add(excess[d]);
                            }
                        }
                    }
                    sums.take(s, plane, &out[0], &out[1]);
                }
            }

            /// Sums of a half of both quads: of its first row in the first quad and in the second, then of its second.
            #[target_feature(enable = $features)]
            #[inline]
            fn multiply<const KIND: u8>(kept: &[Kept], x: &[$x]) -> [[i32; 2]; 4] {
                let mut sums = [[_mm256_setzero_si256(); $sums]; 2];
                kept.iter().zip(x).for_each(|(kept, x)| add::<KIND>(&mut sums, kept, x));
                let [a, b] = [close(sums[0]), close(sums[1])].map(|[upper, lower]| _mm256_hadd_epi32(upper, lower));
                let sums = _mm256_hadd_epi32(a, b);
                let mut out = [[0; 2]; 4];
                // SAFETY: eight numbers; the store needs no alignment.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sums) };
                out
            }

            /// What the codes of a half of both quads stand for, or they themselves.
            #[target_feature(enable = $features)]
            #[inline]
            fn look_up<const KIND: u8>(
                matrix: &Octets,
                lines: &[Line],
                half: usize,
                tables: &[[u8; 16]],
                kept: &mut [Kept],
            ) {
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
                let (three, four) = (_mm256_set1_epi8(7), _mm256_set1_epi8(15));
                let step = |kept: &mut [Kept; 2], codes: [__m256i; 2], mask: __m256i| {
                    let lower = codes.map(|codes| _mm256_and_si256(codes, mask));
                    let upper = codes.map(|codes| _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask));
                    for (codes, kept) in [lower, upper].into_iter().zip(kept) {
                        let byte =
                            |q: usize| if KIND == CODES { codes[q] } else { _mm256_shuffle_epi8(table[q], codes[q]) };
                        *kept = keep([byte(0), byte(1)]);
                    }
                };
                let packed = matrix.packed_channels(LANE * kept.len());
                let (blocks, rest) = kept.split_at_mut(packed / LANE);
                let (packed, nibbles) = lines.split_at(packed / BLOCK * 6);
                let blocks = blocks.as_chunks_mut::<{ BLOCK / LANE }>().0;
                for (kept, lines) in blocks.iter_mut().zip(packed.as_chunks::<6>().0) {
                    let (kept, lines) = (kept.as_chunks_mut::<2>().0, lines.as_chunks::<2>().0);
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
                        step(&mut kept[j], codes, three);
                    }
                    step(&mut kept[3], spare, three);
                }
                if matrix.is_wide() {
                    let lines = nibbles.as_chunks::<2>().0;
                    rest.iter_mut().zip(lines).for_each(|(kept, lines)| *kept = keep(load(lines)));
                } else {
                    for (kept, lines) in rest.as_chunks_mut::<2>().0.iter_mut().zip(nibbles.as_chunks::<2>().0) {
                        step(kept, load(lines), four);
                    }
                }
            }
        }
    };
}

narrow!(
    vnni,
    "avx2,avxvnni",
    4,
    2,
    digits: [[i8; LANE]; 4],
    fn keep(bytes: [__m256i; 2]) -> Kept {
        bytes
    },
    fn add<const KIND: u8>(sums: &mut [Accumulators; 2], bytes: &Kept, x: &[[i8; LANE]; 4]) {
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
    4,
    words: [[i16; LANE / 2]; 4],
    fn keep([a, b]: [__m256i; 2]) -> Kept {
        // Bytes of even channels of both quads as 16-bit numbers, then those of odd ones.
        let low = _mm256_set1_epi16(255);
        [_mm256_and_si256(a, low), _mm256_and_si256(b, low), _mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b)]
    },
    fn add<const KIND: u8>(sums: &mut [Accumulators; 2], bytes: &Kept, x: &[[i16; LANE / 2]; 4]) {
        for (i, words) in x.iter().enumerate().take(digits(KIND)) {
            // SAFETY: eight numbers are 16 bytes; the load needs no alignment.
            let words = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(words.as_ptr().cast()) });
            for q in 0..2 {
                let products = _mm256_madd_epi16(bytes[2 * (i % 2) + q], words);
                sums[q][i / 2] = _mm256_add_epi32(sums[q][i / 2], products);
            }
        }
    },
    fn close(sums: Accumulators) -> [__m256i; 2] {
        sums
    }
);
