// gated: out[t, i] = gate / (1 + exp(−z)) · up, gate = gu[t, i], up = gu[t, features + i]
//
// gu      f32 [tokens, 2 · features], gate then up
// out     f32 [tokens, features], overwritten
//
// z is gate for SiLU (activation 0), and 2·√(2/π) · (gate + 0.044715 · gate³) for GELU's tanh form (activation 1).
// One thread per feature and token.
// groups (features / 64 rounded up, tokens)

struct Parameters {
    features: u32,
    activation: u32,
}

@group(0) @binding(0) var<storage, read> gu: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn gated(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.features {
        return;
    }
    let start = id.y * 2u * p.features + id.x;
    let gate = gu[start];
    var z = gate;
    if p.activation == 1u {
        z = 1.5957692 * (gate + 0.044715 * gate * gate * gate);
    }
    out[id.y * p.features + id.x] = gate / (1.0 + exp(-z)) * gu[start + p.features];
}
