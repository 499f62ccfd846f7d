// Holds multiprocessors: a card with fewer of them is what is left.
#include "common.cuh"

// Every block, launched with all the shared memory of a multiprocessor so that nothing runs beside it, says
// arrived[blockIdx.x] = 1 and waits until *end is not 0, or until most_ns nanoseconds have passed, whatever becomes of
// the host. Both are in mapped host memory. One warp; any grid of at most as many blocks as multiprocessors.
extern "C" __global__ void __launch_bounds__(32) occupy(volatile u32* end, volatile u32* arrived, u64 most_ns) {
    if (threadIdx.x != 0) return;
    u64 start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    arrived[blockIdx.x] = 1;
    __threadfence_system();
    do {
        __nanosleep(100000);
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (*end == 0 && now - start < most_ns);
}
