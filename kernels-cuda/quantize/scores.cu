// Attention's softmax over scores of many queries, forwards and backwards. scores [heads, queries, len], products of
// queries with keys; the query of row r is at position first + r % queries and sees the positions from
// max(0, position + 1 − window) to its own (window 0: from 0). scales [positions]: what products are multiplied by; cap 0:
// none, else cap · tanh(score / cap). Unseen positions become 0. One block a row.
#include "block.cuh"

struct Seen {
    int start, end;
    float scale;
};

__device__ __forceinline__ Seen seen(const float* scales, int queries, int first, int window) {
    int position = first + blockIdx.x % queries;
    return {window ? max(0, position + 1 - window) : 0, position + 1, scales[position]};
}

__device__ __forceinline__ float capped(float score, float cap) { return cap > 0 ? cap * tanhf(score / cap) : score; }

// The row becomes its probabilities.
__device__ __forceinline__ void probabilities(float* row, int len, Seen s, float cap, float* scratch) {
    float most = -INFINITY;
    for (int i = s.start + threadIdx.x; i < s.end; i += blockDim.x) {
        float score = capped(row[i] * s.scale, cap);
        row[i] = score;
        most = fmaxf(most, score);
    }
    most = block_max(most, scratch);
    float sum = 0;
    for (int i = s.start + threadIdx.x; i < s.end; i += blockDim.x) {
        float p = expf(row[i] - most);
        row[i] = p;
        sum += p;
    }
    float share = 1.0f / block_sum(sum, scratch);
    for (int i = threadIdx.x; i < len; i += blockDim.x) row[i] = i >= s.start && i < s.end ? row[i] * share : 0;
}

extern "C" __global__ void softmax(float* scores, const float* scales, int queries, int len, int first, int window,
                                   float cap) {
    __shared__ float scratch[WARPS_MOST];
    float* row = scores + (long long)blockIdx.x * len;
    probabilities(row, len, seen(scales, queries, first, window), cap, scratch);
}

// The same, and d, the derivative by the probabilities, becomes that by the products. slopes [heads, queries, len] is work
// space, used where there is a cap (cap · tanh(s / cap) has the derivative 1 − tanh²).
extern "C" __global__ void softmax_back(float* scores, float* d, float* slopes, const float* scales, int queries,
                                        int len, int first, int window, float cap) {
    __shared__ float scratch[WARPS_MOST];
    float* row = scores + (long long)blockIdx.x * len;
    d += (long long)blockIdx.x * len;
    Seen s = seen(scales, queries, first, window);
    // Scores become probabilities; each thread finds the slopes of its own elements again.
    if (cap > 0) {
        for (int i = s.start + threadIdx.x; i < s.end; i += blockDim.x) {
            float t = tanhf(row[i] * s.scale / cap);
            slopes[(long long)blockIdx.x * len + i] = 1.0f - t * t;
        }
    }
    probabilities(row, len, s, cap, scratch);
    float mean = 0;
    for (int i = s.start + threadIdx.x; i < s.end; i += blockDim.x) mean = fmaf(row[i], d[i], mean);
    mean = block_sum(mean, scratch);
    for (int i = threadIdx.x; i < len; i += blockDim.x) {
        float slope = cap > 0 && i >= s.start && i < s.end ? slopes[(long long)blockIdx.x * len + i] : 1;
        d[i] = i >= s.start && i < s.end ? row[i] * (d[i] - mean) * s.scale * slope : 0;
    }
}
