// Decoder layers of one token in one launch: one block per multiprocessor, all of them there at once.
//
//   per layer   qkv = W_qkv·norm(h)               attended = attention(qkv) (attend.cuh)
//               h  += W_o·attended                 act = silu(gate)·up of W_gu·norm(h)
//               h  += W_d·act                      each product compensated (dec.cuh) if its k_chunk > 0
//
//   layers     [count], in device memory: matrices as in anyprec.cuh (FORMAT 0) or lutgemm.cuh (FORMAT 1)
//   h          f32 [H]; what stands in h_delta on entry (or null) belongs to it, in d_delta on exit if k_chunk of d > 0
//   qkv, attended, gu and the deltas beside them   f32, overwritten
//   act        [I] 16-bit numbers of DTYPE;  list  the selection for d
//   grid       u32 [2]: blocks that have arrived at barriers since the model was loaded, and how many when the last
//              launch ended
//   stamps     null, or u64: the device's nanoseconds at the start and after every barrier
//
// Weights stream past the barriers (stream.cuh), so memory is busy while blocks wait for each other. A barrier costs
// about as much as a kernel boundary, but what was fetched stays fetched. Compensating warps run beside the others in
// the first n_tb blocks and leave their sums in a vector of their own, which whoever reads the product adds.
//
// Limits: compute capability 9.0; H, I, HEADS·HEAD_DIM and the rows of qkv are multiples of 16.
// Constants: H, I, those of attend.cuh, FORMAT, BITS, GROUP, WARPS, STAGES, BLOCKS, DEC (0 or 1), DEC_WARPS,
// DEC_WORDS; shared memory's parts in bytes: XS, PARTS, BOOKS, and the most layers of a launch MOST_LAYERS.
#if FORMAT == 0
#include "anyprec.cuh"
#else
#include "lutgemm.cuh"
#endif

#include "dec.cuh"
#include "stream.cuh"

#define THREADS (32 * WARPS)
#if DEC
#define ALL_THREADS (THREADS + 32 * DEC_WARPS)
#else
#define ALL_THREADS THREADS
#endif
#define ATTEND_THREADS THREADS
#define AT_ONCE (HEADS / KV_HEADS % 2 == 0 ? 2 : HEADS / KV_HEADS % 3 == 0 ? 3 : 1)
#define FLIGHT 2
#include "attend.cuh"

typedef Team<0, THREADS, 1> Base;
typedef Team<0, ALL_THREADS, 0> All;

enum { QKV, O, GU, D };
constexpr int A = HEADS * HEAD_DIM;
#define UNITS_OF(k) (((k) + UNIT - 1) / UNIT)

__device__ __forceinline__ int rows_of(int op) {
    return op == QKV ? (HEADS + 2 * KV_HEADS) * HEAD_DIM : op == GU ? 2 * I : H;
}
__device__ __forceinline__ int width_of(int op) { return op == O ? A : op == D ? I : H; }

struct Product {
    const char* codes;
    const char* aux;
    const float* bias;
    const u32* residual;
    const float* scales;
    const int* edges;
    int k_chunk, n_tb, exact, list_chunks;
};

struct Layer {
    Product products[4];
    const float* norms[2];
    void* keys;
    void* values;
};

struct Layers {
    const Layer* layers;
    float* h;
    const float* h_delta;
    float* o_delta;
    float* d_delta;
    float* qkv;
    float* qkv_delta;
    float* attended;
    float* gu;
    float* gu_delta;
    u16* act;
    Salient* list;
    const State* state;
    const float2* angles;
    float* parts;
    u32* tickets;
    u32* grid;
    u64* stamps;
    int count;
    int max_seq_len;
    float eps;
};

struct Table {
    const Layer* layers;
    __device__ __forceinline__ const char* codes(int m) const { return layers[m / 4].products[m % 4].codes; }
    __device__ __forceinline__ const char* aux(int m) const { return layers[m / 4].products[m % 4].aux; }
};

__device__ __forceinline__ Dec dec_of(const Product& p, int op) {
    return Dec{p.residual, p.scales, p.edges, width_of(op), rows_of(op), p.k_chunk, p.n_tb, p.exact, p.list_chunks};
}

// All blocks wait for all; what any of them wrote before is visible after. Threads of the block call together.
struct Grid {
    u32* arrived;
    u32 target;
    u64* stamps;
    int stamped;

    __device__ __forceinline__ void stamp() {
        if (stamps && blockIdx.x == 0 && threadIdx.x == 0) {
            u64 now;
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
            stamps[stamped] = now;
        }
        stamped++;
    }

