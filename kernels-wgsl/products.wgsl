// What the products share; this text follows theirs. Each has its tables, then bias, then the window x, then y.

struct Parameters {
    in_features: u32,
    out_features: u32, // rows of this block
    first_row: u32, // of this block in y
    y_features: u32,
    accumulate: u32,
    first_channel: u32, // of the window
    channels: u32, // of the window
    first_token: u32, // of the window
    group_size: u32, // 0 without groups
}

var<immediate> p: Parameters;

// Puts a window's sum where it belongs; the first window brings the bias.
fn store(row: u32, token: u32, sum: f32) {
    let to = p.first_row + row;
    let out = (p.first_token + token) * p.y_features + to;
    y[out] = sum + select(0.0, bias[to], p.first_channel == 0u) + select(0.0, y[out], p.accumulate == 1u);
}
