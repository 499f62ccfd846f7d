// How the blocks of one launch wait for each other: all of them at once are on the device (a cooperative launch).
//
// Counts are u32 in device memory and only grow; they are compared by their difference, so they may wrap around.
// Constants: BLOCKS; `All` is the team of a block's threads.
#pragma once
#include "patience.cuh"

// What this thread has seen is there for whoever sees the count.
__device__ __forceinline__ void arrive(u32* arrived) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
}

__device__ __forceinline__ void note_time(u64* to) {
    if (!to) return;
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    *to = now;
}

// Until the count has come to `target`. Not inlined: it is called once, while whoever calls it has all registers in use.
__device__ __noinline__ void wait_for_count(const u32* arrived, u32 target) {
    u32 now;
    Patience patience;
    do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    } while (patience.goes_on((int)(now - target) >= 0));
}

// All blocks wait for all; what any of them wrote before is visible after. Threads of the block call together.
struct Grid {
    u32* arrived;
    u32 target;
    u64* stamps;
    int stamped;

    // Where the next time goes, if this thread notes it.
    __device__ __forceinline__ u64* here() const {
        return stamps && blockIdx.x == 0 && threadIdx.x == 0 ? stamps + stamped : nullptr;
    }

    __device__ __forceinline__ void stamp() {
        note_time(here());
        stamped++;
    }

    __device__ __forceinline__ void sync() {
        All::sync();
        target += BLOCKS;
        if (threadIdx.x == 0) {
            arrive(arrived);
            wait_for_count(arrived, target);
            // Not __threadfence(), which waits for what a block still fetches from the host as well.
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
        }
        All::sync();
    }
};
