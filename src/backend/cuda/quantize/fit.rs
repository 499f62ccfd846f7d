//! Codes and parameters against a Hessian, as `quantize/refine.rs` says: conjugate gradients for the parameters of each
//! row, coordinate descent for its codes, rows side by side.

use anyhow::Result;

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::pool::Room;
use super::{Floats, Quantizer, blocks, trained};
use crate::quantize::compute::Curvature;
use crate::quantize::gpu::FITTED;
use crate::quantize::gram::Damping;
use crate::quantize::refine::{AnyGrid, Effort, Grid};

/// Channels between two updates of the whole gradient (`BLOCK` of codes.cu).
const CHANNELS: usize = 64;

/// A Hessian on the device.
pub(super) struct OnDevice<'a> {
    pub(super) on: &'a Quantizer<'a>,
    pub(super) n: usize,
    pub(super) values: &'a Floats, // [n, n]
}

impl OnDevice<'_> {
    pub(super) fn damp(&self, Damping { divisor, share, floor }: Damping) -> Result<()> {
        let (at, n) = (self.values.at(), self.n as i32);
        let arguments = Arguments::new().with(&at).with(&divisor).with(&share).with(&floor).with(&n);
        self.on.launch("watch.cu", "damp", &[], blocks(self.n * self.n), arguments)
    }
}

impl Curvature for OnDevice<'_> {
    fn diagonal(&self) -> Result<Vec<f32>> {
        let out = self.on.floats(self.n)?;
        let (from, to, n) = (self.values.at(), out.at(), self.n as i32);
        let arguments = Arguments::new().with(&from).with(&to).with(&n);
        self.on.launch("watch.cu", "diagonal", &[], blocks(self.n), arguments)?;
        self.on.read(&out)
    }

    fn refine(&self, grid: AnyGrid, w: &[f32], codes: &mut [u8], parameters: &mut [f32], effort: Effort) -> Result<()> {
        let n = self.n;
        let (p, defines) = match grid {
            AnyGrid::Codebook(grid) => (grid.parameters(), trained::codebook_defines(1 << grid.bits).to_vec()),
            AnyGrid::Groups(grid) => {
                (grid.parameters(), vec![format!("LEVELS={}", 1 << grid.bits), format!("GROUP={}", grid.group_size)])
            }
        };
        let levels = match grid {
            AnyGrid::Codebook(grid) => Some(1usize << grid.bits),
            AnyGrid::Groups(_) => None,
        };
        let rows = (FITTED / n).max(1);
        let each = w.chunks(rows * n).zip(codes.chunks_mut(rows * n)).zip(parameters.chunks_mut(rows * p));
        for ((w, codes), parameters) in each {
            let block = Block::new(self, &defines, levels, p, w, codes, parameters)?;
            block.refine(effort)?;
            block.codes.buffer().read(codes)?;
            block.parameters.room.buffer().read(parameters)?;
        }
        Ok(())
    }
}

/// Rows that are fitted together.
struct Block<'a> {
    hessian: &'a OnDevice<'a>,
    defines: &'a [String],
    levels: Option<usize>, // of codebooks
    rows: usize,
    w: Floats,
    codes: Room,
    parameters: Floats, // [rows, p]
    q: Floats,          // what codes and parameters stand for
    gradient: Floats,   // (w − q)·H
    step: Floats,       // work space
    through: Floats,    // work space
}

impl<'a> Block<'a> {
    fn new(
        hessian: &'a OnDevice<'a>,
        defines: &'a [String],
        levels: Option<usize>,
        p: usize,
        w: &[f32],
        codes: &[u8],
        parameters: &[f32],
    ) -> Result<Self> {
        let on = hessian.on;
        let room = on.pool.room(codes.len())?;
        on.send(&room, codes.len(), |at, out| out.copy_from_slice(&codes[at..][..out.len()]))?;
        let [q, gradient, step, through] = [(); 4].map(|()| on.floats(w.len()));
        let rows = w.len() / hessian.n;
        assert_eq!(parameters.len(), rows * p, "parameters of each row");
        Ok(Self {
            hessian,
            defines,
            levels,
            rows,
            w: on.sent(w)?,
            codes: room,
            parameters: on.sent(parameters)?,
            q: q?,
            gradient: gradient?,
            step: step?,
            through: through?,
        })
    }

    fn refine(&self, effort: Effort) -> Result<()> {
        self.tidy(false)?;
        self.restart()?;
        for _ in 0..effort.rounds {
            self.fit(effort.steps)?;
            self.descend()?;
        }
        self.fit(effort.steps)?;
        self.tidy(true)?;
        self.restart()?;
        self.descend()
    }

    fn launch(&self, entry: &str, threads: usize, arguments: Arguments<'_>) -> Result<()> {
        self.hessian.on.launch("codes.cu", entry, self.defines, (self.rows, threads), arguments)
    }

