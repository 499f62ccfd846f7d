// A warp's part of attention on tensor cores: up to four queries, sixteen positions at a time (attend.cuh says when).
//
//   queries  per set of AT_ONCE heads u32 [HEAD_DIM / 16, 32 lanes, 2]: the products' second operand. Column 2·h has head
//            h's numbers rounded to float16 and column 2·h + 1 what that left, so nothing of 22 bits is lost; the weights of
//            the softmax are divided the same way. Keys and values are float16 as they are.
//
// Scores are a product of a tile of keys, a row for each position, with the queries; results one of values, a row for each
// dimension, with the weights. Which channel of a product is which dimension is free as long as both operands agree, so
// every lane loads 16 bytes at a time, straight from the cache: no shared memory, no shuffles but those of the softmax.
//
// Limits: queries divided by √HEAD_DIM are float16's in size (65504), as keys and values are.
#pragma once
#include "common.cuh"

#define TILE 16
#define TEAM_POSITIONS TILE
#define QUERY_FLOATS (QUERY_SETS * 4 * HEAD_DIM)
#define SET_FLOATS (4 * HEAD_DIM)

// Of an 8 × 8 tile of 16-bit numbers, two neighbours of a row in each lane, the same of its columns.
__device__ __forceinline__ u32 transposed(u32 v) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}

// A number as two of float16.
__device__ __forceinline__ u32 in_two(float v) {
    u16 high = float_to_half(v);
    return high | (u32)float_to_half(v - half_to_float(high)) << 16;
}

// Dimension d of head h of the group, for the products.
__device__ __forceinline__ void put_query(float* queries, int h, int d, float v) {
    u32 both = in_two(v);
    int lane = h % AT_ONCE * 8 + d / 8 % 4, step = d / 32 * 2 + d / 4 % 2;
    u16* to = (u16*)queries + h / AT_ONCE * (2 * SET_FLOATS) + (step * 32 + lane) * 4 + d % 4;
    to[0] = (u16)both, to[16] = (u16)(both >> 16);
}

// A tile's keys of positions lane / 4 and 8 more, and its values of positions 2·(lane % 4), one more, and 8 more than these.
struct Batch {
    uint4 k[2][HEAD_DIM / 32], v[4][HEAD_DIM / 64];

    static __device__ __forceinline__ int key_position(int i) { return this_thread() % 32 / 4 + 8 * i; }
    static __device__ __forceinline__ int value_position(int i) {
        return this_thread() % 4 * 2 + i % 2 + i / 2 * 8;
    }
    // From where each has 16 bytes.
    static __device__ __forceinline__ int key_dimension(int j) { return 32 * j + this_thread() % 4 * 8; }
    static __device__ __forceinline__ int value_dimension(int j) { return 64 * j + this_thread() % 32 / 4 * 8; }

    // From the lane's first number of the tile on; `left` positions are there, of others come zeros.
    __device__ __forceinline__ void fetch_keys(const Stored* from, int left) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 32; j++) {
                k[i][j] = make_uint4(0, 0, 0, 0);
                if (key_position(i) < left) k[i][j] = *(const uint4*)(from + 8 * i * HEAD_DIM + 32 * j);
            }
    }

    __device__ __forceinline__ void fetch_values(const Stored* from, int left) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 64; j++) {
                v[i][j] = make_uint4(0, 0, 0, 0);
                if (value_position(i) < left) v[i][j] = *(const uint4*)(from + (i % 2 + i / 2 * 8) * HEAD_DIM + 64 * j);
            }
    }

    // Position `position` of the tile from `newest`, a key and a value.
    __device__ __forceinline__ void replace(const Stored* newest, int tile, int position) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (tile + key_position(i) == position)
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 32; j++) k[i][j] = *(const uint4*)(newest + key_dimension(j));
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (tile + value_position(i) == position)
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 64; j++) v[i][j] = *(const uint4*)(newest + HEAD_DIM + value_dimension(j));
    }
};

// Where this warp's tiles begin, and how far one is from the next.
__device__ __forceinline__ int first_tile(int begin) { return begin + this_thread() / 32 % SET_WARPS * TILE; }
#define NEXT_TILE (SET_WARPS * TILE)

