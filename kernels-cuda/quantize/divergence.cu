// What two models say of the next token: logits [tokens, vocab]. One block a token.
#include "block.cuh"

// Logits through the head's cap. One thread an element.
extern "C" __global__ void cap_logits(float* logits, float cap, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) logits[i] = cap * tanhf(logits[i] / cap);
}

// ln Σ exp(row)
__device__ __forceinline__ double log_sum(const float* row, int vocab, float* scratch, double* wide) {
    float most = -INFINITY;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) most = fmaxf(most, row[i]);
    most = block_max(most, scratch);
    double sum = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(row[i] - most);
    return (double)most + log(block_sum(sum, wide));
}

// divergence[token] = Σ p·(log p − log q) of the distributions of the logits p and q; q becomes its derivative, `share`
// times, by what q was before the cap (0: none).
extern "C" __global__ void __launch_bounds__(512) differ(const float* p, float* q, double* divergence, float share,
                                                         float cap, int vocab) {
    __shared__ float scratch[WARPS_MOST];
    __shared__ double wide[WARPS_MOST];
    p += (long long)blockIdx.x * vocab, q += (long long)blockIdx.x * vocab;
    float sum_p = (float)log_sum(p, vocab, scratch, wide), sum_q = (float)log_sum(q, vocab, scratch, wide);
    double sum = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float log_p = p[i] - sum_p, log_q = q[i] - sum_q, of_p = expf(log_p);
        sum += of_p * (log_p - log_q);
        float t = cap > 0 ? q[i] / cap : 0;
        q[i] = (expf(log_q) - of_p) * share * (1.0f - t * t);
    }
    sum = block_sum(sum, wide);
    if (threadIdx.x == 0) divergence[blockIdx.x] = sum;
}

// chosen[token] = the id that draws[token], uniform in [0, 1), chooses from the distribution of the logits, ids in their
// order; 0xffffffff where the largest logit is not a finite number. Logits that are none count nothing. 512 threads.
extern "C" __global__ void __launch_bounds__(512) draw(const float* logits, const float* draws, u32* chosen, int vocab) {
    __shared__ float scratch[WARPS_MOST];
    __shared__ double before[513];
    __shared__ u32 last;
    const float* row = logits + (long long)blockIdx.x * vocab;
    float most = -INFINITY;
    for (int i = threadIdx.x; i < vocab; i += 512) most = fmaxf(most, row[i]);
    most = block_max(most, scratch);
    if (!(fabsf(most) < INFINITY)) {
        if (threadIdx.x == 0) chosen[blockIdx.x] = 0xffffffffu;
        return;
    }
    // A thread sums up ids that lie together.
    int share = (vocab + 511) / 512, first = threadIdx.x * share, end = min(vocab, first + share);
    double sum = 0;
    u32 alive = 0;
    for (int i = first; i < end; i++) {
        float p = fabsf(row[i]) < INFINITY ? expf(row[i] - most) : 0;
        sum += p;
        if (p > 0) alive = i;
    }
    before[threadIdx.x + 1] = sum;
    if (threadIdx.x == 0) last = 0;
    __syncthreads();
    atomicMax(&last, alive);
    if (threadIdx.x == 0) {
        before[0] = 0;
        for (int i = 1; i <= 512; i++) before[i] += before[i - 1];
        chosen[blockIdx.x] = 0xffffffffu;
    }
    __syncthreads();
    double want = draws[blockIdx.x] * before[512];
    if (before[threadIdx.x] <= want && want < before[threadIdx.x + 1]) {
        double left = want - before[threadIdx.x];
        u32 found = alive;
        for (int i = first; i < end; i++) {
            float p = fabsf(row[i]) < INFINITY ? expf(row[i] - most) : 0;
            left -= p;
            if (left < 0) {
                found = i;
                break;
            }
        }
        chosen[blockIdx.x] = found;
    }
    __syncthreads();
    if (threadIdx.x == 0 && chosen[blockIdx.x] == 0xffffffffu) chosen[blockIdx.x] = last;
}
