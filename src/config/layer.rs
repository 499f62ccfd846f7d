//! One decoder layer: what it is made of, and the operations that it runs.
//!
//! Some of what families do differently needs no operation of its own, since numbers take it in when a model is read:
//! norms that multiply by `1 + w` (the vector is kept as `1 + w`), a multiplier of what layers add
//! ([`ModelConfig::residual_multiplier`](super::ModelConfig::residual_multiplier)), rotation of a part of a head or of
//! neighbouring channels ([`Rope`](super::Rope)).

use super::Projection;

/// One decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// What tokens learn from each other by.
    pub mixer: Mixer,
    /// What each token is worked on by alone.
    pub feed_forward: FeedForward,
    /// Where both have their norms.
    pub norms: NormPlacement,
}

/// The part of a layer in which tokens meet.
#[derive(Debug, Clone, PartialEq)]
pub enum Mixer {
    /// Softmax attention.
    Attention(Attention),
}

/// Causal attention of grouped queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Which of [`ModelConfig::ropes`](super::ModelConfig::ropes) rotates queries and keys; `None` rotates nothing.
    pub rope: Option<usize>,
    /// A token sees at most this many of the latest tokens, itself included.
    pub window: Option<usize>,
    /// RMSNorm of queries and keys before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// What `q·k` is multiplied by.
    pub scale: f64,
    /// `s` becomes `cap · tanh(s / cap)`, after `scale` and before the softmax.
    pub softcap: Option<f64>,
    /// What queries are multiplied by besides, far into a text.
    pub query_scaling: Option<QueryScaling>,
}

/// How far a norm of queries and keys reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QkNorm {
    /// Over each head, by one vector `[head_dim]` for all of them.
    PerHead,
    /// Over all heads together, by `[num_heads · head_dim]` for queries and `[num_kv_heads · head_dim]` for keys.
    WholeRow,
}

/// Queries grow with their position: `1 + beta · ln(1 + ⌊position / original⌋)` (Llama 4, Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    /// How fast they grow.
    pub beta: f64,
    /// The context of the first training, in tokens.
    pub original: usize,
}

/// The part of a layer that works on each token alone.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    /// `down · (activation(gate) ⊙ up)`.
    Dense {
        /// Width between gate-up and down.
        intermediate_size: usize,
        /// What gate goes through.
        activation: Activation,
    },
}

/// What gate goes through before it multiplies up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
    /// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`, the approximation of GELU that PyTorch calls `tanh`.
    GeluTanh,
}

/// Where attention and feed-forward have their norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before each: `h += f(norm(h))`.
    Before,
    /// After each: `h += norm(f(h))`.
    After,
    /// Both: `h += norm(f(norm(h)))`.
    Both,
}

/// The norms that a layer may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerNorm {
    /// Of what enters attention.
    AttentionInput,
    /// Of queries.
    Query,
    /// Of keys.
    Key,
    /// Of what attention puts out.
    AttentionOutput,
    /// Of what enters feed-forward.
    FeedForwardInput,
    /// Of what feed-forward puts out.
    FeedForwardOutput,
}

/// The constants of GELU's approximation (Hendrycks and Gimpel 2016).
const TWO_ROOT_2_OVER_PI: f32 = 1.595_769_2;
const CUBIC: f32 = 0.044_715;

impl LayerNorm {
    /// All of them, in the order of a layer.
    pub const ALL: [Self; 6] = [
        Self::AttentionInput,
        Self::Query,
        Self::Key,
        Self::AttentionOutput,
        Self::FeedForwardInput,
        Self::FeedForwardOutput,
    ];

    /// Position in [`LayerNorm::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// One operation of a layer. `h` is the residual stream, `[hidden_size]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// `y = W·x + bias`.
    Project {
        /// The matrix.
        projection: Projection,
        /// What `x` is made of.
        reads: Reads,
        /// Where `y` goes.
        writes: Writes,
    },
    /// RMSNorm of queries and keys, in place.
    NormQk(QkNorm),
    /// Rotates queries and keys, appends keys and values to the cache, attends.
    Attend,
    /// `h += norm(branch) · γ`.
    AddNormed(LayerNorm),
}

