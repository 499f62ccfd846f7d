// Compensation by itself (dec.cuh), where the base product has no room for it: other kinds of matrices, and
// prompts. `dec` adds to y; `select` writes the list of channels.
#include "dec.cuh"

typedef Team<0, 256, 0> All;

extern "C" __global__ void __launch_bounds__(256) dec(const __grid_constant__ Dec d, const float* x, float* y) {
    extern __shared__ __align__(16) char shared[];
    int edge = own_edge(d);
    wait_for_previous();
    let_next_start();
    compensate<All, DEC_WORDS, true>(d, edge, blockIdx.x, shared + 8 * CHUNK * 4, y,
                                     copied<All>(shared, [&](int i) { return load4(x, nullptr, i); }));
}

extern "C" __global__ void __launch_bounds__(256) select_channels(const __grid_constant__ Dec d, const float* x,
                                                                  const float* delta, Salient* list) {
    extern __shared__ __align__(16) char shared[];
    wait_for_previous();
    let_next_start();
    int chunks = (d.in_features + CHUNK - 1) / CHUNK;
    select_chunks<All>(d, own_edge(d), 0, chunks, list, copied<All>(shared, [&](int i) { return load4(x, delta, i); }));
}
