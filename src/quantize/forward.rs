//! One decoder layer in f32, many tokens at once: what calibration, sampling and training run, on any device.
//!
//! What a layer computes is its program's ([`LayerConfig::program`]); how, the device's ([`Compute`], spec §3.2).

use std::borrow::Cow;

use anyhow::Result;
use rayon::prelude::*;

use super::compute::{Cache, Compute, Matrix, Tensor};
use super::product::product;
use crate::config::{Attention, LayerConfig, LayerNorm, ModelConfig, Op, Projection, Reads, Writes};
use crate::weights::{Linear, ModelWeights};

/// A linear layer in f32.
#[derive(Debug, Clone)]
pub(crate) struct Affine {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) weight: Vec<f32>,       // [out_features, in_features]
    pub(crate) bias: Option<Vec<f32>>, // [out_features]
}

impl Affine {
    pub(crate) fn new(linear: &Linear<'_>) -> Self {
        let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
        let mut weight = vec![0.0; in_features * out_features];
        let rows = weight.par_chunks_exact_mut(in_features).enumerate();
        rows.for_each(|(row, values)| linear.weight.row(row, values));
        Self { in_features, out_features, weight, bias: linear.bias.as_deref().map(<[f32]>::to_vec) }
    }

    /// `[tokens, out_features]` from `x` `[tokens, in_features]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.in_features * self.out_features];
        product(x, &self.weight, self.in_features, &mut y);
        if let Some(bias) = &self.bias {
            y.par_chunks_exact_mut(self.out_features).for_each(|y| add(y, bias));
        }
        y
    }

    /// Row `row` of the matrix.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.weight[row * self.in_features..][..self.in_features]
    }
}

/// The norms of a layer in the order of [`LayerNorm::ALL`]; empty where there is none.
pub(crate) type Norms = [Vec<f32>; 6];

/// One layer in f32.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) config: LayerConfig,
    pub(crate) norms: Norms,
    pub(crate) linears: [Affine; 4], // in the order of `Projection::ALL`
}

impl Layer {
    /// Reads a layer, dequantized where it is quantized.
    pub(crate) fn read(weights: &dyn ModelWeights, layer: usize) -> Result<Self> {
        let config = weights.config();
        Self::collect(config.layers[layer].clone(), weights.norms(layer)?, |projection| {
            weights.projection(layer, projection)
        })
    }

    /// A layer of these norms and projections.
    pub(crate) fn collect<'a>(
        config: LayerConfig,
        norms: Norms,
        projection: impl Fn(Projection) -> Result<Linear<'a>>,
    ) -> Result<Self> {
        let linears = Projection::each(|p| projection(p).map(|linear| Affine::new(&linear)))?;
        Ok(Self { config, norms, linears })
    }

    /// The projection's matrix.
    pub(crate) fn linear(&self, projection: Projection) -> &Affine {
        &self.linears[projection.index()]
    }

    /// γ of a norm that the layer has.
    pub(crate) fn norm(&self, norm: LayerNorm) -> &[f32] {
        &self.norms[norm.index()]
    }
}

/// The norms that a layer has, each as `make` gives it for its length.
pub(crate) fn norms(config: &LayerConfig, hidden_size: usize, make: impl Fn(LayerNorm, usize) -> Vec<f32>) -> Norms {
    let mut norms = Norms::default();
    config.norms(hidden_size).into_iter().for_each(|(norm, len)| norms[norm.index()] = make(norm, len));
    norms
}

/// Rotations of the rotary embedding, one table for each of the model's.
#[derive(Debug)]
pub(crate) struct Ropes(pub(crate) Vec<Vec<[f32; 2]>>); // [positions, head_dim / 2] of (cos, sin)

impl Ropes {
    pub(crate) fn new(config: &ModelConfig, positions: usize) -> Self {
        Self(config.ropes.iter().map(|rope| rope.table(positions)).collect())
    }

    /// Turns a head of `attention` at `position`.
    pub(crate) fn rotate(&self, attention: &Attention, head: &mut [f32], position: usize) {
        self.each_pair(attention, head, position, |a, b, [cos, sin]| (a * cos - b * sin, b * cos + a * sin));
    }

    /// The derivative by what [`Ropes::rotate`] turned, from that by what it made; for a plain rotation, its inverse.
    pub(crate) fn rotate_back(&self, attention: &Attention, head: &mut [f32], position: usize) {
        self.each_pair(attention, head, position, |a, b, [cos, sin]| (a * cos + b * sin, b * cos - a * sin));
    }

    fn each_pair(
        &self,
        attention: &Attention,
        head: &mut [f32],
        position: usize,
        turn: impl Fn(f32, f32, [f32; 2]) -> (f32, f32),
    ) {
        let Some(rope) = attention.rope else { return };
        let half = head.len() / 2;
        let (low, high) = head.split_at_mut(half);
        for ((a, b), &pair) in low.iter_mut().zip(high).zip(&self.0[rope][position * half..][..half]) {
            (*a, *b) = turn(*a, *b, pair);
        }
    }
}

/// A layer whose matrices are where a device multiplies by them.
pub(crate) struct Placed<'a> {
    config: LayerConfig,
    norms: Norms,
    matrices: [Matrix<'a>; 4], // in the order of `Projection::ALL`
}

