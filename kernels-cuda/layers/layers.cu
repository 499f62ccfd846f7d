// Decoder layers of one token in one launch: one block per multiprocessor, all of them there at once.
//
//   per layer   qkv = W_qkv·norm(h)               attended = attention(qkv) (attend.cuh)
//               h  += W_o·attended                 act = activation(gate)·up of W_gu·norm(h)
//               h  += W_d·act                      each product compensated (dec.cuh) if its k_chunk > 0
//
// Norms may also be where h is added to, norm(W_o·attended), instead of those or beside them, and queries and keys may have
// their own: what a model's program says is compiled in, what differs between its layers stands in the table.
//
//   layers     [count], in device memory: matrices as in anyprec.cuh (FORMAT 0) or lutgemm.cuh (FORMAT 1)
//   h          f32 [H], overwritten; what stands in h_delta on entry (or null) belongs to it. Between, every block has all
//              of it in its shared memory (staging.cuh)
//   flow       f32 [SETS, WORDS], overwritten: the vectors between blocks (`At` below), a set for each layer, in turn
//   list       u64 [4, longest], overwritten: selections that several blocks make together (`Exchange` below)
//   grid       u32 [2]: blocks that have arrived at barriers since the model was loaded, how many when the last launch
//              ended
//   beyond     u32, in mapped host memory: 1 if activations were beyond float16 (common.cuh)
//   stamps     null, or u64: the device's nanoseconds at the start, and when the first block had what the next operation
//              reads
//
// Blocks wait for numbers, not for each other (flow.cuh), and weights stream past that (stream.cuh), so memory is busy
// meanwhile. Where there is compensation, the last n_tb blocks multiply nothing: they select, fetch, and leave their sums
// in a vector of their own, which whoever reads the product adds (stripe.cuh). What others multiply is then cut between
// blocks by units: of Llama-3-8B's 256 tiles some of 116 blocks would have three, half as much again as the rest.
//
// Every block that multiplies has a part of every product, so that whoever has all of one knows that all blocks are done
// with what came before it. So in layer l each block makes its share of a set missing, that of layer l + 2, which layer
// l − 3 used; and between two such shares it has one fence, after attention. Written out, F being that fence of the layer
// named, what one block does before another:
//
//   reads of set l − 3 · F of l − 2 · puts a sum of l − 2    before   has all of them · F of l − 1 · makes the set missing
//   makes the set missing · F of l · puts a sum of l         before   has all of them · F of l + 1 · uses the set
//
// A block that compensates reads what enters h in every layer, whatever of it is compensated, and has a fence after each
// step; so the same holds for it. h itself is written back by one block, once it has all of the last product: every other
// block has read what it was then.
//
// Limits: compute capability 9.0; H, I, HEADS·HEAD_DIM and the rows of qkv are multiples of 16, none over 65536; four
// WARPS at least where there is compensation; no more multiplying blocks than tiles; a block's rows, but of gate and up, no
// more than its threads.
// Constants: those of staging.cuh and attend.cuh, FORMAT, BITS, STAGES, BLOCKS; CAPPED and GROWS (0 or 1: whether scores are
// capped in some layer, and queries grow); shared memory's parts in bytes: XS, PARTS, NARROW_PARTS, BOOKS; LAYER_BYTES as the
// host has them, and how many layers are in shared memory at once, TURNS; SETS: 5.
#if FORMAT == 0
#include "anyprec.cuh"
#else
#include "lutgemm.cuh"
#endif

#include "stream.cuh"
#include "stripe.cuh"

#define THREADS (32 * WARPS)
#define ATTEND_THREADS THREADS
#include "attend.cuh"

typedef Team<0, THREADS, 0> All;

#include "grid.cuh"
#include "staging.cuh"

enum { QKV, O, GU, D };
constexpr int A = HEADS * HEAD_DIM, QKV_ROWS = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

// Where a layer's vectors lie in its set: what down put out in the layer before, what its own products put out, 16-bit
// activations in pairs, and what shares of attention put out. With compensation, beside them deltas, and what blocks had of
// tiles that began in others, down's from the layer before; and activations in f32.
enum At {
    FROM_DOWN = 0,
    Q_K_V = FROM_DOWN + H,
    ATTENDED = Q_K_V + QKV_ROWS,
    FROM_O = ATTENDED + A,
    ACT = FROM_O + H,
    SHARES = ACT + I / 2,
    WITHOUT_DEC = SHARES + (KV_HEADS * SPLITS * HEAD_GROUP * (HEAD_DIM + 2) + 3) / 4 * 4,
    DOWN_DELTA = WITHOUT_DEC,
    DOWN_REST = DOWN_DELTA + H,
    QKV_DELTA = DOWN_REST + H,
    QKV_REST = QKV_DELTA + QKV_ROWS,
    O_DELTA = QKV_REST + QKV_ROWS,
    O_REST = O_DELTA + H,
    GU_DELTA = O_REST + H,
    ACT32 = GU_DELTA + 2 * I,
    WORDS = DEC ? ACT32 + I : WITHOUT_DEC,
};

