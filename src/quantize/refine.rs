//! Codes and what they stand for, fitted to what a whole row adds up instead of weight by weight.
//!
//! The loss of a row is `(w − q)·H·(w − q)ᵀ` ([`super::gram`]). Two steps take turns, neither of which can raise it:
//! *parameters* (a codebook, or steps and centres of groups) by least squares with the codes as they are, by
//! conjugate gradients; *codes* by cyclic coordinate descent over channels. This is LNQ (Kim et al., GuidedQuant,
//! 2025, §4.2); coordinate descent on codes is from QuantEase (Behdin et al., 2023).
//!
//! Rows go in blocks, channels in blocks inside them: the gradient `(w − q)·H` is kept up to date one channel at a
//! time inside a block, and for all other channels by one matrix product when the block is done.

use rayon::prelude::*;

use super::gram::Hessian;
use super::product::{Strided, Threads, accumulate, multiply};
pub(crate) use grids::{Codebook, Groups};

mod grids;
#[cfg(test)]
mod tests;

/// Rows that go together at most; of few rows a quarter, so that there is work for several cores.
const ROWS: usize = 64;
/// Channels between two updates of the whole gradient.
const CHANNELS: usize = 64;

/// How codes stand for weights: every weight is a linear function of its row's parameters.
pub(crate) trait Grid: Sync {
    /// Parameters of a row.
    fn parameters(&self) -> usize;
    /// Overwrites `out` (a row) with the weights that `codes` stand for.
    fn weights(&self, parameters: &[f32], codes: &[u8], out: &mut [f32]);
    /// Overwrites `out` with the derivatives by the parameters, from those by the weights, `gradient`.
    fn derivatives(&self, codes: &[u8], gradient: &[f32], out: &mut [f32]);
    /// Overwrites `out` with the second derivatives by each parameter, if `diagonal` were all of the Hessian.
    fn curvatures(&self, codes: &[u8], diagonal: &[f32], out: &mut [f32]);
    /// The code in channel `k` that stands for the weight nearest to `target`, and that weight.
    fn nearest(&self, parameters: &[f32], k: usize, target: f32) -> (u8, f32);
    /// Brings parameters into the order that `nearest` expects; the weights stay what they are.
    fn tidy(&self, parameters: &mut [f32], codes: &mut [u8]);
    /// Parameters as they will be stored.
    fn store(&self, parameters: &mut [f32]);
}

/// Either of them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AnyGrid {
    /// One codebook a row.
    Codebook(Codebook),
    /// Even steps in groups of channels.
    Groups(Groups),
}

/// How often the steps take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Effort {
    /// Rounds of parameters and codes.
    pub(crate) rounds: usize,
    /// Steps of conjugate gradients in a round.
    pub(crate) steps: usize,
}

/// Lowers the loss of every row of `w` `[rows, channels]`, from `codes` `[rows, channels]` and `parameters`
/// `[rows, grid.parameters()]` on. Parameters are as stored in the end, and codes belong to these.
pub(crate) fn refine(
    grid: &impl Grid,
    hessian: &Hessian,
    w: &[f32],
    codes: &mut [u8],
    parameters: &mut [f32],
    effort: Effort,
) -> f64 {
    let (n, p) = (hessian.channels, grid.parameters());
    let rows = (w.len() / n).div_ceil(4).min(ROWS);
    let blocks = w.par_chunks(rows * n).zip(codes.par_chunks_mut(rows * n)).zip(parameters.par_chunks_mut(rows * p));
    let losses: Vec<f64> = blocks
        .map(|((w, codes), parameters)| {
            let mut block = Block::new(grid, hessian, w, codes, parameters);
            for _ in 0..effort.rounds {
                block.fit(effort.steps);
                block.descend();
            }
            block.fit(effort.steps);
            block.store();
            block.descend();
            block.loss()
        })
        .collect();
    losses.iter().sum()
}

/// A few rows on their way.
struct Block<'a, G> {
    grid: &'a G,
    hessian: &'a Hessian,
    w: &'a [f32],              // [rows, channels]
    codes: &'a mut [u8],       // [rows, channels]
    parameters: &'a mut [f32], // [rows, parameters]
    q: Vec<f32>,               // [rows, channels]: what codes and parameters stand for
    gradient: Vec<f32>,        // [rows, channels]: (w − q)·H
}

impl<'a, G: Grid> Block<'a, G> {
    fn new(grid: &'a G, hessian: &'a Hessian, w: &'a [f32], codes: &'a mut [u8], parameters: &'a mut [f32]) -> Self {
        let mut block =
            Self { grid, hessian, w, codes, parameters, q: vec![0.0; w.len()], gradient: vec![0.0; w.len()] };
        block.restart();
        block
    }

    /// Everything anew from codes and parameters.
    fn restart(&mut self) {
        let (n, p) = (self.hessian.channels, self.grid.parameters());
        let rows =
            self.parameters.chunks_exact_mut(p).zip(self.codes.chunks_exact_mut(n)).zip(self.q.chunks_exact_mut(n));
        for ((parameters, codes), q) in rows {
            self.grid.tidy(parameters, codes);
            self.grid.weights(parameters, codes, q);
        }
        let error: Vec<f32> = self.w.iter().zip(&self.q).map(|(w, q)| w - q).collect();
        self.gradient = self.through(&error);
    }

