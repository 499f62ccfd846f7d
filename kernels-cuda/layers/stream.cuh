// Weights as a stream: each warp's units of one matrix after the other, copied ahead of their use into the warp's own
// ring of shared memory. The stream does not stop where a matrix ends: while a block waits for
// activations, the ring fills with what it will multiply next.
//
// A lane copies the codes that it will read itself, and asks for a slot's next ones as soon as it has read it: no lane
// waits for another, and no product for a request (H100, 3-bit Llama-3-8B: 582 tokens/s when one lane had the bulk copy
// engine bring a unit after the last product with it, 606 so).
#pragma once
#include "patience.cuh"
#include "unit.cuh"

// A unit in the ring: its codes, and what comes with each unit.
#define SLOT (AUX_PER_UNIT ? STAGE_BYTES : VECTORS * 512)
// What createpolicy.fractional.L2::evict_first makes of 1.0. Weights are read once a token: the second-level cache
// keeps other things.
#define EVICT_FIRST 0x12f0000000000000ull

// A matrix on its way: which of its units, tile after tile, this block multiplies.
struct Route {
    int begin, end;
    int first_tile, tiles; // of which the block has units
    int offset;            // of its first unit in its tile
};

// `arrivals`: how many a phase takes.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals = 1) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// This thread arrives once all copies that it has asked for are there.
__device__ __forceinline__ void barrier_arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    Patience patience;
    u32 full;
    do {
        asm volatile(
            "{\n"
            ".reg .pred full;\n"
#if __CUDA_ARCH__ >= 900
            // The instruction itself waits, for a quarter of a millisecond at most.
            "mbarrier.try_wait.parity.shared.b64 full, [%1], %2, 250000;\n"
#else
            "mbarrier.test_wait.parity.shared.b64 full, [%1], %2;\n"
#endif
            "selp.u32 %0, 1, 0, full;\n"
            "}\n"
            : "=r"(full)
            : "r"(barrier), "r"(phase)
            : "memory");
    } while (patience.goes_on<256>(full));
}

// `bytes` from one thread, which `barrier` counts.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}

__device__ __forceinline__ void copy_once(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(EVICT_FIRST)
                 : "memory");
}

// Where a warp's stream is: `Table` says where the matrices are (codes(m), aux(m)), routes[m % ROUTES] which part. A
// warp's next unit lies WARPS further on.
//
// Shared memory from `rings` on: slots [WARPS, STAGES], the block's codebooks of three matrices in turn [3, BOOKS bytes]
// (where a tile has some; while one is multiplied, some warps may still be at the one before, and the next one's are on
// their way), their mbarriers [3].
template <int ROUTES, class Table>
struct Stream {
    static constexpr int BARRIERS = WARPS * STAGES * SLOT + 3 * BOOKS;
    static constexpr int BYTES = BARRIERS + 3 * 8;

    const Route* routes;
    Table table;
    u32 rings;
    int matrices;
    // The next unit to be asked for, this lane's bytes of it, and how many are left of the matrix.
    int matrix, left;
    const char* codes;
    const char* aux;
    // This lane's place in the slot to be used next, in bytes from `rings`, and behind the warp's last slot.
    u32 at, end;

    // Before anything else, by one warp; all wait for it.
    static __device__ __forceinline__ void init(u32 rings) {
        int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
        if (lane < 3) barrier_init(rings + BARRIERS + lane * 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
        if (lane < 3) barrier_init(rings + BARRIERS + lane * 8, 32);
#endif
    }

    __device__ __forceinline__ Stream(Table table, const Route* routes, int matrices, u32 rings)
        : routes(routes), table(table), rings(rings), matrices(matrices), matrix(-1), left(0),
          at(threadIdx.x / 32 * (STAGES * SLOT) + threadIdx.x % 32 * 16), end(at + STAGES * SLOT) {
        next_matrix();
        if (threadIdx.x < 32) ask_books(0);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) {
            ask_codes(rings + at + i * SLOT);
            ask_rest(rings + at + i * SLOT);
        }
    }

    // The first of a block's units that is a warp's: units of a matrix go round the warps.
    static __device__ __forceinline__ int first_unit(const Route& r, int warp) {
        int ahead = warp - r.begin % WARPS;
        return r.begin + (ahead < 0 ? ahead + WARPS : ahead);
    }

    // How many are.
    static __device__ __forceinline__ int share(const Route& r, int first) {
        return (max(r.end - first, 0) + WARPS - 1) / WARPS;
    }

    // On to the first unit of the next matrix in which this warp has any.
    __device__ __forceinline__ void next_matrix() {
        while (left == 0 && ++matrix < matrices) {
            Route r = routes[(u32)matrix % ROUTES];
            u32 first = first_unit(r, this_thread() / 32), own = this_lane() * 16;
            left = share(r, first);
            codes = table.codes(matrix) + (u64)first * (VECTORS * 512) + own;
            if (AUX_PER_UNIT) aux = table.aux(matrix) + (u64)first * AUX_BYTES + own;
        }
    }

