// Inputs of products of many tokens (tokens.cuh), as operand.cuh has them: each span's fixed-point numbers are made once, for
// all blocks of the product.
//
//   x by activation and gamma:  x   γ·x (16-bit numbers: norm(x)·γ)   activation(gate)·up, x being [gate, up], in 16 bits
//
//   x    f32 [tokens, channels], or [tokens, gate then up]; x_delta, of one token, and gamma f32 [channels] may be null
//   out  [tiles of 8·EIGHTS tokens][spans][EIGHTS] pieces; tokens that are not there are zeros
//
// A block makes a piece, a warp a token of it. Grid (spans, pieces of a span).
// Constants: DTYPE, INTEGERS; GROUP where numbers are fixed-point; EIGHTS.
#include "operand.cuh"

struct Digits {
    const float* x;
    const float* x_delta;
    const float* gamma;
    char* out;
    u32* beyond;
    float eps;
    int activation; // −1: none
    int channels;
    int tokens;
};

struct Eight {
    float4 a, b;
};

// Eight activations that need nothing else to be known, zero behind the last.
__device__ __forceinline__ Eight eight_of(const Digits& g, int token, int k, Beyond& lost) {
    float4 none = make_float4(0, 0, 0, 0);
    const float* x = g.x + (long long)token * g.channels * (g.activation >= 0 ? 2 : 1);
    auto four = [&](int k) {
        if (token >= g.tokens || k >= g.channels) return none;
        float4 v = load4(x, g.x_delta, k);
        if (g.activation < 0) return v;
        return narrowed4(gated4(v, load4(x, g.x_delta, g.channels + k), g.activation), lost);
    };
    return Eight{four(k), four(k + 4)};
}

extern "C" __global__ void __launch_bounds__(256) digits(const __grid_constant__ Digits g) {
    let_next_start();
    int span = blockIdx.x, spans = gridDim.x, piece = blockIdx.y, lane = threadIdx.x % 32;
    int in_piece = threadIdx.x / 32, token = piece * 8 + in_piece, k = span * SPAN + lane * 8;
    char* out = g.out + ((long long)(piece / EIGHTS * spans + span) * EIGHTS + piece % EIGHTS) * EIGHT_BYTES;
    wait_for_previous();
    Beyond lost;
    Eight own = eight_of(g, token, k, lost);
    float v[8] = {own.a.x, own.a.y, own.a.z, own.a.w, own.b.x, own.b.y, own.b.z, own.b.w};
    if (g.gamma) {
        float scale = 1;
#if INTEGERS
        float squares = warp_sum(squares_of(own.a, own.b));
        if (lane == 0) *(float*)(out + EIGHT_SQUARES + in_piece * 4) = squares;
#else
        scale = inverse_rms_of(g.channels, g.eps, [&](int s) {
            Eight other = eight_of(g, token, s * SPAN + lane * 8, lost);
            return warp_sum(squares_of(other.a, other.b));
        });
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = k + i < g.channels ? __fmul_rn(__fmul_rn(v[i], scale), g.gamma[k + i]) : 0.0f;
    }
#if INTEGERS
    store_fixed<512, 8>(v, lane, out + lane / 8 * (DIGITS * 512) + in_piece * 64 + place_in_64(lane * 8),
                        (float*)(out + EIGHT_STEPS) + in_piece, (float*)(out + EIGHT_SUMS) + in_piece);
#else
    uint4 narrow = narrowed8(v);
    lost.add(narrow.x), lost.add(narrow.y), lost.add(narrow.z), lost.add(narrow.w);
    *(uint4*)(out + lane / 4 * 512 + in_piece * 64 + lane % 4 * 16) = narrow;
#endif
    lost.tell(g.beyond);
}
