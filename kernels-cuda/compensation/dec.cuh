// Dynamic error compensation: which channels, and their correction of a stripe of rows.
//
//   out[row] = scales[row] · Σ_{c selected} q[c, row] · x[c]
//
//   x         f32 [in_features]
//   residual  u32 [in_features, out_features / 8], nibble i of word w of a channel is q + 8 of row 8·w + i;
//             in mapped host memory or on the device
//   scales    f32 [out_features]
//   edges     i32 [32], the bit patterns of the plan's lower edges (magnitudes compare as their bits do)
//
// One warp selects per chunk of 1024 channels; every compensating block selects for itself, so none waits for
// another. All reads of a thread are in flight together; sums are f32, in a fixed order; one store per row.
//
// Limits: in_features % 32 == 0; the whole stripe in pieces of WORDS words, WORDS 1, 2 or 4 and a divisor
// of out_features / 8.
#pragma once
#include "common.cuh"

#define CHUNK 1024
#define BUCKETS 32

struct Dec {
    const u32* residual;
    const float* scales;
    const int* edges;
    int in_features;
    int out_features;
    int k_chunk;
    int n_tb;
    int exact;        // selection: 0 by buckets, 1 exact
    int list_chunks;  // chunks whose selected channels fit the list at once
};

// A selected channel and its activation.
struct __align__(8) Salient {
    int channel;
    float x;
};

__device__ __forceinline__ int magnitude(u32 bits) { return bits & 0x7fffffff; }

// A chunk's activations in shared memory, as bits: value 4·j + e of a lane is channel 128·j + 4·lane + e. Each
// lane reads what it wrote. They are read again for every count, which costs less than 32 registers do.
struct Chunk {
    u32 address;

    __device__ __forceinline__ uint4 four(int j) const {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(address + j * 512));
        return v;
    }

    __device__ __forceinline__ void put(int j, float4 v) const {
        asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address + j * 512), "f"(v.x), "f"(v.y), "f"(v.z),
                     "f"(v.w)
                     : "memory");
    }
};

// Counts are kept as floats: comparisons and integers share a pipe that the look-ups beside them fill already.
__device__ __forceinline__ int count_from(const Chunk& x, int least) {
    float n = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint4 v = x.four(j);
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (magnitude(word(v, e)) >= least) n += 1;
    }
    return warp_count((u32)n);
}

// Of four runs of STEP buckets from `first` on, the start of the one in which k channels are reached.
template <int STEP>
__device__ __forceinline__ int search_buckets(const Chunk& x, int k, int edge, int first) {
    float e0 = __int_as_float(__shfl_sync(FULL, edge, first + STEP - 1));
    float e1 = __int_as_float(__shfl_sync(FULL, edge, first + 2 * STEP - 1));
    float e2 = __int_as_float(__shfl_sync(FULL, edge, first + 3 * STEP - 1));
    float n0 = 0, n1 = 0, n2 = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint4 v = x.four(j);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float size = fabsf(__uint_as_float(word(v, e)));
            // Written so that NaN counts as largest.
            if (!(size < e0)) n0 += 1;
            if (!(size < e1)) n1 += 1;
            if (!(size < e2)) n2 += 1;
        }
    }
    u32 n01 = warp_count((u32)n0 | (u32)n1 << 16);
    int runs = ((int)(n01 & 0xffff) < k) + ((int)(n01 >> 16) < k) + ((int)warp_count((u32)n2) < k);
    return first + runs * STEP;
}

// Magnitudes above `above` are taken, then the lowest channels among those of at least `least`.
// Lane i of each warp brings edge i.
__device__ __forceinline__ void find_limits(const Chunk& x, int k, const Dec& dec, int edge, int& above, int& least) {
    if (dec.exact) {
        // The k-th largest key, bit by bit from the top.
        int value = 0;
        for (int bit = 30; bit >= 0; bit--) {
            int candidate = value | 1 << bit;
            if (count_from(x, candidate) >= k) value = candidate;
        }
        above = value;
        least = value;
    } else {
        // The first bucket at whose lower edge k channels are reached; the last edge is 0 and reaches all.
        int first = search_buckets<8>(x, k, edge, 0);
        first = search_buckets<2>(x, k, edge, first);
        if (count_from(x, __shfl_sync(FULL, edge, first)) < k) first++;
        least = __shfl_sync(FULL, edge, first);
        int higher = __shfl_sync(FULL, edge, max(first, 1) - 1);
        above = first > 0 ? higher - 1 : 0x7fffffff;
    }
}

