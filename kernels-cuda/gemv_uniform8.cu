// Product with uniform groups of 8 bits (spec §2.2; a rounded head, mostly): a byte per code, GROUP 32, 64 or 128.
//
//   W[row, k] = step·(code − 128) + centre,   step = 2·alpha_0,  centre = q_bias + alpha_0
//   Σ_k W·x   = Σ_g step·Σ_{k in g} (code − 128)·x + centre·Σ_{k in g} x
//
//   codes  units of 128 channels: vector p holds, for lane 4·g + t, channels 32·p + 8·t to + 7 of row g, then those
//          of row g + 8
//   aux    f32 [tiles, units, 128 / GROUP, 16 rows, (step, centre)]
//
// code − 128 is exact in either type. Matrices whose alphas are not powers of two apart go through gemv_any.cu.
#define VECTORS 4
#define UNIT 128
#define AUX_BYTES (16384 / GROUP)
#define AUX_PER_UNIT 1
#define GROUPED 1

#include "common.cuh"

// Codes 2·I and 2·I + 1 of a word, less 128 each.
template <int I>
__device__ __forceinline__ u32 integers(u32 codes) {
#if DTYPE == 1
    // bfloat16 has too few bits to hold a code above a base: through f32, above 2^23.
    constexpr u32 first = 0x7440 + 2 * I;
    float lo = __uint_as_float(prmt(codes, 0x4b000000u, first)) - 8388736.0f;
    float hi = __uint_as_float(prmt(codes, 0x4b000000u, first + 1)) - 8388736.0f;
    return narrow2(lo, hi);
#else
    // Into the mantissa of 1024; then less 1152.
    return fma2(prmt(codes, 0x64646464u, 0x4140 + 0x202 * I), 0x3c003c00u, 0xe480e480u);
#endif
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
    // Narrow groups need registers for their steps: all four vectors at once would spill (sm_120).
#pragma unroll(GROUP == 32 ? 2 : 4)
    for (int p = 0; p < 4; p++) {
        uint4 w = codes[32 * p + threadIdx.x % 32];
        if (p == 3) taken();
        u32 a[8] = {integers<0>(w.x), integers<0>(w.z), integers<1>(w.x), integers<1>(w.z),
                    integers<0>(w.y), integers<0>(w.w), integers<1>(w.y), integers<1>(w.w)};
        operands(p, a);
    }
}

#include "gemv.cuh"
#include "dequant.cuh"

extern "C" __global__ void dequant_uniform8(const __grid_constant__ Packed m) { dequant(m); }

extern "C" __global__ void __launch_bounds__(ALL_THREADS, MIN_BLOCKS) gemv_uniform8(const __grid_constant__ Gemv g) { gemv(g); }
