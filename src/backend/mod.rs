//! The contract between the arithmetic and everything above it.
//!
//! [`GemvBackend`] is what the tuner needs: matrices, vectors, the quantized product, alone and compensated.
//! [`DecodeBackend`] adds what a whole decoder needs. The backend owns memory, the caller owns handles.
//! Operations are queued in the order of the calls; only reads wait. Nothing between a prompt and its last
//! token has to visit the host: positions, sampled tokens and the key-value cache stay with the device.
//!
//! What the caller guarantees, and no backend checks again:
//! - handles come from the same backend, and lengths fit the matrix (`x` holds at least `tokens ·
//!   in_features` numbers, `y` at least `tokens · out_features`);
//! - a plan was made for the matrix that it is used with;
//! - a sequence is never written past the `max_seq_len` it was made with.

pub mod cpu;
pub mod cuda;
mod exit;
pub mod kernels;
pub mod record;
#[cfg(feature = "reference-wgpu")]
pub mod wgsl;

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};

pub use self::exit::exit_at_once;

use self::record::{Clock, Recorder};
use crate::config::{Activation, Attention, LayerNorm, ModelConfig, Op, Reads, Writes};
use crate::dec::DecPlan;
use crate::sampling::Sampling;
use crate::weights::Linear;

/// Something was to be waited for when the caller's interruption came: what was queued goes on, what was asked for is not
/// there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// The device answers this process nothing any more: a kernel failed or does not end. Whatever is tried on it from now
/// on fails as well; another process may have better luck.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLost(pub(crate) String);

impl fmt::Display for DeviceLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; the device is lost to this process, start it again", self.0)
    }
}

impl std::error::Error for DeviceLost {}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As `--device` takes it: `cpu`, `wgpu:0`, `cuda:0`.
    pub id: String,
    /// What the vendor calls it.
    pub name: String,
    /// Version of the driver, empty where there is none.
    pub driver: String,
    /// The largest `n_tb` that it can hold at once.
    pub max_n_tb: usize,
    /// The most tokens that one operation takes.
    pub max_tokens: usize,
    /// Tokens worth queueing before the first of them is read.
    pub lookahead: usize,
}

/// Matrices, vectors and the compensated product of one token.
pub trait GemvBackend {
    /// f32 numbers on the device (stored there in whatever type the backend computes with).
    type Vector;
    /// A linear layer on the device; its residual may stay in host memory that the device can reach.
    type Matrix;
    /// A [`DecPlan`] as the device needs it.
    type Plan;
    /// What times a sweep's launches.
    type Recorder: Recorder<Self>;

    /// The device.
    fn device(&self) -> &DeviceInfo;

    /// `len` zeros.
    fn vector(&self, len: usize) -> Result<Self::Vector>;

    /// How many numbers `vector` has room for: at least as many as it was made for.
    fn room(&self, vector: &Self::Vector) -> usize;

    /// Overwrites the first `values.len()` numbers of `to`.
    fn write(&self, values: &[f32], to: &mut Self::Vector) -> Result<()>;

    /// Waits, then overwrites `out` with the first numbers of `from`.
    fn read(&self, from: &Self::Vector, out: &mut [f32]) -> Result<()>;

