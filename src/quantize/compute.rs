//! What quantization asks of a device: where its numbers are, and the arithmetic on them.
//!
//! The program of a layer, forwards and backwards, is written once ([`super::forward`], [`super::backward`]); what its
//! steps are made of is here. [`Host`](super::host::Host) computes on the cores of this machine; a GPU's backend has an
//! implementation of its own.
//!
//! A caller passes tensors only to the device that made them, and of the lengths that shapes say. An implementation gives
//! the same bits whenever it is asked for the same; how many tokens go together is part of what it is asked.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use anyhow::Result;
use half::{bf16, f16};

use super::forward::{Affine, Ropes};
use super::gram::Taken;
use super::head::LmHead;
use super::refine::{AnyGrid, Effort};
use super::regress::Together;
use crate::config::{Activation, Attention, LayerConfig, ModelConfig, Projection};

/// Numbers, in memory here or where a device computes.
pub(crate) enum Tensor {
    /// Of [`Host`](super::host::Host).
    F32(Vec<f32>),
    /// The same, kept in 16 bits.
    F16(Vec<f16>),
    /// The same, kept in 16 bits.
    Bf16(Vec<bf16>),
    /// Of a GPU.
    Device(Box<dyn Any>),
}

impl Default for Tensor {
    fn default() -> Self {
        Self::F32(Vec::new())
    }
}

impl Tensor {
    /// The numbers of a tensor that is here in f32.
    pub(crate) fn host(&self) -> &Vec<f32> {
        match self {
            Self::F32(values) => values,
            _ => panic!("a tensor of this machine's memory, in f32, is expected"),
        }
    }

    /// The same, to be changed.
    pub(crate) fn host_mut(&mut self) -> &mut Vec<f32> {
        match self {
            Self::F32(values) => values,
            _ => panic!("a tensor of this machine's memory, in f32, is expected"),
        }
    }
}

/// Types of 16 bits in which numbers wait for the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    /// 11 bits of precision; for numbers that exponents depend on.
    F16,
    /// 8 bits of precision, any size.
    Bf16,
}

/// A linear layer where the device multiplies by it.
pub(crate) enum Matrix<'a> {
    /// In memory here.
    Host(Cow<'a, Affine>),
    /// A GPU's.
    Device(Box<dyn Any>),
}

/// Keys and values of several texts in one layer.
pub(crate) enum Cache {
    /// In memory here.
    Host(super::attention::KvCache),
    /// A GPU's.
    Device(Box<dyn Any>),
}

/// Channels that compensation takes, token by token.
pub(crate) enum Selected {
    /// In memory here.
    Host(Taken),
    /// A GPU's.
    Device(Box<dyn Any>),
}

/// A projection whose stored weights are trained: what it was made from, and the code of each weight.
#[derive(Clone)]
pub(crate) struct Coded {
    /// What a compensated channel is multiplied by.
    pub(crate) original: Arc<Affine>,
    /// `[out_features, in_features]`
    pub(crate) codes: Arc<Vec<u8>>,
}

/// [`Coded`] with a codebook, where the device computes.
pub(crate) enum Trained {
    /// In memory here: the linear layer as it is stored, in f32, and what it was made from.
    Host(Box<Affine>, Coded),
    /// A GPU's.
    Device(Box<dyn Any>),
}

/// What somebody wants to know of what enters a projection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    /// How many channels of 1024 are taken: a fit for each of these will be asked for.
    pub(crate) k_chunks: Vec<usize>,
    /// What errors count without compensation, with it counting `1 − alone`.
    pub(crate) alone: f32,
    /// The numbers themselves.
    pub(crate) all: bool,
}

