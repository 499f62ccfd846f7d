// Compensation by itself (dec.cuh), where the base product has no room for it: other kinds of matrices, and
// prompts. `dec` adds to y; `select` writes the list of channels.
#include "dec.cuh"

typedef Team<0, 256, 0> All;

extern "C" __global__ void __launch_bounds__(256) dec(const __grid_constant__ Dec d, const float* x, float* y) {
    extern __shared__ __align__(16) char shared[];
    int edge = own_edge(d);
    wait_for_previous();
    let_next_start();
    compensate<All, DEC_WORDS, true>(d, edge, blockIdx.x, shared + 8 * CHUNK * 4, y, nullptr,
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

// x[k] = activation(gate[k])·up[k] of one token, and the selection among them: one block per chunk.
extern "C" __global__ void __launch_bounds__(256) gated_select(const __grid_constant__ Dec d, const float* gu,
                                                               const float* delta, int activation, float* x,
                                                               Salient* list) {
    __shared__ __align__(16) float chunk[CHUNK];
    let_next_start();
    int edge = own_edge(d);
    int first = blockIdx.x * CHUNK, k = 4 * threadIdx.x;
    wait_for_previous();
    float4 v = make_float4(0, 0, 0, 0);
    if (first + k < d.in_features) {
        float4 gate = load4(gu, delta, first + k), up = load4(gu, delta, d.in_features + first + k);
        v = gated4(gate, up, activation);
        *(float4*)(x + first + k) = v;
    }
    *(float4*)(chunk + k) = v;
    __syncthreads();
    int quota = chunk_quota(d, blockIdx.x);
    if (threadIdx.x < 32 && quota > 0)
        select_chunk(InPlace{shared_address(chunk)}(0, CHUNK), first, quota, d, edge, list + blockIdx.x * d.k_chunk);
}
