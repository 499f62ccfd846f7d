// norm_qk: x[i] = gamma[i] · x[i] / sqrt(mean_i x[i]² + eps) for every stretch x of the queries and of the keys
//
// query   f32 [query_len], gamma of queries
// key     f32 [key_len], gamma of keys
// qkv     f32 [tokens, queries + 2 · keys], its queries and keys overwritten
//
// A stretch is as long as its gamma: one head, or all heads together. One group per stretch and token; each of its
// threads sums every 64th square in f32, one adds the 64 sums. query_len divides queries, key_len divides keys.
// groups (queries / query_len + keys / key_len, tokens)

struct Parameters {
    queries: u32, // numbers of one token
    keys: u32, // likewise
    query_len: u32,
    key_len: u32,
    query_eps: f32,
    key_eps: f32,
}

@group(0) @binding(0) var<storage, read> query: array<f32>;
@group(0) @binding(1) var<storage, read> key: array<f32>;
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(THREADS)
fn norm_qk(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let of_queries = p.queries / p.query_len;
    let is_key = group.x >= of_queries;
    let len = select(p.query_len, p.key_len, is_key);
    let at = select(group.x * p.query_len, p.queries + (group.x - of_queries) * p.key_len, is_key);
    let start = group.y * (p.queries + 2u * p.keys) + at;
    var sum = 0.0;
    for (var i = thread; i < len; i += THREADS) {
        sum += qkv[start + i] * qkv[start + i];
    }
    let scale = 1.0 / sqrt(of_group(thread, sum) / f32(len) + select(p.query_eps, p.key_eps, is_key));
    for (var i = thread; i < len; i += THREADS) {
        if is_key {
            qkv[start + i] = key[i] * (qkv[start + i] * scale);
        } else {
            qkv[start + i] = query[i] * (qkv[start + i] * scale);
        }
    }
}
