//! Linear layers on the device, in their stored layout, cut into row blocks where a binding is too small.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Result, ensure};

use super::gpu::Gpu;
use super::kernels::{DEC_APPLY, DEC_SELECT, EMBED, GEMV_ANYPREC, GEMV_DENSE, GEMV_LUTGEMM, Kernel, UNIFORM_BYTES};
use crate::dec::{BUCKETS, CHUNK, DecPlan, Selection};
use crate::format::{Floats, Numbers, Residual, Size, Tensor};
use crate::weights::{Linear, Weight};

/// Threads of a group in the kernels with one thread per row.
pub(super) const ROWS: usize = 64;

/// Channels that the input window of the products holds.
const WINDOW: usize = UNIFORM_BYTES / 4;

/// A linear layer on the device.
#[derive(Debug)]
pub struct Matrix {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    kernel: &'static Kernel,
    overrides: Vec<(&'static str, u32)>,
    group_size: usize, // 0 without groups
    blocks: Vec<Block>,
    bias: wgpu::Buffer, // f32 [out_features], zeros where the layer has none
    residual: Option<DeviceResidual>,
}

/// Consecutive rows of a matrix, themselves a matrix of the same format; of a residual, words of eight rows each.
#[derive(Debug)]
struct Block {
    first_row: usize,
    rows: usize,
    tables: Vec<wgpu::Buffer>,
}

#[derive(Debug)]
struct DeviceResidual {
    blocks: Vec<Block>,   // of one table, [in_features, rows]
    scales: wgpu::Buffer, // [out_features], as stored
    kind: u32,
}

/// A [`DecPlan`] on the device.
#[derive(Debug)]
pub struct Plan {
    edges: wgpu::Buffer, // [BUCKETS], bit patterns
    pub(super) plan: DecPlan,
}

/// What `floats.wgsl` calls the type of a table.
fn kind(table: &Floats<'_>) -> u32 {
    match table {
        Floats::F32(_) => 0,
        Floats::F16(_) => 1,
        Floats::Bf16(_) => 2,
    }
}

/// A table `[outer, rows, inner]`, where `inner` counts bytes.
struct Table<'a> {
    bytes: &'a [u8],
    outer: usize,
    inner: usize,
}

impl<'a> Table<'a> {
    /// The numbers of a tensor of a matrix of this size, which has `rows` rows, or words of rows.
    fn new(tensor: &Tensor, size: &Size, rows: usize, numbers: &'a Numbers<'_>) -> Self {
        let (bytes, (outer, _)) = (numbers.as_bytes(), tensor.around_rows(size));
        Self { bytes, outer, inner: bytes.len() / outer / rows }
    }

    /// The table of `rows` only; borrowed when these are all there are.
    fn rows(&self, all: usize, rows: &Range<usize>) -> Cow<'_, [u8]> {
        if rows.len() == all {
            return Cow::Borrowed(self.bytes);
        }
        let line = all * self.inner;
        let part = |i: usize| &self.bytes[i * line + rows.start * self.inner..i * line + rows.end * self.inner];
        Cow::Owned((0..self.outer).flat_map(|i| part(i).iter().copied()).collect())
    }
}

