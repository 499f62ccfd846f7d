//! Linear layers on the device, in their stored layout, cut into row blocks where a binding is too small.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Result, ensure};
use half::slice::HalfFloatSliceExt;

use super::gpu::Gpu;
use super::kernels::{DEC_APPLY, DEC_SELECT, EMBED, GEMV_ANYPREC, GEMV_DENSE, GEMV_LUTGEMM, Kernel, UNIFORM_BYTES};
use crate::dec::{BUCKETS, CHUNK, DecPlan, Selection};
use crate::format::{AnyPrec, Dense, Floats, LutGemm, Residual};
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
    group_size: Option<usize>,
    blocks: Vec<Block>,
    bias: wgpu::Buffer, // f32 [out_features], zeros where the layer has none
    residual: Option<DeviceResidual>,
}

/// Consecutive rows of a matrix, themselves a matrix of the same format.
#[derive(Debug)]
struct Block {
    first_row: usize,
    rows: usize,
    tables: Vec<wgpu::Buffer>,
}

#[derive(Debug)]
struct DeviceResidual {
    blocks: Vec<ResidualBlock>,
    scales: wgpu::Buffer, // [out_features], as stored
    kind: u32,
}

/// Consecutive output words (eight rows each) of a residual.
#[derive(Debug)]
struct ResidualBlock {
    first_word: usize,
    words: usize,
    nibbles: wgpu::Buffer, // [in_features, words]
}

/// A [`DecPlan`] on the device.
#[derive(Debug)]
pub struct Plan {
    edges: wgpu::Buffer, // [BUCKETS], bit patterns
    in_features: usize,
    k_chunk: usize,
    pub(super) selected: usize,
    selection: Selection,
    line: usize, // words that stay together
    n_tb: usize,
}

/// What `floats.wgsl` calls the type of a table.
fn kind(table: &Floats<'_>) -> u32 {
    match table {
        Floats::F32(_) => 0,
        Floats::F16(_) => 1,
        Floats::Bf16(_) => 2,
    }
}

fn bytes<'a>(table: &'a Floats<'_>) -> &'a [u8] {
    match table {
        Floats::F32(v) => bytemuck::cast_slice(v),
        Floats::F16(v) => bytemuck::cast_slice(v.reinterpret_cast()),
        Floats::Bf16(v) => bytemuck::cast_slice(v.reinterpret_cast()),
    }
}

/// A table `[outer, rows, inner]`, where `inner` counts bytes.
struct Table<'a> {
    bytes: &'a [u8],
    outer: usize,
    inner: usize,
}

