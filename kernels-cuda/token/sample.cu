// The next token (spec §3.3): the largest logit, or a draw by temperature, top-k, top-p and min-p. NaN is never chosen;
// where the largest logit is infinite, or there is none, the token is NO_TOKEN (a define, sampling.rs).
//
//   logits f32 [vocab] (+ delta), fewer than 2^19; rules as in sampling.rs; draws f32 [most], one per sampled token
//   tokens u32 [most] in mapped host memory, overwritten one by one; what is sampled beyond them is not written
//   best   u64 [gridDim.x], ticket u32 (zero before and after)
//   list   (u64 key, u64 weight) [vocab], only read where temperature > 0
//
// Keys order logits descending and ids ascending and are unique, so "the first tokens whose weights reach s" is
// one threshold, found a byte at a time. Weights are whole numbers (1 = 2^-44): sums do not depend on order.
// The block that ends last chooses.
#include "common.cuh"

#define THREADS 512
#define ONE (1ull << 44)

struct State {
    u32 position, sampled, last;
};

struct Rules {
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
};

struct Weighted {
    u64 key, weight;
};

// Larger for larger logits; NaN smallest, −0 as 0.
__device__ __forceinline__ u32 ordered(float f) {
    if (f != f) return 0;
    u32 bits = __float_as_uint(f + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Whether `o` is above −∞'s and below ∞'s.
__device__ __forceinline__ bool is_finite(u32 o) { return o > 0x007fffffu && o < 0xff800000u; }

__device__ __forceinline__ float unordered(u32 o) {
    return __uint_as_float(o & 0x80000000u ? o & 0x7fffffffu : ~o);
}

__device__ __forceinline__ u64 key_of(float logit, u32 id) { return (u64)ordered(logit) << 24 | (0xffffffu - id); }

__device__ __forceinline__ u64 block_largest(u64 v) {
    __shared__ u64 warps[THREADS / 32];
    for (int d = 16; d > 0; d /= 2) {
        u64 other = __shfl_xor_sync(FULL, v, d);
        v = other > v ? other : v;
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) v = warps[w] > v ? warps[w] : v;
    __syncthreads();
    return v;
}

__device__ __forceinline__ u64 block_total(u64 v) {
    __shared__ u64 warps[THREADS / 32];
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(FULL, v, d);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < THREADS / 32; w++) v += warps[w];
    __syncthreads();
    return v;
}

// The key at which the sum over keys from `least` up, largest first, reaches `target` (at least 1); `least` if
// it never does. COUNT sums 1 per token instead of its weight.
template <bool COUNT>
__device__ u64 key_reaching(const Weighted* list, u32 n, u64 least, u64 target) {
    __shared__ u64 bins[256];
    __shared__ u64 left, prefix;
    __shared__ bool found;
    if (threadIdx.x == 0) left = target, prefix = 0, found = true;
    for (int shift = 48; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += THREADS) {
            u64 key = list[i].key;
            if (key >= least && key >> (shift + 8) == prefix)
                atomicAdd(&bins[key >> shift & 255], COUNT ? 1 : list[i].weight);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            while (bin >= 0 && bins[bin] < left) left -= bins[bin--];
            if (bin < 0) found = false, bin = 0;
            prefix = prefix << 8 | bin;
        }
        __syncthreads();
        if (!found) return least;
    }
    return prefix;
}

__device__ __forceinline__ u64 weight_from(const Weighted* list, u32 n, u64 least) {
    u64 sum = 0;
    for (u32 i = threadIdx.x; i < n; i += THREADS)
        if (list[i].key >= least) sum += list[i].weight;
    return block_total(sum);
}

__device__ u32 draw_token(const float* logits, const float* delta, u32 vocab, const Rules& rules, float draw,
                          u64 best, Weighted* list) {
    __shared__ u32 n;
    if (threadIdx.x == 0) n = 0;
    __syncthreads();
    double top = unordered((u32)(best >> 24));
    for (u32 id = threadIdx.x; id < vocab; id += THREADS) {
        float logit = load1(logits, delta, id);
        double scaled = exp(((double)logit - top) / (double)rules.temperature) * (double)ONE + 0.5;
        // Not of NaN: as a whole number that would be the largest weight of all.
        u64 weight = logit > -INFINITY ? (u64)scaled : 0;
        // What weighs nothing is never drawn and adds to no sum.
        if (weight > 0) list[atomicAdd(&n, 1)] = Weighted{key_of(logit, id), weight};
    }
    __syncthreads();
    u64 least = 0;
    if (rules.top_k > 0 && rules.top_k < n) least = key_reaching<true>(list, n, 0, rules.top_k);
    if (rules.top_p < 1.0f) {
        u64 target = (u64)((double)rules.top_p * (double)weight_from(list, n, least));
        least = key_reaching<false>(list, n, least, target > 0 ? target : 1);
    }
    if (rules.min_p > 0.0f) {
        // The least key whose weight is still large enough; weights fall with keys.
        double enough = (double)rules.min_p * (double)ONE;
        u64 smallest = ~0ull;
        for (u32 i = threadIdx.x; i < n; i += THREADS)
            if (list[i].key >= least && (double)list[i].weight >= enough && list[i].key < smallest)
                smallest = list[i].key;
        least = ~block_largest(~smallest);
        if (least > best) least = best;
    }
    u64 target = (u64)((double)draw * (double)weight_from(list, n, least)) + 1;
    u64 key = key_reaching<false>(list, n, least, target);
    return 0xffffffu - (u32)(key & 0xffffffu);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const float* logits, const float* delta, u32 vocab,
                                                             const Rules* rules, const float* draws, State* state,
                                                             u64* best, u32* ticket, Weighted* list, u32* tokens,
                                                             u32 most) {
    __shared__ u32 order;
    let_next_start();
    wait_for_previous();
    u64 largest = 0;
    for (u32 id = blockIdx.x * THREADS + threadIdx.x; id < vocab; id += gridDim.x * THREADS) {
        u64 key = key_of(load1(logits, delta, id), id);
        largest = key > largest ? key : largest;
    }
    largest = block_largest(largest);
    if (threadIdx.x == 0) {
        best[blockIdx.x] = largest;
        __threadfence();
        order = atomicAdd(ticket, 1);
    }
    __syncthreads();
    if (order != gridDim.x - 1) return;
    __threadfence();
    largest = block_largest(threadIdx.x < gridDim.x ? __ldcg(best + threadIdx.x) : 0);
    u32 token = NO_TOKEN, n = state->sampled;
    if (is_finite((u32)(largest >> 24))) {
        token = 0xffffffu - (u32)(largest & 0xffffffu);
        // Within [0, 1), whatever is there.
        float draw = fminf(fmaxf(n < most ? draws[n] : 0.0f, 0.0f), 0x1.fffffep-1f);
        if (rules->temperature > 0.0f) token = draw_token(logits, delta, vocab, *rules, draw, largest, list);
    }
    if (threadIdx.x == 0) {
        *ticket = 0;
        state->last = token;
        if (n < most) {
            state->sampled = n + 1;
            // The host watches this word.
            asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(tokens + n), "r"(token) : "memory");
        }
    }
}
