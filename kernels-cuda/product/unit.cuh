// What a span of a tile's channels adds to its 16 rows, for one token, on the tensor cores: what a warp keeps while it
// multiplies. Needs one of anyprec.cuh, lutgemm.cuh or dense.cuh before it, which say how a unit's codes become
// operands: lane 4·g + t holds rows g and g + 8 and, of product p, channels 32·p + 8·t to + 7.
//
//   begin(aux, lane)             the next spans are of a tile with these codebooks
//   add(codes, x, lane, taken)   a unit's part of x with this lane's codes; taken() when they have been read
//   span(lane)                   what the units since the last span add to the row that this lane writes: lane 4·g + t has
//                                row g + 8·t for t of 0 and 1 (row_of)
//
// W = scale·q + offset by rows or by groups of channels, q whole numbers: the sums of q times a span's fixed-point
// activations are exact. What is made of them is rounded five times at most (two digits and the third to f32, their sum,
// the offset's part, the whole), each within 2^-24 of Σ|scale·q·x| + Σ|offset·x| over the span.
#pragma once
#include "operand.cuh"

// A unit as it lies in shared memory: codes, then what comes with them.
constexpr int STAGE_BYTES = VECTORS * 512 + AUX_BYTES;

// Units of a span. A tile's last span may have fewer.
constexpr int SPAN_UNITS = SPAN / UNIT;

// The row of a tile that a lane writes.
__device__ __forceinline__ u32 row_of(u32 lane) { return lane / 4 + lane % 2 * 8; }

#if !INTEGERS
// What a lane needs of a unit of x.
struct Part {
    const uint4* numbers;

    __device__ __forceinline__ Part() {}
    __device__ __forceinline__ Part(const Operand& x, int u, u32 lane)
        : numbers((const uint4*)(x.digits + u * UNIT * X_BYTES) + lane % 4) {}
};

// Sums of a tile's rows g and g + 8, in two chains.
struct Unit {
    float d[2][4];

    __device__ __forceinline__ void begin(const char*, u32) { clear(); }

    template <class Taken>
    __device__ __forceinline__ void add(const uint4* codes, const Part& x, u32, Taken taken) {
        expand(codes, [&](int p, const u32* a) {
            uint4 v = x.numbers[4 * p];
            mma(d[0], a[0], a[1], a[2], a[3], v.x, v.y);
            mma(d[1], a[4], a[5], a[6], a[7], v.z, v.w);
        }, taken);
    }

    // Every column of a product is the same token.
    __device__ __forceinline__ float span(u32 lane) {
        float sum = lane % 2 ? __fadd_rn(d[0][2], d[1][2]) : __fadd_rn(d[0][0], d[1][0]);
        clear();
        return sum;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0;
    }
};
#else
// What a lane needs of a unit of x: its digits, of which the first columns of products are made, its step, and the sum or
// sums over groups of weights.
struct Part {
    uint4 digits[UNIT / 64];
    float step; // times what this lane's sums are worth
    int radix;  // what the first of this lane's two columns is worth of the second
#ifdef GROUPED
    const float* sums;
#else
    float sum;
#endif

    __device__ __forceinline__ Part() {}
    // Of three digits lane 4·g has the first two, lane 4·g + 1 twice the third, of which it takes the second. Other lanes'
    // columns repeat that.
    __device__ __forceinline__ Part(const Operand& x, int u, u32 lane)
        : step(__fmul_rn(x.steps[u * UNIT / SPAN], lane % 4 == 0 ? 256.0f : lane % 4 == 1 ? 1.0f : 0.0f)),
          radix(lane % 4 == 0 ? 256 : 0) {
        const char* own = x.digits + u * UNIT * X_BYTES + min(lane / 4, DIGITS - 1) * 64 + lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < UNIT / 64; i++) digits[i] = *(const uint4*)(own + i * (DIGITS * 64));
#ifdef GROUPED
        sums = x.sums + u * (UNIT / GROUP);
#else
        sum = x.sums[u];
#endif
    }
};

// Rows g and g + 8 of what lanes 4·g and 4·g + 1 have of them: the one lane gets the one row, the other the other.
__device__ __forceinline__ float own_row(float low, float high, u32 lane) {
    bool second = lane % 2;
    return __fadd_rn(second ? high : low, __shfl_xor_sync(FULL, second ? low : high, 1));
}

// This lane's part of a row's sum: columns i and i + 1 of two chains.
__device__ __forceinline__ float part_of(const int (&a)[4], const int (&b)[4], int i, int radix) {
    return (a[i] + b[i]) * radix + (a[i + 1] + b[i + 1]);
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
                low = fmaf(__fmul_rn(s.x, x.step), part_of(d[0], d[1], 0, x.radix), fmaf(s.y, sum, low));
                high = fmaf(__fmul_rn(t.x, x.step * HIGH), part_of(d[0], d[1], 2, x.radix), fmaf(t.y, sum, high));
#pragma unroll
                for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0;
            }
        }, taken);
    }

    __device__ __forceinline__ float span(u32 lane) {
        float sum = own_row(low, high, lane);
        low = high = 0;
        return sum;
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
        low = part_of(d[0][0], d[1][0], 0, x.radix), high = part_of(d[0][0], d[1][0], 2, x.radix);
#if PLANES == 2
        low = fmaf(low, PLANE, part_of(d[0][PLANES - 1], d[1][PLANES - 1], 0, x.radix));
        high = fmaf(high, PLANE, part_of(d[0][PLANES - 1], d[1][PLANES - 1], 2, x.radix));
#endif
        low = __fmul_rn(low, x.step), high = __fmul_rn(high, x.step), sum = x.sum;
    }

    __device__ __forceinline__ float span(u32 lane) const {
        return fmaf(row.x, own_row(low, high, lane), __fmul_rn(row.y, sum));
    }
};
#endif
#endif
