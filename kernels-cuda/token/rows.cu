// What lies between the products: embedding, norms, the gate, caps, and the text's length. Vectors are f32,
// [tokens, features]; a delta beside a vector is a compensation not yet added to it (one token only).
#include "sums.cuh"

// Device-side state of a text (mirrored by sequence.rs).
struct State {
    u32 position; // tokens in the cache
    u32 sampled;  // tokens chosen since the text began
    u32 last;     // the latest of them
};

// Texts of a launch: DECODE_ROWS of src/backend/rows.rs.
#define MOST_TEXTS 16
struct Texts {
    State* states[MOST_TEXTS];
};

// h[token, :] = scale · table[id, :], NaN where the table has no such row. kind 0: 16-bit numbers of DTYPE in gemv_dense.cu's
// units; 2: f32 rows. `ids` null takes the token sampled last in each of `texts`.
extern "C" __global__ void __launch_bounds__(256) embed(const void* table, int kind, int features, u32 rows,
                                                        float scale, const u32* ids,
                                                        const __grid_constant__ Texts texts, float* h) {
    wait_for_previous();
    let_next_start();
    int token = blockIdx.y;
    u32 row = ids ? ids[token] : texts.states[token]->last;
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

// What a norm of `len` numbers divides by, inverted, from at(k): four of them from k on, len % 4 == 0. squares: room for a
// number of each span. All threads of the block call it.
template <class At>
__device__ __forceinline__ float block_inverse_rms(int len, float eps, float* squares, At at) {
    float4 none = make_float4(0, 0, 0, 0);
    for (int s = threadIdx.x / 32; s < SPANS_OF(len); s += blockDim.x / 32) {
        int k = s * SPAN + threadIdx.x % 32 * 8;
        float sum = warp_sum(squares_of(k < len ? at(k) : none, k + 4 < len ? at(k + 4) : none));
        if (threadIdx.x % 32 == 0) squares[s] = sum;
    }
    __syncthreads();
    return inverse_rms_of(len, eps, [&](int s) { return squares[s]; });
}

// Spans of the longest vector that is normalized.
#define MOST_SPANS 256

// out[token, :] = norm(x)·γ, x itself (γ null), or activation(gate)·up (x is [tokens, gate then up]), which activation −1
// does not ask for. kind: 0 as 16-bit numbers of DTYPE, 2 as f32. *beyond = 1 if some were beyond those 16 bits.
// features % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) stage(const float* x, const float* delta, const float* gamma,
                                                        float eps, int activation, int features, int kind, void* out,
                                                        u32* beyond) {
    __shared__ float squares[MOST_SPANS];
    wait_for_previous();
    let_next_start();
    long long token = blockIdx.x;
    x += token * features * (activation >= 0 ? 2 : 1);
    float scale = 1;
    if (gamma) scale = block_inverse_rms(features, eps, squares, [&](int k) { return load4(x, delta, k); });
    for (int k = threadIdx.x; k < features; k += 256) {
        float v = load1(x, delta, k);
        if (gamma) v = __fmul_rn(__fmul_rn(v, scale), gamma[k]);
        if (activation >= 0) v = gated1(v, load1(x, delta, features + k), activation);
        if (kind == 2)
            ((float*)out)[token * features + k] = v;
        else
            ((u16*)out)[token * features + k] = narrow(v);
        if (DTYPE == 0 && kind == 0 && fabsf(v) > HALF_MOST) note_beyond(beyond);
    }
}

// out[k] = activation(gate[k])·up[k] of one token, in 16 bits, spread over many blocks. features % 4 == 0. *beyond = 1 if some
// were beyond those.
extern "C" __global__ void __launch_bounds__(256) gated(const float* gu, const float* delta, int activation,
                                                        int features, float* out, u32* beyond) {
    let_next_start();
    int k = 4 * (blockIdx.x * 256 + threadIdx.x);
    wait_for_previous();
    if (k >= features) return;
    Beyond lost;
    float4 gate = load4(gu, delta, k), up = load4(gu, delta, features + k);
    *(float4*)(out + k) = narrowed4(gated4(gate, up, activation), lost);
    lost.tell(beyond);
}

__device__ __forceinline__ float4 scaled(float4 v, float scale, float4 gamma) {
    return make_float4(v.x * scale * gamma.x, v.y * scale * gamma.y, v.z * scale * gamma.z, v.w * scale * gamma.w);
}

// Of qkv [tokens, queries, keys, values]: x = norm(x + delta)·γ for every stretch x of the queries, as long as their γ, and
// of the keys; values += delta. Grid (stretches, tokens); with a delta, one block more, for the values.
// queries, keys, query_len, key_len % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) norm_qk(float* qkv, const float* delta, const float* query,
                                                          const float* key, int queries, int keys, int query_len,
                                                          int key_len, float query_eps, float key_eps) {
    __shared__ float sums[MOST_SPANS];
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
    float eps = is_key ? key_eps : query_eps;
    float scale = block_inverse_rms(len, eps, sums, [&](int k) { return load4(x, delta, k); });
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
    __shared__ float squares[MOST_SPANS];
    let_next_start();
    long long first = (long long)blockIdx.y * features;
    branch += first, h += first;
    int k = 4 * (blockIdx.x * 256 + threadIdx.x);
    bool own = k < features;
    float4 none = make_float4(0, 0, 0, 0), w = own ? *(const float4*)(gamma + k) : none;
    wait_for_previous();
    float4 v = own ? load4(branch, delta, k) : none, before = own ? load4(h, h_delta, k) : none;
    float scale = block_inverse_rms(features, eps, squares, [&](int k) { return load4(branch, delta, k); });
    if (own)
        *(float4*)(h + k) = make_float4(add_normed(v.x, scale, w.x, before.x), add_normed(v.y, scale, w.y, before.y),
                                        add_normed(v.z, scale, w.z, before.z), add_normed(v.w, scale, w.w, before.w));
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

// Texts that grow, `count` of them, and where it is said how far they are, or null: in mapped host memory.
struct Growing {
    Texts texts;
    volatile u32* progress[MOST_TEXTS];
    u32 tokens[MOST_TEXTS];
    u32 count;
};

extern "C" __global__ void advance(const __grid_constant__ Growing g) {
    wait_for_previous();
    let_next_start();
    u32 i = threadIdx.x;
    if (i >= g.count) return;
    u32 position = g.texts.states[i]->position + g.tokens[i];
    g.texts.states[i]->position = position;
    if (g.progress[i]) *g.progress[i] = position;
}
