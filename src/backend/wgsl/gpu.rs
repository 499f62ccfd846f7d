//! The device: adapters, buffers, a queue of dispatches, reads and the clock.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use wgpu::{BufferUsages, Features};

use super::kernels::{Kernel, UNIFORM_BYTES};
use super::stamps::Stamps;
use crate::backend::DeviceInfo;

/// Dispatches that are queued before the device starts on them without being asked.
const SUBMIT_AFTER: usize = 2048;

/// Vulkan does not say how many groups a device holds at once; this is about half of what the largest do.
const MAX_N_TB: usize = 128;

/// Values of a kernel's `override`s.
pub(super) type Overrides<'a> = &'a [(&'static str, u32)];

/// What a pipeline is found by.
type PipelineKey = (&'static str, Vec<(&'static str, u32)>);

/// A device and what is queued for it.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) info: DeviceInfo,
    /// The most bytes that one binding may have.
    pub(super) max_binding: usize,
    /// Where the products take their input from; overwritten by each.
    pub(super) window: wgpu::Buffer, // UNIFORM_BYTES
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pipelines: RefCell<HashMap<PipelineKey, wgpu::ComputePipeline>>,
    /// Commands that are recorded and not yet submitted, and how many dispatches are among them.
    pending: RefCell<Option<wgpu::CommandEncoder>>,
    dispatches: Cell<usize>,
    pub(super) has_clock: bool,
    /// While a sweep wants to know when kernels ran.
    pub(super) stamps: RefCell<Option<Stamps>>,
}

fn create_buffer(device: &wgpu::Device, size: u64, usage: BufferUsages, mapped_at_creation: bool) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation })
}

fn vulkan() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN;
    wgpu::Instance::new(descriptor)
}

