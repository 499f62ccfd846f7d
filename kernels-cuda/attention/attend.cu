// Attention of one row or of several (attend.cuh), of one text or of several, in kernels of their own. Where a text has more
// rows than one, `append` puts all keys and values into the cache before `attend` reads them; otherwise `attend` appends.
#define ATTEND_THREADS 256
#include "attend.cuh"

// Blocks of a multiprocessor: where registers allow it, room for the next kernel, which starts while this one ends.
#define RESIDENT (TENSOR && HEAD_DIM <= 128 ? 2 : 1)

typedef Team<0, ATTEND_THREADS, 0> All;

// The largest of a number of each thread, in all of them.
__device__ __forceinline__ float block_max(float v, float* scratch) {
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    All::sync();
    for (int w = 0; w < ATTEND_WARPS; w++) v = fmaxf(v, scratch[w]);
    return v;
}

// Grid (rows, KV_HEADS).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) append(const __grid_constant__ Attend g) {
    wait_for_previous();
    let_next_start();
    TextRow row = g.rows[blockIdx.x];
    int kv = blockIdx.y, position = g.position(row.position), i = threadIdx.x;
    Cache cache = g.cache(row.slot, kv, position);
    Settled x = g.row(blockIdx.x);
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

// Grid (PLACES, SPLITS, rows).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, RESIDENT) attend(const __grid_constant__ Attend g) {
    extern __shared__ __align__(16) float queries[];
    __shared__ u32 ticket;
    let_next_start();
    wait_for_previous();
    long long row = blockIdx.z;
    TextRow text = g.rows[row];
    int place = blockIdx.x, position = g.position(text.position);
    Span span(position, g.window);
    if ((int)blockIdx.y >= span.splits) return;
    prefetch(g.cache(text.slot, place / GROUP_PLACES, position), span, blockIdx.y);
    attend_token<All>(g, HeadNorms{}, g.row(row), queries, &ticket, place, blockIdx.y, text.slot, position,
                      g.out + row * (HEADS * HEAD_DIM), g.parts + row * (MOST_SHARES * PLACES * AT_ONCE * PART),
                      g.tickets + row * PLACES, [] {});
}