/// Uploads `tables`, all of the same `rows`, in as few blocks of rows as bindings of this device allow.
fn upload_blocks(gpu: &Gpu, rows: usize, tables: &[Table<'_>]) -> Result<Vec<Block>> {
    let fit = tables.iter().map(|table| gpu.max_binding / (table.outer * table.inner)).min().unwrap_or(rows);
    ensure!(fit > 0, "{} holds {} bytes in a binding, too few for a row", gpu.info.id, gpu.max_binding);
    let step = fit.min(rows);
    let blocks = (0..rows).step_by(step).map(|first_row| {
        let block = first_row..(first_row + step).min(rows);
        let tables = tables.iter().map(|table| gpu.upload(&table.rows(rows, &block))).collect::<Result<_>>()?;
        Ok(Block { first_row, rows: block.len(), tables })
    });
    blocks.collect()
}

impl Matrix {
    pub(super) fn upload(gpu: &Gpu, linear: &Linear<'_>) -> Result<Self> {
        let size = linear.weight.size();
        let Size { in_features, out_features, group_size, .. } = size;
        let bits = ("BITS", size.bits as u32);
        let (kernel, overrides) = match &linear.weight {
            Weight::Dense(w) => {
                ensure!(
                    in_features.is_multiple_of(8),
                    "dense: {in_features} input channels, a multiple of 8 is expected"
                );
                (&GEMV_DENSE, vec![("VALUES", kind(&w.values))])
            }
            Weight::AnyPrec(w) => (&GEMV_ANYPREC, vec![bits, ("LUT", kind(w.lut()))]),
            Weight::LutGemm(w) => (&GEMV_LUTGEMM, vec![bits, ("ALPHA", kind(w.alpha())), ("Q_BIAS", kind(w.q_bias()))]),
        };
        let tensors = linear.weight.tensors();
        let tables: Vec<_> =
            tensors.iter().map(|(tensor, numbers)| Table::new(tensor, &size, out_features, numbers)).collect();
        let blocks = upload_blocks(gpu, out_features, &tables)?;
        let bias = match &linear.bias {
            Some(bias) => gpu.upload(bytemuck::cast_slice(bias))?,
            None => gpu.zeros(4 * out_features)?,
        };
        let residual = linear.residual.as_ref().map(|r| DeviceResidual::upload(gpu, r)).transpose()?;
        let group_size = group_size.unwrap_or(0);
        Ok(Self { in_features, out_features, kernel, overrides, group_size, blocks, bias, residual })
    }

    /// Queues `y = W·x + bias` of `tokens`, or `y += …` with `accumulate`.
    ///
    /// The kernels take x from a uniform buffer, which software adapters read ten times as fast as storage:
    /// as many whole tokens as fit there, or one token's channels, a window of whole tiles at a time.
    pub(super) fn gemv(&self, gpu: &Gpu, x: &wgpu::Buffer, y: &wgpu::Buffer, tokens: usize, accumulate: bool) {
        let channels = self.in_features.min(WINDOW);
        let step = WINDOW / channels;
        for token in (0..tokens).step_by(step) {
            for first in (0..self.in_features).step_by(channels) {
                let channels = channels.min(self.in_features - first);
                let count = step.min(tokens - token);
                let from = (x, 4 * (token * self.in_features + first));
                gpu.copy(from, (&gpu.window, 0), 4 * count * channels);
                self.gemv_window(gpu, y, accumulate || first > 0, first..first + channels, token..token + count);
            }
        }
    }

    fn gemv_window(&self, gpu: &Gpu, y: &wgpu::Buffer, accumulate: bool, channels: Range<usize>, tokens: Range<usize>) {
        for block in &self.blocks {
            let mut parameters = words(&[self.in_features, block.rows, block.first_row, self.out_features]);
            parameters.push(u32::from(accumulate));
            parameters.extend(words(&[channels.start, channels.len(), tokens.start, self.group_size]));
            let buffers: Vec<_> = block.tables.iter().chain([&self.bias, &gpu.window, y]).collect();
            let groups = [block.rows.div_ceil(ROWS), tokens.len()];
            gpu.dispatch(self.kernel, &self.overrides, &buffers, &parameters, groups);
        }
    }

    /// Queues `y += s · Σ q·x` of `tokens` over the channels of `list`.
    pub(super) fn apply(
        &self,
        gpu: &Gpu,
        plan: &Plan,
        list: &wgpu::Buffer,
        x: &wgpu::Buffer,
        y: &wgpu::Buffer,
        tokens: usize,
    ) {
        let residual = self.residual.as_ref().expect("a plan exists only for a matrix with a residual");
        for block in &residual.blocks {
            let (selected, line, n_tb) = (plan.plan.selected(), plan.plan.line(), plan.plan.n_tb());
            let parameters = [self.in_features, self.out_features, selected, line, n_tb, block.first_row, block.rows];
            let buffers = [list, &block.tables[0], &residual.scales, x, y];
            let overrides = [("SCALES", residual.kind)];
            gpu.dispatch(&DEC_APPLY, &overrides, &buffers, &words(&parameters), [n_tb, tokens]);
        }
    }

    /// Queues `h[t] = scale · table[ids[first + t]]`, NaN where the table has no such row.
    pub(super) fn embed(
        &self,
        gpu: &Gpu,
        scale: f32,
        ids: &wgpu::Buffer,
        first: usize,
        h: &wgpu::Buffer,
        tokens: usize,
    ) -> Result<()> {
        ensure!(std::ptr::eq(self.kernel, &GEMV_DENSE), "the embedding is quantized, a dense one is expected");
        for block in &self.blocks {
            let mut parameters = words(&[self.in_features, block.rows, block.first_row, first, self.out_features]);
            parameters.push(scale.to_bits());
            let groups = [self.in_features.div_ceil(ROWS), tokens];
            gpu.dispatch(&EMBED, &self.overrides, &[ids, &block.tables[0], h], &parameters, groups);
        }
        Ok(())
    }
}

/// Sizes as a kernel takes them; all fit, since a binding holds less than 2^32 bytes.
pub(super) fn words(sizes: &[usize]) -> Vec<u32> {
    sizes.iter().map(|&size| size as u32).collect()
}

impl DeviceResidual {
    fn upload(gpu: &Gpu, residual: &Residual<'_>) -> Result<Self> {
        let words = residual.out_features() / 8;
        let table = Table::new(&Tensor::RESIDUAL, &residual.size(), words, &residual.tensors()[0]);
        Ok(Self {
            blocks: upload_blocks(gpu, words, &[table])?,
            scales: gpu.upload(residual.scales().as_bytes())?,
            kind: kind(residual.scales()),
        })
    }
}

impl Plan {
    pub(super) fn upload(gpu: &Gpu, matrix: &Matrix, plan: &DecPlan) -> Result<Self> {
        ensure!(matrix.residual.is_some(), "a matrix without a residual cannot be compensated");
        ensure!(
            plan.n_tb() <= gpu.info.max_n_tb,
            "n_tb is {}, {} allows 1 to {}",
            plan.n_tb(),
            gpu.info.id,
            gpu.info.max_n_tb
        );
        // A lower edge below 0 is reached by every magnitude, as 0 is; as unsigned patterns only 0 says so.
        let edges: [u32; BUCKETS] = plan.edges().map(|edge| if edge > 0.0 { edge.to_bits() } else { 0 });
        Ok(Self { edges: gpu.upload(bytemuck::cast_slice(&edges))?, plan: plan.clone() })
    }

    /// Queues the selection of `tokens`: `list` `[tokens, selected]` is overwritten.
    pub(super) fn select(&self, gpu: &Gpu, x: &wgpu::Buffer, list: &wgpu::Buffer, tokens: usize) {
        let (in_features, exact) = (self.plan.in_features(), self.plan.selection() == Selection::Exact);
        let parameters = words(&[in_features, self.plan.k_chunk(), self.plan.selected(), usize::from(exact)]);
        let groups = [in_features.div_ceil(CHUNK), tokens];
        gpu.dispatch(&DEC_SELECT, &[], &[&self.edges, x, list], &parameters, groups);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Wgpu;
    use super::*;
    use crate::backend::GemvBackend;
    use crate::format::{AnyPrec, Dense, LutGemm};
    use crate::sampling::draws;

    #[test]
    fn rows_are_cut_out_of_every_line() {
        let bytes: Vec<u8> = (0..24).collect();
        let table = Table { bytes: &bytes, outer: 2, inner: 3 };
        assert_eq!(table.rows(4, &(1..3)), vec![3, 4, 5, 6, 7, 8, 15, 16, 17, 18, 19, 20]);
        assert!(matches!(table.rows(4, &(0..4)), Cow::Borrowed(whole) if whole == bytes));
    }

    fn halves(seed: u64, len: usize) -> Floats<'static> {
        draws(seed, len).into_iter().map(half::f16::from_f32).collect::<Vec<_>>().into()
    }

    fn layers() -> Vec<Linear<'static>> {
        let (inner, outer) = (96, 200);
        let words = |seed, len| draws(seed, len).into_iter().map(|d| d.to_bits().wrapping_mul(2_654_435_761)).collect();
        let anyprec = AnyPrec::new(inner, outer, 3, words(1, 3 * outer * 3), halves(2, outer * 8)).unwrap();
        let lutgemm =
            LutGemm::new(inner, outer, 3, 32, words(3, 3 * 3 * outer), halves(4, 9 * outer), halves(5, 3 * outer));
        let dense = Dense { in_features: inner, out_features: outer, values: halves(6, inner * outer) };
        let layer = |weight| Linear {
            bias: Some(draws(7, outer).into()),
            residual: Some(Residual::new(inner, outer, words(8, inner * outer / 8), halves(9, outer)).unwrap()),
            thresholds: Some(vec![1.0; inner].into()),
            ..Linear::plain(weight)
        };
        [Weight::AnyPrec(anyprec), Weight::LutGemm(lutgemm.unwrap()), Weight::Dense(dense)].map(layer).into()
    }

    /// A device with small bindings computes, bit for bit, what one with large bindings does.
    #[test]
    fn blocks_of_rows_agree_with_the_whole() {
        if !crate::devices::is_under_test("wgpu") {
            return;
        }
        let outputs = [usize::MAX, 2048].map(|max_binding| {
            let mut wgpu = Wgpu::open(None).unwrap();
            wgpu.gpu.max_binding = wgpu.gpu.max_binding.min(max_binding);
            let mut x = wgpu.vector(96).unwrap();
            wgpu.write(&draws(10, 96), &mut x).unwrap();
            let mut y = wgpu.vector(200).unwrap();
            let mut out = vec![0.0; 200];
            let mut all = Vec::new();
            for linear in layers() {
                let matrix = wgpu.matrix(&linear).unwrap();
                assert_eq!(matrix.blocks.len() > 1, max_binding == 2048);
                let plan = DecPlan::new(96, 200, &[1.0; 96], 512, 7, Selection::Exact).unwrap();
                let plan = wgpu.plan(&matrix, &plan).unwrap();
                wgpu.dec_gemv(&matrix, &plan, &x, &mut y).unwrap();
                wgpu.read(&y, &mut out).unwrap();
                all.extend(out.iter().map(|y| y.to_bits()));
                if matches!(linear.weight, Weight::Dense(_)) {
                    for token in [0u32, 199, 64, 77] {
                        let ids = wgpu.gpu.upload(&token.to_le_bytes()).unwrap();
                        matrix.embed(&wgpu.gpu, 1.0, &ids, 0, &y.0, 1).unwrap();
                        wgpu.read(&y, &mut out).unwrap();
                        all.extend(out[..96].iter().map(|y| y.to_bits()));
                    }
                }
            }
            all
        });
        assert_eq!(outputs[0], outputs[1]);
    }
}
