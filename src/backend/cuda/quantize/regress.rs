//! What the taken channels predict of the others (`quantize/regress.rs`): products and triangles.

use anyhow::Result;

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::{Floats, Quantizer, blocks};
use crate::quantize::gpu::FITTED;

impl Quantizer<'_> {
    /// Rows `channels` of a matrix `[n, n]`; with `among`, of these the same columns.
    pub(super) fn gathered(&self, from: &Floats, n: usize, channels: &[u32], among: bool) -> Result<Vec<f32>> {
        let width = if among { channels.len() } else { n };
        let list = self.pool.room(4 * channels.len())?;
        list.buffer().write(0, channels)?;
        let out = self.floats(channels.len() * width)?;
        let (matrix, of, to, sizes) =
            (from.at(), list.at(), out.at(), [n, width, usize::from(among)].map(|n| n as i32));
        let arguments = Arguments::new().with(&matrix).with(&of).with(&to);
        let arguments = sizes.iter().fold(arguments, |arguments, size| arguments.with(size));
        let all = out.len as i64;
        self.launch("watch.cu", "gather", &[], blocks(out.len), arguments.with(&all))?;
        self.read(&out)
    }

    /// As `regress::predicted` says.
    pub(super) fn predicted(&self, across: &[f32], triangle: &[f32], lost: &[f32]) -> Result<Vec<f32>> {
        let u = triangle.len().isqrt();
        let n = across.len() / u;
        let (across, triangle) = (self.sent(across)?, self.sent(triangle)?);
        let mut all = Vec::with_capacity(lost.len() / n * u);
        for part in lost.chunks((FITTED / n).max(1) * n) {
            let (m, lost) = (part.len() / n, self.sent(part)?);
            let out = self.floats(m * u)?;
            let operands =
                [Operand::rows(lost.at(), n), Operand::rows(across.at(), n).across(), Operand::rows(out.at(), u)];
            self.multiply([m, u, n], operands, (1.0, 0.0), 1, Precision::Full)?;
            self.blas.solve(triangle.at(), u, out.at(), m)?;
            all.extend(self.read(&out)?);
        }
        Ok(all)
    }
}
