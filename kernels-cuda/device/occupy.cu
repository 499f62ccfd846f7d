// Holds multiprocessors: a card with fewer of them is what is left.
#include "common.cuh"

// Every block, launched with all the shared memory of a multiprocessor so that nothing runs beside it, says
// arrived[blockIdx.x] = 1 in mapped host memory and waits until *end, on the device, is not 0, or until most_ns nanoseconds
// have passed, whatever becomes of the host. (An end in host memory, asked for by 86 blocks every 100 µs, made a product on
// the other 46 take two and a half times as long, H200.) One warp; any grid of at most as many blocks as multiprocessors.
extern "C" __global__ void __launch_bounds__(32) occupy(const u32* end, volatile u32* arrived, u64 most_ns) {
    if (threadIdx.x != 0) return;
    u64 start, now;
    u32 ended;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    arrived[blockIdx.x] = 1;
    __threadfence_system();
    do {
        __nanosleep(100000);
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(ended) : "l"(end) : "memory");
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (ended == 0 && now - start < most_ns);
}
