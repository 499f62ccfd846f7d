// The product of tokens with a matrix of any kind, in f32: the obvious version, for every number of bits,
// for type float32 and for --compile 0. One warp per row and eight tokens, each token as if it were alone.
//
//   y[token, row] = ADD·y[token, row] + Σ_k W[row, k] · x[token, k] + bias[row]
//   kind 0  W = lut[row, code]                                     lut f32 [R, 2^bits]
//   kind 1  W = q_bias[row, g] + Σ_b (2·bit_b − 1)·alpha[row, g, b] alpha f32 [R, K / group, bits]
//   kind 2  W = values[row, k]                                     values f32 [R, K]
//   codes u8 [R, K]; x f32 [tokens, K]; y f32 [tokens, R]
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

template <int MOST>
__device__ __forceinline__ void multiply(const Any& m, const float* x, float* y, int row, int tokens) {
    float sums[MOST] = {};
#pragma unroll(MOST == 1 ? 4 : 1)
    for (int k = threadIdx.x % 32; k < m.in_features; k += 32) {
        float w = weight(m, row, k);
#pragma unroll
        for (int t = 0; t < MOST; t++)
            if (MOST == 1 || t < tokens) sums[t] = fmaf(w, x[(long long)t * m.in_features + k], sums[t]);
    }
#pragma unroll
    for (int t = 0; t < MOST; t++) {
        float sum = warp_sum(sums[t]);
        if (threadIdx.x % 32 > 0 || t >= tokens) continue;
        if (m.bias) sum += m.bias[row];
        float* to = y + (long long)t * m.out_features + row;
        *to = m.add ? *to + sum : sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) gemv_any(const __grid_constant__ Any m, const float* x, float* y,
                                                           int tokens) {
    wait_for_previous();
    let_next_start();
    int row = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * 8;
    if (row >= m.out_features) return;
    x += (long long)first * m.in_features, y += (long long)first * m.out_features;
    if (tokens == 1)
        multiply<1>(m, x, y, row, 1);
    else
        multiply<8>(m, x, y, row, min(tokens - first, 8));
}
