//! Quantization's arithmetic on the cores of this machine.

use std::borrow::Cow;

use anyhow::Result;
use rayon::prelude::*;

use super::attention::{self, KvCache};
use super::compute::{
    Cache, Coded, Compute, Curvature, Entered, Head, Matrix, Metric, Selected, Short, Tensor, Trained, Watch,
};
use super::exponential::{gated, gated_back};
use super::forward::{Affine, Ropes, add_parallel, norm, norm_qk};
use super::gram::{Hessian, Taken};
use super::head::LmHead;
use super::refine::{AnyGrid, Effort, refine};
use super::regress::{self, Together};
use super::{backward, calibrate, sample};
use crate::config::{Activation, Attention, LayerConfig, ModelConfig, Projection};

/// The cores of this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host;

impl Compute for Host {
    fn batch_tokens(&self) -> usize {
        calibrate::BATCH_TOKENS
    }

    fn holds_layers(&self, config: &ModelConfig) -> bool {
        sample::layers_stay(config)
    }

    fn texts_at_once(&self, config: &ModelConfig, tokens: usize) -> usize {
        sample::together(config, tokens)
    }

    fn put(&self, values: Vec<f32>) -> Result<Tensor> {
        Ok(Tensor::F32(values))
    }

    fn take(&self, mut tensor: Tensor) -> Result<Vec<f32>> {
        Ok(std::mem::take(tensor.host_mut()))
    }

    fn copy(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(Tensor::F32(tensor.host().clone()))
    }

    fn shorten(&self, tensor: &Tensor, kind: Short) -> Result<Tensor> {
        Ok(match kind {
            Short::F16 => Tensor::F16(backward::shortened(tensor.host())),
            Short::Bf16 => Tensor::Bf16(backward::shortened(tensor.host())),
        })
    }

    fn lengthen(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(Tensor::F32(match tensor {
            Tensor::F16(short) => backward::lengthened(short),
            Tensor::Bf16(short) => backward::lengthened(short),
            long => long.host().clone(),
        }))
    }

