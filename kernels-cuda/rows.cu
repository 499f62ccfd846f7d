// What lies between the products: embedding, norms, the gate, and the text's length. Vectors are f32,
// [tokens, features]; a delta beside a vector is a compensation not yet added to it (one token only).
#include "common.cuh"

// Device-side state of a text (mirrored by sequence.rs).
struct State {
    u32 position; // tokens in the cache
    u32 sampled;  // tokens chosen since the text began
    u32 last;     // the latest of them
};

// h[token, :] = table[id, :], NaN where the table has no such row. kind 0: 16-bit numbers of DTYPE in gemv_dense.cu's
// units; 2: f32 rows. `ids` null takes the token sampled last.
extern "C" __global__ void __launch_bounds__(256) embed(const void* table, int kind, int features, u32 rows,
                                                        const u32* ids, const State* state, float* h) {
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
        h[(long long)token * features + k] = v;
    }
}

// out[token, :] = norm(x)·γ, x itself (γ null), or silu(gate)·up (x is [tokens, gate then up]).
// kind: 0 as 16-bit numbers of DTYPE, 2 as f32. *beyond = 1 if some were beyond those 16 bits.
extern "C" __global__ void __launch_bounds__(256) stage(const float* x, const float* delta, const float* gamma,
                                                        float eps, int swiglu, int features, int kind, void* out,
                                                        u32* beyond) {
    __shared__ float scratch[8];
    wait_for_previous();
    let_next_start();
    long long token = blockIdx.x;
    x += token * features * (swiglu ? 2 : 1);
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
        if (swiglu) v = silu(v) * load1(x, delta, features + k);
        if (kind == 2)
            ((float*)out)[token * features + k] = v;
        else
            ((u16*)out)[token * features + k] = narrow(v);
        if (DTYPE == 0 && kind == 0 && fabsf(v) > HALF_MOST) note_beyond(beyond);
    }
}

// out[k] = silu(gate[k])·up[k] of one token, spread over many blocks. features % 4 == 0.
extern "C" __global__ void __launch_bounds__(256) swiglu(const float* gu, const float* delta, int features,
                                                         float* out) {
    let_next_start();
    int k = 4 * (blockIdx.x * 256 + threadIdx.x);
    wait_for_previous();
    if (k >= features) return;
    float4 gate = load4(gu, delta, k), up = load4(gu, delta, features + k);
    *(float4*)(out + k) =
        make_float4(silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z, silu(gate.w) * up.w);
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
