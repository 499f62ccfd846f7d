// The product of many tokens with a packed matrix: what tokens_anyprec.cu, tokens_lutgemm.cu and tokens_dense.cu share.
// Weights are read, and looked up, once for 8·EIGHTS tokens.
//
//   v[token, row] = Σ_k W[row, k] · x[token, k] / rms[token] + bias[row]      x by digits.cu; rms where it is normalized
//   y[token, row] = add ? y[token, row] + v[token, row] : v[token, row]
//
// The same bits as gemv.cuh and layers.cu give, whatever the number of tokens: a span's sums are exact, what is made of them
// is rounded as unit.cuh has it, and summed as sums.cuh has it.
//
//   codes, aux  as in gemv.cuh
//   operand     pieces, [tiles of tokens][spans][EIGHTS] (operand.cuh)
//   squares     whether the product is divided by the rms of x, whose squares are in the pieces
//   y           f32 [tokens, R]; y_delta, of one token, may be null
//   parts       f32 [SLICES, tokens, R] where SLICES > 1; tickets u32 [tiles of tokens, blocks of rows], zero before and
//               after
//
// Grid (tiles of 8·EIGHTS tokens, blocks of rows, SLICES). A block has whole tiles of rows and of each the spans s with
// s mod SLICES its slice, which are whole chains; its part of x is in shared memory. Its warps take chains in turn, each
// warp streaming its own units (gemv.cuh). The warp that has a tile's last chain finishes its rows, while others go on; there
// is room for the chains of 2·BATCH tiles. Where a warp has the same span of every tile and groups are not short, it keeps x
// in registers. With several slices a block leaves the sums of its chains in `parts`, folded as sums.cuh has it as far as
// they go, and the block of a place that ends last folds what all have left: it does not matter which.
//
// Constants: K, R; WARPS, STAGES; EIGHTS; SLICES (1, 2, 4, 8, 16, no more than a row has chains); BATCH.
#pragma once
#include "unit.cuh"

#define THREADS (32 * WARPS)
constexpr int TILES = (R + 15) / 16, UNITS = (K + UNIT - 1) / UNIT, SPANS = SPANS_OF(K);
constexpr int TOKENS = 8 * EIGHTS;
constexpr int ROW_CHAINS = CHAINS_OF(SPANS);
// Of a slice, at most.
constexpr int OWN_CHAINS = (ROW_CHAINS + SLICES - 1) / SLICES, OWN_SPANS = (SPANS + SLICES - 1) / SLICES;
// Tiles whose chains there is room for, and a warp has the same span of each tile.
constexpr int PLACES = 2 * BATCH;
constexpr bool KEPT = INTEGERS && UNIT == SPAN && GROUP >= 128 && SPANS <= CHAINS && ROW_CHAINS % SLICES == 0 &&
                      WARPS % OWN_CHAINS == 0 && (EIGHTS == 1 || WARPS <= 8);
// Shared memory: scales f32 [TOKENS], of each place how many chains have come and how often it was left (u32 [64] each), a
// flag, x, sums of chains, the rings.
constexpr int ARRIVED = 64, LEFT = 320, FLAG = 576, X = 640;
constexpr int SUMS = X + OWN_SPANS * EIGHTS * EIGHT_BYTES;
constexpr int TILE_FLOATS = OWN_CHAINS * TOKENS * 16;
constexpr int RINGS = SUMS + PLACES * TILE_FLOATS * 4;
static_assert(PLACES <= 64, "no room for places");

struct Tokens {
    const char* codes;
    const char* aux;
    const float* bias;
    const char* operand;
    float* y;
    const float* y_delta;
    float* parts;
    u32* tickets;
    float eps;
    int tokens;
    int squares;
    int add;
};

// What a span adds to a tile's rows, of all tokens. Lane 4·g + t has, of eight tokens, in order: row g of tokens 2·t and
// 2·t + 1, row g + 8 of the same. The same numbers as Unit's (unit.cuh), which says how they are made.
#if !INTEGERS
struct Many {
    float d[EIGHTS][2][4];

    __device__ __forceinline__ Many() { clear(); }
    __device__ __forceinline__ void begin(const char*, u32) {}

    __device__ __forceinline__ void add(const uint4* codes, const char* x, int unit, u32 lane) {
        const uint4* numbers = (const uint4*)x + unit * (UNIT / 32) * 32 + lane;
        expand(codes, [&](int p, const u32* a) {
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                uint4 v = numbers[e * (EIGHT_BYTES / 16) + p * 32];
                mma(d[e][0], a[0], a[1], a[2], a[3], v.x, v.y);
                mma(d[e][1], a[4], a[5], a[6], a[7], v.z, v.w);
            }
        }, [] {});
    }

    __device__ __forceinline__ void span_onto(float (&chain)[EIGHTS][4], const char*, u32) {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) chain[e][i] = __fadd_rn(chain[e][i], __fadd_rn(d[e][0][i], d[e][1][i]));
        clear();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[e][0][i] = d[e][1][i] = 0;
    }
};
#else
// Two digits and the third of a sum.
__device__ __forceinline__ float first_two(const int (&d)[DIGITS][4], int i) { return d[0][i] * 256 + d[1][i]; }
__device__ __forceinline__ float third(const int (&d)[DIGITS][4], int i) { return d[2][i]; }

