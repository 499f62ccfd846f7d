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
//! - rows are of slots that hold a text, each from the position where that text ends, no slot twice in a pass;
//! - a text is never written past the `max_seq_len` that its cache was made with.

pub mod cpu;
pub mod cuda;
mod exit;
pub mod kernels;
mod kv;
pub mod record;
mod rows;
#[cfg(feature = "reference-wgpu")]
pub mod wgsl;

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};

pub use self::exit::exit_at_once;
pub use self::kv::KvBits;
pub use self::rows::{DECODE_ROWS, Input, Pass, Rows, count, numbered};

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
    /// So many rows, the first ones, are: at least one with a plan.
    pub compensated: usize,
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

/// Activations of the rows at hand, `[rows, features]` each.
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

/// A whole pass, operation by operation, each as large as a backend may want to fuse it.
///
/// A pass has rows of one or several texts, at most [`DeviceInfo::max_tokens`] together, stored one after the other:
/// `[rows, features]`. What comes of a row depends on its text alone: not on the rows beside it, nor on how the text was
/// cut into passes.
pub trait DecodeBackend: GemvBackend {
    /// Slots, each of which holds one text: keys and values, length, sampled tokens and draws, all on the device.
    type Cache;
    /// Recorded passes.
    type Graphs: Default;

    /// Slots for as many texts of at most `max_seq_len` tokens each. A slot takes memory when its first text begins.
    ///
    /// # Errors
    /// A model that the backend has no kernels for.
    fn cache(&self, config: &ModelConfig, slots: usize, max_seq_len: usize, bits: KvBits) -> Result<Self::Cache>;

