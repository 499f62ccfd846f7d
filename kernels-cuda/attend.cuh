// Causal attention of grouped queries over the cached text, one pass with a running softmax: what attend.cu's kernels
// and layers.cu share.
//
//   out[token, head, :] = Σ_p softmax_p(q·k_p / √HEAD_DIM) · v_p,   p from the window's start to the token
//
//   qkv    f32 [tokens, (HEADS + 2·KV_HEADS)·HEAD_DIM]; queries and keys not yet rotated
//   keys, values  [KV_HEADS, max_seq_len, HEAD_DIM] in KV's type (0 float16, 1 bfloat16, 2 float32)
//   angles f32 [max_seq_len, HEAD_DIM / 2, (cos, sin)]
//   parts  f32 [KV_HEADS, SPLITS, HEAD_GROUP, HEAD_DIM + 2], tickets u32 [KV_HEADS], zero before and after, or null
//
// The block whose share holds the token rotates its key and appends both; each block rotates its own queries.
// Shares are merged in order: by whichever block of a key-value head ends last, so the result does not depend on which;
// without tickets by all of them, each a piece, who wait for each other's numbers (flow.cuh: parts are missing before).
//
// Constants: HEADS, KV_HEADS, HEAD_DIM (at most 256, % 8 == 0), KV, WINDOW (0: none), SPLITS; ATTEND_THREADS of a
// block; AT_ONCE, how many of a group's queries a warp keeps (a divisor of the group; the others are other warps').
#pragma once
#include "flow.cuh"

#define HEAD_GROUP (HEADS / KV_HEADS)
#define HALF (HEAD_DIM / 2)
// Lanes that share a position, each with eight of its dimensions; warps that keep the same queries; their teams.
#define LANES (HEAD_DIM > 128 ? 32 : HEAD_DIM > 64 ? 16 : HEAD_DIM > 32 ? 8 : HEAD_DIM > 16 ? 4 : 2)
#define QUERY_SETS (HEAD_GROUP / AT_ONCE)
#define SET_WARPS (ATTEND_THREADS / 32 / QUERY_SETS)
#define TEAMS (SET_WARPS * 32 / LANES)
// Positions that a team has in flight.
#ifndef FLIGHT
#define FLIGHT (KV == 2 || AT_ONCE > 4 ? 2 : 4)
#endif
// Fewest positions worth a block of their own.
#define SHARE 32

struct State {
    u32 position, sampled, last;
};

// Numbers that earlier kernels left, in two parts; the second may be null. Sum (flow.cuh) is for those still on their way.
struct Settled {
    const float* x;
    const float* delta;

    __device__ __forceinline__ Asked ask(int i) const { return Asked{load1(x, delta, i), 0, 0}; }
};

struct Attend {
    const float* qkv;
    const float* delta;
    void* keys;
    void* values;
    const float2* angles;
    const State* state;
    float* parts;
    u32* tickets;
    float* out;
    int max_seq_len;
};

#if KV == 2
typedef float Stored;
struct Eight {
    float4 a, b;
};
#else
typedef u16 Stored;
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

__device__ __forceinline__ Stored to_stored(float f) {
#if KV == 2
    return f;
#else
    return KV == 1 ? float_to_bfloat(f) : float_to_half(f);
#endif
}

// Dimension i of a head, rotated with that half a head away.
__device__ __forceinline__ float rotated(float own, float other, float2 a, int i) {
    return i < HALF ? own * a.x - other * a.y : own * a.x + other * a.y;
}

__device__ __forceinline__ float rotated(const float* head, const float* delta, const float2* angles, int i) {
    return rotated(load1(head, delta, i), load1(head, delta, i < HALF ? i + HALF : i - HALF), angles[i % HALF], i);
}

__device__ __forceinline__ void append_head(const Attend& g, const float* qkv, int kv, int position) {
    const float* key = qkv + (HEADS + kv) * HEAD_DIM;
    const float* value = qkv + (HEADS + KV_HEADS + kv) * HEAD_DIM;
    const float* key_delta = g.delta ? g.delta + (key - qkv) : nullptr;
    const float* value_delta = g.delta ? g.delta + (value - qkv) : nullptr;
    long long at = ((long long)kv * g.max_seq_len + position) * HEAD_DIM;
    for (int i = this_thread(); i < HEAD_DIM; i += ATTEND_THREADS) {
        ((Stored*)g.keys)[at + i] = to_stored(rotated(key, key_delta, g.angles + (long long)position * HALF, i));
        ((Stored*)g.values)[at + i] = to_stored(load1(value, value_delta, i));
    }
}

// What a softmax scaled for `from` must be multiplied by to be scaled for `to`; nothing yet is −inf.
__device__ __forceinline__ float rescale(float from, float to) { return from == -INFINITY ? 0.0f : expf(from - to); }

// Running softmax of the AT_ONCE queries of a team: largest score, sum, and eight dimensions of the result.
struct Running {
    float m[AT_ONCE], l[AT_ONCE], acc[AT_ONCE][8];
};