// A number of this lane's two tokens, of [8] f32.
__device__ __forceinline__ float2 of_tokens(const char* at, u32 lane) { return ((const float2*)at)[lane % 4]; }
__device__ __forceinline__ float of(float2 v, int i) { return i % 2 ? v.y : v.x; }

// This lane's digits of a span, of all tokens.
struct Kept {
    static constexpr int PAIRS = KEPT ? SPAN / 64 : 1;
    uint4 digits[EIGHTS][PAIRS][DIGITS];

    __device__ __forceinline__ void load(const char* x, u32 lane) {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < PAIRS * DIGITS; i++)
                (&digits[e][0][0])[i] = ((const uint4*)(x + e * EIGHT_BYTES))[i * 32 + lane];
    }
};

#ifdef GROUPED
struct Many {
    Kept kept;
    float two[EIGHTS][4], one[EIGHTS][4];

    __device__ __forceinline__ Many() { clear(); }
    __device__ __forceinline__ void begin(const char*, u32) {}

    __device__ __forceinline__ void add(const uint4* codes, const char* x, int unit, u32 lane) {
        const float2* groups = (const float2*)(codes - lane + VECTORS * 32) + lane / 4;
        const uint4* own = (const uint4*)x + unit * (UNIT / 64) * DIGITS * 32 + lane;
        int d[EIGHTS][DIGITS][4] = {};
        uint4 v[EIGHTS][DIGITS];
        expand(codes, [&](int p, const u32* a) {
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int digit = 0; digit < DIGITS; digit++) {
                    if (!KEPT && p % 2 == 0)
                        v[e][digit] = own[e * (EIGHT_BYTES / 16) + (p / 2 * DIGITS + digit) * 32];
                    const uint4& w = KEPT ? kept.digits[e][KEPT ? p / 2 : 0][digit] : v[e][digit];
                    mma_bytes<false>(d[e][digit], a[0], a[1], a[2], a[3], p % 2 ? w.z : w.x, p % 2 ? w.w : w.y);
                }
            int j = p / (GROUP / 32);
            if (p % (GROUP / 32) < GROUP / 32 - 1) return;
            float2 s = groups[j * 16], t = groups[j * 16 + 8];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                const char* piece = x + e * EIGHT_BYTES;
                float2 step = of_tokens(piece + EIGHT_STEPS, lane);
                float2 sum = of_tokens(piece + EIGHT_SUMS + (unit * (UNIT / GROUP) + j) * 32, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 w = i < 2 ? s : t;
                    float own_step = __fmul_rn(of(step, i), i < 2 ? 1.0f : HIGH);
                    two[e][i] = fmaf(__fmul_rn(w.x, own_step * 256.0f), first_two(d[e], i), fmaf(w.y, of(sum, i), two[e][i]));
                    one[e][i] = fmaf(__fmul_rn(w.x, own_step), third(d[e], i), one[e][i]);
#pragma unroll
                    for (int digit = 0; digit < DIGITS; digit++) d[e][digit][i] = 0;
                }
            }
        }, [] {});
    }

    __device__ __forceinline__ void span_onto(float (&chain)[EIGHTS][4], const char*, u32) {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) chain[e][i] = __fadd_rn(chain[e][i], __fadd_rn(two[e][i], one[e][i]));
        clear();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) two[e][i] = one[e][i] = 0;
    }
};
#else
struct Many {
    Kept kept;
    Book book;
    float2 rows[2]; // scale and offset of rows g and g + 8
    int d[PLANES][EIGHTS][DIGITS][4];

    __device__ __forceinline__ void begin(const char* aux, u32 lane) {
        book = Book(aux, lane);
        const float2* of = (const float2*)(aux + BOOK_BYTES) + lane / 4;
        rows[0] = of[0], rows[1] = of[8];
    }

