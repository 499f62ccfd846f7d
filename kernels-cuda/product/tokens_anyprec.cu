// Product of many tokens with codes of one codebook per row (anyprec.cuh), weights read once for all (tokens.cuh).
#include "anyprec.cuh"

#include "tokens.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) tokens_anyprec(const __grid_constant__ Tokens g) { tokens(g); }