    fn matrix<'a>(&self, linear: Cow<'a, Affine>) -> Result<Matrix<'a>> {
        Ok(Matrix::Host(linear))
    }

    fn product(&self, matrix: &Matrix<'_>, x: &Tensor) -> Result<Tensor> {
        let Matrix::Host(linear) = matrix else { panic!("a matrix of this machine's memory is expected") };
        Ok(Tensor::F32(linear.apply(x.host())))
    }

    fn norm(&self, h: &Tensor, gamma: &[f32], eps: f32) -> Result<Tensor> {
        Ok(Tensor::F32(norm(h.host(), gamma, eps)))
    }

    fn norm_qk(&self, attention: &Attention, gammas: [&[f32]; 2], eps: f32, qkv: &mut Tensor) -> Result<()> {
        norm_qk(attention, gammas, eps, qkv.host_mut());
        Ok(())
    }

    fn add(&self, y: &mut Tensor, x: &Tensor) -> Result<()> {
        add_parallel(y.host_mut(), x.host());
        Ok(())
    }

    fn gated(&self, activation: Activation, gate_up: &Tensor, intermediate: usize) -> Result<Tensor> {
        Ok(Tensor::F32(gated(activation, gate_up.host(), intermediate)))
    }

    fn cache(&self, layer: &LayerConfig, texts: usize, capacity: usize) -> Result<Cache> {
        Ok(Cache::Host(KvCache::new(layer, texts, capacity)))
    }

    fn rotate(&self, attention: &Attention, ropes: &Ropes, tokens: usize, qkv: &mut Tensor) -> Result<()> {
        attention::rotate(attention, ropes, 0, tokens, qkv.host_mut());
        Ok(())
    }

    fn attend(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        cache: &mut Cache,
        texts: usize,
        mut qkv: Tensor,
    ) -> Result<Tensor> {
        let Cache::Host(cache) = cache else { panic!("a cache of this machine's memory is expected") };
        Ok(Tensor::F32(attention::attend(attention, ropes, cache, texts, qkv.host_mut())))
    }

    fn norm_back(&self, h: &Tensor, gamma: &[f32], eps: f32, d_out: &Tensor, d: &mut Tensor) -> Result<()> {
        backward::norm_back(h.host(), gamma, eps, d_out.host(), d.host_mut());
        Ok(())
    }

    fn norm_derivative(&self, h: &Tensor, gamma: &[f32], eps: f32, d_out: &Tensor) -> Result<Tensor> {
        let mut d = vec![0.0; h.host().len()];
        backward::norm_back(h.host(), gamma, eps, d_out.host(), &mut d);
        Ok(Tensor::F32(d))
    }

    fn norm_qk_back(
        &self,
        attention: &Attention,
        gammas: [&[f32]; 2],
        eps: f32,
        qkv: &Tensor,
        d: &mut Tensor,
    ) -> Result<()> {
        backward::norm_qk_back(attention, gammas, eps, qkv.host(), d.host_mut());
        Ok(())
    }

    fn gated_back(&self, activation: Activation, gate_up: &Tensor, d: &Tensor, intermediate: usize) -> Result<Tensor> {
        Ok(Tensor::F32(gated_back(activation, gate_up.host(), d.host(), intermediate)))
    }

    fn attend_back(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        texts: usize,
        qkv: &Tensor,
        d_out: &Tensor,
    ) -> Result<Tensor> {
        Ok(Tensor::F32(attention::attend_back(attention, ropes, texts, qkv.host(), d_out.host())))
    }

    fn select(&self, x: &Tensor, in_features: usize, k_chunk: usize) -> Result<Selected> {
        Ok(Selected::Host(Taken::select(x.host(), in_features, k_chunk)?))
    }

    fn trained(
        &self,
        _: (usize, Projection),
        codebook: &[f32],
        read: &mut dyn FnMut() -> Result<Coded>,
    ) -> Result<Trained> {
        let coded = read()?;
        let Affine { in_features, out_features, ref bias, .. } = *coded.original;
        let weight = stand_for(codebook, &coded.codes, in_features, out_features);
        let linear = Affine { in_features, out_features, weight, bias: bias.clone() };
        Ok(Trained::Host(Box::new(linear), coded))
    }

    fn output(&self, projection: &Trained, x: &Tensor, taken: &Selected) -> Result<Tensor> {
        let (linear, original, _) = parts(projection);
        Ok(Tensor::F32(backward::output(linear, original, x.host(), self::taken(taken))))
    }

    fn derive(&self, projection: &Trained, mut x: Tensor, taken: &Selected, d: &Tensor) -> Result<(Tensor, Tensor)> {
        let (linear, original, _) = parts(projection);
        let x = std::mem::take(x.host_mut());
        let (d_x, d_w) = backward::derive(linear, original, x, self::taken(taken), d.host());
        Ok((Tensor::F32(d_x), Tensor::F32(d_w)))
    }

    fn slopes(&self, projection: &Trained, levels: usize, gradient: &Tensor) -> Result<Vec<f32>> {
        let (linear, _, codes) = parts(projection);
        let mut slopes = vec![0.0; linear.out_features * levels];
        let rows = codes.par_chunks_exact(linear.in_features).zip(gradient.host().par_chunks_exact(linear.in_features));
        slopes.par_chunks_exact_mut(levels).zip(rows).for_each(|(slopes, (codes, gradient))| {
            codes.iter().zip(gradient).for_each(|(&code, g)| slopes[usize::from(code)] += g);
        });
        Ok(slopes)
    }

    fn entered(&self, in_features: usize, watch: &Watch) -> Result<Box<dyn Entered + '_>> {
        Ok(Box::new(Whole { x: Vec::new(), in_features, alone: watch.alone }))
    }

    fn head<'a>(&'a self, head: &'a LmHead<'a>) -> Result<Box<dyn Head + 'a>> {
        Ok(Box::new(head))
    }
}

