//! Device memory that frees itself.

use std::rc::Rc;

use anyhow::{Result, anyhow};
use cudarc::driver::{result, sys};

use super::driver::{Driver, failed};
use crate::backend::DeviceLost;

/// Device memory.
pub(super) struct Buffer {
    driver: Rc<Driver>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

impl Buffer {
    /// `bytes` of zeros.
    pub(super) fn new(driver: &Rc<Driver>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(16);
        driver.enter()?;
        // SAFETY: the context is current.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|e| {
            let (error, free) = (failed("device memory", e), driver.memory().map_or(0, |(free, _)| free));
            if error.is::<DeviceLost>() {
                return error;
            }
            anyhow!(
                "{error:#}: {} MiB wanted, {} MiB free, use a lower --max-seq-len, fewer bits or --residuals host",
                bytes >> 20,
                free >> 20
            )
        })?;
        let buffer = Self { driver: Rc::clone(driver), pointer, bytes };
        buffer.clear()?;
        Ok(buffer)
    }

    /// A copy of `values`.
    pub(super) fn of<T: bytemuck::Pod>(driver: &Rc<Driver>, values: &[T]) -> Result<Self> {
        let buffer = Self::new(driver, size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    pub(super) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues zeros over everything.
    pub(super) fn clear(&self) -> Result<()> {
        let stream = self.driver.enter()?;
        // SAFETY: the range is this buffer.
        unsafe { result::memset_d8_async(self.pointer, 0, self.bytes, stream) }
            .map_err(|e| failed("clearing memory", e))
    }

    /// Queues a copy of `values` to byte `offset`.
    pub(super) fn write<T: bytemuck::Pod>(&self, offset: usize, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(offset + bytes.len() <= self.bytes, "{} bytes at {offset} of {}", bytes.len(), self.bytes);
        let stream = self.driver.enter()?;
        // SAFETY: the range was just checked; the driver copies ordinary host memory before it returns.
        unsafe { result::memcpy_htod_async(self.pointer + offset as u64, bytes, stream) }
            .map_err(|e| failed("copying to the device", e))
    }

    /// Queues a copy of pinned `bytes` to byte `offset`; they must stay as they are until it has happened.
    pub(super) fn receive(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset + bytes.len() <= self.bytes, "{} bytes at {offset} of {}", bytes.len(), self.bytes);
        let stream = self.driver.enter()?;
        // SAFETY: the range was just checked; the caller keeps the bytes.
        unsafe { result::memcpy_htod_async(self.pointer + offset as u64, bytes, stream) }
            .map_err(|e| failed("copying to the device", e))
    }

    /// Waits, then copies the first bytes over `out`.
    pub(super) fn read<T: bytemuck::Pod>(&self, out: &mut [T]) -> Result<()> {
        self.driver.wait()?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        assert!(bytes.len() <= self.bytes, "{} bytes of {}", bytes.len(), self.bytes);
        // SAFETY: the range was just checked, and nothing is queued.
        unsafe { result::memcpy_dtoh_sync(bytes, self.pointer) }.map_err(|e| failed("copying from the device", e))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Kernels that use it may still be queued.
        if self.driver.settles() {
            // SAFETY: allocated by `new`, freed once.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}
