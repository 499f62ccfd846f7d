//! What is learned of what enters a projection, batch by batch: nothing of a batch stays but sums.

use std::cell::Cell;

use anyhow::Result;

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::fit::OnDevice;
use super::pool::Room;
use super::{Floats, Mask, Quantizer, of};
use crate::quantize::calibrate;
use crate::quantize::compute::{Curvature, Entered, Metric, Tensor, Watch};
use crate::quantize::gram::Damping;
use crate::quantize::regress::{self, Together};

/// Σx² of every channel, over all tokens and over those for which it is taken, in double precision.
struct Sums {
    all: Room,   // f64 [n]
    taken: Room, // the same
    n: usize,
}

impl Sums {
    fn new(on: &Quantizer<'_>, n: usize) -> Result<Self> {
        let sums = Self { all: on.pool.room(8 * n)?, taken: on.pool.room(8 * n)?, n };
        sums.all.buffer().clear()?;
        sums.taken.buffer().clear()?;
        Ok(sums)
    }

    fn add(&self, on: &Quantizer<'_>, x: &Floats, mask: &Mask) -> Result<()> {
        let (from, bits) = (x.at(), mask.bits.as_ref().map_or(0u64, Room::at));
        let (all, taken, n, tokens) = (self.all.at(), self.taken.at(), self.n as i32, (x.len / self.n) as i32);
        let arguments = Arguments::new().with(&from).with(&bits).with(&all).with(&taken).with(&n).with(&tokens);
        on.launch("watch.cu", "squares", &[], (self.n / 32, 256), arguments)
    }

    /// Where a channel is taken, and over all, where a silent channel counts a little.
    fn energies(&self, _: &Quantizer<'_>) -> Result<[Vec<f32>; 2]> {
        let [mut taken, mut all] = [vec![0f64; self.n], vec![0f64; self.n]];
        self.taken.buffer().read(&mut taken)?;
        self.all.buffer().read(&mut all)?;
        Ok([taken.iter().map(|&sum| sum as f32).collect(), calibrate::floored(&all)])
    }
}

/// Hessian and sums for one `k_chunk`.
struct OfCount {
    k_chunk: usize,
    hessian: Floats, // [n, n]
    /// Σ z zᵀ and Σ z x̄ᵀ, both `[n, n]`, where the residual is regressed.
    together: Option<[Floats; 2]>,
    sums: Sums,
    damped: Cell<bool>,
}

/// What enters a projection of `n` channels.
pub(super) struct Watched<'q> {
    on: &'q Quantizer<'q>,
    n: usize,
    alone: f32,
    sums: Sums,
    fits: Vec<OfCount>,
    largest: Room, // u32 [n]: thresholds, as bits
    /// Those of widths that a block cannot sort in shared memory, found on the host.
    by_host: Vec<f32>,
    keeps: bool,
    all: Vec<f32>,
}

impl<'q> Watched<'q> {
    pub(super) fn new(on: &'q Quantizer<'_>, n: usize, watch: &Watch) -> Result<Self> {
        let fit = |&k_chunk: &usize| {
            let hessian = on.floats(n * n)?;
            hessian.room.buffer().clear()?;
            let zeros = || {
                let sums = on.floats(n * n)?;
                sums.room.buffer().clear()?;
                anyhow::Ok(sums)
            };
            let regressed = k_chunk > 0 && n <= regress::WIDEST;
            let together = if regressed { Some([zeros()?, zeros()?]) } else { None };
            anyhow::Ok(OfCount { k_chunk, hessian, together, sums: Sums::new(on, n)?, damped: Cell::new(false) })
        };
        let fits = watch.k_chunks.iter().map(fit).collect::<Result<Vec<_>>>()?;
        let largest = on.pool.room(4 * n)?;
        largest.buffer().clear()?;
        let sums = Sums::new(on, n)?;
        let (keeps, alone) = (watch.all, watch.alone);
        Ok(Self { on, n, alone, sums, fits, largest, by_host: Vec::new(), keeps, all: Vec::new() })
    }

    /// `hessian += by · xᵀx`
    fn gram(&self, hessian: &Floats, x: &Floats, by: f32) -> Result<()> {
        self.across(hessian, (x, x), by)
    }

    /// `sums += by · xᵀy`
    fn across(&self, sums: &Floats, (x, y): (&Floats, &Floats), by: f32) -> Result<()> {
        let n = self.n;
        let operands = [Operand::rows(x.at(), n).across(), Operand::rows(y.at(), n), Operand::rows(sums.at(), n)];
        self.on.multiply([n, n, x.len / n], operands, (by, 1.0), 1, Precision::Fast)
    }

