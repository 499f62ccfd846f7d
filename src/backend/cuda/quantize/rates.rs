//! How fast the device does what quantization takes its time for.

use anyhow::Result;

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::{Quantizer, blocks};
use crate::quantize::gpu::Rates;

/// Rows and columns of the matrices that are multiplied.
const SIDE: usize = 4096;
/// How often each is tried: the first time kernels are loaded.
const TIMES: usize = 4;

impl Quantizer<'_> {
    /// Measured; takes less than a second.
    ///
    /// # Errors
    /// A lost device, or one without room for three matrices.
    pub(crate) fn rates(&self) -> Result<Rates> {
        let count = SIDE * SIDE;
        let values = vec![0.5f32; count];
        let [a, b, c] = [self.sent(&values)?, self.sent(&values)?, self.floats(count)?];
        let fastest = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            let each = (0..TIMES).map(|_| Ok(self.cuda.driver.time(work)?.as_secs_f64()));
            Ok(each.collect::<Result<Vec<_>>>()?.into_iter().fold(f64::INFINITY, f64::min))
        };
        let operands = [&a, &b, &c].map(|of| Operand::rows(of.at(), SIDE));
        let products = |precision| -> Result<f64> {
            let seconds = fastest(&mut || self.multiply([SIDE; 3], operands, (1.0, 0.0), 1, precision))?;
            Ok((SIDE as f64).powi(3) / seconds)
        };
        let (full, fast) = (products(Precision::Full)?, products(Precision::Fast)?);
        let (to, from, all) = (c.at(), a.at(), count as i64);
        let added = fastest(&mut || {
            let arguments = Arguments::new().with(&to).with(&from).with(&all);
            self.launch("elements.cu", "add_to", &[], blocks(count), arguments)
        })?;
        let sent = fastest(&mut || self.sent(&values).map(drop))?;
        let bytes = (4 * count) as f64;
        Ok(Rates { full, fast, memory: 3.0 * bytes / added, link: bytes / sent })
    }
}
