// Product of one token with uniform groups (lutgemm.cuh), compensated in the same launch (gemv.cuh).
#include "lutgemm.cuh"

#include "gemv.cuh"
#include "dequant.cuh"

extern "C" __global__ void dequant_lutgemm(const __grid_constant__ Packed m) { dequant(m); }

extern "C" __global__ void __launch_bounds__(ALL_THREADS, MIN_BLOCKS) gemv_lutgemm(const __grid_constant__ Gemv g) { gemv(g); }
