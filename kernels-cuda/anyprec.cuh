// Codes of one codebook per row, W[row, k] = lut[row, code(row, k)] (spec §2.1), to operands: BITS 3 or 4.
//
//   codes  units of 256 channels. Nibble n of a word: rows g (n < 4) and g + 8 (n ≥ 4), channel 4·odd + n % 4 of
//          lane t's eight, where `odd` is the word's place in a pair of products.
//          4 bits: vector v holds products 4·v to 4·v + 3.
//          3 bits: word i of vectors 0, 1, 2 holds products 4·i, 4·i + 1, 4·i + 2, and in the spare bits of its
//          nibbles bits 0, 1, 2 of product 4·i + 3.
//   aux    the codebooks of a tile as bytes, [16 rows][2^BITS low bytes, then 2^BITS high bytes]
//
// Codes are looked up four at a time by byte permutation, in registers: no table in shared memory. Permutations, masks
// and shifts share one pipe, which bounds everything here (H100: 172 such instructions a unit at 3 bits, each two
// cycles); what can be said as a multiplication goes to the other one.
#pragma once
#if BITS == 3
#define VECTORS 3
#else
#define VECTORS 4
#endif
#define UNIT 256
#define AUX_BYTES (16 * 2 * (1 << BITS))
#define AUX_PER_UNIT 0
#define GROUP 256

#include "common.cuh"

// w >> 16 as a sum of products, w's halves by the bytes of 0x0100.
__device__ __forceinline__ u32 upper(u32 w) {
    u32 d;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(0x0100), "r"(0));
    return d;
}

// Four codes of a row to two pairs of centroids.
__device__ __forceinline__ void look_up(uint4 book, u32 codes, u32& first, u32& second) {
    u32 lo = prmt(book.x, book.y, codes), hi = prmt(book.z, book.w, codes);
    first = prmt(lo, hi, 0x5140);
    second = prmt(lo, hi, 0x7362);
}

// The top bit of a code says which half of the codebook its byte comes from.
__device__ __forceinline__ void look_up(uint4 lows, uint4 highs, u32 codes, u32 halves, u32& first, u32& second) {
    u32 lo = prmt(prmt(lows.x, lows.y, codes), prmt(lows.z, lows.w, codes), halves);
    u32 hi = prmt(prmt(highs.x, highs.y, codes), prmt(highs.z, highs.w, codes), halves);
    first = prmt(lo, hi, 0x5140);
    second = prmt(lo, hi, 0x7362);
}

struct Book {
    __device__ __forceinline__ Book() {}
#if BITS == 3
    uint4 low, high; // of rows g and g + 8
    __device__ __forceinline__ explicit Book(const uint4* books) {
        low = books[threadIdx.x % 32 / 4], high = books[threadIdx.x % 32 / 4 + 8];
    }
    __device__ __forceinline__ void operator()(u32 codes, u32* a) const {
        look_up(low, codes, a[0], a[2]);
        look_up(high, upper(codes), a[1], a[3]);
    }
#else
    uint4 low0, low1, high0, high1;
    __device__ __forceinline__ explicit Book(const uint4* books) {
        int row = threadIdx.x % 32 / 4 * 2;
        low0 = books[row], low1 = books[row + 1], high0 = books[row + 16], high1 = books[row + 17];
    }
    __device__ __forceinline__ void operator()(u32 codes, u32* a) const {
        u32 half = codes & 0x77777777u, which = and_or(codes >> 1, 0x44444444u, 0x32103210u);
        look_up(low0, low1, half, which, a[0], a[2]);
        look_up(high0, high1, upper(half), upper(which), a[1], a[3]);
    }
#endif
};

// Hands on the operands of two products at a time: operands(p, a) with channels 32·p to 32·p + 31. When this lane has
// read its codes, taken().
template <class Operands, class Taken>
__device__ __forceinline__ void expand(const uint4* codes, const Book& centroids, Operands operands, Taken taken) {
    int lane = threadIdx.x % 32;
#if BITS == 3
    uint4 a = codes[lane], b = codes[32 + lane], c = codes[64 + lane];
    taken();
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 3
        uint4 w = make_uint4(word(a, i), word(b, i), word(c, i), 0);
        u32 x = w.x & 0x88888888u, y = w.y & 0x88888888u, z = w.z & 0x88888888u;
        w.w = x >> 3 | y >> 2 | z >> 1;
        w.x -= x, w.y -= y, w.z -= z;
#else
        uint4 w = codes[32 * i + lane];
        if (i == 3) taken();
#endif
        u32 even[8], odd[8];
        centroids(w.x, even);
        centroids(w.y, even + 4);
        operands(2 * i, even);
        centroids(w.z, odd);
        centroids(w.w, odd + 4);
        operands(2 * i + 1, odd);
    }
}
