// A warp's part of attention on tensor cores: up to eight queries, sixteen positions at a time (attend.cuh says when).
//
//   queries  u32 [HEAD_DIM / 16, 32 lanes, 4]: the products' first operand. Row h has query h's numbers rounded to DTYPE and
//            row h + 8 what that left; rows of no query are not looked at. The weights of the softmax are divided the same
//            way. Keys and values are as they are, bytes as multiples of their steps.
//
// What is lost: two float16 are off by 2⁻²³ of a number at most, or by 2⁻²⁵ where it is small; two bfloat16 by 2⁻¹⁷. A score
// in bfloat16 is then off by 2⁻¹⁷·Σ|q·k|, as much as a sum of 128 products in f32 may be by its own roundings (128·2⁻²⁴),
// and a five hundredth of what the rounding of keys to bfloat16 does (2⁻⁸ each). A result is off by twice that, relatively,
// and by 2⁻¹⁷ of the largest value for its own weights.
//
// Scores are a product of the queries with a tile of keys, a column for each position, which leaves each query's scores in the
// lanes that need its weights for the product with the values, a column for each dimension. Which channel of the first
// product is which dimension is free as long as both operands agree, so every lane loads 16 bytes at a time, straight from
// the cache: no shared memory, no shuffles but those of the softmax. A prompt's products (attend_prompt.cu) have the same
// channels in the same places, so that their sums have the same bits.
//
// Limits: HEAD_DIM is a multiple of 16; in float16, scaled queries are float16's in size (65504), as are keys and values that
// are not bytes.
#pragma once
#include "common.cuh"

#define QUERY_FLOATS (8 * HEAD_DIM)
// Whether threads have no registers for keys and values before they need them, nor for both at once.
#define LATE (HEAD_DIM > 128 && ATTEND_THREADS > 256)

// Sums of two numbers of DTYPE each.
__device__ __forceinline__ u32 add2(u32 a, u32 b) { return fma2(a, DTYPE == 1 ? 0x3f803f80u : 0x3c003c00u, b); }

// Bytes of the cache in the lower halves of two words as numbers of DTYPE.
__device__ __forceinline__ u32 widened_bytes(u32 two) {
    // 1024 or 128 and more, of which the rest is taken: exact. bfloat16 has no room for the highest bit beside its 128.
    if (DTYPE == 0) return add2(two | 0x64006400u, 0xe480e480u);
    return add2(two & 0x007f007fu | 0x43004300u, ~two & 0x00800080u | 0xc300c300u);
}

// How SHARERS lanes share a position's dimensions, two in a word: 16 bytes of DTYPE each as long as all have some, then 8,
// then 4.
template <int SHARERS>
struct RowPart {
    static constexpr int WORDS = HEAD_DIM / 2 / SHARERS, BY_FOUR = WORDS / 4 * 4, BY_TWO = WORDS / 2 * 2;
    u32 raw[IN_BYTES ? (WORDS + 1) / 2 : WORDS];

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
#if KV == 3
#pragma unroll
        for (int w = 0; w < BY_FOUR; w += 4) {
            uint2 v = *(const uint2*)(row + dimension(part, w));
            raw[w / 2] = v.x, raw[w / 2 + 1] = v.y;
        }
        if constexpr (BY_TWO > BY_FOUR) raw[BY_FOUR / 2] = *(const u32*)(row + dimension(part, BY_FOUR));
        if constexpr (WORDS > BY_TWO) raw[BY_TWO / 2] = *(const u16*)(row + dimension(part, BY_TWO));
#else
#pragma unroll
        for (int w = 0; w < BY_FOUR; w += 4) {
            uint4 v = *(const uint4*)(row + dimension(part, w));
            raw[w] = v.x, raw[w + 1] = v.y, raw[w + 2] = v.z, raw[w + 3] = v.w;
        }
        if constexpr (BY_TWO > BY_FOUR) {
            uint2 v = *(const uint2*)(row + dimension(part, BY_FOUR));
            raw[BY_FOUR] = v.x, raw[BY_FOUR + 1] = v.y;
        }
        if constexpr (WORDS > BY_TWO) raw[BY_TWO] = *(const u32*)(row + dimension(part, BY_TWO));
#endif
    }

    // Two numbers of DTYPE.
    __device__ __forceinline__ u32 word(int w) const {
        if (!IN_BYTES) return raw[w];
        return widened_bytes(prmt(raw[w / 2], 0, w % 2 ? 0x4342 : 0x4140));
    }
};
typedef RowPart<4> Key;
typedef RowPart<8> Value;

