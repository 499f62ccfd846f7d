// How long a block may wait for another. What it waits for comes within microseconds or never: a block that is not there, a
// number that nobody writes. Then the launch ends with an error that the host sees, instead of never.
#pragma once
#include "common.cuh"

// Most rounds of asking: seconds, since one takes most of a microsecond. Not a time: a device that others use as well may
// leave a block alone for longer, and then it asks nothing.
#define MOST_ROUNDS (1u << 22)

// One wait, of a thread or of a warp. A counter is all that it costs.
struct Patience {
    u32 rounds;

    __device__ __forceinline__ Patience() : rounds(0) {}

    // Ends a round of this thread's, as long as `LENGTH` of others: whether there is another.
    template <u32 LENGTH = 1>
    __device__ __forceinline__ bool goes_on(bool there) {
        if (there) return false;
        count<LENGTH>();
        return true;
    }

    // Ends a round of a whole warp, which goes on until all of its threads have what they wait for: its counter is one for
    // the warp, which leaves each thread a register.
    __device__ __forceinline__ bool warp_goes_on(bool there) {
        if (__all_sync(FULL, there)) return false;
        count<1>();
        return true;
    }

private:
    template <u32 LENGTH>
    __device__ __forceinline__ void count() {
        rounds += LENGTH;
        // Without a branch, of which there would be one more in every loop.
        asm volatile("{ .reg .pred over; setp.ge.u32 over, %0, %1; @over trap; }" ::"r"(rounds), "n"(MOST_ROUNDS));
    }
};
