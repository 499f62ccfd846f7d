// How a product's input comes into a block's shared memory, as 16-bit numbers, and how the sums of its rows leave it.
//
//   xs          [whole units of channels] 16-bit numbers of DTYPE;  group_sums  f32, their sums by groups of weights
//   parts       f32 [tiles, WARPS, 16], what each warp has of the rows (stream.cuh)
//
// Constants: I, WARPS, PARTS (bytes), GROUP where there are groups; `All` is the team of a block's threads.
#pragma once
#include "stream.cuh"

#define UNITS_OF(k) (((k) + UNIT - 1) / UNIT)

// Sums of x per group of weights, if the format wants them: lanes hold N consecutive channels each.
template <int N>
__device__ __forceinline__ void group_sum(float* group_sums, int channel, float sum) {
#ifdef GROUPED
#pragma unroll
    for (int d = GROUP / N / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (channel % GROUP == 0) group_sums[channel / GROUP] = sum;
#endif
}

// The input of a product of K channels, normalized if there is a γ, to 16-bit numbers in xs.
template <int K, bool NORM, class Delta>
__device__ __forceinline__ void stage(const float* x, const Delta& delta, const float* gamma, float eps, float* scratch,
                                      u16* xs, float* group_sums) {
    constexpr int PADDED = UNITS_OF(K) * UNIT, STEPS = (PADDED / 4 + THREADS - 1) / THREADS;
    int t = this_thread();
    float4 v[STEPS], w[STEPS];
    float sum = 0;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 4 * (s * THREADS + t);
        v[s] = k < K ? load4(x, delta, k) : make_float4(0, 0, 0, 0);
        if (NORM) w[s] = k < K ? *(const float4*)(gamma + k) : make_float4(0, 0, 0, 0);
    }
    if (NORM) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) sum += v[s].x * v[s].x + v[s].y * v[s].y + v[s].z * v[s].z + v[s].w * v[s].w;
        float scale = 1.0f / sqrtf(team_sum<All>(sum, scratch) / K + eps);
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            v[s] = make_float4(v[s].x * scale * w[s].x, v[s].y * scale * w[s].y, v[s].z * scale * w[s].z,
                               v[s].w * scale * w[s].w);
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 4 * (s * THREADS + t);
        u32 lo = narrow2(v[s].x, v[s].y), hi = narrow2(v[s].z, v[s].w);
        float in_group = widen((u16)lo) + widen((u16)(lo >> 16)) + widen((u16)hi) + widen((u16)(hi >> 16));
        if (k < PADDED) {
            *(uint2*)(xs + k) = make_uint2(lo, hi);
            group_sum<4>(group_sums, k, in_group);
        }
    }
}

// The same of the activations between gate-up and down, which are 16-bit numbers already.
__device__ __forceinline__ void stage_act(const u16* act, u16* xs, float* group_sums) {
    constexpr int PADDED = UNITS_OF(I) * UNIT, STEPS = (PADDED / 8 + THREADS - 1) / THREADS;
    int t = this_thread();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 8 * (s * THREADS + t);
        uint4 v = k < I ? __ldcg((const uint4*)(act + k)) : make_uint4(0, 0, 0, 0);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) sum += widen((u16)word(v, i)) + widen((u16)(word(v, i) >> 16));
        if (k < PADDED) {
            *(uint4*)(xs + k) = v;
            group_sum<8>(group_sums, k, sum);
        }
    }
}

// Where a tile has fewer units here than there are warps, some leave nothing.
template <int UNITS, bool ANYWHERE>
__device__ __forceinline__ void clear(const Route& r, int matrices, float* parts) {
    if (UNITS < WARPS || ANYWHERE)
        for (int i = this_thread(); i < matrices * r.tiles * WARPS * 16; i += THREADS) parts[i] = 0;
}

__device__ __forceinline__ float total(const float* parts, int tile, int r) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[(tile * WARPS + w) * 16 + r];
    return sum;
}

// Rows of a finished product: y[row] = v, or y[row] + y_delta[row] + v. Rows of a tile that began in the block before
// go to `rest`.
template <class Delta>
__device__ __forceinline__ void finish(const Route& r, const float* parts, const float* bias, float* y,
                                       const Delta& y_delta, bool add, float* rest) {
    for (int i = this_thread(); i < r.tiles * 16; i += THREADS) {
        int row = r.first_tile * 16 + i;
        if (rest && i < 16 && r.offset > 0) {
            rest[row] = total(parts, 0, i);
            continue;
        }
        float before = add ? load1(y, y_delta, row) : 0.0f;
        if (bias) before += bias[row];
        y[row] = total(parts, i / 16, i % 16) + before;
    }
}

// Rows of gate and up: silu(gate)·up. A compensation has been waited for by `wait`, and is fetched, before the block's
// other warps are waited for.
template <class Wait>
__device__ __forceinline__ void finish_pairs(const Route& r, const float* parts, const float* bias, const float* delta,
                                             u16* act, float* act32, Wait wait) {
    constexpr int STEPS = (PARTS / (4 * WARPS * 2) + THREADS - 1) / THREADS;
    int tiles = r.tiles, rows = tiles * 16, first = r.first_tile * 16;
    float gate[STEPS] = {}, up[STEPS] = {};
    if (delta && this_thread() / 32 * 32 < rows) {
        wait();
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int i = s * THREADS + this_thread();
            if (i < rows) gate[s] = __ldcg(delta + first + i), up[s] = __ldcg(delta + I + first + i);
        }
    }
    All::sync();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * THREADS + this_thread(), row = first + i;
        if (i < rows) {
            gate[s] += total(parts, i / 16, i % 16), up[s] += total(parts, tiles + i / 16, i % 16);
            if (bias) gate[s] += bias[row], up[s] += bias[I + row];
            float v = silu(gate[s]) * up[s];
            act[row] = narrow(v);
            if (act32) act32[row] = v;
        }
    }
}