    __device__ __forceinline__ void sync() {
        All::sync();
        target += BLOCKS;
        if (threadIdx.x == 0) {
            u32 now;
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
            do {
                asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
            } while ((int)(now - target) < 0);
            __threadfence();
        }
        All::sync();
        stamp();
    }
};

// Shared memory, in order; the ring comes first.
constexpr int ROUTES = (Stream<4, Table>::BYTES + 127) / 128 * 128; // Route [4], scratch floats, the ticket
constexpr int TABLE = ROUTES + 256;                                 // Layer [MOST_LAYERS]
constexpr int X = TABLE + (MOST_LAYERS * (int)sizeof(Layer) + 127) / 128 * 128;
constexpr int PART = X + XS;
constexpr int LIST = PART + PARTS;                                  // what compensate() needs

#define CHUNKED(k) (((k) + CHUNK - 1) / CHUNK * CHUNK)

// Sums of x per group of weights, if the format wants them: lanes hold N consecutive channels each.
template <int N>
__device__ __forceinline__ void group_sum(float* group_sums, int channel, float sum) {
#ifdef GROUPED
#pragma unroll
    for (int d = GROUP / N / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (channel % GROUP == 0) group_sums[channel / GROUP] = sum;
#endif
}

// The input of a product of K channels, normalized if there is a γ, to 16-bit numbers in xs, and f32 in xf if DEC.
template <int K, bool NORM>
__device__ __forceinline__ void stage(const float* x, const float* delta, const float* gamma, float eps, float* scratch,
                                      u16* xs, float* group_sums, float* xf) {
    constexpr int PADDED = UNITS_OF(K) * UNIT, STEPS = (CHUNKED(K) / 4 + THREADS - 1) / THREADS;
    int t = this_thread();
    float4 v[STEPS], w[STEPS];
    float sum = 0;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 4 * (s * THREADS + t);
        v[s] = k < K ? load4(x, delta, k) : make_float4(0, 0, 0, 0);
        if (NORM) w[s] = k < K ? *(const float4*)(gamma + k) : make_float4(0, 0, 0, 0);
    }
    if (NORM) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) sum += v[s].x * v[s].x + v[s].y * v[s].y + v[s].z * v[s].z + v[s].w * v[s].w;
        float scale = 1.0f / sqrtf(team_sum<Base>(sum, scratch) / K + eps);
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            v[s] = make_float4(v[s].x * scale * w[s].x, v[s].y * scale * w[s].y, v[s].z * scale * w[s].z,
                               v[s].w * scale * w[s].w);
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 4 * (s * THREADS + t);
        u32 lo = narrow2(v[s].x, v[s].y), hi = narrow2(v[s].z, v[s].w);
        float in_group = widen((u16)lo) + widen((u16)(lo >> 16)) + widen((u16)hi) + widen((u16)(hi >> 16));
        if (k < PADDED) {
            *(uint2*)(xs + k) = make_uint2(lo, hi);
            group_sum<4>(group_sums, k, in_group);
        }
        if (DEC && k < CHUNKED(K)) *(float4*)(xf + k) = v[s];
    }
}

// The same of the activations between gate-up and down, which are 16-bit numbers already.
__device__ __forceinline__ void stage_act(const u16* act, u16* xs, float* group_sums) {
    constexpr int PADDED = UNITS_OF(I) * UNIT, STEPS = (PADDED / 8 + THREADS - 1) / THREADS;
    int t = this_thread();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int k = 8 * (s * THREADS + t);
        uint4 v = k < I ? __ldcg((const uint4*)(act + k)) : make_uint4(0, 0, 0, 0);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) sum += widen((u16)word(v, i)) + widen((u16)(word(v, i) >> 16));
        if (k < PADDED) {
            *(uint4*)(xs + k) = v;
            group_sum<8>(group_sums, k, sum);
        }
    }
}

// Where tiles have fewer units than there are warps, some leave nothing.
template <int UNITS>
__device__ __forceinline__ void clear(const Route& r, float* parts) {
    if (UNITS < WARPS)
        for (int i = this_thread(); i < (r.end - r.begin) * WARPS * 16; i += THREADS) parts[i] = 0;
}

__device__ __forceinline__ float total(const float* parts, int tile, int r) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[(tile * WARPS + w) * 16 + r];
    return sum;
}

