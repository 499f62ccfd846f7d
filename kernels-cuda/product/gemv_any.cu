// The product of one token with a matrix of any kind, in f32: the obvious version, for every number of bits,
// for type float32 and for --compile 0. One warp per row.
//
//   y[row] = ADD·y[row] + Σ_k W[row, k] · x[k] + bias[row]
//   kind 0  W = lut[row, code]                                     lut f32 [R, 2^bits]
//   kind 1  W = q_bias[row, g] + Σ_b (2·bit_b − 1)·alpha[row, g, b] alpha f32 [R, K / group, bits]
//   kind 2  W = values[row, k]                                     values f32 [R, K]
//   codes u8 [R, K]; x f32 [K]; y f32 [R]
//
// dequant_any writes the same W out, [R, K], as f32 or as 16-bit numbers.
#include "common.cuh"

struct Any {
    const u8* codes;
    const float* values; // lut, alpha or values
    const float* centres; // q_bias
    const float* bias;
    int in_features;
    int out_features;
    int bits;
    int kind;
    int group;
    int add;
};

__device__ __forceinline__ float weight(const Any& m, int row, int k) {
    long long at = (long long)row * m.in_features + k;
    if (m.kind == 2) return m.values[at];
    int code = m.codes[at];
    if (m.kind == 0) return m.values[(row << m.bits) + code];
    long long g = (long long)row * (m.in_features / m.group) + k / m.group;
    float w = m.centres[g];
    for (int b = 0; b < m.bits; b++) {
        float alpha = m.values[g * m.bits + b];
        w += code >> b & 1 ? alpha : -alpha;
    }
    return w;
}

extern "C" __global__ void __launch_bounds__(256) gemv_any(const __grid_constant__ Any m, const float* x, float* y) {
    wait_for_previous();
    let_next_start();
    int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= m.out_features) return;
    float sum = 0;
#pragma unroll 4
    for (int k = threadIdx.x % 32; k < m.in_features; k += 32) sum = fmaf(weight(m, row, k), x[k], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        if (m.bias) sum += m.bias[row];
        y[row] = m.add ? y[row] + sum : sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) dequant_any(const __grid_constant__ Any m, void* out) {
    wait_for_previous();
    let_next_start();
    int row = blockIdx.x;
    for (int k = threadIdx.x; k < m.in_features; k += 256) {
        float w = weight(m, row, k);
        long long at = (long long)row * m.in_features + k;
        if (DTYPE == 2)
            ((float*)out)[at] = w;
        else
            ((u16*)out)[at] = narrow(w);
    }
}
