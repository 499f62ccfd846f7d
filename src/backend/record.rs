//! When kernels ran: what a backend's clock has to deliver to the sweep, and the plain one that every backend can.

use anyhow::Result;

use super::GemvBackend;

/// One kernel that ran, or a stretch of time that stands for one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelRecord {
    /// The kernel's own name, whatever the trace calls it.
    pub name: String,
    /// Nanoseconds on the clock of the recorder.
    pub start_ns: u64,
    /// Nanoseconds on the same clock; above `start_ns`.
    pub end_ns: u64,
    /// Thread blocks. Of a compensation kernel the first is its `n_tb`.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Registers of a thread, 0 if unknown.
    pub registers: u32,
    /// Bytes of shared memory that the kernel declares.
    pub static_shared: u32,
    /// Bytes of shared memory that its launch adds.
    pub dynamic_shared: u32,
    /// Device, as the driver counts.
    pub device_id: u32,
    /// Context, as CUPTI counts.
    pub context_id: u32,
    /// Stream, as CUPTI counts.
    pub stream_id: u32,
    /// What CUPTI joins launches and kernels by.
    pub correlation_id: u64,
    /// The node of a captured graph, 0 outside of one.
    pub graph_node_id: u64,
}

/// One launch of a base product, or of a base product with its compensation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Launch {
    /// The base product. Where compensation runs inside the same launch this is the whole launch.
    pub gemv: KernelRecord,
    /// The compensation: a kernel of its own, or the stretch from the first compensating block's start to the
    /// last one's end, without a name then; `None` where nothing tells it from the base product.
    pub dec: Option<KernelRecord>,
}

/// What takes the times, where a device has several clocks; the others ignore it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// CUPTI, or events where it is missing or busy.
    #[default]
    Auto,
    /// CUPTI or nothing.
    Cupti,
    /// Device events around graphs of like launches.
    Events,
    /// Events again, every launch exactly once and in order: for a profiler that watches from outside.
    Once,
}

impl std::str::FromStr for Clock {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "auto" => Self::Auto,
            "cupti" => Self::Cupti,
            "events" => Self::Events,
            "once" => Self::Once,
            _ => anyhow::bail!("{name:?}, auto, cupti or events is expected"),
        })
    }
}

/// Bytes per second, both measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidths {
    /// Of device memory, read.
    pub device_memory: f64,
    /// Of the host link, as compensation reads residuals over it.
    pub host_link: f64,
}

/// Says when a backend's kernels ran.
pub trait Recorder<B: GemvBackend + ?Sized> {
    /// What takes the times, for the files: `CUPTI 13.0 …`, `timestamp queries`, `host clock`.
    fn clock(&self) -> String;

    /// Calls `launch(i)` for every `i` in `0..kinds.len()`, in order (each queues one `gemv` or one `dec_gemv`),
    /// and returns what ran, one entry per launch, in order, on one clock.
    ///
    /// A backend may capture the calls into a graph and time its replay, may make the same calls several times,
    /// and may put launches of the same kind together, as long as they run one after the other as they do when
    /// decoding. The time of a launch is what it adds: where launches overlap, it starts when the one before it
    /// ends.
    ///
    /// # Errors
    /// What the device says, or a launch that cannot be timed.
    fn record(
        &mut self,
        backend: &B,
        kinds: &[usize],
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>>;

    /// Bandwidth of device memory and of the host link, if the backend has its own way to measure them;
    /// otherwise `None`, and the products themselves measure them.
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
        "host clock, one launch at a time".into()
    }

    fn record(
        &mut self,
        backend: &B,
        kinds: &[usize],
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>> {
        (0..kinds.len())
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

/// The middle value, or the mean of the two middle ones; 0 of none. Sorts `values`.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { 0.0 } else { (values[(n - 1) / 2] + values[n / 2]) / 2.0 }
}