/// What entered a projection, over all tokens of a text.
pub(crate) trait Entered {
    /// Some more tokens, `[tokens, in_features]`.
    fn add(&mut self, x: Tensor) -> Result<()>;
    /// Σx² of every channel, as [`super::calibrate::energy`] says.
    fn energy(&self) -> Result<Vec<f32>>;
    /// As [`super::calibrate::thresholds`] says.
    fn thresholds(&self) -> Result<Vec<f32>>;
    /// What errors of the projection cost where `k_chunk` channels, one of those watched, are compensated.
    fn fit(&self, k_chunk: usize) -> Result<Metric<'_>>;
    /// What the channels that are taken of `k_chunk`, one of those watched, have in common with each other and the rest.
    fn together(&self, k_chunk: usize) -> Result<Together>;
    /// As [`super::regress::predicted`] says.
    fn predicted(&self, across: &[f32], triangle: &[f32], lost: &[f32]) -> Result<Vec<f32>>;
    /// The numbers, `[tokens, in_features]`, where [`Watch::all`] was asked for.
    fn all(&self) -> &[f32];
}

/// What an error in a projection costs.
pub(crate) struct Metric<'a> {
    /// `None` where nothing ever came in.
    pub(crate) hessian: Option<Box<dyn Curvature + 'a>>,
    /// Σx² of every channel over the tokens for which it is taken.
    pub(crate) taken: Vec<f32>, // [in_features]
}

/// A damped Hessian, `[in_features, in_features]`.
pub(crate) trait Curvature {
    /// What an error in each channel costs by itself.
    fn diagonal(&self) -> Result<Vec<f32>>;
    /// Lowers the loss of rows as [`super::refine::refine`] says, which also says of what the arguments are.
    fn refine(&self, grid: AnyGrid, w: &[f32], codes: &mut [u8], parameters: &mut [f32], effort: Effort) -> Result<()>;
}

/// What comes behind the last layer, where a device computes.
pub(crate) trait Head {
    /// `[tokens, vocab_size]` from `h` `[tokens, hidden_size]` as it leaves the last layer.
    fn logits(&self, h: &Tensor) -> Result<Vec<f32>>;
    /// As [`LmHead::divergence`] says: of what `h` says from what `truth` says, and its derivative by `h`.
    fn divergence(&self, truth: &[f32], h: &Tensor) -> Result<(f64, Vec<f32>)>;
    /// The token that each draw chooses after `h`, as [`super::sample::draw_from`] says.
    fn draw(&self, h: &Tensor, draws: &[f32]) -> Result<Vec<u32>>;
}

/// A device that quantization computes on. All matrices are row-major; `[texts, tokens, …]` may be read as one dimension.
pub(crate) trait Compute {
    /// Tokens that go through a layer at once.
    fn batch_tokens(&self) -> usize;
    /// True if all layers stay where they are multiplied by while text is made.
    fn holds_layers(&self, config: &ModelConfig) -> bool;
    /// Texts of `tokens` tokens that are sampled side by side: what attention keeps of them fits the device.
    fn texts_at_once(&self, config: &ModelConfig, tokens: usize) -> usize;
    /// Puts numbers where the device computes.
    fn put(&self, values: Vec<f32>) -> Result<Tensor>;
    /// Takes them back.
    fn take(&self, tensor: Tensor) -> Result<Vec<f32>>;
    /// Another tensor of the same numbers.
    fn copy(&self, tensor: &Tensor) -> Result<Tensor>;
    /// The same in 16 bits.
    fn shorten(&self, tensor: &Tensor, kind: Short) -> Result<Tensor>;
    /// The same in f32.
    fn lengthen(&self, tensor: &Tensor) -> Result<Tensor>;