// Dimension d of query h, for the products.
__device__ __forceinline__ void put_query(float* queries, int h, int d, float v) {
    int lane = h * 4 + Key::part_of(d), w = Key::word_of(d);
    u16 high = narrow(v), low = narrow(__fsub_rn(v, widen(high)));
    u16* to = (u16*)queries + ((w / 2 * 32 + lane) * 4 + w % 2 * 2) * 2 + d % 2;
    to[0] = high, to[2] = low;
}

// What two rows of a product come to that are the halves of one query: of one column, and of the next.
__device__ __forceinline__ float2 halves(const float (&d)[4]) {
    return make_float2(__fadd_rn(d[0], d[2]), __fadd_rn(d[1], d[3]));
}

// Of a tile, what this lane has for its query: the largest score, the sum of the weights scaled by that, and its weights as the
// products' first operand. Of bytes, weights are multiplied by their positions' steps over `unit`, the power of two below the
// largest of these, so that two float16 have room for them whatever the values' size; results are multiples of it.
struct Weighted {
    float most, sum, unit;
    u32 a[4];

    // What two columns of a product come to.
    __device__ __forceinline__ float2 results(const float (&d)[4]) const {
        float2 v = halves(d);
        return IN_BYTES ? make_float2(__fmul_rn(v.x, unit), __fmul_rn(v.y, unit)) : v;
    }
};

// A tile's weights. scores: as they are; those that are not `seen` have no weight. key_steps, value_steps: what positions'
// numbers are multiples of.
template <class Seen>
__device__ __forceinline__ Weighted weights_of(float2 (&scores)[2], float softcap, const float2 (&key_steps)[2],
                                               const float2 (&value_steps)[2], Seen seen) {
    Weighted w;
    w.most = -INFINITY;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (IN_BYTES) scores[j].x = __fmul_rn(scores[j].x, key_steps[j].x), scores[j].y = __fmul_rn(scores[j].y, key_steps[j].y);
        scores[j].x = seen(8 * j) ? capped(scores[j].x, softcap) : -INFINITY;
        scores[j].y = seen(8 * j + 1) ? capped(scores[j].y, softcap) : -INFINITY;
        w.most = fmaxf(w.most, fmaxf(scores[j].x, scores[j].y));
    }
    w.most = fmaxf(w.most, __shfl_xor_sync(FULL, w.most, 1));
    w.most = fmaxf(w.most, __shfl_xor_sync(FULL, w.most, 2));
    float sums[2], inverse = 1;
    if (IN_BYTES) {
        float largest = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (seen(8 * j)) largest = fmaxf(largest, value_steps[j].x);
            if (seen(8 * j + 1)) largest = fmaxf(largest, value_steps[j].y);
        }
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
        u32 power = __float_as_uint(largest) & 0x7f800000u;
        // Steps too small for a power of two are as good as none, and an infinite one is NaN's.
        bool usual = power >= 0x01000000u && power < 0x7f000000u;
        w.unit = usual ? __uint_as_float(power) : largest < 1 ? 1.0f : __uint_as_float(0x7fc00000u);
        if (usual) inverse = __uint_as_float(0x7f000000u - power);
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float2 v = make_float2(rescale(scores[j].x, w.most), rescale(scores[j].y, w.most));
        sums[j] = __fadd_rn(v.x, v.y);
        // What is not seen may have no step.
        if (IN_BYTES) {
            v.x = v.x == 0 ? 0 : __fmul_rn(v.x, __fmul_rn(value_steps[j].x, inverse));
            v.y = v.y == 0 ? 0 : __fmul_rn(v.y, __fmul_rn(value_steps[j].y, inverse));
        }
        u32 high = narrow2(v.x, v.y);
        w.a[2 * j] = high;
        w.a[2 * j + 1] = narrow2(__fsub_rn(v.x, widen((u16)high)), __fsub_rn(v.y, widen((u16)(high >> 16))));
    }
    w.sum = __fadd_rn(sums[0], sums[1]);
    w.sum = __fadd_rn(w.sum, __shfl_xor_sync(FULL, w.sum, 1));
    w.sum = __fadd_rn(w.sum, __shfl_xor_sync(FULL, w.sum, 2));
    return w;
}

// A tile's keys of positions lane / 4 and 8 more, and its values of positions 2·(lane % 4), one more, and 8 more than these.
// Positions that do not count are zeros.
struct Tile {
    Key k[2];
    Value v[4];
    float2 key_steps[2], value_steps[2]; // of the positions of this lane's weights

