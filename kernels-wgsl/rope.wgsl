// rope: rotated[t, head] = rotate(qkv[t, head], position + t) of every query and key head, qkv[t, head] of every value head
//
// qkv      f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim]
// angles   f32 [max_seq_len, head_dim / 2, 2], cosine and sine; anything if rotates is 0
// rotated  f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim], overwritten
//
// One thread per pair (i, i + head_dim / 2) of any head and token: (a, b) becomes
// (a · cos − b · sin, b · cos + a · sin), or stays if rotates is 0. head_dim is even.
// groups (pairs of one token / 64 rounded up, tokens)

struct Parameters {
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    position: u32, // of the first token
    rotates: u32,
}

@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> rotated: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn rope(@builtin(global_invocation_id) id: vec3<u32>) {
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
    if p.rotates == 1u && head < p.num_heads + p.num_kv_heads {
        let angle = angles[(p.position + id.y) * pairs + i];
        rotated[start] = a * angle.x - b * angle.y;
        rotated[start + pairs] = b * angle.x + a * angle.y;
    } else {
        rotated[start] = a;
        rotated[start + pairs] = b;
    }
}
