//! Pinned host memory: what the device reads in place, and where copies to it start from.

use std::cell::Cell;
use std::env;
use std::ptr;
use std::rc::Rc;
use std::slice;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use cudarc::driver::result;
use cudarc::driver::sys;
use memmap2::MmapMut;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::driver::{Context, Driver, failed};
use crate::backend::DeviceLost;

/// Bytes of one of the two buffers that copies to the device start from.
const STAGE: usize = 32 << 20;

/// Bytes of both.
pub(super) const STAGING: usize = 2 * STAGE;

/// Bytes that one thread copies at a time.
const PIECE: usize = 1 << 20;

/// Pinned host memory that the device reads and writes in place.
pub(super) struct Mapped {
    registered: Option<Registered>, // else the driver allocated it
    host: *mut u8,
    device: u64,
    bytes: usize,
    driver: Rc<Driver>, // last: it must outlive what was registered with it
}

fn no_room(bytes: usize, error: result::DriverError) -> anyhow::Error {
    let error = failed("pinned memory", error);
    if error.is::<DeviceLost>() {
        return error;
    }
    anyhow!(
        "{error:#}: {} MiB of pinned host memory wanted, raise ulimit -l, free host memory or use --residuals device",
        bytes >> 20
    )
}

impl Mapped {
    /// `bytes` of zeros.
    pub(super) fn new(driver: &Rc<Driver>, bytes: usize) -> Result<Self> {
        let memory = Self::allocate(driver, bytes)?;
        // SAFETY: the range is this allocation.
        unsafe { ptr::write_bytes(memory.host, 0, memory.bytes) };
        Ok(memory)
    }

    /// Whatever was there before.
    fn allocate(driver: &Rc<Driver>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(16);
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        driver.enter()?;
        // SAFETY: the context is current.
        let host = unsafe { result::malloc_host(bytes, flags) }.map_err(|e| no_room(bytes, e))?;
        let driver = Rc::clone(driver);
        let mut memory = Self { registered: None, host: host.cast(), device: 0, bytes, driver };
        memory.device = device_address(memory.host)?;
        Ok(memory)
    }

    /// What another thread copied and pinned; where pinning ordinary memory is not possible, a copy of `words` in memory
    /// that the driver allocates.
    pub(super) fn adopt(driver: &Rc<Driver>, registered: Result<Registered>, words: &[u32]) -> Result<Self> {
        match registered {
            Ok(registered) => Ok(Self {
                driver: Rc::clone(driver),
                host: registered.map.as_ptr().cast_mut(),
                device: registered.device,
                bytes: registered.map.len(),
                registered: Some(registered),
            }),
            Err(error) => {
                tracing::debug!("{error:#}; the driver allocates instead");
                let memory = Self::allocate(driver, size_of_val(words))?;
                // SAFETY: the allocation is at least as long as `words`, and nobody else knows of it yet.
                let to = unsafe { slice::from_raw_parts_mut(memory.host, size_of_val(words)) };
                copy(bytemuck::cast_slice(words), to);
                Ok(memory)
            }
        }
    }

    pub(super) fn pointer(&self) -> u64 {
        self.device
    }

    pub(super) fn host(&self) -> *mut u8 {
        self.host
    }

    /// Overwrites the first bytes; nothing that reads them may be queued.
    pub(super) fn write<T: bytemuck::Pod>(&self, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(bytes.len() <= self.bytes, "{} bytes of {}", bytes.len(), self.bytes);
        // SAFETY: the range was just checked; the two do not overlap, since `host` is ours alone.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.host, bytes.len()) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.driver.settles() {
            // What the device may still read must not go either.
            std::mem::forget(self.registered.take());
        } else if self.registered.is_none() {
            // SAFETY: allocated by `allocate`, freed once.
            let _ = unsafe { result::free_host(self.host.cast()) };
        }
    }
}

fn device_address(host: *mut u8) -> Result<u64> {
    let mut device = 0;
    // SAFETY: the context is current; `host` is pinned and mapped.
    unsafe { sys::cuMemHostGetDevicePointer_v2(&mut device, host.cast(), 0) }
        .result()
        .map_err(|e| failed("mapping pinned memory", e))?;
    Ok(device)
}

/// Ordinary memory that was filled and then pinned: pages are touched by all cores, in huge pages where the system has
/// them, which is several times as fast as having the driver allocate.
pub(super) struct Registered {
    map: MmapMut,
    device: u64,
    context: Context,
}

