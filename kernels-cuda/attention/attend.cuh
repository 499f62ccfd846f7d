// Causal attention of grouped queries over the cached text: what attend.cu, attend_prompt.cu and layers.cu share.
//
//   out[row, head, :] = Σ_p softmax_p(cap(scale·q·k_p)) · v_p,   p from the window's start to the row's position
//
//   qkv    f32 [rows, (HEADS + 2·KV_HEADS)·HEAD_DIM]; queries and keys not yet rotated
//   delta  f32 like qkv, added to it, or null
//   rows   of each row where its text is (TextRow)
//   angles f32 [max_seq_len, HEAD_DIM / 2, (cos, sin)], or null: nothing is rotated
//   beyond u32, in mapped host memory: 1 if numbers were beyond float16 (common.cuh)
//   parts  f32 [rows, MOST_SHARES, PLACES, AT_ONCE, HEAD_DIM + 2], tickets u32 [rows, PLACES], zero before and after, or null
//
// cap(s) is softcap·tanh(s / softcap), or s itself where softcap is 0. A query at position p is multiplied by
// 1 + query_beta·ln(1 + ⌊p / query_original⌋) as well, unless query_beta is 0.
//
// A row has the same bits whether it comes alone or beside others, in one launch with its layer or in a prompt: every float
// operation of it, and their order, follow from its position alone, and are spelled out wherever a compiler could fuse them.
//
// - A *tile* is 16 positions, counted from 0. It makes its largest score, the sum of its weights, scaled by that, and as many
//   values times their weights, in the same way wherever it is.
// - A *share* is tiles in a row, merged in ascending order (`Merge`): 64 positions, counted from 0, or as many times that as
//   leave no more than MOST_SHARES shares of what the row sees. Shares are merged in ascending order as well.
//
// One block attends for one *place*: AT_ONCE queries that share a key, all of them but where they are many. Blocks of a place
// divide its shares; each leaves what its shares came to. Whichever block ends last merges all, so the result does not depend
// on which; without tickets all of them do, each a piece, who wait for each other's numbers (flow.cuh: parts are missing
// before).
//
// Scores and results are tensor cores' (attend_tensor.cuh) where products have 16 bits and heads a multiple of 16 dimensions;
// otherwise lanes' (attend_lanes.cuh).
//
// Constants: HEADS, KV_HEADS, HEAD_DIM (at most 256, % 8 == 0), KV (stored.cuh; a 16-bit type is DTYPE), SPLITS: the most
// blocks of a place (those of the grid, where it is a kernel of its own); QK_NORM (0 where there is none, or where a kernel of its own has normalized them already:
// rows.cu); ATTEND_THREADS of a block, 256 at least.
#pragma once
#include "flow.cuh"
#include "stored.cuh"
#include "sums.cuh"

#define HEAD_GROUP (HEADS / KV_HEADS)
#define HALF (HEAD_DIM / 2)
#define TENSOR (KV != 2 && DTYPE < 2 && (KV == DTYPE || IN_BYTES) && HEAD_DIM % 16 == 0)
// How many of a group's queries a block keeps: as many as two halves of a product have rows for, or as lanes have registers
// for. A group that does not go round leaves queries out in its last place: what is computed there is not looked at.
#define MOST_AT_ONCE (TENSOR ? 8 : ATTEND_THREADS <= 256 ? 4 : 2)
#define GROUP_PLACES ((HEAD_GROUP + MOST_AT_ONCE - 1) / MOST_AT_ONCE)
#define AT_ONCE ((HEAD_GROUP + GROUP_PLACES - 1) / GROUP_PLACES)
#define PLACES (KV_HEADS * GROUP_PLACES)
#define ATTEND_WARPS (ATTEND_THREADS / 32)
// Positions that shares are multiples of, and the most shares of a row.
#define LEAST_SHARE 64
#define MOST_SHARES 32
// Numbers that a tile or a share comes to for one query: its largest score, the sum of its weights, and its results.
#define RESULT (HEAD_DIM + 2)
#define QKV_WIDTH ((HEADS + 2 * KV_HEADS) * HEAD_DIM)

