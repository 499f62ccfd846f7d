// 16-bit numbers (the head, and full-precision models).
//
//   codes  units of 64 channels: vector 2·p + h holds, for lane 4·g + t, channels 32·p + 8·t to + 7 of row g + 8·h
#pragma once
#define VECTORS 4
#define UNIT 64
#define AUX_BYTES 0
#define AUX_PER_UNIT 0
#define INTEGERS 0
#define GROUP UNIT

#include "common.cuh"

// Hands on the operands of two products at a time: operands(p, a) with channels 32·p to 32·p + 31. `codes`: this lane's
// first. When it has read them, taken().
template <class Operands, class Taken>
__device__ __forceinline__ void expand(const uint4* codes, Operands operands, Taken taken) {
#pragma unroll
    for (int p = 0; p < 2; p++) {
        uint4 low = codes[64 * p], high = codes[64 * p + 32];
        u32 a[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
        if (p == 1) taken();
        operands(p, a);
    }
}

// A unit's weights: write(row of the 16, channel, eight of them), once for each lane, product and row.
template <class Write>
__device__ __forceinline__ void dequantize(const uint4* codes, const char*, Write write) {
    u32 lane = this_lane();
    expand(codes + lane, [&](int p, const u32* a) {
#pragma unroll
        for (int h = 0; h < 2; h++)
            write(lane / 4 + 8 * h, 32 * p + lane % 4 * 8, make_uint4(a[h], a[h + 2], a[h + 4], a[h + 6]));
    }, [] {});
}
