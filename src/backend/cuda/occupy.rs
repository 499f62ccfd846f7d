//! Blocks that hold multiprocessors, and memory, so that a large card measures as a small one would.

use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Cuda;
use super::buffer::Buffer;
use super::driver::{Arguments, Driver, Launch};
use super::host::Mapped;

/// How long blocks may take to arrive.
const PATIENCE: Duration = Duration::from_secs(1);

/// How much is read, of zeros: more than a second-level cache holds.
const READ: usize = 512 << 20;

/// What a block reads at once, bytes: `PIECE` of `occupy.cu`.
const PIECE: f64 = 65536.0;

/// Multiprocessors that are held until this is dropped, or for the time it was made for.
pub struct Occupied {
    arrived: Mapped, // u32 for every block
    end: Buffer,     // u32, written by a stream of its own
    read: Option<Rc<Buffer>>,
    read_rate: Option<f64>,
    driver: Rc<Driver>,
}

impl Cuda {
    /// Holds the multiprocessors that the card that this one [acts as](super::Options::card) does not have, `None` if there
    /// are none, for at most `most`; if its memory is slower, they read what is too much of it at a steady pace. Allocate,
    /// compile and record before: what waits for the whole device waits for these blocks.
    ///
    /// # Errors
    /// Blocks that do not arrive, because something else holds the device; memory that is slower than it is to be.
    pub fn occupy_rest(&self, most: Duration) -> Result<Option<Occupied>> {
        let numbers = self.driver.numbers();
        let (own, all) = (numbers.multiprocessors, numbers.all_multiprocessors);
        let rest = all - own;
        if rest == 0 {
            return Ok(None);
        }
        let Some(wanted) = self.options.card.and_then(|card| card.memory_rate) else {
            return self.occupy(rest, most, None).map(Some);
        };
        let zeros = Rc::new(Buffer::new(&self.driver, READ)?);
        zeros.clear()?;
        let out = Buffer::new(&self.driver, 4)?;
        let whole = self.read_rate(&zeros, &out, 4 * all)?;
        let (gb, left) = (1e-9, whole - wanted);
        ensure!(left > 0.0, "cuda: memory reads {:.0} GB/s, {:.0} are to be left of it", whole * gb, wanted * gb);
        let cycles = PIECE * rest as f64 * numbers.clock / left;
        let mut held = self.occupy(rest, most, Some((&zeros, cycles)))?;
        // With no more on its way than a product has: whoever asks for much at once takes from those who read steadily.
        held.read_rate = Some(self.read_rate(&zeros, &out, own)?);
        Ok(Some(held))
    }

    /// Bytes a second of a plain read by so many blocks: the best of a few.
    fn read_rate(&self, zeros: &Buffer, out: &Buffer, blocks: usize) -> Result<f64> {
        let kernel = self.kernel("read.cu", "read", &[])?;
        let (from, count, to) = (zeros.pointer(), (READ / 16) as u64, out.pointer());
        let launch = Launch { overlap: false, ..Launch::new(blocks, 256) };
        let mut best = Duration::MAX;
        for _ in 0..4 {
            let took = self.driver.time(&mut || {
                self.driver.launch(&kernel, launch, &mut Arguments::new().with(&from).with(&count).with(&to))
            })?;
            best = best.min(took);
        }
        Ok(READ as f64 / best.as_secs_f64())
    }

    /// Holds `rest` multiprocessors; `reading`: what they read, and in how many clock cycles a piece.
    fn occupy(&self, rest: usize, most: Duration, reading: Option<(&Rc<Buffer>, f64)>) -> Result<Occupied> {
        let kernel = self.kernel("occupy.cu", "occupy", &[])?;
        kernel.function()?;
        let driver = self.driver.beside()?;
        let ender = driver.beside()?;
        let end = Buffer::of(&ender, &[0u32])?;
        ender.wait()?;
        let arrived = Mapped::new(&driver, 4 * rest)?;
        let read = reading.map(|(zeros, _)| Rc::clone(zeros));
        let occupied = Occupied { arrived, end, read, read_rate: None, driver };
        let (end, arrived) = (occupied.end.pointer(), occupied.arrived.pointer());
        let most_ns = most.as_nanos() as u64;
        let from = occupied.read.as_ref().map_or(0, |zeros| zeros.pointer());
        let (count, cycles) = ((READ / 16) as u64, reading.map_or(0, |(_, cycles)| cycles as u64));
        self.driver.wait()?;
        let threads = if reading.is_some() { 1024 } else { 32 };
        let shared = self.driver.numbers().all_shared_per_block;
        let launch = Launch { shared, overlap: false, ..Launch::new(rest, threads) };
        let mut arguments = Arguments::new()
            .with(&end)
            .with(&arrived)
            .with(&most_ns)
            .with(&from)
            .with(&count)
            .with(&cycles)
            .with(&from);
        occupied.driver.launch(&kernel, launch, &mut arguments)?;
        let start = Instant::now();
        let missing = || (0..rest).filter(|&i| occupied.word(i).load(Ordering::Acquire) == 0).count();
        while missing() > 0 && start.elapsed() < PATIENCE {
            std::hint::spin_loop();
        }
        ensure!(missing() == 0, "cuda: {} of {rest} blocks that hold multiprocessors did not start", missing());
        Ok(occupied)
    }
}

impl Occupied {
    /// Checks that the multiprocessors are still held: what was measured until now was measured without them.
    ///
    /// # Errors
    /// They were let go before.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.driver.idle()?, "cuda: the blocks that hold multiprocessors ended before the measurement did");
        Ok(())
    }

    /// Bytes a second of a plain read beside them, where they slow memory down.
    pub fn read_rate(&self) -> Option<f64> {
        self.read_rate
    }

    fn word(&self, i: usize) -> &AtomicU32 {
        // SAFETY: `arrived` has room for it, aligned, and lives as long as `self`; the device writes whole words.
        unsafe { &*self.arrived.host().cast::<AtomicU32>().add(i) }
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        // If this fails they end by themselves.
        let _ = self.end.write(0, &[1u32]);
        let _ = self.driver.wait();
    }
}
