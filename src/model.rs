//! A decoder on a device: weights, the state of one text, and the forward pass. Generic over the backend.

mod operations;

use anyhow::{Context, Result, bail, ensure};

use crate::backend::{Activations, DecodeBackend, Input, LayerOperands, Norm};
use crate::config::{ModelConfig, Projection};
use crate::dec::{DecPlan, Selection};
use crate::format::Dense;
use crate::sampling::Sampling;
use crate::weights::{Linear, ModelWeights, Weight};

pub use operations::Operation;

/// How the layers of one bit width are compensated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerCompensation {
    /// Thread blocks that compensate.
    pub n_tb: usize,
    /// Channels per chunk of 1024, for `qkv`, `o`, `gu`, `d`.
    pub k_chunks: [usize; 4],
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
}

/// A model on a device.
pub struct Model<'b, B: DecodeBackend> {
    backend: &'b B,
    config: ModelConfig,
    embedding: B::Matrix,
    head: Option<B::Matrix>,
    final_norm: Norm<B::Vector>,
    layers: Vec<Layer<B>>,
}

struct Layer<B: DecodeBackend> {
    input_norm: Norm<B::Vector>,
    post_norm: Norm<B::Vector>,
    projections: [Projected<B>; 4],
    bits: Option<u32>,
}

struct Projected<B: DecodeBackend> {
    matrix: B::Matrix,
    shape: (usize, usize),
    thresholds: Option<Vec<f32>>,
    plan: Option<B::Plan>,
}

/// One text in the making, and the activations of the tokens at hand.
pub struct State<B: DecodeBackend> {
    /// Key-value cache, length, sampled tokens.
    pub sequence: B::Sequence,
    max_seq_len: usize,
    len: usize,
    max_tokens: usize,
    activations: Activations<B>,
    last: B::Vector,   // [hidden_size]
    logits: B::Vector, // [vocab_size]
    graph: Option<B::Graph>,
}

impl<'b, B: DecodeBackend> Model<'b, B> {
    /// Uploads all tensors; `loaded` hears of every layer.
    pub fn load(backend: &'b B, weights: &dyn ModelWeights, loaded: impl FnMut(usize)) -> Result<Self> {
        Self::load_with_head(backend, weights, None, loaded)
    }

    /// The same with another head `[vocab_size, hidden_size]`, such as one of fewer bits, in place of the model's own.
    pub fn load_with_head(
        backend: &'b B,
        weights: &dyn ModelWeights,
        head: Option<Weight<'_>>,
        mut loaded: impl FnMut(usize),
    ) -> Result<Self> {
        let config = weights.config().clone();
        let table = |dense: Dense<'_>| backend.matrix(&Linear::plain(Weight::Dense(dense)));
        let embedding = table(weights.embedding()?)?;
        let head = match head {
            Some(head) => {
                let (inputs, rows) = (head.in_features(), head.out_features());
                let (hidden, vocab) = (config.hidden_size, config.vocab_size);
                ensure!((inputs, rows) == (hidden, vocab), "a head of {rows} x {inputs}, {vocab} x {hidden} is needed");
                Some(backend.matrix(&Linear::plain(head))?)
            }
            None => weights.head()?.map(table).transpose()?,
        };
        let norm = |gamma: Vec<f32>| -> Result<_> {
            let mut vector = backend.vector(gamma.len())?;
            backend.write(&gamma, &mut vector)?;
            Ok(Norm { gamma: vector, eps: config.rms_norm_eps })
        };
        let final_norm = norm(weights.final_norm()?)?;
        let mut layers = Vec::with_capacity(config.num_layers);
        for l in 0..config.num_layers {
            let (input, post) = weights.layer_norms(l).with_context(|| format!("layer {l}, norms"))?;
            let [qkv, o, gu, d] = Projection::ALL.map(|p| {
                let linear = weights.projection(l, p);
                linear.and_then(|linear| Projected::upload(backend, &linear)).with_context(|| format!("layer {l}, {p}"))
            });
            let projections = [qkv?, o?, gu?, d?];
            layers.push(Layer { input_norm: norm(input)?, post_norm: norm(post)?, projections, bits: weights.bits(l) });
            loaded(l + 1);
        }
        Ok(Self { backend, config, embedding, head, final_norm, layers })
    }

