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
        var sums = array<f32, 8>();
        for (var i = 0u; i < p.selected; i++) {
            let channel = list[group.y * p.selected + i];
            let value = x[group.y * p.in_features + channel];
            let nibbles = residual[channel * p.words + (word - p.first_word)];
            for (var j = 0u; j < 8u; j++) {
                sums[j] += f32(i32(nibbles >> (4u * j) & 15u) - 8) * value;
            }
        }
        for (var j = 0u; j < 8u; j++) {
            let row = 8u * word + j;
            y[group.y * p.out_features + row] += number(scales[slot(row, SCALES)], row, SCALES) * sums[j];
        }
    }
}
