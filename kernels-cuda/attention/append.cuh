// Keys and values of rows that other rows see in the same pass, into the cache before any of them is attended for.
#pragma once
#define SPLITS ((int)gridDim.y)
#include "attend.cuh"

typedef Team<0, ATTEND_THREADS, 0> All;

// The largest of a number of each thread, in all of them.
__device__ __forceinline__ float block_max(float v, float* scratch) {
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    All::sync();
    for (int w = 0; w < ATTEND_WARPS; w++) v = fmaxf(v, scratch[w]);
    return v;
}

// Puts a row's key and value of one head into the cache.
__device__ __forceinline__ void append_row(const Attend& g, const TextRow& text, u32 behind, int kv) {
    int position = position_of(text.state, g.max_seq_len, text.behind + behind), i = threadIdx.x;
    Cache cache = g.cache(text, kv, position);
    Settled x = g.numbers(text.row + behind);
    bool own = i < HEAD_DIM;
    float k = own ? rotated(x, (HEADS + kv) * HEAD_DIM, angles_at(g, position), i) : 0.0f;
    float v = own ? load1(x.x, x.delta, (HEADS + KV_HEADS + kv) * HEAD_DIM + i) : 0.0f;
    Stored *key = cache.keys + cache.at(position) + i, *value = cache.values + cache.at(position) + i;
#if IN_BYTES
    __shared__ float scratch[2][ATTEND_WARPS];
    Step keys(block_max(size_of(k), scratch[0])), values(block_max(size_of(v), scratch[1]));
    if (own) *key = keys.byte(k), *value = values.byte(v);
    if (i == 0) cache.key_steps()[cache.place(position)] = keys.step, cache.value_steps()[cache.place(position)] = values.step;
#else
    if (!own) return;
    check_size(g, k), check_size(g, v);
    *key = to_stored(k), *value = to_stored(v);
#endif
}
