// embed: h[t] = scale · values[ids[first + t]], NaN where the table has no such row
//
// ids     u32
// values  VALUES [rows, features], the rows from first_row on
// h       f32 [tokens, features] as bit patterns, overwritten where the token's row is in this block or in none
//
// One thread per feature and token.
// groups (features / 64 rounded up, tokens)

override VALUES: u32 = 1u;

const NAN: u32 = 0x7fc00000u;

struct Parameters {
    features: u32,
    rows: u32, // of this block
    first_row: u32, // of this block in the table
    first: u32, // of the ids
    table_rows: u32, // of all blocks
    scale: f32,
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read_write> h: array<u32>;
var<immediate> p: Parameters;

@compute @workgroup_size(64)
fn embed(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.features {
        return;
    }
    let token = ids[p.first + id.y];
    let to = id.y * p.features + id.x;
    if token >= p.table_rows {
        h[to] = NAN;
        return;
    }
    // Below first_row this wraps around to more than any block has.
    let row = token - p.first_row;
    if row < p.rows {
        let i = row * p.features + id.x;
        h[to] = bitcast<u32>(p.scale * number(values[slot(i, VALUES)], i, VALUES));
    }
}
