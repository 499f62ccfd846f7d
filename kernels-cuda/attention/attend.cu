// Attention of one token as a kernel of its own (attend.cuh). Grid (KV_HEADS, SPLITS).
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
    attend_token<All>(g, HeadNorms{}, Settled{g.qkv, g.delta}, queries, &ticket, kv, blockIdx.y, position, [] {});
}