impl Registered {
    /// A pinned copy of `words`, made on any thread.
    ///
    /// # Errors
    /// No memory, or none that can be pinned.
    pub(super) fn copy_of(context: Context, words: &[u32]) -> Result<Self> {
        context.enter()?;
        ensure!(env::var_os("DECDEC_PINNED").is_none_or(|how| how != "alloc"), "DECDEC_PINNED is alloc");
        let mut map = MmapMut::map_anon(size_of_val(words).max(16)).context("pinned memory")?;
        #[cfg(target_os = "linux")]
        // Fewer pages to touch, to pin and to look up; without them it works as well.
        let _ = map.advise(memmap2::Advice::HugePage);
        copy(bytemuck::cast_slice(words), &mut map);
        let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP | sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: the context is current, and the range is this map's, which lives until it is unregistered.
        unsafe { sys::cuMemHostRegister_v2(map.as_mut_ptr().cast(), map.len(), flags) }
            .result()
            .map_err(|e| failed("pinning memory", e))?;
        let mut registered = Self { map, device: 0, context };
        registered.device = device_address(registered.map.as_mut_ptr())?;
        Ok(registered)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: registered by `copy_of`, unregistered once, before the map goes.
        let _ = unsafe { sys::cuMemHostUnregister(self.map.as_mut_ptr().cast()) };
    }
}

/// Copies on all cores; `to` is at least as long.
fn copy(from: &[u8], to: &mut [u8]) {
    from.par_chunks(PIECE).zip(to.par_chunks_mut(PIECE)).for_each(|(from, to)| to[..from.len()].copy_from_slice(from));
}

/// Two pinned buffers that copies to the device start from: one is filled while the other is on its way.
pub(super) struct Staging {
    driver: Rc<Driver>,
    halves: [Half; 2],
    next: Cell<usize>,
}

struct Half {
    memory: Mapped,
    sent: sys::CUevent,
}

/// Where the time of an upload went.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    /// Bytes that went to the device.
    pub(super) bytes: usize,
    /// Filling buffers.
    pub(super) filling: Duration,
    /// Waiting for a buffer to be free.
    pub(super) waiting: Duration,
}

impl Staging {
    pub(super) fn new(driver: &Rc<Driver>) -> Result<Self> {
        let half = || -> Result<Half> {
            let memory = Mapped::new(driver, STAGE)?;
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            let sent = result::event::create(flags).map_err(|e| failed("event", e))?;
            Ok(Half { memory, sent })
        };
        Ok(Self { driver: Rc::clone(driver), halves: [half()?, half()?], next: Cell::new(0) })
    }

    /// Sends `count` pieces of `piece` bytes to the start of `to`; `fill(i, out)` overwrites all of piece `i`. Returns
    /// while the last of them are still on their way.
    ///
    /// # Errors
    /// A piece larger than a buffer, or a lost device.
    pub(super) fn send(
        &self,
        to: &Buffer,
        piece: usize,
        count: usize,
        fill: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Result<Sent> {
        assert!(piece * count <= to.bytes(), "{count} pieces of {piece} bytes into {}", to.bytes());
        ensure!(piece <= STAGE, "cuda: a piece of {piece} bytes, {STAGE} fit into the upload buffer");
        let mut took = Sent { bytes: piece * count, ..Sent::default() };
        for first in (0..count).step_by((STAGE / piece.max(1)).max(1)) {
            let half = &self.halves[self.next.get()];
            self.next.set(1 - self.next.get());
            let start = Instant::now();
            self.driver.enter()?;
            // SAFETY: the event lives as long as this object; one that was never recorded has happened.
            unsafe { result::event::synchronize(half.sent) }.map_err(|e| failed("copying to the device", e))?;
            let free = Instant::now();
            let pieces = (count - first).min(STAGE / piece);
            // SAFETY: the range is this buffer, which nothing reads any more: its last copy has been waited for.
            let bytes = unsafe { slice::from_raw_parts_mut(half.memory.host, pieces * piece) };
            bytes.par_chunks_exact_mut(piece).enumerate().for_each(|(i, out)| fill(first + i, out));
            to.receive(first * piece, bytes)?;
            let stream = self.driver.enter()?;
            // SAFETY: as above; the stream is the driver's.
            unsafe { result::event::record(half.sent, stream) }.map_err(|e| failed("event", e))?;
            took.waiting += free - start;
            took.filling += free.elapsed();
        }
        Ok(took)
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if self.memory.driver.settles() {
            // SAFETY: created by `Staging::new`, destroyed once, and nothing is queued.
            let _ = unsafe { result::event::destroy(self.sent) };
        }
    }
}
