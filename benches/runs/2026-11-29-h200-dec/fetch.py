# What multiprocessors fetch from pinned host memory: python3 fetch.py alloc,huge,small,wc      (CuPy, an idle device)
#
# fetch.log was measured with earlier states of this, part by part; put together and tidied since, and not run so. Times are
# cycles at 1.98 GHz, the highest clock of an H200.
import ctypes, mmap, sys
import cupy as cp, numpy as np

SOURCE = r'''
typedef unsigned u32; typedef unsigned long long u64;
extern __shared__ __align__(1024) char shared[];

template <int W> __device__ __forceinline__ void load(u32 (&w)[W], const void* p) {
    if constexpr (W == 4)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
    else if constexpr (W == 2)
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    else
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
}

__device__ void barrier(u32* count, u32 target) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(count, 1u);
        u32 v;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(count) : "memory"); while ((int)(v - target) < 0);
    }
    __syncthreads();
}

__device__ long long now() { long long t; asm volatile("mov.u64 %0, %%clock64;" : "=l"(t) :: "memory"); return t; }

// Rows at list[i] of a part of `part` bytes each; part `role` is this multiprocessor's.
struct Rows { const char* base; const u64* rows; int n, part, reps; };

// By loads of W words, F of them in flight a thread.
template <int W, int F> struct Loads {
    u32 sum = 0;
    __device__ void init() {}
    __device__ void fetch(const Rows& r, const u64* list, int role, int) {
        int width = r.part / (4 * W), columns = width < 512 ? width : 512, teams = 512 / columns;
        int team = threadIdx.x / columns, piece = threadIdx.x % columns;
        for (int p = piece; p < width; p += columns)
            for (int i = team < teams ? team : r.n; i < r.n; i += F * teams) {
                u32 w[F][W];
#pragma unroll
                for (int f = 0; f < F; f++)
                    if (i + f * teams < r.n) load<W>(w[f], r.base + list[i + f * teams] + (u64)role * r.part + p * 4 * W);
#pragma unroll
                for (int f = 0; f < F; f++)
                    if (i + f * teams < r.n)
#pragma unroll
                        for (int j = 0; j < W; j++) sum += w[f][j];
            }
        asm volatile("" :: "r"(sum) : "memory");
    }
};

// By one bulk copy for each row.
struct Bulk {
    u32 bar, sum = 0;
    __device__ void init() {
        bar = (u32)__cvta_generic_to_shared(shared + 8192);
        if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(bar) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __device__ void fetch(const Rows& r, const u64* list, int role, int rep) {
        if (threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(bar), "r"(r.n * r.part) : "memory");
        __syncthreads();
        for (int i = threadIdx.x % 32 * 16 + threadIdx.x / 32; i < r.n; i += 512)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         :: "r"(bar + 1024 + i * r.part), "l"(r.base + list[i] + (u64)role * r.part), "r"(r.part), "r"(bar) : "memory");
        asm volatile("{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" :: "r"(bar), "r"(rep & 1) : "memory");
    }
};

// Before each repetition `toucher`, a role, or all if it is −2, or none if it is −1, reads a number of every `stride` bytes
// of a region, or if it is 0 bytes long of the rows' own pages.
template <class Fetch>
__device__ void measure(Fetch f, const Rows& r, const int* roles, u32* count, long long* took, u32* sink, int toucher,
                        u64 region, u64 stride, const u64* starts) {
    u32 smid, unused = 0;
    asm("mov.u32 %0, %%smid;" : "=r"(smid));
    int role = roles[smid];
    u64* list = (u64*)shared;
    f.init();
    for (int rep = 0; rep < r.reps; rep++) {
        for (int i = threadIdx.x; i < r.n; i += 512) list[i] = r.rows[rep * r.n + i];
        __syncthreads();
        if (role >= 0 && (toucher == -2 || toucher == role)) {
            u64 end = region ? region : r.n * stride;
            for (u64 i = threadIdx.x * stride; i < end; i += 512 * stride) {
                u32 w[1];
                load<1>(w, r.base + (region ? starts[rep] + i : list[i / stride] / stride * stride));
                unused += w[0];
            }
        }
        barrier(count, (2 * rep + 1) * gridDim.x);
        long long start = now();
        while (now() - start < 6000);
        barrier(count, (2 * rep + 2) * gridDim.x);
        start = now();
        if (role >= 0) f.fetch(r, list, role, rep);
        __syncthreads();
        if (threadIdx.x == 0) took[rep * gridDim.x + blockIdx.x] = role >= 0 ? now() - start : 0;
    }
    if (f.sum + unused == 0x12345) sink[0] = unused;
}

#define KERNEL(NAME, ...) extern "C" __global__ void __launch_bounds__(512, 1) NAME(const char* base, const u64* rows, int n, \
    int part, int reps, const int* roles, u32* count, long long* took, u32* sink, int toucher, u64 region, u64 stride, \
    const u64* starts) { measure(__VA_ARGS__(), Rows{base, rows, n, part, reps}, roles, count, took, sink, toucher, region, stride, starts); }
KERNEL(bulk, Bulk)
KERNEL(f1_4, Loads<1, 4>) KERNEL(f1_8, Loads<1, 8>) KERNEL(f2_1, Loads<2, 1>) KERNEL(f2_4, Loads<2, 4>)
KERNEL(f2_8, Loads<2, 8>) KERNEL(f4_1, Loads<4, 1>) KERNEL(f4_4, Loads<4, 4>) KERNEL(f4_8, Loads<4, 8>)

// One load after the other.
extern "C" __global__ void chase(const char* base, const u64* rows, int n, long long* took) {
    u32 sum = 0;
    for (int i = 0; i < n; i++) {
        long long start = now();
        u32 w[1];
        load<1>(w, base + rows[i]);
        sum += w[0];
        asm volatile("" :: "r"(sum) : "memory");
        took[i] = now() - start;
    }
}
'''