    /// Parameters in order, or as they are stored.
    fn tidy(&self, store: bool) -> Result<()> {
        let (parameters, codes) = (self.parameters.at(), self.codes.at());
        let (n, store) = (self.hessian.n as i32, i32::from(store));
        self.launch("tidy", 128, Arguments::new().with(&parameters).with(&codes).with(&n).with(&store))
    }

    /// Overwrites `out` with the weights that `parameters` stand for.
    fn weights(&self, parameters: &Floats, out: &Floats) -> Result<()> {
        let (codes, of, to, n) = (self.codes.at(), parameters.at(), out.at(), self.hessian.n as i32);
        self.launch("weights", 256, Arguments::new().with(&codes).with(&of).with(&to).with(&n))
    }

    /// Weights and gradient anew.
    fn restart(&self) -> Result<()> {
        self.weights(&self.parameters, &self.q)?;
        let (w, q, error, all) = (self.w.at(), self.q.at(), self.step.at(), self.q.len as i64);
        let arguments = Arguments::new().with(&w).with(&q).with(&error).with(&all);
        self.hessian.on.launch("codes.cu", "difference", self.defines, blocks(self.q.len), arguments)?;
        self.through(&self.step, &self.gradient)
    }

    /// `out = x·H`
    fn through(&self, x: &Floats, out: &Floats) -> Result<()> {
        let n = self.hessian.n;
        let operands = [x, self.hessian.values, out].map(|of| Operand::rows(of.at(), n));
        self.hessian.on.multiply([self.rows, n, n], operands, (1.0, 0.0), 1, Precision::Full)
    }

    /// Derivatives by the parameters, from those by the weights; `square`: second ones, from the Hessian's diagonal.
    fn derivatives(&self, gradient: &Floats, out: &Floats, square: bool) -> Result<()> {
        let (codes, from, to) = (self.codes.at(), gradient.at(), out.at());
        let (n, square) = (self.hessian.n as i32, i32::from(square));
        let arguments = Arguments::new().with(&codes).with(&from).with(&to).with(&n).with(&square);
        let threads = self.levels.map_or(128, trained::slope_threads);
        let shared = self.levels.map_or(0, |levels| 4 * levels * threads);
        let on = self.hessian.on;
        on.launch_shaped("codes.cu", "derivatives", self.defines, (self.rows, 1), threads, shared, arguments)
    }

    /// The parameters nearer to those with the least loss for these codes.
    fn fit(&self, steps: usize) -> Result<()> {
        let on = self.hessian.on;
        let count = self.parameters.len;
        let (curvatures, slopes) = (on.floats(count)?, on.floats(count)?);
        let (directions, before) = (on.floats(count)?, on.floats(self.rows)?);
        directions.room.buffer().clear()?;
        before.room.buffer().clear()?;
        let diagonal = on.sent(&self.hessian.diagonal()?)?;
        self.derivatives(&diagonal, &curvatures, true)?;
        let n = self.hessian.n as i32;
        let (slope, curvature, direction) = (slopes.at(), curvatures.at(), directions.at());
        let (last, step, through) = (before.at(), self.step.at(), self.through.at());
        let (parameters, q, gradient) = (self.parameters.at(), self.q.at(), self.gradient.at());
        for _ in 0..steps {
            self.derivatives(&self.gradient, &slopes, false)?;
            let arguments = Arguments::new().with(&slope).with(&curvature).with(&direction).with(&last).with(&n);
            self.launch("direct", 64, arguments)?;
            self.weights(&directions, &self.step)?;
            self.through(&self.step, &self.through)?;
            let arguments = Arguments::new().with(&step).with(&through).with(&direction).with(&last);
            let arguments = arguments.with(&parameters).with(&q).with(&gradient).with(&n);
            self.launch("move", 256, arguments)?;
        }
        self.tidy(false)
    }

    /// One sweep over all channels: each code becomes the best with all others as they are.
    fn descend(&self) -> Result<()> {
        let (on, n) = (self.hessian.on, self.hessian.n);
        let moved = on.floats(self.rows * CHANNELS)?;
        let (h, parameters, gradient) = (self.hessian.values.at(), self.parameters.at(), self.gradient.at());
        let (q, codes, to) = (self.q.at(), self.codes.at(), moved.at());
        for first in (0..n).step_by(CHANNELS) {
            let width = CHANNELS.min(n - first);
            let sizes = [n, first, width, self.rows].map(|n| n as i32);
            let arguments = Arguments::new().with(&h).with(&parameters).with(&gradient).with(&q).with(&codes).with(&to);
            let arguments = sizes.iter().fold(arguments, |arguments, size| arguments.with(size));
            on.launch("codes.cu", "descend", self.defines, (self.rows.div_ceil(32), 32), arguments)?;
            let rows = Operand::rows(h, n).from(first * n);
            let operands = [Operand::rows(to, width), rows, Operand::rows(gradient, n)];
            on.multiply([self.rows, n, width], operands, (1.0, 1.0), 1, Precision::Full)?;
        }
        Ok(())
    }
}
