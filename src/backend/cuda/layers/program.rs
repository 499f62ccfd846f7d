//! Which programs of layers `layers.cu` computes, and what it is compiled with for them.

use crate::backend::kernels;
use crate::config::{Activation, LayerNorm, Op, Projection, QkNorm, Reads, Writes};

/// What a program is made of: constants of `layers.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Program {
    /// Attention and feed-forward have a norm before them.
    before: bool,
    /// And one after.
    after: bool,
    qk_norm: Option<QkNorm>,
    activation: Activation,
}

impl Program {
    /// The program of these operations, if `layers.cu` computes them.
    pub(super) fn of(ops: &[Op]) -> Option<Self> {
        let activation = ops.iter().find_map(|op| match op {
            Op::Project { reads: Reads::Gated(activation), .. } => Some(*activation),
            _ => None,
        })?;
        let program = Self {
            before: ops.iter().any(|op| matches!(op, Op::Project { reads: Reads::Stream(Some(_)), .. })),
            after: ops.iter().any(|op| matches!(op, Op::AddNormed(_))),
            qk_norm: ops.iter().find_map(|op| if let Op::NormQk(norm) = op { Some(*norm) } else { None }),
            activation,
        };
        (program.ops() == ops).then_some(program)
    }

    /// What `layers.cu` does, in order.
    fn ops(self) -> Vec<Op> {
        let project = |projection, reads, writes| Op::Project { projection, reads, writes };
        let stream = |norm| Reads::Stream(self.before.then_some(norm));
        let branch = if self.after { Writes::Branch } else { Writes::Stream };
        let add = |norm| self.after.then_some(Op::AddNormed(norm));
        let mut ops = vec![project(Projection::Qkv, stream(LayerNorm::AttentionInput), Writes::Qkv)];
        ops.extend(self.qk_norm.map(Op::NormQk));
        ops.extend([Op::Attend, project(Projection::O, Reads::Attended, branch)]);
        ops.extend(add(LayerNorm::AttentionOutput));
        ops.push(project(Projection::GateUp, stream(LayerNorm::FeedForwardInput), Writes::GateUp));
        ops.push(project(Projection::Down, Reads::Gated(self.activation), branch));
        ops.extend(add(LayerNorm::FeedForwardOutput));
        ops
    }

    /// Its constants.
    pub(super) fn defines(self) -> [String; 4] {
        let qk_norm = match self.qk_norm {
            None => 0,
            Some(QkNorm::PerHead) => 1,
            Some(QkNorm::WholeRow) => 2,
        };
        [
            format!("BEFORE={}", u8::from(self.before)),
            format!("AFTER={}", u8::from(self.after)),
            format!("QK_NORM={qk_norm}"),
            format!("ACTIVATION={}", kernels::activation(self.activation)),
        ]
    }
}