GHZ, SIZE, REPS = 1.98, 3 << 30, 40
SHAPES = {'o': (2048, 32, 8 << 20), 'qkv': (3072, 32, 12 << 20), 'd': (2048, 112, 28 << 20), 'gu': (14336, 32, 56 << 20)}
LOADS = ['f1_4', 'f1_8', 'f2_1', 'f2_4', 'f2_8', 'f4_1', 'f4_4', 'f4_8']

module = cp.RawModule(code=SOURCE, options=('--std=c++17',), backend='nvrtc')
runtime = cp.cuda.runtime
device = runtime.getDeviceProperties(0)
SMS = device['multiProcessorCount']
rng = np.random.default_rng(1)
sink = cp.zeros(1, cp.uint32)


def memory(kind):
    """Pinned memory and what keeps it: the driver's (alloc, wc: write-combined) or ordinary (huge, small pages)."""
    if kind in ('alloc', 'wc'):
        pointer = runtime.hostAlloc(SIZE, 7 if kind == 'wc' else 3)
        ctypes.memset(pointer, 1, SIZE)
        return pointer, None
    keep = np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
    pointer, libc = keep.ctypes.data, ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(pointer), ctypes.c_size_t(SIZE), 14 if kind == 'huge' else 15)
    ctypes.memset(pointer, 1, SIZE)
    runtime.hostRegister(pointer, SIZE, 3)
    return pointer, keep


def measure(what, kernel, base, sms, row_bytes, n, region, part=None, toucher=-1, touched=0, stride=1 << 21, fixed=False):
    """Rows at random, each time from another region unless it is `fixed`; parts in whole lines."""
    part = part or (row_bytes // len(sms) + 127) // 128 * 128
    roles = np.full(SMS, -1, np.int32)
    roles[list(sms)] = np.arange(len(sms))
    starts = rng.integers(0, max(1, (SIZE - region) >> 21), REPS).astype(np.uint64) << np.uint64(21)
    if fixed or region == SIZE:
        starts[:] = 0 if region == SIZE else starts[0]
    few = n * REPS * row_bytes <= region
    picked = [rng.permutation(region // row_bytes)[:n] if few else rng.integers(0, region // row_bytes, n) for _ in range(REPS)]
    rows = np.concatenate([s + p.astype(np.uint64) * np.uint64(row_bytes) for s, p in zip(starts, picked)])
    count, took = cp.zeros(1, cp.uint32), cp.zeros(REPS * SMS, cp.int64)
    function = module.get_function(kernel)
    function.max_dynamic_shared_size_bytes = 200 << 10
    function((SMS,), (512,), (base, cp.asarray(rows), np.int32(n), np.int32(part), np.int32(REPS), cp.asarray(roles), count, took,
             sink, np.int32(toucher), np.uint64(touched), np.uint64(stride), cp.asarray(starts)), shared_mem=200 << 10)
    all_ns = took.get().reshape(REPS, SMS)[3:] / GHZ
    last, first = all_ns.max(1), np.where(all_ns > 0, all_ns, np.inf).min(1)
    print('%-40s median %6.0f ns  p90 %6.0f  first %6.0f  %6.2f GB/s' % (what, np.median(last), np.percentile(last, 90),
          np.median(first), len(sms) * part * n / np.median(last)), flush=True)


for kind in sys.argv[1].split(','):
    pointer, keep = memory(kind)
    base = np.uint64(pointer)
    print('=====', kind, device['name'])
    for span in [1 << 16, 1 << 21, 1 << 24, 1 << 27, SIZE]:
        page = min(4096, span // 64)
        took = cp.zeros(64, cp.int64)
        rows = cp.asarray(rng.permutation(span // page)[:64].astype(np.uint64) * np.uint64(page))
        module.get_function('chase')((1,), (1,), (base, rows, np.int32(64), took))
        print('chase, %d KB: median %.0f ns' % (span >> 10, np.median(took.get()[4:]) / GHZ))
    for name, (row_bytes, n, region) in SHAPES.items():
        for count in [1, 4, 8, 16]:
            last = range(SMS - count, SMS)
            for kernel in LOADS + ['bulk']:
                if kernel != 'bulk' or n * row_bytes // count < 180_000:
                    measure(f'{name}, {count}, {kernel}', kernel, base, last, row_bytes, n, SIZE)
        for spread in [8, 16, 33, 66]:
            measure(f'{name}, every {spread}th', 'f2_4', base, range(0, SMS - SMS % spread, spread), row_bytes, n, SIZE)
        for what, more in {
            'same region': dict(fixed=True), 'another': {},
            **{f'{who}, {stride >> 10} KB': dict(toucher=toucher, touched=region, stride=stride)
               for who, toucher in [('own', -2), ('one', 0)] for stride in [1 << 21, 1 << 16]},
            **{f'rows, {stride >> 10} KB': dict(toucher=-2, stride=stride) for stride in [1 << 16, 1 << 12]},
        }.items():
            measure(f'{name}, 16, {what}', 'bulk', base, range(SMS - 16, SMS), row_bytes, n, region, **more)
    for part in [128, 256, 512, 1024, 2048, 4096]:
        measure(f'one, 64 KB in parts of {part}', 'bulk', base, [0], 16384, 65536 // part, SIZE, part)
    for n in [1, 2, 4, 8, 16, 32]:
        for kernel in ['f2_8', 'f4_8', 'bulk']:
            measure(f'one, {n} rows of 4096, {kernel}', kernel, base, [0], 4096, n, SIZE)
