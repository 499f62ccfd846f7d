// append: keys[(position + t) mod capacity] = keys of rotated[t], values[likewise] = values of rotated[t], for every token t
//         from `first` on
//
// rotated  f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim]
// keys     f32 [capacity, num_kv_heads · head_dim], a row overwritten for each of these tokens
// values   f32 [capacity, num_kv_heads · head_dim], likewise
//
// One thread per number of a token's keys and values. tokens − first ≤ capacity.
// groups (numbers of one token / 64 rounded up, tokens − first)

struct Parameters {
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    position: u32, // of the first token of rotated
    capacity: u32,
    first: u32,
}

@group(0) @binding(0) var<storage, read> rotated: array<f32>;
@group(0) @binding(1) var<storage, read_write> keys: array<f32>;
@group(0) @binding(2) var<storage, read_write> values: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn append(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = p.num_kv_heads * p.head_dim;
    if id.x >= 2u * width {
        return;
    }
    let t = p.first + id.y;
    let queries = p.num_heads * p.head_dim;
    let number = rotated[t * (queries + 2u * width) + queries + id.x];
    let row = (p.position + t) % p.capacity * width;
    if id.x < width {
        keys[row + id.x] = number;
    } else {
        values[row + id.x - width] = number;
    }
}
