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

__device__ __forceinline__ float squares(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

__device__ __forceinline__ float4 scaled(float4 v, float scale, float4 gamma) {
    return make_float4(v.x * scale * gamma.x, v.y * scale * gamma.y, v.z * scale * gamma.z, v.w * scale * gamma.w);
}

// Of qkv [tokens, queries, keys, values]: x = norm(x + delta)·γ for every stretch x of the queries, as long as their γ, and
// of the keys; values += delta. Grid (stretches, tokens); with a delta, one block more, for the values.
// queries, keys, query_len, key_len % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) norm_qk(float* qkv, const float* delta, const float* query,
                                                          const float* key, int queries, int keys, int query_len,
                                                          int key_len, float query_eps, float key_eps) {
    __shared__ float scratch[8];
    let_next_start();
    int stretch = blockIdx.x, of_queries = queries / query_len, k = 4 * threadIdx.x;
    bool is_key = stretch >= of_queries;
    int len = is_key ? key_len : query_len;
    int begin = is_key ? queries + (stretch - of_queries) * key_len : stretch * query_len;
    bool is_value = begin >= queries + keys;
    const float* gamma = is_key ? key : query;
    float4 w = !is_value && k < len ? *(const float4*)(gamma + k) : make_float4(0, 0, 0, 0);
    float* x = qkv + (long long)blockIdx.y * (queries + 2 * keys) + begin;
    if (delta) delta += begin;
    wait_for_previous();
    if (is_value) {
        for (; k < keys; k += 1024) *(float4*)(x + k) = load4(x, delta, k);
        return;
    }
    float4 v = k < len ? load4(x, delta, k) : make_float4(0, 0, 0, 0);
    float sum = squares(v);
    for (int i = k + 1024; i < len; i += 1024) sum += squares(load4(x, delta, i));
    float scale = 1.0f / sqrtf(team_sum<Team<0, 256, 0>>(sum, scratch) / len + (is_key ? key_eps : query_eps));
    if (k < len) *(float4*)(x + k) = scaled(v, scale, w);
    for (int i = k + 1024; i < len; i += 1024)
        *(float4*)(x + i) = scaled(load4(x, delta, i), scale, *(const float4*)(gamma + i));
}

// h[token, :] += h_delta + norm(branch + delta)·γ. Grid (features / 1024 rounded up, tokens): every block sums all squares,
// which is one read, and writes its 1024 numbers; blocks this small leave room for those of the next product.
// features % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) add_norm(const float* branch, const float* delta,
                                                           const float* gamma, float eps, int features, float* h,
                                                           const float* h_delta) {
    __shared__ float scratch[8];
    let_next_start();
    long long first = (long long)blockIdx.y * features;
    branch += first, h += first;
    int k = 4 * (blockIdx.x * 256 + threadIdx.x);
    bool own = k < features;
    float4 none = make_float4(0, 0, 0, 0), w = own ? *(const float4*)(gamma + k) : none;
    wait_for_previous();
    float4 v = own ? load4(branch, delta, k) : none, before = own ? load4(h, h_delta, k) : none;
    float sum = 0;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < features; i += 1024) sum += squares(load4(branch, delta, i));
    float scale = 1.0f / sqrtf(team_sum<Team<0, 256, 0>>(sum, scratch) / features + eps);
    if (own) *(float4*)(h + k) = add4(before, scaled(v, scale, w));
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