impl<'a> Placed<'a> {
    /// # Errors
    /// A device without room.
    pub(crate) fn new(on: &dyn Compute, layer: &'a Layer) -> Result<Self> {
        let matrices = Projection::each(|p| on.matrix(Cow::Borrowed(layer.linear(p))))?;
        Ok(Self { config: layer.config.clone(), norms: layer.norms.clone(), matrices })
    }

    /// The same of a layer that is not needed otherwise.
    ///
    /// # Errors
    /// A device without room.
    pub(crate) fn owned(on: &dyn Compute, layer: Layer) -> Result<Self> {
        let Layer { config, norms, linears } = layer;
        let [qkv, o, gate_up, down] = linears.map(|linear| on.matrix(Cow::Owned(linear)));
        Ok(Self { config, norms, matrices: [qkv?, o?, gate_up?, down?] })
    }

    /// The layer's configuration.
    pub(crate) fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// Takes `h` `[texts, tokens, hidden_size]` through the layer, behind what `cache` holds of each text, and returns what
    /// entered its projections.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn forward(
        &self,
        on: &dyn Compute,
        config: &ModelConfig,
        ropes: &Ropes,
        cache: &mut Cache,
        texts: usize,
        h: &mut Tensor,
    ) -> Result<[Tensor; 4]> {
        run(on, config, (&self.config, &self.norms), ropes, cache, texts, h, |(projection, ..), _, x| {
            on.product(&self.matrices[projection.index()], x)
        })
    }
}

/// What enters the four projections, each `[tokens, in_features]`.
pub(crate) type Inputs = [Vec<f32>; 4];

/// `h` `[tokens, hidden_size]` through one of the `norms`, if through any.
pub(super) fn normed(
    on: &dyn Compute,
    config: &ModelConfig,
    norms: &Norms,
    through: Option<LayerNorm>,
    h: &Tensor,
) -> Result<Tensor> {
    through.map_or_else(|| on.copy(h), |n| on.norm(h, &norms[n.index()], config.norm_eps(n)))
}

/// Takes `h` through a layer of this program and these norms. `product` gets a projection, `h` as it is then and `x`, what
/// enters, and returns what comes out. Returns what entered the projections.
#[allow(clippy::too_many_arguments, reason = "a layer, what it works on, and how it multiplies")]
pub(super) fn run(
    on: &dyn Compute,
    config: &ModelConfig,
    (layer, norms): (&LayerConfig, &Norms),
    ropes: &Ropes,
    cache: &mut Cache,
    texts: usize,
    h: &mut Tensor,
    mut product: impl FnMut((Projection, Reads, Writes), &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<[Tensor; 4]> {
    let mut inputs = <[Tensor; 4]>::default();
    let (mut qkv, mut attended) = (Tensor::default(), Tensor::default());
    let (mut gate_up, mut branch) = (Tensor::default(), Tensor::default());
    for op in layer.program() {
        match op {
            Op::Project { projection, reads, writes } => {
                let x = match reads {
                    Reads::Stream(n) => normed(on, config, norms, n, h)?,
                    Reads::Attended => std::mem::take(&mut attended),
                    Reads::Gated(activation) => {
                        on.gated(activation, &std::mem::take(&mut gate_up), layer.intermediate_size())?
                    }
                };
                let y = product((projection, reads, writes), h, &x)?;
                inputs[projection.index()] = x;
                match writes {
                    Writes::Qkv => qkv = y,
                    Writes::GateUp => gate_up = y,
                    Writes::Stream => on.add(h, &y)?,
                    Writes::Branch => branch = y,
                }
            }
            Op::NormQk(_) => on.norm_qk(layer.attention(), of_qk(norms), config.rms_norm_eps, &mut qkv)?,
            Op::Attend => attended = on.attend(layer.attention(), ropes, cache, texts, std::mem::take(&mut qkv))?,
            Op::AddNormed(n) => on.add(h, &normed(on, config, norms, Some(n), &branch)?)?,
        }
    }
    Ok(inputs)
}

/// γ of queries and of keys.
pub(super) fn of_qk(norms: &Norms) -> [&[f32]; 2] {
    [LayerNorm::Query, LayerNorm::Key].map(|n| &norms[n.index()][..])
}

/// RMSNorm of queries and of keys of every token of `qkv`, in place, in pieces as long as each γ.
pub(super) fn norm_qk(attention: &Attention, [query, key]: [&[f32]; 2], eps: f32, qkv: &mut [f32]) {
    let (queries, keys) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
    qkv.par_chunks_exact_mut(attention.qkv_rows()).for_each(|row| {
        row[..queries].chunks_exact_mut(query.len()).for_each(|x| norm_row(x, query, eps));
        row[queries..][..keys].chunks_exact_mut(key.len()).for_each(|x| norm_row(x, key, eps));
    });
}

/// RMSNorm of one row, in place.
fn norm_row(x: &mut [f32], gamma: &[f32], eps: f32) {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / gamma.len() as f32 + eps).sqrt();
    x.iter_mut().zip(gamma).for_each(|(x, gamma)| *x = *x * scale * gamma);
}

/// RMSNorm of every row of `h`.
pub(crate) fn norm(h: &[f32], gamma: &[f32], eps: f32) -> Vec<f32> {
    let mut out = h.to_vec();
    out.par_chunks_exact_mut(gamma.len()).for_each(|x| norm_row(x, gamma, eps));
    out
}

/// `y += x`
fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

pub(crate) fn add_parallel(y: &mut [f32], x: &[f32]) {
    y.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 14)).for_each(|(y, x)| add(y, x));
}

#[cfg(test)]
mod tests;
