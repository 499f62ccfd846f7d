//! A decoder on a device: weights, the texts in the making, and the passes over their rows. Generic over the backend.

mod operations;
mod pace;
mod pass;
mod state;

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::backend::{DecodeBackend, DeviceInfo, KvBits, LayerOperands, Norm};
use crate::config::{ModelConfig, Op, Projection};
use crate::dec::{DecPlan, Selection, selected};
use crate::format::Dense;
use crate::weights::{Linear, ModelWeights, Weight};

pub use operations::Operation;
pub(crate) use pace::growth;
pub use pace::share;
pub use pass::Part;
pub use state::State;

/// How the layers of one bit width are compensated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerCompensation {
    /// Thread blocks that compensate.
    pub n_tb: usize,
    /// Channels per chunk of 1024, for `qkv`, `o`, `gu`, `d`.
    pub k_chunks: [usize; 4],
}

impl LayerCompensation {
    /// What is tried where nobody has tuned.
    pub fn by_default(device: &DeviceInfo) -> Self {
        Self { n_tb: device.max_n_tb.min(8), k_chunks: [8; 4] }
    }

    /// Several sets in one line, for a note.
    pub fn spelled(sets: &[Self]) -> String {
        let spell = |set: &Self| format!("n_tb {}, k_chunk {:?}", set.n_tb, set.k_chunks);
        sets.iter().map(spell).collect::<Vec<_>>().join("; ")
    }
}

/// How a model is compensated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compensation {
    /// One entry for all layers, or one for each bit width, fewest bits first.
    pub by_bits: Vec<LayerCompensation>,
    /// How channels are found.
    pub selection: Selection,
}

impl Compensation {
    /// The same `k_chunk` everywhere.
    pub fn uniform(n_tb: usize, k_chunk: usize, selection: Selection) -> Self {
        Self { by_bits: vec![LayerCompensation { n_tb, k_chunks: [k_chunk; 4] }], selection }
    }

    /// Bytes of residuals that one token fetches for projection `p` of a layer of `bits`: four bits for each output of each
    /// chosen channel. `widths` are those of the model, fewest bits first.
    pub(crate) fn fetched(
        &self,
        config: &ModelConfig,
        (layer, bits): (usize, Option<u32>),
        widths: &[u32],
        p: Projection,
    ) -> usize {
        let width = widths.iter().position(|&w| Some(w) == bits).unwrap_or(0);
        let own = &self.by_bits[width.min(self.by_bits.len() - 1)];
        let (inputs, outputs) = config.shape(layer, p);
        selected(inputs, own.k_chunks[p.index()]) * outputs / 2
    }
}

/// A model on a device.
pub struct Model<'b, B: DecodeBackend> {
    backend: &'b B,
    config: ModelConfig,
    /// How states keep keys and values.
    kv_bits: KvBits,
    embedding: B::Matrix,
    /// What its rows are multiplied by.
    embedding_scale: f32,
    head: Option<B::Matrix>,
    final_norm: Norm<B::Vector>,
    layers: Vec<Layer<B>>,
    /// No other model has the same: a state belongs to one.
    id: u64,
    /// Another number whenever plans change: recorded tokens point to those of their time.
    planned: u64,
}

/// The different widths among `layers`, fewest bits first; empty for full precision.
pub fn widths(layers: impl Iterator<Item = Option<u32>>) -> Vec<u32> {
    let mut widths: Vec<u32> = layers.flatten().collect();
    widths.sort_unstable();
    widths.dedup();
    widths
}

/// A number that was not given before.
fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Layer<B: DecodeBackend> {
    program: Vec<Op>,
    norms: [Option<Norm<B::Vector>>; 6], // in the order of `LayerNorm::ALL`
    projections: [Projected<B>; 4],
    bits: Option<u32>,
}

struct Projected<B: DecodeBackend> {
    matrix: B::Matrix,
    shape: (usize, usize),
    thresholds: Option<Vec<f32>>,
    plan: Option<B::Plan>,
}

