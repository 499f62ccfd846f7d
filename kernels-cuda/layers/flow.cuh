// Vectors from block to block without barriers: a word that nobody has written yet says so, and whoever needs it asks
// until it is there. So a number is on its way once, instead of behind a fence, a count and the question for the count.
//
// Who waits for several words asks for all of them at once, again and again: one that came late costs no way of its own.
//
// A missing word is all ones: a NaN that no sum or product is. Words are written once; sets of vectors take turns from layer
// to layer, and one is made missing again while others are in use. Loads and stores are single words at
// the second-level cache, so what they bring is complete.
#pragma once
#include "patience.cuh"

#define MISSING 0xffffffffu

// An RMSNorm's weights, or null where there is none, and what is added to the mean square.
struct Norm {
    const float* gamma;
    float eps;
};

__device__ __forceinline__ bool missing(float v) { return __float_as_uint(v) == MISSING; }

__device__ __forceinline__ void put(u32* to, u32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// A number as it is written: a NaN as the one that sums give.
__device__ __forceinline__ u32 to_word(float v) { return missing(v) ? 0x7fffffffu : __float_as_uint(v); }

__device__ __forceinline__ void put(float* to, float v) { put((u32*)to, to_word(v)); }

// Two in one store, aligned to 8 bytes.
__device__ __forceinline__ void put2(float* to, float x, float y) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(to_word(x)), "r"(to_word(y)) : "memory");
}

// Four, aligned to 16 bytes.
__device__ __forceinline__ void put4(float* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 ask4(const void* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ float ask1(const float* from) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ int ask1(const int* from) { return __float_as_int(ask1((const float*)from)); }

__device__ __forceinline__ bool is_there(uint4 v) {
    return (v.x != MISSING) & (v.y != MISSING) & (v.z != MISSING) & (v.w != MISSING);
}

__device__ __forceinline__ float4 as_floats(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// A number in three parts as they were when they were asked for.
struct Asked {
    float a, b, c;

    __device__ __forceinline__ bool there() const { return !missing(a) & !missing(b) & !missing(c); }
    __device__ __forceinline__ float sum() const { return a + b + c; }
};

// Four of them.
struct Asked4 {
    uint4 a, b, c;

    __device__ __forceinline__ bool there() const { return is_there(a) & is_there(b) & is_there(c); }
    __device__ __forceinline__ float4 sum() const { return add4(add4(as_floats(a), as_floats(b)), as_floats(c)); }
};

// A vector in up to three parts, others than the first or null: what a product multiplied, what a compensation adds,
// and what one block has of another's rows.
struct Sum {
    const float* x;
    const float* first;
    const float* second;

    __device__ __forceinline__ Asked ask(int i) const {
        Asked v = {ask1(x + i), 0, 0};
        if (first) v.b = ask1(first + i);
        if (second) v.c = ask1(second + i);
        return v;
    }

    // Four of which nothing is there yet.
    __device__ __forceinline__ Asked4 nothing_yet() const {
        uint4 none = make_uint4(MISSING, MISSING, MISSING, MISSING), zeros = make_uint4(0, 0, 0, 0);
        return Asked4{none, first ? none : zeros, second ? none : zeros};
    }

    // Asks for those parts of numbers i to i + 3 that are missing: all blocks ask at once, and the second-level cache has
    // to answer all.
    __device__ __forceinline__ void ask_missing(int i, Asked4& v) const {
        if (!is_there(v.a)) v.a = ask4(x + i);
        if (first && !is_there(v.b)) v.b = ask4(first + i);
        if (second && !is_there(v.c)) v.c = ask4(second + i);
    }
};

// Eight consecutive channels of a vector.
struct Eights {
    float4 a, b;

    static __device__ __forceinline__ Eights at(const float* x) { return Eights{*(const float4*)x, *(const float4*)(x + 4)}; }

    __device__ __forceinline__ void to(float* x) const { *(float4*)x = a, *(float4*)(x + 4) = b; }

    __device__ __forceinline__ float squares() const {
        return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    }

    __device__ __forceinline__ void add(const Eights& other) { a = add4(a, other.a), b = add4(b, other.b); }

    __device__ __forceinline__ void scale(float s, const Eights& w) {
        a = make_float4(a.x * s * w.a.x, a.y * s * w.a.y, a.z * s * w.a.z, a.w * s * w.a.w);
        b = make_float4(b.x * s * w.b.x, b.y * s * w.b.y, b.z * s * w.b.z, b.w * s * w.b.w);
    }

    __device__ __forceinline__ float operator[](int i) const {
        const float4& v = i < 4 ? a : b;
        return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
    }
};

// Eight 16-bit numbers of DTYPE.
__device__ __forceinline__ Eights widened(uint4 v) {
    auto low = [](u32 w) { return widen((u16)w); };
    auto high = [](u32 w) { return widen((u16)(w >> 16)); };
    return Eights{make_float4(low(v.x), high(v.x), low(v.y), high(v.y)),
                  make_float4(low(v.z), high(v.z), low(v.w), high(v.w))};
}

// The same of a vector in parts, as they were when they were asked for. What is past a vector's end is there: zeros.
struct AskedEights {
    Asked4 a, b;

    static __device__ __forceinline__ AskedEights nothing_yet(const Sum& x) {
        return AskedEights{x.nothing_yet(), x.nothing_yet()};
    }

    // Asks for those parts of channels k to k + 7 that are missing.
    __device__ __forceinline__ void ask_missing(const Sum& x, int k) { x.ask_missing(k, a), x.ask_missing(k + 4, b); }
    __device__ __forceinline__ bool there() const { return a.there() & b.there(); }
    __device__ __forceinline__ Eights sum() const { return Eights{a.sum(), b.sum()}; }
};

// Channels k to k + 7 of `len` as they are; zeros past the end.
__device__ __forceinline__ AskedEights ask_eights(const Sum& x, int k, int len) {
    if (k >= len) return AskedEights{};
    AskedEights v = AskedEights::nothing_yet(x);
    v.ask_missing(x, k);
    return v;
}

// The same, waited for.
__device__ __forceinline__ Eights await_eights(const Sum& x, int k, AskedEights asked) {
    Patience patience;
    while (patience.goes_on(asked.there())) asked.ask_missing(x, k);
    return asked.sum();
}
