// Weights as a stream: each warp's units of one matrix after the other, copied ahead of their use into the warp's own
// ring of shared memory by the bulk copy engine (compute capability 9.0). The stream does not stop where a matrix
// ends: while a block waits for activations, the ring fills with what it will multiply next.
//
// Slot s of warp w is full when its mbarrier's phase ends. Only the warp itself refills it, after its last read.
#pragma once
#include "unit.cuh"

#define SLOT ((STAGE_BYTES + 127) / 128 * 128)

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

// Where a warp's stream is: `Table` says where the matrices are (codes(m), aux(m)), routes[m % ROUTES] which part. Both
// are in shared memory: what is not kept here is read again.
template <int ROUTES, class Table>
struct Stream {
    const Route* routes;
    Table table;
    u32 rings; // and the mbarriers behind them
    int matrices;
    // The next unit to be asked for.
    int matrix, s, unit;
    bool fresh;
    // The next one to be used.
    int slot;
    u32 phase;

    __device__ __forceinline__ Stream(Table table, const Route* routes, int matrices, u32 rings)
        : routes(routes), table(table), rings(rings), matrices(matrices), matrix(-1), slot(0), phase(0) {
        next_matrix();
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) ask(i);
    }

    __device__ __forceinline__ u32 full(int slot) const {
        return rings + WARPS * STAGES * SLOT + (threadIdx.x / 32 * STAGES + slot) * 8;
    }

    // On to the first unit of the next matrix in which this warp has any.
    __device__ __forceinline__ void next_matrix() {
        Route r;
        do {
            if (++matrix >= matrices) return;
            r = routes[matrix % ROUTES];
            int warp = threadIdx.x / 32;
            s = r.begin + warp / r.units, unit = warp % r.units;
        } while (s >= r.end);
        fresh = true;
    }

    // Asks for the next unit of the stream.
    __device__ __forceinline__ void ask(int to) {
        if (matrix >= matrices) return;
        Route r = routes[matrix % ROUTES];
        if (threadIdx.x % 32 == 0) {
            int tile = tile_at(s, r.half);
            long long index = (long long)tile * r.units + unit;
            u32 barrier = full(to), at = rings + (threadIdx.x / 32 * STAGES + to) * SLOT;
            bool with_aux = AUX_BYTES > 0 && (AUX_PER_UNIT || fresh);
            barrier_expect(barrier, VECTORS * 512 + (with_aux ? AUX_BYTES : 0));
            bulk_copy(at, table.codes(matrix) + index * (VECTORS * 512), VECTORS * 512, barrier);
            if (with_aux)
                bulk_copy(at + VECTORS * 512, table.aux(matrix) + (AUX_PER_UNIT ? index : tile) * AUX_BYTES, AUX_BYTES,
                          barrier);
        }
        int before = s;
        unit += WARPS;
        while (unit >= r.units) unit -= r.units, s++;
        fresh = s != before;
        if (s >= r.end) next_matrix();
    }

    // Multiplies this warp's part of the current matrix. parts [tiles, WARPS, 16].
    template <int UNITS>
    __device__ __forceinline__ void multiply(const Route& r, const char* rings, const u16* xs, const float* group_sums,
                                             float* parts) {
        int warp = this_thread() / 32;
        int at = r.begin + warp / UNITS, u = warp % UNITS;
        const char* own = rings + warp * STAGES * SLOT;
        bool first = true;
        Unit sums;
#pragma unroll 1
        while (at < r.end) {
            barrier_wait(full(slot), phase);
            const uint4* stage = (const uint4*)(own + slot * SLOT);
            if (first) sums.begin(stage + VECTORS * 32);
            sums.add(stage, xs + u * UNIT, group_sums + u * GROUP_SUMS);
            __syncwarp();
            ask(slot);
            if (++slot == STAGES) slot = 0, phase ^= 1;
            // The warp's last unit of a tile.
            if (u + WARPS >= UNITS) sums.store(parts + ((at - r.begin) * WARPS + warp) * 16);
            int before = at;
            at += WARPS / UNITS, u += WARPS % UNITS;
            if (u >= UNITS) u -= UNITS, at++;
            first = at != before;
        }
    }
};
