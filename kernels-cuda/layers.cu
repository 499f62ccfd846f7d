// Decoder layers of one token in one launch: one block per multiprocessor, all of them there at once.
//
//   per layer   qkv = W_qkv·norm(h)               attended = attention(qkv) (attend.cuh)
//               h  += W_o·attended                 act = silu(gate)·up of W_gu·norm(h)
//               h  += W_d·act                      each product compensated (dec.cuh) if its k_chunk > 0
//
//   layers     [count], in device memory: matrices as in anyprec.cuh (FORMAT 0) or lutgemm.cuh (FORMAT 1)
//   h          f32 [H]; what stands in h_delta on entry (or null) belongs to it, in d_delta on exit if k_chunk of d > 0
//   qkv, attended and the deltas beside them   f32, overwritten
//   rest       f32 [H], overwritten: of down, what a block has of tiles that began in the block before
//   act        [I] 16-bit numbers of DTYPE;  act32  the same in f32, where d is compensated
//   list       [channels of the longest selection], overwritten
//   grid       u32 [6]: blocks that have arrived at barriers since the model was loaded, how many when the last launch
//              ended; the same of blocks that have compensated gate-up, and of those that have selected a part
//   stamps     null, or u64: the device's nanoseconds at the start and after every barrier
//
// Weights stream past the barriers (stream.cuh), so memory is busy while blocks wait for each other. A barrier costs
// about as much as a kernel boundary, but what was fetched stays fetched. Of a compensated product the last n_tb blocks
// multiply nothing: they select, fetch, and leave their sums in a vector of their own, which whoever reads the product
// adds. Rows come in tiles, so a few blocks less often multiply as fast (H100: 128 of 132 for Llama-3-8B's shapes).
//
// Limits: compute capability 9.0; H, I, HEADS·HEAD_DIM and the rows of qkv are multiples of 16; WARPS of 4.
// Constants: H, I, those of attend.cuh, FORMAT, BITS, GROUP, WARPS, STAGES, BLOCKS, DEC (0 or 1); shared memory's parts
// in bytes: XS, PARTS, BOOKS, and the most layers of a launch MOST_LAYERS.
#if FORMAT == 0
#include "anyprec.cuh"
#else
#include "lutgemm.cuh"
#endif

#include "stream.cuh"
#include "stripe.cuh"

#define THREADS (32 * WARPS)
#define ATTEND_THREADS THREADS
#define AT_ONCE (HEADS / KV_HEADS % 2 == 0 ? 2 : HEADS / KV_HEADS % 3 == 0 ? 3 : 1)
#define FLIGHT 2
#include "attend.cuh"

typedef Team<0, THREADS, 0> All;

#include "grid.cuh"
#include "staging.cuh"

enum { QKV, O, GU, D };
constexpr int A = HEADS * HEAD_DIM;

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
    float* rest;
    float* qkv;
    float* qkv_delta;
    float* attended;
    float* act32;
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

// Matrices of a layer as they stream by: QKV and O, then gate and up apart, then down.
enum { GATE = GU, UP, DOWN, MATRICES };

struct Table {
    const Layer* layers;
    __device__ __forceinline__ const char* codes(int m) const {
        return product(m).codes + (m % MATRICES == UP ? (u64)(I / 16) * UNITS_OF(H) * (VECTORS * 512) : 0);
    }
    __device__ __forceinline__ const char* aux(int m) const {
        int tiles = m % MATRICES == UP ? I / 16 : 0;
        return product(m).aux + (u64)tiles * (AUX_PER_UNIT ? UNITS_OF(H) : 1) * AUX_BYTES;
    }
    __device__ __forceinline__ const Product& product(int m) const {
        return layers[m / MATRICES].products[m % MATRICES - (m % MATRICES >= UP)];
    }
};

__device__ __forceinline__ Dec dec_of(const Product& p, int op) {
    return Dec{p.residual, p.scales, p.edges, width_of(op), rows_of(op), p.k_chunk, p.n_tb, p.exact, p.list_chunks};
}