__device__ __forceinline__ int rows_of(int op) {
    return op == QKV ? QKV_ROWS : op == GU ? 2 * I : H;
}
__device__ __forceinline__ int width_of(int op) { return op == O ? A : op == D ? I : H; }

struct Product {
    const char* codes;
    const char* aux;
    const float* bias;
    const u32* residual;
    const float* scales;
    int* edges; // and behind them a hint for each chunk
    int k_chunk, n_tb, exact, list_chunks;
};

// Norms of a layer, as src/config/layer.rs numbers them; a γ is null where its program has none.
enum { ATTENTION_INPUT, QUERY, KEY, ATTENTION_OUTPUT, FEED_FORWARD_INPUT, FEED_FORWARD_OUTPUT, NORMS };

struct Layer {
    Product products[4];
    Norm norms[NORMS];
    void* keys;
    void* values;
    const float2* angles;
    Numbers numbers;
};
static_assert(sizeof(Layer) == LAYER_BYTES && LAYER_BYTES % 16 == 0, "the host's layers are others");

// The layers that shared memory has, in turn: all of a launch, or those from the one before the current one to the one that
// the stream has come to. The host sees to it that a warp's ring never holds more than a layer.
struct Table {
    Layer* kept;

    __device__ __forceinline__ const Layer& operator[](int l) const { return kept[(u32)l % TURNS]; }

    // Brings layer l, in the place of layer l − TURNS, which nobody needs any more. It is there a layer later.
    __device__ __forceinline__ void bring(const Layer* layers, int count, int l) const {
        if (l >= count || this_thread() >= LAYER_BYTES / 16) return;
        copy_async(shared_address(kept + (u32)l % TURNS) + this_thread() * 16, (const char*)(layers + l) + this_thread() * 16);
    }
};

struct Layers {
    const Layer* layers;
    float* h;
    const float* h_delta;
    float* flow;
    u64* list;
    const State* state;
    u32* grid;
    u64* stamps;
    u32* beyond;
    int count;
    int n_tb;
    int max_seq_len;
    int longest;
};

// Matrices of a layer as they stream by: QKV and O, then gate and up apart, then down.
enum { GATE = GU, UP, DOWN, MATRICES };

