// swiglu: out[t, i] = silu(gu[t, i]) · gu[t, features + i], silu(g) = g / (1 + exp(−g))
//
// gu      f32 [tokens, 2 · features], gate then up
// out     f32 [tokens, features], overwritten
//
// One thread per feature and token.
// groups (features / 64 rounded up, tokens)

struct Parameters {
    features: u32,
}

@group(0) @binding(0) var<storage, read> gu: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn swiglu(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.features {
        return;
    }
    let start = id.y * 2u * p.features + id.x;
    let gate = gu[start];
    out[id.y * p.features + id.x] = gate / (1.0 + exp(-gate)) * gu[start + p.features];
}
