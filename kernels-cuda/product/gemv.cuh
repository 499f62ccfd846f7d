// The product of one token with a packed matrix, compensated in the same launch: what gemv_anyprec.cu,
// gemv_lutgemm.cu and gemv_dense.cu share. They differ in a unit's bytes and in how a unit becomes operands.
//
//   v[row] = Σ_k W[row, k] · x[k] + bias[row]           x by INPUT
//   INPUT 0: x + x_delta   1: norm(x + x_delta)·γ   2: activation(gate)·up, x being [gate, up]
//         3: x, selected from by an earlier kernel (dec_list)
//   y[row] = add ? y[row] + y_delta[row] + v[row] : v[row]
//   dec_out[row] = the compensation (dec.cuh), to be added by whoever reads y
//   beyond  u32, in mapped host memory: 1 if activations were beyond what 16 bits hold (common.cuh), where x becomes
//           16-bit numbers (operand.cuh)
//
//   codes  [tiles, units, VECTORS, 32 lanes] 16 bytes: tiles of 16 rows, units of UNIT channels
//   aux    what a unit needs besides its codes
//   x, x_delta, gamma, bias, y, y_delta, dec_out   f32; x_delta, y_delta and bias may be null
//
// A block owns whole tiles; its warps take chains of their spans in turn (sums.cuh) and keep the next STAGES − 1 of their own
// units in flight. Weights do not depend on earlier kernels, so they are on their way before the wait. The tensor cores
// do the sums (unit.cuh): lane 4·g + t holds rows g and g + 8 and channels 8·t to 8·t + 7 of every 32. What a norm divides by
// comes after the product, so that norm(x) is the same fixed-point numbers here and in layers.cu; not of 16-bit numbers,
// which are normalized first.
//
// One block per multiprocessor: with two places, the next kernel's blocks settle in pairs wherever there is room
// first, and the pairs take twice as long (H100: 31 µs instead of 21 for 4096 × 28672). In the first n_tb blocks
// DEC_WARPS more warps compensate beside the others. No block waits for another.
// Constants: K, R in and out features, WARPS, STAGES, INPUT, ACTIVATION (SILU unless it is given), DEC, DEC_WARPS, DEC_WORDS,
// DEC_STAGED (1: shared memory has room for all of x; needed for INPUT 1).
#pragma once
#include "common.cuh"
#include "dec.cuh"
#include "unit.cuh"

// Warps that multiply, and warps that compensate.
#if DEC
#define ALL_THREADS (32 * (WARPS + DEC_WARPS))
#else
#define ALL_THREADS (32 * WARPS)
#endif
#define THREADS (32 * WARPS)
typedef Team<0, THREADS, 1> Base;

#ifndef ACTIVATION
#define ACTIVATION SILU
#endif

// Leaves registers for a block of another kernel beside this one.
#ifndef MIN_BLOCKS
#if defined(PLANES) && PLANES == 2
#define MIN_BLOCKS 1
#else
#define MIN_BLOCKS (DEC || WARPS > 16 ? 1 : 2)
#endif
#endif

// When the next kernel may start: 0 at once, 1 after the wait, 2 when the weights have been read.
#ifndef TRIGGER
#define TRIGGER 0
#endif

struct Gemv {
    const uint4* codes;
    const char* aux;
    const float* bias;
    const float* x;
    const float* x_delta;
    const float* gamma;
    float* y;
    const float* y_delta;
    float* dec_out;
    const Salient* dec_list;
    u32* beyond;
    Dec dec;
    float eps;
    int add;
    int dec_shared; // where the compensating warps' shared memory begins
};

constexpr int TILES = (R + 15) / 16;
constexpr int UNITS = (K + UNIT - 1) / UNIT;


// Four activations that need nothing else to be known, zero from K on.
__device__ __forceinline__ float4 activations(const Gemv& g, int k) {
    if (k >= K) return make_float4(0, 0, 0, 0);
    float4 v = load4(g.x, g.x_delta, k);
#if INPUT == 2
    v = gated4(v, load4(g.x + K, nullptr, k), ACTIVATION);
#endif
    return v;
}

