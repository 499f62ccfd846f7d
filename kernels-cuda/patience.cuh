// How long a block may wait for another. What it waits for comes within microseconds or never: a block that is not there, a
// number that nobody writes. Then the launch ends with an error that the host sees, instead of never.
#pragma once
#include "common.cuh"

// Most rounds of asking: seconds, since one takes most of a microsecond. Not a time: a device that others use as well may
// leave a block alone for longer, and then it asks nothing.
#define MOST_ROUNDS (1u << 22)

// One wait. A counter is all that it costs.
struct Patience {
    u32 rounds;

    __device__ __forceinline__ Patience() : rounds(0) {}

    // Ends a round, as long as `LENGTH` of others: whether there is another.
    template <u32 LENGTH = 1>
    __device__ __forceinline__ bool goes_on(bool there) {
        if (there) return false;
        rounds += LENGTH;
        // Without a branch, of which there would be one more in every loop.
        asm volatile("{ .reg .pred over; setp.ge.u32 over, %0, %1; @over trap; }" ::"r"(rounds), "n"(MOST_ROUNDS));
        return true;
    }
};
