// Codes of uniform groups (spec §2.2) to operands: BITS 3 or 4, GROUP 32, 64 or 128.
//
//   W[row, k] = step·(code − 2^(BITS−1)) + centre,   step = 2·alpha_0,  centre = q_bias + alpha_0
//   Σ_k W·x   = Σ_g step·Σ_{k in g} (code − 2^(BITS−1))·x + centre·Σ_{k in g} x
//
//   codes  units of 256 channels, as in anyprec.cuh but for the order of nibbles in a word: pairs (n, n + 4)
//          hold channels (0, 1) and (2, 3) of row g, then of row g + 8
//   aux    f32 [tiles, units, 256 / GROUP, 16 rows, (step, centre)]
//
// Codes become small integers (exact in either type) by or-ing them into the mantissa of 1024 (or 128).
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
// 1024 and −(1024 + 2^(BITS−1)) in f16, 128 and −(128 + 2^(BITS−1)) in bf16, twice each.
#define BASE (DTYPE == 1 ? 0x43004300u : 0x64006400u)
#define MINUS_BASE (DTYPE == 1 ? (BITS == 3 ? 0xc304c304u : 0xc308c308u) : (BITS == 3 ? 0xe404e404u : 0xe408e408u))
#define ONE (DTYPE == 1 ? 0x3f803f80u : 0x3c003c00u)

__device__ __forceinline__ u32 integers(u32 codes) { return fma2(and_or(codes, MASK, BASE), ONE, MINUS_BASE); }

__device__ __forceinline__ void integers(u32 codes, u32* a) {
    a[0] = integers(codes), a[2] = integers(codes >> 4);
    a[1] = integers(codes >> 8), a[3] = integers(codes >> 12);
}

// Nothing comes with the codes that their operands need.
struct Book {
    __device__ __forceinline__ Book() {}
    __device__ __forceinline__ explicit Book(const uint4*) {}
};

// Hands on the operands of two products at a time: operands(p, a) with channels 32·p to 32·p + 31.
template <class Operands>
__device__ __forceinline__ void expand(const uint4* codes, const Book&, Operands operands) {
    int lane = threadIdx.x % 32;
#if BITS == 3
    uint4 a = codes[lane], b = codes[32 + lane], c = codes[64 + lane];
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 3
        uint4 w = make_uint4(word(a, i), word(b, i), word(c, i), 0);
        w.w = (w.x >> 3 & 0x11111111u) | (w.y >> 2 & 0x22222222u) | (w.z >> 1 & 0x44444444u);
#else
        uint4 w = codes[32 * i + lane];
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