__device__ __forceinline__ void put4(float* to, float4 v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

// Reads x and hands it on in eights: write(channel, values), up to PADDED channels, zero from K on. Every thread of a warp
// writes, or none. Norms: γ·x, and divided if DIVIDED.
template <class T, int PADDED, bool DIVIDED>
struct Stage {
    static constexpr int STEPS = (PADDED / 8 + T::size - 1) / T::size;
#if INPUT == 1
    float gamma[STEPS][8];
#endif

    static __device__ __forceinline__ int channel(int step) { return 8 * (step * T::size + T::thread()); }

    // What does not depend on earlier kernels.
    __device__ __forceinline__ explicit Stage(const Gemv& g) {
#if INPUT == 1
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int h = 0; h < 8; h += 4) {
                int k = channel(s) + h;
                put4(gamma[s] + h, k < K ? *(const float4*)(g.gamma + k) : make_float4(0, 0, 0, 0));
            }
#endif
    }

    // squares: room for a number of each span; afterwards what they are, if x is normalized.
    template <class Write>
    __device__ __forceinline__ void run(const Gemv& g, float* squares, Write write) const {
#if INPUT == 1
        float v[STEPS][8];
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            float4 a = activations(g, channel(s)), b = activations(g, channel(s) + 4);
            put4(v[s], a), put4(v[s] + 4, b);
            float sum = warp_sum(squares_of(a, b));
            if (channel(s) < K && T::thread() % 32 == 0) squares[channel(s) / SPAN] = sum;
        }
        float scale = 1;
        if (DIVIDED) {
            T::sync();
            scale = inverse_rms_of(K, g.eps, [&](int s) { return squares[s]; });
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
#pragma unroll
            for (int i = 0; i < 8; i++) v[s][i] = __fmul_rn(DIVIDED ? __fmul_rn(v[s][i], scale) : v[s][i], gamma[s][i]);
            if (channel(s) < PADDED) write(channel(s), v[s]);
        }
#else
#pragma unroll 4
        for (int s = 0; s < STEPS; s++) {
            float v[8];
            put4(v, activations(g, channel(s))), put4(v + 4, activations(g, channel(s) + 4));
            if (channel(s) < PADDED) write(channel(s), v);
        }
#endif
    }
};

// Where a warp is among a block's units: chains of a tile one after the other, WARPS apart, each span by span.
struct Walk {
    int tile, chain, unit; // of the block; of the tile; of the row

    static constexpr int SPANS = SPANS_OF(K), ROW_CHAINS = CHAINS_OF(SPANS), ROW_UNITS = (K + UNIT - 1) / UNIT;

    __device__ __forceinline__ explicit Walk(int warp)
        : tile(warp / ROW_CHAINS), chain(warp % ROW_CHAINS), unit(chain * SPAN_UNITS) {}

    // Whether the unit is its span's last, and its chain's.
    __device__ __forceinline__ bool ends_span() const {
        return SPAN_UNITS == 1 || unit % SPAN_UNITS == SPAN_UNITS - 1 || unit == ROW_UNITS - 1;
    }
    __device__ __forceinline__ bool ends_chain() const {
        return ends_span() && unit / SPAN_UNITS + CHAINS >= SPANS;
    }
    __device__ __forceinline__ bool begins_chain() const { return unit == chain * SPAN_UNITS; }

    __device__ __forceinline__ void advance() {
        if (!ends_chain()) {
            unit = ends_span() ? (unit / SPAN_UNITS + CHAINS) * SPAN_UNITS : unit + 1;
            return;
        }
        tile += WARPS / ROW_CHAINS, chain += WARPS % ROW_CHAINS;
        if (chain >= ROW_CHAINS) chain -= ROW_CHAINS, tile++;
        unit = chain * SPAN_UNITS;
    }
};

// What a warp asks for next.
struct Ahead {
    Walk walk;

    // Asks for a unit's codes and what comes with them: codebooks with the first of a chain.
    __device__ __forceinline__ void request(const Gemv& g, int begin, int tiles, u32 slot) {
        if (walk.tile < tiles) {
            long long unit = (long long)(begin + walk.tile) * Walk::ROW_UNITS + walk.unit;
            int lane = threadIdx.x % 32;
            const char* codes = (const char*)g.codes + unit * (VECTORS * 512) + lane * 16;
#pragma unroll
            for (int v = 0; v < VECTORS; v++) copy_async(slot + v * 512, codes + v * 512);
            if (AUX_BYTES > 0 && (AUX_PER_UNIT || walk.begins_chain())) {
                const char* from = g.aux + (AUX_PER_UNIT ? unit : begin + walk.tile) * AUX_BYTES + lane * 16;
#pragma unroll
                for (int i = 0; i < AUX_BYTES; i += 512)
                    if (AUX_BYTES - i >= 512 || lane * 16 < AUX_BYTES - i) copy_async(slot + VECTORS * 512 + i, from + i);
            }
            walk.advance();
        }
        copy_async_commit();
    }
};

