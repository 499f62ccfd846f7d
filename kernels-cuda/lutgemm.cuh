// Codes of uniform groups (spec §2.2) to operands: BITS 3 or 4, GROUP 32, 64 or 128.
//
//   W[row, k] = step·(code − 2^(BITS−1)) + centre,   step = 2·alpha_0,  centre = q_bias + alpha_0
//   Σ_k W·x   = Σ_g step·Σ_{k in g} (code − 2^(BITS−1))·x + centre·Σ_{k in g} x
//
//   codes  units of 256 channels, as in anyprec.cuh but for the order of nibbles in a word: pairs (n, n + 4)
//          hold channels (0, 1) and (2, 3) of row g, then of row g + 8
//   aux    f32 [tiles, units, 256 / GROUP, 16 rows, (step, centre)]
//
// Codes become small integers (exact in either type) by or-ing them into the mantissa of 1024 (or 128); where it has
// room for them four bits higher, they come out sixteen times as large, which the subtraction takes back for nothing.
// Matrices whose alphas are not powers of two apart go through gemv_any.cu.
#pragma once
#if BITS == 3
#define VECTORS 3
#else
#define VECTORS 4
#endif
#define UNIT 256
#define AUX_BYTES (32768 / GROUP)
#define AUX_PER_UNIT 1
#define GROUPED 1

#include "common.cuh"

#define MASK (0x00010001u * ((1 << BITS) - 1))
#define MIDDLE (1 << (BITS - 1))
// 1024 in f16, 128 in bf16, twice.
#define BASE (DTYPE == 1 ? 0x43004300u : 0x64006400u)

// Codes at bit 0 of each half, less 2^(BITS−1).
__device__ __forceinline__ u32 integers(u32 codes) {
    constexpr u32 one = DTYPE == 1 ? 0x3f80 : 0x3c00;
    constexpr u32 minus = (DTYPE == 1 ? 0xc300 : 0xe400) + MIDDLE; // −(128 or 1024 + 2^(BITS−1))
    return fma2(and_or(codes, MASK, BASE), one * 0x10001u, minus * 0x10001u);
}

// Codes at bit 4 of each half, less 2^(BITS−1).
__device__ __forceinline__ u32 higher_integers(u32 codes) {
    if (DTYPE == 1 && BITS == 4) return integers(codes >> 4);
    constexpr u32 sixteenth = DTYPE == 1 ? 0x3d80 : 0x2c00;
    constexpr u32 minus = DTYPE == 1 ? 0xc140 : 0xd400 + 16 * MIDDLE; // −(8 + 4), −(64 + 2^(BITS−1))
    return fma2(and_or(codes, MASK << 4, BASE), sixteenth * 0x10001u, minus * 0x10001u);
}

__device__ __forceinline__ void integers(u32 codes, u32* a) {
    u32 upper = codes >> 8;
    a[0] = integers(codes), a[2] = higher_integers(codes);
    a[1] = integers(upper), a[3] = higher_integers(upper);
}

// Nothing comes with the codes that their operands need.
struct Book {
    __device__ __forceinline__ Book() {}
    __device__ __forceinline__ explicit Book(const uint4*) {}
};

// Hands on the operands of two products at a time: operands(p, a) with channels 32·p to 32·p + 31. When this lane has
// read its codes, taken().
template <class Operands, class Taken>
__device__ __forceinline__ void expand(const uint4* codes, const Book&, Operands operands, Taken taken) {
    int lane = threadIdx.x % 32;
#if BITS == 3
    uint4 a = codes[lane], b = codes[32 + lane], c = codes[64 + lane];
    taken();
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 3
        uint4 w = make_uint4(word(a, i), word(b, i), word(c, i), 0);
        w.w = (w.x >> 3 & 0x11111111u) | (w.y >> 2 & 0x22222222u) | (w.z >> 1 & 0x44444444u);
#else
        uint4 w = codes[32 * i + lane];
        if (i == 3) taken();
#endif
        u32 even[8], odd[8];
        integers(w.x, even);
        integers(w.y, even + 4);
        operands(2 * i, even);
        integers(w.z, odd);
        integers(w.w, odd + 4);
        operands(2 * i + 1, odd);
    }
}
