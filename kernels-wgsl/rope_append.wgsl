// rope_append: q[t, head] = rotate(queries of qkv[t], position + t), the same for keys, and
//              keys[(position + t) mod capacity] = rotated keys, values[likewise] = values of qkv[t]
//
// qkv     f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim]
// angles  f32 [max_seq_len, head_dim / 2, 2], cosine and sine; anything if rotates is 0
// q       f32 [tokens, num_heads · head_dim], overwritten
// keys    f32 [capacity, num_kv_heads · head_dim], tokens rows of it overwritten
// values  f32 [capacity, num_kv_heads · head_dim], tokens rows of it overwritten
//
// One thread per pair (i, i + head_dim / 2) of any head and token: (a, b) becomes
// (a · cos − b · sin, b · cos + a · sin), or stays if rotates is 0. head_dim is even, tokens ≤ capacity.
// groups (pairs of one token / 64 rounded up, tokens)

struct Parameters {
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    position: u32, // of the first token
    capacity: u32,
    rotates: u32,
}

@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> q: array<f32>;
@group(0) @binding(3) var<storage, read_write> keys: array<f32>;
@group(0) @binding(4) var<storage, read_write> values: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn rope_append(@builtin(global_invocation_id) id: vec3<u32>) {
    let pairs = p.head_dim / 2u;
    let head = id.x / pairs;
    let i = id.x % pairs;
    let heads = p.num_heads + 2u * p.num_kv_heads;
    if head >= heads {
        return;
    }
    let start = (id.y * heads + head) * p.head_dim + i;
    let a = qkv[start];
    let b = qkv[start + pairs];
    let position = p.position + id.y;
    let slot = position % p.capacity;
    var angle = vec2<f32>(1.0, 0.0);
    if p.rotates == 1u {
        angle = angles[position * pairs + i];
    }
    let first = a * angle.x - b * angle.y;
    let second = b * angle.x + a * angle.y;
    if head < p.num_heads {
        let to = (id.y * p.num_heads + head) * p.head_dim + i;
        q[to] = first;
        q[to + pairs] = second;
    } else if head < p.num_heads + p.num_kv_heads {
        let to = (slot * p.num_kv_heads + head - p.num_heads) * p.head_dim + i;
        keys[to] = first;
        keys[to + pairs] = second;
    } else {
        let to = (slot * p.num_kv_heads + head - p.num_heads - p.num_kv_heads) * p.head_dim + i;
        values[to] = a;
        values[to + pairs] = b;
    }
}
