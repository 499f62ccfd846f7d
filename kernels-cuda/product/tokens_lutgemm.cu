// Product of many tokens with uniform groups (lutgemm.cuh), weights read once for all (tokens.cuh).
#include "lutgemm.cuh"

#include "tokens.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) tokens_lutgemm(const __grid_constant__ Tokens g) { tokens(g); }
