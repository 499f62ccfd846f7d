// Codes and what they stand for, row by row (quantize/refine/grids.rs). GROUP 0: a row has LEVELS parameters, the codebook,
// ascending; else two for each group of GROUP channels: a centre and half a step. codes, weights [rows, n].
#include "block.cuh"

#ifndef GROUP
#define GROUP 0
#endif
#ifndef LEVELS
#define LEVELS 8
#endif
#define STEPS ((float)(LEVELS - 1))
#define PARAMETERS(n) (GROUP ? (n) / (GROUP ? GROUP : 1) * 2 : LEVELS)

// Half steps from the centre.
__device__ __forceinline__ float steps_of(u8 code) { return 2.0f * code - STEPS; }

__device__ __forceinline__ float weight_of(const float* parameters, int k, u8 code) {
    if (GROUP == 0) return parameters[code];
    const float* group = parameters + k / (GROUP ? GROUP : 1) * 2;
    return group[0] + group[1] * steps_of(code);
}

// out = what codes stand for. Block (row), any threads.
extern "C" __global__ void weights(const u8* codes, const float* parameters, float* out, int n) {
    long long row = blockIdx.x;
    codes += row * n, out += row * n, parameters += row * PARAMETERS(n);
    for (int k = threadIdx.x * 4; k < n; k += blockDim.x * 4) {
        uchar4 c = *(const uchar4*)(codes + k);
        *(float4*)(out + k) = make_float4(weight_of(parameters, k, c.x), weight_of(parameters, k + 1, c.y),
                                          weight_of(parameters, k + 2, c.z), weight_of(parameters, k + 3, c.w));
    }
}

// error = w − q. One thread an element.
extern "C" __global__ void difference(const float* w, const float* q, float* error, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) error[i] = w[i] - q[i];
}

// slopes [rows, parameters]: the derivatives by the parameters, from those by the weights, gradient [rows, n]. `square`: the
// second derivatives instead, from the diagonal of the Hessian, the same for all rows. Block (row); for a codebook, shared
// memory of LEVELS numbers a thread.
extern "C" __global__ void derivatives(const u8* codes, const float* gradient, float* slopes, int n, int square) {
    extern __shared__ float bins[];
    long long row = blockIdx.x;
    codes += row * n, slopes += row * PARAMETERS(n);
    if (!square) gradient += row * n;
    int threads = blockDim.x, t = threadIdx.x;
    if (GROUP == 0) {
        for (int level = 0; level < LEVELS; level++) bins[level * threads + t] = 0;
        for (int k = t; k < n; k += threads) bins[codes[k] * threads + t] += gradient[k];
        __syncthreads();
        for (int half = threads / 2; half; half /= 2) {
            for (int i = t; i < LEVELS * half; i += threads) {
                int level = i / half, at = i % half;
                bins[level * threads + at] += bins[level * threads + at + half];
            }
            __syncthreads();
        }
        for (int level = t; level < LEVELS; level += threads) slopes[level] = bins[level * threads];
    } else {
        // A warp takes a group.
        int lane = t % 32;
        for (int group = t / 32; group < n / (GROUP ? GROUP : 1); group += threads / 32) {
            float sum = 0, along = 0;
            for (int k = group * GROUP + lane; k < (group + 1) * GROUP; k += 32) {
                float g = gradient[k], s = steps_of(codes[k]);
                sum += g;
                along += square ? g * s * s : g * s;
            }
            for (int offset = 16; offset; offset /= 2) {
                sum += __shfl_xor_sync(FULL, sum, offset);
                along += __shfl_xor_sync(FULL, along, offset);
            }
            if (lane == 0) slopes[2 * group] = sum, slopes[2 * group + 1] = along;
        }
    }
}

// A step of conjugate gradients, first half: direction = slope / curvature + (now / before) · direction, where now = Σ
// slope² / curvature, which becomes before. Block (row).
extern "C" __global__ void direct(const float* slopes, const float* curvatures, float* direction, float* before, int n) {
    __shared__ float scratch[WARPS_MOST];
    long long row = blockIdx.x;
    int p = PARAMETERS(n);
    slopes += row * p, curvatures += row * p, direction += row * p;
    float sum = 0;
    for (int i = threadIdx.x; i < p; i += blockDim.x)
        if (curvatures[i] > 0) sum += slopes[i] * (slopes[i] / curvatures[i]);
    float now = block_sum(sum, scratch), last = before[row];
    float keep = last > 0 ? now / last : 0;
    for (int i = threadIdx.x; i < p; i += blockDim.x) {
        float scaled = curvatures[i] > 0 ? slopes[i] / curvatures[i] : 0;
        direction[i] = scaled + keep * direction[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) before[row] = now;
}

// Second half: step is what the direction changes of the weights, through = step · H. Parameters, weights q and the gradient
// (w − q) · H move as far as is best. Block (row).
extern "C" __global__ void move(const float* step, const float* through, const float* direction, const float* before,
                                float* parameters, float* q, float* gradient, int n) {
    __shared__ double scratch[WARPS_MOST];
    long long row = blockIdx.x;
    step += row * n, through += row * n, q += row * n, gradient += row * n;
    double sum = 0;
    for (int k = threadIdx.x; k < n; k += blockDim.x) sum += (double)step[k] * through[k];
    double bend = block_sum(sum, scratch);
    if (!(bend > 0)) return;
    float by = (float)((double)before[row] / bend);
    int p = PARAMETERS(n);
    for (int i = threadIdx.x; i < p; i += blockDim.x) parameters[row * p + i] += by * direction[row * p + i];
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
        q[k] += by * step[k];
        gradient[k] -= by * through[k];
    }
}