/// The weights `[out_features, in_features]` that `codes` stand for, with codebooks `[out_features, levels]`.
pub(super) fn stand_for(codebook: &[f32], codes: &[u8], in_features: usize, out_features: usize) -> Vec<f32> {
    let mut weight = vec![0.0; codes.len()];
    let rows = weight.par_chunks_exact_mut(in_features).zip(codes.par_chunks_exact(in_features));
    rows.zip(codebook.par_chunks_exact(codebook.len() / out_features)).for_each(|((weight, codes), codebook)| {
        weight.iter_mut().zip(codes).for_each(|(weight, &code)| *weight = codebook[usize::from(code)]);
    });
    weight
}

fn taken(selected: &Selected) -> &Taken {
    match selected {
        Selected::Host(taken) => taken,
        Selected::Device(_) => panic!("a selection in this machine's memory is expected"),
    }
}

fn parts(projection: &Trained) -> (&Affine, &[f32], &[u8]) {
    match projection {
        Trained::Host(linear, Coded { original, codes }) => (linear, &original.weight, codes),
        Trained::Device(_) => panic!("a projection in this machine's memory is expected"),
    }
}

/// All that entered, kept.
struct Whole {
    x: Vec<f32>, // [tokens, in_features]
    in_features: usize,
    alone: f32,
}

impl Entered for Whole {
    fn add(&mut self, mut x: Tensor) -> Result<()> {
        if self.x.is_empty() {
            self.x = std::mem::take(x.host_mut());
        } else {
            self.x.extend_from_slice(x.host());
        }
        Ok(())
    }

    fn energy(&self) -> Result<Vec<f32>> {
        Ok(calibrate::energy(&self.x, self.in_features))
    }

    fn thresholds(&self) -> Result<Vec<f32>> {
        Ok(calibrate::thresholds(&self.x, self.in_features))
    }

    fn fit(&self, k_chunk: usize) -> Result<Metric<'_>> {
        let taken = Taken::select(&self.x, self.in_features, k_chunk)?;
        let mut hessian = Hessian::of(&self.x, self.in_features);
        let any = hessian.diagonal().any(|h| h != 0.0);
        if any {
            hessian.discount_taken(&self.x, &taken, self.alone);
            hessian.damp();
        }
        let energy = taken.energy(&self.x, self.in_features);
        Ok(Metric { hessian: any.then(|| Box::new(hessian) as Box<dyn Curvature>), taken: energy })
    }

    fn together(&self, k_chunk: usize) -> Result<Together> {
        let taken = Taken::select(&self.x, self.in_features, k_chunk)?;
        Ok(Together::of(&self.x, self.in_features, &taken))
    }

    fn predicted(&self, across: &[f32], triangle: &[f32], lost: &[f32]) -> Result<Vec<f32>> {
        regress::predicted(across, triangle, lost)
    }

    fn all(&self) -> &[f32] {
        &self.x
    }
}

impl Curvature for Hessian {
    fn diagonal(&self) -> Result<Vec<f32>> {
        Ok(Self::diagonal(self).collect())
    }

    fn refine(&self, grid: AnyGrid, w: &[f32], codes: &mut [u8], parameters: &mut [f32], effort: Effort) -> Result<()> {
        match grid {
            AnyGrid::Codebook(grid) => refine(&grid, self, w, codes, parameters, effort),
            AnyGrid::Groups(grid) => refine(&grid, self, w, codes, parameters, effort),
        };
        Ok(())
    }
}

impl Head for &LmHead<'_> {
    fn logits(&self, h: &Tensor) -> Result<Vec<f32>> {
        Ok(LmHead::logits(self, h.host()))
    }

    fn divergence(&self, truth: &[f32], h: &Tensor) -> Result<(f64, Vec<f32>)> {
        Ok(LmHead::divergence(self, truth, h.host()))
    }

    fn draw(&self, h: &Tensor, draws: &[f32]) -> Result<Vec<u32>> {
        let mut logits = LmHead::logits(self, h.host());
        let of_texts = logits.par_chunks_exact_mut(self.weight.out_features).zip(draws);
        of_texts.map(|(logits, &draw)| sample::draw_from(logits, draw)).collect()
    }
}
