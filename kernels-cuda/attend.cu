// Attention as kernels of its own (attend.cuh): `attend` takes one token, grid (KV_HEADS, SPLITS); `append` rotates
// and appends many tokens, `attend_prompt` then takes grid (KV_HEADS, 1, tokens).
#define ATTEND_THREADS 256
#include "attend.cuh"

// Blocks of a multiprocessor: where registers allow it, room for the next kernel, which starts while this one ends.
#define RESIDENT (TENSOR && HEAD_DIM <= 128 && HEAD_GROUP <= 16 ? 2 : 1)

typedef Team<0, ATTEND_THREADS, 0> All;

extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, RESIDENT) attend(const __grid_constant__ Attend g) {
    extern __shared__ __align__(16) float queries[];
    __shared__ u32 ticket;
    let_next_start();
    wait_for_previous();
    int kv = blockIdx.x, position = position_of(g.state, g.max_seq_len, 0);
    Span span(position, g.window);
    if ((int)blockIdx.y >= span.splits) return;
    prefetch(Cache(g, kv, position), span.begin_of(blockIdx.y), span.end_of(blockIdx.y));
    attend_token<All>(g, Settled{g.qkv, g.delta}, queries, &ticket, kv, blockIdx.y, position, [] {});
}

// Grid (tokens, KV_HEADS).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) append(const __grid_constant__ Attend g) {
    wait_for_previous();
    let_next_start();
    long long token = blockIdx.x;
    int position = position_of(g.state, g.max_seq_len, blockIdx.x);
    append_head(g, g.qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM, blockIdx.y, position);
}

extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) attend_prompt(const __grid_constant__ Attend g) {
    extern __shared__ __align__(16) float queries[];
    wait_for_previous();
    let_next_start();
    long long token = blockIdx.z;
    int kv = blockIdx.x, position = position_of(g.state, g.max_seq_len, blockIdx.z);
    Span span(position, g.window);
    Cache cache(g, kv, position);
    float scale = query_scale(g, position);
    for (int i = threadIdx.x; i < HEAD_GROUP * HEAD_DIM; i += ATTEND_THREADS) {
        const float* head = g.qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM + (kv * HEAD_GROUP + i / HEAD_DIM) * HEAD_DIM;
        float v = scale * rotated(head, nullptr, angles_at(g, position), i % HEAD_DIM);
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
