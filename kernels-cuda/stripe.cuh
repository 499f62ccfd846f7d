// Compensation by blocks that do nothing else: how layers.cu selects, fetches and adds. What is computed is dec.cuh's:
// the same lists, and sums in f32 in a fixed order.
//
// Limits: as dec.cuh, out_features % 16 == 0; the whole list in shared memory, threads a multiple of SELECTORS.
#pragma once
#include "dec.cuh"
#include "flow.cuh"

// Selection by SELECTORS threads of four warps together, each with eight consecutive channels in registers: where
// nothing else runs beside it, the shortest way. COUNTS words of shared memory for each such group.
#define SELECTORS 128
#define COUNTS 16

struct Eights {
    float4 a, b;

    __device__ __forceinline__ float squares() const {
        return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    }

    __device__ __forceinline__ void scale(float s, const Eights& w) {
        a = make_float4(a.x * s * w.a.x, a.y * s * w.a.y, a.z * s * w.a.z, a.w * s * w.a.w);
        b = make_float4(b.x * s * w.b.x, b.y * s * w.b.y, b.z * s * w.b.z, b.w * s * w.b.w);
    }

    __device__ __forceinline__ float operator[](int i) const {
        const float4& v = i < 4 ? a : b;
        return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
    }
};

// Channels k to k + 7 of `len`, which are waited for; zeros past the end.
__device__ __forceinline__ Eights eights(const Sum& x, int k, int len) {
    if (k >= len) return Eights{};
    Asked4 a, b;
    do {
        a = x.ask_four(k), b = x.ask_four(k + 4);
    } while (!(a.there() & b.there()));
    return Eights{a.sum(), b.sum()};
}

// The same of numbers that are always there.
__device__ __forceinline__ Eights eights(const float* x, int k, int len) {
    if (k >= len) return Eights{};
    return Eights{*(const float4*)(x + k), *(const float4*)(x + k + 4)};
}

// A group's counts, added over its warps; two places in turn, so that one barrier is enough for each.
struct Together {
    u32* counts;
    int turn;

    __device__ __forceinline__ uint2 meet(u32 x, u32 y, uint2 (&warps)[4]) {
        uint2* place = (uint2*)counts + turn * 4;
        turn ^= 1;
        int t = this_thread();
        if (t % 32 == 0) place[t % SELECTORS / 32] = make_uint2(x, y);
        asm volatile("bar.sync %0, %1;" ::"r"(1 + t / SELECTORS), "n"(SELECTORS) : "memory");
        uint2 sum = make_uint2(0, 0);
#pragma unroll
        for (int w = 0; w < 4; w++) warps[w] = place[w], sum.x += warps[w].x, sum.y += warps[w].y;
        return sum;
    }

    __device__ __forceinline__ uint2 add(u32 x, u32 y) {
        uint2 warps[4];
        return meet(warp_count(x), warp_count(y), warps);
    }
};

// How many are not below `edge`, NaN among them. Floating-point comparisons and sums: twice as many a cycle as of integers.
__device__ __forceinline__ u32 count_from(const Eights& v, float edge) {
    float n = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (!(fabsf(v[i]) < edge)) n += 1;
    return (u32)n;
}

__device__ __forceinline__ float edge_at(int edge, int i) { return __int_as_float(__shfl_sync(FULL, edge, i)); }

// As search_buckets<STEP>, together.
template <int STEP>
__device__ __forceinline__ int search_together(const Eights& v, Together& group, int k, int edge, int first) {
    u32 n[3];
#pragma unroll
    for (int i = 0; i < 3; i++) n[i] = count_from(v, edge_at(edge, first + (i + 1) * STEP - 1));
    uint2 all = group.add(n[0] | n[1] << 16, n[2]);
    return first + (((int)(all.x & 0xffff) < k) + ((int)(all.x >> 16) < k) + ((int)all.y < k)) * STEP;
}

