// Attention of `count` consecutive rows of one text on tensor cores: `append_prompt` puts their keys and values into the cache,
// `attend_prompt` attends, with the bits of attend.cu. Which models it is for, attend_tensor.cuh says.
//
//   text  the first of the rows
//
// A block has QUERIES of one key-value head, eight a warp: those of consecutive tokens, token by token. Keys and values come
// through shared memory, STAGE positions at a time, two stages in turn, and serve all of them; bytes are widened on the way.
// Every tile's results are merged where they are made, in registers, as `Merge` does it: a lane has one query, so shares end
// for each lane where they end for its token.
//
// Constants: those of attend.cuh; PROMPT_WARPS of a block.
#ifndef PROMPT_WARPS
#define PROMPT_WARPS (HEAD_DIM > 128 ? 8 : 12)
#endif
#define ATTEND_THREADS (32 * PROMPT_WARPS)
#include "append.cuh"

#if TENSOR
#define QUERIES (8 * PROMPT_WARPS)
#define STAGE (HEAD_DIM > 128 ? 32 : 64)
// Rows of a stage, 16 bytes each: keys are read by eight lanes of two rows at once, values by eight of eight.
#define CHUNKS (HEAD_DIM / 8)
#define KEY_ROW (CHUNKS + (12 - CHUNKS % 8) % 8)
#define VALUE_ROW (CHUNKS + 1)

struct Stage {
    uint4 keys[STAGE * KEY_ROW], values[STAGE * VALUE_ROW];
    float key_steps[STAGE], value_steps[STAGE];
};

// Copies 16 bytes to shared memory, or as many zeros.
__device__ __forceinline__ void copy_or_clear(void* to, const void* from, bool copy) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(copy ? 16 : 0)
                 : "memory");
}

// Four 8 × 8 tiles of 16-bit numbers, whose rows this lane's address is one of, transposed.
__device__ __forceinline__ void load_transposed(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row)));
}

// Sixteen bytes of the cache as numbers of DTYPE.
__device__ __forceinline__ void widen_to(uint4* to, uint2 v) {
    *to = make_uint4(widened_bytes(prmt(v.x, 0, 0x4140)), widened_bytes(prmt(v.x, 0, 0x4342)),
                     widened_bytes(prmt(v.y, 0, 0x4140)), widened_bytes(prmt(v.y, 0, 0x4342)));
}

// Positions `begin` to `begin + STAGE` of the cache; those before `from` and from `end` on are zeros.
__device__ __forceinline__ void fetch_stage(Stage& stage, const Cache& cache, int begin, int from, int end) {
    for (int i = threadIdx.x; i < STAGE * CHUNKS; i += ATTEND_THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS, position = begin + row;
        bool there = position >= from && position < end;
        long long at = there ? cache.at(position) + 8 * chunk : 0;
        uint4 *key = stage.keys + row * KEY_ROW + chunk, *value = stage.values + row * VALUE_ROW + chunk;
#if IN_BYTES
        uint2 zeros = make_uint2(0x80808080u, 0x80808080u);
        widen_to(key, there ? *(const uint2*)(cache.keys + at) : zeros);
        widen_to(value, there ? *(const uint2*)(cache.values + at) : zeros);
#else
        copy_or_clear(key, cache.keys + at, there);
        copy_or_clear(value, cache.values + at, there);
#endif
    }
    if (IN_BYTES && threadIdx.x < STAGE) {
        int position = begin + threadIdx.x;
        bool there = position >= from && position < end;
        stage.key_steps[threadIdx.x] = there ? cache.key_steps()[cache.place(position)] : 0.0f;
        stage.value_steps[threadIdx.x] = there ? cache.value_steps()[cache.place(position)] : 0.0f;
    }
    copy_async_commit();
}

// This lane's query and what it came to so far: of the share at hand, and of those before it. Of eight dimensions each lane has
// two, from 2·(lane % 4) on.
struct Running {
    float most, sum;
    float2 results[HEAD_DIM / 8];

    __device__ __forceinline__ Running() : most(-INFINITY), sum(0), results() {}

