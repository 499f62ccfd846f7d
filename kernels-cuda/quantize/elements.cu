// What quantization does element by element, and norms: a layer of many tokens, forwards and backwards. All in f32,
// row-major; whoever launches a kernel gives it as many threads as its comment says.
#include "block.cuh"

#define INDEX ((long long)blockIdx.x * blockDim.x + threadIdx.x)

// y[i] += x[i]. One thread an element.
extern "C" __global__ void add_to(float* y, const float* x, long long count) {
    long long i = INDEX;
    if (i < count) y[i] += x[i];
}

// y[row, :] = bias, before a product is added to it. One thread an element of y [rows, features].
extern "C" __global__ void spread(float* y, const float* bias, int features, long long count) {
    long long i = INDEX;
    if (i < count) y[i] = bias[i % features];
}

// out = x as 16-bit numbers: kind 0 float16, 1 bfloat16. One thread an element.
extern "C" __global__ void shorten(const float* x, u16* out, int kind, long long count) {
    long long i = INDEX;
    if (i < count) out[i] = kind ? float_to_bfloat(x[i]) : float_to_half(x[i]);
}

// out = x in f32: kind 0 float16, 1 bfloat16, 2 f32. One thread an element.
extern "C" __global__ void lengthen(const void* x, float* out, int kind, long long count) {
    long long i = INDEX;
    if (i >= count) return;
    out[i] = kind == 2 ? ((const float*)x)[i]
             : kind == 1 ? bfloat_to_float(((const u16*)x)[i])
                         : half_to_float(((const u16*)x)[i]);
}

// A row of a norm: piece `blockIdx.x % per` of row `blockIdx.x / per`.
__device__ __forceinline__ long long place(int width, int per, int stride, int offset) {
    return (long long)(blockIdx.x / per) * stride + offset + (long long)(blockIdx.x % per) * width;
}

// out = x · γ / sqrt(mean(x²) + eps), for pieces of `width` numbers, `per` of them from `offset` on in every row of
// `stride`; out may be x. One block a piece.
extern "C" __global__ void norm_rows(const float* x, float* out, const float* gamma, float eps, int width, int per,
                                     int stride, int offset) {
    __shared__ float scratch[WARPS_MOST];
    long long at = place(width, per, stride, offset);
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum = fmaf(x[at + i], x[at + i], sum);
    float scale = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[at + i] = x[at + i] * scale * gamma[i];
}

// The derivative by x of `norm_rows`, from that by what it puts out, d_out: d = (keep ? d : 0) + …; d may be d_out where
// nothing is kept. One block a piece.
extern "C" __global__ void norm_back(const float* x, const float* gamma, float eps, const float* d_out, float* d,
                                     int keep, int width, int per, int stride, int offset) {
    __shared__ float scratch[WARPS_MOST];
    long long at = place(width, per, stride, offset);
    float squares = 0, along = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = x[at + i];
        squares = fmaf(v, v, squares);
        along = fmaf(v * gamma[i], d_out[at + i], along);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    float shrink = block_sum(along, scratch) * scale * scale * scale / width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = scale * gamma[i] * d_out[at + i] - shrink * x[at + i];
        d[at + i] = keep ? d[at + i] + v : v;
    }
}

// Turns pairs of the first `heads` heads of every row of `stride` numbers by the angles of its position, past + row %
// tokens; back: the transposed turn. table [positions, half] of (cos, sin). One thread a pair.
extern "C" __global__ void rotate(float* qkv, const float2* table, int half, int heads, int stride, int past,
                                  int tokens, int back, long long count) {
    long long i = INDEX;
    if (i >= count) return;
    int pair = (int)(i % half);
    long long head = i / half, row = head / heads;
    float2 turn = table[(long long)(past + row % tokens) * half + pair];
    float sin = back ? -turn.y : turn.y;
    float* at = qkv + row * stride + head % heads * 2 * half + pair;
    float a = at[0], b = at[half];
    at[0] = a * turn.x - b * sin;
    at[half] = b * turn.x + a * sin;
}

// Appends keys and values to what is kept of each text, [texts, capacity, width], from `past` on. qkv: rows of `stride`,
// keys and then values from `offset` on. One thread an element of both.
extern "C" __global__ void append(const float* qkv, float* keys, float* values, int stride, int offset, int width,
                                  int capacity, int past, int tokens, long long count) {
    long long i = INDEX;
    if (i >= count) return;
    int k = (int)(i % (2 * width));
    long long row = i / (2 * width);
    long long to = (row / tokens * capacity + past + row % tokens) * width + k % width;
    (k < width ? keys : values)[to] = qkv[row * stride + offset + k];
}

// out = activation(gate) · up, [rows, width] from [rows, gate then up]. One thread an element of out.
extern "C" __global__ void gated(const float* gate_up, float* out, int activation, int width, long long count) {
    long long i = INDEX;
    if (i >= count) return;
    const float* at = gate_up + i / width * 2 * width + i % width;
    out[i] = activated(at[0], activation) * at[width];
}

// The derivatives by gate and up of `gated`, from that by what it puts out, d [rows, width]. One thread an element of d.
extern "C" __global__ void gated_back(const float* gate_up, const float* d, float* out, int activation, int width,
                                      long long count) {
    long long i = INDEX;
    if (i >= count) return;
    long long at = i / width * 2 * width + i % width;
    float gate = gate_up[at], up = gate_up[at + width];
    bool gelu = activation == GELU_TANH;
    float z = gelu ? 1.5957691f * (gate + 0.044715f * gate * gate * gate) : gate;
    float slope = gelu ? 1.5957691f * (1.0f + 3.0f * 0.044715f * gate * gate) : 1.0f;
    float sigmoid = 1.0f / (1.0f + expf(-z));
    out[at] = d[i] * up * sigmoid * (1.0f + gate * (1.0f - sigmoid) * slope);
    out[at + width] = d[i] * gate * sigmoid;
}