// Shared memory, in order; the ring comes first.
constexpr int ROUTES = (Stream<MATRICES, Table>::BYTES + 127) / 128 * 128; // Route [MATRICES], scratch floats, the ticket
constexpr int TABLE = ROUTES + 256;                                 // Layer [MOST_LAYERS]
constexpr int X = TABLE + (MOST_LAYERS * (int)sizeof(Layer) + 127) / 128 * 128;
constexpr int PART = X + XS;
constexpr int LIST = PART + PARTS;                                  // the selection

// Whether a vector of K has more chunks than a block selects at once.
template <int K>
__device__ __forceinline__ constexpr bool is_long() {
    return (K + CHUNK - 1) / CHUNK > THREADS / SELECTORS;
}

// Where blocks that compensate the same product put their parts of a long selection together. Of every such product in
// order, `target` is how many blocks have put theirs there then.
struct Exchange {
    Salient* list;
    u32* arrived;
    u32 target;

    __device__ __forceinline__ void meet() const {
        All::sync();
        if (threadIdx.x == 0) {
            arrive(arrived);
            wait_until(arrived, target);
        }
        All::sync();
    }

    // The next product, of K channels.
    template <int K>
    __device__ __forceinline__ void next(const Product& p) {
        if (DEC && is_long<K>() && p.k_chunk > 0) target += p.n_tb;
    }
};

// The compensation of a product of K channels by the last n_tb blocks: which of them this one is, or less than 0.
__device__ __forceinline__ int compensating(const Product& p) {
    return DEC && p.k_chunk > 0 ? (int)blockIdx.x - (BLOCKS - p.n_tb) : -1;
}

// x is normalized if there is a γ. `edge` is this lane's edge of the buckets, fetched before the barrier.
template <int K, bool NORM, class Delta>
__device__ __forceinline__ void compensate_product(const Product& p, int op, int edge, const float* x,
                                                   const Delta& delta, const float* gamma, float eps, float* scratch,
                                                   char* shared, const Exchange& exchange, float* out) {
    constexpr int GROUPS = THREADS / SELECTORS, CHUNKS = (K + CHUNK - 1) / CHUNK;
    Dec dec = dec_of(p, op);
    int group = this_thread() / SELECTORS, lane = this_thread() % SELECTORS * 8, block = compensating(p);
    Salient* list = (Salient*)(shared + LIST);
    u32* counts = (u32*)(shared + X) + group * COUNTS;
    if constexpr (!is_long<K>()) {
        // Every block selects everything: that takes no longer than a part.
        int k = group * CHUNK + lane;
        Eights v = eights<K>(x, delta, k), weights;
        if (NORM) {
            weights = eights<K>(gamma, nullptr, k);
            v.scale(1.0f / sqrtf(team_sum<All>(v.squares(), scratch) / K + eps), weights);
        }
        if (group < CHUNKS) select_together(v, k, dec, edge, counts, list + group * p.k_chunk);
    } else {
        float scale = 1;
        if (NORM) {
            float sum = 0;
            for (int k = group * CHUNK + lane; k < K; k += GROUPS * CHUNK) sum += eights<K>(x, delta, k).squares();
            scale = 1.0f / sqrtf(team_sum<All>(sum, scratch) / K + eps);
        }
        for (int c = block + group * p.n_tb; c < CHUNKS; c += GROUPS * p.n_tb) {
            int k = c * CHUNK + lane;
            Eights v = eights<K>(x, delta, k);
            if (NORM) v.scale(scale, eights<K>(gamma, nullptr, k));
            select_together(v, k, dec, edge, counts, exchange.list + c * p.k_chunk);
        }
        exchange.meet();
        int n = (CHUNKS - 1) * p.k_chunk + chunk_quota(dec, CHUNKS - 1);
        for (int i = this_thread(); i < n; i += THREADS) ((u64*)list)[i] = __ldcg((const u64*)exchange.list + i);
    }
    All::sync();
    add_stripe<All>(dec, block, list, (float*)(shared + X), out);
}

// Whether down's tiles may begin in one block and end in the next. Fewer than all blocks multiply when it is compensated:
// of Llama-3-8B's 256 tiles some of 116 blocks would have three, half as much again as the rest.
__device__ __forceinline__ bool divides(const Product& down) {
    return DEC && down.k_chunk > 0 && BLOCKS - down.n_tb <= H / 16;
}

