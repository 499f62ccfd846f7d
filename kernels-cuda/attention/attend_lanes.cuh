// A warp's part of attention in f32, where attend_tensor.cuh does not apply: teams of lanes share a position, eight of its
// dimensions each, and keep AT_ONCE queries.
//
//   queries  f32 [QUERY_SETS · AT_ONCE, HEAD_DIM], of which the first HEAD_GROUP count
#pragma once
#include "common.cuh"

// Lanes of a team, and the teams of a set's warps.
#define LANES (HEAD_DIM > 128 ? 32 : HEAD_DIM > 64 ? 16 : HEAD_DIM > 32 ? 8 : HEAD_DIM > 16 ? 4 : 2)
#define TEAMS (SET_WARPS * 32 / LANES)
#define TEAM_POSITIONS (32 / LANES)
#define QUERY_FLOATS (QUERY_SETS * SET_FLOATS)
#define SET_FLOATS (AT_ONCE * HEAD_DIM)
// Positions that a team has in flight.
#define FLIGHT (KV == 2 || AT_ONCE > 4 || ATTEND_THREADS > 256 ? 2 : 4)

#if KV == 2
struct Eight {
    float4 a, b;
};
#else
struct Eight {
    uint4 a;
};
#endif

__device__ __forceinline__ void unpack(const Eight& e, float (&v)[8]) {
#if KV == 2
    v[0] = e.a.x, v[1] = e.a.y, v[2] = e.a.z, v[3] = e.a.w;
    v[4] = e.b.x, v[5] = e.b.y, v[6] = e.b.z, v[7] = e.b.w;
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 w = word(e.a, i);
        v[2 * i] = KV == 1 ? bfloat_to_float((u16)w) : half_to_float((u16)w);
        v[2 * i + 1] = KV == 1 ? bfloat_to_float((u16)(w >> 16)) : half_to_float((u16)(w >> 16));
    }
#endif
}

__device__ __forceinline__ void put_query(float* queries, int h, int d, float v) { queries[h * HEAD_DIM + d] = v; }

// Running softmax of the AT_ONCE queries of a team: largest score, sum, and eight dimensions of the result.
struct Running {
    float m[AT_ONCE], l[AT_ONCE], acc[AT_ONCE][8];

    __device__ __forceinline__ Running() : l(), acc() {
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) m[h] = -INFINITY;
    }
};

// Keys and values that a team's lanes have in flight: positions base + f·TEAMS + team.
struct Batch {
    Eight k[FLIGHT], v[FLIGHT];
};

__device__ __forceinline__ int team_of_set() { return this_thread() % (SET_WARPS * 32) / LANES; }

// Positions from `base` on up to `end`; what is past it stays as it is.
__device__ __forceinline__ void fetch(Eight (&to)[FLIGHT], const Stored* from, const Cache& cache, int base, int end) {
    int lane = this_thread() % LANES * 8;
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
        int p = base + f * TEAMS + team_of_set();
        if (lane < HEAD_DIM && p < end) to[f] = *(const Eight*)(from + cache.at(p) + lane);
    }
}
__device__ __forceinline__ void fetch_first_keys(Batch& b, const Cache& cache, int base, int end) {
    fetch(b.k, cache.keys, cache, base, end);
}
__device__ __forceinline__ void fetch_first_values(Batch& b, const Cache& cache, int base, int end) {
    fetch(b.v, cache.values, cache, base, end);
}

// Position `position`, if it is one of the first, from `newest`, a key and a value.
__device__ __forceinline__ void replace_first(Batch& b, const Stored* newest, int base, int position) {
    int lane = this_thread() % LANES * 8;
#pragma unroll
    for (int f = 0; f < FLIGHT; f++)
        if (lane < HEAD_DIM && base + f * TEAMS + team_of_set() == position) {
            b.k[f] = *(const Eight*)(newest + lane);
            b.v[f] = *(const Eight*)(newest + HEAD_DIM + lane);
        }
}

// Positions of the warp's teams; `batch` holds the first.
__device__ __forceinline__ void add_positions(Running& r, Batch& batch, const float* queries, const Cache& cache,
                                              float softcap, int begin, int end) {
    int lane = this_thread() % LANES, team = team_of_set();
    bool active = lane * 8 < HEAD_DIM;
    float q[AT_ONCE][8];
#pragma unroll
    for (int h = 0; h < AT_ONCE; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] = active ? queries[h * HEAD_DIM + lane * 8 + i] : 0.0f;

    // Every team takes the same number of steps: its lanes talk to each other by whole warps.
    for (int base = begin; base < end; base += TEAMS * FLIGHT) {
        if (base > begin) fetch(batch.k, cache.keys, cache, base, end), fetch(batch.v, cache.values, cache, base, end);
        float s[FLIGHT][AT_ONCE];
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            float x[8];
            unpack(batch.k[f], x);
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                float dot = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) dot = fmaf(q[h][i], x[i], dot);
#pragma unroll
                for (int d = LANES / 2; d > 0; d /= 2) dot += __shfl_xor_sync(FULL, dot, d);
                s[f][h] = base + f * TEAMS + team < end ? capped(dot, softcap) : -INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
            float m = r.m[h];
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) m = fmaxf(m, s[f][h]);
            float old = rescale(r.m[h], m);
            r.m[h] = m;
            r.l[h] *= old;
#pragma unroll
            for (int i = 0; i < 8; i++) r.acc[h][i] *= old;
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                s[f][h] = rescale(s[f][h], m);
                r.l[h] += s[f][h];
            }
        }
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            float x[8];
            unpack(batch.v[f], x);
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++)
#pragma unroll
                for (int i = 0; i < 8; i++) r.acc[h][i] = fmaf(s[f][h], x[i], r.acc[h][i]);
        }
    }
}

// All positions of the warp's teams, which become one, to the warp's place in `warps`.
__device__ __forceinline__ void attend_positions(Batch& b, const float* queries, const Cache& cache, float softcap,
                                                 int begin, int end, float* warps) {
    float* to = results_of_warp(warps);
    Running r;
    add_positions(r, b, queries, cache, softcap, begin, end);
    int lane = this_thread() % 32;
#pragma unroll
    for (int d = LANES; d < 32; d *= 2)
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
            float other = __shfl_xor_sync(FULL, r.m[h], d), m = fmaxf(r.m[h], other);
            float f = rescale(r.m[h], m), g = rescale(other, m);
            r.m[h] = m;
            r.l[h] = f * r.l[h] + g * __shfl_xor_sync(FULL, r.l[h], d);
#pragma unroll
            for (int i = 0; i < 8; i++) r.acc[h][i] = f * r.acc[h][i] + g * __shfl_xor_sync(FULL, r.acc[h][i], d);
        }
#pragma unroll
    for (int h = 0; h < AT_ONCE; h++, to += HEAD_DIM + 2) {
        if (lane == 0) to[0] = r.m[h], to[1] = r.l[h];
        if (lane * 8 < HEAD_DIM && lane < LANES)
#pragma unroll
            for (int i = 0; i < 8; i++) to[2 + lane * 8 + i] = r.acc[h][i];
    }
}
