// Sums of one tile's 16 rows over units of its channels, on the tensor cores: what a warp keeps while it multiplies.
// Needs one of anyprec.cuh, lutgemm.cuh or gemv_dense.cu's expand() before it.
#pragma once
#include "common.cuh"

// Sums of x that a unit needs besides x: one per group.
#ifdef GROUPED
constexpr int GROUP_SUMS = UNIT / GROUP;
#else
constexpr int GROUP_SUMS = 0;
#endif
// A unit as it lies in shared memory: codes, then what comes with them.
constexpr int STAGE_BYTES = VECTORS * 512 + AUX_BYTES;

#ifdef GROUPED
// Sums of a tile's rows g and g + 8, of integer codes that become weights group by group.
struct Unit {
    float low, high;

    __device__ __forceinline__ void begin(const uint4*) { low = high = 0; }

    template <class Taken>
    __device__ __forceinline__ void add(const uint4* slot, const u16* x, const float* group_sums, Taken taken) {
        const float2* steps = (const float2*)(slot + VECTORS * 32) + threadIdx.x % 32 / 4;
        const uint4* xs = (const uint4*)x + threadIdx.x % 4;
        float d[2][4] = {};
        expand(slot, Book(slot), [&](int p, const u32* a) {
            uint4 v = xs[4 * p];
            mma(d[0], a[0], a[1], a[2], a[3], v.x, v.y);
            mma(d[1], a[4], a[5], a[6], a[7], v.z, v.w);
            int j = p / (GROUP / 32);
            if (p % (GROUP / 32) == GROUP / 32 - 1) {
                float2 s = steps[j * 16], t = steps[j * 16 + 8];
                low = fmaf(s.x, d[0][0] + d[1][0], fmaf(s.y, group_sums[j], low));
                high = fmaf(t.x, d[0][2] + d[1][2], fmaf(t.y, group_sums[j], high));
#pragma unroll
                for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0;
            }
        }, taken);
    }

    // Every column of a product is the same token, so lane t = 0 of each row has the sum.
    __device__ __forceinline__ void store(float* rows) const {
        int lane = threadIdx.x % 32;
        if (lane % 4 == 0) rows[lane / 4] = low, rows[lane / 4 + 8] = high;
    }
};
#else
// Sums of a tile's rows g and g + 8, in two chains.
struct Unit {
    float d[2][4];
    Book book;

    __device__ __forceinline__ void begin(const uint4* aux) {
        book = Book(aux);
#pragma unroll
        for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0;
    }

    template <class Taken>
    __device__ __forceinline__ void add(const uint4* slot, const u16* x, const float*, Taken taken) {
        const uint4* xs = (const uint4*)x + threadIdx.x % 4;
        expand(slot, book, [&](int p, const u32* a) {
            uint4 v = xs[4 * p];
            mma(d[0], a[0], a[1], a[2], a[3], v.x, v.y);
            mma(d[1], a[4], a[5], a[6], a[7], v.z, v.w);
        }, taken);
    }

    // Every column of a product is the same token, so lane t = 0 of each row has the sum.
    __device__ __forceinline__ void store(float* rows) const {
        int lane = threadIdx.x % 32;
        if (lane % 4 == 0) rows[lane / 4] = d[0][0] + d[1][0], rows[lane / 4 + 8] = d[0][2] + d[1][2];
    }
};
#endif
