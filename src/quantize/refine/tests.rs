//! The loss never rises, and on tiny rows nothing is better.

use super::*;
use crate::sampling;

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    sampling::draws(seed, len).iter().map(|x| 2.0 * x - 1.0).collect()
}

/// The Hessian of inputs whose channels are alike, so that errors can cancel.
fn hessian(seed: u64, channels: usize) -> Hessian {
    let mut x = numbers(seed, 50 * channels);
    for x in x.chunks_exact_mut(channels) {
        let common = x[0] * 2.0;
        x.iter_mut().for_each(|x| *x += common);
    }
    let mut hessian = Hessian::of(&x, channels);
    hessian.damp();
    hessian
}

/// `(w − q)·H·(w − q)ᵀ`, summed over rows, in f64.
fn loss(grid: &impl Grid, hessian: &Hessian, w: &[f32], codes: &[u8], parameters: &[f32]) -> f64 {
    let n = hessian.channels;
    let rows = w.chunks_exact(n).zip(codes.chunks_exact(n)).zip(parameters.chunks_exact(grid.parameters()));
    rows.map(|((w, codes), parameters)| {
        let mut q = vec![0.0; n];
        grid.weights(parameters, codes, &mut q);
        let d: Vec<f64> = w.iter().zip(&q).map(|(w, q)| f64::from(w - q)).collect();
        let through = |i: usize| hessian.row(i).iter().zip(&d).map(|(h, d)| f64::from(*h) * d).sum::<f64>();
        (0..n).map(|i| d[i] * through(i)).sum::<f64>()
    })
    .sum()
}

/// Nearest codes.
fn round(grid: &impl Grid, w: &[f32], n: usize, parameters: &[f32]) -> Vec<u8> {
    let nearest = |(i, &w): (usize, &f32)| {
        let row = &parameters[i / n * grid.parameters()..][..grid.parameters()];
        grid.nearest(row, i % n, w).0
    };
    w.iter().enumerate().map(nearest).collect()
}

/// Rows, channels, and for both formats a grid with parameters to begin with.
const ROWS_: usize = 70;
const N: usize = 160;

fn begin(grid: &impl Grid, row: &[f32]) -> (Vec<f32>, Vec<u8>, Vec<f32>) {
    let w = numbers(1, ROWS_ * N);
    let parameters = row.repeat(ROWS_);
    let codes = round(grid, &w, N, &parameters);
    (w, codes, parameters)
}

fn never_rises(grid: &impl Grid, row: &[f32]) {
    let hessian = hessian(2, N);
    let (w, mut codes, mut parameters) = begin(grid, row);
    let start = loss(grid, &hessian, &w, &codes, &parameters);
    let mut before = start;
    let mut block = Block::new(grid, &hessian, &w, &mut codes, &mut parameters);
    for step in 0..8 {
        if step % 2 == 0 {
            block.fit(2)
        } else {
            block.descend()
        }
        let now = loss(grid, &hessian, &w, block.codes, block.parameters);
        assert!(now <= before * (1.0 + 1e-5), "step {step}: {now} after {before}");
        assert!((block.loss() - now).abs() <= 1e-3 * now, "what is kept up to date strays: {}, {now}", block.loss());
        before = now;
    }
    assert!(before < 0.5 * start, "{before} of {start}");
}

#[test]
fn no_step_raises_the_loss() {
    never_rises(&Codebook { bits: 3 }, &[-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875]);
    let groups = Groups { bits: 3, group_size: 32, groups: N / 32 };
    never_rises(&groups, &[0.0, 0.125].repeat(N / 32));
}

#[test]
fn what_is_stored_is_half_precision_and_codes_are_best_for_it() {
    let hessian = hessian(3, N);
    let grid = Codebook { bits: 2 };
    let (w, mut codes, mut parameters) = begin(&grid, &[-0.75, -0.25, 0.25, 0.75]);
    let got = refine(&grid, &hessian, &w, &mut codes, &mut parameters, Effort { rounds: 20, steps: 4 });
    let want = loss(&grid, &hessian, &w, &codes, &parameters);
    assert!((got - want).abs() < 1e-3 * want, "{got}, {want}");
    assert!(parameters.iter().all(|&c| half::f16::from_f32(c).to_f32() == c));
    // No single code can be changed for the better, after as many sweeps.
    let mut better = 0;
    for i in (0..w.len()).step_by(37) {
        for code in 0..4 {
            let old = std::mem::replace(&mut codes[i], code);
            better += usize::from(loss(&grid, &hessian, &w, &codes, &parameters) < want * (1.0 - 1e-4));
            codes[i] = old;
        }
    }
    assert!(better <= 2, "{better} codes could be better");
}

/// Every assignment of 4 codes to 5 channels, each with its best codebook.
fn exhaustive(hessian: &Hessian, w: &[f32]) -> f64 {
    let grid = Codebook { bits: 1 };
    let mut best = f64::INFINITY;
    for assignment in 0..1u32 << w.len() {
        let mut codes: Vec<u8> = (0..w.len()).map(|k| (assignment >> k & 1) as u8).collect();
        let mut parameters = [-0.5, 0.5];
        let mut block = Block::new(&grid, hessian, w, &mut codes, &mut parameters);
        (0..4).for_each(|_| block.fit(2));
        best = best.min(loss(&grid, hessian, w, block.codes, block.parameters));
    }
    best
}

#[test]
fn tiny_rows_come_near_what_trying_everything_finds() {
    let (mut refined, mut rounded, mut least) = (0.0, 0.0, 0.0);
    let grid = Codebook { bits: 1 };
    for seed in 0..20 {
        let hessian = hessian(seed, 8);
        let w = numbers(100 + seed, 8);
        let mut parameters = vec![-0.5, 0.5];
        let mut codes = round(&grid, &w, 8, &parameters);
        rounded += loss(&grid, &hessian, &w, &codes, &parameters);
        let best = exhaustive(&hessian, &w);
        let got = refine(&grid, &hessian, &w, &mut codes, &mut parameters, Effort { rounds: 10, steps: 2 });
        assert!(got >= best * (1.0 - 1e-3), "better than the best: {got}, {best}");
        (refined, least) = (refined + got, least + best);
    }
    assert!(refined < 2.0 * least && rounded > 3.0 * least, "{refined} refined, {rounded} rounded, {least} at best");
}
