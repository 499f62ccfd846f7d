// dec_apply: y[t, row] += scales[row] · Σ_{c in list[t]} q[c, row] · x[t, c]
//
// list      u32 [tokens, selected]
// residual  u32 [in_features, words], nibble i of word w is row 8 · (first_word + w) + i, stored as q + 8
// scales    SCALES [out_features]
// x         f32 [tokens, in_features]
// y         f32 [tokens, out_features], added to
//
// A group owns a stripe of output words (eight rows each); n_tb of them share the matrix, in whole lines of `line`
// words. `words` and `first_word` are those of this block of it. One thread per word; sums in f32 over the list in order.
// groups (n_tb, tokens)

override SCALES: u32 = 1u;

struct Parameters {
    in_features: u32,
    out_features: u32,
    selected: u32,
    line: u32, // words that stay together
    n_tb: u32,
    first_word: u32, // of this block of the matrix
    words: u32, // of this block
}

@group(0) @binding(0) var<storage, read> list: array<u32>;
@group(0) @binding(1) var<storage, read> residual: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
var<immediate> p: Parameters;

const THREADS: u32 = 64u;

fn nibbles(word: u32, shift: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(vec4<i32>((vec4<u32>(word) >> shift) & vec4<u32>(15u)) - vec4<i32>(8));
}

fn add(out: u32, row: u32, sum: f32) {
    y[out + row] += number(scales[slot(row, SCALES)], row, SCALES) * sum;
}

// Where the stripe of a group begins; that of the last one may end after the last word.
fn bound(group: u32) -> u32 {
    let lines = (p.out_features / 8u + p.line - 1u) / p.line;
    return lines * group / p.n_tb * p.line;
}

@compute @workgroup_size(THREADS)
fn dec_apply(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let start = max(bound(group.x), p.first_word);
    let end = min(bound(group.x + 1u), p.first_word + p.words);
    for (var word = start + thread; word < end; word += THREADS) {
        var low = vec4<f32>();
        var high = vec4<f32>();
        for (var i = 0u; i < p.selected; i++) {
            let channel = list[group.y * p.selected + i];
            let value = x[group.y * p.in_features + channel];
            let q = residual[channel * p.words + (word - p.first_word)];
            low += nibbles(q, vec4<u32>(0u, 4u, 8u, 12u)) * value;
            high += nibbles(q, vec4<u32>(16u, 20u, 24u, 28u)) * value;
        }
        let out = group.y * p.out_features;
        let row = 8u * word;
        add(out, row, low.x);
        add(out, row + 1u, low.y);
        add(out, row + 2u, low.z);
        add(out, row + 3u, low.w);
        add(out, row + 4u, high.x);
        add(out, row + 5u, high.y);
        add(out, row + 6u, high.z);
        add(out, row + 7u, high.w);
    }
}