    /// Shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &'b B {
        self.backend
    }

    /// Bit widths of the layers, fewest first; empty for full precision.
    pub fn bit_widths(&self) -> Vec<u32> {
        let mut widths: Vec<u32> = self.layers.iter().filter_map(|layer| layer.bits).collect();
        widths.sort_unstable();
        widths.dedup();
        widths
    }

    /// True if there is something to compensate with.
    pub fn has_residuals(&self) -> bool {
        self.layers.iter().any(|layer| layer.projections.iter().any(|p| p.thresholds.is_some()))
    }

    /// Compensates from now on as `compensation` says; `None` stops it.
    ///
    /// States made before must not have a recorded token any more: make new ones, or [`State::forget_graph`].
    ///
    /// # Errors
    /// As many entries as bit widths are needed; a plan the device cannot run; a model without residuals.
    pub fn compensate(&mut self, compensation: Option<&Compensation>) -> Result<()> {
        let widths = self.bit_widths();
        if let Some(c) = compensation {
            let n = c.by_bits.len();
            ensure!(
                n == 1 || n == widths.len(),
                "{n} sets of n_tb and k_chunk were given for a model of {} bit width(s), give one set or one for each",
                widths.len()
            );
        }
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let width = widths.iter().position(|&w| Some(w) == layer.bits).unwrap_or(0);
            for (p, projected) in Projection::ALL.into_iter().zip(&mut layer.projections) {
                projected.plan = match compensation {
                    None => None,
                    Some(c) => {
                        let own = c.by_bits[if c.by_bits.len() == 1 { 0 } else { width }];
                        projected
                            .plan(self.backend, own.k_chunks[p.index()], own.n_tb, c.selection)
                            .with_context(|| format!("layer {l}, {p}"))?
                    }
                };
            }
        }
        Ok(())
    }

    /// True if any projection is compensated.
    pub fn is_compensated(&self) -> bool {
        self.layers.iter().any(|layer| layer.projections.iter().any(|p| p.plan.is_some()))
    }

    /// Room for one text of at most `max_seq_len` tokens.
    ///
    /// # Errors
    /// A context the model was not trained for, or no memory.
    pub fn state(&self, max_seq_len: usize) -> Result<State<B>> {
        let (c, b) = (&self.config, self.backend);
        let max = c.max_position_embeddings;
        ensure!(max_seq_len <= max, "{max_seq_len} tokens are asked for, the model's context is {max}");
        let max_tokens = b.device().max_tokens.min(max_seq_len).max(1);
        let width = |p: Projection| c.shape(p).1;
        Ok(State {
            sequence: b.sequence(c, max_seq_len)?,
            max_seq_len,
            len: 0,
            max_tokens,
            activations: Activations {
                h: b.vector(max_tokens * c.hidden_size)?,
                qkv: b.vector(max_tokens * width(Projection::Qkv))?,
                attended: b.vector(max_tokens * c.num_heads * c.head_dim)?,
                gu: b.vector(max_tokens * width(Projection::GateUp))?,
            },
            last: b.vector(c.hidden_size)?,
            logits: b.vector(c.vocab_size)?,
            graph: None,
        })
    }

    /// Starts over with an empty text; `draws[i]` decides the `i`-th sampled token.
    pub fn begin(&self, state: &mut State<B>, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        state.len = 0;
        state.graph = None;
        self.backend.begin(&mut state.sequence, sampling, draws)
    }

    /// Makes ready what a prompt of `prompt` tokens and the tokens after it need; what `state` holds is lost.
    ///
    /// # Errors
    /// A device that cannot, for instance because a kernel does not compile.
    pub fn prepare(&self, state: &mut State<B>, prompt: usize, compensated: bool) -> Result<()> {
        let most = state.max_tokens;
        // The passes of a long prompt are alike but for the last.
        let passes = if prompt > most { [most, prompt % most] } else { [prompt, 0] };
        self.begin(state, &Sampling::GREEDY, &[])?;
        self.backend.prepare(&mut || {
            for tokens in passes.into_iter().filter(|&tokens| tokens > 0) {
                self.prompt(state, &vec![0; tokens], compensated)?;
                state.len = 0;
            }
            self.token(state)?;
            state.len = 0;
            Ok(())
        })
    }

    /// Reads `tokens`, and chooses the first token after them.
    ///
    /// # Errors
    /// No tokens, an id outside the vocabulary, or no room.
    pub fn prompt(&self, state: &mut State<B>, tokens: &[u32], compensated: bool) -> Result<()> {
        let b = self.backend;
        ensure!(!tokens.is_empty(), "the prompt is empty, give at least one token");
        let mut count = 0;
        for tokens in tokens.chunks(state.max_tokens) {
            count = tokens.len();
            self.layers(state, Input::Prompt(tokens), count, compensated)?;
        }
        b.last_row(&state.activations.h, self.config.hidden_size, count, &mut state.last)?;
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        b.norm_gemv(&self.final_norm, head, None, &state.last, &mut state.logits, 1)?;
        b.sample(&mut state.sequence, &state.logits)
    }

    /// Reads the token chosen last, and chooses the next one.
    pub fn step(&self, state: &mut State<B>) -> Result<()> {
        let len = state.len;
        let mut graph = state.graph.take();
        self.backend.replay(&mut graph, &mut || {
            state.len = len;
            self.token(state)
        })?;
        state.graph = graph;
        state.len = len + 1;
        Ok(())
    }

    /// The operations of one token.
    fn token(&self, state: &mut State<B>) -> Result<()> {
        let (b, head) = (self.backend, self.head.as_ref().unwrap_or(&self.embedding));
        self.layers(state, Input::Sampled, 1, true)?;
        b.norm_gemv(&self.final_norm, head, None, &state.activations.h, &mut state.logits, 1)?;
        b.sample(&mut state.sequence, &state.logits)
    }

    /// Reads `tokens` behind the text and overwrites `logits` `[tokens, vocab_size]` with what follows each.
    ///
    /// # Errors
    /// More tokens than [`State::max_tokens`], an id outside the vocabulary, or no room.
    pub fn logits(
        &self,
        state: &mut State<B>,
        tokens: &[u32],
        compensated: bool,
        logits: &mut B::Vector,
    ) -> Result<()> {
        self.layers(state, Input::Prompt(tokens), tokens.len(), compensated)?;
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        self.backend.norm_gemv(&self.final_norm, head, None, &state.activations.h, logits, tokens.len())
    }

    /// Embeds and runs all layers; the text grows by `tokens`.
    fn layers(&self, state: &mut State<B>, input: Input<'_>, tokens: usize, compensated: bool) -> Result<()> {
        let b = self.backend;
        let room = state.max_seq_len - state.len;
        ensure!(tokens <= room, "{tokens} more tokens, but the context of {} has room for {room}", state.max_seq_len);
        if let Input::Prompt(ids) = input {
            let vocab = self.config.vocab_size;
            if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
                bail!("token id {id}, the vocabulary ends at {}", vocab - 1);
            }
        }
        b.embed(&state.sequence, &self.embedding, input, &mut state.activations.h)?;
        let layers: Vec<_> = self.layers.iter().map(|layer| layer.operands(compensated)).collect();
        b.layers(&mut state.sequence, 0, &layers, &mut state.activations, tokens)?;
        b.advance(&mut state.sequence, tokens)?;
        state.len += tokens;
        Ok(())
    }
}

impl<B: DecodeBackend> Layer<B> {
    fn operands(&self, compensated: bool) -> LayerOperands<'_, B> {
        LayerOperands {
            norms: [&self.input_norm, &self.post_norm],
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

impl<B: DecodeBackend> State<B> {
    /// Tokens read so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that there is still room for.
    pub fn room(&self) -> usize {
        self.max_seq_len - self.len
    }

    /// Tokens of the longest text.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// The most tokens that one pass takes.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Drops the recorded token, after the model's compensation has changed.
    pub fn forget_graph(&mut self) {
        self.graph = None;
    }
}
