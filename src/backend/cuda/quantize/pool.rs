//! Device memory that is used again: a layer's tensors come and go by the hundred, and everything is on one stream, so what
//! is queued last is done last.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::{Result, bail};

use super::super::buffer::Buffer;
use super::super::driver::Driver;
use crate::backend::DeviceLost;

/// Buffers of one device that nobody uses at the moment.
pub(super) struct Pool {
    pub(super) driver: Rc<Driver>,
    free: RefCell<BTreeMap<usize, Vec<Buffer>>>,
    held: Cell<usize>,
    most: Cell<usize>,
    usual: usize,
    limit: usize,
}

impl Pool {
    /// One that takes at most `limit` bytes, and gives back what nobody uses before it takes more than `usual`.
    pub(super) fn new(driver: &Rc<Driver>, [usual, limit]: [usize; 2]) -> Rc<Self> {
        Rc::new(Self {
            driver: Rc::clone(driver),
            free: RefCell::default(),
            held: Cell::new(0),
            most: Cell::new(0),
            usual,
            limit,
        })
    }

    /// Room for `bytes`; what is in it is anything.
    ///
    /// # Errors
    /// A device without room, with the way out.
    pub(super) fn room(self: &Rc<Self>, bytes: usize) -> Result<Room> {
        let size = rounded(bytes);
        let found = self.free.borrow_mut().get_mut(&size).and_then(Vec::pop);
        let buffer = match found {
            Some(buffer) => buffer,
            None => self.allocate(size)?,
        };
        Ok(Room { buffer: Some(buffer), pool: Rc::clone(self) })
    }

    fn allocate(&self, size: usize) -> Result<Buffer> {
        if self.held.get() + size > self.usual {
            self.trim();
        }
        if self.held.get() + size > self.limit {
            bail!(self.full(size, self.limit - self.held.get()));
        }
        let buffer = match Buffer::new(&self.driver, size) {
            Err(error) if error.is::<DeviceLost>() => return Err(error),
            Err(_) => {
                self.trim();
                match Buffer::new(&self.driver, size) {
                    Err(error) if error.is::<DeviceLost>() => return Err(error),
                    Err(_) => bail!(self.full(size, self.driver.memory()?.0)),
                    Ok(buffer) => buffer,
                }
            }
            Ok(buffer) => buffer,
        };
        self.held.set(self.held.get() + size);
        self.most.set(self.most.get().max(self.held.get()));
        Ok(buffer)
    }

    fn full(&self, wanted: usize, free: usize) -> String {
        format!(
            "cuda: device memory ran out, {} MiB wanted beside {} MiB in use, {} MiB free: what is finished is kept, and the \
             same command goes on from there when other programs have left the device, or with --device cpu",
            wanted >> 20,
            self.held.get() >> 20,
            free >> 20
        )
    }

    /// Gives back what nobody uses.
    pub(super) fn trim(&self) {
        let free: Vec<Buffer> = std::mem::take(&mut *self.free.borrow_mut()).into_values().flatten().collect();
        self.held.set(self.held.get() - free.iter().map(Buffer::bytes).sum::<usize>());
    }

    /// The most bytes that it has held.
    pub(super) fn most(&self) -> usize {
        self.most.get()
    }

    /// Bytes that it may take beside what it holds.
    pub(super) fn left(&self) -> usize {
        self.limit - self.held.get()
    }
}

/// A size that fits many: an eighth of a power of two is lost at most.
fn rounded(bytes: usize) -> usize {
    let bytes = bytes.max(256);
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(256))
}

/// Device memory of a [`Pool`]; it goes back there.
pub(super) struct Room {
    buffer: Option<Buffer>,
    pool: Rc<Pool>,
}

impl Room {
    pub(super) fn buffer(&self) -> &Buffer {
        self.buffer.as_ref().expect("there until it is dropped")
    }

    pub(super) fn at(&self) -> u64 {
        self.buffer().pointer()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.pool.free.borrow_mut().entry(buffer.bytes()).or_default().push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn sizes_are_few_and_waste_little() {
        let mut sizes = std::collections::BTreeSet::new();
        for bytes in (1..1 << 22).step_by(997) {
            let size = rounded(bytes);
            assert!(size >= bytes && (bytes < 4096 || size <= bytes + bytes / 8), "{bytes}: {size}");
            sizes.insert(size);
        }
        assert!(sizes.len() < 120, "{} sizes", sizes.len());
    }
}
