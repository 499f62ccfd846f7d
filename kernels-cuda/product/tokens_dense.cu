// Product of many tokens with 16-bit numbers (dense.cuh), weights read once for all (tokens.cuh).
#include "dense.cuh"

#include "tokens.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) tokens_dense(const __grid_constant__ Tokens g) { tokens(g); }
