// attend: out[t, head] = Σ_s softmax_s(cap(factor · q[t, head] · k[s, kv])) · v[s, kv]
//         over the positions s ≤ position + t, at most `window` of the latest; kv = head · num_kv_heads / num_heads
//
// rotated  f32 [tokens, (num_heads + 2 · num_kv_heads) · head_dim]: q, and k and v of the positions from `position` on
// keys     f32 [capacity, num_kv_heads · head_dim]: k of an earlier position s is row s mod capacity; with BYTES as
//          append_bytes writes them
// values   likewise v
// out      f32 [tokens, num_heads · head_dim], overwritten
//
// One group per head and token. Positions come in tiles of 256: a thread computes every 64th score of a
// tile, then all threads add the tile's values, each to its own features, rescaling what they have by the
// new maximum. head_dim ≤ 256.
// factor = scale · (1 + beta · ln(1 + ⌊(position + t) / original⌋)), and cap(s) = softcap · tanh(s / softcap), or s if
// softcap is 0. Earlier positions that are seen are all among the latest `capacity`.
// groups (num_heads, tokens)

struct Parameters {
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    position: u32, // of the first token
    window: u32,
    capacity: u32,
    scale: f32,
    softcap: f32,
    beta: f32,
    original: u32,
}

@group(0) @binding(0) var<storage, read> rotated: array<f32>;
@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read> values: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
var<immediate> p: Parameters;

override BYTES: u32 = 0u;

const TILE: u32 = 256u;
const FEATURES: u32 = 4u; // of one thread, at most

var<workgroup> scores: array<f32, TILE>;

// Where a head of a token of `rotated` is.
fn place(t: u32, head: u32) -> u32 {
    return (t * (p.num_heads + 2u * p.num_kv_heads) + head) * p.head_dim;
}

// Signed byte j of a row, of which this is the word.
fn byte(word: u32, j: u32) -> f32 {
    return f32(extractBits(bitcast<i32>(word), 8u * (j % 4u), 8u));
}

// Words of bytes of a row; its step follows.
fn bytes_width() -> u32 {
    return (p.head_dim + 3u) / 4u;
}

// q · k of the query at `query` and a position.
fn product(query: u32, position: u32, kv: u32) -> f32 {
    var sum = 0.0;
    if position < p.position {
        let row = position % p.capacity * p.num_kv_heads + kv;
        if BYTES == 1u {
            let key = row * (bytes_width() + 1u);
            let step = bitcast<f32>(keys[key + bytes_width()]);
            for (var j = 0u; j < p.head_dim; j++) {
                sum += rotated[query + j] * (step * byte(keys[key + j / 4u], j));
            }
            return sum;
        }
        let key = row * p.head_dim;
        for (var j = 0u; j < p.head_dim; j++) {
            sum += rotated[query + j] * bitcast<f32>(keys[key + j]);
        }
    } else {
        let key = place(position - p.position, p.num_heads + kv);
        for (var j = 0u; j < p.head_dim; j++) {
            sum += rotated[query + j] * rotated[key + j];
        }
    }
    return sum;
}

// Number j of v of a position.
fn value(position: u32, kv: u32, j: u32) -> f32 {
    if position < p.position {
        let row = position % p.capacity * p.num_kv_heads + kv;
        if BYTES == 1u {
            let start = row * (bytes_width() + 1u);
            return bitcast<f32>(values[start + bytes_width()]) * byte(values[start + j / 4u], j);
        }
        return bitcast<f32>(values[row * p.head_dim + j]);
    }
    return rotated[place(position - p.position, p.num_heads + p.num_kv_heads + kv) + j];
}

@compute @workgroup_size(THREADS)
fn attend(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let kv = group.x / (p.num_heads / p.num_kv_heads);
    let query = place(group.y, group.x);
    let row = (group.y * p.num_heads + group.x) * p.head_dim;
    let position = p.position + group.y;
    let factor = p.scale * (1.0 + p.beta * log(1.0 + f32(position / p.original)));
    let end = position + 1u;
    let start = end - min(end, p.window);
    var largest = -3.0e38;
    var total = 0.0;
    var sums = array<f32, FEATURES>();
    for (var tile = start; tile < end; tile += TILE) {
        let length = min(end - tile, TILE);
        for (var i = thread; i < length; i += THREADS) {
            var score = factor * product(query, tile + i, kv);
            if p.softcap > 0.0 {
                score = capped(score, p.softcap);
            }
            scores[i] = score;
        }
        workgroupBarrier();

        var new_largest = largest;
        for (var i = 0u; i < length; i++) {
            new_largest = max(new_largest, scores[i]);
        }
        let rescale = exp(largest - new_largest);
        largest = new_largest;
        total *= rescale;
        for (var f = 0u; f < FEATURES; f++) {
            sums[f] *= rescale;
        }
        for (var i = 0u; i < length; i++) {
            let share = exp(scores[i] - largest);
            total += share;
            for (var f = 0u; f < FEATURES; f++) {
                let j = thread + f * THREADS;
                if j < p.head_dim {
                    sums[f] += share * value(tile + i, kv, j);
                }
            }
        }
        workgroupBarrier();
    }
    for (var f = 0u; f < FEATURES; f++) {
        let j = thread + f * THREADS;
        if j < p.head_dim {
            out[row + j] = sums[f] / total;
        }
    }
}
