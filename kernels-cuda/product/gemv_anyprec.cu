// Product of one token with codes of one codebook per row (anyprec.cuh), compensated in the same launch (gemv.cuh).
#include "anyprec.cuh"

#include "gemv.cuh"
#include "dequant.cuh"

extern "C" __global__ void dequant_anyprec(const __grid_constant__ Packed m) { dequant(m); }

extern "C" __global__ void __launch_bounds__(ALL_THREADS, MIN_BLOCKS) gemv_anyprec(const __grid_constant__ Gemv g) { gemv(g); }