    /// Uploads a linear layer. Nothing of `linear` is needed afterwards.
    fn matrix(&self, linear: &Linear<'_>) -> Result<Self::Matrix>;

    /// Prepares a plan for `matrix`, which has a residual.
    ///
    /// # Errors
    /// `n_tb` above [`DeviceInfo::max_n_tb`].
    fn plan(&self, matrix: &Self::Matrix, plan: &DecPlan) -> Result<Self::Plan>;

    /// `y = W·x + bias`, the base product of one token; `y` is overwritten.
    fn gemv(&self, matrix: &Self::Matrix, x: &Self::Vector, y: &mut Self::Vector) -> Result<()>;

    /// `y = W·x + bias + s · Σ q·x` over the selected channels; `y` is overwritten. With `k_chunk` 0 this is
    /// [`GemvBackend::gemv`], bit for bit.
    fn dec_gemv(&self, matrix: &Self::Matrix, plan: &Self::Plan, x: &Self::Vector, y: &mut Self::Vector) -> Result<()>;

    /// The channels that [`GemvBackend::dec_gemv`] compensates for `x`, ascending; waits. For tests.
    fn select(&self, plan: &Self::Plan, x: &Self::Vector) -> Result<Vec<u32>>;

    /// Runs `work`, which queues operations, waits for them, and returns the time that they took by the
    /// device's clock.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration>;

    /// The clock for a sweep, each launch by itself; [`GemvBackend::time`] knows only the whole.
    ///
    /// # Errors
    /// A `clock` that was asked for by name and is not there.
    fn recorder(&self, clock: Clock) -> Result<Self::Recorder>;
}

/// RMSNorm's constants on a device.
#[derive(Debug)]
pub struct Norm<V> {
    /// γ, `[len]`
    pub gamma: V,
    /// How many numbers it has.
    pub len: usize,
    /// ε
    pub eps: f32,
}

/// What enters the model.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// These tokens, one after the other.
    Prompt(&'a [u32]),
    /// The token that [`DecodeBackend::sample`] chose last.
    Sampled,
}

/// What enters a product.
pub enum Feed<'a, V> {
    /// The activations as they are.
    Plain,
    /// Normalized.
    Norm(&'a Norm<V>),
    /// `activation(gate) ⊙ up` of `[tokens, gate then up]`.
    Gated(Activation),
}

impl<V> Clone for Feed<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Feed<'_, V> {}

/// One product, and what is done before and after it.
pub struct Product<'a, B: GemvBackend> {
    /// What enters it.
    pub feed: Feed<'a, B::Vector>,
    /// The matrix, with its bias.
    pub matrix: &'a B::Matrix,
    /// How it is compensated.
    pub plan: Option<&'a B::Plan>,
    /// Its output is added to what is there.
    pub add: bool,
}