static_assert(ATTEND_WARPS >= AT_ONCE, "a warp merges each query");

struct State {
    u32 position, sampled, last;
};

// Where a row's text is, and how far behind its end the row stands.
struct TextRow {
    const State* state;
    char *keys, *values; // its cache: that of all layers (stored.cuh)
    u32 behind;
    u32 row; // of qkv and out
};

// The rows of a launch.
#define MOST_ROWS 16
struct TextRows {
    TextRow rows[MOST_ROWS];
};

// Numbers that earlier kernels left, in two parts; the second may be null. Sum (flow.cuh) is for those still on their way.
struct Settled {
    const float* x;
    const float* delta;

    __device__ __forceinline__ Asked ask(int i) const { return Asked{load1(x, delta, i), 0}; }
};

// A layer's attention in numbers.
struct Numbers {
    int capacity; // positions of the cache
    int window;   // latest positions that are seen, the token's own included; 0: all
    float scale;
    float softcap;
    float query_beta;
    int query_original;
};

struct Attend : Numbers {
    const float* qkv;
    const float* delta;
    long long offset; // of the layer in a cache's keys, and in its values
    const float2* angles;
    float* parts;
    u32* tickets;
    float* out;
    u32* beyond;
    int max_seq_len; // positions of angles
    int appended;    // whether the rows' own keys and values are in the cache already

    __device__ __forceinline__ Cache cache(const TextRow& row, int kv, int position) const {
        return Cache(row.keys + offset, row.values + offset, capacity, window > 0, kv, position);
    }

    // A row's queries, keys and values.
    __device__ __forceinline__ Settled numbers(long long row) const {
        return Settled{qkv + row * QKV_WIDTH, delta ? delta + row * QKV_WIDTH : nullptr};
    }
};

// Norms of queries and keys: of each head alone (QK_NORM 1), or of all queries and of all keys (2).
#ifndef QK_NORM
#define QK_NORM 0
#endif
struct HeadNorms {
    Norm query, key;
};

// Where the token `behind` the text goes: never past the cache, whatever the text's length says.
__device__ __forceinline__ int position_of(const State* state, int max_seq_len, u32 behind) {
    return (int)min(__ldcg(&state->position) + behind, (u32)max_seq_len - 1);
}

// Says so if a number that is to be stored, or to be float16 in a product, is beyond that.
__device__ __forceinline__ void check_size(const Attend& g, float f) {
    if (DTYPE == 0 && KV != 2 && fabsf(f) > HALF_MOST) note_beyond(g.beyond);
}

// Dimension i of a head, rotated with that half a head away.
__device__ __forceinline__ float rotated(float own, float other, float2 a, int i) {
    return __fmaf_rn(own, a.x, __fmul_rn(i < HALF ? -other : other, a.y));
}

// The same of numbers that are there, which begin at `first`.
__device__ __forceinline__ float rotated(const Settled& x, int first, const float2* angles, int i) {
    float2 a = angles ? angles[i % HALF] : make_float2(1, 0);
    float own = load1(x.x, x.delta, first + i), other = load1(x.x, x.delta, first + (i < HALF ? i + HALF : i - HALF));
    return rotated(own, other, a, i);
}

// The token's angles.
__device__ __forceinline__ const float2* angles_at(const Attend& g, int position) {
    return g.angles ? g.angles + (long long)position * HALF : nullptr;
}

// What queries are multiplied by.
__device__ __forceinline__ float query_scale(const Attend& g, int position) {
    if (g.query_beta == 0) return g.scale;
    return __fmul_rn(g.scale, __fmaf_rn(g.query_beta, logf(1.0f + position / g.query_original), 1.0f));
}

__device__ __forceinline__ float capped(float score, float softcap) {
    return softcap > 0 ? __fmul_rn(softcap, tanhf(__fdiv_rn(score, softcap))) : score;
}

// e^x, of x ≤ 0; good to 2 + |x| units.
__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fmul_rn(x, 1.4426950408889634f)));
    return y;
}

// What a softmax scaled for `from` must be multiplied by to be scaled for `to`; nothing yet is −inf.
__device__ __forceinline__ float rescale(float from, float to) {
    return from == -INFINITY ? 0.0f : exponential(__fsub_rn(from, to));
}

