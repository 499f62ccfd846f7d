//! Numbers on the device: tensors, matrices, what is taken, and how they get there.

use std::rc::Rc;

use anyhow::Result;
use rayon::prelude::*;

use super::super::driver::Arguments;
use super::super::host::Staging;
use super::pool::Room;
use super::{Quantizer, blocks};

/// Constants that stay on the device: norms and angles; when there are more, all are sent again.
const CONSTANTS: usize = 1024;
/// Bytes that one thread of the host prepares at a time.
const PIECE: usize = 1 << 18;

/// f32 numbers on the device.
pub(super) struct Floats {
    pub(super) room: Room,
    pub(super) len: usize,
}

impl Floats {
    pub(super) fn at(&self) -> u64 {
        self.room.at()
    }
}

/// 16-bit numbers on the device.
pub(super) struct Shorts {
    pub(super) room: Room,
    pub(super) len: usize,
    pub(super) kind: i32,
}

/// A matrix as it is kept on the device: in the 16 bits that say all of it, where some do.
pub(super) struct Stored {
    pub(super) room: Room,
    pub(super) kind: i32, // as `lengthen` of elements.cu numbers types
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// A linear layer on the device.
pub(super) struct Placed {
    pub(super) weight: Stored,
    pub(super) bias: Option<Rc<Floats>>,
}

/// Channels that are taken: a bit for each, `[tokens, in_features / 32]`; none if nothing is.
pub(super) struct Mask {
    pub(super) bits: Option<Room>,
}

impl Quantizer<'_> {
    /// Room for `len` numbers; what is in it is anything.
    pub(super) fn floats(&self, len: usize) -> Result<Floats> {
        Ok(Floats { room: self.pool.room(4 * len)?, len })
    }

    /// Sends numbers through pinned memory; `fill` overwrites a piece of them from the given one on.
    pub(super) fn send(&self, room: &Room, bytes: usize, fill: impl Fn(usize, &mut [u8]) + Sync) -> Result<()> {
        if self.cuda.staging.get().is_none() {
            let _ = self.cuda.staging.set(Staging::new(&self.cuda.driver)?);
        }
        let staging = self.cuda.staging.get().expect("set above");
        let (whole, piece) = (bytes / PIECE, PIECE);
        if whole > 0 {
            staging.send(room.buffer(), piece, whole, |i, out| fill(i * piece, out))?;
        }
        if whole * piece < bytes {
            let mut rest = vec![0u8; bytes - whole * piece];
            fill(whole * piece, &mut rest);
            room.buffer().write(whole * piece, &rest)?;
        }
        Ok(())
    }

    /// A copy of `values` on the device.
    pub(super) fn sent(&self, values: &[f32]) -> Result<Floats> {
        let floats = self.floats(values.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.send(&floats.room, bytes.len(), |at, out| out.copy_from_slice(&bytes[at..][..out.len()]))?;
        Ok(floats)
    }

    /// Numbers that come again and again; sent once.
    pub(super) fn constant(&self, values: &[f32]) -> Result<Rc<Floats>> {
        let mut constants = self.constants.borrow_mut();
        if let Some((_, found)) = constants.iter().find(|(known, _)| known == values) {
            return Ok(Rc::clone(found));
        }
        if constants.len() >= CONSTANTS {
            constants.clear();
        }
        let sent = Rc::new(self.sent(values)?);
        constants.push((values.to_vec(), Rc::clone(&sent)));
        Ok(sent)
    }

    pub(super) fn read(&self, floats: &Floats) -> Result<Vec<f32>> {
        let mut values = vec![0.0; floats.len];
        floats.room.buffer().read(&mut values)?;
        Ok(values)
    }

    /// A matrix `[rows, columns]`, in 16 bits where they say all of it.
    pub(super) fn stored(&self, values: &[f32], columns: usize) -> Result<Stored> {
        let fits =
            |of: fn(f32) -> f32| values.par_chunks(PIECE).all(|v| v.iter().all(|&x| of(x).to_bits() == x.to_bits()));
        let rows = values.len() / columns;
        let kind = if fits(|x| half::bf16::from_f32(x).to_f32()) {
            1
        } else if fits(|x| half::f16::from_f32(x).to_f32()) {
            0
        } else {
            2
        };
        let size = if kind == 2 { 4 } else { 2 };
        let room = self.pool.room(size * values.len())?;
        let fill = |at: usize, out: &mut [u8]| {
            let values = &values[at / size..][..out.len() / size];
            match kind {
                2 => out.copy_from_slice(bytemuck::cast_slice(values)),
                kind => out.as_chunks_mut::<2>().0.iter_mut().zip(values).for_each(|(out, &x)| {
                    *out = match kind {
                        1 => half::bf16::from_f32(x).to_le_bytes(),
                        _ => half::f16::from_f32(x).to_le_bytes(),
                    }
                }),
            }
        };
        self.send(&room, size * values.len(), fill)?;
        Ok(Stored { room, kind, rows, columns })
    }

    /// Work space for `len` numbers, which the next who asks gets again.
    pub(super) fn wide(&self, len: usize) -> Result<Rc<Floats>> {
        let mut wide = self.wide.borrow_mut();
        if let Some(floats) = wide.as_ref().filter(|floats| floats.len >= len) {
            return Ok(Rc::clone(floats));
        }
        *wide = None;
        let floats = Rc::new(self.floats(len)?);
        *wide = Some(Rc::clone(&floats));
        Ok(floats)
    }

    /// Rows of a stored matrix in f32, in work space.
    pub(super) fn widened(&self, stored: &Stored, first: usize, rows: usize) -> Result<Rc<Floats>> {
        let count = rows * stored.columns;
        let wide = self.wide(count)?;
        let size = if stored.kind == 2 { 4 } else { 2 };
        let from = stored.room.at() + (first * stored.columns * size) as u64;
        let (to, kind, all) = (wide.at(), stored.kind, count as i64);
        let arguments = Arguments::new().with(&from).with(&to).with(&kind).with(&all);
        self.launch("elements.cu", "lengthen", &[], blocks(count), arguments)?;
        Ok(wide)
    }
}
