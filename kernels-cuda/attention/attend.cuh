// Causal attention of grouped queries over the cached text, one pass with a running softmax: what attend.cu, layers.cu and
// attend_prompt.cu share.
//
//   out[token, head, :] = Σ_p softmax_p(cap(scale·q·k_p)) · v_p,   p from the window's start to the token
//
//   qkv    f32 [tokens, (HEADS + 2·KV_HEADS)·HEAD_DIM]; queries and keys not yet rotated
//   keys, values  [KV_HEADS, capacity, HEAD_DIM] in KV's type (0 float16, 1 bfloat16, 2 float32); a ring: position p lies
//                 in slot p mod capacity
//   angles f32 [max_seq_len, HEAD_DIM / 2, (cos, sin)], or null: nothing is rotated
//   beyond u32, in mapped host memory: 1 if numbers were beyond float16 (common.cuh)
//   parts  f32 [KV_HEADS, SPLITS, HEAD_GROUP, HEAD_DIM + 2], tickets u32 [KV_HEADS], zero before and after, or null
//
// cap(s) is softcap·tanh(s / softcap), or s itself where softcap is 0. A query at position p is multiplied by
// 1 + query_beta·ln(1 + ⌊p / query_original⌋) as well, unless query_beta is 0.
//
// The capacity is a multiple of TILE positions, and tiles begin at such multiples: a tile lies in the cache as one piece.
// Where there is no window it is all of max_seq_len, otherwise the window: a token replaces what it sees no more. Several
// tokens at once are appended when all have their answer (attend_prompt.cu).
//
// The block whose share holds a single token rotates its key and appends both; each block rotates its own queries.
// Shares are merged in order: by whichever block of a key-value head ends last, so the result does not depend on which;
// without tickets by all of them, each a piece, who wait for each other's numbers (flow.cuh: parts are missing before).
//
// Scores and results are tensor cores' (attend_tensor.cuh) where all is float16 or all is bfloat16 and heads have a
// multiple of 16 dimensions, no more than 128 where threads have few registers; otherwise lanes' (attend_lanes.cuh).
//
// Constants: HEADS, KV_HEADS, HEAD_DIM (at most 256, % 8 == 0), KV, SPLITS (at most 32); QK_NORM (0 where there is
// none, or where a kernel of its own has normalized them already: rows.cu);
// ATTEND_THREADS of a block, a warp at least for every four queries of a key-value head.
#pragma once
#include "flow.cuh"

#define HEAD_GROUP (HEADS / KV_HEADS)
#define HALF (HEAD_DIM / 2)
#define TENSOR (KV == DTYPE && KV < 2 && HEAD_DIM % 16 == 0 && HEAD_DIM <= (ATTEND_THREADS > 256 ? 128 : 256))
// How many of a group's queries a warp keeps; the others are other warps'. More fit where a thread may have more registers.
// A group that does not go round leaves places empty in its last set: what is computed there is not looked at.
#define MOST_AT_ONCE (TENSOR || ATTEND_THREADS <= 256 ? 4 : 2)
// Sets of warps that keep the same queries.
#define QUERY_SETS ((HEAD_GROUP + MOST_AT_ONCE - 1) / MOST_AT_ONCE)
#define AT_ONCE ((HEAD_GROUP + QUERY_SETS - 1) / QUERY_SETS)
#define SET_WARPS (ATTEND_THREADS / 32 / QUERY_SETS)
// Positions that lie in the cache as one piece, whatever the ring.
#define TILE 16
// Fewest tiles worth a block of their own.
#define SHARE 2

static_assert(SET_WARPS > 0, "more queries to a key-value head than warps have places");

struct State {
    u32 position, sampled, last;
};

// Numbers that earlier kernels left, in two parts; the second may be null. Sum (flow.cuh) is for those still on their way.
struct Settled {
    const float* x;
    const float* delta;