    static __device__ __forceinline__ int key_position(int i) { return this_thread() % 32 / 4 + 8 * i; }
    static __device__ __forceinline__ int value_position(int i) { return this_thread() % 4 * 2 + i % 2 + i / 2 * 8; }
    // Which part of a row is this lane's.
    static __device__ __forceinline__ int key_part() { return this_thread() % 4; }
    static __device__ __forceinline__ int value_part() { return this_thread() % 32 / 4; }

    __device__ __forceinline__ void fetch_keys(const Cache& cache, int tile, const Span& span) {
        const Stored* from = cache.keys + cache.at(tile);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            k[i] = {};
            if (span.sees(tile + key_position(i))) k[i].load(from + key_position(i) * HEAD_DIM, key_part());
            if (IN_BYTES) key_steps[i] = *(const float2*)(cache.key_steps() + cache.place(tile) + value_position(2 * i));
        }
    }

    __device__ __forceinline__ void fetch_values(const Cache& cache, int tile, const Span& span) {
        const Stored* from = cache.values + cache.at(tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = {};
            if (span.sees(tile + value_position(i))) v[i].load(from + value_position(i) * HEAD_DIM, value_part());
            if (IN_BYTES && i % 2 == 0)
                value_steps[i / 2] = *(const float2*)(cache.value_steps() + cache.place(tile) + value_position(i));
        }
    }

    // Position `row` of the tile from shared memory.
    __device__ __forceinline__ void replace(const Newest& newest, int row) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (key_position(i) == row) k[i].load(newest.numbers, key_part());
            if (!IN_BYTES) continue;
            if (value_position(2 * i) == row) key_steps[i].x = newest.steps[0], value_steps[i].x = newest.steps[1];
            if (value_position(2 * i + 1) == row) key_steps[i].y = newest.steps[0], value_steps[i].y = newest.steps[1];
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (value_position(i) == row) v[i].load(newest.numbers + HEAD_DIM, value_part());
    }

    // The weights of the warp's queries.
    __device__ __forceinline__ Weighted weigh(const Cache& cache, const float* queries, float softcap, int tile,
                                              const Span& span) {
        const uint4* q = (const uint4*)queries + this_thread() % 32;
        float sums[2][2][4] = {};
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            uint4 a = q[i * 32];
#pragma unroll
            for (int j = 0; j < 2; j++) mma(sums[j][i % 2], a.x, a.y, a.z, a.w, k[j].word(2 * i), k[j].word(2 * i + 1));
        }
        float2 scores[2] = {score_of(sums[0]), score_of(sums[1])};
        // Values may not be here yet, but their steps have to.
        if (IN_BYTES && LATE)
#pragma unroll
            for (int j = 0; j < 2; j++)
                value_steps[j] = *(const float2*)(cache.value_steps() + cache.place(tile) + value_position(2 * j));
        return weights_of(scores, softcap, key_steps, value_steps,
                          [&](int more) { return span.sees(tile + value_position(0) + more); });
    }

    // Of two sums over every other product: both, of a query's halves.
    static __device__ __forceinline__ float2 score_of(const float (&s)[2][4]) {
        float d[4];
#pragma unroll
        for (int c = 0; c < 4; c++) d[c] = __fadd_rn(s[0][c], s[1][c]);
        return halves(d);
    }

    // What the tile comes to, to `to` [AT_ONCE, RESULT].
    __device__ __forceinline__ void put(const Cache&, const Weighted& w, int, const Span&, float* to) const {
        int query = this_thread() % 32 / 4, column = this_thread() % 4 * 2;
        bool kept = query < AT_ONCE;
        to += query * RESULT;
        if (kept && column == 0) *(float2*)to = make_float2(w.most, w.sum);
#pragma unroll
        for (int t = 0; t < HEAD_DIM / 16; t++) {
            u32 v0 = v[0].word(t), v1 = v[1].word(t), v2 = v[2].word(t), v3 = v[3].word(t);
            // A part's first dimension, and the one after it.
            float first[4] = {}, second[4] = {};
            mma(first, w.a[0], w.a[1], w.a[2], w.a[3], prmt(v0, v1, 0x5410), prmt(v2, v3, 0x5410));
            mma(second, w.a[0], w.a[1], w.a[2], w.a[3], prmt(v0, v1, 0x7632), prmt(v2, v3, 0x7632));
            float2 a = w.results(first), b = w.results(second);
            if (!kept) continue;
            *(float2*)(to + 2 + Value::dimension(column, t)) = make_float2(a.x, b.x);
            *(float2*)(to + 2 + Value::dimension(column + 1, t)) = make_float2(a.y, b.y);
        }
    }
};
