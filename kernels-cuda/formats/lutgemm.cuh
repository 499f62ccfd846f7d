// Codes of uniform groups (spec §2.2): BITS 3, 4 or 8, GROUP 32, 64 or 128.
//
//   W[row, k] = step·code + base,   step = 2·alpha_0,  base = q_bias + alpha_0 − step·2^(BITS−1)
//   Σ_k W·x   = Σ_g step·Σ_{k in g} code·x + base·Σ_{k in g} x
//
//   codes  4 bits: units of 256 channels. Nibble 2·n of a word is channel 4·odd + n of lane t's eight in row g, nibble
//          2·n + 1 the same in row g + 8, where `odd` is the word's place in a pair; vector v holds products 2·v and
//          2·v + 1.
//          3 bits: the same, but word i of vectors 0, 1, 2 holds words 0, 1, 2 of what would be vector i, and in the spare
//          bits of its nibbles bits 0, 1, 2 of word 3.
//          8 bits: units of 128 channels. Vector p holds product p: channels 8·t to 8·t + 7 of row g, then of row g + 8.
//   aux    f32 [tiles, units, UNIT / GROUP, 16 rows, (step, base)]
//
// Codes are bytes for the tensor cores as they are; those of row g + 8, which stay in the upper halves of bytes, are
// sixteen times as large, which their step takes back (HIGH).
// Matrices whose alphas are not powers of two apart go through gemv_any.cu.
#pragma once
#if BITS == 3
#define VECTORS 3
#else
#define VECTORS 4
#endif
#define UNIT (BITS == 8 ? 128 : 256)
#define HIGH (BITS == 8 ? 1.0f : 0.0625f)
#define AUX_BYTES (UNIT * 128 / GROUP)
#define AUX_PER_UNIT 1
#define INTEGERS 1
#define GROUPED 1

#include "common.cuh"

// Hands on the operands of one product at a time: operands(p, a) with channels 32·p to 32·p + 31. `codes`: this lane's
// first. When it has read them, taken().
template <class Operands, class Taken>
__device__ __forceinline__ void expand(const uint4* codes, Operands operands, Taken taken) {
#if BITS == 8
#pragma unroll
    for (int p = 0; p < 4; p++) {
        uint4 w = codes[32 * p];
        if (p == 3) taken();
        u32 a[4] = {w.x, w.z, w.y, w.w};
        operands(p, a);
    }
#else
#if BITS == 3
    uint4 x = codes[0], y = codes[32], z = codes[64];
    taken();
#endif
    constexpr u32 mask = BITS == 3 ? 0x07070707u : 0x0f0f0f0fu;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 3
        uint4 w = make_uint4(word(x, i), word(y, i), word(z, i), 0);
        w.w = (w.x >> 3 & 0x11111111u) | (w.y >> 2 & 0x22222222u) | (w.z >> 1 & 0x44444444u);
#else
        uint4 w = codes[32 * i];
        if (i == 3) taken();
#endif
        u32 even[4] = {w.x & mask, w.x & mask << 4, w.y & mask, w.y & mask << 4};
        u32 odd[4] = {w.z & mask, w.z & mask << 4, w.w & mask, w.w & mask << 4};
        operands(2 * i, even);
        operands(2 * i + 1, odd);
    }
#endif
}

// A unit's weights as 16-bit numbers: write(row of the 16, channel, eight of them), once for each lane, product and row.
template <class Write>
__device__ __forceinline__ void dequantize(const uint4* codes, const float2* groups, Write write) {
    u32 lane = this_lane();
    expand(codes + lane, [&](int p, const u32* a) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float2 s = groups[p / (GROUP / 32) * 16 + lane / 4 + 8 * h];
            if (h) s.x *= HIGH;
            u32 two[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 codes = a[h + i / 2 * 2] >> i % 2 * 16;
                two[i] = narrow2(fmaf(s.x, codes & 255, s.y), fmaf(s.x, codes >> 8 & 255, s.y));
            }
            write(lane / 4 + 8 * h, 32 * p + lane % 4 * 8, make_uint4(two[0], two[1], two[2], two[3]));
        }
    }, [] {});
}