/// What enters a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reads {
    /// The residual stream, through this norm if there is one.
    Stream(Option<LayerNorm>),
    /// What attention put out.
    Attended,
    /// `activation(gate) ⊙ up`.
    Gated(Activation),
}

/// Where the output of a projection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Writes {
    /// Overwrites queries, keys and values.
    Qkv,
    /// Overwrites gate and up.
    GateUp,
    /// Is added to the residual stream.
    Stream,
    /// Overwrites a vector `[hidden_size]` that a norm follows.
    Branch,
}

impl LayerConfig {
    /// The attention of this layer.
    pub fn attention(&self) -> &Attention {
        let Mixer::Attention(attention) = &self.mixer;
        attention
    }

    /// Width between gate-up and down.
    pub fn intermediate_size(&self) -> usize {
        let FeedForward::Dense { intermediate_size, .. } = self.feed_forward;
        intermediate_size
    }

    /// What the layer computes, in order: what decoding, timing and quantization all read.
    pub fn program(&self) -> Vec<Op> {
        use LayerNorm::{AttentionInput, AttentionOutput, FeedForwardInput, FeedForwardOutput};
        let FeedForward::Dense { activation, .. } = self.feed_forward;
        let (before, after) = (self.norms != NormPlacement::After, self.norms != NormPlacement::Before);
        let project = |projection, reads, writes| Op::Project { projection, reads, writes };
        let stream = |norm| Reads::Stream(before.then_some(norm));
        let out = if after { Writes::Branch } else { Writes::Stream };
        let mut ops = vec![project(Projection::Qkv, stream(AttentionInput), Writes::Qkv)];
        ops.extend(self.attention().qk_norm.map(Op::NormQk));
        ops.extend([Op::Attend, project(Projection::O, Reads::Attended, out)]);
        ops.extend(after.then_some(Op::AddNormed(AttentionOutput)));
        ops.push(project(Projection::GateUp, stream(FeedForwardInput), Writes::GateUp));
        ops.push(project(Projection::Down, Reads::Gated(activation), out));
        ops.extend(after.then_some(Op::AddNormed(FeedForwardOutput)));
        ops
    }

    /// What enters a projection.
    pub(crate) fn reads(&self, of: Projection) -> Reads {
        let reads = |op| match op {
            Op::Project { projection, reads, .. } if projection == of => Some(reads),
            _ => None,
        };
        self.program().into_iter().find_map(reads).expect("a program has every projection")
    }

    /// The norm of the residual stream that feeds a projection, if one does.
    pub(crate) fn norm_before(&self, projection: Projection) -> Option<LayerNorm> {
        if let Reads::Stream(norm) = self.reads(projection) { norm } else { None }
    }

    /// The norms of this layer and their lengths, `hidden_size` that of the residual stream.
    pub fn norms(&self, hidden_size: usize) -> Vec<(LayerNorm, usize)> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *self.attention();
        let mut norms = Vec::new();
        for op in self.program() {
            match op {
                Op::Project { reads: Reads::Stream(Some(norm)), .. } | Op::AddNormed(norm) => {
                    norms.push((norm, hidden_size));
                }
                Op::NormQk(QkNorm::PerHead) => {
                    norms.extend([(LayerNorm::Query, head_dim), (LayerNorm::Key, head_dim)]);
                }
                Op::NormQk(QkNorm::WholeRow) => {
                    norms.extend([(LayerNorm::Query, num_heads * head_dim), (LayerNorm::Key, num_kv_heads * head_dim)])
                }
                Op::Project { .. } | Op::Attend => {}
            }
        }
        norms
    }
}

impl LayerConfig {
    /// The length of one of the norms of this layer; 0 of one that it does not have.
    pub(crate) fn norm_len(&self, norm: LayerNorm, hidden_size: usize) -> usize {
        self.norms(hidden_size).into_iter().find(|(own, _)| *own == norm).map_or(0, |(_, len)| len)
    }
}

