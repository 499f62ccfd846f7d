//! When the kernels of a sweep ran, by time stamps between them.

use anyhow::{Result, ensure};

use super::Wgpu;
use super::gpu::Gpu;
use crate::backend::record::{Bandwidths, ByClock, KernelRecord, Launch, Recorder};

/// Launches between two readings of their stamps.
const LAUNCHES: usize = 64;

/// The most stamps of one launch: before the product, behind it, behind its compensation.
const STAMPS: usize = 3;

/// Stamps that operations leave while a sweep wants them.
#[derive(Debug)]
pub(super) struct Stamps {
    pub(super) set: wgpu::QuerySet,
    pub(super) used: u32,
}

/// Times the launches of a sweep on one Vulkan device.
#[derive(Debug)]
pub struct WgpuRecorder {
    stamps: bool,
    by_clock: ByClock,
    last_ns: u64,
}

impl WgpuRecorder {
    /// With time stamps where the device has them, else by the host's clock.
    pub(super) fn new(gpu: &Gpu) -> Self {
        Self { stamps: gpu.has_clock, by_clock: ByClock::default(), last_ns: 0 }
    }
}

impl Recorder<Wgpu> for WgpuRecorder {
    fn clock(&self) -> String {
        if self.stamps { "timestamp queries".into() } else { Recorder::<Wgpu>::clock(&self.by_clock) }
    }

    fn record(
        &mut self,
        wgpu: &Wgpu,
        kinds: &[usize],
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>> {
        if !self.stamps {
            return self.by_clock.record(wgpu, kinds, launch);
        }
        let mut launches = Vec::with_capacity(kinds.len());
        for first in (0..kinds.len()).step_by(LAUNCHES) {
            let last = (first + LAUNCHES).min(kinds.len());
            let mut counts = Vec::with_capacity(last - first);
            let times = wgpu.gpu.stamped(STAMPS * LAUNCHES, &mut || {
                for i in first..last {
                    let before = wgpu.gpu.stamps_used();
                    launch(i)?;
                    counts.push(wgpu.gpu.stamps_used() - before);
                }
                Ok(())
            })?;
            let mut times = times.as_slice();
            for count in counts {
                let (own, rest) = times.split_at(count);
                times = rest;
                launches.push(self.launch(own)?);
            }
        }
        Ok(launches)
    }

    fn bandwidths(&mut self, _: &Wgpu) -> Result<Option<Bandwidths>> {
        Ok(None)
    }
}

impl WgpuRecorder {
    /// What the stamps of one launch say. Clocks that tick slowly still give every kernel a nanosecond.
    fn launch(&mut self, times: &[u64]) -> Result<Launch> {
        ensure!(
            (2..=STAMPS).contains(&times.len()),
            "wgpu: a launch left {} time stamps, 2 or 3 were due",
            times.len()
        );
        let mut span = |from: u64, to: u64| {
            let start_ns = from.max(self.last_ns).max(1);
            self.last_ns = to.max(start_ns + 1);
            KernelRecord { start_ns, end_ns: self.last_ns, ..KernelRecord::default() }
        };
        let gemv = span(times[0], times[1]);
        Ok(Launch { gemv, dec: times.get(2).map(|&end| span(times[1], end)) })
    }
}

impl Gpu {
    /// Leaves a stamp behind what is queued, if a sweep wants stamps.
    pub(super) fn mark(&self) {
        if let Some(stamps) = &mut *self.stamps.borrow_mut() {
            self.record(|encoder| encoder.write_timestamp(&stamps.set, stamps.used));
            stamps.used += 1;
        }
    }

    fn stamps_used(&self) -> usize {
        self.stamps.borrow().as_ref().map_or(0, |stamps| stamps.used as usize)
    }

    /// Runs `work`, waits, and returns the times of the stamps that it left, at most `most`, in ns.
    fn stamped(&self, most: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<u64>> {
        self.stamps.replace(Some(Stamps { set: self.timestamps(most as u32), used: 0 }));
        let done = work();
        let Some(stamps) = self.stamps.take() else { return done.map(|()| Vec::new()) };
        done?;
        self.nanoseconds(&stamps.set, stamps.used)
    }
}
