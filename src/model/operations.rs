//! A token operation by operation, for clocks.

use anyhow::{Result, ensure};

use super::{Model, State};
use crate::backend::{DecodeBackend, Input};
use crate::config::Projection;

/// One operation of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The embedding's row.
    Embed,
    /// A projection of a layer, with the norm or activation before it.
    Project(usize, Projection),
    /// Attention of a layer.
    Attend(usize),
    /// All layers, fused as far as the backend does.
    Layers,
    /// The position, which stays where it is, so that a token can be repeated.
    Advance,
    /// The last norm and the head.
    Head,
    /// The choice of the next token.
    Sample,
}

impl<B: DecodeBackend> Model<'_, B> {
    /// The operations of a token in order, those of the layers apart.
    pub fn operations(&self) -> Vec<Operation> {
        let layer = |l| {
            let [qkv, o, gu, d] = Projection::ALL.map(|p| Operation::Project(l, p));
            [qkv, Operation::Attend(l), o, gu, d]
        };
        let layers = (0..self.layers.len()).flat_map(layer);
        let end = [Operation::Advance, Operation::Head, Operation::Sample];
        std::iter::once(Operation::Embed).chain(layers).chain(end).collect()
    }

    /// Queues one operation for the token that was chosen last; what it computes is for nobody.
    ///
    /// # Errors
    /// A state of another model or one on which an operation has failed, a layer that the model does not have, a text
    /// that no token was chosen for yet or that has no room for one more. Or what the device says.
    pub fn operate(&self, state: &mut State<B>, operation: Operation) -> Result<()> {
        self.own(state)?;
        state.goes_on()?;
        state.takes(1)?;
        let layers = self.layers.len();
        if let Operation::Project(l, _) | Operation::Attend(l) = operation {
            ensure!(l < layers, "layer {l}, the model has {layers}");
        }
        let chosen = usize::from(operation == Operation::Sample);
        if chosen > 0 {
            state.chooses()?;
        }
        state.grow(0, chosen, |state| self.queue(state, operation))
    }

    fn queue(&self, state: &mut State<B>, operation: Operation) -> Result<()> {
        let b = self.backend;
        let State { sequence, activations: a, logits, .. } = state;
        match operation {
            Operation::Embed => b.embed(sequence, &self.embedding, Input::Sampled, &mut a.h),
            Operation::Attend(l) => b.attend(sequence, l, &a.qkv, &mut a.attended, 1),
            Operation::Project(l, p) => {
                let layer = self.layers[l].operands(true);
                let (matrix, plan) = (layer.matrices[p.index()], layer.plans[p.index()]);
                match p {
                    Projection::Qkv => b.norm_gemv(layer.norms[0], matrix, plan, &a.h, &mut a.qkv, 1),
                    Projection::O => b.gemv_add(matrix, plan, &a.attended, &mut a.h, 1),
                    Projection::GateUp => b.norm_gemv(layer.norms[1], matrix, plan, &a.h, &mut a.gu, 1),
                    Projection::Down => b.swiglu_gemv_add(matrix, plan, &a.gu, &mut a.h, 1),
                }
            }
            Operation::Layers => {
                let layers: Vec<_> = self.layers.iter().map(|layer| layer.operands(true)).collect();
                b.layers(sequence, 0, &layers, a, 1)
            }
            Operation::Advance => b.advance(sequence, 0),
            Operation::Head => b.norm_gemv(&self.final_norm, self.head(), None, &a.h, logits, 1),
            Operation::Sample => b.sample(sequence, logits),
        }
    }
}