    // Scales what there is for a part whose largest score is m; returned: what the part is scaled by. `any` says whether it is
    // worth asking for every lane.
    __device__ __forceinline__ float make_room(float m, bool any) {
        float upto = fmaxf(most, m), old = rescale(most, upto), own = rescale(m, upto);
        most = upto;
        sum = __fmul_rn(old, sum);
        if (any ? __any_sync(FULL, old != 1.0f) : old != 1.0f)
#pragma unroll
            for (int t = 0; t < HEAD_DIM / 8; t++)
                results[t] = make_float2(__fmul_rn(old, results[t].x), __fmul_rn(old, results[t].y));
        return own;
    }

    __device__ __forceinline__ void add(float own, float2 v, int t) {
        results[t] = make_float2(__fmaf_rn(own, v.x, results[t].x), __fmaf_rn(own, v.y, results[t].y));
    }

    // Another part, whole.
    __device__ __forceinline__ void add(const Running& part) {
        float own = make_room(part.most, false);
        sum = __fmaf_rn(own, part.sum, sum);
#pragma unroll
        for (int t = 0; t < HEAD_DIM / 8; t++) add(own, part.results[t], t);
    }
};

// Scores of the warp's queries and a tile of keys, which begins at `keys`: as Tile::weigh has them.
__device__ __forceinline__ void score_tile(float2 (&scores)[2], const u32 (&a)[HEAD_DIM / 16][4], const uint4* keys) {
    int lane = this_lane(), part = lane % 4;
    const uint4* rows = keys + lane / 4 * KEY_ROW;
    float sums[2][2][4] = {};
    constexpr int WHOLE = Key::BY_FOUR / 4;
#pragma unroll
    for (int w = 0; w < WHOLE; w++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint4 k = rows[8 * j * KEY_ROW + 4 * w + part];
            mma(sums[j][0], a[2 * w][0], a[2 * w][1], a[2 * w][2], a[2 * w][3], k.x, k.y);
            mma(sums[j][1], a[2 * w + 1][0], a[2 * w + 1][1], a[2 * w + 1][2], a[2 * w + 1][3], k.z, k.w);
        }
    if constexpr (Key::WORDS > Key::BY_FOUR) {
        constexpr int i = 2 * WHOLE;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint2 k = *(const uint2*)((const u16*)(rows + 8 * j * KEY_ROW) + Key::dimension(part, Key::BY_FOUR));
            mma(sums[j][i % 2], a[i][0], a[i][1], a[i][2], a[i][3], k.x, k.y);
        }
    }
    scores[0] = Tile::score_of(sums[0]), scores[1] = Tile::score_of(sums[1]);
}

// A tile's values, which begin at `values`, times its weights, to what the share came to.
__device__ __forceinline__ void add_tile(Running& share, const Weighted& w, const uint4* values) {
    float own = share.make_room(w.most, true);
    share.sum = __fmaf_rn(own, w.sum, share.sum);
    int lane = this_lane();
    const uint4* row = values + lane % 16 * VALUE_ROW + lane / 16;
#pragma unroll
    for (int t = 0; t < HEAD_DIM / 8; t += 2) {
        u32 v[4];
        load_transposed(v, row + t);
        float d[2][4] = {};
        mma(d[0], w.a[0], w.a[1], w.a[2], w.a[3], v[0], v[1]);
        mma(d[1], w.a[0], w.a[1], w.a[2], w.a[3], v[2], v[3]);
        share.add(own, w.results(d[0]), t);
        share.add(own, w.results(d[1]), t + 1);
    }
}
#endif

// Grid (count, KV_HEADS).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)
    append_prompt(const __grid_constant__ Attend g, const __grid_constant__ TextRow text, int count) {
    wait_for_previous();
    let_next_start();
    append_row(g, text, blockIdx.x, blockIdx.y);
}

