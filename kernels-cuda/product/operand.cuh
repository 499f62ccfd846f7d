// How a product's input x lies in shared memory, and how it comes there.
//
// INTEGERS 1: fixed-point numbers of 24 bits. Each 256 channels have a step, a power of two with which the largest n is
//   2^22 to 2^23, and x = step·n, n = 65536·d0 + 256·d1 + d2 with signed bytes d. The digits are three of the eight columns
//   of a tensor-core product. |x − step·n| ≤ step/2, at most 2^-23 of the 256 channels' largest; sums of n are exact.
//   DIGITS 2, for a long x where shared memory is small: 16 bits, n = 256·d0 + d1 up to 2^14 to 2^15.
//     digits   bytes [K / 64][DIGITS][64]; of each 64 channels first 0 to 7 and 32 to 39, then 8 to 15 and 40 to 47, and so on:
//              what a lane needs of two products (unit.cuh) lies together
//     steps    f32 [K / 256]
//     sums     f32 [K / GROUP], of x over each group of weights
// INTEGERS 0: 16-bit numbers of DTYPE, in order.
#pragma once
#include "common.cuh"

#if INTEGERS
#ifndef DIGITS
#define DIGITS 3
#endif
constexpr int X_BYTES = DIGITS; // a channel
#else
constexpr int X_BYTES = 2;
#endif
constexpr int BLOCK = 256; // channels that share a step: those that a warp writes at once

// Its parts, for so many channels rounded up to what a warp writes at once.
template <int CHANNELS>
struct OperandOf {
    static constexpr int PADDED = (CHANNELS + BLOCK - 1) / BLOCK * BLOCK;
    static constexpr int STEPS = INTEGERS ? (PADDED / BLOCK + 3) / 4 * 4 : 0;
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

#if INTEGERS
__device__ __forceinline__ void Operand::store(int k, const float (&v)[8]) const {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
    // As bit patterns sizes are in order, and NaN is the largest: the step, and so the product, is one then.
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(most));
    // n is less than 2^23 (2^15) by what carries between digits need.
    constexpr float LARGEST = DIGITS == 3 ? 1 << 22 : 1 << 14;
    u32 power = __float_as_uint(__uint_as_float(most) * (1 + 1.0f / 128)) & 0x7f800000u;
    float step = __uint_as_float(power) * (1.0f / LARGEST), inverse = __uint_as_float(0x7f000000u - power) * LARGEST;
    // Beyond 2^126 there is no such inverse.
    if (power > 0x7e000000u) step = __uint_as_float(0x7fffffffu);
    u32 n[8];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int whole = __float2int_rn(v[i] * inverse);
        sum += whole;
        // With 128 added to every digit none borrows from the next.
        n[i] = whole + (DIGITS == 3 ? 0x808080 : 0x8080);
    }
    char* to = digits + k / 64 * (DIGITS * 64) + k / 8 % 4 * 16 + k / 32 % 2 * 8;
#pragma unroll
    for (int d = 0; d < DIGITS; d++) {
        u32 two = 0x0040 + 0x11 * (DIGITS - 1 - d);
        u32 lo = prmt(prmt(n[0], n[1], two), prmt(n[2], n[3], two), 0x5410) ^ 0x80808080u;
        u32 hi = prmt(prmt(n[4], n[5], two), prmt(n[6], n[7], two), 0x5410) ^ 0x80808080u;
        *(uint2*)(to + d * 64) = make_uint2(lo, hi);
    }
    if (k % BLOCK == 0) steps[k / BLOCK] = step;
#pragma unroll
    for (int d = 1; d < GROUP / 8; d *= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (k % GROUP == 0) sums[k / GROUP] = sum * step;
}

// What a lane needs of a unit of x: its digits, of which the first columns of products are made, its step, and the sum or
// sums over groups of weights.
struct Part {
    uint4 digits[UNIT / 64];
    float step; // times what this lane's sums are worth
#ifdef GROUPED
    const float* sums;
#else
    float sum;
#endif

    __device__ __forceinline__ Part() {}
    __device__ __forceinline__ Part(const Operand& x, int u, u32 lane) : step(x.steps[u * UNIT / BLOCK] * worth(lane)) {
        const char* own = x.digits + u * UNIT * X_BYTES + min(lane / 4, DIGITS - 1) * 64 + lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < UNIT / 64; i++) digits[i] = *(const uint4*)(own + i * (DIGITS * 64));
#ifdef GROUPED
        sums = x.sums + u * (UNIT / GROUP);
#else
        sum = x.sums[u];
#endif
    }

    // What 256·a + b of this lane's two columns is worth in steps. Of three digits lane 4·g has the first two, lane 4·g + 1
    // twice the third. Other lanes' columns repeat that.
    static __device__ __forceinline__ float worth(u32 lane) {
        if (lane % 4 == 0) return DIGITS == 3 ? 256.0f : 1.0f;
        return DIGITS == 3 && lane % 4 == 1 ? 1.0f / 257 : 0.0f;
    }
};

// Rows g and g + 8 of what lanes 4·g and 4·g + 1 have of them: the one lane gets the one row, the other the other.
__device__ __forceinline__ float own_row(float low, float high, u32 lane) {
    bool second = lane % 2;
    return (second ? high : low) + __shfl_xor_sync(FULL, second ? low : high, 1);
}
#else
__device__ __forceinline__ void Operand::store(int k, const float (&v)[8]) const {
    u32 two[4];
#pragma unroll
    for (int i = 0; i < 4; i++) two[i] = narrow2(v[2 * i], v[2 * i + 1]);
    *(uint4*)(digits + k * 2) = make_uint4(two[0], two[1], two[2], two[3]);
}

// What a lane needs of a unit of x.
struct Part {
    const uint4* numbers;

    __device__ __forceinline__ Part() {}
    __device__ __forceinline__ Part(const Operand& x, int u, u32 lane)
        : numbers((const uint4*)(x.digits + u * UNIT * X_BYTES) + lane % 4) {}
};
#endif