    __device__ __forceinline__ Asked ask(int i) const { return Asked{load1(x, delta, i), 0, 0}; }
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
    void* keys;
    void* values;
    const float2* angles;
    const State* state;
    float* parts;
    u32* tickets;
    float* out;
    u32* beyond;
    int max_seq_len; // positions of angles
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

#if KV == 2
typedef float Stored;
#else
typedef u16 Stored;
#endif

__device__ __forceinline__ Stored to_stored(float f) {
#if KV == 2
    return f;
#else
    return KV == 1 ? float_to_bfloat(f) : float_to_half(f);
#endif
}

// Says so if a number that is to be stored, or to be float16 in a product, is beyond that.
__device__ __forceinline__ void check_size(const Attend& g, float f) {
    if (KV == 0 && fabsf(f) > HALF_MOST) note_beyond(g.beyond);
}

// Dimension i of a head, rotated with that half a head away. The roundings are spelled out, so that they are the same
// wherever this is compiled: what is kept does not depend on how many tokens came at once.
__device__ __forceinline__ float rotated(float own, float other, float2 a, int i) {
    return __fmaf_rn(own, a.x, __fmul_rn(i < HALF ? -other : other, a.y));
}

__device__ __forceinline__ float rotated(const float* head, const float2* angles, int i) {
    float2 a = angles ? angles[i % HALF] : make_float2(1, 0);
    return rotated(__ldcg(head + i), __ldcg(head + (i < HALF ? i + HALF : i - HALF)), a, i);
}

// The token's angles.
__device__ __forceinline__ const float2* angles_at(const Attend& g, int position) {
    return g.angles ? g.angles + (long long)position * HALF : nullptr;
}

// What queries are multiplied by.
__device__ __forceinline__ float query_scale(const Attend& g, int position) {
    if (g.query_beta == 0) return g.scale;
    return g.scale * (1.0f + g.query_beta * logf(1.0f + position / g.query_original));
}

__device__ __forceinline__ float capped(float score, float softcap) {
    return softcap > 0 ? softcap * tanhf(score / softcap) : score;
}

// A key-value head's part of the cache while a token at `position` reads it: what it sees begins in this turn of the ring or
// in the one before.
struct Cache {
    Stored *keys, *values;
    int turn, capacity;

    __device__ __forceinline__ Cache(const Attend& g, int kv, int position)
        : keys((Stored*)g.keys + (long long)kv * g.capacity * HEAD_DIM),
          values((Stored*)g.values + (long long)kv * g.capacity * HEAD_DIM),
          turn(g.window > 0 ? position - position % g.capacity : 0), capacity(g.capacity) {}

#ifdef ASIDE
    // Positions from `from` on lie one after the other from `aside` on (attend_prompt.cu).
    int from = 0x7fffffff;
    long long aside = 0;

    __device__ __forceinline__ void lies_aside(int first, long long place) { from = first, aside = place; }
#endif

    // Where the first number of a position is.
    __device__ __forceinline__ long long at(int position) const {
#ifdef ASIDE
        if (position >= from) return aside + (long long)(position - from) * HEAD_DIM;
#endif
        int slot = position - turn;
        return (long long)(slot < 0 ? slot + capacity : slot) * HEAD_DIM;
    }
};

// What a softmax scaled for `from` must be multiplied by to be scaled for `to`; nothing yet is −inf.
__device__ __forceinline__ float rescale(float from, float to) { return from == -INFINITY ? 0.0f : expf(from - to); }

// What parts of a softmax count for, each in the lane that brings its largest score and its sum.
struct Weights {
    float most, own, sum;

    __device__ __forceinline__ Weights(float m, float l)
        : most(warp_max(m)), own(rescale(m, most)), sum(warp_sum(own * l)) {}

    __device__ __forceinline__ float of(int part) const { return __shfl_sync(FULL, own, part); }
};

// What a warp has of its queries [AT_ONCE, HEAD_DIM + 2]: the largest score, the sum, and the result times that.
__device__ __forceinline__ float* results_of_warp(float* warps) {
    return warps + this_thread() / 32 * (AT_ONCE * (HEAD_DIM + 2));
}

#if TENSOR
#include "attend_tensor.cuh"
#else
#include "attend_lanes.cuh"
#endif

// Brings a share of the cache nearer, while queries are still made.
__device__ __forceinline__ void prefetch(const Cache& cache, int begin, int end) {
    int bytes = min((end - begin) * HEAD_DIM * (int)sizeof(Stored), 1 << 16);
    long long at = cache.at(begin) * (int)sizeof(Stored), all = (long long)cache.capacity * HEAD_DIM * sizeof(Stored);
    for (int i = this_thread() * 128; i < bytes; i += ATTEND_THREADS * 128) {
        long long byte = at + i < all ? at + i : at + i - all;
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)cache.keys + byte));
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)cache.values + byte));
    }
}