    /// Puts a linear layer where it is multiplied by.
    fn matrix<'a>(&self, linear: Cow<'a, Affine>) -> Result<Matrix<'a>>;
    /// `x·Wᵀ + bias`, `[tokens, out_features]`.
    fn product(&self, matrix: &Matrix<'_>, x: &Tensor) -> Result<Tensor>;
    /// RMSNorm of every row of `h`.
    fn norm(&self, h: &Tensor, gamma: &[f32], eps: f32) -> Result<Tensor>;
    /// RMSNorm of queries and keys in `qkv`, in place, in pieces as long as each γ.
    fn norm_qk(&self, attention: &Attention, gammas: [&[f32]; 2], eps: f32, qkv: &mut Tensor) -> Result<()>;
    /// `y += x`
    fn add(&self, y: &mut Tensor, x: &Tensor) -> Result<()>;
    /// `activation(gate) ⊙ up`, `[tokens, intermediate]` from `[tokens, gate then up]`.
    fn gated(&self, activation: Activation, gate_up: &Tensor, intermediate: usize) -> Result<Tensor>;
    /// Room for `texts` texts of `capacity` tokens, of which none is read yet.
    fn cache(&self, layer: &LayerConfig, texts: usize, capacity: usize) -> Result<Cache>;
    /// Rotates queries and keys, the first of each text at position 0.
    fn rotate(&self, attention: &Attention, ropes: &Ropes, tokens: usize, qkv: &mut Tensor) -> Result<()>;
    /// Rotates queries and keys, appends keys and values to `cache`, and returns what attention puts out.
    fn attend(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        cache: &mut Cache,
        texts: usize,
        qkv: Tensor,
    ) -> Result<Tensor>;

    /// Adds to `d` the derivative by `h` of its RMSNorm, from that by what the norm puts out.
    fn norm_back(&self, h: &Tensor, gamma: &[f32], eps: f32, d_out: &Tensor, d: &mut Tensor) -> Result<()>;
    /// The derivative by `h` of its RMSNorm alone.
    fn norm_derivative(&self, h: &Tensor, gamma: &[f32], eps: f32, d_out: &Tensor) -> Result<Tensor>;
    /// Turns `d`, the derivative by what [`Compute::norm_qk`] made of `qkv`, into that by `qkv`.
    fn norm_qk_back(
        &self,
        attention: &Attention,
        gammas: [&[f32]; 2],
        eps: f32,
        qkv: &Tensor,
        d: &mut Tensor,
    ) -> Result<()>;
    /// The derivative by what [`Compute::gated`] took.
    fn gated_back(&self, activation: Activation, gate_up: &Tensor, d: &Tensor, intermediate: usize) -> Result<Tensor>;
    /// The derivative by queries, keys and values before rotation; `qkv` is rotated, texts begin at position 0.
    fn attend_back(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        texts: usize,
        qkv: &Tensor,
        d_out: &Tensor,
    ) -> Result<Tensor>;

    /// Selects `k_chunk` channels per 1024 for every token of `x`.
    fn select(&self, x: &Tensor, in_features: usize, k_chunk: usize) -> Result<Selected>;
    /// Puts a projection with this codebook `[out_features, levels]` where it is trained. `read` gives it; it is not asked
    /// where the device still holds what it gave for the same `place`, a layer and a projection.
    fn trained(
        &self,
        place: (usize, Projection),
        codebook: &[f32],
        read: &mut dyn FnMut() -> Result<Coded>,
    ) -> Result<Trained>;
    /// What a projection puts out with the channels `taken` compensated.
    fn output(&self, projection: &Trained, x: &Tensor, taken: &Selected) -> Result<Tensor>;
    /// Derivatives by what entered a projection and by its stored weights, from those by what came out, `d`.
    fn derive(&self, projection: &Trained, x: Tensor, taken: &Selected, d: &Tensor) -> Result<(Tensor, Tensor)>;
    /// The derivative by the codebook `[out_features, levels]`, from that by the weights.
    fn slopes(&self, projection: &Trained, levels: usize, gradient: &Tensor) -> Result<Vec<f32>>;

    /// What enters a projection of `in_features` will be watched for this.
    fn entered(&self, in_features: usize, watch: &Watch) -> Result<Box<dyn Entered + '_>>;
    /// Puts the head where it is multiplied by.
    fn head<'a>(&'a self, head: &'a LmHead<'a>) -> Result<Box<dyn Head + 'a>>;
}