    // Asks for the codebooks of this block's tiles: one warp. Where there is a bulk copy engine, it takes one lane a few
    // instructions; otherwise all lanes copy.
    __device__ __forceinline__ void ask_books(int m) {
        if (AUX_PER_UNIT || AUX_BYTES == 0 || m >= matrices) return;
        Route r = routes[(u32)m % ROUTES];
        u32 barrier = rings + BARRIERS + (u32)m % 3 * 8, to = rings + WARPS * STAGES * SLOT + (u32)m % 3 * BOOKS;
        const char* from = table.aux(m) + r.first_tile * AUX_BYTES;
        int bytes = r.tiles * AUX_BYTES;
#if __CUDA_ARCH__ >= 900
        if (this_lane() > 0) return;
        barrier_expect(barrier, bytes);
        bulk_copy(to, from, bytes, barrier);
#else
        for (int at = this_lane() * 16; at < bytes; at += 32 * 16) copy_once(to + at, from + at);
        barrier_arrive_with_copies(barrier);
#endif
    }

    // Asks for this lane's codes of the next unit of the stream.
    __device__ __forceinline__ void ask_codes(u32 to) {
        if (left == 0) return;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) copy_once(to + v * 512, codes + v * 512);
    }

    // Asks for what comes with them, and goes on. A group of copies for every slot, so that waiting can count them.
    __device__ __forceinline__ void ask_rest(u32 to) {
        if (left > 0) {
            if (AUX_PER_UNIT) {
#pragma unroll
                for (int i = 0; i < AUX_BYTES; i += 512)
                    if (AUX_BYTES - i >= 512 || this_lane() * 16 < AUX_BYTES - i)
                        copy_once(to + VECTORS * 512 + i, aux + i);
                aux += WARPS * AUX_BYTES;
            }
            codes += WARPS * VECTORS * 512;
            if (--left == 0) next_matrix();
        }
        copy_async_commit();
    }

    // Multiplies this warp's part of matrix m; unless ANYWHERE, the route consists of tiles. parts [tiles, WARPS, 16].
    // Where UNITS go round the warps, a warp has the same channels of every tile and keeps x in registers.
    template <int UNITS, bool ANYWHERE>
    __device__ __forceinline__ void multiply(int m, const Route& r, const char* shared, const Operand& x, float* parts) {
        constexpr bool KEPT = WARPS % UNITS == 0;
        int t = this_thread(), warp = t / 32, begin = first_unit(r, warp), count = share(r, begin);
        u32 lane = this_lane(), from_tile = begin - r.begin + r.offset;
        int tile = from_tile / UNITS, u = from_tile % UNITS;
        if (UNITS < WARPS || ANYWHERE) {
            // The warp may have nothing of some tile.
            for (int i = 0; i < r.tiles; i++)
                if (lane < 16) parts[(i * WARPS + warp) * 16 + lane] = 0;
            __syncwarp();
        }
        const char* books = shared + WARPS * STAGES * SLOT + (u32)m % 3 * BOOKS;
        if (warp == 0) ask_books(m + 1);
        if (!AUX_PER_UNIT && AUX_BYTES > 0 && count > 0)
            barrier_wait(rings + BARRIERS + (u32)m % 3 * 8, (u32)m / 3 & 1);
        Unit sums;
        Part part;
        if (KEPT) part = Part(x, u, lane);
        const char* book = books + tile * AUX_BYTES;
        float* row = parts + (tile * WARPS + warp) * 16 + row_of(lane);
        bool first = true;
#pragma unroll 1
        while (count > 0) {
            copy_async_wait<STAGES - 1>();
            if (AUX_PER_UNIT) __syncwarp();
            if (KEPT || first) sums.begin(book, lane);
            if (!KEPT) part = Part(x, u, lane);
            sums.add((const uint4*)(shared + at), part, lane, [&] { ask_codes(rings + at); });
            if (AUX_PER_UNIT) __syncwarp();
            ask_rest(rings + at);
            at += SLOT;
            if (at == end) at -= STAGES * SLOT;
            count--;
            if constexpr (KEPT) {
                sums.store(row, lane);
                book += WARPS / UNITS * AUX_BYTES, row += WARPS / UNITS * (WARPS * 16);
                continue;
            }
            // The warp's last unit of a tile.
            if (u + WARPS >= UNITS || (ANYWHERE && count == 0)) sums.store(row, lane);
            int tiles = WARPS / UNITS;
            u += WARPS % UNITS;
            if (u >= UNITS) u -= UNITS, tiles++;
            book += tiles * AUX_BYTES, row += tiles * (WARPS * 16);
            first = tiles > 0;
        }
    }
};