// The multiplying blocks' part of a matrix: tiles shared out among the first `blocks`, gate and up alike.
__device__ __forceinline__ Route route_of(int op, const Product& p) {
    int blocks = BLOCKS - (DEC && p.k_chunk > 0 ? p.n_tb : 0), units = UNITS_OF(width_of(op)), b = blockIdx.x;
    int pieces = rows_of(op) / (op == GU ? 32 : 16), piece = units;
    if (op == D && divides(p)) pieces *= units, piece = 1;
    if (b >= blocks) return Route{0, 0, 0, 0, 0};
    int begin = pieces * b / blocks * piece, end = pieces * (b + 1) / blocks * piece;
    return Route{begin, end, begin / units, (end + units - 1) / units - begin / units, begin % units};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers(const __grid_constant__ Layers g) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) char shared[];
    Route* routes = (Route*)(shared + ROUTES);
    float* scratch = (float*)(shared + ROUTES + 128);
    u32* ticket = (u32*)(shared + ROUTES + 224);
    Layer* table = (Layer*)(shared + TABLE);
    u16* xs = (u16*)(shared + X);
    float* parts = (float*)(shared + PART);

    for (int i = threadIdx.x; i < g.count * (int)sizeof(Layer) / 8; i += THREADS)
        ((u64*)table)[i] = ((const u64*)g.layers)[i];
    if (threadIdx.x < 32) Stream<MATRICES, Table>::init(shared_address(shared));
    All::sync();
    if (threadIdx.x < MATRICES) {
        int op = threadIdx.x - (threadIdx.x >= UP);
        routes[threadIdx.x] = route_of(op, table[0].products[op]);
    }
    All::sync();

    Stream<MATRICES, Table> stream(Table{table}, routes, MATRICES * g.count, shared_address(shared));
    wait_for_previous();
    Grid grid{g.grid, __ldcg(g.grid + 1), g.stamps, 0};
    u32 compensated = __ldcg(g.grid + 3);
    Exchange exchange{g.list, g.grid + 4, __ldcg(g.grid + 5)};
    int position = __ldcg(&g.state->position);
    grid.stamp();

    constexpr int WIDEST = H > A ? H : A;
    // Sums of groups end where the inputs do.
    float* group_sums = (float*)(shared + X + XS) - UNITS_OF(WIDEST > I ? WIDEST : I) * GROUP_SUMS;
    bool divided = divides(table[0].products[D]);
    int own = blockIdx.x * THREADS + this_thread();
    if (divided)
        for (int i = own; i < H; i += BLOCKS * THREADS) g.rest[i] = 0;
    Beside pending{g.h_delta, nullptr};
    // This lane's edge of the buckets of the next product, if this block compensates it.
    auto edge_of = [](const Product& p) { return compensating(p) >= 0 ? p.edges[this_thread() % 32] : 0; };
    int edge = edge_of(table[0].products[QKV]);
