//! Running a sweep: matrices and inputs on the device, one configuration after the other.

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use super::bandwidth::by_products;
use super::{Options, grid};
use crate::backend::GemvBackend;
use crate::backend::record::{Bandwidths, Launch, Recorder};
use crate::config::Projection;
use crate::dec::DecPlan;
use crate::fingerprint::Fingerprint;
use crate::nsys::trace::{Kernel, Line, Role};
use crate::nsys::{Capture, KernelRecord, Kind, Writer};
use crate::sampling::draws;
use crate::weights::{Linear, ModelWeights};

/// Weights that take turns add up to this, far more than any cache holds.
const ROTATED_BYTES: usize = 512 << 20;

/// Inputs that take turns.
const INPUTS: usize = 16;

/// The compensation that the host link is measured with.
const HEAVY_K_CHUNK: usize = 64;

/// One layer on the device.
struct Layer<B: GemvBackend> {
    matrices: [B::Matrix; 4],
    thresholds: [Vec<f32>; 4],
}

/// One launch that a configuration consists of.
#[derive(Clone, Copy)]
struct Step {
    token: usize,
    layer: usize,
    projection: Projection,
}

impl Step {
    /// The lines of a launch, its compensation first.
    fn kernels(self, launch: Launch, role: Role, k_chunk: usize) -> impl Iterator<Item = (Line, KernelRecord)> {
        let line = |kernel, record| (Line { role, kernel }, record);
        let dec = launch.dec.map(|dec| line(Kernel::Dec(k_chunk), dec));
        dec.into_iter().chain([line(Kernel::Gemv(self.projection), launch.gemv)])
    }
}

/// Everything that a sweep needs on the device.
pub(super) struct Sweep<'a, B: GemvBackend> {
    backend: &'a B,
    recorder: &'a mut dyn Recorder<B>,
    options: &'a Options,
    shapes: [(usize, usize); 4],
    layers: Vec<Layer<B>>,
    inputs: Vec<[B::Vector; 4]>,
    outputs: [B::Vector; 4],
    layer_bytes: [usize; 4], // weights of one layer
    fingerprint: String,     // of the layers
}

impl<'a, B: GemvBackend> Sweep<'a, B> {
    /// Uploads as many layers of the asked width as take turns, and inputs that look like calibration's.
    pub(super) fn new(
        backend: &'a B,
        recorder: &'a mut dyn Recorder<B>,
        weights: &dyn ModelWeights,
        options: &'a Options,
    ) -> Result<Self> {
        let config = weights.config();
        let bits = options.identity.bits;
        let fitting: Vec<_> = (0..config.layers.len()).filter(|&layer| weights.bits(layer) == Some(bits)).collect();
        let Some(&first) = fitting.first() else {
            let found = (0..config.layers.len()).find_map(|layer| weights.bits(layer));
            let found = found.map_or("full precision".into(), |bits| format!("{bits}-bit"));
            anyhow::bail!("--bitwidth is {bits}, but no layer is: the first ones are {found}");
        };
        let mut layer_bytes = [0; 4];
        for projection in Projection::ALL {
            layer_bytes[projection.index()] = weights.projection(first, projection)?.weight.bytes();
        }
        let turns = ROTATED_BYTES.div_ceil(layer_bytes.iter().sum()).clamp(2, config.layers.len().max(2));
        let turns = if options.halve_layers { (turns / 2).max(1) } else { turns };
        let mut fingerprint = Fingerprint::default();
        let mut upload = |&layer| upload(backend, weights, layer, &mut fingerprint);
        let layers: Vec<_> = fitting.iter().take(turns).map(&mut upload).collect::<Result<_>>()?;
        let fingerprint = fingerprint.digits();
        let shapes = config.shapes(0);
        let inputs = (0..options.tokens.min(INPUTS)).map(|i| inputs(backend, &layers[0], i)).collect::<Result<_>>()?;
        let outputs = Projection::each(|p| backend.vector(shapes[p.index()].1))?;
        Ok(Self { backend, recorder, options, shapes, layers, inputs, outputs, layer_bytes, fingerprint })
    }

    /// What the files say of this sweep, with nothing measured yet.
    pub(super) fn describe(&self, useful: &[Vec<usize>; 4]) -> Capture {
        let device = self.backend.device();
        let mut n_tbs: Vec<_> = useful.concat();
        n_tbs.sort_unstable();
        n_tbs.dedup();
        Capture {
            kind: Kind::Products,
            identity: self.options.identity.clone(),
            shapes: self.shapes,
            weights: self.options.weights.clone(),
            fingerprint: self.fingerprint.clone(),
            clock: self.recorder.clock(),
            device: device.id.clone(),
            device_name: device.name.clone(),
            driver: device.driver.clone(),
            tokens: self.options.tokens,
            layers: self.layers.len(),
            layers_ns: 0,
            device_memory: 0.0,
            host_link: 0.0,
            n_tbs,
            k_chunks: Vec::new(),
        }
    }

