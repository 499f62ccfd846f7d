// How a product's input comes into a block's shared memory, as 16-bit numbers, and how the sums of its rows leave it.
//
//   xs          [whole units of channels] 16-bit numbers of DTYPE;  group_sums  f32, their sums by groups of weights
//   parts       f32 [tiles, WARPS, 16], what each warp has of the rows (stream.cuh)
//
// Constants: I, WARPS, PARTS (bytes), LOUD (whether some γ is so large that normalized numbers may be beyond float16), DEC (whether tiles are divided between blocks), GROUP where there are groups; `All`
// is the team of a block's threads.
#pragma once
#include "flow.cuh"
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
template <int K, bool NORM>
__device__ __forceinline__ void stage(const Sum& x, const float* gamma, float eps, float* scratch, u16* xs,
                                      float* group_sums, u32* beyond) {
    constexpr int PADDED = UNITS_OF(K) * UNIT, STEPS = (PADDED / 4 + THREADS - 1) / THREADS;
    int t = this_thread();
    float4 v[STEPS], w[STEPS];
    float sum = 0;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 4 * (s * THREADS + t);
        if (NORM) w[s] = k < K ? *(const float4*)(gamma + k) : make_float4(0, 0, 0, 0);
    }
    Asked4 asked[STEPS] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        if (4 * (s * THREADS + t) < K) asked[s] = x.nothing_yet();
    bool there;
    Patience patience;
    do {
        there = true;
#pragma unroll
        for (int s = 0; s < STEPS; s++) x.ask_missing(4 * (s * THREADS + t), asked[s]);
#pragma unroll
        for (int s = 0; s < STEPS; s++) there &= asked[s].there();
    } while (patience.warp_goes_on(there));
#pragma unroll
    for (int s = 0; s < STEPS; s++) v[s] = asked[s].sum();
    if (NORM) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) sum += v[s].x * v[s].x + v[s].y * v[s].y + v[s].z * v[s].z + v[s].w * v[s].w;
        float scale = 1.0f / sqrtf(team_sum<All>(sum, scratch) / K + eps);
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            v[s] = make_float4(v[s].x * scale * w[s].x, v[s].y * scale * w[s].y, v[s].z * scale * w[s].z,
                               v[s].w * scale * w[s].w);
    }
    // Attended are means of what float16 holds, and what is normalized is beyond it only where γ is large (LOUD).
    constexpr bool CHECKED = NORM && LOUD;
    Beyond lost;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 4 * (s * THREADS + t);
        u32 lo = narrow2(v[s].x, v[s].y), hi = narrow2(v[s].z, v[s].w);
        if (CHECKED) lost.add(lo), lost.add(hi);
        float in_group = widen((u16)lo) + widen((u16)(lo >> 16)) + widen((u16)hi) + widen((u16)(hi >> 16));
        if (k < PADDED) {
            *(uint2*)(xs + k) = make_uint2(lo, hi);
            group_sum<4>(group_sums, k, in_group);
        }
    }
    // Every block has the same numbers.
    if (CHECKED && blockIdx.x == 0) lost.tell(beyond);
}

// The same of the activations between gate-up and down, which are 16-bit numbers already.
__device__ __forceinline__ void stage_act(const u16* act, u16* xs, float* group_sums) {
    constexpr int PADDED = UNITS_OF(I) * UNIT, STEPS = (PADDED / 8 + THREADS - 1) / THREADS;
    int t = this_thread();
    uint4 v[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        u32 nothing = 8 * (s * THREADS + t) < I ? MISSING : 0;
        v[s] = make_uint4(nothing, nothing, nothing, nothing);
    }
    bool there;
    Patience patience;
    do {
        there = true;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (!is_there(v[s])) v[s] = ask4(act + 8 * (s * THREADS + t));
#pragma unroll
        for (int s = 0; s < STEPS; s++) there &= is_there(v[s]);
    } while (patience.warp_goes_on(there));
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 8 * (s * THREADS + t);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) sum += widen((u16)word(v[s], i)) + widen((u16)(word(v[s], i) >> 16));
        if (k < PADDED) {
            *(uint4*)(xs + k) = v[s];
            group_sum<8>(group_sums, k, sum);
        }
    }
}

// Where a tile has fewer units here than there are warps, some leave nothing. Who still reads the last product's sums
// is waited for.
template <int UNITS, bool ANYWHERE>
__device__ __forceinline__ void clear(const Route& r, int matrices, float* parts) {
    if (!(UNITS < WARPS || ANYWHERE)) return;
    All::sync();
    for (int i = this_thread(); i < matrices * r.tiles * WARPS * 16; i += THREADS) parts[i] = 0;
}

__device__ __forceinline__ float total(const float* parts, int tile, int r) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[(tile * WARPS + w) * 16 + r];
    return sum;
}

// What this thread's row of a product is added to, asked for before the product; there is one at most. `x` has been
// waited for.
__device__ __forceinline__ float asked_before(const Route& r, const Sum& x) {
    return this_thread() < r.tiles * 16 ? x.ask(r.first_tile * 16 + this_thread()).sum() : 0.0f;
}

// This thread's row of a finished product, if there is one: y[row] = before + v. Where tiles are divided, one may have
// begun in the block before: of its rows this block's part goes to `rest`, where there is nothing of others.
template <int UNITS>
__device__ __forceinline__ void finish(const Route& r, const float* parts, const float* bias, float before, float* y,
                                       float* rest) {
    int i = this_thread(), row = r.first_tile * 16 + i;
    if (i >= r.tiles * 16) return;
    float v = total(parts, i / 16, i % 16);
    if (DEC && i < 16 && r.offset > 0) {
        put(rest + row, v);
    } else {
        put(y + row, v + (bias ? before + bias[row] : before));
        if (DEC && r.end >= (r.first_tile + i / 16 + 1) * UNITS) put(rest + row, 0.0f);
    }
}

// Rows of gate and up: silu(gate)·up, in pairs. Compensations are waited for before the block's other warps are.
__device__ __forceinline__ void finish_pairs(const Route& r, const float* parts, const float* bias, const float* delta,
                                             u16* act, float* act32, u32* beyond) {
    constexpr int STEPS = (PARTS / (4 * WARPS * 2) + THREADS - 1) / THREADS;
    int tiles = r.tiles, rows = tiles * 16, first = r.first_tile * 16;
    float gate[STEPS] = {}, up[STEPS] = {};
    if (delta) {
        bool there;
        Patience patience;
        do {
            there = true;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                int i = s * THREADS + this_thread();
                if (i < rows) gate[s] = ask1(delta + first + i), up[s] = ask1(delta + I + first + i);
            }
#pragma unroll
            for (int s = 0; s < STEPS; s++) there &= !missing(gate[s]) & !missing(up[s]);
        } while (patience.warp_goes_on(there));
    }
    All::sync();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * THREADS + this_thread(), row = first + i;
        float v = 0;
        if (i < rows) {
            gate[s] += total(parts, i / 16, i % 16), up[s] += total(parts, tiles + i / 16, i % 16);
            if (bias) gate[s] += bias[row], up[s] += bias[I + row];
            v = activated(gate[s], SILU) * up[s];
            if (act32) put(act32 + row, v);
        }
        float after = __shfl_down_sync(FULL, v, 1);
        if (i < rows && i % 2 == 0) {
            u32 two = narrow2(v, after);
            Beyond lost;
            lost.add(two), lost.tell(beyond);
            put((u32*)(act + row), two);
        }
    }
}