// One block, one key-value head, one share of the positions. Shared memory: queries [QUERY_FLOATS], room for a key and a
// value, then warps' results [QUERY_SETS · SET_WARPS, AT_ONCE, HEAD_DIM + 2]. Called by ATTEND_THREADS threads, T their
// team; `batch` holds the first positions.
template <class T>
__device__ __forceinline__ void attend_share(const Cache& cache, Batch& batch, float* queries, float softcap, int begin,
                                             int end, float* out, float* part) {
    float* warps = queries + QUERY_FLOATS + 2 * HEAD_DIM;
    int warp = this_thread() / 32, set = warp / SET_WARPS;
    // Warps of a set that have any positions.
    int active = min(SET_WARPS, (end - begin / TILE * TILE + TEAM_POSITIONS - 1) / TEAM_POSITIONS);
    if (set < QUERY_SETS && warp % SET_WARPS < active)
        attend_positions(batch, queries + set * SET_FLOATS, cache, softcap, begin, end, warps);
    T::sync();
    // A warp for each head: more of them would make the same weights again.
    int lane = this_thread() % 32;
    for (int h = warp; h < HEAD_GROUP; h += ATTEND_THREADS / 32) {
        constexpr int STRIDE = AT_ONCE * (HEAD_DIM + 2), PAIRS = (HEAD_DIM + 63) / 64;
        const float* from = warps + h / AT_ONCE * SET_WARPS * STRIDE + h % AT_ONCE * (HEAD_DIM + 2);
        float most = -INFINITY, sum = 0;
        float2 sums[PAIRS] = {};
#pragma unroll 4
        for (int w = 0; w < active; w++) most = fmaxf(most, from[w * STRIDE]);
#pragma unroll 4
        for (int w = 0; w < active; w++) {
            float f = rescale(from[w * STRIDE], most);
            sum = fmaf(f, from[w * STRIDE + 1], sum);
#pragma unroll
            for (int j = 0; j < PAIRS; j++)
                if (64 * j + 2 * lane < HEAD_DIM) {
                    float2 v = *(const float2*)(from + w * STRIDE + 2 + 64 * j + 2 * lane);
                    sums[j] = make_float2(fmaf(f, v.x, sums[j].x), fmaf(f, v.y, sums[j].y));
                }
        }
        float* to = out ? out + h * HEAD_DIM : part + h * (HEAD_DIM + 2) + 2;
        float divisor = out ? sum : 1.0f;
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
            if (64 * j + 2 * lane < HEAD_DIM) put2(to + 64 * j + 2 * lane, sums[j].x / divisor, sums[j].y / divisor);
        if (!out && lane == 0) put2(to - 2, most, sum);
    }
}

__device__ __forceinline__ u32 add_ticket(u32* tickets) {
    u32 ticket;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(tickets) : "memory");
    return ticket;
}

// The positions that one token attends to, and how they are shared out: by tiles.
struct Span {
    int first, end, tile, tiles, splits;

    __device__ __forceinline__ Span(int position, int window)
        : first(window > 0 ? max(0, position + 1 - window) : 0), end(position + 1), tile(first / TILE),
          tiles(position / TILE + 1 - tile), splits(min(SPLITS, (tiles + SHARE - 1) / SHARE)) {}

    __device__ __forceinline__ int tile_of(int split) const { return (tile + (u32)tiles * split / (u32)splits) * TILE; }
    __device__ __forceinline__ int begin_of(int split) const { return max(first, tile_of(split)); }
    __device__ __forceinline__ int end_of(int split) const { return min(end, tile_of(split + 1)); }
};

// What a norm of `len` numbers with these squares divides by, inverted.
__device__ __forceinline__ float inverse_root(float squares, int len, float eps) { return 1.0f / sqrtf(squares / len + eps); }