// `sum`, scaled by `old`, and a part's `v`, scaled by `own`.
__device__ __forceinline__ float merged(float own, float v, float old, float sum) {
    return __fmaf_rn(own, v, __fmul_rn(old, sum));
}

// A result over its weights' sum. Zeros have no sign: which one they have depends on what of no weight was added.
__device__ __forceinline__ float result_of(float v, float sum) { return __fdiv_rn(__fadd_rn(v, 0.0f), sum); }

// A softmax in the making, of parts that come in ascending order; results are the caller's.
struct Merge {
    float most, sum;

    __device__ __forceinline__ Merge() : most(-INFINITY), sum(0) {}

    // What results so far and those of up to 32 more parts are scaled by, in the part's lane, which brings its largest score.
    // Called by whole warps.
    struct Scales {
        float own, old;
    };
    __device__ __forceinline__ Scales scales(int count, float m) {
        int lane = this_lane();
        float upto = lane < count ? fmaxf(m, most) : most;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            float other = __shfl_up_sync(FULL, upto, d);
            if (lane >= d) upto = fmaxf(upto, other);
        }
        float before = __shfl_up_sync(FULL, upto, 1);
        if (lane == 0) before = most;
        most = __shfl_sync(FULL, upto, 31);
        return Scales{rescale(m, upto), rescale(before, upto)};
    }

    // The i-th of them, whose sum is in its lane: `add(own, old)` adds its results.
    template <class Add>
    __device__ __forceinline__ void part(int i, const Scales& scales, float l, Add add) {
        float own = __shfl_sync(FULL, scales.own, i), old = __shfl_sync(FULL, scales.old, i);
        sum = merged(own, __shfl_sync(FULL, l, i), old, sum);
        add(own, old);
    }
};

// The positions that a row sees, and how they go in shares.
struct Span {
    int first, end; // positions
    int begin;      // of the first share
    int share;      // positions of a share
    int shares, splits;

    __device__ __forceinline__ Span(int position, int window)
        : first(window > 0 ? max(0, position + 1 - window) : 0), end(position + 1), begin(first / LEAST_SHARE * LEAST_SHARE) {
        int least = position / LEAST_SHARE + 1 - first / LEAST_SHARE, each = (least + MOST_SHARES - 1) / MOST_SHARES;
        share = each * LEAST_SHARE, shares = (least + each - 1) / each, splits = min(SPLITS, shares);
    }

    // The first share of a block.
    __device__ __forceinline__ int share_of(int split) const { return (int)((u32)shares * split / (u32)splits); }
    // The first tile of a share in which a position is seen, and where its last one ends.
    __device__ __forceinline__ int begin_of(int s) const { return max(first / TILE * TILE, begin + s * share); }
    __device__ __forceinline__ int end_of(int s) const { return min((end + TILE - 1) / TILE * TILE, begin + (s + 1) * share); }
    __device__ __forceinline__ bool sees(int position) const { return (u32)(position - first) < (u32)(end - first); }
};

// A row's key and value as they are stored, in shared memory, from where its newest tile takes them.
struct Newest {
    Stored* numbers; // [key, value][HEAD_DIM]
    float* steps;    // [key, value], of bytes
};

#if TENSOR
#include "attend_tensor.cuh"
#else
#include "attend_lanes.cuh"
#endif

#ifndef ATTEND_PREFETCH
#define ATTEND_PREFETCH (1 << 16)
#endif

// Brings positions of the cache nearer, while queries are still made.
__device__ __forceinline__ void prefetch(const Cache& cache, int begin, int end) {
    int bytes = min((end - begin) * HEAD_DIM * (int)sizeof(Stored), ATTEND_PREFETCH);
    long long at = cache.at(begin) * (int)sizeof(Stored), all = (long long)cache.capacity * HEAD_DIM * sizeof(Stored);
    for (int i = this_thread() * 128; i < bytes; i += ATTEND_THREADS * 128) {
        long long byte = at + i < all ? at + i : at + i - all;
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)cache.keys + byte));
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)cache.values + byte));
    }
}

