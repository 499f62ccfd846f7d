// What every kernel shares: number types without CUDA's headers, warp sums, asynchronous copies, tensor-core
// products, and the two instructions of programmatic dependent launch.
//
// DTYPE (0 float16, 1 bfloat16, 2 float32) is the type that weights and activations are multiplied in. Vectors
// between kernels are always f32.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef DTYPE
#define DTYPE 0
#endif

#define FULL 0xffffffffu

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// What float16 ends with. Numbers beyond it, infinities too, become it, in every type that has 16 bits its own end; NaN
// stays NaN. An infinity would be a NaN one product later.
#define HALF_MOST 65504.0f

__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.satfinite.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ float bfloat_to_float(u16 h) { return __uint_as_float((u32)h << 16); }

__device__ __forceinline__ u16 float_to_bfloat(float f) {
    u16 h;
    asm("cvt.rn.satfinite.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// A number of DTYPE's 16-bit kinds.
__device__ __forceinline__ float widen(u16 h) { return DTYPE == 1 ? bfloat_to_float(h) : half_to_float(h); }
__device__ __forceinline__ u16 narrow(float f) { return DTYPE == 1 ? float_to_bfloat(f) : float_to_half(f); }

// Two numbers, `lo` in the lower half.
__device__ __forceinline__ u32 narrow2(float lo, float hi) {
    u32 d;
    if (DTYPE == 1)
        asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}

// A word of the host's, which it looks at when it reads a token: numbers lost their size.
__device__ __forceinline__ void note_beyond(u32* beyond) { *(volatile u32*)beyond = 1; }

// Whether numbers that were narrowed lost their size. bfloat16 holds whatever f32 does.
struct Beyond {
    u32 most; // two numbers of float16, the largest so far

    __device__ __forceinline__ Beyond() : most(0) {}

    // Two more, narrowed.
    __device__ __forceinline__ void add(u32 two) {
        if (DTYPE == 0) asm("{ .reg .b32 a; abs.f16x2 a, %1; max.f16x2 %0, %0, a; }" : "+r"(most) : "r"(two));
    }

    __device__ __forceinline__ void tell(u32* beyond) const {
        if (DTYPE == 0 && ((most & 0xffff) >= 0x7bff || most >> 16 >= 0x7bff)) note_beyond(beyond);
    }

};

// a·b + c of two numbers each.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    if (DTYPE == 1)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// (a & mask) | c, one instruction.
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
    return d;
}

// Word i of a vector, i a constant.
__device__ __forceinline__ u32 word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// d += A·B of a 16 × 16 and a 16 × 8 tile, f32 sums.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (DTYPE == 1)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += A·B of a 16 × 32 and a 32 × 8 tile of bytes, B signed, exact sums.
template <bool SIGNED>
__device__ __forceinline__ void mma_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (SIGNED)
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies 16 bytes to shared memory, past the first-level cache.
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Everything that earlier kernels wrote is visible after this. Every thread of every kernel calls it, so that
// "the previous kernel is complete" includes all before it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start as soon as every block of this one has said so (and there is room).
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(FULL, v, d);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(FULL, v, d));
    return v;
}

__device__ __forceinline__ u32 warp_count(u32 v) {
    u32 d;
    asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(v));
    return d;
}

// threadIdx.x, read anew: in a kernel of many phases, what is computed from it is not kept in registers between them.
__device__ __forceinline__ int this_thread() {
    int t;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(t));
    return t;
}

__device__ __forceinline__ u32 this_lane() { return (u32)this_thread() % 32; }

// SIZE threads of a block from thread FIRST on, that wait for each other at a barrier of their own.
template <int FIRST, int SIZE, int BARRIER>
struct Team {
    static constexpr int size = SIZE;
    static __device__ __forceinline__ int thread() { return this_thread() - FIRST; }
    static __device__ __forceinline__ int warp() { return thread() / 32; }
    static __device__ __forceinline__ void sync() { asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(SIZE) : "memory"); }
};

// The sum over a team, the same bits in each thread; `scratch` holds one number per warp.
template <class T>
__device__ __forceinline__ float team_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (T::thread() % 32 == 0) scratch[T::warp()] = v;
    T::sync();
    float sum = 0;
#pragma unroll
    for (int w = 0; w < T::size / 32; w++) sum += scratch[w];
    return sum;
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Four numbers of a vector of which a part may still lie beside it: a compensation not yet added. Past the
// first-level cache: other multiprocessors may have written them since this one looked last.
__device__ __forceinline__ float4 load4(const float* x, const float* delta, int i) {
    float4 v = __ldcg((const float4*)(x + i));
    return delta ? add4(v, __ldcg((const float4*)(delta + i))) : v;
}

__device__ __forceinline__ float load1(const float* x, const float* delta, int i) {
    return delta ? __ldcg(x + i) + __ldcg(delta + i) : __ldcg(x + i);
}

// What gate goes through before it multiplies up, as src/backend/kernels.rs numbers it.
#define SILU 0
#define GELU_TANH 1

// x / (1 + e^−z), where z is x for SiLU, and 2·√(2/π)·(x + 0.044715·x³) for the form of GELU that a tanh makes.
__device__ __forceinline__ float activated(float x, int activation) {
    float z = activation == GELU_TANH ? 1.5957691f * (x + 0.044715f * x * x * x) : x;
    return x / (1.0f + expf(-z));
}

__device__ __forceinline__ float4 gated4(float4 gate, float4 up, int activation) {
    return make_float4(activated(gate.x, activation) * up.x, activated(gate.y, activation) * up.y,
                       activated(gate.z, activation) * up.z, activated(gate.w, activation) * up.w);
}