// Keys and values that a team's lanes have in flight: positions base + f·TEAMS + team.
struct Batch {
    Eight k[FLIGHT], v[FLIGHT];
};

__device__ __forceinline__ int team_of_set() { return this_thread() % (SET_WARPS * 32) / LANES; }

// Up to `end`; what is past it stays as it is.
__device__ __forceinline__ void fetch(Batch& b, const Attend& g, int kv, int base, int end) {
    int lane = this_thread() % LANES * 8, team = team_of_set();
    const Stored* keys = (const Stored*)g.keys + (long long)kv * g.max_seq_len * HEAD_DIM + lane;
    const Stored* values = (const Stored*)g.values + (long long)kv * g.max_seq_len * HEAD_DIM + lane;
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
        int p = base + f * TEAMS + team;
        if (lane < HEAD_DIM && p < end) {
            b.k[f] = *(const Eight*)(keys + (long long)p * HEAD_DIM);
            b.v[f] = *(const Eight*)(values + (long long)p * HEAD_DIM);
        }
    }
}

// `batch` holds the first positions.
__device__ __forceinline__ void add_positions(Running& r, const Attend& g, Batch& batch, const float* queries, int kv,
                                              int begin, int end) {
    int lane = this_thread() % LANES, team = team_of_set();
    bool active = lane * 8 < HEAD_DIM;
    float q[AT_ONCE][8];
#pragma unroll
    for (int h = 0; h < AT_ONCE; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] = active ? queries[h * HEAD_DIM + lane * 8 + i] : 0.0f;

    // Every team takes the same number of steps: its lanes talk to each other by whole warps.
    for (int base = begin; base < end; base += TEAMS * FLIGHT) {
        if (base > begin) fetch(batch, g, kv, base, end);
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
                s[f][h] = base + f * TEAMS + team < end ? dot : -INFINITY;
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

// The teams of a warp become one, in its first team.
__device__ __forceinline__ void merge_warp(Running& r) {
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
}

// Brings a share of the cache nearer, while queries are still made.
__device__ __forceinline__ void prefetch(const void* cache, int kv, int max_seq_len, int begin, int end) {
    const char* from = (const char*)((const Stored*)cache + ((long long)kv * max_seq_len + begin) * HEAD_DIM);
    int bytes = min((end - begin) * HEAD_DIM * (int)sizeof(Stored), 1 << 16);
    for (int i = this_thread() * 128; i < bytes; i += ATTEND_THREADS * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
}

// One block, one key-value head, one share of the positions. Shared memory: queries [HEAD_GROUP, HEAD_DIM], room for a
// key and a value, then warps' results [QUERY_SETS · SET_WARPS, AT_ONCE, HEAD_DIM + 2]. Called by ATTEND_THREADS
// threads, T their team; `batch` holds the first positions.
template <class T>
__device__ __forceinline__ void attend_share(const Attend& g, Batch& batch, float* queries, int kv, int begin, int end,
                                             float* out, float* part) {
    float* warps = queries + (HEAD_GROUP + 2) * HEAD_DIM;
    int t = this_thread(), lane = t % 32, warp = t / 32, set = warp / SET_WARPS;
    if (set < QUERY_SETS) {
        Running r;
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
            r.m[h] = -INFINITY, r.l[h] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) r.acc[h][i] = 0;
        }
        add_positions(r, g, batch, queries + set * AT_ONCE * HEAD_DIM, kv, begin, end);
        merge_warp(r);
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
            float* to = warps + (warp * AT_ONCE + h) * (HEAD_DIM + 2);
            if (lane == 0) to[0] = r.m[h], to[1] = r.l[h];
            if (lane * 8 < HEAD_DIM && lane < LANES)
#pragma unroll
                for (int i = 0; i < 8; i++) to[2 + lane * 8 + i] = r.acc[h][i];
        }
    }
    T::sync();
    for (int i = this_thread(); i < HEAD_GROUP * HEAD_DIM; i += ATTEND_THREADS) {
        int h = i / HEAD_DIM, d = i % HEAD_DIM;
        const float* from = warps + (h / AT_ONCE * SET_WARPS * AT_ONCE + h % AT_ONCE) * (HEAD_DIM + 2);
        float m = -INFINITY;
#pragma unroll
        for (int w = 0; w < SET_WARPS; w++) m = fmaxf(m, from[w * AT_ONCE * (HEAD_DIM + 2)]);
        float l = 0, sum = 0;
#pragma unroll
        for (int w = 0; w < SET_WARPS; w++) {
            const float* at = from + w * AT_ONCE * (HEAD_DIM + 2);
            float f = rescale(at[0], m);
            l = fmaf(f, at[1], l);
            sum = fmaf(f, at[2 + d], sum);
        }
        if (out) {
            put(out + i, sum / l);
        } else {
            float* to = part + h * (HEAD_DIM + 2);
            if (d == 0) put(to, m), put(to + 1, l);
            put(to + 2 + d, sum);
        }
    }
}