// The same of a block's shares.
__device__ __forceinline__ void prefetch(const Cache& cache, const Span& span, int split) {
    prefetch(cache, span.begin_of(span.share_of(split)), span.end_of(span.share_of(split + 1) - 1));
}

// Shared memory: queries [QUERY_FLOATS], room for a key and a value, then what warps' tiles came to
// [ATTEND_WARPS, AT_ONCE, RESULT].
__device__ __forceinline__ float* results_of(float* queries) { return queries + QUERY_FLOATS + 2 * HEAD_DIM; }

// A block's shares of one place: to `out` if there is one for all, otherwise to parts from `parts` on, `stride` numbers from one
// share's to the next. `tile` has this warp's first tile. Called by ATTEND_THREADS threads, T their team.
template <class T>
__device__ __forceinline__ void attend_shares(const Cache& cache, Tile& tile, float* queries, float softcap, const Span& span,
                                              int split, float* out, float* parts, int stride) {
    constexpr int ROUND = ATTEND_WARPS * TILE, PAIRS = (HEAD_DIM + 63) / 64;
    float* results = results_of(queries);
    int warp = this_thread() / 32, lane = this_thread() % 32, share = span.share_of(split);
    int from = span.begin_of(share), to = span.end_of(span.share_of(split + 1) - 1), ends = span.end_of(share);
    // Of the query that this warp merges.
    Merge merge;
    float2 sums[PAIRS] = {};
#pragma unroll 1
    for (int base = from; base < to; base += ROUND) {
        int own = base + warp * TILE, next = own + ROUND;
        Weighted weighted;
        if (own < to) {
            if (LATE) tile.fetch_keys(cache, own, span);
            weighted = tile.weigh(cache, queries, softcap, own, span);
            if (!LATE && next < to) tile.fetch_keys(cache, next, span);
        }
        // Who merges is done with the tiles of the round before.
        if (base > from) T::sync();
        if (own < to) {
            if (LATE) tile.fetch_values(cache, own, span);
            tile.put(cache, weighted, own, span, results + warp * (AT_ONCE * RESULT));
            if (!LATE && next < to) tile.fetch_values(cache, next, span);
        }
        T::sync();
        if (warp >= AT_ONCE) continue;
        const float* mine = results + warp * RESULT;
        int tiles = min(ATTEND_WARPS, (to - base) / TILE), t = 0;
#pragma unroll 1
        while (t < tiles) {
            int count = min(tiles - t, (ends - base) / TILE - t);
            const float* head = mine + (t + min(lane, count - 1)) * (AT_ONCE * RESULT);
            Merge::Scales scales = merge.scales(count, head[0]);
            float l = head[1];
#pragma unroll 2
            for (int i = 0; i < count; i++)
                merge.part(i, scales, l, [&](float own, float old) {
                    const float* tile = mine + (t + i) * (AT_ONCE * RESULT) + 2;
#pragma unroll
                    for (int j = 0; j < PAIRS; j++)
                        if (64 * j + 2 * lane < HEAD_DIM) {
                            float2 v = *(const float2*)(tile + 64 * j + 2 * lane);
                            sums[j] = make_float2(merged(own, v.x, old, sums[j].x), merged(own, v.y, old, sums[j].y));
                        }
                });
            t += count;
            if (base + t * TILE < ends) continue;
            float* part = out ? out + warp * HEAD_DIM - 2 : parts + (long long)share * stride + warp * RESULT;
#pragma unroll
            for (int j = 0; j < PAIRS; j++)
                if (64 * j + 2 * lane < HEAD_DIM) {
                    if (out) sums[j] = make_float2(result_of(sums[j].x, merge.sum), result_of(sums[j].y, merge.sum));
                    put2(part + 2 + 64 * j + 2 * lane, sums[j].x, sums[j].y);
                    sums[j] = make_float2(0, 0);
                }
            if (!out && lane == 0) put2(part, merge.most, merge.sum);
            merge = Merge();
            share++, ends = span.end_of(share);
        }
    }
}

