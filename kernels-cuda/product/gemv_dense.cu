// Product of one token with 16-bit numbers (dense.cuh), compensated in the same launch (gemv.cuh).
#include "dense.cuh"

#include "gemv.cuh"
#include "dequant.cuh"

extern "C" __global__ void dequant_dense(const __grid_constant__ Packed m) { dequant(m); }

extern "C" __global__ void __launch_bounds__(ALL_THREADS, MIN_BLOCKS) gemv_dense(const __grid_constant__ Gemv g) { gemv(g); }