__device__ __forceinline__ void multiply(const Gemv& g, int block, int blocks, char* shared) {
    constexpr int ROW_CHAINS = Walk::ROW_CHAINS;
    int warp = threadIdx.x / 32;
    int begin = (long long)TILES * block / blocks, end = (long long)TILES * (block + 1) / blocks;

    // [spans] squares · x · the ring · sums of chains [tiles, ROW_CHAINS, 16]
    constexpr int SQUARES = (INPUT == 1 ? Walk::SPANS * 4 + 127 : 127) / 128 * 128;
    float* squares = (float*)shared;
    Operand x = Operand::of<K>(shared + SQUARES);
    char* rings = shared + SQUARES + OperandOf<K>::BYTES;
    char* ring = rings + warp * STAGES * STAGE_BYTES;
    float* parts = (float*)(rings + WARPS * STAGES * STAGE_BYTES);
    u32 slots = shared_address(ring) + threadIdx.x % 32 * 16;

    Ahead ahead{Walk(warp)};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) ahead.request(g, begin, end - begin, slots + s * STAGE_BYTES);
    if (TRIGGER == 0) let_next_start();

    Stage<Base, OperandOf<K>::PADDED, !INTEGERS> stage(g);
    wait_for_previous();
    if (TRIGGER == 1) let_next_start();
    // The first row that this thread will finish: what it is added to is fetched now.
    int own = begin * 16 + threadIdx.x;
    float before = own < min(end * 16, R) && g.add ? load1(g.y, g.y_delta, own) : 0.0f;
    Beyond lost;
    stage.run(g, squares, [&](int k, const float (&v)[8]) {
#if INPUT == 2 && INTEGERS
        float narrow[8];
        put4(narrow, narrowed4(make_float4(v[0], v[1], v[2], v[3]), lost));
        put4(narrow + 4, narrowed4(make_float4(v[4], v[5], v[6], v[7]), lost));
        x.store(k, narrow);
#else
        x.store(k, v);
#endif
#if !INTEGERS
        const uint4& stored = *(const uint4*)(x.digits + k * X_BYTES);
        lost.add(stored.x), lost.add(stored.y), lost.add(stored.z), lost.add(stored.w);
#endif
    });
    Base::sync();
    // Every block has the same numbers.
    if (block == 0) lost.tell(g.beyond);

    Unit sums;
    u32 lane = this_lane();
    Walk walk(warp);
    int slot = 0, next = STAGES - 1;
    float chain = 0;
#pragma unroll 1
    while (walk.tile < end - begin) {
        copy_async_wait<STAGES - 2>();
        __syncwarp();
        ahead.request(g, begin, end - begin, slots + next * STAGE_BYTES);
        const char* stage = ring + slot * STAGE_BYTES;
        if (walk.begins_chain()) sums.begin(stage + VECTORS * 512, lane), chain = 0;
        sums.add((const uint4*)stage + lane, Part(x, walk.unit, lane), lane, [] {});
        next = slot;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        if (walk.ends_span()) chain = __fadd_rn(chain, sums.span(lane));
        if (walk.ends_chain() && lane % 4 < 2) parts[(walk.tile * ROW_CHAINS + walk.chain) * 16 + row_of(lane)] = chain;
        walk.advance();
    }
    if (TRIGGER == 2) let_next_start();
    Base::sync();

    float scale = 1;
    if (INPUT == 1 && INTEGERS) scale = inverse_rms_of(K, g.eps, [&](int s) { return squares[s]; });
    for (int r = threadIdx.x; r < (end - begin) * 16; r += THREADS) {
        int row = begin * 16 + r;
        if (row >= R) break;
        const float* of_row = parts + r / 16 * (ROW_CHAINS * 16) + r % 16;
        float v = finished(sum_of_chains<ROW_CHAINS>([&](int c) { return of_row[c * 16]; }), scale, g.bias, row);
        if (g.add) v = __fadd_rn(v, r == threadIdx.x ? before : load1(g.y, g.y_delta, row));
        g.y[row] = v;
    }
}

#if DEC
typedef Team<THREADS, 32 * DEC_WARPS, 2> Compensating;

__device__ __forceinline__ void compensate_block(const Gemv& g, char* shared) {
    let_next_start();
    int edge = own_edge(g.dec);
#if INPUT == 3
    wait_for_previous();
    compensate<Compensating, DEC_WORDS, false>(g.dec, edge, blockIdx.x, shared, g.dec_out, g.dec_list,
                                               InPlace{0});
#elif DEC_STAGED
    // [spans] squares, x [whole chunks] f32, then what compensate() needs.
    constexpr int PADDED = (K + CHUNK - 1) / CHUNK * CHUNK;
    float* xs = (float*)(shared + (SPANS_OF(K) * 4 + 127) / 128 * 128);
    Stage<Compensating, PADDED, true> stage(g);
    wait_for_previous();
    stage.run(g, (float*)shared, [&](int k, const float (&v)[8]) {
        *(float4*)(xs + k) = make_float4(v[0], v[1], v[2], v[3]);
        *(float4*)(xs + k + 4) = make_float4(v[4], v[5], v[6], v[7]);
    });
    Compensating::sync();
    compensate<Compensating, DEC_WORDS, false>(g.dec, edge, blockIdx.x, (char*)(xs + PADDED), g.dec_out, nullptr,
                                               InPlace{shared_address(xs)});
#else
    // 4 KB per warp, then what compensate() needs.
    wait_for_previous();
    compensate<Compensating, DEC_WORDS, false>(
        g.dec, edge, blockIdx.x, shared + DEC_WARPS * CHUNK * 4, g.dec_out, nullptr,
        copied<Compensating>(shared, [&](int i) { return activations(g, i); }));
#endif
}
#endif

__device__ __forceinline__ void gemv(const Gemv& g) {
    extern __shared__ __align__(128) char shared[];
#if DEC
    if (threadIdx.x >= THREADS) {
        if (blockIdx.x < g.dec.n_tb)
            compensate_block(g, shared + g.dec_shared);
        else
            wait_for_previous();
        return;
    }
#endif
    multiply(g, blockIdx.x, gridDim.x, shared);
}