struct Matrices {
    Table layers;
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
constexpr int ROUTES = (Stream<MATRICES, Matrices>::BYTES + 127) / 128 * 128; // Route [MATRICES]
constexpr int POSITION = ROUTES + 124;                                     // the token's
constexpr int SCRATCH = ROUTES + 128;                                      // f32 [2, WARPS]
constexpr int TABLE = SCRATCH + 256;                                       // Layer [TURNS]
constexpr int HIDDEN = TABLE + (TURNS * LAYER_BYTES + 127) / 128 * 128;
constexpr int X = HIDDEN + UNITS_OF(H) * UNIT * 4;
// Sums of qkv, gate and up in one place, those of o and down in another: a warp that is ahead may have begun the next product
// while others finish rows.
constexpr int PART = X + XS;
constexpr int NARROW_PART = PART + PARTS;
constexpr int LIST = NARROW_PART + NARROW_PARTS; // the selection
static_assert(MATRICES * sizeof(Route) <= POSITION - ROUTES && 2 * WARPS * 4 <= TABLE - SCRATCH, "no room");

// The vectors of a layer.
__device__ __forceinline__ float* set_of(const Layers& g, int l) { return g.flow + l % SETS * WORDS; }

// A vector of a layer as products and compensations leave it.
__device__ __forceinline__ Sum vector_of(float* set, int at, int delta, int rest, bool compensated) {
    if (!DEC) return Sum{set + at, nullptr, nullptr};
    return Sum{set + at, compensated ? set + delta : nullptr, set + rest};
}

// What goes into the stream where layer l begins, and where the last one ends: what down put out in the layer before, or what
// there was at first.
__device__ __forceinline__ Branch from_down(const Layers& g, const Table& table, int l) {
    Norm before = l < g.count ? table[l].norms[ATTENTION_INPUT] : Norm{};
    if (l == 0) return Branch{Sum{g.h, g.h_delta, nullptr}, Norm{}, before};
    bool compensated = DEC && table[l - 1].products[D].k_chunk > 0;
    return Branch{vector_of(set_of(g, l), FROM_DOWN, DOWN_DELTA, DOWN_REST, compensated),
                  table[l - 1].norms[FEED_FORWARD_OUTPUT], before};
}

// What goes into it between attention and feed-forward.
__device__ __forceinline__ Branch from_o(const Layer& layer, float* set) {
    return Branch{vector_of(set, FROM_O, O_DELTA, O_REST, DEC && layer.products[O].k_chunk > 0),
                  layer.norms[ATTENTION_OUTPUT], layer.norms[FEED_FORWARD_INPUT]};
}

// Makes `words` from `from` on missing; `blocks` share it out.
__device__ __forceinline__ void empty(float* from, int words, int blocks) {
    for (int i = (blockIdx.x * THREADS + this_thread()) * 4; i < words; i += blocks * THREADS * 4)
        put4(from + i, make_uint4(MISSING, MISSING, MISSING, MISSING));
}

// Shared memory of a block that compensates, but for the table and the selection: what it fetches and its rows' scales,
// where others have the ring; what selecting warps say to each other and then sums, barriers, and which rows of each
// product are its own, where others have inputs.
constexpr int SCALES = ROUTES - 16 * 4 * THREADS, ROOM = SCALES / 256 * 128;
constexpr int BARRIERS = X + 16 * 4 * (THREADS + 2), STRIPES = BARRIERS + Fetch::BARRIERS * 8;
static_assert(!DEC || ROOM >= 8 * THREADS, "no room for an entry");
static_assert(!DEC || THREADS / SELECTORS * sizeof(Together) <= BARRIERS - X, "no room for candidates");
static_assert(!DEC || STRIPES + 4 * (int)sizeof(Stripe) <= X + XS, "no room for sums");

// A long selection, whose parts come from several compensating blocks, each entry in one word of 8 bytes: activation,
// channel, and above that a number of the product's own, by which whoever waits for the entry knows it.
struct Exchange {
    u64* list;
    u32 tag;

    __device__ __forceinline__ void put(int place, const Salient& s) const {
        u64 word = (u64)(tag << 16 | s.channel) << 32 | __float_as_uint(s.x);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(list + place), "l"(word) : "memory");
    }

    __device__ __forceinline__ Salient await(int place) const {
        u64 word;
        Patience patience;
        do {
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(list + place) : "memory");
        } while (patience.goes_on((u32)(word >> 48) == tag));
        return Salient{(int)(word >> 32 & 0xffff), __uint_as_float((u32)word)};
    }
};

// Copies the scales of `width` pieces of 16 rows.
__device__ __forceinline__ void copy_scales(float* to, const float* scales, int piece, int width) {
    for (int i = this_thread() * 4; i < width * 16; i += 4 * THREADS)
        copy_async(shared_address(to + i), scales + piece * 16 + i);
    copy_async_commit();
}

// A branch into the stream of a block that compensates; returned: what the next norm divides by, inverted. Not inlined: it
// is needed in several places.
__device__ __noinline__ float take_in_alone(const Branch& branch, char* shared) {
    Eights v[STEPS_OF(H)];
    float* scratch = (float*)(shared + SCRATCH);
    take_in(branch, Hidden{(float4*)(shared + HIDDEN)}, scratch, v);
    float scale = BEFORE ? norm_scale(v, branch.before.eps, scratch + WARPS) : 1.0f;
    // Each thread selects among other channels than those that it keeps.
    All::sync();
    return scale;
}