    /// The slot holds an empty text from now on. `draws[i]`, uniform in `[0, 1)`, decides the `i`-th token sampled in it;
    /// where there is none, 0 does.
    ///
    /// # Errors
    /// No such slot, or no memory for another text.
    fn begin(&self, cache: &mut Self::Cache, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()>;

    /// The text goes on from the first `tokens` that the slot held since it was last longer, and from the first `sampled`
    /// tokens that were chosen in it. The caller guarantees that no layer has written over what the next token sees of
    /// them, and has read all tokens that were chosen.
    fn cut(&self, cache: &mut Self::Cache, slot: usize, tokens: usize, sampled: usize) -> Result<()>;

    /// `h = scale · row[token]` of `table`, its rows and the scale, for every input token; NaN, and nothing is read, where
    /// the table has no such row.
    fn embed(
        &self,
        cache: &Self::Cache,
        rows: &[Rows],
        table: (&Self::Matrix, f32),
        input: Input<'_>,
        h: &mut Self::Vector,
    ) -> Result<()>;

    /// `y = W·f(x) + bias`, or `y += …`, compensated if there is a plan.
    fn project(&self, product: &Product<'_, Self>, x: &Self::Vector, y: &mut Self::Vector, rows: usize) -> Result<()>
    where
        Self: Sized;

    /// RMSNorm of the queries and of the keys in `qkv` `[rows, queries, keys, values]`, in place, as the attention of
    /// `layer` asks.
    fn norm_qk(
        &self,
        cache: &Self::Cache,
        layer: usize,
        norms: [&Norm<Self::Vector>; 2],
        qkv: &mut Self::Vector,
        rows: usize,
    ) -> Result<()>;

    /// `h += norm(branch) · γ`
    fn add_norm(
        &self,
        norm: &Norm<Self::Vector>,
        branch: &Self::Vector,
        h: &mut Self::Vector,
        rows: usize,
    ) -> Result<()>;

    /// `logits[i] = cap · tanh(logits[i] / cap)` for the first `count` of them.
    fn softcap(&self, cap: f32, logits: &mut Self::Vector, count: usize) -> Result<()>;

    /// Rotates the queries and keys of `qkv`, overwrites `out` `[rows, num_heads · head_dim]` with causal attention of each
    /// text's rows to each other and to what `layer` remembers of that text, and has it remember their keys and values:
    /// those that the next token sees. The texts do not grow yet.
    fn attend(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        rows: &[Rows],
        qkv: &Self::Vector,
        out: &mut Self::Vector,
    ) -> Result<()>;

    /// Runs `layers`, the first of which is layer `first` of the model, over the rows in `activations.h`. What is in the
    /// other activations afterwards is the backend's own.
    fn layers(
        &self,
        cache: &mut Self::Cache,
        pass: Pass<'_>,
        first: usize,
        layers: &[LayerOperands<'_, Self>],
        activations: &mut Activations<Self>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        one_by_one(self, cache, pass, first, layers, activations)
    }

    /// Whether this device runs layers as one launch where their shapes allow it: single products do not tell then what
    /// a token takes.
    fn fuses_layers(&self) -> bool {
        false
    }

    /// When the last fused launch of layers, if this backend has one and watches it, began and went on from one part of
    /// a layer to the next: nanoseconds, ascending; `qkv`, `attend`, `o`, `gu`, `d`.
    fn layer_stamps(&self) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// The texts grow by the rows that all layers have attended to.
    fn advance(&self, cache: &mut Self::Cache, rows: &[Rows]) -> Result<()>;

    /// Overwrites `to` `[which.len(), len]` with these rows of `from`, each `len` long.
    fn gather(&self, from: &Self::Vector, len: usize, which: &[usize], to: &mut Self::Vector) -> Result<()>;

    /// Chooses the next token of each of `slots` from its row of `logits` `[slots, vocab_size]`, by the rules and draws of
    /// [`DecodeBackend::begin`]: what [`Sampling::choose`] does, or [`NO_TOKEN`](crate::sampling::NO_TOKEN) where that finds
    /// none. A slot that comes several times in a row gets as many tokens, one after the other.
    fn sample(&self, cache: &mut Self::Cache, slots: &[usize], logits: &Self::Vector) -> Result<()>;

    /// Waits for the `i`-th token sampled in the slot since [`DecodeBackend::begin`] and returns it.
    ///
    /// # Errors
    /// There was none to choose, since the largest logit was not a finite number; or it was not sampled yet.
    fn sampled(&self, cache: &Self::Cache, slot: usize, i: usize) -> Result<u32>;

    /// Makes ready whatever the operations that `work` queues will need, such as compiled kernels, so that the first
    /// token does not wait for one after the other. `work` may be run without effect on the device, or not at all.
    fn prepare(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Issues the operations of a pass in which every one of `rows` is the token chosen last in its slot: runs `work`, or
    /// replays what it queued before for rows of that kind, kept in `graphs`. The caller empties `graphs` whenever `work`
    /// would queue something else for the same rows.
    fn replay(&self, graphs: &mut Self::Graphs, rows: &[Rows], work: &mut dyn FnMut() -> Result<()>) -> Result<()>;
}

/// Fails if there is no slot of that number.
pub(crate) fn ensure_slot(slot: usize, slots: usize) -> Result<()> {
    ensure!(slot < slots, "slot {slot} is asked for, there are {slots}, make the cache with more");
    Ok(())
}

/// What to say of a slot that no text has begun in.
pub(crate) fn holds_no_text(slot: usize) -> String {
    format!("slot {slot} holds no text, begin one")
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
    cache: &mut B::Cache,
    pass: Pass<'_>,
    first: usize,
    layers: &[LayerOperands<'_, B>],
    activations: &mut Activations<B>,
) -> Result<()> {
    for (l, layer) in layers.iter().enumerate() {
        for &op in layer.program {
            perform(backend, cache, pass, (first + l, layer), op, activations)?;
        }
    }
    Ok(())
}

/// One operation of a layer, which is the model's layer of that number.
pub(crate) fn perform<B: DecodeBackend>(
    backend: &B,
    cache: &mut B::Cache,
    pass: Pass<'_>,
    (number, layer): (usize, &LayerOperands<'_, B>),
    op: Op,
    activations: &mut Activations<B>,
) -> Result<()> {
    let rows = pass.count();
    let Activations { h, qkv, attended, gu, branch } = activations;
    match op {
        Op::Project { projection, reads, writes } => {
            let feed = match reads {
                Reads::Stream(Some(norm)) => Feed::Norm(layer.norm(norm)),
                Reads::Stream(None) | Reads::Attended => Feed::Plain,
                Reads::Gated(activation) => Feed::Gated(activation),
            };
            let (matrix, plan) = (layer.matrices[projection.index()], layer.plans[projection.index()]);
            let plan = plan.filter(|_| pass.compensated > 0);
            let product = Product { feed, matrix, plan, compensated: pass.compensated, add: writes == Writes::Stream };
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
            backend.project(&product, x, y, rows)
        }
        Op::NormQk(_) => {
            backend.norm_qk(cache, number, [LayerNorm::Query, LayerNorm::Key].map(|n| layer.norm(n)), qkv, rows)
        }
        Op::Attend => backend.attend(cache, number, pass.rows, qkv, attended),
        Op::AddNormed(norm) => backend.add_norm(layer.norm(norm), branch, h, rows),
    }
}