/// A decoder layer on a device.
pub struct LayerOperands<'a, B: GemvBackend> {
    /// What it computes.
    pub program: &'a [Op],
    /// The norms that it has, in the order of [`LayerNorm::ALL`].
    pub norms: [Option<&'a Norm<B::Vector>>; 6],
    /// `qkv`, `o`, `gu`, `d`.
    pub matrices: [&'a B::Matrix; 4],
    /// How they are compensated.
    pub plans: [Option<&'a B::Plan>; 4],
}

impl<'a, B: GemvBackend> LayerOperands<'a, B> {
    /// A norm that the layer's program names; panics at another.
    pub fn norm(&self, norm: LayerNorm) -> &'a Norm<B::Vector> {
        self.norms[norm.index()].expect("a layer has the norms of its program")
    }
}

/// Activations of the tokens at hand, `[tokens, features]` each.
pub struct Activations<B: GemvBackend> {
    /// `[max_tokens, hidden_size]`, what layers add to.
    pub h: B::Vector,
    /// `[max_tokens, (num_heads + 2 · num_kv_heads) · head_dim]`
    pub qkv: B::Vector,
    /// `[max_tokens, num_heads · head_dim]`
    pub attended: B::Vector,
    /// `[max_tokens, 2 · intermediate_size]`
    pub gu: B::Vector,
    /// `[max_tokens, hidden_size]`, what a norm follows before it is added to `h`.
    pub branch: B::Vector,
}

/// A whole token, operation by operation, each as large as a backend may want to fuse it.
///
/// All take `tokens` consecutive tokens at once (at most [`DeviceInfo::max_tokens`]), stored one after the
/// other: `[tokens, features]`. With a plan, every one of them is compensated.
pub trait DecodeBackend: GemvBackend {
    /// One text in the making: its key-value cache, its length, its sampled tokens, all on the device.
    type Sequence;
    /// The recorded operations of one token.
    type Graph;

    /// Room for one text of at most `max_seq_len` tokens.
    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Self::Sequence>;

    /// Starts over with an empty text. `draws[i]`, uniform in `[0, 1)`, decides the `i`-th sampled token; where there is
    /// none, 0 does.
    fn begin(&self, sequence: &mut Self::Sequence, sampling: &Sampling, draws: &[f32]) -> Result<()>;

    /// A text that has just begun starts with the first `tokens` of the one that the sequence held before. The caller
    /// guarantees that no layer's cache has written over what the next token sees of them.
    fn recall(&self, sequence: &mut Self::Sequence, tokens: usize) -> Result<()>;

    /// `h = scale · table[token]` for every input token; NaN, and nothing is read, where the table has no such row.
    fn embed(
        &self,
        sequence: &Self::Sequence,
        table: &Self::Matrix,
        scale: f32,
        input: Input<'_>,
        h: &mut Self::Vector,
    ) -> Result<()>;

    /// `y = W·f(x) + bias`, or `y += …`, compensated if there is a plan.
    fn project(&self, product: &Product<'_, Self>, x: &Self::Vector, y: &mut Self::Vector, tokens: usize) -> Result<()>
    where
        Self: Sized;

    /// RMSNorm of the queries and of the keys in `qkv` `[tokens, queries, keys, values]`, in place, as the attention of
    /// `layer` asks.
    fn norm_qk(
        &self,
        sequence: &Self::Sequence,
        layer: usize,
        norms: [&Norm<Self::Vector>; 2],
        qkv: &mut Self::Vector,
        tokens: usize,
    ) -> Result<()>;

    /// `h += norm(branch) · γ`
    fn add_norm(
        &self,
        norm: &Norm<Self::Vector>,
        branch: &Self::Vector,
        h: &mut Self::Vector,
        tokens: usize,
    ) -> Result<()>;

    /// `logits[i] = cap · tanh(logits[i] / cap)` for the first `count` of them.
    fn softcap(&self, cap: f32, logits: &mut Self::Vector, count: usize) -> Result<()>;

    /// Rotates the queries and keys of `qkv`, overwrites `out` `[tokens, num_heads · head_dim]` with causal attention of
    /// these tokens to each other and to what `layer` remembers, and has it remember their keys and values: those that the
    /// next token sees, the same numbers however many tokens came at once. The text does not grow yet.
    fn attend(
        &self,
        sequence: &mut Self::Sequence,
        layer: usize,
        qkv: &Self::Vector,
        out: &mut Self::Vector,
        tokens: usize,
    ) -> Result<()>;

    /// Runs `layers`, the first of which is layer `first` of the model, over the `tokens` in `activations.h`. What is
    /// in the other activations afterwards is the backend's own.
    fn layers(
        &self,
        sequence: &mut Self::Sequence,
        first: usize,
        layers: &[LayerOperands<'_, Self>],
        activations: &mut Activations<Self>,
        tokens: usize,
    ) -> Result<()>
    where
        Self: Sized,
    {
        one_by_one(self, sequence, first, layers, activations, tokens)
    }

    /// When the last fused launch of layers, if this backend has one and watches it, began and went on from one part of
    /// a layer to the next: nanoseconds, ascending; `qkv`, `attend`, `o`, `gu`, `d`.
    fn layer_stamps(&self) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// The text grows by the `tokens` that all layers have attended to.
    fn advance(&self, sequence: &mut Self::Sequence, tokens: usize) -> Result<()>;

    /// Overwrites `last` with the last of the `tokens` rows of `h`, each `len` long.
    fn last_row(&self, h: &Self::Vector, len: usize, tokens: usize, last: &mut Self::Vector) -> Result<()>;

    /// Chooses the next token from `logits` `[vocab_size]`, by the rules and draws of [`DecodeBackend::begin`]: what
    /// [`Sampling::choose`] does, or [`NO_TOKEN`](crate::sampling::NO_TOKEN) where that finds none.
    fn sample(&self, sequence: &mut Self::Sequence, logits: &Self::Vector) -> Result<()>;

    /// Waits for the `i`-th token sampled since [`DecodeBackend::begin`] and returns it.
    ///
    /// # Errors
    /// There was none to choose, since the largest logit was not a finite number; or it was not sampled yet.
    fn sampled(&self, sequence: &Self::Sequence, i: usize) -> Result<u32>;

    /// Makes ready whatever the operations that `work` queues will need, such as compiled kernels, so that the first
    /// token does not wait for one after the other. `work` may be run without effect on the device, or not at all.
    fn prepare(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Issues the operations of one token: runs `token`, or replays what it queued the first time, kept in
    /// `graph`. The caller empties `graph` whenever `token` would queue something else.
    fn replay(&self, graph: &mut Option<Self::Graph>, token: &mut dyn FnMut() -> Result<()>) -> Result<()>;
}

/// Fails if `tokens` behind `len` would go past the end of a text of `max_seq_len`.
pub(crate) fn ensure_room(len: usize, tokens: usize, max_seq_len: usize) -> Result<()> {
    let room = max_seq_len.saturating_sub(len);
    ensure!(tokens <= room, "{tokens} more tokens, but the context of {max_seq_len} has room for {room}");
    Ok(())
}

/// Tokens that a layer remembers: as many as one of a text of `max_seq_len` sees.
pub(crate) fn cached_positions(attention: &Attention, max_seq_len: usize) -> usize {
    attention.window.map_or(max_seq_len, |window| max_seq_len.min(window))
}

/// [`DecodeBackend::layers`], operation by operation.
fn one_by_one<B: DecodeBackend>(
    backend: &B,
    sequence: &mut B::Sequence,
    first: usize,
    layers: &[LayerOperands<'_, B>],
    activations: &mut Activations<B>,
    tokens: usize,
) -> Result<()> {
    for (l, layer) in layers.iter().enumerate() {
        for &op in layer.program {
            perform(backend, sequence, (first + l, layer), op, activations, tokens)?;
        }
    }
    Ok(())
}

/// One operation of a layer, which is the model's layer of that number.
pub(crate) fn perform<B: DecodeBackend>(
    backend: &B,
    sequence: &mut B::Sequence,
    (number, layer): (usize, &LayerOperands<'_, B>),
    op: Op,
    activations: &mut Activations<B>,
    tokens: usize,
) -> Result<()> {
    let Activations { h, qkv, attended, gu, branch } = activations;
    match op {
        Op::Project { projection, reads, writes } => {
            let feed = match reads {
                Reads::Stream(Some(norm)) => Feed::Norm(layer.norm(norm)),
                Reads::Stream(None) | Reads::Attended => Feed::Plain,
                Reads::Gated(activation) => Feed::Gated(activation),
            };
            let (matrix, plan) = (layer.matrices[projection.index()], layer.plans[projection.index()]);
            let product = Product { feed, matrix, plan, add: writes == Writes::Stream };
            let (x, y) = match (reads, writes) {
                (Reads::Stream(_), Writes::Qkv) => (&*h, qkv),
                (Reads::Stream(_), Writes::GateUp) => (&*h, gu),
                (Reads::Stream(_), Writes::Branch) => (&*h, branch),
                (Reads::Attended, Writes::Stream) => (&*attended, h),
                (Reads::Attended, _) => (&*attended, branch),
                (Reads::Gated(_), Writes::Stream) => (&*gu, h),
                (Reads::Gated(_), _) => (&*gu, branch),
                (Reads::Stream(_), Writes::Stream) => anyhow::bail!("{projection} cannot add to what it reads"),
            };
            backend.project(&product, x, y, tokens)
        }
        Op::NormQk(_) => {
            backend.norm_qk(sequence, number, [LayerNorm::Query, LayerNorm::Key].map(|n| layer.norm(n)), qkv, tokens)
        }
        Op::Attend => backend.attend(sequence, number, qkv, attended, tokens),
        Op::AddNormed(norm) => backend.add_norm(layer.norm(norm), branch, h, tokens),
    }
}