    __device__ __forceinline__ void add(const uint4* codes, const char* x, int, u32 lane) {
        const uint4* own = (const uint4*)x + lane;
        uint4 v[EIGHTS][DIGITS];
#pragma unroll
        for (int i = 0; i < PLANES * EIGHTS * DIGITS * 4; i++) (&d[0][0][0][0])[i] = 0;
        expand(codes, [&](int p, u32 first, u32 second) {
            if (!KEPT && p % 2 == 0) {
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                    for (int digit = 0; digit < DIGITS; digit++)
                        v[e][digit] = own[e * (EIGHT_BYTES / 16) + (p / 2 * DIGITS + digit) * 32];
            }
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    u32 a[4];
                    book.look_up(plane, half, first, a[0], a[1]);
                    book.look_up(plane, half, second, a[2], a[3]);
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                        for (int digit = 0; digit < DIGITS; digit++) {
                            const uint4& w = KEPT ? kept.digits[e][KEPT ? p / 2 : 0][digit] : v[e][digit];
                            mma_bytes<true>(d[plane][e][digit], a[0], a[1], a[2], a[3], p % 2 ? w.z : w.x, p % 2 ? w.w : w.y);
                        }
                }
        }, [] {});
    }

    __device__ __forceinline__ void span_onto(float (&chain)[EIGHTS][4], const char* x, u32 lane) {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            const char* piece = x + e * EIGHT_BYTES;
            float2 step = of_tokens(piece + EIGHT_STEPS, lane), sum = of_tokens(piece + EIGHT_SUMS, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float two = first_two(d[0][e], i), one = third(d[0][e], i);
#if PLANES == 2
                two = fmaf(two, PLANE, first_two(d[PLANES - 1][e], i)), one = fmaf(one, PLANE, third(d[PLANES - 1][e], i));
#endif
                float v = __fadd_rn(__fmul_rn(two, of(step, i) * 256.0f), __fmul_rn(one, of(step, i)));
                float2 row = rows[i / 2];
                chain[e][i] = __fadd_rn(chain[e][i], fmaf(row.x, v, __fmul_rn(row.y, of(sum, i))));
            }
        }
    }
};
#endif
#endif

// Where a warp is among a block's units: chains of its slice, one tile after the other, WARPS apart, each span by span.
struct Walk {
    int slice, tile, own, unit; // tile of the block, chain of the slice, unit of the row

    __device__ __forceinline__ Walk(int slice, int warp)
        : slice(slice), tile(warp / chains()), own(warp % chains()), unit(chain() * SPAN_UNITS) {}

    // Of the slice: of short rows not every slice has as many.
    __device__ __forceinline__ int chains() const {
        return ROW_CHAINS % SLICES == 0 ? OWN_CHAINS : (ROW_CHAINS - slice + SLICES - 1) / SLICES;
    }
    __device__ __forceinline__ int chain() const { return slice + own * SLICES; }
    __device__ __forceinline__ int span() const { return unit / SPAN_UNITS; }
    __device__ __forceinline__ bool ends_span() const {
        return SPAN_UNITS == 1 || unit % SPAN_UNITS == SPAN_UNITS - 1 || unit == UNITS - 1;
    }
    __device__ __forceinline__ bool ends_chain() const { return ends_span() && span() + CHAINS >= SPANS; }
    __device__ __forceinline__ bool begins_chain() const { return unit == chain() * SPAN_UNITS; }

    __device__ __forceinline__ void advance() {
        if (!ends_chain()) {
            unit = ends_span() ? (span() + CHAINS) * SPAN_UNITS : unit + 1;
            return;
        }
        tile += WARPS / chains(), own += WARPS % chains();
        if (own >= chains()) own -= chains(), tile++;
        unit = chain() * SPAN_UNITS;
    }
};