    /// The same with bandwidths measured, and the range of `k_chunk` that follows from them.
    pub(super) fn capture(&mut self, useful: &[Vec<usize>; 4]) -> Result<Capture> {
        let capture = self.describe(useful);
        let max_n_tb = *capture.n_tbs.last().context("no n_tb to sweep")?;
        let bandwidths = match self.recorder.bandwidths(self.backend)? {
            Some(bandwidths) => bandwidths,
            None => self.measure_bandwidths(max_n_tb)?,
        };
        let Bandwidths { device_memory, host_link } = bandwidths;
        let knee = bandwidths.knee(self.options.identity.bits);
        let k_chunks = match &self.options.k_chunks {
            Some(k_chunks) => k_chunks.clone(),
            None => grid::k_chunks(knee, self.options.max_k_chunk)?,
        };
        tracing::info!(
            "device memory {:.1} GB/s, host link {:.1} GB/s, R_bw {:.1}: estimated knee at k_chunk {knee:.1}",
            device_memory / 1e9,
            host_link / 1e9,
            bandwidths.ratio()
        );
        Ok(Capture { device_memory, host_link, k_chunks, ..capture })
    }

    fn measure_bandwidths(&mut self, n_tb: usize) -> Result<Bandwidths> {
        let module = Projection::GateUp.index();
        let plans = self.plans([n_tb; 4], HEAVY_K_CHUNK)?;
        let layers = self.layers.len();
        let ((inputs, outputs), thresholds) = (self.shapes[module], &self.layers[0].thresholds[module]);
        let plan = DecPlan::new(inputs, outputs, thresholds, HEAVY_K_CHUNK, n_tb, self.options.selection)?;
        let (backend, all, x) = (self.backend, &self.layers, &self.inputs[0][module]);
        let y = std::cell::RefCell::new(&mut self.outputs[module]);
        let mut base =
            || all.iter().try_for_each(|layer| backend.gemv(&layer.matrices[module], x, &mut y.borrow_mut()));
        let mut compensated = || {
            let pairs = all.iter().zip(&plans);
            pairs.into_iter().try_for_each(|(layer, plans)| {
                backend.dec_gemv(&layer.matrices[module], &plans[module], x, &mut y.borrow_mut())
            })
        };
        let residual_bytes = layers * plan.selected() * outputs / 2;
        by_products(backend, (&mut base, layers * self.layer_bytes[module]), (&mut compensated, residual_bytes))
    }