__device__ __forceinline__ u32 add_ticket(u32* tickets) {
    u32 ticket;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(tickets) : "memory");
    return ticket;
}

// Neighbours of a head that are neighbouring lanes', and how many such pieces it has.
#define PIECE (HEAD_DIM % 32 == 0 ? 32 : HEAD_DIM % 16 == 0 ? 16 : 8)
#define HEAD_PIECES (HEAD_DIM / PIECE)

// What a norm divides by, inverted, of each head that the block's numbers are of, of which a thread has one in each step; queries and keys have norms
// of their own. scratch: the heads' numbers, and one for each head. The order of sums is that of sums.cuh.
template <class T, int STEPS>
__device__ __forceinline__ void scales_of_heads(const float (&v)[STEPS], const HeadNorms& norms, float* scratch,
                                                float (&scales)[STEPS]) {
    constexpr int NUMBERS = (AT_ONCE + 1) * HEAD_DIM;
    float* of_heads = scratch + NUMBERS;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + this_thread();
        if (i < NUMBERS) scratch[i] = v[s];
    }
    T::sync();
    for (int head = this_thread() / 32; head <= AT_ONCE; head += ATTEND_WARPS) {
        int d = this_thread() % 32 * 8;
        Eights own = {};
        if (d < HEAD_DIM) {
            const float2* from = (const float2*)(scratch + head * HEAD_DIM + d);
            own = Eights{make_float4(from[0].x, from[0].y, from[1].x, from[1].y),
                         make_float4(from[2].x, from[2].y, from[3].x, from[3].y)};
        }
        float squares = warp_sum(squares_of(own.a, own.b));
        float eps = head < AT_ONCE ? norms.query.eps : norms.key.eps;
        if (this_thread() % 32 == 0) of_heads[head] = inverse_rms(squares, HEAD_DIM, eps);
    }
    T::sync();
#pragma unroll
    for (int s = 0; s < STEPS; s++) scales[s] = of_heads[min((s * ATTEND_THREADS + this_thread()) / HEAD_DIM, AT_ONCE)];
    // What follows in scratch is the heads' largest numbers.
    if (IN_BYTES) T::sync();
}

// The same of numbers `first` to `first + len` of x, which are waited for. scratch: a number for each span.
template <class T, class Source>
__device__ __forceinline__ float scale_of_row(const Source& x, int first, int len, float eps, float* scratch) {
#pragma unroll 1
    for (int s = this_thread() / 32; s < SPANS_OF(len); s += ATTEND_WARPS) {
        int k = s * SPAN + this_thread() % 32 * 8;
        Eights v = await_eights(x, first + k, ask_eights(x, first + k, first + len));
        float squares = warp_sum(squares_of(v.a, v.b));
        if (this_thread() % 32 == 0) scratch[s] = squares;
    }
    T::sync();
    return inverse_rms_of(len, eps, [&](int s) { return scratch[s]; });
}

// The largest numbers of the block's key and of its value, of which a thread has one in each step from number `first` on:
// `most` for the one that its own is of. scratch: a number for each PIECE.
template <class T, int STEPS>
__device__ __forceinline__ void largest_of_heads(const float (&v)[STEPS], int first, float* scratch, float (&most)[STEPS]) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + this_thread() - first;
        float size = size_of(v[s]);
#pragma unroll
        for (int d = PIECE / 2; d > 0; d /= 2) size = fmaxf(size, __shfl_xor_sync(FULL, size, d));
        if (i >= 0 && i % PIECE == 0 && i < 2 * HEAD_DIM) scratch[i / PIECE] = size;
    }
    T::sync();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + this_thread() - first, head = i < HEAD_DIM ? 0 : 1;
        most[s] = 0;
#pragma unroll
        for (int p = 0; p < HEAD_PIECES; p++) most[s] = fmaxf(most[s], scratch[head * HEAD_PIECES + p]);
    }
}