__device__ __forceinline__ u32 add_ticket(u32* tickets) {
    u32 ticket;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(tickets) : "memory");
    return ticket;
}

// The positions that one token attends to, and how they are shared out.
struct Span {
    int first, length, splits;

    __device__ __forceinline__ explicit Span(int position) {
        first = WINDOW > 0 ? max(0, position + 1 - WINDOW) : 0;
        length = position + 1 - first;
        splits = min(SPLITS, (length + SHARE - 1) / SHARE);
    }

    __device__ __forceinline__ int begin(int split) const { return first + (long long)length * split / splits; }
};

// Share `split` of one token at `position`, and the merge, as above. x: the token's queries, keys and values; `ready` is
// called when they are there.
template <class T, class Source, class Ready>
__device__ __forceinline__ void attend_token(const Attend& g, const Source& x, float* queries, u32* ticket, int kv,
                                             int split, int position, Ready ready) {
    Span span(position);
    if (split >= span.splits) return;
    int splits = span.splits, begin = span.begin(split), end = span.begin(split + 1);
    // Queries, and behind them the new key and value for the share that they belong to. All loads first.
    constexpr int OWN = HEAD_GROUP * HEAD_DIM, STEPS = (OWN + 2 * HEAD_DIM + ATTEND_THREADS - 1) / ATTEND_THREADS;
    int t = this_thread(), count = split == splits - 1 ? OWN + 2 * HEAD_DIM : OWN;
    const float2* angles = g.angles + (long long)position * HALF;
    // The token's key and value as they are stored.
    Stored* newest = (Stored*)(queries + OWN);
    // Of the cache, while the query may be on its way.
    Batch batch = {};
    fetch(batch, g, kv, begin, min(end, position));
    float2 turns[STEPS];
    Asked own[STEPS] = {}, others[STEPS] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) turns[s] = angles[(s * ATTEND_THREADS + t) % HALF];
    bool there;
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
    } while (!there);
    float scale = 1.0f / sqrtf((float)HEAD_DIM);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * ATTEND_THREADS + t;
        float v = own[s].sum();
        if (i < OWN + HEAD_DIM) v = rotated(v, others[s].sum(), turns[s], i % HEAD_DIM);
        if (i < OWN) {
            queries[i] = scale * v;
        } else if (i < count) {
            Stored rounded = to_stored(v);
            newest[i - OWN] = rounded;
            ((Stored*)(i < OWN + HEAD_DIM ? g.keys : g.values))[((long long)kv * g.max_seq_len + position) * HEAD_DIM +
                                                                i % HEAD_DIM] = rounded;
        }
    }
    T::sync();
    ready();
    // The token itself, if it is one of the first.
    if (position < end && position < begin + TEAMS * FLIGHT) {
        int lane = t % LANES * 8;
#pragma unroll
        for (int f = 0; f < FLIGHT; f++)
            if (lane < HEAD_DIM && begin + f * TEAMS + team_of_set() == position) {
                batch.k[f] = *(const Eight*)(newest + lane);
                batch.v[f] = *(const Eight*)(newest + HEAD_DIM + lane);
            }
    }
    float* out = g.out + (long long)kv * HEAD_GROUP * HEAD_DIM;
    float* parts = g.parts + (long long)kv * SPLITS * HEAD_GROUP * (HEAD_DIM + 2);
    attend_share<T>(g, batch, queries, kv, begin, end, splits == 1 ? out : nullptr,
                    parts + split * HEAD_GROUP * (HEAD_DIM + 2));
    if (splits == 1) return;

    int first = 0, last = OWN;
    if (g.tickets) {
        // What the block has written is there for whoever takes a later ticket.
        T::sync();
        if (threadIdx.x == 0) *ticket = add_ticket(g.tickets + kv);
        T::sync();
        if (*ticket != splits - 1) return;
        if (threadIdx.x == 0) g.tickets[kv] = 0;
    } else {
        first = OWN * split / splits, last = OWN * (split + 1) / splits;
    }
    for (int i = first + this_thread(); i < last; i += ATTEND_THREADS) {
        int h = i / HEAD_DIM, d = i % HEAD_DIM;
        Asked shares[SPLITS] = {};
        do {
            there = true;
#pragma unroll
            for (int s = 0; s < SPLITS; s++) {
                const float* at = parts + (s * HEAD_GROUP + h) * (HEAD_DIM + 2);
                if (s < splits) shares[s] = Asked{ask1(at), ask1(at + 1), ask1(at + 2 + d)};
            }
#pragma unroll
            for (int s = 0; s < SPLITS; s++) there &= shares[s].there();
        } while (!there);
        float m = shares[0].a, l = 0, sum = 0;
#pragma unroll
        for (int s = 1; s < SPLITS; s++)
            if (s < splits) m = fmaxf(m, shares[s].a);
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            float f = s < splits ? rescale(shares[s].a, m) : 0.0f;
            l = fmaf(f, shares[s].b, l);
            sum = fmaf(f, shares[s].c, sum);
        }
        put(out + i, sum / l);
    }
}