    /// `x·H` for rows `x`.
    fn through(&self, x: &[f32]) -> Vec<f32> {
        let n = self.hessian.channels;
        let mut y = vec![0.0; x.len()];
        let rows = Strided { values: x, row: n, column: 1 };
        multiply([x.len() / n, n, n], rows, self.hessian.strided(), &mut y, Threads::One);
        y
    }

    fn loss(&self) -> f64 {
        let errors = self.w.iter().zip(&self.q).zip(&self.gradient);
        errors.map(|((w, q), g)| f64::from(w - q) * f64::from(*g)).sum()
    }

    /// The parameters nearer to those with the least loss for these codes: conjugate gradients, every row by itself.
    fn fit(&mut self, steps: usize) {
        let (n, p) = (self.hessian.channels, self.grid.parameters());
        let diagonal: Vec<f32> = self.hessian.diagonal().collect();
        let mut curvature = vec![0.0; self.parameters.len()];
        for (codes, out) in self.codes.chunks_exact(n).zip(curvature.chunks_exact_mut(p)) {
            self.grid.curvatures(codes, &diagonal, out);
        }
        let mut slope = vec![0.0; curvature.len()];
        let mut direction = vec![0.0; curvature.len()];
        let mut before = vec![0f32; curvature.len() / p];
        let mut step = vec![0.0; self.q.len()];
        for _ in 0..steps {
            let rows = self.codes.chunks_exact(n).zip(self.gradient.chunks_exact(n)).zip(slope.chunks_exact_mut(p));
            rows.for_each(|((codes, gradient), slope)| self.grid.derivatives(codes, gradient, slope));
            for (row, before) in before.iter_mut().enumerate() {
                let range = row * p..(row + 1) * p;
                let (slope, curvature) = (&slope[range.clone()], &curvature[range.clone()]);
                let scaled = |i: usize| if curvature[i] > 0.0 { slope[i] / curvature[i] } else { 0.0 };
                let now: f32 = (0..p).map(|i| slope[i] * scaled(i)).sum();
                let keep = if *before > 0.0 { now / *before } else { 0.0 };
                *before = now;
                for (i, d) in direction[range.clone()].iter_mut().enumerate() {
                    *d = scaled(i) + keep * *d;
                }
                self.grid.weights(&direction[range], &self.codes[row * n..][..n], &mut step[row * n..][..n]);
            }
            let through = self.through(&step);
            for (row, &slope) in before.iter().enumerate() {
                let range = row * n..(row + 1) * n;
                let (step, through) = (&step[range.clone()], &through[range.clone()]);
                let bend: f64 = step.iter().zip(through).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                if bend <= 0.0 {
                    continue;
                }
                let by = (f64::from(slope) / bend) as f32;
                let moved = self.parameters[row * p..][..p].iter_mut().zip(&direction[row * p..]);
                moved.for_each(|(parameter, d)| *parameter += by * d);
                self.q[range.clone()].iter_mut().zip(step).for_each(|(q, s)| *q += by * s);
                self.gradient[range].iter_mut().zip(through).for_each(|(g, t)| *g -= by * t);
            }
        }
        for (parameters, codes) in self.parameters.chunks_exact_mut(p).zip(self.codes.chunks_exact_mut(n)) {
            self.grid.tidy(parameters, codes);
        }
    }

    /// One sweep over all channels: each code becomes the best with all others as they are.
    fn descend(&mut self) {
        let (n, p) = (self.hessian.channels, self.grid.parameters());
        let rows = self.w.len() / n;
        for first in (0..n).step_by(CHANNELS) {
            let width = CHANNELS.min(n - first);
            let mut moved = vec![0.0; rows * width];
            let mut any = false;
            for row in 0..rows {
                let mut local = [0.0; CHANNELS];
                let local = &mut local[..width];
                local.copy_from_slice(&self.gradient[row * n + first..][..width]);
                let parameters = &self.parameters[row * p..][..p];
                for k in 0..width {
                    let h = &self.hessian.row(first + k)[first..first + width];
                    let at = row * n + first + k;
                    let (code, value) = self.grid.nearest(parameters, first + k, self.q[at] + local[k] / h[k]);
                    let by = value - self.q[at];
                    if by != 0.0 {
                        any = true;
                        (self.codes[at], self.q[at]) = (code, value);
                        moved[row * width + k] = -by;
                        local.iter_mut().zip(h).for_each(|(g, h)| *g -= by * h);
                    }
                }
            }
            if any {
                let moved = Strided { values: &moved, row: width, column: 1 };
                let h = Strided { values: &self.hessian.values[first * n..], row: n, column: 1 };
                accumulate([rows, n, width], moved, h, &mut self.gradient, Threads::One);
            }
        }
    }

    /// Rounds parameters to what is stored.
    fn store(&mut self) {
        self.parameters.chunks_exact_mut(self.grid.parameters()).for_each(|parameters| self.grid.store(parameters));
        self.restart();
    }
}
