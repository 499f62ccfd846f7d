// Sums of one tile's 16 rows over units of its channels, on the tensor cores: what a warp keeps while it multiplies.
// Needs one of anyprec.cuh, lutgemm.cuh or dense.cuh before it, which say how a unit's codes become
// operands: lane 4·g + t holds rows g and g + 8 and, of product p, channels 32·p + 8·t to + 7.
//
//   begin(aux, lane)             the next sums are of a tile with these codebooks
//   add(codes, x, lane, taken)   a unit's part of x with this lane's codes; taken() when they have been read
//   store(row, lane)             the sums of the tile's 16 rows: lane 4·g + t writes row g + 8·t for t of 0 and 1, at `row`
#pragma once
#include "operand.cuh"

// A unit as it lies in shared memory: codes, then what comes with them.
constexpr int STAGE_BYTES = VECTORS * 512 + AUX_BYTES;

// The row of a tile that a lane writes.
__device__ __forceinline__ u32 row_of(u32 lane) { return lane / 4 + lane % 2 * 8; }

#if !INTEGERS
// Sums of a tile's rows g and g + 8, in two chains.
struct Unit {
    float d[2][4];

    __device__ __forceinline__ void begin(const char*, u32) {
#pragma unroll
        for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0;
    }

    template <class Taken>
    __device__ __forceinline__ void add(const uint4* codes, const Part& x, u32, Taken taken) {
        expand(codes, [&](int p, const u32* a) {
            uint4 v = x.numbers[4 * p];
            mma(d[0], a[0], a[1], a[2], a[3], v.x, v.y);
            mma(d[1], a[4], a[5], a[6], a[7], v.z, v.w);
        }, taken);
    }

    // Every column of a product is the same token.
    __device__ __forceinline__ void store(float* row, u32 lane) const {
        if (lane % 4 < 2) *row = lane % 2 ? d[0][2] + d[1][2] : d[0][0] + d[1][0];
    }
};
#else
// This lane's part of a row's sum: columns i and i + 1 of two chains.
__device__ __forceinline__ float part_of(const int (&a)[4], const int (&b)[4], int i) {
    return (a[i] + b[i]) * 256 + (a[i + 1] + b[i + 1]);
}

#ifdef GROUPED
// Sums of a tile's rows g and g + 8: W = step·code + base by groups of channels, codes being bytes.
struct Unit {
    float low, high;

    __device__ __forceinline__ void begin(const char*, u32) { low = high = 0; }

    template <class Taken>
    __device__ __forceinline__ void add(const uint4* codes, const Part& x, u32 lane, Taken taken) {
        const float2* groups = (const float2*)(codes - lane + VECTORS * 32) + lane / 4;
        int d[2][4] = {};
        expand(codes, [&](int p, const u32* a) {
            uint4 v = x.digits[p / 2];
            mma_bytes<false>(d[p % 2], a[0], a[1], a[2], a[3], p % 2 ? v.z : v.x, p % 2 ? v.w : v.y);
            int j = p / (GROUP / 32);
            if (p % (GROUP / 32) == GROUP / 32 - 1) {
                // The sum of x counts once.
                float2 s = groups[j * 16], t = groups[j * 16 + 8];
                float sum = lane % 4 == 0 ? x.sums[j] : 0.0f;
                low = fmaf(s.x * x.step, part_of(d[0], d[1], 0), fmaf(s.y, sum, low));
                high = fmaf(t.x * (x.step * HIGH), part_of(d[0], d[1], 2), fmaf(t.y, sum, high));
#pragma unroll
                for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0;
            }
        }, taken);
    }

    __device__ __forceinline__ void store(float* row, u32 lane) const {
        float sum = own_row(low, high, lane);
        if (lane % 4 < 2) *row = sum;
    }
};
#else
// Sums of a tile's rows g and g + 8: W = scale·q + offset by rows, q one or two bytes of the row's codebook.
struct Unit {
    Book book;
    float2 row; // scale and offset of the row that this lane writes
    float low, high, sum;

    __device__ __forceinline__ void begin(const char* aux, u32 lane) {
        book = Book(aux, lane);
        row = ((const float2*)(aux + BOOK_BYTES))[row_of(lane)];
        low = high = sum = 0;
    }

    template <class Taken>
    __device__ __forceinline__ void add(const uint4* codes, const Part& x, u32, Taken taken) {
        int d[2][PLANES][4] = {};
        expand(codes, [&](int p, u32 first, u32 second) {
            uint4 v = x.digits[p / 2];
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    u32 a[4];
                    book.look_up(plane, half, first, a[0], a[1]);
                    book.look_up(plane, half, second, a[2], a[3]);
                    mma_bytes<true>(d[p % 2][plane], a[0], a[1], a[2], a[3], p % 2 ? v.z : v.x, p % 2 ? v.w : v.y);
                }
        }, taken);
        float a = part_of(d[0][0], d[1][0], 0), b = part_of(d[0][0], d[1][0], 2);
#if PLANES == 2
        a = fmaf(a, PLANE, part_of(d[0][PLANES - 1], d[1][PLANES - 1], 0));
        b = fmaf(b, PLANE, part_of(d[0][PLANES - 1], d[1][PLANES - 1], 2));
#endif
        low = fmaf(a, x.step, low), high = fmaf(b, x.step, high);
        sum += x.sum;
    }

    __device__ __forceinline__ void store(float* to, u32 lane) const {
        float v = own_row(low, high, lane);
        if (lane % 4 < 2) *to = fmaf(row.x, v, row.y * sum);
    }
};
#endif
#endif
