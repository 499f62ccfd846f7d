//! Softmax, gating and caps, and the exponential function under both: a library call for every element takes a tenth of a
//! quantization's time, a loop over polynomials that the compiler makes vectors of does not.

use rayon::prelude::*;

use super::product::path;
use crate::config::Activation;
use crate::processor::on_every_path;

/// Partial sums that are kept side by side, so that no addition waits for the one before.
pub(crate) const LANES: usize = 16;

/// `eˣ` to about 2^-22 of itself, for `x` in -87 .. 88; beyond, the value at the nearer end. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding 1.5 · 2^23 rounds to a whole number, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// The leading bits of ln 2, of which every whole multiple here is exact, and the rest of it.
    const LN_2: (f32, f32) = (0.693_145_75, 1.428_606_8e-6);
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let whole = rounded - ROUND;
    let r = x - whole * LN_2.0 - whole * LN_2.1;
    // Taylor's series: |r| ≤ ln 2 / 2, so what is left out is below 2^-22.
    let tail = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0));
    let fraction = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * tail)));
    fraction * f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// The largest of `row`, of which NaN is none.
#[inline(always)]
pub(crate) fn largest(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(m, &x)| *m = if x > *m { x } else { *m });
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| m.max(x))
}

/// Σ aᵢ·bᵢ, in lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    // In halves: one after the other they would wait for each other.
    for half in [8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    lanes[0] + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

on_every_path! {
/// Logits to probabilities, in place.
pub(crate) fn softmax(row: &mut [f32]) {
    let max = largest(row);
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (x, sum) in chunk.iter_mut().zip(&mut lanes) {
            *x = exp(*x - max);
            *sum += *x;
        }
    }
    rest.iter_mut().for_each(|x| *x = exp(*x - max));
    let share = 1.0 / (lanes.iter().sum::<f32>() + rest.iter().sum::<f32>());
    row.iter_mut().for_each(|x| *x *= share);
}
}

/// `ln Σ eˣ`.
#[inline(always)]
pub(crate) fn log_sum(row: &[f32]) -> f64 {
    let max = largest(row);
    // Lanes are summed up often enough to keep what f32 resolves.
    let parts = row.chunks(64 * LANES).map(|part| {
        let mut lanes = [0f32; LANES];
        let (chunks, rest) = part.as_chunks::<LANES>();
        chunks.iter().for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += exp(x - max)));
        lanes.iter().map(|&x| f64::from(x)).chain(rest.iter().map(|x| f64::from(exp(x - max)))).sum::<f64>()
    });
    f64::from(max) + parts.sum::<f64>().ln()
}

/// Every `x` of `row` becomes `cap · tanh(x / cap)`, off by 2^-22 of `cap` at most.
pub(crate) fn softcap(cap: f32, row: &mut [f32]) {
    for x in row {
        // tanh |u| = (1 − e^−2|u|) / (1 + e^−2|u|): nothing overflows.
        let e = exp(-2.0 / cap * x.abs());
        *x = (cap * (1.0 - e) / (1.0 + e)).copysign(*x);
    }
}

/// `activation(gate) ⊙ up`, `[tokens, intermediate]` from `[tokens, gate then up]`.
pub(crate) fn gated(activation: Activation, gate_up: &[f32], intermediate: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    let rows = out.par_chunks_exact_mut(intermediate).zip(gate_up.par_chunks_exact(2 * intermediate));
    rows.for_each(|(out, gate_up)| gate(path(), activation, gate_up, out));
    out
}

on_every_path! {
/// The same of one token.
fn gate(activation: Activation, gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-activation.exponent(gate))) * up;
    }
}
}

/// The derivative by gate and up, from that by `activation(gate) ⊙ up`.
pub(crate) fn gated_back(activation: Activation, gate_up: &[f32], d: &[f32], intermediate: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len()];
    let rows = out.par_chunks_exact_mut(2 * intermediate).zip(gate_up.par_chunks_exact(2 * intermediate));
    let rows = rows.zip(d.par_chunks_exact(intermediate));
    rows.for_each(|((out, gate_up), d)| gate_back(path(), activation, gate_up, d, out));
    out
}

on_every_path! {
/// The same of one token.
fn gate_back(activation: Activation, gate_up: &[f32], d: &[f32], out: &mut [f32]) {
    let (d_gate, d_up) = out.split_at_mut(d.len());
    let (gate, up) = gate_up.split_at(d.len());
    for ((d_gate, d_up), ((&gate, up), d)) in d_gate.iter_mut().zip(d_up).zip(gate.iter().zip(up).zip(d)) {
        let sigmoid = 1.0 / (1.0 + exp(-activation.exponent(gate)));
        *d_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid) * activation.exponent_slope(gate));
        *d_up = d * gate * sigmoid;
    }
}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_function_is_the_library_s_to_what_f32_resolves() {
        for i in -8700..=8800 {
            let x = i as f32 * 0.010_000_7;
            let want = f64::from(x).clamp(-87.0, 88.0).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2f64.powi(-22), "exp({x}) is {}, {want} expected", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn caps_are_the_library_s_to_what_f32_resolves() {
        for cap in [0.5f32, 30.0, 50.0] {
            let mut capped: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.01 * cap).chain([0.0, 1e-3, 1e30]).collect();
            let plain = capped.clone();
            softcap(cap, &mut capped);
            for (got, x) in capped.iter().zip(&plain) {
                let want = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                assert!((f64::from(*got) - want).abs() < 2f64.powi(-22) * f64::from(cap), "{x}: {got}, {want}");
            }
            assert!(capped.iter().zip(&plain).any(|(got, x)| (got - x).abs() > 0.1 * cap), "nothing was capped");
        }
        let mut row = [f32::NAN];
        softcap(1.0, &mut row);
        assert!(row[0].is_nan());
    }

    #[test]
    fn probabilities_sum_to_one_whatever_the_length_and_nan_is_not_lost() {
        for len in [1, 15, 16, 17, 1000] {
            let logits: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 / 7.0 - 30.0).collect();
            let mut row = logits.clone();
            softmax(path(), &mut row);
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{len} logits");
            let sum = log_sum(&logits);
            for (p, l) in row.iter().zip(&logits) {
                let want = (f64::from(*l) - sum).exp();
                assert!((f64::from(*p) - want).abs() < 1e-6 * want.max(1e-3), "{len} logits: {p}, {want}");
            }
        }
        let mut row = [0.0, f32::NAN, 1.0];
        softmax(path(), &mut row);
        assert!(row.iter().all(|p| p.is_nan()));
    }
}
