// round_bytes: rotated[t, head] = step · round(rotated[t, head] / step) of every key and value head, steps[t, head] = step
//
// steps    f32 [tokens, 2 · num_kv_heads], overwritten: a head's largest number over 127
// rotated  f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim], its keys and values overwritten
//
// One group per head and token. What is rounded is what append_bytes keeps, to the bit.
// groups (2 · num_kv_heads, tokens)

struct Parameters {
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
}

@group(0) @binding(0) var<storage, read_write> steps: array<f32>;
@group(0) @binding(1) var<storage, read_write> rotated: array<f32>;
var<immediate> p: Parameters;

var<workgroup> sizes: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn round_bytes(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let heads = 2u * p.num_kv_heads;
    let start = (group.y * (p.num_heads + heads) + p.num_heads + group.x) * p.head_dim;
    var most = 0.0;
    for (var j = thread; j < p.head_dim; j += THREADS) {
        most = max(most, abs(rotated[start + j]));
    }
    sizes[thread] = most;
    workgroupBarrier();
    for (var i = 0u; i < THREADS; i++) {
        most = max(most, sizes[i]);
    }
    let step = most / 127.0;
    let inverse = select(0.0, 127.0 / most, most > 0.0);
    for (var j = thread; j < p.head_dim; j += THREADS) {
        rotated[start + j] = step * clamp(round(rotated[start + j] * inverse), -127.0, 127.0);
    }
    if thread == 0u {
        steps[group.y * heads + group.x] = step;
    }
}