// Rows of a finished product: y[row] = v, or y[row] + y_delta[row] + v.
__device__ __forceinline__ void finish(const Route& r, const float* parts, const float* bias, float* y,
                                       const float* y_delta, bool add) {
    for (int i = this_thread(); i < (r.end - r.begin) * 16; i += THREADS) {
        int row = r.begin * 16 + i;
        float before = add ? load1(y, y_delta, row) : 0.0f;
        if (bias) before += bias[row];
        y[row] = total(parts, i / 16, i % 16) + before;
    }
}

// Rows of gate and up: silu(gate)·up, or both as they are.
__device__ __forceinline__ void finish_pairs(const Route& r, const float* parts, const float* bias, u16* act, float* gu) {
    for (int i = this_thread(); i < (r.end - r.begin) * 8; i += THREADS) {
        int pair = i / 16, row = r.begin * 8 + i;
        float gate = total(parts, 2 * pair, i % 16), up = total(parts, 2 * pair + 1, i % 16);
        if (bias) gate += bias[row], up += bias[I + row];
        if (gu)
            gu[row] = gate, gu[I + row] = up;
        else
            act[row] = narrow(silu(gate) * up);
    }
}

#if DEC
// One block per chunk: activations between gate-up and down, compensation added; also f32, for the selection among them.
__device__ __forceinline__ void gate(const Layers& g, const float* delta, float* chunk) {
    int first = blockIdx.x * CHUNK;
    for (int i = 2 * this_thread(); i < CHUNK; i += 2 * THREADS) {
        float2 v = make_float2(0, 0);
        if (first + i < I) {
            v.x = silu(load1(g.gu, delta, first + i)) * load1(g.gu, delta, I + first + i);
            v.y = silu(load1(g.gu, delta, first + i + 1)) * load1(g.gu, delta, I + first + i + 1);
            *(u32*)(g.act + first + i) = narrow2(v.x, v.y);
        }
        *(float2*)(chunk + i) = v;
    }
}

// One warp's share of d's selection, among what gate() left.
__device__ __forceinline__ void select_gated(const Product& d, u32 chunk, Salient* list) {
    int edge = d.edges[threadIdx.x % 32];
    Dec dec = dec_of(d, D);
    int quota = chunk_quota(dec, blockIdx.x);
    if (quota > 0)
        select_chunk(InPlace{chunk}(0, CHUNK), blockIdx.x * CHUNK, quota, dec, edge, list + blockIdx.x * d.k_chunk);
}

