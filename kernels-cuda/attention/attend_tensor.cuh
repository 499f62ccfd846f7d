// A warp's part of attention on tensor cores: up to four queries, sixteen positions at a time (attend.cuh says when).
//
//   queries  per set of AT_ONCE heads u32 [HEAD_DIM / 16, 32 lanes, 2]: the products' second operand. Column 2·h has head
//            h's numbers rounded to the cache's type and column 2·h + 1 what that left; columns of no head are not looked at.
//            The weights of the softmax are divided the same way. Keys and values are as they are.
//
// What is lost: two float16 are off by 2⁻²³ of a number at most, or by 2⁻²⁵ where it is small; two bfloat16 by 2⁻¹⁷. A score
// in bfloat16 is then off by 2⁻¹⁷·Σ|q·k|, as much as a sum of 128 products in f32 may be by its own roundings (128·2⁻²⁴),
// and a five hundredth of what the rounding of keys to bfloat16 does (2⁻⁸ each). A result is off by twice that, relatively,
// and by 2⁻¹⁷ of the largest value for its own weights. A third bfloat16 would take the place of another head's queries.
//
// Scores are a product of a tile of keys, a row for each position, with the queries; results one of values, a row for each
// dimension, with the weights. Which channel of a product is which dimension is free as long as both operands agree, so
// every lane loads 16 bytes at a time, straight from the cache: no shared memory, no shuffles but those of the softmax.
//
// Limits: HEAD_DIM is a multiple of 16; in float16, scaled queries are float16's in size (65504), as keys and values are.
#pragma once
#include "common.cuh"

#define TEAM_POSITIONS TILE
#define QUERY_FLOATS (QUERY_SETS * SET_FLOATS)
#define SET_FLOATS (4 * HEAD_DIM)

// Of an 8 × 8 tile of 16-bit numbers, two neighbours of a row in each lane, the same of its columns.
__device__ __forceinline__ u32 transposed(u32 v) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}

// A number as two of 16 bits.
__device__ __forceinline__ u32 in_two(float v) {
    u16 high = narrow(v);
    return high | (u32)narrow(v - widen(high)) << 16;
}

// How SHARERS lanes share a position's dimensions, two in a word: 16 bytes each as long as all have some, then 8, then 4.
template <int SHARERS>
struct Row {
    static constexpr int WORDS = HEAD_DIM / 2 / SHARERS, BY_FOUR = WORDS / 4 * 4, BY_TWO = WORDS / 2 * 2;
    u32 words[WORDS];

    // The first dimension of word w of a part.
    static __device__ __forceinline__ int dimension(int part, int w) {
        if (w < BY_FOUR) return w / 4 * 8 * SHARERS + 8 * part + w % 4 * 2;
        if (w < BY_TWO) return BY_FOUR * 2 * SHARERS + 4 * part + w % 2 * 2;
        return BY_TWO * 2 * SHARERS + 2 * part;
    }

    // The part and the word that have dimension d.
    static __device__ __forceinline__ int part_of(int d) {
        if (d < BY_FOUR * 2 * SHARERS) return d / 8 % SHARERS;
        return d < BY_TWO * 2 * SHARERS ? d / 4 % SHARERS : d / 2 % SHARERS;
    }
    static __device__ __forceinline__ int word_of(int d) {
        if (d < BY_FOUR * 2 * SHARERS) return d / (8 * SHARERS) * 4 + d % 8 / 2;
        return d < BY_TWO * 2 * SHARERS ? BY_FOUR + d % 4 / 2 : BY_TWO;
    }

    __device__ __forceinline__ void load(const Stored* row, int part) {
#pragma unroll
        for (int w = 0; w < BY_FOUR; w += 4) {
            uint4 v = *(const uint4*)(row + dimension(part, w));
            words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
        }
        if constexpr (BY_TWO > BY_FOUR) {
            uint2 v = *(const uint2*)(row + dimension(part, BY_FOUR));
            words[BY_FOUR] = v.x, words[BY_FOUR + 1] = v.y;
        }
        if constexpr (WORDS > BY_TWO) words[BY_TWO] = *(const u32*)(row + dimension(part, BY_TWO));
    }
};
typedef Row<4> Key;
typedef Row<8> Value;

// Dimension d of head h of the group, for the products.
__device__ __forceinline__ void put_query(float* queries, int h, int d, float v) {
    u32 both = in_two(v);
    int lane = h % AT_ONCE * 8 + Key::part_of(d), w = Key::word_of(d);
    u16* to = (u16*)(queries + h / AT_ONCE * SET_FLOATS) + (w / 2 * 32 + lane) * 4 + w % 2 * 2 + d % 2;
    to[0] = (u16)both, to[16] = (u16)(both >> 16);
}

// The positions of a tile that count: those from `begin` on up to `end`.
struct Rows {
    int before;
    u32 count;

    __device__ __forceinline__ Rows(int tile, int begin, int end) : before(tile - begin), count(end - begin) {}

    __device__ __forceinline__ bool has(int row) const { return (u32)(before + row) < count; }
};

// A tile's keys of positions lane / 4 and 8 more, and its values of positions 2·(lane % 4), one more, and 8 more than these.
// Positions that do not count are zeros.
struct Batch {
    Key k[2];
    Value v[4];

