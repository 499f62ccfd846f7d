// dec_select: list[t] = the salient channels of x[t], ascending, bit for bit DecPlan::select (src/dec.rs)
//
// edges   u32 [32], bit patterns of the buckets' lower edges, none negative, non-increasing
// x       u32 [tokens, in_features], bit patterns
// list    u32 [tokens, selected], overwritten
//
// One group per chunk of 1024 channels and token; k = k_chunk · length / 1024 channels are taken. The k-th
// largest key is found bit by bit from above; what exceeds it is taken, and of its equals the first.
// Everything is compared as unsigned bit patterns, where NaN > ∞ > every finite magnitude, so that no
// implementation's view of NaN or of subnormal numbers matters. selection is 0 for buckets, 1 for exact.
// groups (in_features / 1024 rounded up, tokens)

struct Parameters {
    in_features: u32,
    k_chunk: u32,
    selected: u32, // channels taken from all chunks
    selection: u32,
}

@group(0) @binding(0) var<storage, read> edges: array<u32, 32>;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> list: array<u32>;
var<immediate> p: Parameters;

const CHUNK: u32 = 1024u;
const INFINITY: u32 = 0x7f800000u;

var<workgroup> keys: array<u32, CHUNK>;
var<workgroup> reached: array<atomic<u32>, 32>;

// What channels are compared by, larger first.
fn key(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if p.selection == 1u {
        return magnitude;
    }
    if magnitude > INFINITY {
        return 32u;
    }
    var bucket = 0u;
    while bucket < 32u && edges[bucket] > magnitude {
        bucket++;
    }
    return 32u - bucket;
}

@compute @workgroup_size(THREADS)
fn dec_select(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let start = group.x * CHUNK;
    let length = min(p.in_features - start, CHUNK);
    let k = p.k_chunk * length / CHUNK;
    if k == 0u {
        return;
    }
    for (var i = thread; i < length; i += THREADS) {
        keys[i] = key(x[group.y * p.in_features + start + i]);
    }
    if thread < 32u {
        atomicStore(&reached[thread], 0u);
    }
    workgroupBarrier();

    // The largest key that at least k channels reach. Bucket keys have 6 bits, magnitudes 31.
    var last = 0u;
    for (var bit = select(6u, 31u, p.selection == 1u); bit > 0u; bit--) {
        let candidate = last | (1u << (bit - 1u));
        var count = 0u;
        for (var i = thread; i < length; i += THREADS) {
            count += select(0u, 1u, keys[i] >= candidate);
        }
        atomicAdd(&reached[bit], count);
        workgroupBarrier();
        if atomicLoad(&reached[bit]) >= k {
            last = candidate;
        }
    }
    var count = 0u;
    for (var i = thread; i < length; i += THREADS) {
        count += select(0u, 1u, keys[i] > last);
    }
    atomicAdd(&reached[0], count);
    workgroupBarrier();

    // One thread walks the chunk in channel order.
    if thread == 0u {
        var ties = k - atomicLoad(&reached[0]);
        var to = group.y * p.selected + group.x * p.k_chunk;
        for (var i = 0u; i < length; i++) {
            let tie = keys[i] == last && ties > 0u;
            if tie {
                ties--;
            }
            if tie || keys[i] > last {
                list[to] = start + i;
                to++;
            }
        }
    }
}
