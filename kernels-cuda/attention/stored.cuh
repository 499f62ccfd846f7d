// How a text's keys and values lie in the cache: in KV's type, 0 float16, 1 bfloat16, 2 float32, or 3: bytes, and for each
// head of each position a step of its own.
//
//   keys, values  of a layer [KV_HEADS, capacity, HEAD_DIM], and behind them, of bytes, f32 [KV_HEADS, capacity] steps
//
// A byte is 128 more than the number's multiple of the step, −127 to 127, which is the head's largest number over 127,
// rounded to the nearest. Multiples are exact in either 16-bit type: products are of them, and steps come after.
//
// The capacity is a multiple of TILE positions, and tiles begin at such multiples: a tile lies in the cache as one piece.
// Where there is no window it is all of max_seq_len, otherwise a ring, of the window and of the most rows that a text has in
// a pass: position p lies in place p mod capacity, and what a pass appends replaces nothing that one of its rows sees.
#pragma once
#include "common.cuh"

// Positions that lie in the cache as one piece, whatever the ring; they share a maximum and a sum (attend.cuh).
#define TILE 16
#define IN_BYTES (KV == 3)

#if KV == 3
typedef u8 Stored;
#elif KV == 2
typedef float Stored;
#else
typedef u16 Stored;
#endif

// Of numbers that are stored as they are.
__device__ __forceinline__ Stored to_stored(float f) {
#if KV == 2
    return f;
#elif KV == 1
    return float_to_bfloat(f);
#else
    return (Stored)float_to_half(f);
#endif
}

// What a number adds to its head's largest: one that is none makes the step infinite, and whatever it enters NaN.
__device__ __forceinline__ float size_of(float f) {
    float size = fabsf(f);
    return size < INFINITY ? size : INFINITY;
}

// A head's step, by its largest number.
struct Step {
    float step, inverse;

    __device__ __forceinline__ explicit Step(float most)
        : step(__fdiv_rn(most, 127.0f)), inverse(most > 0 ? __fdiv_rn(127.0f, most) : 0.0f) {}

    __device__ __forceinline__ u8 byte(float f) const {
        return (u8)(max(-127, min(127, __float2int_rn(__fmul_rn(f, inverse)))) + 128);
    }
};

// A key-value head's part of a layer's cache while a token at `position` reads it: what it sees begins in this turn of the ring
// or in the one before.
struct Cache {
    Stored *keys, *values;
    int turn, capacity, kv;

    __device__ __forceinline__ Cache(void* all_keys, void* all_values, int capacity, bool ring, int kv, int position)
        : keys((Stored*)all_keys + (long long)kv * capacity * HEAD_DIM),
          values((Stored*)all_values + (long long)kv * capacity * HEAD_DIM),
          turn(ring ? position - position % capacity : 0), capacity(capacity), kv(kv) {}

    // The place of a position in the ring.
    __device__ __forceinline__ int place(int position) const {
        int place = position - turn;
        return place < 0 ? place + capacity : place;
    }

    // Where the first number of a position is.
    __device__ __forceinline__ long long at(int position) const { return (long long)place(position) * HEAD_DIM; }

    // The steps of this head's positions, of its keys or its values.
    __device__ __forceinline__ float* steps(const Stored* numbers) const {
        return (float*)(numbers + (long long)(KV_HEADS - kv) * capacity * HEAD_DIM) + (long long)kv * capacity;
    }
    __device__ __forceinline__ float* key_steps() const { return steps(keys); }
    __device__ __forceinline__ float* value_steps() const { return steps(values); }
};