fn enumerate() -> Result<Vec<wgpu::Adapter>> {
    let mut adapters = pollster::block_on(vulkan().enumerate_adapters(wgpu::Backends::VULKAN));
    // Real devices first, so that index 0 is the best choice; the order is otherwise the driver's.
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    ensure!(
        !adapters.is_empty(),
        "no vulkan adapter found, install mesa-vulkan-drivers and libvulkan1 for a software one"
    );
    Ok(adapters)
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> DeviceInfo {
    let info = adapter.get_info();
    DeviceInfo {
        id: format!("wgpu:{index}"),
        name: info.name,
        driver: [info.driver, info.driver_info].join(" ").trim().to_owned(),
        max_n_tb: MAX_N_TB,
        max_tokens: super::MAX_TOKENS,
        lookahead: 0,
    }
}

/// Every Vulkan adapter, in the order in which `wgpu:N` counts them.
///
/// # Errors
/// There is none.
pub fn adapters() -> Result<Vec<DeviceInfo>> {
    Ok(enumerate()?.iter().enumerate().map(|(i, adapter)| describe(i, adapter)).collect())
}

impl Gpu {
    pub(super) fn open(index: Option<usize>) -> Result<Self> {
        let adapters = enumerate()?;
        let index = index.unwrap_or(0);
        let Some(adapter) = adapters.get(index) else {
            bail!("wgpu:{index} does not exist, wgpu:0 to wgpu:{} are there", adapters.len() - 1);
        };
        let info = describe(index, adapter);
        ensure!(
            adapter.features().contains(Features::IMMEDIATES),
            "{} ({}) has no immediate data (push constants), choose another device",
            info.id,
            info.name
        );
        let stamps = Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let has_clock = adapter.features().contains(stamps);
        let limits = adapter.limits();
        let descriptor = wgpu::DeviceDescriptor {
            label: None,
            required_features: Features::IMMEDIATES | if has_clock { stamps } else { Features::empty() },
            required_limits: limits.clone(),
            experimental_features: wgpu::ExperimentalFeatures::disabled(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .with_context(|| format!("{} ({}) cannot be opened", info.id, info.name))?;
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let window = create_buffer(&device, UNIFORM_BYTES as u64, usage, false);
        Ok(Self {
            info,
            max_binding: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) as usize,
            window,
            device,
            queue,
            pipelines: RefCell::default(),
            pending: RefCell::default(),
            dispatches: Cell::default(),
            has_clock,
            stamps: RefCell::default(),
        })
    }

    /// A buffer of zeros, `bytes` rounded up to 16 so that it may be read four numbers at a time.
    pub(super) fn zeros(&self, bytes: usize) -> Result<wgpu::Buffer> {
        self.allocate(
            bytes,
            BufferUsages::STORAGE | BufferUsages::UNIFORM | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
            false,
        )
    }

    /// A buffer of `data`, padded with zeros as in [`Gpu::zeros`].
    pub(super) fn upload(&self, data: &[u8]) -> Result<wgpu::Buffer> {
        let buffer = self.allocate(data.len(), BufferUsages::STORAGE | BufferUsages::COPY_SRC, true)?;
        let mut view = buffer.slice(..).get_mapped_range_mut().map_err(|e| anyhow!("{}: {e}", self.info.id))?;
        view.slice(..data.len()).copy_from_slice(data);
        drop(view);
        buffer.unmap();
        // Starts the transfer, so that its staging memory is free before the next large upload.
        self.submit();
        Ok(buffer)
    }

    fn allocate(&self, bytes: usize, usage: BufferUsages, mapped: bool) -> Result<wgpu::Buffer> {
        ensure!(
            bytes <= self.max_binding,
            "a buffer of {bytes} bytes is too large for {}, {} are allowed",
            self.info.id,
            self.max_binding
        );
        let size = bytes.max(16).next_multiple_of(16) as u64;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = create_buffer(&self.device, size, usage, mapped);
        match pollster::block_on(scope.pop()) {
            Some(_) => bail!("{} has no room for {size} more bytes, use a smaller model or --device cpu", self.info.id),
            None => Ok(buffer),
        }
    }

    /// Queues `kernel` over `groups`; `buffers` and `parameters` are in the order of its declarations.
    pub(super) fn dispatch(
        &self,
        kernel: &'static Kernel,
        overrides: Overrides<'_>,
        buffers: &[&wgpu::Buffer],
        parameters: &[u32],
        groups: [usize; 2],
    ) {
        debug_assert_eq!(buffers.len(), kernel.reads + kernel.writes, "{}", kernel.name);
        debug_assert_eq!(parameters.len(), kernel.parameters, "{}", kernel.name);
        let pipeline = self.pipeline(kernel, overrides);
        let entries: Vec<_> = buffers
            .iter()
            .enumerate()
            .map(|(i, buffer)| wgpu::BindGroupEntry { binding: i as u32, resource: buffer.as_entire_binding() })
            .collect();
        let bindings = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        self.record(|encoder| {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &bindings, &[]);
            pass.set_immediates(0, bytemuck::cast_slice(parameters));
            pass.dispatch_workgroups(groups[0] as u32, groups[1] as u32, 1);
        });
        self.dispatches.update(|dispatches| dispatches + 1);
        if self.dispatches.get() >= SUBMIT_AFTER {
            self.submit();
        }
    }

    /// Queues what `commands` records.
    pub(super) fn record(&self, commands: impl FnOnce(&mut wgpu::CommandEncoder)) {
        let mut pending = self.pending.borrow_mut();
        commands(pending.get_or_insert_with(|| self.device.create_command_encoder(&Default::default())));
    }

    /// Queues a copy of `bytes` from and to byte offsets, all multiples of 4.
    pub(super) fn copy(&self, from: (&wgpu::Buffer, usize), to: (&wgpu::Buffer, usize), bytes: usize) {
        let (at, to_at) = (from.1 as u64, to.1 as u64);
        self.record(|encoder| encoder.copy_buffer_to_buffer(from.0, at, to.0, to_at, bytes as u64));
    }

    /// Overwrites words of `to` from word `start` on, after everything that is queued.
    pub(super) fn write(&self, words: &[u32], to: &wgpu::Buffer, start: usize) {
        self.submit();
        self.queue.write_buffer(to, 4 * start as u64, bytemuck::cast_slice(words));
    }

    /// Waits, then overwrites `out` with the words of `from` from word `start` on.
    pub(super) fn read(&self, from: &wgpu::Buffer, start: usize, out: &mut [u32]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let bytes = 4 * out.len();
        let staging = self.allocate(bytes, BufferUsages::COPY_DST | BufferUsages::MAP_READ, false)?;
        self.copy((from, 4 * start), (&staging, 0), bytes);
        self.submit();
        let slice = staging.slice(..);
        let (sender, receiver) = mpsc::channel();
        slice.map_async(wgpu::MapMode::Read, move |result| {
            // The receiver outlives the poll below, which is what runs this.
            let _ = sender.send(result);
        });
        self.wait()?;
        receiver.recv().context("the device dropped a read")?.with_context(|| format!("{} was lost", self.info.id))?;
        let view = slice.get_mapped_range().map_err(|e| anyhow!("{}: {e}", self.info.id))?;
        out.copy_from_slice(bytemuck::cast_slice(&view[..bytes]));
        Ok(())
    }

    /// The device's time between the start and the end of what `work` queues, and waits for it.
    pub(super) fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.submit();
        self.wait()?;
        if !self.has_clock {
            // No time stamps: the host's clock around an idle device's work, submission included.
            let start = Instant::now();
            work()?;
            self.submit();
            self.wait()?;
            return Ok(start.elapsed());
        }
        let stamps = self.timestamps(2);
        self.record(|encoder| encoder.write_timestamp(&stamps, 0));
        work()?;
        self.record(|encoder| encoder.write_timestamp(&stamps, 1));
        let times = self.nanoseconds(&stamps, 2)?;
        Ok(Duration::from_nanos(times[1] - times[0]))
    }

    /// Room for time stamps.
    pub(super) fn timestamps(&self, count: u32) -> wgpu::QuerySet {
        let ty = wgpu::QueryType::Timestamp;
        self.device.create_query_set(&wgpu::QuerySetDescriptor { label: None, ty, count })
    }

    /// Waits; the first `count` stamps, none before the first one.
    pub(super) fn nanoseconds(&self, stamps: &wgpu::QuerySet, count: u32) -> Result<Vec<u64>> {
        let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        let resolved = create_buffer(&self.device, 8 * u64::from(count).max(1), usage, false);
        self.record(|encoder| encoder.resolve_query_set(stamps, 0..count, &resolved, 0));
        let mut ticks = vec![0u64; count as usize];
        self.read(&resolved, 0, bytemuck::cast_slice_mut(&mut ticks))?;
        let period = f64::from(self.queue.get_timestamp_period());
        let first = ticks.first().copied().unwrap_or(0);
        // Counted from the first: whole nanoseconds of a large count would not survive the multiplication.
        Ok(ticks.iter().map(|tick| first + (tick.saturating_sub(first) as f64 * period) as u64).collect())
    }

    fn submit(&self) {
        self.dispatches.set(0);
        self.queue.submit(self.pending.take().map(wgpu::CommandEncoder::finish));
    }

    fn wait(&self) -> Result<()> {
        let waited = self.device.poll(wgpu::PollType::wait_indefinitely());
        waited.with_context(|| format!("{} does not answer", self.info.id))?;
        Ok(())
    }

    fn pipeline(&self, kernel: &'static Kernel, overrides: Overrides<'_>) -> wgpu::ComputePipeline {
        let key = (kernel.name, overrides.to_vec());
        if let Some(pipeline) = self.pipelines.borrow().get(&key) {
            return pipeline.clone();
        }
        let pipeline = self.compile(kernel, overrides);
        self.pipelines.borrow_mut().insert(key, pipeline.clone());
        pipeline
    }

    fn compile(&self, kernel: &Kernel, overrides: Overrides<'_>) -> wgpu::ComputePipeline {
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(kernel.name),
            source: wgpu::ShaderSource::Wgsl(kernel.text().into()),
        });
        let constants: Vec<_> = overrides.iter().map(|&(name, value)| (name, f64::from(value))).collect();
        self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name),
            layout: None, // as the text declares it
            module: &module,
            entry_point: Some(kernel.name),
            compilation_options: wgpu::PipelineCompilationOptions { constants: &constants, ..Default::default() },
            cache: None,
        })
    }
}
