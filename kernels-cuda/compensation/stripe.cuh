// Compensation by blocks that do nothing else: how layers.cu selects, fetches and adds. What is computed is dec.cuh's:
// the same channels, and sums in f32 in a fixed order.
//
// A block's multiprocessor is idle but for one product's chain of steps, so what counts is how long each takes, not how
// much is computed. Four warps select in a chunk: each finds candidates, and one decides among them. The bulk copy engine
// fetches, as it neither needs registers nor holds up other loads.
//
// Limits: as dec.cuh, out_features % 32 == 0; the whole list in shared memory, SELECTORS threads at least. Warps that four
// do not go into do not select.
#pragma once
#include "dec.cuh"
#include "flow.cuh"
#include "stream.cuh"

// Threads that select in a chunk together: four warps, each thread with eight consecutive channels in registers.
#define SELECTORS 128
// Most candidates: a lane has one.
#define CANDIDATES 32

// Of numbers that are always there.
__device__ __forceinline__ Eights eights(const float* x, int k, int len) {
    if (k >= len) return Eights{};
    return Eights{*(const float4*)(x + k), *(const float4*)(x + k + 4)};
}

// What the four warps of a group say to each other; in two places, in turn, so that one barrier is enough each time.
struct Together {
    Salient found[2][4][CANDIDATES];
    uint2 counts[2][4];

    static __device__ __forceinline__ void sync() {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + this_thread() / SELECTORS), "n"(SELECTORS) : "memory");
    }

    // Each warp's two numbers, to all.
    __device__ __forceinline__ void meet(int& turn, u32 x, u32 y, uint2 (&warps)[4]) {
        uint2* place = counts[turn & 1];
        turn++;
        if (this_thread() % 32 == 0) place[this_thread() % SELECTORS / 32] = make_uint2(x, y);
        sync();
#pragma unroll
        for (int w = 0; w < 4; w++) warps[w] = place[w];
    }

    // The same, added.
    __device__ __forceinline__ uint2 add(int& turn, u32 x, u32 y) {
        uint2 warps[4], sum = make_uint2(0, 0);
        meet(turn, x, y, warps);
#pragma unroll
        for (int w = 0; w < 4; w++) sum.x += warps[w].x, sum.y += warps[w].y;
        return sum;
    }
};

// Lanes' numbers before this lane's.
__device__ __forceinline__ u32 sum_before(u32 own, u32& all) {
    u32 sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        u32 other = __shfl_up_sync(FULL, sum, d);
        if (this_thread() % 32 >= d) sum += other;
    }
    all = __shfl_sync(FULL, sum, 31);
    return sum - own;
}

__device__ __forceinline__ float edge_at(int edge, int i) { return __int_as_float(__shfl_sync(FULL, edge, i)); }

// How many are not below `edge`, NaN among them. Floating-point comparisons and sums: twice as many a cycle as of integers.
__device__ __forceinline__ u32 count_from(const Eights& v, float edge) {
    float n = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (!(fabsf(v[i]) < edge)) n += 1;
    return (u32)n;
}

// As search_buckets<STEP>, together.
template <int STEP>
__device__ __forceinline__ int search_together(const Eights& v, Together& group, int& turn, int k, int edge, int first) {
    u32 n[3];
#pragma unroll
    for (int i = 0; i < 3; i++) n[i] = count_from(v, edge_at(edge, first + (i + 1) * STEP - 1));
    uint2 all = group.add(turn, warp_count(n[0] | n[1] << 16), warp_count(n[2]));
    return first + (((int)(all.x & 0xffff) < k) + ((int)(all.x >> 16) < k) + ((int)all.y < k)) * STEP;
}

// Taken are those not below `above`, if there is one; they tie if not below `least`. NaN is below nothing.
struct Limits {
    float above, least;
    bool any_above;

    __device__ __forceinline__ bool takes(float x) const { return any_above && !(fabsf(x) < above); }
    __device__ __forceinline__ bool ties(float x) const { return !takes(x) && !(fabsf(x) < least); }

    static __device__ __forceinline__ Limits of_bucket(int edge, int first) {
        return Limits{edge_at(edge, max(first, 1) - 1), edge_at(edge, first), first > 0};
    }

