// Holds multiprocessors: a card with fewer of them is what is left. They may read memory meanwhile, so that less of it is
// left, too.
#include "common.cuh"

// Every block, launched with all the shared memory of a multiprocessor so that nothing runs beside it, says
// arrived[blockIdx.x] = 1 in mapped host memory and waits until *end, on the device, is not 0, or until most_ns nanoseconds
// have passed, whatever becomes of the host. (An end in host memory, asked for by 86 blocks every 100 µs, made a product on
// the other 46 take two and a half times as long, H200.) With `cycles` above 0 it reads 64 KB of from[0 .. count) in every so
// many clock cycles, as long as memory keeps up, and has twice as much on its way. One grid of at most as many blocks as
// multiprocessors; out[0] is never written.
extern "C" __global__ void __launch_bounds__(1024) occupy(const u32* end, volatile u32* arrived, u64 most_ns, const uint4* from,
                                                          u64 count, u64 cycles, u32* out) {
    constexpr int FLIGHT = 4, TURNS = 8;
    constexpr u64 PIECE = 1024 * FLIGHT;
    u64 start, now, pieces = count / PIECE, piece = blockIdx.x * (pieces / gridDim.x);
    u32 ended, sum = 0;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    if (threadIdx.x == 0) {
        arrived[blockIdx.x] = 1;
        __threadfence_system();
    }
    auto ask = [&](uint4(&words)[FLIGHT]) {
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) words[j] = __ldcs(from + piece * PIECE + j * 1024 + threadIdx.x);
        piece = piece + 1 >= pieces ? 0 : piece + 1;
    };
    auto take = [&](const uint4(&words)[FLIGHT]) {
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) sum ^= words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
    };
    long long next = clock64();
    // What memory could not keep up with is not made up for.
    auto pause = [&] {
        next = max(next + (long long)cycles, clock64());
        while (clock64() < next) {}
    };
    do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(ended) : "l"(end) : "memory");
        if (cycles > 0) {
            uint4 odd[FLIGHT], even[FLIGHT];
            ask(even);
#pragma unroll 1
            for (int i = 0; i < TURNS; i++) {
                ask(odd);
                take(even), pause();
                ask(even);
                take(odd), pause();
            }
            take(even), pause();
        } else {
            __nanosleep(100000);
        }
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (!__syncthreads_or(ended != 0 || now - start >= most_ns));
    if (sum == 1) out[0] = 1;
}
