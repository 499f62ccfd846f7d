// gemv_lutgemm: y[t, first_row + row] = (accumulate ? y : 0) + bias
//     + Σ_g (q_bias[g, row] · Σ_k x[t, k] + Σ_b alpha[g, b, row] · Σ_k (2 · bit_b(k) − 1) · x[t, k])
//
// binary  u32 [in_features / 32, BITS, out_features], plane 0 the least significant bit, bit i channel i
// alpha   ALPHA [in_features / group_size, BITS, out_features]
// q_bias  Q_BIAS [in_features / group_size, out_features]
// bias    f32 [y_features]
// x       f32 [tokens, channels], the window of x that a uniform buffer holds
// y       f32 [tokens, y_features], overwritten, or added to if accumulate is 1
//
// One thread per row and token; sums in f32, group by group, inside a group (its part in the window) from q_bias through the planes
// upwards. group_size is a multiple of 32 that divides in_features; BITS 2 to 8.
// groups (out_features / 64 rounded up, tokens)

override BITS: u32 = 3u;
override ALPHA: u32 = 0u;
override Q_BIAS: u32 = 0u;

@group(0) @binding(0) var<storage, read> binary: array<u32>;
@group(0) @binding(1) var<storage, read> alpha: array<u32>;
@group(0) @binding(2) var<storage, read> q_bias: array<u32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<uniform> x: array<vec4<f32>, 4096>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// Four channels with the signs of the four lowest bits.
fn signed(v: vec4<f32>, bits: u32) -> f32 {
    let positive = (vec4<u32>(bits) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>(0u);
    let s = select(-v, v, positive);
    return ((s.x + s.y) + s.z) + s.w;
}

@compute @workgroup_size(64)
fn gemv_lutgemm(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.x;
    let token = id.y;
    if row >= p.out_features {
        return;
    }
    let words = p.group_size / 32u;
    let first = p.first_channel / 32u;
    let end = first + p.channels / 32u;
    var sum = 0.0;
    var word = first;
    while word < end {
        let g = word / words;
        let next = min(end, (g + 1u) * words);
        var x_sum = 0.0;
        var sums = array<f32, 8>();
        for (; word < next; word++) {
            let at = (token * p.channels + 32u * (word - first)) / 4u;
            for (var j = 0u; j < 8u; j++) {
                x_sum += signed(x[at + j], 15u);
            }
            for (var b = 0u; b < BITS; b++) {
                let bits = binary[(word * BITS + b) * p.out_features + row];
                for (var j = 0u; j < 8u; j++) {
                    sums[b] += signed(x[at + j], bits >> (4u * j));
                }
            }
        }
        let q = g * p.out_features + row;
        var group = number(q_bias[slot(q, Q_BIAS)], q, Q_BIAS) * x_sum;
        for (var b = 0u; b < BITS; b++) {
            let a = (g * BITS + b) * p.out_features + row;
            group += number(alpha[slot(a, ALPHA)], a, ALPHA) * sums[b];
        }
        sum += group;
    }
    store(row, token, sum);
}