impl<'b, B: DecodeBackend> Model<'b, B> {
    /// Uploads all tensors; `loaded` hears of every layer.
    ///
    /// # Errors
    /// A tensor that cannot be read, or no memory.
    pub fn load(backend: &'b B, weights: &dyn ModelWeights, loaded: impl FnMut(usize)) -> Result<Self> {
        Self::load_with_head(backend, weights, None, loaded)
    }

    /// The same with another head `[vocab_size, hidden_size]`, such as one of fewer bits, in place of the model's own.
    ///
    /// # Errors
    /// Those of [`Model::load`], and a head of another shape.
    pub fn load_with_head(
        backend: &'b B,
        weights: &dyn ModelWeights,
        head: Option<Weight<'_>>,
        mut loaded: impl FnMut(usize),
    ) -> Result<Self> {
        let config = weights.config().clone();
        let table = |dense: Dense<'_>| backend.matrix(&Linear::plain(Weight::Dense(dense)));
        let stored = weights.embedding()?;
        let embedding_scale = config.embedding_factor();
        let embedding = table(stored)?;
        let head = match head {
            Some(head) => {
                let (inputs, rows) = (head.in_features(), head.out_features());
                let (hidden, vocab) = (config.hidden_size, config.vocab_size);
                ensure!((inputs, rows) == (hidden, vocab), "a head of {rows} x {inputs}, {vocab} x {hidden} is needed");
                Some(backend.matrix(&Linear::plain(head))?)
            }
            None => weights.head()?.map(table).transpose()?,
        };
        let upload = |gamma: &[f32], eps| -> Result<_> {
            let mut vector = backend.vector(gamma.len())?;
            backend.write(gamma, &mut vector)?;
            Ok(Norm { gamma: vector, len: gamma.len(), eps })
        };
        let final_norm = upload(&weights.final_gamma()?, config.stream_eps())?;
        let mut layers = Vec::with_capacity(config.layers.len());
        for (l, layer) in config.layers.iter().enumerate() {
            let mut norms = [const { None }; 6];
            for (norm, _) in layer.norms(config.hidden_size) {
                let gamma = weights.norm(l, norm).with_context(|| format!("layer {l}, norms"))?;
                norms[norm.index()] = Some(upload(&gamma, config.norm_eps(norm))?);
            }
            let [qkv, o, gu, d] = Projection::ALL.map(|p| {
                let linear = weights.projection(l, p);
                linear.and_then(|linear| Projected::upload(backend, &linear)).with_context(|| format!("layer {l}, {p}"))
            });
            let projections = [qkv?, o?, gu?, d?];
            layers.push(Layer { program: layer.program(), norms, projections, bits: weights.bits(l) });
            loaded(l + 1);
        }
        let (id, planned) = (unique(), unique());
        let kv_bits = KvBits::default();
        Ok(Self { backend, config, kv_bits, embedding, embedding_scale, head, final_norm, layers, id, planned })
    }

    /// States that are made from now on keep keys and values so.
    pub fn keep_in(&mut self, kv_bits: KvBits) {
        self.kv_bits = kv_bits;
    }

