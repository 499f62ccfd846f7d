// gemv_anyprec: y[t, first_row + row] = (accumulate ? y : 0) + bias[row] + Σ_k lut[row, code(row, k)] · x[t, k]
//
// planes  u32 [BITS, out_features, in_features / 32], plane 0 the most significant bit, channels permuted
//         inside tiles of 1024 (src/format/anyprec.rs)
// lut     LUT [out_features, 2^BITS]
// bias    f32 [y_features]
// x       f32 [tokens, channels], the window of x that a uniform buffer holds
// y       f32 [tokens, y_features], overwritten, or added to if accumulate is 1
//
// One thread per row and token; the sum runs in f32, in the order in which the words are stored.
// in_features % 32 == 0, a window starts at a tile; BITS 2 to 8.
// groups (out_features / 64 rounded up, tokens)

override BITS: u32 = 3u;
override LUT: u32 = 0u;

@group(0) @binding(0) var<storage, read> planes: array<u32>;
@group(0) @binding(1) var<storage, read> lut: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<uniform> x: array<vec4<f32>, 4096>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// The words under work, most significant plane first; the next channel's bit is on top.
var<private> planes_of_word: array<u32, 8>;

// The next channel's weight.
fn weight(row: u32) -> f32 {
    var code = 0u;
    for (var b = 0u; b < BITS; b++) {
        code = (code << 1u) | (planes_of_word[b] >> 31u);
        planes_of_word[b] <<= 1u;
    }
    let i = (row << BITS) | code;
    return number(lut[slot(i, LUT)], i, LUT);
}

fn four(row: u32, v: vec4<f32>) -> f32 {
    var sum = weight(row) * v.x;
    sum += weight(row) * v.y;
    sum += weight(row) * v.z;
    sum += weight(row) * v.w;
    return sum;
}

@compute @workgroup_size(64)
fn gemv_anyprec(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.x;
    let token = id.y;
    if row >= p.out_features {
        return;
    }
    let words = p.in_features / 32u;
    var sum = 0.0;
    let first = p.first_channel / 32u;
    for (var word = first; word < first + p.channels / 32u; word++) {
        for (var b = 0u; b < BITS; b++) {
            planes_of_word[b] = planes[(b * p.out_features + row) * words + word];
        }
        let tile = word & ~31u;
        let width = min(words - tile, 32u);
        let at = (token * p.channels + 32u * (tile - first) + 8u * (word - tile)) / 4u;
        // Pieces of eight channels, `width` pieces apart.
        for (var i = 0u; i < 4u; i++) {
            let piece = at + 2u * i * width;
            sum += four(row, x[piece]) + four(row, x[piece + 1u]);
        }
    }
    store(row, token, sum);
}
