//! Blocks that do nothing but hold multiprocessors, so that a large card measures as a small one would.

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

/// Multiprocessors that are held until this is dropped, or for the time it was made for.
pub struct Occupied {
    arrived: Mapped, // u32 for every block
    end: Buffer,     // u32, written by a stream of its own
    driver: Rc<Driver>,
}

impl Cuda {
    /// Holds the multiprocessors that [`super::Options::multiprocessors`] leaves out, `None` if it leaves out none, for
    /// at most `most`. Allocate, compile and record before: what waits for the whole device waits for these blocks.
    ///
    /// # Errors
    /// Blocks that do not arrive, because something else holds the device.
    pub fn occupy_rest(&self, most: Duration) -> Result<Option<Occupied>> {
        let numbers = self.driver.numbers();
        let rest = numbers.all_multiprocessors - numbers.multiprocessors;
        if rest == 0 {
            return Ok(None);
        }
        let kernel = self.kernel("occupy.cu", "occupy", &[])?;
        kernel.function()?;
        let driver = self.driver.beside()?;
        let ender = driver.beside()?;
        let end = Buffer::of(&ender, &[0u32])?;
        ender.wait()?;
        let occupied = Occupied { arrived: Mapped::new(&driver, 4 * rest)?, end, driver };
        let (end, arrived) = (occupied.end.pointer(), occupied.arrived.pointer());
        let most_ns = most.as_nanos() as u64;
        self.driver.wait()?;
        let launch = Launch { shared: numbers.shared_per_block, overlap: false, ..Launch::new(rest, 32) };
        let mut arguments = Arguments::new().with(&end).with(&arrived).with(&most_ns);
        occupied.driver.launch(&kernel, launch, &mut arguments)?;
        let start = Instant::now();
        let missing = || (0..rest).filter(|&i| occupied.word(i).load(Ordering::Acquire) == 0).count();
        while missing() > 0 && start.elapsed() < PATIENCE {
            std::hint::spin_loop();
        }
        ensure!(missing() == 0, "cuda: {} of {rest} blocks that hold multiprocessors did not start", missing());
        Ok(Some(occupied))
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