// Shares of block `split` of one row at `position`, and the merge, as above. x: the row's
// queries, keys and values; `ready` is called when they are there; parts and tickets are the row's own.
template <class T, class Source, class Ready>
__device__ __forceinline__ void attend_token(const Attend& g, const HeadNorms& norms, const Source& x, float* queries,
                                             u32* ticket, int place, int split, const TextRow& row, int position,
                                             float* out, float* parts, u32* tickets, Ready ready) {
    Span span(position, g.window);
    if (split >= span.splits) return;
    int kv = place / GROUP_PLACES, first_head = kv * HEAD_GROUP + place % GROUP_PLACES * AT_ONCE;
    int heads = min(AT_ONCE, (kv + 1) * HEAD_GROUP - first_head), splits = span.splits;
    // Every place's block appends, since it may read what it has appended: the same numbers.
    bool has_newest = split == splits - 1 && !g.appended;
    Cache cache = g.cache(row, kv, position);
    // Queries, and behind them the new key and value for the block that they belong to. All loads first.
    constexpr int OWN = AT_ONCE * HEAD_DIM, STEPS = (OWN + 2 * HEAD_DIM + ATTEND_THREADS - 1) / ATTEND_THREADS;
    int t = this_thread(), count = has_newest ? OWN + 2 * HEAD_DIM : OWN;
    const float2* angles = angles_at(g, position);
    Newest newest{(Stored*)(queries + QUERY_FLOATS), queries + QUERY_FLOATS + HEAD_DIM};
    // Of the cache, while the query may be on its way. The newest is not there yet.
    Tile tile;
    int first_tile = span.begin_of(span.share_of(split)) + t / 32 * TILE;
    Span before = span;
    if (has_newest) before.end = position;
    bool busy = first_tile < span.end_of(span.share_of(split + 1) - 1);
    if (!LATE && busy) tile.fetch_keys(cache, first_tile, before);
    float2 turns[STEPS];
    Asked own[STEPS] = {}, others[STEPS] = {};
    // Of a number and of the one that it is rotated with.
    float2 weights[STEPS];
    auto is_wanted = [&](int i) { return i < count && (i >= OWN || i / HEAD_DIM < heads); };
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + t, d = i % HEAD_DIM, other = d < HALF ? d + HALF : d - HALF;
        turns[s] = angles ? angles[d % HALF] : make_float2(1, 0);
        if (QK_NORM && is_wanted(i) && i < OWN + HEAD_DIM) {
            int head = i < OWN ? first_head + i / HEAD_DIM : kv;
            const float* gamma = (i < OWN ? norms.query : norms.key).gamma + (QK_NORM == 2 ? head * HEAD_DIM : 0);
            weights[s] = make_float2(gamma[d], gamma[other]);
        }
    }
    bool there;
    Patience patience;
    do {
        there = true;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int i = s * ATTEND_THREADS + t, d = i % HEAD_DIM;
            // The place's heads, then its key, then its value, which is not rotated.
            int head = i < OWN ? first_head + i / HEAD_DIM : i < OWN + HEAD_DIM ? HEADS + kv : HEADS + KV_HEADS + kv;
            if (!is_wanted(i)) continue;
            own[s] = x.ask(head * HEAD_DIM + d);
            if (i < OWN + HEAD_DIM) others[s] = x.ask(head * HEAD_DIM + (d < HALF ? d + HALF : d - HALF));
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) there &= own[s].there() & others[s].there();
    } while (patience.warp_goes_on(there));
    float values[STEPS], scales[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) values[s] = own[s].sum();
    // Where results will lie.
    float* scratch = results_of(queries);
    if constexpr (QK_NORM == 2) {
        float of_queries = scale_of_row<T>(x, 0, HEADS * HEAD_DIM, norms.query.eps, scratch), of_keys = 0;
        if (has_newest)
            of_keys = scale_of_row<T>(x, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, norms.key.eps, scratch + SPANS_OF(HEADS * HEAD_DIM));
#pragma unroll
        for (int s = 0; s < STEPS; s++) scales[s] = s * ATTEND_THREADS + t < OWN ? of_queries : of_keys;
        if (IN_BYTES) T::sync();
    }
    if (!LATE && busy) tile.fetch_values(cache, first_tile, before);
    if constexpr (QK_NORM == 1) scales_of_heads<T>(values, norms, scratch, scales);
    float scale = query_scale(g, position), most[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + t;
        if (i >= OWN + HEAD_DIM) continue;
        float other = others[s].sum();
        if (QK_NORM) {
            values[s] = __fmul_rn(__fmul_rn(values[s], scales[s]), weights[s].x);
            other = __fmul_rn(__fmul_rn(other, scales[s]), weights[s].y);
        }
        values[s] = rotated(values[s], other, turns[s], i % HEAD_DIM);
        if (i < OWN) values[s] = __fmul_rn(values[s], scale);
    }
    if (IN_BYTES && has_newest) largest_of_heads<T>(values, OWN, scratch, most);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + t, d = i % HEAD_DIM, is_value = i >= OWN + HEAD_DIM;
        if (!is_wanted(i)) continue;
        float v = values[s];
        if (i < OWN || !IN_BYTES) check_size(g, v);
        if (i < OWN) {
            put_query(queries, i / HEAD_DIM, d, v);
            continue;
        }
        Step step(IN_BYTES ? most[s] : 0.0f);
        Stored rounded = IN_BYTES ? (Stored)step.byte(v) : to_stored(v);
        newest.numbers[i - OWN] = rounded;
        if (IN_BYTES && d == 0) newest.steps[is_value] = step.step;
        (is_value ? cache.values : cache.keys)[cache.at(position) + d] = rounded;
        if (IN_BYTES && d == 0) (is_value ? cache.value_steps() : cache.key_steps())[cache.place(position)] = step.step;
    }
    T::sync();
    ready();
    if (!LATE && has_newest && busy) tile.replace(newest, position - first_tile);
    constexpr int STRIDE = PLACES * AT_ONCE * RESULT;
    out += first_head * HEAD_DIM, parts += place * (AT_ONCE * RESULT);
    bool alone = span.shares == 1;
    // Of queries that there are no heads for nothing is kept; they have rows of their own in parts.
    attend_shares<T>(cache, tile, queries, g.softcap, span, split, alone && heads == AT_ONCE ? out : nullptr, parts, STRIDE);
    if (alone && heads == AT_ONCE) return;

    // By warps: 32 dimensions of a head at a time.
    constexpr int HEAD_LANES = (HEAD_DIM + 31) / 32;
    int first = 0, last = heads * HEAD_LANES;
    if (tickets) {
        // What the block has written is there for whoever takes a later ticket.
        T::sync();
        if (threadIdx.x == 0) *ticket = add_ticket(tickets + place);
        T::sync();
        if (*ticket != splits - 1) return;
        if (threadIdx.x == 0) tickets[place] = 0;
    } else {
        first = heads * HEAD_LANES * split / splits, last = heads * HEAD_LANES * (split + 1) / splits;
    }
