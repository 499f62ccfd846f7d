//! What comes behind the last layer, some tokens and some rows of the head at a time.

use anyhow::{Result, ensure};

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::{Floats, Quantizer, Stored, blocks, of};
use crate::quantize::compute::{Head, Tensor};
use crate::quantize::gpu::{HEAD_WEIGHTS, LOGITS};
use crate::quantize::head::LmHead;
use crate::quantize::sample::NOT_FINITE;

/// What the kernel chooses where nothing can be chosen.
const NONE: u32 = u32::MAX;

/// A head on the device.
pub(super) struct OnDevice<'a> {
    on: &'a Quantizer<'a>,
    head: &'a LmHead<'a>,
    weight: Stored, // [vocab_size, hidden_size]
}

impl<'a> OnDevice<'a> {
    pub(super) fn new(on: &'a Quantizer<'a>, head: &'a LmHead<'a>) -> Result<Self> {
        let (n, vocab) = (head.weight.in_features, head.weight.out_features);
        let mut values = vec![0.0; n * vocab];
        head.weight.values.read_f32(0, &mut values);
        Ok(Self { on, head, weight: on.stored(&values, n)? })
    }

    fn vocab(&self) -> usize {
        self.weight.rows
    }

    /// Calls `with` for the head's rows in f32, some at a time: the first, how many, and where they are.
    fn each_rows(&self, mut with: impl FnMut(usize, usize, &Floats) -> Result<()>) -> Result<()> {
        let step = (HEAD_WEIGHTS / self.weight.columns).clamp(1, self.vocab());
        for first in (0..self.vocab()).step_by(step) {
            let rows = step.min(self.vocab() - first);
            let wide = self.on.widened(&self.weight, first, rows)?;
            with(first, rows, &wide)?;
        }
        Ok(())
    }

    /// Writes the logits of `tokens` tokens, `[tokens, hidden_size]` at address `h`.
    fn write(&self, h: u64, tokens: usize, logits: &Floats) -> Result<()> {
        let (on, n, vocab) = (self.on, self.weight.columns, self.vocab());
        let x = on.floats(tokens * n)?;
        on.norm_pieces(h, x.at(), &self.head.final_norm, self.head.eps, [tokens, 1, n, 0])?;
        self.each_rows(|first, rows, weight| {
            let to = Operand::rows(logits.at(), vocab).from(first);
            let operands = [Operand::rows(x.at(), n), Operand::rows(weight.at(), n).across(), to];
            on.multiply([tokens, rows, n], operands, (1.0, 0.0), 1, Precision::Full)
        })?;
        let Some(cap) = self.head.softcap else { return Ok(()) };
        let (at, all) = (logits.at(), (tokens * vocab) as i64);
        let arguments = Arguments::new().with(&at).with(&cap).with(&all);
        on.launch("divergence.cu", "cap_logits", &[], blocks(tokens * vocab), arguments)
    }

    /// Parts of `count` tokens: the first, and how many.
    fn parts(&self, count: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let step = (LOGITS / self.vocab()).clamp(1, count.max(1));
        (0..count).step_by(step).map(move |first| (first, step.min(count - first)))
    }
}

impl Head for OnDevice<'_> {
    fn logits(&self, h: &Tensor) -> Result<Vec<f32>> {
        let (h, n) = (of(h), self.weight.columns);
        let mut all = Vec::with_capacity(h.len / n * self.vocab());
        for (first, tokens) in self.parts(h.len / n) {
            let logits = self.on.floats(tokens * self.vocab())?;
            self.write(h.at() + (4 * first * n) as u64, tokens, &logits)?;
            all.extend(self.on.read(&logits)?);
        }
        Ok(all)
    }

    fn divergence(&self, truth: &[f32], h: &Tensor) -> Result<(f64, Vec<f32>)> {
        let (on, h, n, vocab) = (self.on, of(h), self.weight.columns, self.vocab());
        let count = h.len / n;
        let d = on.floats(h.len)?;
        let (share, cap, width) = (1.0 / count as f32, self.head.softcap.unwrap_or(0.0), vocab as i32);
        let mut total = 0.0;
        for (first, tokens) in self.parts(count) {
            let [p, q] = [(); 2].map(|()| on.floats(tokens * vocab));
            let (p, q) = (p?, q?);
            let theirs = on.sent(&truth[first * n..][..tokens * n])?;
            let (from, to) = (h.at() + (4 * first * n) as u64, d.at() + (4 * first * n) as u64);
            self.write(theirs.at(), tokens, &p)?;
            self.write(from, tokens, &q)?;
            let sums = on.pool.room(8 * tokens)?;
            let (at_p, at_q, at_sums) = (p.at(), q.at(), sums.at());
            let arguments = Arguments::new().with(&at_p).with(&at_q).with(&at_sums);
            let arguments = arguments.with(&share).with(&cap).with(&width);
            on.launch("divergence.cu", "differ", &[], (tokens, 512), arguments)?;
            let d_x = on.floats(tokens * n)?;
            self.each_rows(|row, rows, weight| {
                let d_logits = Operand::rows(q.at(), vocab).from(row);
                let operands = [d_logits, Operand::rows(weight.at(), n), Operand::rows(d_x.at(), n)];
                let keep = if row == 0 { 0.0 } else { 1.0 };
                on.multiply([tokens, n, rows], operands, (1.0, keep), 1, Precision::Fast)
            })?;
            let (gamma, view) = (&self.head.final_norm, [tokens, 1, n, 0]);
            on.norm_pieces_back(from, gamma, self.head.eps, d_x.at(), to, false, view)?;
            let mut each = vec![0f64; tokens];
            sums.buffer().read(&mut each)?;
            total += each.iter().sum::<f64>();
        }
        Ok((total / count as f64, on.read(&d)?))
    }

    fn draw(&self, h: &Tensor, draws: &[f32]) -> Result<Vec<u32>> {
        let (on, h, n) = (self.on, of(h), self.weight.columns);
        let draws = on.sent(draws)?;
        let mut all = Vec::with_capacity(draws.len);
        for (first, tokens) in self.parts(h.len / n) {
            let logits = on.floats(tokens * self.vocab())?;
            self.write(h.at() + (4 * first * n) as u64, tokens, &logits)?;
            let chosen = on.pool.room(4 * tokens)?;
            let (from, by, to) = (logits.at(), draws.at() + 4 * first as u64, chosen.at());
            let width = self.vocab() as i32;
            let arguments = Arguments::new().with(&from).with(&by).with(&to).with(&width);
            on.launch("divergence.cu", "draw", &[], (tokens, 512), arguments)?;
            let mut ids = vec![0u32; tokens];
            chosen.buffer().read(&mut ids)?;
            ensure!(!ids.contains(&NONE), "{NOT_FINITE}");
            all.extend(ids);
        }
        Ok(all)
    }
}
