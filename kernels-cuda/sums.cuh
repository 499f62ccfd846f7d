// The order in which floats are summed. All kernels keep it, so that a row of a product and a norm have the same bits
// whichever kernel computes them, for one token or for many.
//
// A vector is cut into spans of 256 channels.
//
//   product   what a span adds to a row is one f32 (unit.cuh, tokens.cuh). Spans c, c + 16, c + 32 … are chain c, summed in
//             order; then the upper eight chains are added to the lower eight, of those the upper four to the lower four,
//             and so on
//   norm      a lane's eight squares in order, those of 32 lanes as a tree (warp_sum), then spans in order
//
// Rounding a sum of n numbers v like this is off by 2^-24·(spans / 16 + 4)·Σ|v| at most; one after the other would be
// 2^-24·spans·Σ|v|. Additions and multiplications are spelled out where a compiler could make one instruction of two.
#pragma once
#include "common.cuh"

constexpr int SPAN = 256;
constexpr int CHAINS = 16;
#define SPANS_OF(k) (((k) + SPAN - 1) / SPAN)

// Chains of a row of so many spans.
#define CHAINS_OF(spans) ((spans) < CHAINS ? (spans) : CHAINS)

// COUNT numbers, at(i), folded: the upper half is added to the lower one until one is left. COUNT is a power of two.
template <int COUNT, class At>
__device__ __forceinline__ float folded(At at) {
    if constexpr (COUNT == 1)
        return at(0);
    else
        return folded<COUNT / 2>([&](int i) { return __fadd_rn(at(i), at(i + COUNT / 2)); });
}

// A row's chains, at(chain), of which there are COUNT, together.
template <int COUNT, class At>
__device__ __forceinline__ float sum_of_chains(At at) {
    return folded<CHAINS>([&](int c) { return c < COUNT ? at(c) : 0.0f; });
}

// A row once its sum is complete: `scale` is what a norm divides the input by, inverted, or one.
__device__ __forceinline__ float finished(float sum, float scale, const float* bias, int row) {
    return bias ? fmaf(sum, scale, bias[row]) : __fmul_rn(sum, scale);
}

// Of a lane's eight channels.
__device__ __forceinline__ float squares_of(float4 a, float4 b) {
    float sum = __fmul_rn(a.x, a.x);
    sum = fmaf(a.y, a.y, sum), sum = fmaf(a.z, a.z, sum), sum = fmaf(a.w, a.w, sum);
    sum = fmaf(b.x, b.x, sum), sum = fmaf(b.y, b.y, sum), sum = fmaf(b.z, b.z, sum);
    return fmaf(b.w, b.w, sum);
}

// What a norm of `len` numbers divides by, inverted.
__device__ __forceinline__ float inverse_rms(float squares, int len, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)len), eps)));
}

// The same of a vector of which span s has squares at(s).
template <class At>
__device__ __forceinline__ float inverse_rms_of(int len, float eps, At at) {
    float sum = 0;
    for (int s = 0; s < SPANS_OF(len); s++) sum = __fadd_rn(sum, at(s));
    return inverse_rms(sum, len, eps);
}

// A normalized number, times the norm's weight, onto what it is added to.
__device__ __forceinline__ float add_normed(float v, float scale, float gamma, float to) {
    return fmaf(__fmul_rn(v, scale), gamma, to);
}
