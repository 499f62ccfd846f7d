// rms_norm: out[t, i] = gamma[i] · h[t, i] / sqrt(mean_i h[t, i]² + eps)
//
// gamma   f32 [features]
// h       f32 [tokens, features]
// out     f32 [tokens, features], overwritten
//
// One group per token; each of its threads sums every 64th square in f32, one adds the 64 sums.
// groups (tokens)

struct Parameters {
    features: u32,
    eps: f32,
}

@group(0) @binding(0) var<storage, read> gamma: array<f32>;
@group(0) @binding(1) var<storage, read> h: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(THREADS)
fn rms_norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let start = group.x * p.features;
    var sum = 0.0;
    for (var i = thread; i < p.features; i += THREADS) {
        sum += h[start + i] * h[start + i];
    }
    let scale = 1.0 / sqrt(of_group(thread, sum) / f32(p.features) + p.eps);
    for (var i = thread; i < p.features; i += THREADS) {
        out[start + i] = gamma[i] * (h[start + i] * scale);
    }
}