    // The k-th largest, bit by bit from the top; infinity and NaN tie. reach(e): how many are not below e. `bucket`: its.
    template <class Reach>
    static __device__ __forceinline__ Limits of_largest(int k, int edge, int& bucket, const Reach& reach) {
        int value = 0;
#pragma unroll 1
        for (int bit = 30; bit >= 0; bit--) {
            int candidate = value | 1 << bit;
            if (candidate <= 0x7f800000 && reach(__int_as_float(candidate)) >= k) value = candidate;
        }
        bucket = __popc(__ballot_sync(FULL, edge > value));
        return Limits{__int_as_float(value + 1), __int_as_float(value), value < 0x7f800000};
    }
};

// Puts the `quota` salient ones of `all` candidates, one a lane and in order, in their places. `hint`: as below.
template <class Put>
__device__ __forceinline__ void select_candidates(const Salient& own, int all, int quota, bool exact, int edge, int& hint,
                                                  const Put& put_salient) {
    int lane = this_thread() % 32, first = hint;
    bool valid = lane < all;
    auto reach = [&](float e) { return __popc(__ballot_sync(FULL, valid && !(fabsf(own.x) < e))); };
    Limits limits;
    if (exact) {
        limits = Limits::of_largest(quota, edge, first, reach);
    } else {
        // Mostly one of the last buckets.
        int near[3];
#pragma unroll
        for (int i = 0; i < 3; i++) near[i] = reach(edge_at(edge, max(hint - 1 - i, 0)));
#pragma unroll
        for (int i = 0; i < 3; i++) first -= hint > i && near[i] >= quota;
        if (hint - first == 3)
#pragma unroll 1
            while (first > 0 && reach(edge_at(edge, first - 1)) >= quota) first--;
        limits = Limits::of_bucket(edge, first);
    }
    u32 takes = __ballot_sync(FULL, valid && limits.takes(own.x)), lower = (1u << lane) - 1;
    u32 ties = __ballot_sync(FULL, valid && limits.ties(own.x));
    int ties_taken = quota - __popc(takes), tied = __popc(ties & lower);
    if (takes >> lane & 1 || (ties >> lane & 1 && tied < ties_taken))
        put_salient(__popc(takes & lower) + min(tied, ties_taken), own);
    // There should be one and a half to three times as many candidates as are taken.
    if (2 * all < 3 * quota)
        hint = min(hint + 1, BUCKETS - 2);
    else if (all > 3 * quota)
        hint = max(hint - 1, first);
}

// The same among all channels of the chunk, by the whole group.
template <class Put>
__device__ __forceinline__ void select_all(const Eights& v, int k, int quota, bool exact, int edge, Together& group,
                                           int& turn, int& hint, const Put& put_salient) {
    auto reach = [&](float edge) { return (int)group.add(turn, warp_count(count_from(v, edge)), 0).x; };
    Limits limits;
    int first = 0;
    if (exact) {
        limits = Limits::of_largest(quota, edge, first, reach);
    } else {
        // The first bucket at whose lower edge k channels are reached; the last edge is 0 and reaches all.
        first = search_together<8>(v, group, turn, quota, edge, 0);
        first = search_together<2>(v, group, turn, quota, edge, first);
        if (reach(edge_at(edge, first)) < quota) first++;
        limits = Limits::of_bucket(edge, first);
    }
    hint = min(first + 1, BUCKETS - 2);
    // How many are above, and how many tie: in the lanes before this one, then in the warps before.
    u32 counts = 0, of_warp;
#pragma unroll
    for (int i = 0; i < 8; i++) counts += limits.takes(v[i]) | (u32)limits.ties(v[i]) << 16;
    u32 before = sum_before(counts, of_warp);
    uint2 warps[4];
    group.meet(turn, of_warp, 0, warps);
    u32 total = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        total += warps[w].x;
        if (w < this_thread() % SELECTORS / 32) before += warps[w].x;
    }
    if (counts == 0) return;
    int ties_taken = quota - (int)(total & 0xffff), taken = before & 0xffff, tied = before >> 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bool takes = limits.takes(v[i]), ties = limits.ties(v[i]);
        if (takes || (ties && tied < ties_taken)) put_salient(taken + min(tied, ties_taken), Salient{k + i, v[i]});
        taken += takes, tied += ties;
    }
}