// A product's compensation of this block's stripe, of the stream once `branch` is in it, or of x if that is null.
// `turn`: passes of fetches before this one's; returned: with this one's.
__device__ __forceinline__ u32 compensate_product(const Product& p, int op, int block, const Branch* branch, const Sum& x,
                                                  char* shared, u32 turn, Exchange exchange, float* out) {
    constexpr int GROUPS = THREADS / SELECTORS;
    int group = this_thread() / SELECTORS, lane = this_thread() % SELECTORS * 8;
    int channels = width_of(op), chunks = (channels + CHUNK - 1) / CHUNK;
    // Every block selects everything, unless there are more chunks than it selects at once. Warps beyond the last whole
    // group wait for the list with the others.
    bool together = chunks > GROUPS, selects = WARPS % 4 == 0 || group < GROUPS;
    int chunk = together ? block + group * p.n_tb : group, step = together ? GROUPS * p.n_tb : GROUPS;
    if (!selects) chunk = chunks;
    // First of all, since it takes longest; everything else that is read comes meanwhile.
    AskedEights asked = branch ? AskedEights{} : ask_eights(x, chunk * CHUNK + lane, channels);
    Stripe stripe = ((const Stripe*)(shared + STRIPES))[op];
    int edge = p.edges[this_thread() % 32], met = 0, *hints = p.edges + BUCKETS;
    int hint = chunk < chunks ? ask1(hints + chunk) : 0;
    const float* gamma = BEFORE && branch ? branch->before.gamma : nullptr;
    Eights weights = {};
    if (gamma) weights = eights(gamma, chunk * CHUNK + lane, channels);
    Dec dec = dec_of(p, op);
    int fewest = chunk_quota(dec, chunks - 1), entries = (chunks - 1) * p.k_chunk + fewest;
    int width = min(stripe.end - stripe.begin, THREADS);
    Salient* list = (Salient*)(shared + LIST);
    float* scales = (float*)(shared + SCALES);
    u32 slots = shared_address(shared), barriers = shared_address(shared + BARRIERS);
    copy_scales(scales, dec.scales, stripe.begin, width);
    Fetch fetch(dec, list, width > 0 ? entries : 0, stripe.begin, max(width, 1), slots, ROOM, barriers, turn);
    Together& group_of = ((Together*)(shared + X))[group];

    Hidden hidden{(float4*)(shared + HIDDEN)};
    float scale = branch ? take_in_alone(*branch, shared) : 1.0f;
#pragma unroll 1
    while (chunk < chunks) {
        int k = chunk * CHUNK + lane, found = hint;
        Eights v = !branch ? await_eights(x, k, asked) : k < channels ? hidden[k] : Eights{};
        // Each chunk's first come before any chunk's second, as they will from the host. The last chunk may have fewer.
        auto place = [&](int i) { return chunk + (i < fewest ? i * chunks : fewest + i * (chunks - 1)); };
        if (gamma) v.scale(scale, weights);
        select_together(v, k, dec, edge, group_of, met, found, [&](int i, const Salient& s) {
            if (together)
                exchange.put(place(i), s);
            else
                list[place(i)] = s;
        });
        if (!together) {
            Together::sync();
            fetch.ask_of_group(chunk_quota(dec, chunk), place);
        }
        if ((together || block == 0) && found != hint) put((u32*)hints + chunk, found);
        if ((chunk += step) >= chunks) break;
        hint = ask1(hints + chunk);
        if (gamma) weights = eights(gamma, chunk * CHUNK + lane, channels);
        if (!branch) asked = ask_eights(x, chunk * CHUNK + lane, channels);
    }
    if (together) {
#pragma unroll 1
        for (int i = fetch.turned<All>(); i < entries; i += THREADS) list[i] = exchange.await(i);
        fetch.ask_first<All>();
    }
    All::sync();
    for (int first = stripe.begin; first < stripe.end; first += THREADS) {
        if (first > stripe.begin) {
            width = min(stripe.end - first, THREADS);
            copy_scales(scales, dec.scales, first, width);
            fetch = Fetch(dec, list, entries, first, width, slots, ROOM, barriers, fetch.turn);
            fetch.ask_first<All>();
        }
        // Quotients of small numbers: halves are far from where they would be rounded wrong.
        float part = __fdividef(1.0f, width);
        int teams = (THREADS + 0.5f) * part, team = (this_thread() + 0.5f) * part;
        float acc[16] = {};
        fetch.add<All>(teams, team, this_thread() - team * width, acc);
        copy_async_wait<0>();
        put_stripe<All>(width, teams, acc, scales, (float*)(shared + X), out + first * 16);
    }
    return fetch.turn;
}

