//! A token operation by operation, for clocks.

use anyhow::{Result, ensure};

use super::{Model, State};
use crate::backend::{DecodeBackend, Input, Pass, Rows, perform};
use crate::config::Op;

/// One operation of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The embedding's row.
    Embed,
    /// One operation of a layer.
    Layer(usize, Op),
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
        let of_layer = |(l, layer): (usize, &super::Layer<B>)| {
            layer.program.iter().map(|&op| Operation::Layer(l, op)).collect::<Vec<_>>()
        };
        let layers = self.layers.iter().enumerate().flat_map(of_layer);
        let end = [Operation::Advance, Operation::Head, Operation::Sample];
        std::iter::once(Operation::Embed).chain(layers).chain(end).collect()
    }

    /// Queues one operation for the token that was chosen last; timed; the result is discarded.
    ///
    /// # Errors
    /// A state of another model or one on which an operation has failed, a layer that the model does not have, a text
    /// that no token was chosen for yet or that has no room for one more. Or what the device says.
    pub fn operate(&self, state: &mut State<B>, slot: usize, operation: Operation) -> Result<()> {
        self.own(state)?;
        state.goes_on(slot)?;
        state.takes(slot, 1)?;
        let layers = self.layers.len();
        if let Operation::Layer(l, _) = operation {
            ensure!(l < layers, "layer {l}, the model has {layers}");
        }
        let chosen = usize::from(operation == Operation::Sample);
        state.chooses(slot, chosen)?;
        state.grow(&[(slot, 0, chosen)], |state| self.queue(state, slot, operation))
    }

    fn queue(&self, state: &mut State<B>, slot: usize, operation: Operation) -> Result<()> {
        let (b, position) = (self.backend, state.len(slot));
        let rows = |count| [Rows { slot, position, count }];
        let one = rows(1);
        let pass = Pass { rows: &one, compensated: 1 };
        let State { cache, activations: a, logits, .. } = state;
        match operation {
            Operation::Embed => b.embed(cache, &one, (&self.embedding, self.embedding_scale), Input::Sampled, &mut a.h),
            Operation::Layer(l, op) => perform(b, cache, pass, (l, &self.layers[l].operands(true)), op, a),
            Operation::Layers => {
                let layers: Vec<_> = self.layers.iter().map(|layer| layer.operands(true)).collect();
                b.layers(cache, pass, 0, &layers, a)
            }
            Operation::Advance => b.advance(cache, &rows(0)),
            Operation::Head => self.say(&a.h, logits, 1),
            Operation::Sample => b.sample(cache, &[slot], logits),
        }
    }
}