impl Table<'_> {
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
fn upload_blocks(gpu: &Gpu, rows: usize, tables: &[Table<'_>]) -> Result<Vec<(Range<usize>, Vec<wgpu::Buffer>)>> {
    let fit = tables.iter().map(|table| gpu.max_binding / (table.outer * table.inner)).min().unwrap_or(rows);
    ensure!(fit > 0, "{} holds {} bytes in a binding, too few for a row", gpu.info.id, gpu.max_binding);
    let step = fit.min(rows);
    let blocks = (0..rows).step_by(step).map(|start| {
        let block = start..(start + step).min(rows);
        let buffers = tables.iter().map(|table| gpu.upload(&table.rows(rows, &block))).collect::<Result<_>>()?;
        Ok((block, buffers))
    });
    blocks.collect()
}

impl Matrix {
    pub(super) fn upload(gpu: &Gpu, linear: &Linear<'_>) -> Result<Self> {
        let (kernel, overrides, group_size, blocks) = match &linear.weight {
            Weight::Dense(w) => (&GEMV_DENSE, vec![("VALUES", kind(&w.values))], None, dense_blocks(gpu, w)?),
            Weight::AnyPrec(w) => {
                let overrides = vec![("BITS", w.bits() as u32), ("LUT", kind(w.lut()))];
                (&GEMV_ANYPREC, overrides, None, anyprec_blocks(gpu, w)?)
            }
            Weight::LutGemm(w) => {
                let kinds = [("ALPHA", kind(w.alpha())), ("Q_BIAS", kind(w.q_bias()))];
                let overrides = [vec![("BITS", w.bits() as u32)], kinds.to_vec()].concat();
                (&GEMV_LUTGEMM, overrides, Some(w.group_size()), lutgemm_blocks(gpu, w)?)
            }
        };
        let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
        let bias = match &linear.bias {
            Some(bias) => gpu.upload(bytemuck::cast_slice(bias))?,
            None => gpu.zeros(4 * out_features)?,
        };
        let residual = linear.residual.as_ref().map(|r| DeviceResidual::upload(gpu, r)).transpose()?;
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
                gpu.copy(x, 4 * (token * self.in_features + first), &gpu.window, 4 * count * channels);
                self.gemv_window(gpu, y, accumulate || first > 0, first..first + channels, token..token + count);
            }
        }
    }

    fn gemv_window(&self, gpu: &Gpu, y: &wgpu::Buffer, accumulate: bool, channels: Range<usize>, tokens: Range<usize>) {
        for block in &self.blocks {
            let mut parameters = words(&[self.in_features, block.rows, block.first_row, self.out_features]);
            parameters.push(u32::from(accumulate));
            parameters.extend(words(&[channels.start, channels.len(), tokens.start]));
            parameters.extend(self.group_size.map(|g| g as u32));
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
            let (Plan { selected, line, n_tb, .. }, ResidualBlock { first_word, words: held, .. }) = (plan, block);
            let parameters = [self.in_features, self.out_features, *selected, *line, *n_tb, *first_word, *held];
            let buffers = [list, &block.nibbles, &residual.scales, x, y];
            let overrides = [("SCALES", residual.kind)];
            gpu.dispatch(&DEC_APPLY, &overrides, &buffers, &words(&parameters), [plan.n_tb, tokens]);
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

fn blocks(uploaded: Vec<(Range<usize>, Vec<wgpu::Buffer>)>) -> Vec<Block> {
    let block = |(rows, tables): (Range<usize>, _)| Block { first_row: rows.start, rows: rows.len(), tables };
    uploaded.into_iter().map(block).collect()
}

fn dense_blocks(gpu: &Gpu, w: &Dense<'_>) -> Result<Vec<Block>> {
    ensure!(w.in_features.is_multiple_of(8), "dense: {} input channels, a multiple of 8 is expected", w.in_features);
    let values = bytes(&w.values);
    let table = Table { bytes: values, outer: 1, inner: values.len() / w.out_features };
    Ok(blocks(upload_blocks(gpu, w.out_features, &[table])?))
}

fn anyprec_blocks(gpu: &Gpu, w: &AnyPrec<'_>) -> Result<Vec<Block>> {
    let planes = Table { bytes: bytemuck::cast_slice(w.planes()), outer: w.bits(), inner: w.in_features() / 8 };
    let lut = bytes(w.lut());
    let lut = Table { bytes: lut, outer: 1, inner: lut.len() / w.out_features() };
    Ok(blocks(upload_blocks(gpu, w.out_features(), &[planes, lut])?))
}

fn lutgemm_blocks(gpu: &Gpu, w: &LutGemm<'_>) -> Result<Vec<Block>> {
    let by_row = |bytes, size| Table { bytes, outer: bytes.len() / size / w.out_features(), inner: size };
    let size = |table: &Floats<'_>| table.bytes() / table.len();
    let tables = [
        by_row(bytemuck::cast_slice(w.binary()), 4),
        by_row(bytes(w.alpha()), size(w.alpha())),
        by_row(bytes(w.q_bias()), size(w.q_bias())),
    ];
    Ok(blocks(upload_blocks(gpu, w.out_features(), &tables)?))
}

impl DeviceResidual {
    fn upload(gpu: &Gpu, residual: &Residual<'_>) -> Result<Self> {
        let table = Table { bytes: bytemuck::cast_slice(residual.words()), outer: residual.in_features(), inner: 4 };
        let uploaded = upload_blocks(gpu, residual.out_features() / 8, &[table])?;
        let block = |(words, mut tables): (Range<usize>, Vec<_>)| ResidualBlock {
            first_word: words.start,
            words: words.len(),
            nibbles: tables.remove(0),
        };
        Ok(Self {
            blocks: uploaded.into_iter().map(block).collect(),
            scales: gpu.upload(bytes(residual.scales()))?,
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
        Ok(Self {
            edges: gpu.upload(bytemuck::cast_slice(&edges))?,
            in_features: plan.in_features(),
            k_chunk: plan.k_chunk(),
            selected: plan.selected(),
            selection: plan.selection(),
            line: plan.line(),
            n_tb: plan.n_tb(),
        })
    }

    /// Queues the selection of `tokens`: `list` `[tokens, selected]` is overwritten.
    pub(super) fn select(&self, gpu: &Gpu, x: &wgpu::Buffer, list: &wgpu::Buffer, tokens: usize) {
        let mut parameters = words(&[self.in_features, self.k_chunk, self.selected]);
        parameters.push(match self.selection {
            Selection::Bucket => 0,
            Selection::Exact => 1,
        });
        let groups = [self.in_features.div_ceil(CHUNK), tokens];
        gpu.dispatch(&DEC_SELECT, &[], &[&self.edges, x, list], &parameters, groups);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Wgpu;
    use super::*;
    use crate::backend::GemvBackend;
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
