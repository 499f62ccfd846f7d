//! Projections whose codebooks are trained: `y = Ŵ·x_rest + W·x_taken`, and its derivatives.
//!
//! Codes and originals of all layers stay on the device where it has room for them; else those of the layers that fit, and
//! the others are read again each time.

use std::rc::Rc;

use anyhow::{Result, ensure};

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::pool::Room;
use super::{Floats, Mask, Quantizer, Stored, blocks};
use crate::config::Projection;
use crate::quantize::compute::{Coded, Trained};

/// What does not change of a projection.
pub(super) struct Kept {
    codes: Room, // u8 [out_features, in_features]
    original: Stored,
    bias: Option<Rc<Floats>>,
}

/// With its codebook.
pub(super) struct OfBook {
    kept: Rc<Kept>,
    codebook: Floats, // [out_features, levels]
}

impl OfBook {
    fn levels(&self) -> usize {
        self.codebook.len / self.kept.original.rows
    }

    fn shape(&self) -> (usize, usize) {
        (self.kept.original.columns, self.kept.original.rows)
    }
}

pub(super) fn of(projection: &Trained) -> &OfBook {
    let Trained::Device(any) = projection else { panic!("a projection of this device is expected") };
    any.downcast_ref().expect("a projection of this device")
}

/// What codes.cu is compiled for: a codebook for each row.
pub(super) fn codebook_defines(levels: usize) -> [String; 2] {
    [format!("LEVELS={levels}"), "GROUP=0".to_owned()]
}

/// Threads of a row's derivatives by its codebook: each has sums of its own for all levels.
pub(super) fn slope_threads(levels: usize) -> usize {
    (8192 / levels).clamp(32, 256)
}

impl Quantizer<'_> {
    pub(super) fn trained_at(
        &self,
        (layer, projection): (usize, Projection),
        codebook: &[f32],
        read: &mut dyn FnMut() -> Result<Coded>,
    ) -> Result<OfBook> {
        let place = (layer, projection.index());
        let known = self.projections.borrow().get(&place).cloned();
        let kept = match known {
            Some(kept) => kept,
            None => {
                let Coded { original, codes } = read()?;
                let room = self.pool.room(codes.len())?;
                self.send(&room, codes.len(), |at, out| out.copy_from_slice(&codes[at..][..out.len()]))?;
                let bias = original.bias.as_deref().map(|bias| self.constant(bias)).transpose()?;
                let kept = Kept { codes: room, original: self.stored(&original.weight, original.in_features)?, bias };
                let kept = Rc::new(kept);
                let bytes = kept.codes.buffer().bytes() + kept.original.room.buffer().bytes();
                if let Some(left) = self.kept.get().checked_sub(bytes) {
                    self.kept.set(left);
                    self.projections.borrow_mut().insert(place, Rc::clone(&kept));
                }
                kept
            }
        };
        ensure!(codebook.len().is_multiple_of(kept.original.rows), "a codebook for each row is expected");
        Ok(OfBook { kept, codebook: self.sent(codebook)? })
    }

    /// Ŵ in f32, in work space.
    fn stands_for(&self, projection: &OfBook) -> Result<Rc<Floats>> {
        let (n, m) = projection.shape();
        let wide = self.wide(n * m)?;
        let (codes, codebook, out, width) = (projection.kept.codes.at(), projection.codebook.at(), wide.at(), n as i32);
        let arguments = Arguments::new().with(&codes).with(&codebook).with(&out).with(&width);
        self.launch("codes.cu", "weights", &codebook_defines(projection.levels()), (m, 256), arguments)?;
        Ok(wide)
    }

    pub(super) fn output_of(&self, projection: &OfBook, x: &Floats, taken: &Mask) -> Result<Floats> {
        let (n, m) = projection.shape();
        let tokens = x.len / n;
        let (y, mut keep) = self.begun(tokens, m, projection.kept.bias.as_deref())?;
        let to = Operand::rows(y.at(), m);
        let mut add = |x: &Floats, weight: &Floats| {
            let operands = [Operand::rows(x.at(), n), Operand::rows(weight.at(), n).across(), to];
            self.multiply([tokens, m, n], operands, (1.0, keep), 1, Precision::Fast)?;
            keep = 1.0;
            anyhow::Ok(())
        };
        if let Some(bits) = &taken.bits {
            let (of_taken, rest) = (self.floats(x.len)?, self.floats(x.len)?);
            self.split(x, bits, Some(&of_taken), Some(&rest))?;
            add(&of_taken, &*self.widened(&projection.kept.original, 0, m)?)?;
            add(&rest, &*self.stands_for(projection)?)?;
        } else {
            add(x, &*self.stands_for(projection)?)?;
        }
        Ok(y)
    }

    pub(super) fn derivatives_of(
        &self,
        projection: &OfBook,
        x: &Floats,
        taken: &Mask,
        d: &Floats,
    ) -> Result<(Floats, Floats)> {
        let (n, m) = projection.shape();
        let tokens = d.len / m;
        let by = |weight: &Floats| {
            let d_x = self.floats(tokens * n)?;
            let operands = [Operand::rows(d.at(), m), Operand::rows(weight.at(), n), Operand::rows(d_x.at(), n)];
            self.multiply([tokens, n, m], operands, (1.0, 0.0), 1, Precision::Fast)?;
            anyhow::Ok(d_x)
        };
        let d_x = by(&*self.stands_for(projection)?)?;
        let mut rest = None;
        if let Some(bits) = &taken.bits {
            let whole = by(&*self.widened(&projection.kept.original, 0, m)?)?;
            let (out, from, mask, all) = (d_x.at(), whole.at(), bits.at(), d_x.len as i64);
            let arguments = Arguments::new().with(&out).with(&from).with(&mask).with(&all);
            self.launch("watch.cu", "choose", &[], blocks(d_x.len), arguments)?;
            let alone = rest.insert(self.floats(x.len)?);
            self.split(x, bits, None, Some(alone))?;
        }
        let x = rest.as_ref().unwrap_or(x);
        let d_w = self.floats(m * n)?;
        let operands = [Operand::rows(d.at(), m).across(), Operand::rows(x.at(), n), Operand::rows(d_w.at(), n)];
        self.multiply([m, n, tokens], operands, (1.0, 0.0), 1, Precision::Fast)?;
        Ok((d_x, d_w))
    }

    pub(super) fn slopes_of(&self, projection: &OfBook, levels: usize, gradient: &Floats) -> Result<Vec<f32>> {
        let (n, m) = projection.shape();
        let slopes = self.floats(m * levels)?;
        let (codes, from, to, width, square) = (projection.kept.codes.at(), gradient.at(), slopes.at(), n as i32, 0i32);
        let arguments = Arguments::new().with(&codes).with(&from).with(&to).with(&width).with(&square);
        let threads = slope_threads(levels);
        let shared = 4 * levels * threads;
        let defines = codebook_defines(levels);
        self.launch_shaped("codes.cu", "derivatives", &defines, (m, 1), threads, shared, arguments)?;
        self.read(&slopes)
    }
}
