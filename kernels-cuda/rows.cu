// What lies between the products: embedding, norms, the gate, caps, and the text's length. Vectors are f32,
// [tokens, features]; a delta beside a vector is a compensation not yet added to it (one token only).
#include "common.cuh"

// Device-side state of a text (mirrored by sequence.rs).
struct State {
    u32 position; // tokens in the cache
    u32 sampled;  // tokens chosen since the text began
    u32 last;     // the latest of them
};

// h[token, :] = scale · table[id, :], NaN where the table has no such row. kind 0: 16-bit numbers of DTYPE in gemv_dense.cu's
// units; 2: f32 rows. `ids` null takes the token sampled last.
extern "C" __global__ void __launch_bounds__(256) embed(const void* table, int kind, int features, u32 rows,
                                                        float scale, const u32* ids, const State* state, float* h) {
    wait_for_previous();
    let_next_start();
    int token = blockIdx.y;
    u32 row = ids ? ids[token] : state->last;
    int units = (features + 63) / 64;
    int k = blockIdx.x * 256 + threadIdx.x;
    if (k < features) {
        float v;
        if (row >= rows) {
            v = __uint_as_float(0x7fc00000u);
        } else if (kind == 2) {
            v = ((const float*)table)[(long long)row * features + k];
        } else {
            long long unit = (long long)(row / 16) * units + k / 64;
            int lane = (int)(row % 8) * 4 + k % 32 / 8, vector = k % 64 / 32 * 2 + (int)(row % 16) / 8;
            v = widen(((const u16*)table)[((unit * 4 + vector) * 32 + lane) * 8 + k % 8]);
        }
        h[(long long)token * features + k] = scale * v;
    }
}

// out[token, :] = norm(x)·γ, x itself (γ null), or activation(gate)·up (x is [tokens, gate then up]), which activation −1
// does not ask for. kind: 0 as 16-bit numbers of DTYPE, 2 as f32. *beyond = 1 if some were beyond those 16 bits.
extern "C" __global__ void __launch_bounds__(256) stage(const float* x, const float* delta, const float* gamma,
                                                        float eps, int activation, int features, int kind, void* out,
                                                        u32* beyond) {
    __shared__ float scratch[8];
    wait_for_previous();
    let_next_start();
    long long token = blockIdx.x;
    x += token * features * (activation >= 0 ? 2 : 1);
    float scale = 1;
    if (gamma) {
        float sum = 0;
        for (int k = threadIdx.x; k < features; k += 256) {
            float v = load1(x, delta, k);
            sum = fmaf(v, v, sum);
        }
        scale = 1.0f / sqrtf(team_sum<Team<0, 256, 0>>(sum, scratch) / features + eps);
    }
    for (int k = threadIdx.x; k < features; k += 256) {
        float v = load1(x, delta, k);
        if (gamma) v = v * scale * gamma[k];
        if (activation >= 0) v = activated(v, activation) * load1(x, delta, features + k);
        if (kind == 2)
            ((float*)out)[token * features + k] = v;
        else
            ((u16*)out)[token * features + k] = narrow(v);
        if (DTYPE == 0 && kind == 0 && fabsf(v) > HALF_MOST) note_beyond(beyond);
    }
}

// out[k] = activation(gate[k])·up[k] of one token, spread over many blocks. features % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) gated(const float* gu, const float* delta, int activation,
                                                        int features, float* out) {
    let_next_start();
    int k = 4 * (blockIdx.x * 256 + threadIdx.x);
    wait_for_previous();
    if (k >= features) return;
    float4 gate = load4(gu, delta, k), up = load4(gu, delta, features + k);
    *(float4*)(out + k) = gated4(gate, up, activation);
}

// norm(x)·γ over `len` numbers by a block of THREADS, len % 4 == 0. What does not fit in registers is read again.
template <int THREADS>
struct Norm {
    typedef Team<0, THREADS, 0> All;
    static constexpr int STEPS = 2;
    float4 gamma[STEPS];

    static __device__ __forceinline__ int at(int step) { return 4 * (step * THREADS + this_thread()); }

    // What does not depend on earlier kernels.
    __device__ __forceinline__ Norm(const float* from, int len) {
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            gamma[s] = at(s) < len ? *(const float4*)(from + at(s)) : make_float4(0, 0, 0, 0);
    }