// The same of each head that the block's numbers are of, of which a thread has one in each step; queries and keys have norms
// of their own. scratch: a number for each PIECE of them, what lanes that are neighbours have.
template <class T, int STEPS>
__device__ __forceinline__ void scales_of_heads(const float (&v)[STEPS], const HeadNorms& norms, float* scratch,
                                                float (&scales)[STEPS]) {
    constexpr int PIECE = HEAD_DIM % 32 == 0 ? 32 : HEAD_DIM % 16 == 0 ? 16 : 8, PIECES = HEAD_DIM / PIECE;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + this_thread();
        float squares = v[s] * v[s];
#pragma unroll
        for (int d = PIECE / 2; d > 0; d /= 2) squares += __shfl_xor_sync(FULL, squares, d);
        if (i % PIECE == 0 && i < (HEAD_GROUP + 1) * HEAD_DIM) scratch[i / PIECE] = squares;
    }
    T::sync();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int head = min((s * ATTEND_THREADS + this_thread()) / HEAD_DIM, HEAD_GROUP);
        float squares = 0;
#pragma unroll
        for (int p = 0; p < PIECES; p++) squares += scratch[head * PIECES + p];
        scales[s] = inverse_root(squares, HEAD_DIM, head < HEAD_GROUP ? norms.query.eps : norms.key.eps);
    }
}

// The same of numbers `first` to `first + len` of x, which are waited for. scratch: a number for each warp.
template <class T, class Source>
__device__ __forceinline__ float scale_of_row(const Source& x, int first, int len, float eps, float* scratch) {
    float squares = 0;
#pragma unroll 1
    for (int k = this_thread() * 8; k < len; k += ATTEND_THREADS * 8)
        squares += await_eights(x, first + k, ask_eights(x, first + k, first + len)).squares();
    return inverse_root(team_sum<T>(squares, scratch), len, eps);
}

