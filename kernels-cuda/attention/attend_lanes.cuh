// A warp's part of attention in f32, where attend_tensor.cuh does not apply: teams of lanes share a position, eight of its
// dimensions each, and keep AT_ONCE queries. Of a tile's positions each team has every TEAMS-th.
//
//   queries  f32 [AT_ONCE, HEAD_DIM]
#pragma once
#include "common.cuh"

// Lanes of a team, the teams of a warp, and the positions of a tile that each has.
#define LANES (HEAD_DIM > 128 ? 32 : HEAD_DIM > 64 ? 16 : HEAD_DIM > 32 ? 8 : HEAD_DIM > 16 ? 4 : 2)
#define TEAMS (32 / LANES)
#define EACH (TILE / TEAMS)
#define QUERY_FLOATS (AT_ONCE * HEAD_DIM)
// Keys and values are loaded when they are needed.
#define LATE 1

// Eight numbers of a row, those that bytes stand for without their step.
__device__ __forceinline__ void load_eight(const Stored* from, float (&v)[8]) {
#if KV == 2
    float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
#elif KV == 3
    uint2 a = *(const uint2*)from;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = (float)((int)((i < 4 ? a.x : a.y) >> i % 4 * 8 & 0xff) - 128);
#else
    uint4 a = *(const uint4*)from;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u16 h = (u16)(word(a, i / 2) >> i % 2 * 16);
        v[i] = KV == 1 ? bfloat_to_float(h) : half_to_float(h);
    }
#endif
}

__device__ __forceinline__ void put_query(float* queries, int h, int d, float v) { queries[h * HEAD_DIM + d] = v; }

// Of a tile, what this lane's team has: the weights of its positions, and for each query the tile's largest score and sum.
struct Weighted {
    float of[EACH][AT_ONCE], most[AT_ONCE], sum[AT_ONCE];
};

struct Tile {
    static __device__ __forceinline__ int team() { return this_thread() % 32 / LANES; }
    // The first of this lane's dimensions.
    static __device__ __forceinline__ int dimension() { return this_thread() % LANES * 8; }

    __device__ __forceinline__ void fetch_keys(const Cache&, int, const Span&) {}
    __device__ __forceinline__ void fetch_values(const Cache&, int, const Span&) {}
    // Nothing was read before the newest was in the cache.
    __device__ __forceinline__ void replace(const Newest&, int) {}

    __device__ __forceinline__ Weighted weigh(const Cache& cache, const float* queries, float softcap, int tile,
                                              const Span& span) const {
        bool active = dimension() < HEAD_DIM;
        float q[AT_ONCE][8];
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++)
#pragma unroll
            for (int i = 0; i < 8; i++) q[h][i] = active ? queries[h * HEAD_DIM + dimension() + i] : 0.0f;
        Weighted w;
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) w.most[h] = -INFINITY, w.sum[h] = 0;
#pragma unroll
        for (int f = 0; f < EACH; f++) {
            int position = tile + f * TEAMS + team();
            bool seen = span.sees(position);
            float k[8] = {}, step = 1;
            if (seen && active) load_eight(cache.keys + cache.at(position) + dimension(), k);
            if (IN_BYTES && seen) step = cache.key_steps()[cache.place(position)];
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                float dot = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) dot = __fmaf_rn(q[h][i], k[i], dot);
#pragma unroll
                for (int d = LANES / 2; d > 0; d /= 2) dot = __fadd_rn(dot, __shfl_xor_sync(FULL, dot, d));
                if (IN_BYTES) dot = __fmul_rn(dot, step);
                w.of[f][h] = seen ? capped(dot, softcap) : -INFINITY;
                w.most[h] = fmaxf(w.most[h], w.of[f][h]);
            }
        }
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
#pragma unroll
            for (int d = LANES; d < 32; d *= 2) w.most[h] = fmaxf(w.most[h], __shfl_xor_sync(FULL, w.most[h], d));
#pragma unroll
            for (int f = 0; f < EACH; f++) {
                w.of[f][h] = rescale(w.of[f][h], w.most[h]);
                w.sum[h] = __fadd_rn(w.sum[h], w.of[f][h]);
            }
#pragma unroll
            for (int d = LANES; d < 32; d *= 2) w.sum[h] = __fadd_rn(w.sum[h], __shfl_xor_sync(FULL, w.sum[h], d));
        }
        return w;
    }

    // What the tile comes to, to `to` [AT_ONCE, RESULT].
    __device__ __forceinline__ void put(const Cache& cache, const Weighted& w, int tile, const Span& span, float* to) const {
        bool active = dimension() < HEAD_DIM;
        float sums[AT_ONCE][8] = {};
#pragma unroll
        for (int f = 0; f < EACH; f++) {
            int position = tile + f * TEAMS + team();
            if (!span.sees(position)) continue;
            float v[8] = {}, step = 1;
            if (active) load_eight(cache.values + cache.at(position) + dimension(), v);
            if (IN_BYTES) step = cache.value_steps()[cache.place(position)];
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                float weight = IN_BYTES ? __fmul_rn(w.of[f][h], step) : w.of[f][h];
#pragma unroll
                for (int i = 0; i < 8; i++) sums[h][i] = __fmaf_rn(weight, v[i], sums[h][i]);
            }
        }
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int d = LANES; d < 32; d *= 2)
                    sums[h][i] = __fadd_rn(sums[h][i], __shfl_xor_sync(FULL, sums[h][i], d));
            float* part = to + h * RESULT;
            if (this_thread() % 32 == 0) part[0] = w.most[h], part[1] = w.sum[h];
            if (active && this_thread() % 32 < LANES)
#pragma unroll
                for (int i = 0; i < 8; i++) part[2 + dimension() + i] = sums[h][i];
        }
    }
};
