// Attention of one row or of several (attend.cuh), of one text or of several, in kernels of their own. Where a text has more
// rows than one, `append` puts all keys and values into the cache before `attend` reads them; otherwise `attend` appends.
#define ATTEND_THREADS 256
#include "append.cuh"

// Blocks of a multiprocessor: where registers allow it, room for the next kernel, which starts while this one ends.
#define RESIDENT (TENSOR && HEAD_DIM <= 128 && AT_ONCE <= 5 ? 2 : 1)

// Grid (rows, KV_HEADS).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)
    append(const __grid_constant__ Attend g, const __grid_constant__ TextRows texts) {
    wait_for_previous();
    let_next_start();
    append_row(g, texts.rows[blockIdx.x], 0, blockIdx.y);
}

// Grid (PLACES, blocks of a place, rows).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, RESIDENT)
    attend(const __grid_constant__ Attend g, const __grid_constant__ TextRows texts) {
    extern __shared__ __align__(16) float queries[];
    __shared__ u32 ticket;
    let_next_start();
    wait_for_previous();
    const TextRow& row = texts.rows[blockIdx.z];
    int place = blockIdx.x, position = position_of(row.state, g.max_seq_len, row.behind);
    Span span(position, g.window);
    if ((int)blockIdx.y >= span.splits) return;
    prefetch(g.cache(row, place / GROUP_PLACES, position), span, blockIdx.y);
    attend_token<All>(g, HeadNorms{}, g.numbers(row.row), queries, &ticket, place, blockIdx.y, row, position,
                      g.out + (long long)row.row * (HEADS * HEAD_DIM),
                      g.parts + (long long)blockIdx.z * (MOST_SHARES * PLACES * AT_ONCE * RESULT),
                      g.tickets + blockIdx.z * PLACES, [] {});
}
