// Sums over the threads of one block, in an order that depends on nothing but the block's size: the same numbers give
// the same bits.
#pragma once
#include "common.cuh"

#define WARPS_MOST 32

// The sum of every thread's `v`, for all of them. `scratch` holds WARPS_MOST numbers and is free again on return.
template <class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(FULL, v, offset);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < blockDim.x / 32; w++) sum += scratch[w];
    __syncthreads();
    return sum;
}

// The largest of every thread's `v`, for all of them; NaN is none.
__device__ __forceinline__ float block_max(float v, float* scratch) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v = fmaxf(v, __shfl_xor_sync(FULL, v, offset));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float most = scratch[0];
    for (int w = 1; w < blockDim.x / 32; w++) most = fmaxf(most, scratch[w]);
    __syncthreads();
    return most;
}
