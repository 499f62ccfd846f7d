// softcap: logits[i] = cap · tanh(logits[i] / cap)
//
// logits  f32 [count], overwritten
//
// Each thread takes every number that lies as many further as there are threads. cap > 0.
// groups (any number)

struct Parameters {
    count: u32,
    cap: f32,
}

@group(0) @binding(0) var<storage, read_write> logits: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(THREADS)
fn softcap(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < p.count; i += groups.x * THREADS) {
        logits[i] = capped(logits[i], p.cap);
    }
}