// The other warps' way through the layers: the same barriers, and compensation between them.
__device__ __forceinline__ void compensate_layers(const Layers& g, const Layer* table, Grid& grid, char* shared) {
    typedef Team<THREADS, 32 * DEC_WARPS, 2> Compensating;
    u32 xf = shared_address(shared + X + UNITS_OF(H > A ? H : A) * UNIT * 2);
#pragma unroll 1
    for (int l = 0; l < g.count; l++) {
        const Product* products = table[l].products;
#pragma unroll 1
        for (int op = 0; op < 4; op++) {
            const Product& p = products[op];
            bool gated = products[GU].k_chunk > 0 || products[D].k_chunk > 0;
            if (op == D && gated && blockIdx.x < CHUNKED(I) / CHUNK) {
                All::sync();
                if (p.k_chunk > 0 && threadIdx.x / 32 == WARPS) select_gated(p, shared_address(shared + X), g.list);
            }
            if (op == O || (op == D && gated)) grid.sync();
            bool own = p.k_chunk > 0 && blockIdx.x < p.n_tb;
            int edge = own ? p.edges[threadIdx.x % 32] : 0;
            All::sync();
            if (own) {
                float* out = op == QKV ? g.qkv_delta : op == O ? g.o_delta : op == GU ? g.gu_delta : g.d_delta;
                compensate<Compensating, DEC_WORDS, false>(dec_of(p, op), edge, blockIdx.x, shared + LIST, out,
                                                           op == D ? g.list : nullptr, InPlace{xf});
            }
            if (op < D || l + 1 < g.count) grid.sync();
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode_layers(const __grid_constant__ Layers g) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) char shared[];
    Route* routes = (Route*)(shared + ROUTES);
    float* scratch = (float*)(shared + ROUTES + 128);
    u32* ticket = (u32*)(shared + ROUTES + 224);
    Layer* table = (Layer*)(shared + TABLE);
    u16* xs = (u16*)(shared + X);
    float* parts = (float*)(shared + PART);

    for (int i = threadIdx.x; i < g.count * (int)sizeof(Layer) / 8; i += ALL_THREADS)
        ((u64*)table)[i] = ((const u64*)g.layers)[i];
    if (threadIdx.x < 32) Stream<4, Table>::init(shared_address(shared));
    if (threadIdx.x < 4) {
        int op = threadIdx.x, tiles = (rows_of(op) + 15) / 16, step = op == GU ? 2 : 1;
        tiles /= step;
        routes[op] = Route{(int)((long long)tiles * blockIdx.x / BLOCKS) * step,
                           (int)((long long)tiles * (blockIdx.x + 1) / BLOCKS) * step, UNITS_OF(width_of(op)),
                           op == GU ? tiles : 0};
    }
    All::sync();

#if DEC
    if (threadIdx.x >= THREADS) {
        wait_for_previous();
        Grid grid{g.grid, 0, nullptr, 0};
        compensate_layers(g, table, grid, shared);
        return;
    }
#endif
    Stream<4, Table> stream(Table{table}, routes, 4 * g.count, shared_address(shared));
    wait_for_previous();
    Grid grid{g.grid, __ldcg(g.grid + 1), g.stamps, 0};
    int position = __ldcg(&g.state->position);
    grid.stamp();

    constexpr int WIDEST = H > A ? H : A;
    float* xf = (float*)(shared + X + UNITS_OF(WIDEST) * UNIT * 2);
    // Sums of groups end where the inputs do.
    float* group_sums = (float*)(shared + X + XS) - UNITS_OF(WIDEST > I ? WIDEST : I) * GROUP_SUMS;
    const float* pending = g.h_delta;
#pragma unroll 1
    for (int l = 0; l < g.count; l++) {
        const Layer& layer = table[l];
        const Product* p = layer.products;
        bool gated = DEC && (p[GU].k_chunk > 0 || p[D].k_chunk > 0);
        int kv = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;

        stage<H, true>(g.h, pending, layer.norms[0], g.eps, scratch, xs, group_sums, xf);
        clear<UNITS_OF(H)>(routes[QKV], parts);
        All::sync();
        stream.multiply<UNITS_OF(H)>(4 * l + QKV, routes[QKV], shared, xs, group_sums, parts);
        Base::sync();
        finish(routes[QKV], parts, p[QKV].bias, g.qkv, nullptr, false);
        Span span(position);
        if (split < span.splits) {
            prefetch(layer.keys, kv, g.max_seq_len, span.begin(split), span.begin(split + 1));
            prefetch(layer.values, kv, g.max_seq_len, span.begin(split), span.begin(split + 1));
        }
        grid.sync();

        if (split < SPLITS) {
            Attend a{g.qkv, DEC && p[QKV].k_chunk > 0 ? g.qkv_delta : nullptr, layer.keys, layer.values, g.angles,
                     g.state, g.parts, g.tickets, g.attended, g.max_seq_len};
            attend_token<Base>(a, (float*)(shared + X), ticket, kv, split, position);
        }
        grid.sync();

        stage<A, false>(g.attended, nullptr, nullptr, 0, scratch, xs, group_sums, xf);
        clear<UNITS_OF(A)>(routes[O], parts);
        All::sync();
        stream.multiply<UNITS_OF(A)>(4 * l + O, routes[O], shared, xs, group_sums, parts);
        Base::sync();
        finish(routes[O], parts, p[O].bias, g.h, pending, true);
        pending = DEC && p[O].k_chunk > 0 ? g.o_delta : nullptr;
        grid.sync();

        stage<H, true>(g.h, pending, layer.norms[1], g.eps, scratch, xs, group_sums, xf);
        clear<UNITS_OF(H)>(routes[GU], parts);
        All::sync();
        stream.multiply<UNITS_OF(H)>(4 * l + GU, routes[GU], shared, xs, group_sums, parts);
        Base::sync();
        finish_pairs(routes[GU], parts, p[GU].bias, g.act, gated ? g.gu : nullptr);
        grid.sync();

#if DEC
        if (gated) {
            if (blockIdx.x < CHUNKED(I) / CHUNK) {
                gate(g, p[GU].k_chunk > 0 ? g.gu_delta : nullptr, (float*)(shared + X));
                All::sync();
            }
            grid.sync();
        }
#endif

        stage_act(g.act, xs, group_sums);
        clear<UNITS_OF(I)>(routes[D], parts);
        All::sync();
        stream.multiply<UNITS_OF(I)>(4 * l + D, routes[D], shared, xs, group_sums, parts);
        Base::sync();
        finish(routes[D], parts, p[D].bias, g.h, pending, true);
        pending = DEC && p[D].k_chunk > 0 ? g.d_delta : nullptr;
        if (l + 1 < g.count) grid.sync();
    }
    grid.stamp();
    if (blockIdx.x == 0 && threadIdx.x == 0) g.grid[1] = grid.target;
#endif
}
