// Product with a matrix of 16-bit numbers (the head, and full-precision models).
//
//   codes  units of 64 channels: vector 2·p + h holds, for lane 4·g + t, channels 32·p + 8·t to + 7 of row g + 8·h
#define VECTORS 4
#define UNIT 64
#define AUX_BYTES 0
#define AUX_PER_UNIT 0
#define GROUP 64

#include "common.cuh"

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
#pragma unroll
    for (int p = 0; p < 2; p++) {
        uint4 low = codes[64 * p + lane], high = codes[64 * p + 32 + lane];
        u32 a[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
        if (p == 1) taken();
        operands(p, a);
    }
}

#include "gemv.cuh"
#include "dequant.cuh"

extern "C" __global__ void dequant_dense(const __grid_constant__ Packed m) { dequant(m); }

extern "C" __global__ void __launch_bounds__(ALL_THREADS, MIN_BLOCKS) gemv_dense(const __grid_constant__ Gemv g) { gemv(g); }