// The group puts the salient channels of its chunk in their places, ascending; k is this thread's first channel.
template <class Put>
__device__ __forceinline__ void select_together(const Eights& v, int k, const Dec& dec, int edge, u32* counts,
                                                const Put& put_salient) {
    int quota = dec.k_chunk * min(CHUNK, dec.in_features - k / CHUNK * CHUNK) / CHUNK;
    if (quota == 0) return;
    Together group{counts, 0};
    // Taken are those not below `above`, if there is one; they tie if not below `least`.
    float above, least;
    bool any_above = true;
    if (dec.exact) {
        // The k-th largest, bit by bit from the top; infinity and NaN tie.
        int value = 0;
#pragma unroll 1
        for (int bit = 30; bit >= 0; bit--) {
            int candidate = value | 1 << bit;
            u32 n = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) n += magnitude(__float_as_uint(v[i])) >= candidate;
            if ((int)group.add(n, 0).x >= quota) value = candidate;
        }
        any_above = value < 0x7f800000;
        above = __int_as_float(value + 1), least = __int_as_float(min(value, 0x7f800000));
    } else {
        int first = search_together<8>(v, group, quota, edge, 0);
        first = search_together<2>(v, group, quota, edge, first);
        if ((int)group.add(count_from(v, edge_at(edge, first)), 0).x < quota) first++;
        least = edge_at(edge, first);
        above = edge_at(edge, max(first, 1) - 1);
        any_above = first > 0;
    }

    // How many are above, and how many tie: in the lanes before this one, then in the warps before.
    float own_taken = 0, own_ties = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bool is_taken = any_above && !(fabsf(v[i]) < above);
        if (is_taken) own_taken += 1;
        if (!is_taken && !(fabsf(v[i]) < least)) own_ties += 1;
    }
    u32 own = (u32)own_taken | (u32)own_ties << 16, before = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        u32 other = __shfl_up_sync(FULL, before, d);
        if (this_thread() % 32 >= d) before += other;
    }
    uint2 warps[4];
    uint2 all = group.meet(__shfl_sync(FULL, before, 31), 0, warps);
    if (own == 0) return;
    before -= own;
#pragma unroll
    for (int w = 0; w < 3; w++)
        if (w < this_thread() % SELECTORS / 32) before += warps[w].x;
    int ties_taken = quota - (int)(all.x & 0xffff), taken = before & 0xffff, ties = before >> 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bool is_taken = any_above && !(fabsf(v[i]) < above), is_tie = !is_taken && !(fabsf(v[i]) < least);
        if (is_taken || (is_tie && ties < ties_taken)) put_salient(taken + min(ties, ties_taken), Salient{k + i, v[i]});
        taken += is_taken;
        ties += is_tie;
    }
}

// Channels that a thread of add_stripe() has in flight.
#define IN_FLIGHT 4

// Block `block` of n_tb computes its stripe of out = s·Σ q·x over a whole list. Threads form teams across the stripe,
// sixteen rows each, and teams share the channels out. sums: f32 [16, threads + 1].
template <class T>
__device__ __forceinline__ void add_stripe(const Dec& dec, int block, const Salient* list, float* sums, float* out) {
    constexpr int N = T::size;
    int tid = this_thread(), words = dec.out_features / 8, pieces = words / 2;
    Stripe stripe = Stripe::of<2>(pieces, block, dec.n_tb);
    int chunks = (dec.in_features + CHUNK - 1) / CHUNK, n = (chunks - 1) * dec.k_chunk + chunk_quota(dec, chunks - 1);
#pragma unroll 1
    for (int p0 = stripe.begin; p0 < stripe.end; p0 += N) {
        int width = min(stripe.end - p0, N), teams = N / width, piece = tid % width, team = tid / width, row0 = p0 * 16;
        const u32* column = dec.residual + (p0 + piece) * 2;
        float own_scale = tid < width * 16 ? dec.scales[row0 + tid] : 0.0f;
        float acc[16] = {};
        // All of a batch are asked for before any is waited for: later loads would hold up earlier ones.
#pragma unroll 1
        for (int i = team < teams ? team : n; i < n; i += IN_FLIGHT * teams) {
            u32 w[IN_FLIGHT][2];
#pragma unroll
            for (int f = 0; f < IN_FLIGHT; f++)
                if (i + f * teams < n) load_words<2>(w[f], column + (long long)list[i + f * teams].channel * words);
#pragma unroll
            for (int f = 0; f < IN_FLIGHT; f++)
                if (i + f * teams < n) {
                    float x = list[i + f * teams].x;
                    add_word(acc, w[f][0], x);
                    add_word(acc + 8, w[f][1], x);
                }
        }
#pragma unroll
        for (int r = 0; r < 16; r++) sums[r * (N + 1) + tid] = acc[r];
        T::sync();
        // Teams are added in order, one thread per row.
        for (int r = tid; r < width * 16; r += N) {
            float sum = 0;
#pragma unroll 8
            for (int s = 0; s < teams; s++) sum += sums[r % 16 * (N + 1) + s * width + r / 16];
            put(out + row0 + r, (r == tid ? own_scale : dec.scales[row0 + r]) * sum);
        }
        T::sync();
    }
}
