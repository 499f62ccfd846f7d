//! When kernels ran: what a backend's clock has to deliver, and the plain one that every backend can.

use anyhow::{Result, ensure};

use super::grid::Bandwidths;
use crate::backend::GemvBackend;
use crate::nsys::KernelRecord;

/// One launch of a base product, or of a base product with its compensation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Launch {
    /// The base product. Where compensation runs inside the same launch this is the whole launch.
    pub gemv: KernelRecord,
    /// The compensation: a kernel of its own, or the stretch from the first compensating block's start to the
    /// last one's end, without a name then; `None` where nothing tells it from the base product.
    pub dec: Option<KernelRecord>,
}

/// Says when a backend's kernels ran.
pub trait Recorder<B: GemvBackend> {
    /// What takes the times, for the files: `CUPTI`, `timestamp queries`, `host clock`.
    fn clock(&self) -> String;

    /// Calls `launch(i)` once for every `i` in `0..launches`, in order (each queues one `gemv` or one
    /// `dec_gemv`), and returns what ran, one entry per call, in order, on one clock.
    ///
    /// A backend may capture the calls into a graph and time its replay, as long as the launches run one
    /// after the other as they do when decoding.
    ///
    /// # Errors
    /// What the device says, or a launch that cannot be timed.
    fn record(
        &mut self,
        backend: &B,
        launches: usize,
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>>;

    /// Bandwidth of device memory and of the host link, if the backend has its own way to measure them;
    /// otherwise `None`, and they are measured by [`by_products`].
    ///
    /// # Errors
    /// What the device says.
    fn bandwidths(&mut self, backend: &B) -> Result<Option<Bandwidths>>;
}

/// The clock of [`GemvBackend::time`], one launch at a time: for the CPU, and where nothing better is there.
#[derive(Debug, Default)]
pub struct ByClock {
    now_ns: u64,
}

impl<B: GemvBackend> Recorder<B> for ByClock {
    fn clock(&self) -> String {
        "device clock, one launch at a time".into()
    }

    fn record(
        &mut self,
        backend: &B,
        launches: usize,
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>> {
        (0..launches)
            .map(|i| {
                let took = backend.time(&mut || launch(i))?;
                let start_ns = self.now_ns + 1;
                self.now_ns = start_ns + (took.as_nanos() as u64).max(1);
                let gemv = KernelRecord { start_ns, end_ns: self.now_ns, ..KernelRecord::default() };
                Ok(Launch { gemv, dec: None })
            })
            .collect()
    }

    fn bandwidths(&mut self, _: &B) -> Result<Option<Bandwidths>> {
        Ok(None)
    }
}

/// What [`by_products`] times: how long each takes and how many bytes it moves.
pub struct Products<'a> {
    /// Queues base products that read `base_bytes` of weights.
    pub base: &'a mut dyn FnMut() -> Result<()>,
    /// Bytes of weights.
    pub base_bytes: usize,
    /// Queues the same products with compensation that reads `residual_bytes`.
    pub compensated: &'a mut dyn FnMut() -> Result<()>,
    /// Bytes of residuals.
    pub residual_bytes: usize,
}

/// Bandwidths as the products themselves reach them: weights per base time, residuals per time that heavy
/// compensation adds. The least of five times each.
///
/// Where compensation adds nothing that can be measured, the host link counts as fast as device memory.
///
/// # Errors
/// What the device says.
pub fn by_products<B: GemvBackend>(backend: &B, products: Products<'_>) -> Result<Bandwidths> {
    let Products { base, base_bytes, compensated, residual_bytes } = products;
    let mut best = [f64::INFINITY; 2];
    for _ in 0..5 {
        best[0] = best[0].min(backend.time(base)?.as_secs_f64());
        best[1] = best[1].min(backend.time(compensated)?.as_secs_f64());
    }
    ensure!(best[0] > 0.0, "the clock of {} stands still: base products took no time", backend.device().id);
    let device_memory = base_bytes as f64 / best[0];
    let added = best[1] - best[0];
    let host_link = if added > 0.0 { (residual_bytes as f64 / added).min(device_memory) } else { device_memory };
    Ok(Bandwidths { device_memory, host_link })
}