// One warp writes the k salient channels of a chunk, ascending. Channels past the end are zeros: the last of the
// smallest, never taken.
__device__ __forceinline__ void select_chunk(const Chunk& x, int start, int k, const Dec& dec, int edge,
                                             Salient* list) {
    int lane = threadIdx.x % 32;
    int above, least;
    find_limits(x, k, dec, edge, above, least);

    // How many are above, and how many tie, in every group of four: one byte per j, summed over the lanes.
    u32 taken[2] = {0, 0}, ties[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint4 v = x.four(j);
        u32 one = 1u << (8 * (j % 4));
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (magnitude(word(v, e)) > above)
                taken[j / 4] += one;
            else if (magnitude(word(v, e)) >= least)
                ties[j / 4] += one;
        }
    }
    u32 own_taken[2] = {taken[0], taken[1]}, own_ties[2] = {ties[0], ties[1]};
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 t = __shfl_up_sync(FULL, taken[h], d), e = __shfl_up_sync(FULL, ties[h], d);
            if (lane >= d) taken[h] += t, ties[h] += e;
        }
    }
    // A group has at most 128 channels, so a byte holds its count.
    u32 all_taken[2], all_ties[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        all_taken[h] = __shfl_sync(FULL, taken[h], 31);
        all_ties[h] = __shfl_sync(FULL, ties[h], 31);
    }
    int total = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) total += all_taken[j / 4] >> (8 * (j % 4)) & 255;
    int quota = k - total;

    int taken_before = 0, ties_before = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int h = j / 4, shift = 8 * (j % 4);
        int t = taken_before + ((taken[h] - own_taken[h]) >> shift & 255);
        int e = ties_before + ((ties[h] - own_ties[h]) >> shift & 255);
        uint4 v = x.four(j);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = magnitude(word(v, i));
            bool is_taken = key > above;
            bool is_tie = !is_taken && key >= least;
            if (is_taken || (is_tie && e < quota))
                list[t + min(e, quota)] = Salient{start + 128 * j + 4 * lane + i, __uint_as_float(word(v, i))};
            t += is_taken;
            e += is_tie;
        }
        taken_before += all_taken[h] >> shift & 255;
        ties_before += all_ties[h] >> shift & 255;
    }
}

// What a lane brings to bucket selection; it does not depend on earlier kernels.
__device__ __forceinline__ int own_edge(const Dec& dec) { return dec.edges[threadIdx.x % 32]; }

// How many channels chunk `c` gives.
__device__ __forceinline__ int chunk_quota(const Dec& dec, int c) {
    return dec.k_chunk * min(CHUNK, dec.in_features - c * CHUNK) / CHUNK;
}

// Activations from device memory, copied once for the warp that selects among them: 4 KB per warp.
template <class T, class Read>
struct Copied {
    u32 values;
    Read read; // read(i): four activations

    __device__ __forceinline__ Chunk operator()(int start, int len) const {
        int lane = threadIdx.x % 32;
        Chunk x{values + T::warp() * (CHUNK * 4) + lane * 16};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int i = 128 * j + 4 * lane;
            x.put(j, i < len ? read(start + i) : make_float4(0, 0, 0, 0));
        }
        return x;
    }
};

template <class T, class Read>
__device__ __forceinline__ Copied<T, Read> copied(void* values, Read read) {
    return Copied<T, Read>{shared_address(values), read};
}

// Activations that are in shared memory already, zeros up to a whole chunk.
struct InPlace {
    u32 values;
    __device__ __forceinline__ Chunk operator()(int start, int) const {
        return Chunk{values + start * 4 + threadIdx.x % 32 * 16};
    }
};

// Selects chunks `first` to `last` into `list`.
template <class T, class Source>
__device__ __forceinline__ void select_chunks(const Dec& dec, int edge, int first, int last, Salient* list,
                                              Source source) {
    for (int c = first + T::warp(); c < last; c += T::size / 32) {
        int start = c * CHUNK;
        int k = chunk_quota(dec, c);
        Chunk x = source(start, min(CHUNK, dec.in_features - start));
        if (k > 0) select_chunk(x, start, k, dec, edge, list + (c - first) * dec.k_chunk);
    }
}

// Host memory is read once and never again.
template <int WORDS>
__device__ __forceinline__ void load_words(u32 (&w)[WORDS], const u32* p) {
    if constexpr (WORDS == 4)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                     : "l"(p));
    else if constexpr (WORDS == 2)
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    else
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
}

// acc[i] += q_i · x for the eight rows of a word. 0x4b0000nn is 2^23 + nn as f32, so q is exact.
__device__ __forceinline__ void add_word(float* acc, u32 word, float x) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float q = __uint_as_float(and_or(word >> (4 * i), 15u, 0x4b000000u)) - 8388616.0f;
        acc[i] = fmaf(q, x, acc[i]);
    }
}

// Channels in flight per thread.
#ifndef DEC_FLIGHT
#define DEC_FLIGHT 4
#endif