    /// Shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &'b B {
        self.backend
    }

    /// Bits of a weight in every layer; `None` for full precision.
    pub fn layer_bits(&self) -> impl Iterator<Item = Option<u32>> {
        self.layers.iter().map(|layer| layer.bits)
    }

    /// Bit widths of the layers, fewest first; empty for full precision.
    pub fn bit_widths(&self) -> Vec<u32> {
        widths(self.layer_bits())
    }

    /// True if there is something to compensate with.
    pub fn has_residuals(&self) -> bool {
        self.layers.iter().any(|layer| layer.projections.iter().any(|p| p.thresholds.is_some()))
    }

    /// Compensates from now on as `compensation` says; `None` stops it. Texts in the making go on with it.
    ///
    /// # Errors
    /// As many entries as bit widths are needed; a plan the device cannot run; a model without residuals. Nothing has
    /// changed then.
    pub fn compensate(&mut self, compensation: Option<&Compensation>) -> Result<()> {
        let widths = self.bit_widths();
        if let Some(c) = compensation {
            let n = c.by_bits.len();
            ensure!(
                n == 1 || n > 0 && n == widths.len(),
                "{n} sets of n_tb and k_chunk were given for a model of {} bit width(s), give one set or one for each",
                widths.len()
            );
        }
        let mut plans = Vec::with_capacity(4 * self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let width = widths.iter().position(|&w| Some(w) == layer.bits).unwrap_or(0);
            for (p, projected) in Projection::ALL.into_iter().zip(&layer.projections) {
                plans.push(match compensation {
                    None => None,
                    Some(c) => {
                        let own = c.by_bits[if c.by_bits.len() == 1 { 0 } else { width }];
                        projected
                            .plan(self.backend, own.k_chunks[p.index()], own.n_tb, c.selection)
                            .with_context(|| format!("layer {l}, {p}"))?
                    }
                });
            }
        }
        self.take_plans(plans);
        Ok(())
    }

    /// Compensates the layers of `bits` so and no others, even where nothing is selected: what it costs to be ready to
    /// compensate is a price of its own. For clocks.
    ///
    /// # Errors
    /// Those of [`Model::compensate`].
    pub fn compensate_width(&mut self, bits: u32, own: LayerCompensation, selection: Selection) -> Result<()> {
        let mut plans = Vec::with_capacity(4 * self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            for (p, projected) in Projection::ALL.into_iter().zip(&layer.projections) {
                let place = || format!("layer {l}, {p}");
                plans.push(match &projected.thresholds {
                    Some(thresholds) if layer.bits == Some(bits) => {
                        let ((inputs, outputs), k_chunk) = (projected.shape, own.k_chunks[p.index()]);
                        let plan = DecPlan::new(inputs, outputs, thresholds, k_chunk, own.n_tb, selection);
                        let plan = plan.and_then(|plan| self.backend.plan(&projected.matrix, &plan));
                        Some(plan.with_context(place)?)
                    }
                    None if layer.bits == Some(bits) => {
                        bail!("{} has no residual or no thresholds: make them first with decdec residuals", place())
                    }
                    _ => None,
                });
            }
        }
        self.take_plans(plans);
        Ok(())
    }

    fn take_plans(&mut self, plans: Vec<Option<B::Plan>>) {
        self.planned = unique();
        let projections = self.layers.iter_mut().flat_map(|layer| &mut layer.projections);
        projections.zip(plans).for_each(|(projected, plan)| projected.plan = plan);
    }

    /// True if any projection is compensated.
    pub fn is_compensated(&self) -> bool {
        self.layers.iter().any(|layer| layer.projections.iter().any(|p| p.plan.is_some()))
    }
}

impl<B: DecodeBackend> Layer<B> {
    fn operands(&self, compensated: bool) -> LayerOperands<'_, B> {
        LayerOperands {
            program: &self.program,
            norms: self.norms.each_ref().map(Option::as_ref),
            matrices: self.projections.each_ref().map(|p| &p.matrix),
            plans: self.projections.each_ref().map(|p| p.active(compensated)),
        }
    }
}

impl<B: DecodeBackend> Projected<B> {
    fn upload(backend: &B, linear: &Linear<'_>) -> Result<Self> {
        Ok(Self {
            matrix: backend.matrix(linear)?,
            shape: (linear.weight.in_features(), linear.weight.out_features()),
            thresholds: linear.thresholds.as_ref().map(|t| t.to_vec()),
            plan: None,
        })
    }

    fn plan(&self, backend: &B, k_chunk: usize, n_tb: usize, selection: Selection) -> Result<Option<B::Plan>> {
        let Some(thresholds) = &self.thresholds else {
            ensure!(k_chunk == 0, "k_chunk is {k_chunk}, but the model has no residuals to compensate with, use 0");
            return Ok(None);
        };
        let plan = DecPlan::new(self.shape.0, self.shape.1, thresholds, k_chunk, n_tb, selection)?;
        if plan.selected() == 0 { Ok(None) } else { backend.plan(&self.matrix, &plan).map(Some) }
    }

    fn active(&self, compensated: bool) -> Option<&B::Plan> {
        self.plan.as_ref().filter(|_| compensated)
    }
}