    // write(step, i, four of them) for all that x(i) gives; steps of which nothing was kept are STEPS.
    template <class Read, class Write>
    __device__ __forceinline__ void run(const float* from, int len, float eps, float* scratch, Read x,
                                        Write write) const {
        float4 v[STEPS];
        float sum = 0;
        auto add_squares = [&](float4 v) {
            sum = fmaf(v.x, v.x, sum), sum = fmaf(v.y, v.y, sum), sum = fmaf(v.z, v.z, sum), sum = fmaf(v.w, v.w, sum);
        };
#pragma unroll
        for (int s = 0; s < STEPS; s++) v[s] = at(s) < len ? x(at(s)) : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int s = 0; s < STEPS; s++) add_squares(v[s]);
        for (int i = at(STEPS); i < len; i += 4 * THREADS) add_squares(x(i));
        float scale = 1.0f / sqrtf(team_sum<All>(sum, scratch) / len + eps);
        auto scaled = [&](float4 v, float4 w) {
            return make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        };
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (at(s) < len) write(s, at(s), scaled(v[s], gamma[s]));
        for (int i = at(STEPS); i < len; i += 4 * THREADS) write(STEPS, i, scaled(x(i), *(const float4*)(from + i)));
    }
};

// Of qkv [tokens, queries, keys, values]: x = norm(x + delta)·γ for every stretch x of the queries, as long as their γ, and
// of the keys; values += delta. Grid (stretches, tokens); with a delta, one block more, for the values.
// queries, keys, query_len, key_len % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) norm_qk(float* qkv, const float* delta, const float* query,
                                                          const float* key, int queries, int keys, int query_len,
                                                          int key_len, float query_eps, float key_eps) {
    __shared__ float scratch[8];
    let_next_start();
    int stretch = blockIdx.x, of_queries = queries / query_len;
    bool is_key = stretch >= of_queries;
    int len = is_key ? key_len : query_len, begin = is_key ? queries + (stretch - of_queries) * key_len : stretch * query_len;
    bool is_value = begin >= queries + keys;
    const float* gamma = is_key ? key : query;
    float* x = qkv + (long long)blockIdx.y * (queries + 2 * keys) + begin;
    if (delta) delta += begin;
    Norm<256> norm(gamma, is_value ? 0 : len);
    wait_for_previous();
    auto read = [&](int i) { return load4(x, delta, i); };
    auto write = [&](int, int i, float4 v) { *(float4*)(x + i) = v; };
    if (!is_value)
        norm.run(gamma, len, is_key ? key_eps : query_eps, scratch, read, write);
    else
        for (int i = 4 * threadIdx.x; i < keys; i += 4 * 256) write(0, i, read(i));
}

// h[token, :] += h_delta + norm(branch + delta)·γ; one block per token. features % 4 == 0.
extern "C" __global__ void __launch_bounds__(1024) add_norm(const float* branch, const float* delta,
                                                            const float* gamma, float eps, int features, float* h,
                                                            const float* h_delta) {
    __shared__ float scratch[32];
    let_next_start();
    long long first = (long long)blockIdx.x * features;
    typedef Norm<1024> Branch;
    Branch norm(gamma, features);
    wait_for_previous();
    branch += first, h += first;
    // On its way while the squares are summed.
    float4 before[Branch::STEPS];
#pragma unroll
    for (int s = 0; s < Branch::STEPS; s++)
        before[s] = Branch::at(s) < features ? load4(h, h_delta, Branch::at(s)) : make_float4(0, 0, 0, 0);
    norm.run(gamma, features, eps, scratch, [&](int i) { return load4(branch, delta, i); },
             [&](int s, int i, float4 v) {
                 *(float4*)(h + i) = add4(s < Branch::STEPS ? before[s] : load4(h, h_delta, i), v);
             });
}

// logits[i] = cap·tanh((logits[i] + delta[i]) / cap)
extern "C" __global__ void __launch_bounds__(256) softcap(float* logits, const float* delta, long long count, float cap) {
    let_next_start();
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    wait_for_previous();
    if (i < count) logits[i] = cap * tanhf((delta ? __ldcg(logits + i) + __ldcg(delta + i) : __ldcg(logits + i)) / cap);
}

// y[token, row] += bias[row]; one block row per token.
extern "C" __global__ void __launch_bounds__(256) add_bias(float* y, const float* bias, int features) {
    wait_for_previous();
    let_next_start();
    int k = blockIdx.x * 256 + threadIdx.x;
    if (k < features) y[(long long)blockIdx.y * features + k] += bias[k];
}

// last = x[row, :]
extern "C" __global__ void __launch_bounds__(256) copy_row(const float* x, const float* delta, int row, int features,
                                                           float* last) {
    wait_for_previous();
    let_next_start();
    int k = blockIdx.x * 256 + threadIdx.x;
    if (k < features) last[k] = load1(x + (long long)row * features, delta, k);
}

// The text grows by `tokens`; *progress, if it is asked for, says how far it is. It is in mapped host memory.
extern "C" __global__ void advance(State* state, u32 tokens, volatile u32* progress) {
    wait_for_previous();
    let_next_start();
    if (threadIdx.x != 0) return;
    u32 position = state->position + tokens;
    state->position = position;
    if (progress) *progress = position;
}