// What a block does that compensates. Not inlined: the compiler would keep what the other blocks need beside it.
__device__ __noinline__ void compensate_layers(const Layers& g, const Table& table, char* shared) {
    int block = blockIdx.x - (BLOCKS - g.n_tb);
    u32 turn = 0;
    if (this_thread() < 4) {
        // Bulk copies are multiples of 16 bytes: of 32 rows.
        Stripe stripe = Stripe::of<4>(rows_of(this_thread()) / 32, block, g.n_tb);
        ((Stripe*)(shared + STRIPES))[this_thread()] = Stripe{2 * stripe.begin, 2 * stripe.end};
    }
    if (this_thread() < Fetch::BARRIERS) barrier_init(shared_address(shared + BARRIERS) + this_thread() * 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    Hidden{(float4*)(shared + HIDDEN)}.clear();
    All::sync();
#pragma unroll 1
    for (int i = 0; i < 4 * g.count; i++) {
        int l = i / 4, op = i % 4;
        const Product& p = table[l].products[op];
        float *set = set_of(g, l), *next = set_of(g, l + 1);
        bool of_stream = op == QKV || op == GU;
        Branch branch = op == QKV ? from_down(g, table, l) : from_o(table[l], set);
        if (p.k_chunk > 0) {
            Sum x{set + (op == O ? ATTENDED : ACT32), nullptr, nullptr};
            float* out = op == D ? next + DOWN_DELTA : set + (op == QKV ? QKV_DELTA : op == O ? O_DELTA : GU_DELTA);
            // An entry is overwritten a layer later, when every block is done with it.
            Exchange exchange{g.list + op * g.longest, i + 1u};
            turn = compensate_product(p, op, block, of_stream ? &branch : nullptr, x, shared, turn, exchange, out);
        } else if (of_stream) {
            take_in_alone(branch, shared);
        } else {
            continue;
        }
        // As the others' after attention. Here nobody waits for this block.
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        All::sync();
        if (op == QKV) table.bring(g.layers, g.count, l + TURNS - 1);
    }
}

// A multiplying block's part of a matrix, gate and up alike.
__device__ __forceinline__ Route route_of(int op, int blocks) {
    int units = UNITS_OF(width_of(op)), b = blockIdx.x, pieces = rows_of(op) / (op == GU ? 32 : 16), piece = units;
    if (DEC && op != GU) pieces *= units, piece = 1;
    int begin = pieces * b / blocks * piece, end = pieces * (b + 1) / blocks * piece;
    return Route{begin, end, begin / units, (end + units - 1) / units - begin / units, begin % units};
}

struct Multiplier {
    Stream<MATRICES, Matrices>& stream;
    const Route* routes;
    const char* shared;
    char* x;
    Grid& grid;

    // Product m of the stream, of K channels, which are in x when all threads are here.
    template <int K>
    __device__ __forceinline__ void run(int m, const Product& p, float* parts, const Later& norm, float* y, float* rest) {
        const Route& route = routes[(u32)m % MATRICES];
        wait_for_staged<K>();
        if (m > 0) grid.stamp();
        stream.multiply<UNITS_OF(K), DEC>(m, route, shared, Operand::of<K>(x), parts);
        All::sync();
        finish<UNITS_OF(K)>(route, parts, norm, p.bias, y, rest);
    }
};

// This block's shares of a layer's attention; `stamp` as in Grid::here().
__device__ __noinline__ void attention(const Layers& g, const Layer& layer, float* set, char* shared, u64* stamp) {
    int position = *(const int*)(shared + POSITION), share = blockIdx.x;
    Span span(position, layer.numbers.window);
    if (share >= KV_HEADS * span.splits) return;
    Attend a{layer.numbers, nullptr, nullptr, layer.keys, layer.values, layer.angles, g.state, set + SHARES, nullptr,
             set + ATTENDED, g.beyond, g.max_seq_len};
    if (!CAPPED) a.softcap = 0;
    if (!GROWS) a.query_beta = 0;
    HeadNorms norms{layer.norms[QUERY], layer.norms[KEY]};
    // Where heads are divided, there are no more shares than blocks.
#pragma unroll 1
    do {
        int kv = share % KV_HEADS, split = share / KV_HEADS;
        prefetch(Cache(a, kv, position), span.begin_of(split), span.end_of(split));
        Sum qkv = vector_of(set, Q_K_V, QKV_DELTA, QKV_REST, DEC && layer.products[QKV].k_chunk > 0);
        // What was in shared memory before has been used.
        All::sync();
        attend_token<All>(a, norms, qkv, (float*)(shared + X), nullptr, kv, split, position, [&] { note_time(stamp); });
        share += BLOCKS - g.n_tb;
    } while (SPLITS == 1 && share < KV_HEADS * span.splits);
}

// What the other blocks do.
__device__ __forceinline__ void multiply_layers(const Layers& g, const Table& table, char* shared, Grid& grid) {
    Route* routes = (Route*)(shared + ROUTES);
    float* scratch = (float*)(shared + SCRATCH);
    Hidden h{(float4*)(shared + HIDDEN)};
    float *parts = (float*)(shared + PART), *narrow_parts = (float*)(shared + NARROW_PART);
    char* x = shared + X;
    constexpr Later NO_NORM{nullptr, 0};
    int blocks = BLOCKS - g.n_tb;

    h.clear();
    if (threadIdx.x < 32) Stream<MATRICES, Matrices>::init(shared_address(shared));
    if (threadIdx.x == 0) *(int*)(shared + POSITION) = position_of(g.state, g.max_seq_len, 0);
    if (threadIdx.x < MATRICES) routes[threadIdx.x] = route_of(threadIdx.x - (threadIdx.x >= UP), blocks);
    All::sync();
    Stream<MATRICES, Matrices> stream(Matrices{table}, routes, MATRICES * g.count, shared_address(shared));
    grid.sync();
    // Every block has read it.
    if (blockIdx.x == 0 && threadIdx.x == 0) g.grid[1] = grid.target;
    grid.stamp();

    Multiplier multiplier{stream, routes, shared, x, grid};
#pragma unroll 1
    for (int l = 0; l < g.count; l++) {
        const Layer& layer = table[l];
        const Product* p = layer.products;
        float *set = set_of(g, l), *next = set_of(g, l + 1);
        int m = MATRICES * l;

        Later norm = stage_hidden(from_down(g, table, l), h, scratch, Operand::of<H>(x));
        multiplier.run<H>(m + QKV, p[QKV], parts, norm, set + Q_K_V, set + QKV_REST);
        empty(set_of(g, l + 2), WORDS, blocks);

        attention(g, layer, set, shared, grid.here());
        grid.stamped++;
        // The one that everything above is ordered by.
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        All::sync();
        table.bring(g.layers, g.count, l + TURNS - 1);

        stage_attended<A>(set + ATTENDED, Operand::of<A>(x));
        multiplier.run<A>(m + O, p[O], narrow_parts, NO_NORM, set + FROM_O, set + O_REST);

        norm = stage_hidden(from_o(layer, set), h, scratch, Operand::of<H>(x));
        wait_for_staged<H>();
        grid.stamp();
        int half = routes[GATE].tiles * WARPS * 16;
#pragma unroll 1
        for (int i = 0; i < 2; i++)
            stream.multiply<UNITS_OF(H), false>(m + GATE + i, routes[GATE], shared, Operand::of<H>(x), parts + i * half);
        finish_pairs(routes[GATE], parts, norm, p[GU].bias, DEC && p[GU].k_chunk > 0 ? set + GU_DELTA : nullptr,
                     (u16*)(set + ACT), DEC && p[D].k_chunk > 0 ? set + ACT32 : nullptr, g.beyond);

        stage_act((const u16*)(set + ACT), Operand::of<I>(x));
        multiplier.run<I>(m + DOWN, p[D], narrow_parts, NO_NORM, next + FROM_DOWN, next + DOWN_REST);
    }
    if (blockIdx.x > 0) return;
    Eights v[STEPS_OF(H)];
    take_in(from_down(g, table, g.count), h, scratch, v);
#pragma unroll
    for (int s = 0; s < STEPS_OF(H); s++)
        if (own_channel(s) < H) v[s].to(g.h + own_channel(s));
    grid.stamp();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers(const __grid_constant__ Layers g) {
#if __CUDA_ARCH__ >= 900 || !DEC
    extern __shared__ __align__(1024) char shared[];
    Table table{(Layer*)(shared + TABLE)};
    for (int i = threadIdx.x; i < min(g.count, TURNS) * LAYER_BYTES / 8; i += THREADS)
        ((u64*)table.kept)[i] = ((const u64*)g.layers)[i];
    wait_for_previous();
    // Two sets: the third is made missing in the first layer.
    empty(g.flow, 2 * WORDS, BLOCKS);
    Grid grid{g.grid, __ldcg(g.grid + 1), g.stamps, 0};
    if (DEC)
        for (int i = blockIdx.x * THREADS + this_thread(); i < 4 * g.longest; i += BLOCKS * THREADS) g.list[i] = 0;
    if (DEC && blockIdx.x >= BLOCKS - g.n_tb) {
        grid.sync();
        compensate_layers(g, table, shared);
    } else {
        multiply_layers(g, table, shared, grid);
    }
#endif
}
