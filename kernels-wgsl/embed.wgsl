// embed: h[t] = values[ids[first + t]]
//
// ids     u32, ids[first + t] below the table's rows
// values  VALUES [rows, features], the rows from first_row on
// h       f32 [tokens, features], overwritten where the token's row is in this block
//
// One thread per feature and token.
// groups (features / 64 rounded up, tokens)

override VALUES: u32 = 1u;

struct Parameters {
    features: u32,
    rows: u32, // of this block
    first_row: u32, // of this block in the table
    first: u32, // of the ids
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read_write> h: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn embed(@builtin(global_invocation_id) id: vec3<u32>) {
    // Below first_row this wraps around to more than any block has.
    let row = ids[p.first + id.y] - p.first_row;
    if id.x >= p.features || row >= p.rows {
        return;
    }
    let i = row * p.features + id.x;
    h[id.y * p.features + id.x] = number(values[slot(i, VALUES)], i, VALUES);
}