// The group puts the salient channels of its chunk in their places, ascending; k is this thread's first channel. Lane i
// of each warp brings edge i. `hint` is a bucket in which or before which all of them probably are, and few others: what
// reaches its edge is a candidate. It says where to look, not what is found, and is corrected for the next time.
template <class Put>
__device__ __forceinline__ void select_together(const Eights& v, int k, const Dec& dec, int edge, Together& group,
                                                int& turn, int& hint, const Put& put_salient) {
    int quota = chunk_quota(dec, k / CHUNK);
    if (quota == 0) return;
    if (quota < CANDIDATES) {
        float least = edge_at(edge, hint);
        u32 own = 0, of_warp;
#pragma unroll
        for (int i = 0; i < 8; i++) own |= !(fabsf(v[i]) < least) ? 1u << i : 0;
        u32 at = sum_before(__popc(own), of_warp);
        Salient(&found)[4][CANDIDATES] = group.found[turn & 1];
#pragma unroll 1
        for (; own != 0; own &= own - 1, at++) {
            int i = __ffs(own) - 1;
            float x = i & 4 ? (i & 2 ? (i & 1 ? v[7] : v[6]) : (i & 1 ? v[5] : v[4]))
                            : (i & 2 ? (i & 1 ? v[3] : v[2]) : (i & 1 ? v[1] : v[0]));
            if (at < CANDIDATES) found[this_thread() % SELECTORS / 32][at] = Salient{k + i, x};
        }
        __syncwarp();
        uint2 warps[4];
        group.meet(turn, of_warp, hint, warps);
        int second = warps[0].x, third = second + warps[1].x, fourth = third + warps[2].x, all = fourth + warps[3].x;
        // Another block may have written a hint between two warps' reads.
        bool alike = (warps[0].y == warps[1].y) & (warps[0].y == warps[2].y) & (warps[0].y == warps[3].y);
        if (all >= quota && all <= CANDIDATES && alike) {
            // One warp decides, each group's on another scheduler.
            if (this_thread() % SELECTORS / 32 != this_thread() / SELECTORS % 4) return;
            int lane = this_thread() % 32, of = (lane >= second) + (lane >= third) + (lane >= fourth);
            const Salient& own = found[of][lane - (of == 0 ? 0 : of == 1 ? second : of == 2 ? third : fourth)];
            select_candidates(own, all, quota, dec.exact, edge, hint, put_salient);
            return;
        }
    }
    select_all(v, k, quota, dec.exact, edge, group, turn, hint, put_salient);
}

// A block's part of the residuals of a list on its way into shared memory: of each entry `width` pieces of sixteen rows.
// There are two halves, each with room for `most` entries and BARRIERS / 2 barriers; entries come in passes of as many,
// which use the halves in turn. The bulk copy engine brings them: one multiprocessor fetches 25 GB/s over the host link so,
// 13 by loads; copies by lanes (cp.async) hold up all its other loads (H200).
struct Fetch {
    static constexpr int BARRIERS = 64;

    const u32* from;
    const Salient* list;
    int words, n, bytes, most, shift, half_bytes;
    u32 slots, barriers, turn;

    // `turn`: how many passes came before.
    __device__ __forceinline__ Fetch(const Dec& dec, const Salient* list, int n, int first, int width, u32 slots,
                                     int half_bytes, u32 barriers, u32 turn)
        : from(dec.residual + first * 2), list(list), words(dec.out_features / 8), n(n), bytes(width * 8),
          most(half_bytes / bytes), shift(0), half_bytes(half_bytes), slots(slots), barriers(barriers),
          turn(turn) {
        while ((most - 1) >> shift >= BARRIERS / 2) shift++;
        expect(0), expect(1);
    }

