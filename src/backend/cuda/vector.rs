//! Vectors: f32 numbers, and beside them a compensation that the next reader adds.

use std::cell::OnceCell;
use std::rc::Rc;

use anyhow::Result;

use super::buffer::Buffer;
use super::driver::Driver;

/// f32 numbers on the device.
///
/// A compensated product writes its two parts side by side, since neither waits for the other. Two places
/// take turns, so that a vector can be added to while its last compensation is still beside it.
pub struct Vector {
    driver: Rc<Driver>,
    pub(super) data: Buffer,
    pub(super) len: usize,
    places: [OnceCell<Buffer>; 2],
    pending: Option<usize>,
}

impl Vector {
    pub(super) fn new(driver: &Rc<Driver>, len: usize) -> Result<Self> {
        Ok(Self {
            driver: Rc::clone(driver),
            data: Buffer::new(driver, len * 4)?,
            len,
            places: Default::default(),
            pending: None,
        })
    }

    /// Overwrites the first numbers.
    pub(super) fn write(&mut self, values: &[f32]) -> Result<()> {
        self.settle();
        self.data.write(0, values)
    }

    /// Where the numbers are.
    pub(super) fn at(&self) -> u64 {
        self.data.pointer()
    }

    /// The compensation not yet added, or null.
    pub(super) fn delta(&self) -> u64 {
        self.pending.and_then(|i| self.places[i].get()).map_or(0, Buffer::pointer)
    }

    /// The numbers are complete.
    pub(super) fn settle(&mut self) {
        self.pending = None;
    }

    /// The place for the next compensation; what is there now may still be read by whoever writes it.
    pub(super) fn free_place(&self) -> Result<(usize, u64)> {
        let place = self.pending.map_or(0, |i| 1 - i);
        if self.places[place].get().is_none() {
            let _ = self.places[place].set(Buffer::new(&self.driver, self.len * 4)?);
        }
        Ok((place, self.places[place].get().map_or(0, Buffer::pointer)))
    }

    /// From now on the compensation in `place` belongs to the numbers.
    pub(super) fn leave(&mut self, place: usize) {
        self.pending = Some(place);
    }

    /// Waits, then overwrites `out` with the first numbers, compensation added.
    pub(super) fn read(&self, out: &mut [f32]) -> Result<()> {
        self.data.read(out)?;
        if let Some(place) = self.pending.and_then(|i| self.places[i].get()) {
            let mut delta = vec![0f32; out.len()];
            place.read(&mut delta)?;
            for (o, d) in out.iter_mut().zip(delta) {
                *o += d;
            }
        }
        Ok(())
    }
}