// Share `split` of one token at `position`, and the merge, as above. x: the token's queries, keys and values; `ready` is
// called when they are there.
template <class T, class Source, class Ready>
__device__ __forceinline__ void attend_token(const Attend& g, const HeadNorms& norms, const Source& x, float* queries,
                                             u32* ticket, int kv, int split, int position, Ready ready) {
    Span span(position, g.window);
    if (split >= span.splits) return;
    int splits = span.splits, begin = span.begin_of(split), end = span.end_of(split);
    Cache cache(g, kv, position);
    // Queries, and behind them the new key and value for the share that they belong to. All loads first.
    constexpr int OWN = HEAD_GROUP * HEAD_DIM, STEPS = (OWN + 2 * HEAD_DIM + ATTEND_THREADS - 1) / ATTEND_THREADS;
    int t = this_thread(), count = split == splits - 1 ? OWN + 2 * HEAD_DIM : OWN;
    const float2* angles = angles_at(g, position);
    // The token's key and value as they are stored.
    Stored* newest = (Stored*)(queries + QUERY_FLOATS);
    // Of the cache, while the query may be on its way.
    Batch batch = {};
    fetch_first_keys(batch, cache, begin, min(end, position));
    float2 turns[STEPS];
    Asked own[STEPS] = {}, others[STEPS] = {};
    // Of a number and of the one that it is rotated with.
    float2 weights[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + t, d = i % HEAD_DIM, other = d < HALF ? d + HALF : d - HALF;
        turns[s] = angles ? angles[d % HALF] : make_float2(1, 0);
        if (QK_NORM && i < count && i < OWN + HEAD_DIM) {
            int head = i < OWN ? kv * HEAD_GROUP + i / HEAD_DIM : kv;
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
            // The group's heads, then its key, then its value, which is not rotated.
            int head = i < OWN ? kv * HEAD_GROUP + i / HEAD_DIM : i < OWN + HEAD_DIM ? HEADS + kv : HEADS + KV_HEADS + kv;
            if (i < count) own[s] = x.ask(head * HEAD_DIM + d);
            if (i < min(count, OWN + HEAD_DIM)) others[s] = x.ask(head * HEAD_DIM + (d < HALF ? d + HALF : d - HALF));
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) there &= own[s].there() & others[s].there();
    } while (patience.warp_goes_on(there));
    float values[STEPS], scales[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) values[s] = own[s].sum();
    // Where results will lie.
    float* scratch = queries + QUERY_FLOATS + 2 * HEAD_DIM;
    if constexpr (QK_NORM == 2) {
        float of_queries = scale_of_row<T>(x, 0, HEADS * HEAD_DIM, norms.query.eps, scratch), of_keys = 0;
        if (split == splits - 1)
            of_keys = scale_of_row<T>(x, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, norms.key.eps, scratch + T::size / 32);
#pragma unroll
        for (int s = 0; s < STEPS; s++) scales[s] = s * ATTEND_THREADS + t < OWN ? of_queries : of_keys;
    }
    fetch_first_values(batch, cache, begin, min(end, position));
    if constexpr (QK_NORM == 1) scales_of_heads<T>(values, norms, scratch, scales);
    float scale = query_scale(g, position);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + t;
        float v = values[s];
        if (i < OWN + HEAD_DIM) {
            float other = others[s].sum();
            if (QK_NORM) v *= scales[s] * weights[s].x, other *= scales[s] * weights[s].y;
            v = rotated(v, other, turns[s], i % HEAD_DIM);
        }
        if (i < OWN) v *= scale;
        if (i < count) check_size(g, v);
        if (i < OWN) {
            put_query(queries, i / HEAD_DIM, i % HEAD_DIM, v);
        } else if (i < count) {
            Stored rounded = to_stored(v);
            newest[i - OWN] = rounded;
            (i < OWN + HEAD_DIM ? cache.keys : cache.values)[cache.at(position) + i % HEAD_DIM] = rounded;
        }
    }
    T::sync();
    ready();
    // The last share has the newest.
    if (split == splits - 1) replace_first(batch, newest, begin, position);
    float* out = g.out + (long long)kv * HEAD_GROUP * HEAD_DIM;
    float* parts = g.parts + (long long)kv * SPLITS * HEAD_GROUP * (HEAD_DIM + 2);
    attend_share<T>(cache, batch, queries, g.softcap, begin, end, splits == 1 ? out : nullptr,
                    parts + split * HEAD_GROUP * (HEAD_DIM + 2));
    if (splits == 1) return;

    // By warps: 32 dimensions of a head at a time.
    constexpr int PIECES = (HEAD_DIM + 31) / 32, STRIDE = HEAD_GROUP * (HEAD_DIM + 2);
    int first = 0, last = HEAD_GROUP * PIECES;
    if (g.tickets) {
        // What the block has written is there for whoever takes a later ticket.
        T::sync();
        if (threadIdx.x == 0) *ticket = add_ticket(g.tickets + kv);
        T::sync();
        if (*ticket != splits - 1) return;
        if (threadIdx.x == 0) g.tickets[kv] = 0;
    } else {
        first = HEAD_GROUP * PIECES * split / splits, last = HEAD_GROUP * PIECES * (split + 1) / splits;
    }
    for (int piece = first + this_thread() / 32; piece < last; piece += ATTEND_THREADS / 32) {
        int h = piece / PIECES, lane = this_thread() % 32, d = piece % PIECES * 32 + lane;
        const float* from = parts + h * (HEAD_DIM + 2);
        float m = -INFINITY, l = 0, sums[SPLITS] = {};
        Patience patience;
        do {
            if (lane < splits) m = ask1(from + lane * STRIDE), l = ask1(from + lane * STRIDE + 1);
#pragma unroll
            for (int s = 0; s < SPLITS; s++)
                if (s < splits && d < HEAD_DIM) sums[s] = ask1(from + s * STRIDE + 2 + d);
            there = !missing(m) & !missing(l);
#pragma unroll
            for (int s = 0; s < SPLITS; s++) there &= !missing(sums[s]);
        } while (patience.warp_goes_on(there));
        __syncwarp();
        Weights weights(m, l);
        float sum = 0;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) sum = fmaf(weights.of(s), sums[s], sum);
        if (d < HEAD_DIM) put(out + h * HEAD_DIM + d, sum / weights.sum);
    }
}