// Brings parameters into the order that `descend` expects (a codebook ascending, steps not negative); weights stay what
// they are. With `store`, parameters are rounded to float16 after that. Block (row).
extern "C" __global__ void tidy(float* parameters, u8* codes, int n, int store) {
    __shared__ float sorted[LEVELS];
    __shared__ u8 from[LEVELS], to[LEVELS];
    __shared__ int moved;
    long long row = blockIdx.x;
    codes += row * n, parameters += row * PARAMETERS(n);
    if (GROUP == 0) {
        if (threadIdx.x == 0) {
            moved = 0;
            for (int i = 0; i < LEVELS; i++) {
                float v = parameters[i];
                int at = i;
                // Equal ones stay in their order.
                for (; at > 0 && sorted[at - 1] > v; at--) sorted[at] = sorted[at - 1], from[at] = from[at - 1], moved = 1;
                sorted[at] = v, from[at] = (u8)i;
            }
            for (int i = 0; i < LEVELS; i++) to[from[i]] = (u8)i;
        }
        __syncthreads();
        if (moved)
            for (int k = threadIdx.x; k < n; k += blockDim.x) codes[k] = to[codes[k]];
        for (int i = threadIdx.x; i < LEVELS; i += blockDim.x)
            parameters[i] = store ? half_to_float(float_to_half(sorted[i])) : sorted[i];
    } else {
        for (int k = threadIdx.x; k < n; k += blockDim.x)
            if (parameters[k / (GROUP ? GROUP : 1) * 2 + 1] < 0) codes[k] = (u8)(LEVELS - 1 - codes[k]);
        __syncthreads();
        for (int i = threadIdx.x; i < PARAMETERS(n); i += blockDim.x) {
            float v = i % 2 ? fabsf(parameters[i]) : parameters[i];
            if (store) {
                v = half_to_float(float_to_half(v));
                // float16's smallest number.
                if (i % 2) v = fmaxf(v, 5.9604645e-8f);
            }
            parameters[i] = v;
        }
    }
}

// The code in channel k that stands for the weight nearest to `target`.
__device__ __forceinline__ u8 nearest(const float* parameters, int k, float target) {
    if (GROUP == 0) {
        // How many of all but the last are below the target.
        int above = 0;
#pragma unroll
        for (int half = LEVELS / 2; half; half /= 2)
            if (parameters[above + half - 1] < target) above += half;
        int below = max(above - 1, 0);
        return (u8)(target - parameters[below] <= parameters[above] - target ? below : above);
    }
    const float* group = parameters + k / (GROUP ? GROUP : 1) * 2;
    float at = ((target - group[0]) / group[1] + STEPS) / 2.0f;
    // Adding 2^23 rounds to a whole number, which is then in the lowest bits.
    return (u8)__float_as_uint(fminf(fmaxf(at, 0.0f), STEPS) + 8388608.0f);
}

#define BLOCK 64

// Coordinate descent over the `width` ≤ 64 channels from `first` on: each code becomes the best with all others as they
// are. gradient [rows, n] is (w − q) · H, h [n, n]; q and codes change, moved [rows, width] is what is to be subtracted from
// the errors (the gradient changes by moved · H, which is left to a product). One thread a row.
extern "C" __global__ void __launch_bounds__(32) descend(const float* h, const float* parameters, const float* gradient,
                                                         float* q, u8* codes, float* moved, int n, int first, int width,
                                                         int rows) {
    __shared__ float block[BLOCK][BLOCK + 1], local[BLOCK][32];
    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += 32) {
        int a = i / BLOCK, b = i % BLOCK;
        block[a][b] = a < width && b < width ? h[(long long)(first + a) * n + first + b] : 0;
    }
    __syncthreads();
    long long row = blockIdx.x * 32 + threadIdx.x;
    if (row >= rows) return;
    parameters += row * PARAMETERS(n);
    gradient += row * n + first, q += row * n + first, codes += row * n + first, moved += row * width;
    // Each thread's part of the gradient, beside those of the others.
    for (int k = 0; k < width; k++) local[k][threadIdx.x] = gradient[k];
    for (int k = 0; k < width; k++) {
        float old = q[k];
        u8 code = nearest(parameters, first + k, old + local[k][threadIdx.x] / block[k][k]);
        float value = weight_of(parameters, first + k, code), by = value - old;
        moved[k] = by != 0 ? -by : 0;
        if (by != 0) {
            q[k] = value;
            codes[k] = code;
#pragma unroll 4
            for (int j = k + 1; j < width; j++) local[j][threadIdx.x] -= by * block[k][j];
        }
    }
}