// Adds channels first, first + step, … of the list to `acc`, DEC_FLIGHT of them in flight.
template <int WORDS>
__device__ __forceinline__ void add_channels(const Salient* list, int first, int n, int step, const u32* column,
                                             int words, float (&acc)[8 * WORDS]) {
    for (int i = first; i < n; i += step * DEC_FLIGHT) {
        u32 w[DEC_FLIGHT][WORDS];
        float x[DEC_FLIGHT];
#pragma unroll
        for (int f = 0; f < DEC_FLIGHT; f++) {
            if (i + f * step < n) {
                Salient s = list[i + f * step];
                x[f] = s.x;
                load_words<WORDS>(w[f], column + (long long)s.channel * words);
            }
        }
#pragma unroll
        for (int f = 0; f < DEC_FLIGHT; f++)
            if (i + f * step < n)
#pragma unroll
                for (int j = 0; j < WORDS; j++) add_word(acc + 8 * j, w[f][j], x[f]);
    }
}

// The stripe of block `block` of n_tb, in pieces of WORDS words: whole lines of 128 bytes, or halves of them and so on
// where there are not enough, since others cross the link in more requests (H200, 4096 × 28672, k_chunk 512, 132 blocks: 31
// GB/s where they began anywhere; layers.cu with 20 blocks: 427 tokens/s, 514 so).
struct Stripe {
    int begin, end;

    template <int WORDS>
    static __device__ __forceinline__ Stripe of(int pieces, int block, int n_tb) {
        int line = 32 / WORDS;
        while (line > 1 && pieces < line * n_tb) line /= 2;
        int lines = (pieces + line - 1) / line;
        return Stripe{min(lines * block / n_tb * line, pieces), min(lines * (block + 1) / n_tb * line, pieces)};
    }
};

// Block `block` of n_tb computes its stripe: out[row] = (ONTO ? out[row] : 0) + s·Σ q·x.
// `shared` holds list_chunks·k_chunk Salients, then 8·WORDS·(threads + 1) floats.
// `listed`, unless null, is the selection, made by an earlier kernel.
template <class T, int WORDS, bool ONTO, class Source>
__device__ __forceinline__ void compensate(const Dec& dec, int edge, int block, char* shared, float* out,
                                           const Salient* listed, Source source) {
    constexpr int THREADS = T::size;
    Salient* list = (Salient*)shared;
    float* sums = (float*)(list + dec.list_chunks * dec.k_chunk);
    int tid = T::thread();
    int words = dec.out_features / 8;
    int chunks = (dec.in_features + CHUNK - 1) / CHUNK;
    int pieces = words / WORDS;
    Stripe stripe = Stripe::of<WORDS>(pieces, block, dec.n_tb);

    for (int p0 = stripe.begin; p0 < stripe.end; p0 += THREADS) {
        // Threads form `slots` teams of `width`; each team takes every slots-th channel, each member a piece.
        int width = min(stripe.end - p0, THREADS), slots = THREADS / width;
        int piece = tid % width, slot = tid / width;
        const u32* column = dec.residual + (long long)(p0 + piece) * WORDS;
        // The scale of the first row that this thread will finish, fetched early.
        float own_scale = tid < width * 8 * WORDS ? dec.scales[p0 * 8 * WORDS + tid] : 0.0f;

        for (int c = 0; c < chunks; c += dec.list_chunks) {
            int last = min(c + dec.list_chunks, chunks);
            if (!listed) {
                select_chunks<T>(dec, edge, c, last, list, source);
                T::sync();
            }
            int n = (last - c - 1) * dec.k_chunk + chunk_quota(dec, last - 1);
            float acc[8 * WORDS];
#pragma unroll
            for (int i = 0; i < 8 * WORDS; i++) acc[i] = 0;
            const Salient* from = listed ? listed + c * dec.k_chunk : list;
            if (slot < slots) add_channels<WORDS>(from, slot, n, slots, column, words, acc);
#pragma unroll
            for (int i = 0; i < 8 * WORDS; i++) {
                float* sum = sums + i * (THREADS + 1) + tid;
                *sum = c == 0 ? acc[i] : *sum + acc[i];
            }
            T::sync();
        }

        // Teams are added in order, one thread per row.
        for (int r = tid; r < width * 8 * WORDS; r += THREADS) {
            int i = r % (8 * WORDS), p = r / (8 * WORDS);
            float sum = 0;
            for (int s = 0; s < slots; s++) sum += sums[i * (THREADS + 1) + s * width + p];
            int row = p0 * 8 * WORDS + r;
            float value = (r == tid ? own_scale : dec.scales[row]) * sum;
            out[row] = ONTO ? out[row] + value : value;
        }
        T::sync();
    }
}