    static __device__ __forceinline__ int key_position(int i) { return this_thread() % 32 / 4 + 8 * i; }
    static __device__ __forceinline__ int value_position(int i) {
        return this_thread() % 4 * 2 + i % 2 + i / 2 * 8;
    }
    // Which part of a row is this lane's.
    static __device__ __forceinline__ int key_part() { return this_thread() % 4; }
    static __device__ __forceinline__ int value_part() { return this_thread() % 32 / 4; }

    __device__ __forceinline__ void fetch_keys(const Cache& cache, int tile, const Rows& rows) {
        const Stored* from = cache.keys + cache.at(tile) + key_position(0) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            k[i] = {};
            if (rows.has(key_position(i))) k[i].load(from + 8 * i * HEAD_DIM, key_part());
        }
    }

    __device__ __forceinline__ void fetch_values(const Cache& cache, int tile, const Rows& rows) {
        const Stored* from = cache.values + cache.at(tile) + value_position(0) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = {};
            if (rows.has(value_position(i))) v[i].load(from + (i % 2 + i / 2 * 8) * HEAD_DIM, value_part());
        }
    }

    // Row `row` from `newest`, a key and a value.
    __device__ __forceinline__ void replace(const Stored* newest, int row) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (key_position(i) == row) k[i].load(newest, key_part());
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (value_position(i) == row) v[i].load(newest + HEAD_DIM, value_part());
    }
};

// Where this warp's tiles begin, and how far one is from the next.
__device__ __forceinline__ int first_tile(int begin) {
    return begin / TILE * TILE + this_thread() / 32 % SET_WARPS * TILE;
}
#define NEXT_TILE (SET_WARPS * TILE)

// The warp's first positions up to `end`.
__device__ __forceinline__ void fetch_first_keys(Batch& b, const Cache& cache, int begin, int end) {
    int tile = first_tile(begin);
    b.fetch_keys(cache, tile, Rows(tile, begin, end));
}
__device__ __forceinline__ void fetch_first_values(Batch& b, const Cache& cache, int begin, int end) {
    int tile = first_tile(begin);
    b.fetch_values(cache, tile, Rows(tile, begin, end));
}

__device__ __forceinline__ void replace_first(Batch& b, const Stored* newest, int begin, int position) {
    b.replace(newest, position - first_tile(begin));
}

// Scores of this lane's head at its two positions.
struct Scores {
    float of[2];

    __device__ __forceinline__ Scores(const Batch& b, const float* queries, float softcap, const Rows& rows) {
        const uint2* q = (const uint2*)queries + this_thread() % 32;
        float s[2][4] = {};
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            uint2 b01 = q[i * 32];
            const u32 *low = b.k[0].words + 2 * i, *high = b.k[1].words + 2 * i;
            mma(s[i % 2], low[0], high[0], low[1], high[1], b01.x, b01.y);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float score = (s[0][2 * i] + s[1][2 * i]) + (s[0][2 * i + 1] + s[1][2 * i + 1]);
            of[i] = rows.has(Batch::key_position(i)) ? capped(score, softcap) : -INFINITY;
        }
    }
};

// All of the warp's tiles, to its place in `warps`; `b` holds the first. Sums lie there from tile to tile:
// in registers there is no room for them beside keys and values on their way.
__device__ __forceinline__ void attend_positions(Batch& b, const float* queries, const Cache& cache, float softcap,
                                                 int begin, int end, float* warps) {
    int lane = this_thread() % 32, first = first_tile(begin);
    float m = -INFINITY, l = 0;
#pragma unroll 1
    for (int tile = first; tile < end; tile += NEXT_TILE) {
        Rows rows(tile, begin, end);
        if (tile > first) {
            b.fetch_keys(cache, tile, rows);
            b.fetch_values(cache, tile, rows);
        }
        Scores scores(b, queries, softcap, rows);
        float most = fmaxf(m, fmaxf(scores.of[0], scores.of[1]));
#pragma unroll
        for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, d));
        float old = rescale(m, most), weight[2] = {rescale(scores.of[0], most), rescale(scores.of[1], most)};
        m = most;
        l = l * old + (weight[0] + weight[1]);
        float* own = results_of_warp(warps) + lane % 4 * (HEAD_DIM + 2) + 2;
        u32 b0 = transposed(in_two(weight[0])), b1 = transposed(in_two(weight[1]));
#pragma unroll
        for (int t = 0; t < HEAD_DIM / 16; t++) {
            u32 v0 = b.v[0].words[t], v1 = b.v[1].words[t], v2 = b.v[2].words[t], v3 = b.v[3].words[t];
            float d[4] = {};
            mma(d, prmt(v0, v1, 0x5410), prmt(v0, v1, 0x7632), prmt(v2, v3, 0x5410), prmt(v2, v3, 0x7632), b0, b1);
            float2 sum = make_float2(d[0] + d[1], d[2] + d[3]);
            float2* to = (float2*)(own + Value::dimension(lane / 4, t));
            if (lane % 4 < AT_ONCE)
                *to = tile == first ? sum : make_float2(fmaf(to->x, old, sum.x), fmaf(to->y, old, sum.y));
        }
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(FULL, l, d);
    if (lane < AT_ONCE) *(float2*)(results_of_warp(warps) + lane * (HEAD_DIM + 2)) = make_float2(m, l);
}
