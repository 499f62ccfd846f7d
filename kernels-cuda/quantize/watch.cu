// What enters a projection: which channels compensation takes, sums of squares, and the largest magnitudes (spec §2.4,
// §3.1). x [tokens, n], n a multiple of 32; a mask has a bit for each of them, [tokens, n / 32] words.
#include "block.cuh"

#define CHUNK 1024
#define THREADS 256
#define SLICES (CHUNK / THREADS)

// The bits of every |x|: as integers in the same order, NaN above all.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// mask: k_chunk · len / 1024 channels of every chunk of 1024 (the last may be shorter), those with the largest |x|, the
// first ones among equals. Block (chunk, token), 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS) select(const float* x, u32* mask, int n, int k_chunk) {
    __shared__ u32 counts[256];
    __shared__ u32 ties[CHUNK / 32];
    __shared__ u32 prefix, wanted;
    int first = blockIdx.x * CHUNK, len = min(CHUNK, n - first);
    long long token = blockIdx.y;
    x += token * n + first;
    mask += token * (n / 32) + first / 32;
    int k = k_chunk * len / CHUNK;
    u32 keys[SLICES];
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
        int i = s * THREADS + threadIdx.x;
        keys[s] = i < len ? magnitude(x[i]) : 0;
    }
    if (threadIdx.x == 0) prefix = 0, wanted = k;
    if (k == 0) {
        for (int w = threadIdx.x; w < len / 32; w += THREADS) mask[w] = 0;
        return;
    }
    // The k-th largest key, eight bits at a time from the top.
    for (int shift = 24; shift >= 0; shift -= 8) {
        counts[threadIdx.x] = 0;
        __syncthreads();
        u32 above = shift == 24 ? 0 : prefix >> (shift + 8);
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            bool same = shift == 24 || keys[s] >> (shift + 8) == above;
            if (s * THREADS + threadIdx.x < len && same) atomicAdd(&counts[keys[s] >> shift & 255], 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // Lane 0 has the eight largest digits, and so on.
            int top = 255 - 8 * threadIdx.x;
            u32 sum = 0;
            for (int j = 0; j < 8; j++) sum += counts[top - j];
            u32 before = sum;
            for (int offset = 1; offset < 32; offset *= 2) {
                u32 other = __shfl_up_sync(FULL, before, offset);
                if (threadIdx.x >= offset) before += other;
            }
            u32 want = wanted;
            bool here = before >= want && before - sum < want;
            u32 so_far = before - sum;
            __syncwarp();
            if (here) {
                for (int j = 0; j < 8; j++) {
                    u32 count = counts[top - j];
                    if (so_far + count >= want) {
                        prefix |= (u32)(top - j) << shift;
                        wanted = want - so_far;
                        break;
                    }
                    so_far += count;
                }
            }
        }
        __syncthreads();
    }
    u32 last = prefix, equal = wanted;
    u32 over[SLICES], same[SLICES];
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
        int i = s * THREADS + threadIdx.x;
        over[s] = __ballot_sync(FULL, i < len && keys[s] > last);
        same[s] = __ballot_sync(FULL, i < len && keys[s] == last);
        if (threadIdx.x % 32 == 0) ties[i / 32] = __popc(same[s]);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
        int word = (s * THREADS + threadIdx.x) / 32;
        if (word * 32 >= len || threadIdx.x % 32) continue;
        u32 before = 0;
        for (int w = 0; w < word; w++) before += ties[w];
        u32 bits = over[s], rest = same[s];
        for (u32 left = equal > before ? equal - before : 0; left && rest; left--) {
            bits |= rest & -rest;
            rest &= rest - 1;
        }
        mask[word] = bits;
    }
}

// Splits x into taken and rest; either may be null. One thread an element.
extern "C" __global__ void split(const float* x, const u32* mask, float* taken, float* rest, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    bool is = mask[i / 32] >> (i % 32) & 1;
    if (taken) taken[i] = is ? x[i] : 0;
    if (rest) rest[i] = is ? 0 : x[i];
}

// out = taken where the mask says so, else out. One thread an element.
extern "C" __global__ void choose(float* out, const float* taken, const u32* mask, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && (mask[i / 32] >> (i % 32) & 1)) out[i] = taken[i];
}

// sums[k] += Σ x[t, k]² over all tokens; of_taken[k] over those whose mask has the channel (mask null: none). In double
// precision. Block: 32 channels; 32 threads across, 8 tokens at a time.
extern "C" __global__ void __launch_bounds__(256) squares(const float* x, const u32* mask, double* sums,
                                                          double* of_taken, int n, int tokens) {
    __shared__ double parts[2][8][32];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32, k = blockIdx.x * 32 + lane;
    double all = 0, taken = 0;
    for (int t = row; t < tokens; t += 8) {
        double v = x[(long long)t * n + k];
        all += v * v;
        if (mask && (mask[(long long)t * (n / 32) + blockIdx.x] >> lane & 1)) taken += v * v;
    }
    parts[0][row][lane] = all, parts[1][row][lane] = taken;
    __syncthreads();
    if (row == 0) {
        for (int r = 1; r < 8; r++) all += parts[0][r][lane], taken += parts[1][r][lane];
        sums[k] += all;
        if (mask) of_taken[k] += taken;
    }
}

// largest[r] = the maximum over tokens of itself and the (r+1)-th largest |x|, as bits. Each block sorts the tokens
// blockIdx.x, + gridDim.x, … in shared memory of `room` words, the first power of two that is not below n.
extern "C" __global__ void __launch_bounds__(1024) thresholds(const float* x, u32* largest, int n, int tokens, int room) {
    extern __shared__ u32 keys[];
    for (int t = blockIdx.x; t < tokens; t += gridDim.x) {
        for (int i = threadIdx.x; i < room; i += blockDim.x) keys[i] = i < n ? magnitude(x[(long long)t * n + i]) : 0;
        __syncthreads();
        // Bitonic: descending.
        for (int size = 2; size <= room; size *= 2) {
            for (int step = size / 2; step; step /= 2) {
                for (int p = threadIdx.x; p < room / 2; p += blockDim.x) {
                    int i = p / step * 2 * step + p % step, j = i + step;
                    u32 a = keys[i], b = keys[j];
                    bool descending = (i & size) == 0;
                    if (descending ? a < b : a > b) keys[i] = b, keys[j] = a;
                }
                __syncthreads();
            }
        }
        for (int i = threadIdx.x; i < n; i += blockDim.x)
            if (keys[i] > largest[i]) atomicMax(&largest[i], keys[i]);
        __syncthreads();
    }
}

// diagonal[i] = h[i, i]. One thread an element.
extern "C" __global__ void diagonal(const float* h, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = h[(long long)i * n + i];
}

// h /= divisor (where it is not 1), and then its diagonal grows by `damping` of itself and `floor`. One thread an element.
extern "C" __global__ void damp(float* h, double divisor, float damping, float floor, int n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)n * n) return;
    float v = divisor == 1.0 ? h[i] : (float)(h[i] / divisor);
    if (i % (n + 1) == 0) v += damping * v + floor;
    h[i] = v;
}

// out = the rows of h that `list` names, [rows, width]; with `among`, of these the columns that it names. One thread an
// element of out.
extern "C" __global__ void gather(const float* h, const u32* list, float* out, int n, int width, int among,
                                  long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int column = (int)(i % width);
    out[i] = h[(long long)list[i / width] * n + (among ? list[column] : column)];
}
