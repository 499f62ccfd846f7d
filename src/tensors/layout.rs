//! How the projections of a decoder are stored, and what makes one of them of its modules.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};

use super::{Expected, Module, TensorSet, modules};
use crate::config::{ModelConfig, Projection};
use crate::format::lutgemm::ensure_group_size;
use crate::format::{Format, Numbers, Residual, Size, Storage, Tensor, threshold};
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
}

/// One projection of one layer, where it is stored.
pub(crate) struct Stored<'a, 'c> {
    pub(crate) set: &'a dyn TensorSet,
    pub(crate) config: &'c ModelConfig,
    pub(crate) layout: Layout,
    pub(crate) layer: usize,
    pub(crate) projection: Projection,
    /// Of a code; 0 in full precision.
    pub(crate) bits: u32,
}

impl<'a> Stored<'a, '_> {
    /// The modules' tensors, joined.
    pub(crate) fn linear(&self) -> Result<Linear<'a>> {
        let Self { set, layout, layer, projection, .. } = *self;
        let (size, modules) = (self.size()?, self.modules(self.described()[0]));
        let parts = modules.iter().map(|module| Ok(set.weight(module, layout.format, &size)?.into_iter()));
        let mut parts = parts.collect::<Result<Vec<_>>>()?;
        let join = |tensor: &Tensor| tensor.join(&size, parts.iter_mut().filter_map(Iterator::next).collect());
        let tensors = self.described().iter().map(join).collect();
        let of_projection = || format!("layer {layer}: {projection}");
        let weight = Weight::from_tensors(layout.format, size, tensors).with_context(of_projection)?;
        let mut linear = Linear { bias: bias(set, &modules, &size)?, ..Linear::plain(weight) };
        if layout.compensated {
            let [words, scales] = set.residual(&self.modules(Tensor::RESIDUAL), &size)?;
            let (words, scales) = (words.into_words(), scales.into_floats());
            let residual = Residual::new(size.in_features, size.out_features, words, scales);
            linear.residual = Some(residual.with_context(of_projection)?);
            // Modules that are fused see the same input, so that all of them hold the same thresholds.
            let name = self.modules(Tensor::THRESHOLDS)[0].tensor(Tensor::THRESHOLDS.suffix);
            let thresholds = set.thresholds(&name)?.into_f32();
            threshold::validate(&thresholds, size.in_features).with_context(|| name)?;
            linear.thresholds = Some(thresholds);
        }
        match self.config.row_order(layer, projection, set.pairing()).filter(|_| !layout.own) {
            Some(order) => linear.reordered(&order),
            None => Ok(linear),
        }
    }

    /// What has to be there; `biased` tells whether a bias has to be, or must not.
    pub(crate) fn expected(&self, biased: Option<bool>) -> Result<Vec<Expected>> {
        let Self { set, layout, .. } = *self;
        let (size, mut all) = (self.size()?, Vec::new());
        for module in self.modules(self.described()[0]) {
            all.extend(set.expected(&module, layout.format, &size)?);
            let bias = module.expected(&Tensor::BIAS, &size);
            let is_there = set.contains(&bias.name);
            ensure!(
                !is_there || biased != Some(false),
                "tensor {} is there, the configuration asks for none",
                bias.name
            );
            all.extend((is_there || biased == Some(true)).then_some(bias));
        }
        if layout.compensated {
            for module in self.modules(Tensor::RESIDUAL) {
                let rows = module.rows;
                ensure!(rows.is_multiple_of(8), "{} has {rows} rows, a multiple of 8 is expected", module.name);
                all.extend([Tensor::RESIDUAL, Tensor::SCALES].map(|tensor| module.expected(&tensor, &size)));
            }
            let thresholds = self.modules(Tensor::THRESHOLDS);
            all.extend(thresholds.iter().map(|module| module.expected(&Tensor::THRESHOLDS, &size)));
        }
        Ok(all)
    }

    fn described(&self) -> &'static [Tensor] {
        tensors_of(self.layout.format)
    }

    /// The modules of the projection, told by which have this tensor.
    fn modules(&self, tensor: Tensor) -> Vec<Module> {
        let is_there = |whole: &Module| self.layout.own || self.set.contains(&whole.tensor(tensor.suffix));
        modules(self.config, self.layer, self.projection, is_there)
    }

    /// What shapes follow from.
    fn size(&self) -> Result<Size> {
        let (in_features, out_features) = self.config.shape(self.layer, self.projection);
        let bits = self.bits as usize;
        let Layout { format: Some(format), mut group_size, .. } = self.layout else {
            return Ok(Size { in_features, out_features, bits, group_size: None });
        };
        let projection = self.projection;
        ensure!(in_features.is_multiple_of(32), "{projection}: {in_features} channels, a multiple of 32 is expected");
        if format.is_grouped() && group_size.is_none() {
            group_size = self.set.group_size(&self.modules(self.described()[0])[0], in_features)?;
        }
        if let Some(group_size) = group_size {
            ensure_group_size(in_features, group_size)?;
        }
        Ok(Size { in_features, out_features, bits, group_size })
    }
}

/// The biases of all modules; zeros where only some have one.
fn bias<'a>(set: &'a dyn TensorSet, modules: &[Module], size: &Size) -> Result<Option<Cow<'a, [f32]>>> {
    let names: Vec<String> = modules.iter().map(|module| module.tensor(Tensor::BIAS.suffix)).collect();
    if !names.iter().any(|name| set.contains(name)) {
        return Ok(None);
    }
    let parts = modules.iter().zip(&names).map(|(module, name)| {
        Ok(Numbers::Floats(if set.contains(name) { set.floats(name)? } else { vec![0f32; module.rows].into() }))
    });
    let joined = Tensor::BIAS.join(size, parts.collect::<Result<_>>()?);
    Ok(Some(joined.into_floats().into_f32()))
}