    /// Measures what `writer` does not have yet.
    pub(super) fn run(&mut self, writer: &mut Writer, useful: &[Vec<usize>; 4]) -> Result<()> {
        let (n_tbs, k_chunks) = (writer.capture().n_tbs.clone(), writer.capture().k_chunks.clone());
        let bar = progress((n_tbs.len() * (k_chunks.len() + 1)) as u64);
        // Also where the sweep goes on: this process has not warmed up yet.
        let setup = self.set_up(n_tbs[0])?;
        let done = writer.configurations();
        if done == 0 {
            writer.append(&setup)?;
        }
        let mut configuration = 1;
        bar.set_position(done.saturating_sub(1) as u64);
        bar.reset_eta();
        for &n_tb in &n_tbs {
            // Where this n_tb divides the rows as a smaller one does, that one runs along: a token has all four.
            let own = useful.each_ref().map(|useful| *useful.iter().rfind(|&&own| own <= n_tb).unwrap_or(&n_tb));
            for k_chunk in std::iter::once(0).chain(k_chunks.iter().copied()) {
                if configuration >= done {
                    let kernels = self.measure(own, k_chunk, writer.pairs())?;
                    writer.append(&kernels).with_context(|| format!("n_tb {n_tb}, k_chunk {k_chunk}"))?;
                    bar.inc(1);
                }
                configuration += 1;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The first and the second launch of everything, whose times mean nothing.
    fn set_up(&mut self, n_tb: usize) -> Result<Vec<(Line, KernelRecord)>> {
        let mut kernels = Vec::new();
        for role in [Role::Compile, Role::Warmup] {
            let steps = Projection::ALL.map(|projection| Step { token: 0, layer: 0, projection });
            for launches in [self.launch(&steps, None)?, self.launch(&steps, Some(([n_tb; 4], 1)))?] {
                let launched = steps.iter().zip(launches);
                kernels.extend(launched.flat_map(|(step, launch)| step.kernels(launch, role, 1)));
            }
        }
        Ok(kernels)
    }

    /// One configuration: all tokens through all layers. With `k_chunk` 0, base products alone.
    fn measure(&mut self, n_tbs: [usize; 4], k_chunk: usize, first_pair: usize) -> Result<Vec<(Line, KernelRecord)>> {
        let mut steps = Vec::new();
        for token in 0..self.options.tokens {
            for layer in 0..self.layers.len() {
                steps.extend(Projection::ALL.map(|projection| Step { token, layer, projection }));
            }
        }
        let launches = self.launch(&steps, (k_chunk > 0).then_some((n_tbs, k_chunk)))?;
        let mut kernels = Vec::with_capacity(2 * steps.len());
        for (i, (step, launch)) in steps.iter().zip(launches).enumerate() {
            let role = if k_chunk == 0 { Role::Standalone } else { Role::Concurrent(first_pair + i) };
            kernels.extend(step.kernels(launch, role, k_chunk));
        }
        Ok(kernels)
    }

    /// Launches `steps`, compensated with each module's `n_tb` and `k_chunk` if given. Of a pair both kernels come
    /// back.
    fn launch(&mut self, steps: &[Step], compensation: Option<([usize; 4], usize)>) -> Result<Vec<Launch>> {
        let plans = compensation.map(|(n_tbs, k_chunk)| self.plans(n_tbs, k_chunk)).transpose()?;
        let (backend, layers, inputs, outputs) = (self.backend, &self.layers, &self.inputs, &mut self.outputs);
        let mut launch = |i: usize| -> Result<()> {
            let Step { token, layer, projection } = steps[i];
            let module = projection.index();
            let (matrix, x) = (&layers[layer].matrices[module], &inputs[token % inputs.len()][module]);
            match &plans {
                None => backend.gemv(matrix, x, &mut outputs[module]),
                Some(plans) => backend.dec_gemv(matrix, &plans[layer][module], x, &mut outputs[module]),
            }
        };
        let kinds: Vec<_> = steps.iter().map(|step| step.projection.index()).collect();
        let mut launches = self.recorder.record(backend, &kinds, &mut launch)?;
        ensure!(
            launches.len() == steps.len(),
            "{} recorded {} launches of {}: take the profile again",
            self.recorder.clock(),
            launches.len(),
            steps.len()
        );
        for (launch, &kind) in launches.iter_mut().zip(&kinds) {
            match compensation {
                None => launch.dec = None,
                Some((n_tbs, _)) => {
                    let dec =
                        launch.dec.get_or_insert_with(|| KernelRecord { name: String::new(), ..launch.gemv.clone() });
                    dec.grid = [n_tbs[kind] as u32, 1, 1];
                }
            }
        }
        Ok(launches)
    }

    /// Plans for every layer and projection.
    fn plans(&self, n_tbs: [usize; 4], k_chunk: usize) -> Result<Vec<[B::Plan; 4]>> {
        let plan = |layer: &Layer<B>, projection: Projection| {
            let module = projection.index();
            let (inputs, outputs) = self.shapes[module];
            let thresholds = &layer.thresholds[module];
            let plan = DecPlan::new(inputs, outputs, thresholds, k_chunk, n_tbs[module], self.options.selection)?;
            self.backend.plan(&layer.matrices[module], &plan)
        };
        self.layers.iter().map(|layer| Projection::each(|projection| plan(layer, projection))).collect()
    }
}

/// One layer's matrices and thresholds.
fn upload<B: GemvBackend>(
    backend: &B,
    weights: &dyn ModelWeights,
    layer: usize,
    fingerprint: &mut Fingerprint,
) -> Result<Layer<B>> {
    let mut thresholds = [const { Vec::new() }; 4];
    let matrices = Projection::each(|projection| {
        let linear = weights.projection(layer, projection)?;
        let Linear { residual: Some(_), thresholds: Some(own), .. } = &linear else {
            anyhow::bail!(
                "layer {layer}, {projection} has no residual or no thresholds: make them first, or profile random:SEED"
            );
        };
        fingerprint.linear(&linear);
        thresholds[projection.index()] = own.to_vec();
        backend.matrix(&linear)
    })?;
    Ok(Layer { matrices, thresholds })
}

/// Inputs whose magnitudes are those of calibration, shuffled and signed at random, so that selection finds in
/// its buckets what it finds when decoding.
fn inputs<B: GemvBackend>(backend: &B, layer: &Layer<B>, seed: usize) -> Result<[B::Vector; 4]> {
    Projection::each(|projection| {
        let thresholds = &layer.thresholds[projection.index()];
        let random = draws(seed as u64, 2 * thresholds.len());
        let (order, signs) = random.split_at(thresholds.len());
        let mut shuffled: Vec<usize> = (0..thresholds.len()).collect();
        shuffled.sort_by(|&a, &b| order[a].total_cmp(&order[b]));
        // Half to all of the largest value that calibration saw at this rank; the draw's last bits give the sign.
        let value = |rank: usize| thresholds[rank] * (0.5 + (2.0 * signs[rank]).fract() / 2.0);
        let signed = |rank: usize| if signs[rank] < 0.5 { -value(rank) } else { value(rank) };
        let values: Vec<f32> = shuffled.into_iter().map(signed).collect();
        let mut vector = backend.vector(values.len())?;
        backend.write(&values, &mut vector)?;
        Ok(vector)
    })
}

pub(super) fn progress(configurations: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("profile {wide_bar} {pos}/{len} configurations, {eta} left");
    ProgressBar::new(configurations).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