    fn add_thresholds(&mut self, x: &Floats) -> Result<()> {
        let (room, tokens) = (self.n.next_power_of_two(), x.len / self.n);
        let numbers = self.on.cuda.driver.numbers();
        if 4 * room > numbers.shared_per_block {
            let found = calibrate::thresholds(&self.on.read(x)?, self.n);
            self.by_host.resize(self.n, 0.0);
            self.by_host.iter_mut().zip(found).for_each(|(most, found)| *most = most.max(found));
            return Ok(());
        }
        let (from, to) = (x.at(), self.largest.at());
        let sizes = [self.n, tokens, room].map(|n| n as i32);
        let arguments = Arguments::new().with(&from).with(&to);
        let arguments = sizes.iter().fold(arguments, |arguments, size| arguments.with(size));
        let blocks = tokens.min(4 * numbers.all_multiprocessors);
        let threads = (room / 2).clamp(32, 1024);
        self.on.launch_shaped("watch.cu", "thresholds", &[], (blocks, 1), threads, 4 * room, arguments)
    }
}

impl Entered for Watched<'_> {
    fn add(&mut self, x: Tensor) -> Result<()> {
        let x = of(&x);
        self.sums.add(self.on, x, &Mask { bits: None })?;
        self.add_thresholds(x)?;
        for fit in &self.fits {
            let mask = self.on.mask_of(x, self.n, fit.k_chunk)?;
            fit.sums.add(self.on, x, &mask)?;
            let Some(bits) = &mask.bits else {
                self.gram(&fit.hessian, x, 1.0)?;
                continue;
            };
            self.gram(&fit.hessian, x, self.alone)?;
            let rest = self.on.floats(x.len)?;
            let taken = fit.together.as_ref().map(|_| self.on.floats(x.len)).transpose()?;
            self.on.split(x, bits, taken.as_ref(), Some(&rest))?;
            self.gram(&fit.hessian, &rest, 1.0 - self.alone)?;
            if let (Some([square, across]), Some(taken)) = (&fit.together, &taken) {
                self.gram(square, taken, 1.0)?;
                self.across(across, (taken, &rest), 1.0)?;
            }
        }
        if self.keeps {
            self.all.extend(self.on.read(x)?);
        }
        Ok(())
    }

    fn energy(&self) -> Result<Vec<f32>> {
        Ok(self.sums.energies(self.on)?[1].clone())
    }

    fn thresholds(&self) -> Result<Vec<f32>> {
        if !self.by_host.is_empty() {
            return Ok(self.by_host.clone());
        }
        let mut largest = vec![0u32; self.n];
        self.largest.buffer().read(&mut largest)?;
        Ok(largest.into_iter().map(f32::from_bits).collect())
    }

    fn fit(&self, k_chunk: usize) -> Result<Metric<'_>> {
        let fit = self.fits.iter().find(|fit| fit.k_chunk == k_chunk).expect("only what is watched is asked for");
        let [taken, _] = fit.sums.energies(self.on)?;
        let hessian = OnDevice { on: self.on, n: self.n, values: &fit.hessian };
        let diagonal = hessian.diagonal()?;
        if diagonal.iter().all(|&h| h == 0.0) {
            return Ok(Metric { hessian: None, taken });
        }
        if !fit.damped.replace(true) {
            hessian.damp(Damping::of(&diagonal))?;
        }
        Ok(Metric { hessian: Some(Box::new(hessian)), taken })
    }

    fn together(&self, k_chunk: usize) -> Result<Together> {
        let fit = self.fits.iter().find(|fit| fit.k_chunk == k_chunk).expect("only what is watched is asked for");
        let [taken, _] = fit.sums.energies(self.on)?;
        let Some([square, across]) = &fit.together else { return Ok(Together::none(taken)) };
        let channels = regress::regressed(&taken);
        let square = self.on.gathered(square, self.n, &channels, true)?;
        let across = self.on.gathered(across, self.n, &channels, false)?;
        Ok(Together::summed(taken, channels, square, across))
    }

    fn predicted(&self, across: &[f32], triangle: &[f32], lost: &[f32]) -> Result<Vec<f32>> {
        self.on.predicted(across, triangle, lost)
    }

    fn all(&self) -> &[f32] {
        &self.all
    }
}
