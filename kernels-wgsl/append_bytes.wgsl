// append_bytes: what append does, in bytes: keys[(position + t) mod capacity] = keys of rotated[t], values[likewise] = values
//               of rotated[t], for every token t from `first` on
//
// rotated  f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim], rounded by round_bytes
// steps    f32 [tokens, 2 · num_kv_heads]
// keys     u32 [capacity, num_kv_heads, head_dim / 4 rounded up, and one more], a row overwritten for each of these tokens:
//          four signed bytes a word, and then their step
// values   likewise
//
// One thread per word of a token's keys and values. tokens − first ≤ capacity.
// groups (words of one token / 64 rounded up, tokens − first)

struct Parameters {
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    position: u32, // of the first token of rotated
    capacity: u32,
    first: u32,
}

@group(0) @binding(0) var<storage, read> rotated: array<f32>;
@group(0) @binding(1) var<storage, read> steps: array<f32>;
@group(0) @binding(2) var<storage, read_write> keys: array<u32>;
@group(0) @binding(3) var<storage, read_write> values: array<u32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn append_bytes(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = (p.head_dim + 3u) / 4u + 1u;
    let heads = 2u * p.num_kv_heads;
    let head = id.x / width;
    let w = id.x % width;
    if head >= heads {
        return;
    }
    let t = p.first + id.y;
    let step = steps[t * heads + head];
    var made = bitcast<u32>(step);
    if w + 1u < width {
        made = 0u;
        let start = (t * (p.num_heads + heads) + p.num_heads + head) * p.head_dim;
        for (var j = 4u * w; j < min(4u * w + 4u, p.head_dim); j++) {
            let multiple = select(0.0, round(rotated[start + j] / step), step > 0.0);
            made |= (u32(i32(multiple)) & 0xffu) << (8u * (j % 4u));
        }
    }
    let row = (p.position + t) % p.capacity * p.num_kv_heads;
    if head < p.num_kv_heads {
        keys[(row + head) * width + w] = made;
    } else {
        values[(row + head - p.num_kv_heads) * width + w] = made;
    }
}
