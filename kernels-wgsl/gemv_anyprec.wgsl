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
// in_features % 32 == 0, a window starts at a tile; BITS 2 to 8: up to 4 the codebook is held in registers and picked from by a tree
// of selects, above that it is read for every weight.
// groups (out_features / 64 rounded up, tokens)

override BITS: u32 = 3u;
override LUT: u32 = 0u;

struct Parameters {
    in_features: u32,
    out_features: u32, // rows of this block
    first_row: u32, // of this block in y
    y_features: u32,
    accumulate: u32,
    first_channel: u32, // of the window
    channels: u32, // of the window
    first_token: u32, // of the window
}

@group(0) @binding(0) var<storage, read> planes: array<u32>;
@group(0) @binding(1) var<storage, read> lut: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<uniform> x: array<vec4<f32>, 4096>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
var<immediate> p: Parameters;

var<private> row: u32;
var<private> codebook: array<f32, 16>;
// The words under work, most significant plane first; the next channel's bit is on top.
var<private> w: array<u32, 8>;

fn read_centroid(code: u32) -> f32 {
    let i = (row << BITS) | code;
    return number(lut[slot(i, LUT)], i, LUT);
}

// Indices are written out wherever arrays are to stay in registers.
fn read_codebook() {
    if BITS <= 4u {
        codebook[0] = read_centroid(0u);
        codebook[1] = read_centroid(1u);
        codebook[2] = read_centroid(2u);
        codebook[3] = read_centroid(3u);
    }
    if BITS == 3u || BITS == 4u {
        codebook[4] = read_centroid(4u);
        codebook[5] = read_centroid(5u);
        codebook[6] = read_centroid(6u);
        codebook[7] = read_centroid(7u);
    }
    if BITS == 4u {
        codebook[8] = read_centroid(8u);
        codebook[9] = read_centroid(9u);
        codebook[10] = read_centroid(10u);
        codebook[11] = read_centroid(11u);
        codebook[12] = read_centroid(12u);
        codebook[13] = read_centroid(13u);
        codebook[14] = read_centroid(14u);
        codebook[15] = read_centroid(15u);
    }
}

// The words at `first` of plane 0 and at the same place of the others.
fn read_planes(first: u32, plane: u32) {
    w[0] = planes[first];
    w[1] = planes[first + plane];
    if BITS > 2u {
        w[2] = planes[first + 2u * plane];
    }
    if BITS > 3u {
        w[3] = planes[first + 3u * plane];
    }
    if BITS > 4u {
        w[4] = planes[first + 4u * plane];
    }
    if BITS > 5u {
        w[5] = planes[first + 5u * plane];
    }
    if BITS > 6u {
        w[6] = planes[first + 6u * plane];
    }
    if BITS > 7u {
        w[7] = planes[first + 7u * plane];
    }
}

fn top(plane: u32) -> bool {
    return bitcast<i32>(w[plane]) < 0;
}

fn of_two(i: u32, plane: u32) -> f32 {
    return select(codebook[i], codebook[i + 1u], top(plane));
}

fn of_four(i: u32, plane: u32) -> f32 {
    return select(of_two(i, plane + 1u), of_two(i + 2u, plane + 1u), top(plane));
}

fn of_eight(i: u32, plane: u32) -> f32 {
    return select(of_four(i, plane + 1u), of_four(i + 4u, plane + 1u), top(plane));
}

fn looked_up() -> f32 {
    var code = ((w[0] >> 31u) << 4u) | ((w[1] >> 31u) << 3u) | ((w[2] >> 31u) << 2u) | ((w[3] >> 31u) << 1u) | (w[4] >> 31u);
    if BITS > 5u {
        code = (code << 1u) | (w[5] >> 31u);
    }
    if BITS > 6u {
        code = (code << 1u) | (w[6] >> 31u);
    }
    if BITS > 7u {
        code = (code << 1u) | (w[7] >> 31u);
    }
    return read_centroid(code);
}

// The next channel's weight.
fn weight() -> f32 {
    var value: f32;
    if BITS == 2u {
        value = of_four(0u, 0u);
    } else if BITS == 3u {
        value = of_eight(0u, 0u);
    } else if BITS == 4u {
        value = select(of_eight(0u, 1u), of_eight(8u, 1u), top(0u));
    } else {
        value = looked_up();
    }
    w[0] <<= 1u;
    w[1] <<= 1u;
    w[2] <<= 1u;
    w[3] <<= 1u;
    if BITS > 4u {
        w[4] <<= 1u;
        w[5] <<= 1u;
        w[6] <<= 1u;
        w[7] <<= 1u;
    }
    return value;
}

fn four(at: u32) -> f32 {
    let v = x[at];
    var sum = weight() * v.x;
    sum += weight() * v.y;
    sum += weight() * v.z;
    sum += weight() * v.w;
    return sum;
}

// Eight consecutive channels, the first of them 4 · at.
fn piece(at: u32) -> f32 {
    return four(at) + four(at + 1u);
}

@compute @workgroup_size(64)
fn gemv_anyprec(@builtin(global_invocation_id) id: vec3<u32>) {
    row = id.x;
    let token = id.y;
    if row >= p.out_features {
        return;
    }
    read_codebook();
    let words = p.in_features / 32u;
    var sum = 0.0;
    let first = p.first_channel / 32u;
    for (var word = first; word < first + p.channels / 32u; word++) {
        read_planes(row * words + word, p.out_features * words);
        let tile = word & ~31u;
        let width = min(words - tile, 32u);
        // Pieces of eight channels, `width` pieces apart.
        let at = (token * p.channels + 32u * (tile - first) + 8u * (word - tile)) / 4u;
        sum += piece(at);
        sum += piece(at + 2u * width);
        sum += piece(at + 4u * width);
        sum += piece(at + 6u * width);
    }
    let to = p.first_row + row;
    let out = (p.first_token + token) * p.y_features + to;
    if p.first_channel == 0u {
        sum += bias[to];
    }
    if p.accumulate == 1u {
        sum += y[out];
    }
    y[out] = sum;
}
