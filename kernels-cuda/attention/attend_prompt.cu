// Attention of a pass, several consecutive tokens at once (attend.cuh), in three kernels: `set_aside` rotates the pass's keys
// and puts them and its values aside as the cache keeps them; `attend_prompt` attends to what lies aside and, of earlier
// positions, to the cache; `append` copies to the cache what tokens to come see. A window's cache holds the window and no
// more: a token that is appended replaces one that the pass's first token sees, so nothing is until all have their answer.
//
//   aside  keys [KV_HEADS, room, HEAD_DIM] in KV's type, `offset` numbers behind the layer's keys, and values as far behind
//          its values: positions from the tile on in which the pass begins. In front of the pass's own lie that tile's
//          others, as in the cache: so every tile lies as one piece, here or there. room ≥ tokens + TILE − 1
//   delta  null: only a single token has a compensation that is not yet added
//
// Tokens ≤ max_seq_len; a text's length that would lead beyond the cache is taken for the longest that does not.
#define ATTEND_THREADS 256
#define ASIDE
#include "attend.cuh"

typedef Team<0, ATTEND_THREADS, 0> All;

struct Aside {
    long long offset;
    int room, tokens;

    // Where position `from`, the first that lies aside, is for a key-value head: from the head's first number in the cache.
    __device__ __forceinline__ long long at(const Attend& g, int kv) const {
        return offset + (long long)kv * (room - g.capacity) * HEAD_DIM;
    }
};

// The position of the pass's first token.
__device__ __forceinline__ int start_of(const Attend& g, const Aside& aside) {
    return (int)min(__ldcg(&g.state->position), (u32)(g.max_seq_len - aside.tokens));
}

// The first position that lies aside.
__device__ __forceinline__ int aside_from(int start) { return start / TILE * TILE; }

// Grid (tokens + TILE − 1, KV_HEADS).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)
    set_aside(const __grid_constant__ Attend g, const __grid_constant__ Aside aside) {
    wait_for_previous();
    let_next_start();
    int kv = blockIdx.y, start = start_of(g, aside), position = aside_from(start) + blockIdx.x, token = position - start;
    if (token >= aside.tokens) return;
    Cache cache(g, kv, start);
    long long from = cache.at(position), to = aside.at(g, kv) + (long long)blockIdx.x * HEAD_DIM;
    const float* key = g.qkv + ((long long)token * (HEADS + 2 * KV_HEADS) + HEADS + kv) * HEAD_DIM;
    for (int i = threadIdx.x; i < HEAD_DIM; i += ATTEND_THREADS) {
        if (token < 0) {
            cache.keys[to + i] = cache.keys[from + i];
            cache.values[to + i] = cache.values[from + i];
        } else {
            float k = rotated(key, angles_at(g, position), i), v = __ldcg(key + KV_HEADS * HEAD_DIM + i);
            check_size(g, k), check_size(g, v);
            cache.keys[to + i] = to_stored(k);
            cache.values[to + i] = to_stored(v);
        }
    }
}

// Grid (KV_HEADS, 1, tokens).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)
    attend_prompt(const __grid_constant__ Attend g, const __grid_constant__ Aside aside) {
    extern __shared__ __align__(16) float queries[];
    wait_for_previous();
    let_next_start();
    long long token = blockIdx.z;
    int kv = blockIdx.x, start = start_of(g, aside), position = start + (int)token;
    Span span(position, g.window);
    Cache cache(g, kv, position);
    cache.lies_aside(aside_from(start), aside.at(g, kv));
    float scale = query_scale(g, position);
    for (int i = threadIdx.x; i < HEAD_GROUP * HEAD_DIM; i += ATTEND_THREADS) {
        const float* head = g.qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM + (kv * HEAD_GROUP + i / HEAD_DIM) * HEAD_DIM;
        float v = scale * rotated(head, angles_at(g, position), i % HEAD_DIM);
        check_size(g, v);
        put_query(queries, i / HEAD_DIM, i % HEAD_DIM, v);
    }
    All::sync();
    Batch batch = {};
    fetch_first_keys(batch, cache, span.first, span.end);
    fetch_first_values(batch, cache, span.first, span.end);
    float* out = g.out + (token * HEADS + kv * HEAD_GROUP) * HEAD_DIM;
    attend_share<All>(cache, batch, queries, g.softcap, span.first, span.end, out, nullptr);
}

// Grid (tokens, KV_HEADS).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)
    append(const __grid_constant__ Attend g, const __grid_constant__ Aside aside) {
    wait_for_previous();
    let_next_start();
    int kv = blockIdx.y, token = blockIdx.x, start = start_of(g, aside), position = start + token;
    // What later tokens of the pass replace.
    if (token + g.capacity < aside.tokens) return;
    Cache cache(g, kv, position);
    long long to = cache.at(position), from = aside.at(g, kv) + (long long)(position - aside_from(start)) * HEAD_DIM;
    for (int i = threadIdx.x; i < HEAD_DIM; i += ATTEND_THREADS) {
        cache.keys[to + i] = cache.keys[from + i];
        cache.values[to + i] = cache.values[from + i];
    }
}
