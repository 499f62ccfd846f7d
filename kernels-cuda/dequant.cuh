// A packed matrix back to rows, for products of many tokens: out [R, K], 16-bit numbers of DTYPE.
// One warp per tile and unit.
#pragma once

struct Packed {
    const uint4* codes;
    const char* aux;
    u16* out;
};

__device__ __forceinline__ void dequant(const Packed& m) {
    wait_for_previous();
    let_next_start();
    int lane = threadIdx.x % 32;
    long long unit = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (unit >= (long long)TILES * UNITS) return;
    int tile = unit / UNITS, first = unit % UNITS * UNIT;
    const char* aux = m.aux + (AUX_PER_UNIT ? unit : tile) * AUX_BYTES;
    expand(m.codes + unit * (VECTORS * 32), Book((const uint4*)aux), [&](int p, const u32* a) {
        int k = first + 32 * p + lane % 4 * 8;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 w[4] = {a[h], a[h + 2], a[h + 4], a[h + 6]};
#ifdef GROUPED
            float2 s = ((const float2*)aux)[p / (GROUP / 32) * 16 + lane / 4 + 8 * h];
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i] = narrow2(fmaf(s.x, widen((u16)w[i]), s.y), fmaf(s.x, widen((u16)(w[i] >> 16)), s.y));
#endif
            int row = tile * 16 + lane / 4 + 8 * h;
            if (row < R && k < K) *(uint4*)(m.out + (long long)row * K + k) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }, [] {});
}
