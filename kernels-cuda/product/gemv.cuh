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
// A block owns whole tiles; its warps take their units in turn and keep the next STAGES − 1 of their own in
// flight. Weights do not depend on earlier kernels, so they are on their way before the wait. The tensor cores
// do the sums (unit.cuh): lane 4·g + t holds rows g and g + 8 and channels 8·t to 8·t + 7 of every 32.
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

// Reads x, normalizes it if asked to, and hands it on in eights: write(channel, values), up to PADDED channels,
// zero from K on. Every thread of a warp writes, or none.
template <class T, int PADDED>
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

    template <class Write>
    __device__ __forceinline__ void run(const Gemv& g, float* scratch, Write write) const {
#if INPUT == 1
        float v[STEPS][8], sum = 0;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            put4(v[s], activations(g, channel(s))), put4(v[s] + 4, activations(g, channel(s) + 4));
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(v[s][i], v[s][i], sum);
        }
        float scale = 1.0f / sqrtf(team_sum<T>(sum, scratch) / K + g.eps);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
#pragma unroll
            for (int i = 0; i < 8; i++) v[s][i] *= scale * gamma[s][i];
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

// What a warp asks for next: units WARPS apart, of tile after tile.
struct Ahead {
    const char* codes; // this lane's
    int aux;           // of the unit, or of the tile: its index
    int left, unit;    // units to come; of the tile
    bool fresh;        // the warp's first unit of this tile

    __device__ __forceinline__ Ahead(const Gemv& g, int begin, int end, int warp) {
        int first = begin * UNITS + warp;
        codes = (const char*)(g.codes + threadIdx.x % 32) + (long long)first * (VECTORS * 512);
        aux = AUX_PER_UNIT ? first : begin + warp / UNITS;
        left = (max((end - begin) * UNITS - warp, 0) + WARPS - 1) / WARPS;
        unit = warp % UNITS;
        fresh = true;
    }

    // Asks for a unit's codes and, where they change, what comes with them.
    __device__ __forceinline__ void request(const Gemv& g, u32 slot) {
        if (left > 0) {
#pragma unroll
            for (int v = 0; v < VECTORS; v++) copy_async(slot + v * 512, codes + v * 512);
            if (AUX_BYTES > 0 && (AUX_PER_UNIT || fresh)) {
                int lane = threadIdx.x % 32;
                const char* from = g.aux + lane * 16 + (long long)aux * AUX_BYTES;
#pragma unroll
                for (int i = 0; i < AUX_BYTES; i += 512)
                    if (AUX_BYTES - i >= 512 || lane * 16 < AUX_BYTES - i) copy_async(slot + VECTORS * 512 + i, from + i);
            }
        }
        copy_async_commit();
        left--;
        codes += WARPS * VECTORS * 512;
        if (AUX_PER_UNIT) aux += WARPS;
        if (AUX_BYTES == 0 || AUX_PER_UNIT) return;
        bool wraps = unit + WARPS % UNITS >= UNITS;
        unit += wraps ? WARPS % UNITS - UNITS : WARPS % UNITS;
        aux += WARPS / UNITS + wraps;
        fresh = WARPS >= UNITS || wraps;
    }
};

__device__ __forceinline__ void multiply(const Gemv& g, int block, int blocks, char* shared) {
    int warp = threadIdx.x / 32;
    int begin = (long long)TILES * block / blocks, end = (long long)TILES * (block + 1) / blocks;

    // [WARPS] scratch · x · the ring · partial sums [tiles, WARPS, 16]
    float* scratch = (float*)shared;
    Operand x = Operand::of<K>(shared + 128);
    char* rings = shared + 128 + OperandOf<K>::BYTES;
    char* ring = rings + warp * STAGES * STAGE_BYTES;
    float* parts = (float*)(rings + WARPS * STAGES * STAGE_BYTES);
    u32 slots = shared_address(ring) + threadIdx.x % 32 * 16;

    Ahead ahead(g, begin, end, warp);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) ahead.request(g, slots + s * STAGE_BYTES);
    if (TRIGGER == 0) let_next_start();
    if (UNITS < WARPS)
        for (int i = threadIdx.x; i < (end - begin) * WARPS * 16; i += THREADS) parts[i] = 0;

    Stage<Base, OperandOf<K>::PADDED> stage(g);
    wait_for_previous();
    if (TRIGGER == 1) let_next_start();
    // The first row that this thread will finish: what is added to it is fetched now.
    int own = begin * 16 + threadIdx.x;
    float added = own < min(end * 16, R) && g.add ? load1(g.y, g.y_delta, own) : 0.0f;
    if (g.bias && own < min(end * 16, R)) added += g.bias[own];
#if INTEGERS
    stage.run(g, scratch, [&](int k, const float (&v)[8]) { x.store(k, v); });
    Base::sync();
#else
    Beyond lost;
    stage.run(g, scratch, [&](int k, const float (&v)[8]) {
        x.store(k, v);
        const uint4& stored = *(const uint4*)(x.digits + k * X_BYTES);
        lost.add(stored.x), lost.add(stored.y), lost.add(stored.z), lost.add(stored.w);
    });
    Base::sync();
    // Every block has the same numbers.
    if (block == 0) lost.tell(g.beyond);
#endif

    Unit sums;
    u32 lane = this_lane();
    int tile = warp / UNITS, unit = warp % UNITS, slot = 0, next = STAGES - 1;
    bool fresh = true;
#pragma unroll 1
    while (tile < end - begin) {
        copy_async_wait<STAGES - 2>();
        __syncwarp();
        ahead.request(g, slots + next * STAGE_BYTES);
        const char* stage = ring + slot * STAGE_BYTES;
        if (fresh) sums.begin(stage + VECTORS * 512, lane);
        sums.add((const uint4*)stage + lane, Part(x, unit, lane), lane, [] {});
        next = slot;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        // The warp's last unit of a tile.
        if (unit + WARPS >= UNITS) sums.store(parts + (tile * WARPS + warp) * 16 + row_of(lane), lane);
        fresh = WARPS >= UNITS || unit + WARPS % UNITS >= UNITS;
        tile += WARPS / UNITS, unit += WARPS % UNITS;
        if (unit >= UNITS) unit -= UNITS, tile++;
    }
    if (TRIGGER == 2) let_next_start();
    Base::sync();

    for (int r = threadIdx.x; r < (end - begin) * 16; r += THREADS) {
        int row = begin * 16 + r;
        if (row >= R) break;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += parts[(r / 16 * WARPS + w) * 16 + r % 16];
        if (r == threadIdx.x) {
            sum += added;
        } else {
            float other = g.add ? load1(g.y, g.y_delta, row) : 0.0f;
            if (g.bias) other += g.bias[row];
            sum += other;
        }
        g.y[row] = sum;
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
    // Scratch, x [whole chunks] f32, then what compensate() needs.
    constexpr int PADDED = (K + CHUNK - 1) / CHUNK * CHUNK;
    float* xs = (float*)(shared + 128);
    Stage<Compensating, PADDED> stage(g);
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