// Copies the next unit of a walk, and what comes with it: codebooks with the first of a chain.
__device__ __forceinline__ void request(const Tokens& g, Walk& walk, int begin, int tiles, u32 slot) {
    if (walk.tile < tiles) {
        long long unit = (long long)(begin + walk.tile) * UNITS + walk.unit;
        int lane = threadIdx.x % 32;
        const char* codes = g.codes + unit * (VECTORS * 512) + lane * 16;
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

__device__ __forceinline__ u32 seen(const u32* at) { return *(const volatile u32*)at; }

__device__ __forceinline__ void tokens(const Tokens& g) {
    extern __shared__ __align__(128) char shared[];
    float* scales = (float*)shared;
    u32 *arrived = (u32*)(shared + ARRIVED), *left = (u32*)(shared + LEFT);
    float* sums = (float*)(shared + SUMS);
    int warp = threadIdx.x / 32, slice = blockIdx.z, blocks = gridDim.y;
    u32 lane = this_lane();
    int begin = (long long)TILES * blockIdx.y / blocks, tiles = (long long)TILES * (blockIdx.y + 1) / blocks - begin;
    int first_token = blockIdx.x * TOKENS, count = min(g.tokens - first_token, TOKENS);
    char* ring = shared + RINGS + warp * (STAGES * STAGE_BYTES);
    u32 slots = shared_address(ring) + lane * 16;

    Walk ahead(slice, warp);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) request(g, ahead, begin, tiles, slots + s * STAGE_BYTES);
    if (threadIdx.x < PLACES) arrived[threadIdx.x] = left[threadIdx.x] = 0;
    let_next_start();
    wait_for_previous();

    const char* operand = g.operand + (long long)blockIdx.x * SPANS * (EIGHTS * EIGHT_BYTES);
    constexpr int WORDS = EIGHTS * EIGHT_BYTES / 16;
    for (int i = threadIdx.x; i < OWN_SPANS * WORDS; i += THREADS) {
        int span = slice + i / WORDS * SLICES;
        if (span < SPANS)
            copy_async(shared_address(shared + X + i * 16), operand + ((long long)span * WORDS + i % WORDS) * 16);
    }
    copy_async_commit();
    if (threadIdx.x < TOKENS) {
        const char* of = operand + threadIdx.x / 8 * EIGHT_BYTES + EIGHT_SQUARES + threadIdx.x % 8 * 4;
        scales[threadIdx.x] = !g.squares ? 1.0f : inverse_rms_of(K, g.eps, [&](int s) {
            return __ldcg((const float*)(of + (long long)s * (EIGHTS * EIGHT_BYTES)));
        });
    }
    copy_async_wait<0>();
    __syncthreads();

    auto finish = [&](int token, int row, float sum) {
        float* y = g.y + (long long)(first_token + token) * R;
        float v = finished(sum, scales[token], g.bias, row);
        y[row] = g.add ? __fadd_rn(v, load1(y, g.y_delta, row)) : v;
    };

    Many many;
    Walk walk(slice, warp);
    int slot = 0, next = STAGES - 1;
    float chain[EIGHTS][4];
#if INTEGERS
    if (KEPT) many.kept.load(shared + X + walk.span() / SLICES * (EIGHTS * EIGHT_BYTES), lane);
#endif
#pragma unroll 1
    while (walk.tile < tiles) {
        copy_async_wait<STAGES - 2>();
        __syncwarp();
        request(g, ahead, begin, tiles, slots + next * STAGE_BYTES);
        const char* stage = ring + slot * STAGE_BYTES;
        const char* x = shared + X + walk.span() / SLICES * (EIGHTS * EIGHT_BYTES);
        if (walk.begins_chain()) {
            many.begin(stage + VECTORS * 512, lane);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int i = 0; i < 4; i++) chain[e][i] = 0;
        }
        many.add((const uint4*)stage + lane, x, walk.unit % SPAN_UNITS, lane);
        next = slot;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        if (walk.ends_span()) many.span_onto(chain, x, lane);
        if (walk.ends_chain()) {
            int place = walk.tile % PLACES;
            u32 turn = walk.tile / PLACES;
            while (seen(left + place) != turn) pause_a_little();
            // [chain, token, 16]
            float* of_tile = sums + place * TILE_FLOATS;
            float* own = of_tile + walk.own * (TOKENS * 16) + lane / 4;
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int i = 0; i < 4; i++) own[(e * 8 + lane % 4 * 2 + i % 2) * 16 + i / 2 * 8] = chain[e][i];
            __threadfence_block();
            __syncwarp();
            u32 before = lane == 0 ? atomicAdd(arrived + place, 1) : 0;
            if (__shfl_sync(FULL, before, 0) == walk.chains() * (turn + 1) - 1) {
                __threadfence_block();
                int row = (begin + walk.tile) * 16 + lane % 16;
#pragma unroll 1
                for (int token = lane / 16; token < count; token += 2) {
                    const float* from = of_tile + token * 16 + lane % 16;
                    float sum = folded<CHAINS / SLICES>(
                        [&](int c) { return slice + c * SLICES < ROW_CHAINS ? from[c * (TOKENS * 16)] : 0.0f; });
                    if (row >= R) continue;
                    if (SLICES == 1)
                        finish(token, row, sum);
                    else
                        g.parts[((long long)slice * g.tokens + first_token + token) * R + row] = sum;
                }
                __threadfence_block();
                __syncwarp();
                if (lane == 0) *(volatile u32*)(left + place) = turn + 1;
            }
        }
        walk.advance();
    }
    if (SLICES == 1) return;
    // The block that ends last has what all have left.
    int* is_last = (int*)(shared + FLAG);
    u32* ticket = g.tickets + (long long)blockIdx.x * blocks + blockIdx.y;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *is_last = atomicAdd(ticket, 1) == SLICES - 1;
    __syncthreads();
    if (!*is_last) return;
    __threadfence();
    int first_row = begin * 16, rows = min(tiles * 16, R - first_row);
    for (int i = threadIdx.x; i < count * rows; i += THREADS) {
        int token = i / rows, row = first_row + i % rows;
        const float* own = g.parts + (long long)(first_token + token) * R + row;
        finish(token, row, folded<SLICES>([&](int s) { return __ldcg(own + (long long)s * g.tokens * R); }));
    }
    if (threadIdx.x == 0) *ticket = 0;
}
