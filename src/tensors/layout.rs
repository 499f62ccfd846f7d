//! How the projections of a decoder are stored, and what makes one of them of its modules.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};

use super::{Expected, Module, TensorSet, modules};
use crate::config::{ModelConfig, Projection};
use crate::format::lutgemm::ensure_group_size;
use crate::format::{Floats, Format, Numbers, Residual, Size, Storage, Tensor, threshold};
use crate::weights::{Linear, Weight, tensors_of};

/// How projections are stored, the same in every layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// `None` for full precision.
    pub(crate) format: Option<Format>,
    /// Channels of a group; `None` also where the tensors tell.
    pub(crate) group_size: Option<usize>,
    /// As our own checkpoints are: every projection is one module, and rows and norms are as the decoder has them.
    /// Elsewhere the modules are told by the tensors that are there.
    pub(crate) own: bool,
    /// Residuals and thresholds are there.
    pub(crate) compensated: bool,
}

impl Layout {
    /// Full precision.
    pub(crate) const FULL: Self = Self { format: None, group_size: None, own: false, compensated: false };

    /// As our own checkpoints are.
    pub(crate) fn of_checkpoint(storage: Storage, compensated: bool) -> Self {
        Self { format: Some(storage.format), group_size: storage.group_size, own: true, compensated }
    }

    /// One projection of `layer`, whose codes have `bits`.
    pub(crate) fn linear<'a>(
        &self,
        set: &'a dyn TensorSet,
        config: &ModelConfig,
        (layer, projection): (usize, Projection),
        bits: u32,
    ) -> Result<Linear<'a>> {
        let modules = |suffix| self.modules(set, config, (layer, projection), suffix);
        let parts = modules(self.described()[0].suffix);
        let size = self.size(set, config, (layer, projection), bits)?;
        let stored = parts.iter().map(|module| Ok(set.weight(module, self.format, &size)?.into_iter()));
        let mut stored = stored.collect::<Result<Vec<_>>>()?;
        let join = |tensor: &Tensor| tensor.join(&size, stored.iter_mut().filter_map(Iterator::next).collect());
        let tensors: Vec<Numbers<'a>> = self.described().iter().map(join).collect();
        let of_projection = || format!("layer {layer}: {projection}");
        let weight = Weight::from_tensors(self.format, size, tensors).with_context(of_projection)?;
        let mut linear = Linear { bias: bias(set, &parts)?, ..Linear::plain(weight) };
        if self.compensated {
            let [words, scales] = set.residual(&modules(Tensor::RESIDUAL.suffix), &size)?;
            let (words, scales) = (words.into_words(), scales.into_floats());
            let residual = Residual::new(size.in_features, size.out_features, words, scales);
            linear.residual = Some(residual.with_context(of_projection)?);
            // Modules that are fused see the same input, so that all of them hold the same thresholds.
            let name = modules(Tensor::THRESHOLDS.suffix)[0].tensor(Tensor::THRESHOLDS.suffix);
            let thresholds = set.floats(&name)?.into_f32();
            threshold::validate(&thresholds, size.in_features).with_context(|| name)?;
            linear.thresholds = Some(thresholds);
        }
        match config.row_order(layer, projection, set.pairing()).filter(|_| !self.own) {
            Some(order) => linear.reordered(&order),
            None => Ok(linear),
        }
    }

    /// What has to be there for a projection; `biased` tells whether a bias has to be, or must not.
    pub(crate) fn expected(
        &self,
        set: &dyn TensorSet,
        config: &ModelConfig,
        (layer, projection): (usize, Projection),
        bits: u32,
        biased: Option<bool>,
    ) -> Result<Vec<Expected>> {
        let size = self.size(set, config, (layer, projection), bits)?;
        let modules = |suffix| self.modules(set, config, (layer, projection), suffix);
        let mut all = Vec::new();
        for module in modules(self.described()[0].suffix) {
            all.extend(set.expected(&module, self.format, &size)?);
            let bias = module.expected(&Tensor::BIAS, &size);
            let is_there = set.contains(&bias.name);
            ensure!(
                !is_there || biased != Some(false),
                "tensor {} is there, the configuration asks for none",
                bias.name
            );
            if is_there || biased == Some(true) {
                all.push(bias);
            }
        }
        if self.compensated {
            for module in modules(Tensor::RESIDUAL.suffix) {
                let rows = module.rows;
                ensure!(rows.is_multiple_of(8), "{} has {rows} rows, a multiple of 8 is expected", module.name);
                all.extend([&Tensor::RESIDUAL, &Tensor::SCALES].map(|tensor| module.expected(tensor, &size)));
            }
            let thresholds = modules(Tensor::THRESHOLDS.suffix);
            all.extend(thresholds.iter().map(|module| module.expected(&Tensor::THRESHOLDS, &size)));
        }
        Ok(all)
    }

    fn described(&self) -> &'static [Tensor] {
        tensors_of(self.format)
    }

    /// The modules of a projection, told by which have a tensor `suffix`.
    fn modules(
        &self,
        set: &dyn TensorSet,
        config: &ModelConfig,
        (layer, projection): (usize, Projection),
        suffix: &str,
    ) -> Vec<Module> {
        modules(config, layer, projection, |whole| self.own || set.contains(&whole.tensor(suffix)))
    }

    /// What shapes follow from.
    fn size(
        &self,
        set: &dyn TensorSet,
        config: &ModelConfig,
        (layer, projection): (usize, Projection),
        bits: u32,
    ) -> Result<Size> {
        let (in_features, out_features) = config.shape(layer, projection);
        if self.format.is_some() {
            ensure!(
                in_features.is_multiple_of(32),
                "{projection}: {in_features} channels, a multiple of 32 is expected"
            );
        }
        let mut group_size = self.group_size;
        if let (Some(format), None) = (self.format, group_size)
            && format.is_grouped()
        {
            let first = &self.modules(set, config, (layer, projection), format.tensors()[0].suffix)[0];
            group_size = set.group_size(first, in_features)?;
        }
        if let Some(group_size) = group_size {
            ensure_group_size(in_features, group_size)?;
        }
        Ok(Size { in_features, out_features, bits: bits as usize, group_size })
    }
}

/// The biases of all modules; zeros where only some have one.
fn bias<'a>(set: &'a dyn TensorSet, modules: &[Module]) -> Result<Option<Cow<'a, [f32]>>> {
    let names: Vec<String> = modules.iter().map(|module| module.tensor(Tensor::BIAS.suffix)).collect();
    if !names.iter().any(|name| set.contains(name)) {
        return Ok(None);
    }
    let parts = modules.iter().zip(&names).map(|(module, name)| {
        let stored = if set.contains(name) { set.floats(name)? } else { vec![0f32; module.rows].into() };
        Ok(Numbers::Floats(Floats::F32(stored.into_f32())))
    });
    let size = Size { in_features: 0, out_features: 0, bits: 0, group_size: None };
    let joined = Tensor::BIAS.join(&size, parts.collect::<Result<_>>()?);
    Ok(Some(joined.into_floats().into_f32()))
}