impl Attention {
    /// Rows of queries, keys and values.
    pub fn qkv_rows(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// What the scores of a query at `position` are multiplied by.
    pub fn scale_at(&self, position: usize) -> f64 {
        self.scale * self.query_scaling.map_or(1.0, |scaling| scaling.at(position))
    }
}

impl QueryScaling {
    /// The factor of a query at `position`.
    pub fn at(&self, position: usize) -> f64 {
        1.0 + self.beta * (1.0 + (position / self.original) as f64).ln()
    }
}

impl Activation {
    /// Of one number: `x / (1 + e^−z)`, see [`Activation::exponent`].
    pub fn of(self, x: f32) -> f32 {
        x / (1.0 + (-self.exponent(x)).exp())
    }

    /// `z` of `x / (1 + e^−z)`, which every activation is: `x` itself, or `2·√(2/π)·(x + 0.044715·x³)`, since
    /// `(1 + tanh u) / 2 = 1 / (1 + e^−2u)`.
    #[inline(always)]
    pub fn exponent(self, x: f32) -> f32 {
        match self {
            Self::Silu => x,
            Self::GeluTanh => TWO_ROOT_2_OVER_PI * (x + CUBIC * x * x * x),
        }
    }

    /// The derivative of [`Activation::exponent`].
    #[inline(always)]
    pub fn exponent_slope(self, x: f32) -> f32 {
        match self {
            Self::Silu => 1.0,
            Self::GeluTanh => TWO_ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(norms: NormPlacement, qk_norm: Option<QkNorm>) -> LayerConfig {
        let attention = Attention {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 8,
            rope: Some(0),
            window: None,
            qk_norm,
            scale: 0.5,
            softcap: None,
            query_scaling: None,
        };
        let feed_forward = FeedForward::Dense { intermediate_size: 48, activation: Activation::Silu };
        LayerConfig { mixer: Mixer::Attention(attention), feed_forward, norms }
    }

    /// Each projection once and in order; every branch ends in the stream, once.
    #[test]
    fn programs_are_whole() {
        for norms in [NormPlacement::Before, NormPlacement::After, NormPlacement::Both] {
            for qk_norm in [None, Some(QkNorm::PerHead), Some(QkNorm::WholeRow)] {
                let layer = layer(norms, qk_norm);
                let ops = layer.program();
                let projections: Vec<_> = ops
                    .iter()
                    .filter_map(|op| if let Op::Project { projection, .. } = op { Some(*projection) } else { None })
                    .collect();
                assert_eq!(projections, Projection::ALL);
                let ends =
                    ops.iter().filter(|op| matches!(op, Op::Project { writes: Writes::Stream, .. } | Op::AddNormed(_)));
                assert_eq!(ends.count(), 2, "{norms:?}");
                let branches = ops.iter().filter(|op| matches!(op, Op::Project { writes: Writes::Branch, .. })).count();
                assert_eq!(branches, if norms == NormPlacement::Before { 0 } else { 2 });
                let own: Vec<_> = layer.norms(32).into_iter().map(|(norm, _)| norm).collect();
                let count = if norms == NormPlacement::Both { 4 } else { 2 } + if qk_norm.is_some() { 2 } else { 0 };
                assert_eq!(own.len(), count);
                assert!(own.is_sorted(), "{own:?}");
            }
        }
        let lengths: Vec<_> =
            layer(NormPlacement::After, Some(QkNorm::WholeRow)).norms(32).iter().map(|n| n.1).collect();
        assert_eq!(lengths, [32, 16, 32, 32]);
    }

    #[test]
    fn queries_grow_in_steps() {
        let scaling = QueryScaling { beta: 0.1, original: 16 };
        assert_eq!((scaling.at(0), scaling.at(15)), (1.0, 1.0));
        assert_eq!(scaling.at(16), 1.0 + 0.1 * 2f64.ln());
        assert_eq!(scaling.at(47), 1.0 + 0.1 * 3f64.ln());
    }
}
