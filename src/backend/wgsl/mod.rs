//! The reference backend: every kernel in its slow, obvious form, in WGSL, on any Vulkan adapter.
//!
//! Vectors are f32, weights stay in their stored layout, sums run in f32. Operations are recorded and
//! submitted when something is read, or when very many have gathered. The length of a text and the number of
//! its sampled tokens are counted by the host, which needs no answer from the device for that; the tokens
//! themselves stay on the device. The one exception is sampling at a temperature above 0: the logits are read
//! back and the host chooses ([`Sampling::choose`](crate::sampling::Sampling::choose)).

mod decode;
mod gpu;
mod kernels;
mod matrix;
mod stamps;

use std::cell::RefCell;
use std::time::Duration;

use anyhow::Result;

pub use decode::Cache;
use gpu::Gpu;
pub use gpu::adapters;
pub use matrix::{Matrix, Plan};
pub use stamps::WgpuRecorder;

use super::record::Clock;
use super::{DeviceInfo, GemvBackend};
use crate::dec::DecPlan;
use crate::weights::Linear;

/// Tokens of one operation: what a prompt is cut into.
const MAX_TOKENS: usize = 16;

/// A Vulkan device.
#[derive(Debug)]
pub struct Wgpu {
    gpu: Gpu,
    scratch: Scratch,
}

/// f32 numbers on the device.
#[derive(Debug)]
pub struct Vector(wgpu::Buffer);

/// Buffers between the kernels of one operation, as large as any operation has needed so far.
#[derive(Debug, Default)]
struct Scratch {
    /// What a product takes: the normalized or gated input, `[tokens, in_features]`.
    x: RefCell<Option<wgpu::Buffer>>,
    /// Rotated queries and keys, and values, `[tokens, qkv_rows]`.
    rotated: RefCell<Option<wgpu::Buffer>>,
    /// Of keys and values in bytes.
    steps: RefCell<Option<wgpu::Buffer>>,
    /// Selected channels, `[tokens, selected]`.
    list: RefCell<Option<wgpu::Buffer>>,
    /// Queries, keys and values of one text of several, `[tokens, qkv_rows]`.
    own: RefCell<Option<wgpu::Buffer>>,
    /// What its queries found, `[tokens, num_heads · head_dim]`.
    attended: RefCell<Option<wgpu::Buffer>>,
    /// Logits of one row of several, `[vocab_size]`.
    logits: RefCell<Option<wgpu::Buffer>>,
    /// Tokens that enter the model, `[tokens]`.
    ids: RefCell<Option<wgpu::Buffer>>,
}

/// The buffer in `slot` with room for `len` words, a larger new one if need be.
fn scratch(gpu: &Gpu, slot: &RefCell<Option<wgpu::Buffer>>, len: usize) -> Result<wgpu::Buffer> {
    let mut slot = slot.borrow_mut();
    match &*slot {
        Some(buffer) if buffer.size() >= 4 * len as u64 => Ok(buffer.clone()),
        _ => Ok(slot.insert(gpu.zeros(4 * len)?).clone()),
    }
}

impl Wgpu {
    /// Opens the adapter that [`adapters`] lists at `index`; without one the first, real devices before
    /// software.
    ///
    /// # Errors
    /// No Vulkan adapter, no such index, or a device that cannot be opened or has no push constants.
    pub fn open(index: Option<usize>) -> Result<Self> {
        Ok(Self { gpu: Gpu::open(index)?, scratch: Scratch::default() })
    }

    /// Queues `y = W·x` (or `y += W·x`) with the compensation of the first tokens, if there is a plan for so many.
    fn product(
        &self,
        matrix: &Matrix,
        plan: Option<(&Plan, usize)>,
        x: &wgpu::Buffer,
        y: &wgpu::Buffer,
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        self.gpu.mark();
        matrix.gemv(&self.gpu, x, y, tokens, accumulate);
        self.gpu.mark();
        if let Some((plan, count)) = plan.filter(|(plan, _)| plan.plan.selected() > 0) {
            let list = scratch(&self.gpu, &self.scratch.list, count * plan.plan.selected())?;
            plan.select(&self.gpu, x, &list, count);
            matrix.apply(&self.gpu, plan, &list, x, y, count);
            self.gpu.mark();
        }
        Ok(())
    }
}

impl GemvBackend for Wgpu {
    type Vector = Vector;
    type Matrix = Matrix;
    type Plan = Plan;
    type Recorder = WgpuRecorder;

    fn device(&self) -> &DeviceInfo {
        &self.gpu.info
    }

    fn vector(&self, len: usize) -> Result<Vector> {
        Ok(Vector(self.gpu.zeros(4 * len)?))
    }

    fn room(&self, vector: &Vector) -> usize {
        vector.0.size() as usize / 4
    }

    fn write(&self, values: &[f32], to: &mut Vector) -> Result<()> {
        self.gpu.write(bytemuck::cast_slice(values), &to.0, 0);
        Ok(())
    }

    fn read(&self, from: &Vector, out: &mut [f32]) -> Result<()> {
        self.gpu.read(&from.0, 0, bytemuck::cast_slice_mut(out))
    }

    fn matrix(&self, linear: &Linear<'_>) -> Result<Matrix> {
        Matrix::upload(&self.gpu, linear)
    }

    fn plan(&self, matrix: &Matrix, plan: &DecPlan) -> Result<Plan> {
        Plan::upload(&self.gpu, matrix, plan)
    }

    fn gemv(&self, matrix: &Matrix, x: &Vector, y: &mut Vector) -> Result<()> {
        self.product(matrix, None, &x.0, &y.0, 1, false)
    }

    fn dec_gemv(&self, matrix: &Matrix, plan: &Plan, x: &Vector, y: &mut Vector) -> Result<()> {
        self.product(matrix, Some((plan, 1)), &x.0, &y.0, 1, false)
    }

    fn select(&self, plan: &Plan, x: &Vector) -> Result<Vec<u32>> {
        let mut selected = vec![0; plan.plan.selected()];
        let list = scratch(&self.gpu, &self.scratch.list, selected.len())?;
        plan.select(&self.gpu, &x.0, &list, 1);
        self.gpu.read(&list, 0, &mut selected)?;
        Ok(selected)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.gpu.time(work)
    }

    fn recorder(&self, _: Clock) -> Result<WgpuRecorder> {
        Ok(WgpuRecorder::new(&self.gpu))
    }
}
