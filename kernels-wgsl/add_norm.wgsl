// add_norm: h[t, i] += gamma[i] · branch[t, i] / sqrt(mean_i branch[t, i]² + eps)
//
// gamma   f32 [features]
// branch  f32 [tokens, features]
// h       f32 [tokens, features], added to
//
// One group per token; each of its threads sums every 64th square in f32, one adds the 64 sums.
// groups (tokens)

struct Parameters {
    features: u32,
    eps: f32,
}

@group(0) @binding(0) var<storage, read> gamma: array<f32>;
@group(0) @binding(1) var<storage, read> branch: array<f32>;
@group(0) @binding(2) var<storage, read_write> h: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(THREADS)
fn add_norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let start = group.x * p.features;
    var sum = 0.0;
    for (var i = thread; i < p.features; i += THREADS) {
        sum += branch[start + i] * branch[start + i];
    }
    let scale = 1.0 / sqrt(of_group(thread, sum) / f32(p.features) + p.eps);
    for (var i = thread; i < p.features; i += THREADS) {
        h[start + i] += gamma[i] * (branch[start + i] * scale);
    }
}