#pragma unroll 1
    for (int l = 0; l < g.count; l++) {
        const Layer& layer = table[l];
        const Product* p = layer.products;
        int kv = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;

        exchange.next<H>(p[QKV]);
        if (compensating(p[QKV]) >= 0) {
            compensate_product<H, true>(p[QKV], QKV, edge, g.h, pending, layer.norms[0], g.eps, scratch, shared,
                                    exchange, g.qkv_delta);
            stream.skip(MATRICES * l + QKV);
        } else {
            stage<H, true>(g.h, pending, layer.norms[0], g.eps, scratch, xs, group_sums);
            clear<UNITS_OF(H), false>(routes[QKV], 1, parts);
            All::sync();
            stream.multiply<UNITS_OF(H), false>(MATRICES * l + QKV, routes[QKV], shared, xs, group_sums, parts);
            All::sync();
            finish(routes[QKV], parts, p[QKV].bias, g.qkv, (const float*)nullptr, false, nullptr);
        }
        Span span(position);
        if (split < span.splits) {
            prefetch(layer.keys, kv, g.max_seq_len, span.begin(split), span.begin(split + 1));
            prefetch(layer.values, kv, g.max_seq_len, span.begin(split), span.begin(split + 1));
        }
        grid.sync();

        if (split < SPLITS) {
            Attend a{g.qkv, DEC && p[QKV].k_chunk > 0 ? g.qkv_delta : nullptr, layer.keys, layer.values, g.angles,
                     g.state, g.parts, g.tickets, g.attended, g.max_seq_len};
            attend_token<All>(a, (float*)(shared + X), ticket, kv, split, position);
        }
        edge = edge_of(p[O]);
        grid.sync();

        exchange.next<A>(p[O]);
        if (compensating(p[O]) >= 0) {
            compensate_product<A, false>(p[O], O, edge, g.attended, (const float*)nullptr, nullptr, 0, scratch, shared,
                                    exchange, g.o_delta);
            stream.skip(MATRICES * l + O);
        } else {
            stage<A, false>(g.attended, (const float*)nullptr, nullptr, 0, scratch, xs, group_sums);
            clear<UNITS_OF(A), false>(routes[O], 1, parts);
            All::sync();
            stream.multiply<UNITS_OF(A), false>(MATRICES * l + O, routes[O], shared, xs, group_sums, parts);
            All::sync();
            finish(routes[O], parts, p[O].bias, g.h, pending, true, nullptr);
        }
        pending = Beside{DEC && p[O].k_chunk > 0 ? g.o_delta : nullptr, nullptr};
        edge = edge_of(p[GU]);
        grid.sync();

        bool gu_compensated = DEC && p[GU].k_chunk > 0;
        if (gu_compensated) compensated += p[GU].n_tb;
        exchange.next<H>(p[GU]);
        if (compensating(p[GU]) >= 0) {
            compensate_product<H, true>(p[GU], GU, edge, g.h, pending, layer.norms[1], g.eps, scratch, shared,
                                    exchange, g.gu_delta);
            // The block's last barrier was passed after its last row.
            if (threadIdx.x == 0) arrive(g.grid + 2);
            stream.skip(MATRICES * l + GATE);
            stream.skip(MATRICES * l + UP);
        } else {
            stage<H, true>(g.h, pending, layer.norms[1], g.eps, scratch, xs, group_sums);
            clear<UNITS_OF(H), false>(routes[GATE], 2, parts);
            All::sync();
            int half = routes[GATE].tiles * WARPS * 16;
#pragma unroll 1
            for (int i = 0; i < 2; i++)
                stream.multiply<UNITS_OF(H), false>(MATRICES * l + GATE + i, routes[GATE], shared, xs, group_sums, parts + i * half);
            finish_pairs(routes[GATE], parts, p[GU].bias, gu_compensated ? g.gu_delta : nullptr, g.act,
                         DEC && p[D].k_chunk > 0 ? g.act32 : nullptr,
                         [&] {
                             if (this_thread() % 32 == 0) wait_until(g.grid + 2, compensated);
                             __syncwarp();
                         });
        }
        edge = edge_of(p[D]);
        grid.sync();

        exchange.next<I>(p[D]);
        if (compensating(p[D]) >= 0) {
            compensate_product<I, false>(p[D], D, edge, g.act32, (const float*)nullptr, nullptr, 0, scratch, shared,
                                    exchange, g.d_delta);
            stream.skip(MATRICES * l + DOWN);
        } else {
            stage_act(g.act, xs, group_sums);
            clear<UNITS_OF(I), DEC>(routes[DOWN], 1, parts);
            All::sync();
            stream.multiply<UNITS_OF(I), DEC>(MATRICES * l + DOWN, routes[DOWN], shared, xs, group_sums, parts);
            All::sync();
            finish(routes[DOWN], parts, p[D].bias, g.h, pending, true, divided ? g.rest : nullptr);
        }
        pending = Beside{DEC && p[D].k_chunk > 0 ? g.d_delta : nullptr, divided ? g.rest : nullptr};
        if (l + 1 < g.count) {
            edge = edge_of(table[l + 1].products[QKV]);
            grid.sync();
        }
    }
    if (divided) {
        grid.sync();
        for (int i = own; i < H; i += BLOCKS * THREADS) g.h[i] = load1(g.h, g.rest, i);
    } else {
        grid.stamp();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) g.grid[1] = grid.target, g.grid[3] = compensated, g.grid[5] = exchange.target;
#endif
}
