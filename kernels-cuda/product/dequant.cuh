// A packed matrix back to rows, for products of many tokens: out [R, K], 16-bit numbers of DTYPE.
// One warp per tile and unit.
#pragma once

struct Packed {
    const uint4* codes;
    const char* aux;
    const u16* lut;
    u16* out;
};

__device__ __forceinline__ void dequant(const Packed& m) {
    wait_for_previous();
    let_next_start();
    long long unit = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (unit >= (long long)TILES * UNITS) return;
    int tile = unit / UNITS, first = unit % UNITS * UNIT;
#ifdef PLANES
    const u16* values = m.lut + ((long long)tile * 16 << BITS);
#elif defined(GROUPED)
    const float2* values = (const float2*)(m.aux + unit * AUX_BYTES);
#else
    const char* values = nullptr;
#endif
    dequantize(m.codes + unit * (VECTORS * 32), values, [&](int r, int k, uint4 eight) {
        int row = tile * 16 + r;
        if (row < R && first + k < K) *(uint4*)(m.out + (long long)row * K + first + k) = eight;
    });
}