#pragma unroll 1
    for (int piece = first + this_thread() / 32; piece < last; piece += ATTEND_WARPS) {
        int h = piece / HEAD_LANES, lane = this_thread() % 32, d = piece % HEAD_LANES * 32 + lane;
        const float* from = parts + h * RESULT;
        float m = -INFINITY, l = 0, shares[MOST_SHARES] = {};
        Patience patience;
        do {
            if (lane < span.shares) m = ask1(from + lane * STRIDE), l = ask1(from + lane * STRIDE + 1);
#pragma unroll
            for (int s = 0; s < MOST_SHARES; s++)
                if (s < span.shares && d < HEAD_DIM) shares[s] = ask1(from + s * STRIDE + 2 + d);
            there = !missing(m) & !missing(l);
#pragma unroll
            for (int s = 0; s < MOST_SHARES; s++) there &= !missing(shares[s]);
        } while (patience.warp_goes_on(there));
        __syncwarp();
        float sum = 0;
        Merge merge;
        Merge::Scales scales = merge.scales(span.shares, m);
#pragma unroll
        for (int s = 0; s < MOST_SHARES; s++)
            if (s < span.shares)
                merge.part(s, scales, l, [&](float own, float old) { sum = merged(own, shares[s], old, sum); });
        if (d < HEAD_DIM) put(out + h * HEAD_DIM + d, result_of(sum, merge.sum));
    }
}
