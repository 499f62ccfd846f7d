// Codes of one codebook per row, W[row, k] = lut[row, code(row, k)] (spec §2.1): BITS 3 or 4, PLANES 1 or 2.
//
//   codes  units of 256 channels. Nibble n of a word: rows g (n < 4) and g + 8 (n ≥ 4), channel 4·odd + n % 4 of
//          lane t's eight, where `odd` is the word's place in a pair of products.
//          4 bits: vector v holds products 4·v to 4·v + 3.
//          3 bits: word i of vectors 0, 1, 2 holds products 4·i, 4·i + 1, 4·i + 2, and in the spare bits of its
//          nibbles bits 0, 1, 2 of product 4·i + 3.
//   aux    of each tile: codebooks as bytes [PLANES][16 rows][2^BITS], then f32 [16 rows] (scale, offset)
//          lut[row, c] = scale·q + offset, q = the byte of plane 0; with two planes PLANE times that and the byte of plane 1
//   lut    of each tile: f16 or bf16 [16 rows][2^BITS]
//
// Codes are looked up four at a time by byte permutation, and what comes out is an operand of the product as it is:
// nothing is unpacked. At 4 bits a permutation reaches half a codebook; for a code with its top bit set it puts out eight
// times the top bit of a byte, 0 or −1. So an entry is a sum of two products, one with each half of the codebook (the
// other one by codes whose top bit is flipped), in which what an entry of the other half puts out has been added before:
//   entry c = first[c] − [second[c] < 0] for c < 8,   entry c + 8 = second[c] − [first[c] < 0]
#pragma once
#if BITS == 3
#define VECTORS 3
#define HALVES 1
#define PLANE 256.0f
#else
#define VECTORS 4
#define HALVES 2
// Halves of a codebook leave 255 values to a byte.
#define PLANE 255.0f
#endif
#define UNIT 256
#define BOOK_BYTES (PLANES * (16 << BITS))
#define AUX_BYTES (BOOK_BYTES + 128)
#define AUX_PER_UNIT 0
#define INTEGERS 1
#define GROUP 256

#include "common.cuh"

// w >> 16 as a sum of products, w's halves by the bytes of 0x0100: permutations, masks and shifts share one pipe.
__device__ __forceinline__ u32 upper(u32 w) {
    u32 d;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(0x0100), "r"(0));
    return d;
}

// This lane's rows' codebooks.
struct Book {
    u32 entries[2][PLANES][1 << (BITS - 2)];

    __device__ __forceinline__ Book() {}
    __device__ __forceinline__ Book(const char* books, u32 lane) {
        const u32* own = (const u32*)(books + (lane / 4 << BITS));
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
                for (int i = 0; i < 1 << (BITS - 2); i++)
                    entries[h][plane][i] = own[((plane * 16 + 8 * h) << (BITS - 2)) + i];
    }

    // Four bytes of row g and four of row g + 8, by the lower and the upper half of `codes`, from a half of the codebooks.
    __device__ __forceinline__ void look_up(int plane, int half, u32 codes, u32& low, u32& high) const {
        const u32 *first = entries[0][plane] + 2 * half, *second = entries[1][plane] + 2 * half;
        if (half) codes ^= 0x88888888u;
        low = prmt(first[0], first[1], codes);
        high = prmt(second[0], second[1], upper(codes));
    }
};

// Hands on the codes of one product at a time: operands(p, first, second), channels 8·t to + 3 and + 4 to + 7 of
// 32·p on. `codes`: this lane's first. When it has read them, taken().
template <class Operands, class Taken>
__device__ __forceinline__ void expand(const uint4* codes, Operands operands, Taken taken) {
#if BITS == 3
    uint4 a = codes[0], b = codes[32], c = codes[64];
    taken();
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 3
        uint4 w = make_uint4(word(a, i), word(b, i), word(c, i), 0);
        u32 x = w.x & 0x88888888u, y = w.y & 0x88888888u, z = w.z & 0x88888888u;
        w.w = x >> 3 | y >> 2 | z >> 1;
        w.x -= x, w.y -= y, w.z -= z;
#else
        uint4 w = codes[32 * i];
        if (i == 3) taken();
#endif
        operands(2 * i, w.x, w.y);
        operands(2 * i + 1, w.z, w.w);
    }
}

// A unit's weights as 16-bit numbers: write(row of the 16, channel, eight of them), once for each lane, product and row.
template <class Write>
__device__ __forceinline__ void dequantize(const uint4* codes, const u16* lut, Write write) {
    u32 lane = this_lane();
    expand(codes + lane, [&](int p, u32 first, u32 second) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 own = prmt(first, second, h ? 0x7632 : 0x5410), two[4];
            const u16* row = lut + ((lane / 4 + 8 * h) << BITS);
#pragma unroll
            for (int i = 0; i < 4; i++, own >>= 8)
                two[i] = row[own & 15] | (u32)row[own >> 4 & 15] << 16;
            write(lane / 4 + 8 * h, 32 * p + lane % 4 * 8, make_uint4(two[0], two[1], two[2], two[3]));
        }
    }, [] {});
}