// A lane's first number of a tile.
__device__ __forceinline__ const Stored* keys_at(const Stored* keys, int tile) {
    return keys + (tile + Batch::key_position(0)) * HEAD_DIM + Batch::key_dimension(0);
}
__device__ __forceinline__ const Stored* values_at(const Stored* values, int tile) {
    return values + (tile + Batch::value_position(0)) * HEAD_DIM + Batch::value_dimension(0);
}

// The warp's first positions up to `end`.
__device__ __forceinline__ void fetch_first_keys(Batch& b, const Stored* keys, int begin, int end) {
    b.fetch_keys(keys_at(keys, first_tile(begin)), end - first_tile(begin));
}
__device__ __forceinline__ void fetch_first_values(Batch& b, const Stored* values, int begin, int end) {
    b.fetch_values(values_at(values, first_tile(begin)), end - first_tile(begin));
}

__device__ __forceinline__ void replace_first(Batch& b, const Stored* newest, int begin, int position) {
    b.replace(newest, first_tile(begin), position);
}

// Scores of this lane's head at its two positions.
struct Scores {
    float of[2];

    __device__ __forceinline__ Scores(const Batch& b, const float* queries, int left) {
        const uint2* q = (const uint2*)queries + this_thread() % 32;
        float s[2][4] = {};
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            uint2 b01 = q[i * 32];
            uint4 low = b.k[0][i / 2], high = b.k[1][i / 2];
            mma(s[i % 2], word(low, i % 2 * 2), word(high, i % 2 * 2), word(low, i % 2 * 2 + 1),
                word(high, i % 2 * 2 + 1), b01.x, b01.y);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            of[i] = (s[0][2 * i] + s[1][2 * i]) + (s[0][2 * i + 1] + s[1][2 * i + 1]);
            if (Batch::key_position(i) >= left) of[i] = -INFINITY;
        }
    }
};

// All of the warp's tiles, to its place in `warps`; `b` holds the first. Sums lie there from tile to tile:
// in registers there is no room for them beside keys and values on their way.
__device__ __forceinline__ void attend_positions(Batch& b, const float* queries, const Stored* keys,
                                                 const Stored* values, int begin, int end, float* warps) {
    int lane = this_thread() % 32, first = first_tile(begin);
    float m = -INFINITY, l = 0;
#pragma unroll 1
    for (int tile = first; tile < end; tile += NEXT_TILE) {
        if (tile > first) {
            b.fetch_keys(keys_at(keys, tile), end - tile);
            b.fetch_values(values_at(values, tile), end - tile);
        }
        Scores scores(b, queries, end - tile);
        float most = fmaxf(m, fmaxf(scores.of[0], scores.of[1]));
#pragma unroll
        for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, d));
        float old = rescale(m, most), weight[2] = {rescale(scores.of[0], most), rescale(scores.of[1], most)};
        m = most;
        l = l * old + (weight[0] + weight[1]);
        float* own = results_of_warp(warps) + lane % 4 * (HEAD_DIM + 2) + 2 + lane / 4 * 8;
        u32 b0 = transposed(in_two(weight[0])), b1 = transposed(in_two(weight[1]));
#pragma unroll
        for (int t = 0; t < HEAD_DIM / 16; t++) {
            u32 v0 = word(b.v[0][t / 4], t % 4), v1 = word(b.v[1][t / 4], t % 4), v2 = word(b.v[2][t / 4], t % 4),
                v3 = word(b.v[3][t / 4], t % 4);
            float d[4] = {};
            mma(d, prmt(v0, v1, 0x5410), prmt(v0, v1, 0x7632), prmt(v2, v3, 0x5410), prmt(v2, v3, 0x7632), b0, b1);
            float2 sum = make_float2(d[0] + d[1], d[2] + d[3]), *to = (float2*)(own + t / 4 * 64 + t % 4 * 2);
            if (lane % 4 < AT_ONCE)
                *to = tile == first ? sum : make_float2(fmaf(to->x, old, sum.x), fmaf(to->y, old, sum.y));
        }
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(FULL, l, d);
    if (lane < AT_ONCE) *(float2*)(results_of_warp(warps) + lane * (HEAD_DIM + 2)) = make_float2(m, l);
}
