// How a product's input x lies in memory, and how it comes there.
//
// INTEGERS 1: fixed-point numbers of 24 bits. Each span of 256 channels has a step, a power of two with which the largest n
//   is 2^22 to 2^23, and x = step·n, n = 65536·d0 + 256·d1 + d2 with signed bytes d. Digits are columns of a tensor-core
//   product. |x − step·n| ≤ step/2, at most 2^-23 of the span's largest; sums of n are exact.
// INTEGERS 0: 16-bit numbers of DTYPE.
//
// Of one token, in a block's shared memory (gemv.cuh, layers.cu):
//   digits   bytes [K / 64][3][64]; of each 64 channels first 0 to 7 and 32 to 39, then 8 to 15 and 40 to 47, and so on:
//            what a lane needs of two products (unit.cuh) lies together. Or 16-bit numbers, in order
//   steps    f32 [K / 256]
//   sums     f32 [K / GROUP], of x over each group of weights
//
// Of many, in device memory (digits.cu, tokens.cuh): for each span and each eight tokens a piece of EIGHT_BYTES:
//   digits   bytes [256 / 64][3][8 tokens][64], ordered as above; or 16-bit numbers [256 / 32][8 tokens][32]: what a warp's
//            lanes read at once lies in one row
//   steps    f32 [8 tokens], squares f32 [8], sums f32 [256 / GROUP][8]; nothing of that beside 16-bit numbers
#pragma once
#include "sums.cuh"

#ifndef GROUP
#define GROUP 256
#endif

constexpr int DIGITS = 3;
constexpr int X_BYTES = INTEGERS ? DIGITS : 2; // a channel

// Its parts of one token, for so many channels rounded up to what a warp writes at once.
template <int CHANNELS>
struct OperandOf {
    static constexpr int PADDED = (CHANNELS + SPAN - 1) / SPAN * SPAN;
    static constexpr int STEPS = INTEGERS ? (PADDED / SPAN + 3) / 4 * 4 : 0;
    static constexpr int SUMS = INTEGERS ? (PADDED / GROUP + 3) / 4 * 4 : 0;
    static constexpr int BYTES = PADDED * X_BYTES + (STEPS + SUMS) * 4;
};

// Where they are; steps and sums behind the digits.
struct Operand {
    char* digits;
    float* steps;
    float* sums;

    template <int CHANNELS>
    static __device__ __forceinline__ Operand of(char* at) {
        float* steps = (float*)(at + OperandOf<CHANNELS>::PADDED * X_BYTES);
        return Operand{at, steps, steps + OperandOf<CHANNELS>::STEPS};
    }

    // Eight channels from k on, by every lane of a warp, each lane's eight behind those of the lane before it.
    __device__ __forceinline__ void store(int k, const float (&v)[8]) const;
};

// A piece of eight tokens and one span.
constexpr int EIGHT_DIGITS = SPAN * 8 * X_BYTES;
constexpr int EIGHT_STEPS = EIGHT_DIGITS, EIGHT_SQUARES = EIGHT_STEPS + 32, EIGHT_SUMS = EIGHT_SQUARES + 32;
constexpr int EIGHT_BYTES = INTEGERS ? EIGHT_SUMS + SPAN / GROUP * 32 : EIGHT_DIGITS;

__device__ __forceinline__ uint4 narrowed8(const float (&v)[8]) {
    return make_uint4(narrow2(v[0], v[1]), narrow2(v[2], v[3]), narrow2(v[4], v[5]), narrow2(v[6], v[7]));
}

#if INTEGERS
// Eight channels of each lane, a span in all, as fixed-point numbers. Digit d of channels 8·lane on goes to
// `to + d·DIGIT_STRIDE`, the span's step to `step`, sums over groups to `sums`, SUM_STRIDE apart.
template <int DIGIT_STRIDE, int SUM_STRIDE>
__device__ __forceinline__ void store_fixed(const float (&v)[8], u32 lane, char* to, float* step_at, float* sums) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
    // As bit patterns sizes are in order, and NaN is the largest: the step, and so the product, is one then.
    most = warp_most(most);
    // n is less than 2^23 by what carries between digits need.
    constexpr float LARGEST = 1 << 22;
    u32 power = __float_as_uint(__uint_as_float(most) * (1 + 1.0f / 128)) & 0x7f800000u;
    float step = __uint_as_float(power) * (1.0f / LARGEST), inverse = __uint_as_float(0x7f000000u - power) * LARGEST;
    // Beyond 2^126 there is no such inverse.
    if (power > 0x7e000000u) step = __uint_as_float(0x7fffffffu);
    u32 n[8];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int whole = __float2int_rn(__fmul_rn(v[i], inverse));
        sum += whole;
        // With 128 added to every digit none borrows from the next.
        n[i] = whole + 0x808080;
    }
#pragma unroll
    for (int d = 0; d < DIGITS; d++) {
        u32 two = 0x0040 + 0x11 * (DIGITS - 1 - d);
        u32 lo = prmt(prmt(n[0], n[1], two), prmt(n[2], n[3], two), 0x5410) ^ 0x80808080u;
        u32 hi = prmt(prmt(n[4], n[5], two), prmt(n[6], n[7], two), 0x5410) ^ 0x80808080u;
        *(uint2*)(to + d * DIGIT_STRIDE) = make_uint2(lo, hi);
    }
    if (lane == 0) *step_at = step;
#pragma unroll
    for (int d = 1; d < GROUP / 8; d *= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (lane % (GROUP / 8) == 0) sums[lane / (GROUP / 8) * SUM_STRIDE] = __fmul_rn((float)sum, step);
}

// Where a lane's eight channels k on lie among the digits of 64, the first digit's.
__device__ __forceinline__ int place_in_64(int k) { return k / 8 % 4 * 16 + k / 32 % 2 * 8; }

__device__ __forceinline__ void Operand::store(int k, const float (&v)[8]) const {
    store_fixed<64, 1>(v, k / 8 % 32, digits + k / 64 * (DIGITS * 64) + place_in_64(k), steps + k / SPAN,
                       sums + k / SPAN * (SPAN / GROUP));
}
#else
__device__ __forceinline__ void Operand::store(int k, const float (&v)[8]) const {
    *(uint4*)(digits + k * 2) = narrowed8(v);
}
#endif
