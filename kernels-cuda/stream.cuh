// Weights as a stream: each warp's units of one matrix after the other, copied ahead of their use into the warp's own
// ring of shared memory by the bulk copy engine (compute capability 9.0). The stream does not stop where a matrix
// ends: while a block waits for activations, the ring fills with what it will multiply next.
//
// Slot s of warp w is full when its mbarrier's phase ends. Only the warp itself refills it, after its last read.
#pragma once
#include "unit.cuh"

// A unit in the ring: its codes, and what comes with each unit.
#define SLOT (((AUX_PER_UNIT ? STAGE_BYTES : VECTORS * 512) + 127) / 128 * 128)

// A matrix on its way: which part of it this block multiplies, in tiles in the order of use.
struct Route {
    int begin, end; // tiles
    int units;      // of a tile
    int half;       // tiles of gate, where tiles of gate and up take turns; else 0
};

__device__ __forceinline__ int tile_at(int s, int half) { return half ? (s & 1) * half + (s >> 1) : s; }

__device__ __forceinline__ void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred full;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 full, [%0], %1;\n"
        "@!full bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// Weights are read once a token: the second-level cache keeps other things.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// Where a warp's stream is: `Table` says where the matrices are (codes(m), aux(m)), routes[m % ROUTES] which part.
//
// Shared memory from `rings` on: slots [WARPS, STAGES], the block's codebooks of two matrices in turn [2, BOOKS bytes]
// (where a tile has some), mbarriers [WARPS, STAGES] and [2].
template <int ROUTES, class Table>
struct Stream {
    static constexpr int BARRIERS = WARPS * STAGES * SLOT + 2 * BOOKS;
    static constexpr int BYTES = BARRIERS + (WARPS * STAGES + 2) * 8;

    const Route* routes;
    Table table;
    u32 rings;
    int matrices;
    // The next unit to be asked for; lane 0 alone knows.
    int matrix, s, unit;
    Route route;
    const char* codes;
    // The next one to be used.
    int slot;
    u32 phase;

    // Before anything else, by one warp; all wait for it.
    static __device__ __forceinline__ void init(u32 rings) {
        for (int i = threadIdx.x % 32; i < WARPS * STAGES + 2; i += 32) barrier_init(rings + BARRIERS + i * 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    __device__ __forceinline__ Stream(Table table, const Route* routes, int matrices, u32 rings)
        : routes(routes), table(table), rings(rings), matrices(matrices), matrix(-1), slot(0), phase(0) {
        if (threadIdx.x % 32 == 0) {
            next_matrix();
            if (threadIdx.x == 0) ask_books(0);
#pragma unroll 1
            for (int i = 0; i < STAGES; i++) ask(i);
        }
    }

    __device__ __forceinline__ u32 full(int warp, int slot) const { return rings + BARRIERS + (warp * STAGES + slot) * 8; }

    // On to the first unit of the next matrix in which this warp has any.
    __device__ __forceinline__ void next_matrix() {
        do {
            if (++matrix >= matrices) return;
            route = routes[(u32)matrix % ROUTES];
            u32 warp = threadIdx.x / 32;
            s = route.begin + warp / (u32)route.units, unit = warp % (u32)route.units;
        } while (s >= route.end);
        codes = table.codes(matrix);
    }

    // Asks for the codebooks of this block's tiles: those of gate, then those of up, where they take turns.
    __device__ __forceinline__ void ask_books(int m) {
        if (AUX_PER_UNIT || AUX_BYTES == 0 || m >= matrices) return;
        Route r = routes[(u32)m % ROUTES];
        u32 barrier = rings + BARRIERS + (WARPS * STAGES + (m & 1)) * 8, to = rings + WARPS * STAGES * SLOT + (m & 1) * BOOKS;
        int parts = r.half ? 2 : 1, first = r.begin / parts, bytes = (r.end - r.begin) / parts * AUX_BYTES;
        // A block without tiles of this matrix ends the phase all the same.
        barrier_expect(barrier, parts * bytes);
        if (bytes == 0) return;
        bulk_copy(to, table.aux(m) + first * AUX_BYTES, bytes, barrier);
        if (r.half) bulk_copy(to + bytes, table.aux(m) + (r.half + first) * AUX_BYTES, bytes, barrier);
    }

    // Asks for the next unit of the stream.
    __device__ __forceinline__ void ask(int to) {
        if (matrix >= matrices) return;
        u32 index = tile_at(s, route.half) * route.units + unit, warp = threadIdx.x / 32;
        u32 barrier = full(warp, to), at = rings + (warp * STAGES + to) * SLOT;
        barrier_expect(barrier, VECTORS * 512 + (AUX_PER_UNIT ? AUX_BYTES : 0));
        bulk_copy(at, codes + (u64)index * (VECTORS * 512), VECTORS * 512, barrier);
        if (AUX_PER_UNIT) bulk_copy(at + VECTORS * 512, table.aux(matrix) + (u64)index * AUX_BYTES, AUX_BYTES, barrier);
        unit += WARPS;
        while (unit >= route.units) unit -= route.units, s++;
        if (s >= route.end) next_matrix();
    }

    // Matrix m has no part for this block: its phase of the codebooks ends all the same.
    __device__ __forceinline__ void skip(int m) {
        if (this_thread() == 0) ask_books(m + 1);
    }

    // Multiplies this warp's part of matrix m. parts [tiles, WARPS, 16].
    template <int UNITS>
    __device__ __forceinline__ void multiply(int m, const Route& r, const char* shared, const u16* xs,
                                             const float* group_sums, float* parts) {
        int t = this_thread(), warp = t / 32;
        int begin = r.begin, end = r.end, half = r.half;
        int at = begin + warp / UNITS, u = warp % UNITS;
        const char* own = shared + warp * STAGES * SLOT;
        const char* books = shared + WARPS * STAGES * SLOT + (m & 1) * BOOKS;
        if (t == 0) ask_books(m + 1);
        if (!AUX_PER_UNIT && AUX_BYTES > 0 && at < end)
            barrier_wait(rings + BARRIERS + (WARPS * STAGES + (m & 1)) * 8, m >> 1 & 1);
        bool first = true;
        Unit sums;
#pragma unroll 1
        while (at < end) {
            barrier_wait(full(warp, slot), phase);
            const uint4* stage = (const uint4*)(own + slot * SLOT);
            if (first) {
                int book = half ? (at & 1) * ((end - begin) / 2) + (at - begin) / 2 : at - begin;
                sums.begin((const uint4*)(books + book * AUX_BYTES));
            }
            sums.add(stage, xs + u * UNIT, group_sums + u * GROUP_SUMS);
            __syncwarp();
            if (t % 32 == 0) ask(slot);
            if (++slot == STAGES) slot = 0, phase ^= 1;
            // The warp's last unit of a tile.
            if (u + WARPS >= UNITS) sums.store(parts + ((at - begin) * WARPS + warp) * 16);
            int before = at;
            at += WARPS / UNITS, u += WARPS % UNITS;
            if (u >= UNITS) u -= UNITS, at++;
            first = at != before;
        }
    }
};