    __device__ __forceinline__ int passes() const { return (n + most - 1) / most; }
    __device__ __forceinline__ u32 half(int pass) const { return (turn + pass) % 2; }
    __device__ __forceinline__ u32 barrier(int pass, int at) const {
        return barriers + (half(pass) * (BARRIERS / 2) + (at >> shift)) * 8;
    }
    __device__ __forceinline__ u32 slot(int pass, int at) const { return slots + half(pass) * half_bytes + at * bytes; }

    // Tells the barriers of a pass what will come; whoever used them has been waited for.
    __device__ __forceinline__ void expect(int pass) const {
        int group = this_thread(), first = pass * most + (group << shift);
        if (pass >= passes() || group >= BARRIERS / 2) return;
        int last = min(min(first + (1 << shift), n), (pass + 1) * most);
        barrier_expect(barrier(pass, group << shift), max(last - first, 0) * bytes);
    }

    // Asks for entry i, of pass `pass` or the next.
    __device__ __forceinline__ void ask_entry(int pass, int i) const {
        int of = pass + (i >= (pass + 1) * most), at = i - of * most;
        bulk_copy(slot(of, at), from + (long long)list[i].channel * words, bytes, barrier(of, at));
    }

    // Threads in an order in which neighbours are in different warps: a warp's lanes ask one after the other.
    template <class T>
    static __device__ __forceinline__ int turned() {
        return this_thread() % 32 * (T::size / 32) + this_thread() / 32;
    }

    // Asks for entries `begin` to `end`, of pass `pass` and the next.
    template <class T>
    __device__ __forceinline__ void ask(int pass, int begin, int end) const {
#pragma unroll 1
        for (int i = begin + turned<T>(); i < end; i += T::size) ask_entry(pass, i);
    }

    // How many there is room for before anything is added.
    __device__ __forceinline__ int first_ones() const { return min(n, 2 * most); }

    // Asks for those. Each thread asks for what it listed itself, if they were listed in this order.
    template <class T>
    __device__ __forceinline__ void ask_first() const {
        ask<T>(0, 0, first_ones());
    }

    // Those of them that are a group's `count`, by its threads; place(i): where its i-th is in the list.
    template <class Place>
    __device__ __forceinline__ void ask_of_group(int count, const Place& place) const {
#pragma unroll 1
        for (int i = this_thread() % 32 * 4 + this_thread() % SELECTORS / 32; i < count; i += SELECTORS)
            if (place(i) < first_ones()) ask_entry(0, place(i));
    }

    // Adds everything: threads form teams across the stripe, sixteen rows each, and teams share the entries out.
    template <class T>
    __device__ __forceinline__ void add(int teams, int team, int piece, float (&acc)[16]) {
        int all = passes();
#pragma unroll 1
        for (int pass = 0; pass < all; pass++) {
            if (pass > 0) {
                // All are done with the pass before: the next comes into its half.
                T::sync();
                if (pass + 1 < all) expect(pass + 1), ask<T>(pass + 1, (pass + 1) * most, min((pass + 2) * most, n));
            }
            int first = pass * most, count = min(most, n - first);
#pragma unroll 1
            for (int i = team < teams ? team : count; i < count; i += teams) {
                barrier_wait(barrier(pass, i), (turn + pass) / 2 % 2);
                u32 w0, w1;
                asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                             : "=r"(w0), "=r"(w1)
                             : "r"(slot(pass, i) + piece * 8)
                             : "memory");
                float x = list[first + i].x;
                add_word(acc, w0, x);
                add_word(acc + 8, w1, x);
            }
        }
        turn += all;
    }
};

// Puts out s·Σ of the sums of `teams` teams, in order, one thread per row. sums: f32 [16, threads + 1].
template <class T>
__device__ __forceinline__ void put_stripe(int width, int teams, const float (&acc)[16], const float* scales, float* sums,
                                           float* out) {
    constexpr int N = T::size;
    int tid = this_thread();
#pragma unroll
    for (int r = 0; r < 16; r++) sums[r * (N + 1) + tid] = acc[r];
    T::sync();
    for (int r = tid; r < width * 16; r += N) {
        const float* of = sums + r % 16 * (N + 1) + r / 16;
        float sum = 0;
#pragma unroll 8
        for (int s = 0; s < teams; s++) sum += of[s * width];
        put(out + r, scales[r] * sum);
    }
    T::sync();
}
