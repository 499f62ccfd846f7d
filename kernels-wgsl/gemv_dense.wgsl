// gemv_dense: y[t, first_row + row] = (accumulate ? y : 0) + bias[row] + Σ_k values[row, k] · x[t, k]
//
// values  VALUES [out_features, in_features]
// bias    f32 [y_features]
// x       f32 [tokens, channels], the window of x that a uniform buffer holds
// y       f32 [tokens, y_features], overwritten, or added to if accumulate is 1
//
// One thread per row and token; the sum runs in f32, eight channels at a time. in_features % 8 == 0.
// groups (out_features / 64 rounded up, tokens)

override VALUES: u32 = 1u;

@group(0) @binding(0) var<storage, read> values: array<u32>;
@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<uniform> x: array<vec4<f32>, 4096>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

fn weight(i: u32) -> f32 {
    return number(values[slot(i, VALUES)], i, VALUES);
}

fn four(i: u32, v: vec4<f32>) -> f32 {
    return weight(i) * v.x + weight(i + 1u) * v.y + weight(i + 2u) * v.z + weight(i + 3u) * v.w;
}

@compute @workgroup_size(64)
fn gemv_dense(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.x;
    let token = id.y;
    if row >= p.out_features {
        return;
    }
    let start = row * p.in_features + p.first_channel;
    let at = token * p.channels / 4u;
    var sum = 0.0;
    for (var i = 0u; i < p.channels; i += 8u) {
        sum += four(start + i, x[at + i / 4u]) + four(start + i + 4u, x[at + i / 4u + 1u]);
    }
    store(row, token, sum);
}