// Grid (count · HEAD_GROUP / QUERIES rounded up, KV_HEADS); the longest blocks begin first.
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)
    attend_prompt(const __grid_constant__ Attend g, const __grid_constant__ TextRow text, int count) {
#if TENSOR
    extern __shared__ __align__(16) char shared[];
    Stage* stages = (Stage*)shared;
    wait_for_previous();
    let_next_start();
    int start = position_of(text.state, g.max_seq_len, text.behind);
    int kv = blockIdx.y, all = count * HEAD_GROUP, block = gridDim.x - 1 - blockIdx.x;
    int warp_query = block * QUERIES + this_thread() / 32 * 8, query = min(warp_query + (int)this_lane() / 4, all - 1);
    auto position_at = [&](int query) { return min(start + query / HEAD_GROUP, g.max_seq_len - 1); };
    int position = position_at(query);
    Span span(position, g.window);

    // This lane's part of its query: rotated, scaled and divided in two.
    u32 a[HEAD_DIM / 16][4];
    Settled x = g.numbers(text.row + query / HEAD_GROUP);
    int first = (kv * HEAD_GROUP + query % HEAD_GROUP) * HEAD_DIM;
    const float2* angles = angles_at(g, position);
    float scale = query_scale(g, position);
#pragma unroll
    for (int w = 0; w < Key::WORDS; w++) {
        u16 high[2], low[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float v = __fmul_rn(rotated(x, first, angles, Key::dimension(this_lane() % 4, w) + e), scale);
            check_size(g, v);
            high[e] = narrow(v), low[e] = narrow(__fsub_rn(v, widen(high[e])));
        }
        a[w / 2][w % 2 * 2] = high[0] | (u32)high[1] << 16, a[w / 2][w % 2 * 2 + 1] = low[0] | (u32)low[1] << 16;
    }

    // What the block and the warp see, from the first of their tokens to the last.
    Span block_first(position_at(block * QUERIES), g.window);
    Span warp_first(position_at(min(warp_query, all - 1)), g.window);
    int end = position_at(min((block + 1) * QUERIES, all) - 1) + 1, warp_end = position_at(min(warp_query + 8, all) - 1) + 1;
    int from = block_first.first / STAGE * STAGE;
    // Of the latest position that the launch knows, so that all that is seen lies in one turn of the ring or the one before.
    Cache cache = g.cache(text, kv, end - 1);
    Running before, share;
    int ends = span.begin + span.share;
    fetch_stage(stages[0], cache, from, block_first.first, end);
#pragma unroll 1
    for (int begin = from, turn = 0; begin < end; begin += STAGE, turn ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        // Everybody is done with the other stage.
        if (begin + STAGE < end) fetch_stage(stages[turn ^ 1], cache, begin + STAGE, block_first.first, end);
        const Stage& stage = stages[turn];
#pragma unroll 1
        for (int tile = begin; tile < begin + STAGE; tile += TILE) {
            if (tile >= warp_end || tile + TILE <= warp_first.first) continue;
            float2 scores[2], key_steps[2], value_steps[2];
            int at = tile - begin;
            score_tile(scores, a, stage.keys + at * KEY_ROW);
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (IN_BYTES) {
                    int place = at + Tile::value_position(2 * j);
                    key_steps[j] = *(const float2*)(stage.key_steps + place);
                    value_steps[j] = *(const float2*)(stage.value_steps + place);
                }
            Weighted w = weights_of(scores, g.softcap, key_steps, value_steps,
                                    [&](int more) { return span.sees(tile + Tile::value_position(0) + more); });
            add_tile(share, w, stage.values + at * VALUE_ROW);
            if (tile + TILE == ends) {
                before.add(share);
                share = Running(), ends += span.share;
            }
            __syncwarp();
        }
    }
    before.add(share);
    // Made again, not kept.
    query = block * QUERIES + this_thread() / 4;
    if (query >= all) return;
    long long head = (long long)(text.row + query / HEAD_GROUP) * HEADS + kv * HEAD_GROUP + query % HEAD_GROUP;
    float* out = g.out + head * HEAD_DIM + this_lane() % 4 * 2;
#pragma unroll
    for (int t = 0; t < HEAD_DIM / 8; t++)
        *(float2*)(out + 8 * t) =
            make_float2(result_of(before.results[t].x, before.sum), result_of(before.results[t].y, before.sum));
#endif
}
