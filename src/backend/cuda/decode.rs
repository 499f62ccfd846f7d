//! A whole token on a GPU: operation by operation, whole layers where they fuse, and recorded for replay.

use std::time::Instant;

use anyhow::Result;

use super::driver::{Arguments, Launch};
use super::failure::Refused;
use super::graph;
use super::matrix::{Body, Format, Matrix};
use super::product::Feed;
use super::sequence::Sequence;
use super::vector::Vector;
use super::{Cuda, Scratch};
use crate::backend::{Activations, DecodeBackend, Input, LayerOperands, Norm, Product, one_by_one};
use crate::config::{Attention, ModelConfig};
use crate::sampling::Sampling;

/// The recorded operations of one token.
pub struct Graph(Recorded);

enum Recorded {
    /// Ran once, so that everything is compiled and allocated; not yet recorded.
    Warm,
    Ready(graph::Graph),
}

impl DecodeBackend for Cuda {
    type Sequence = Sequence;
    type Graph = Graph;

    fn sequence(&self, config: &ModelConfig, max_seq_len: usize) -> Result<Sequence> {
        Sequence::new(self, config, max_seq_len)
    }

    fn begin(&self, sequence: &mut Sequence, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        sequence.begin(self, sampling, draws)
    }

    fn recall(&self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        sequence.recall(tokens)
    }

    fn embed(&self, sequence: &Sequence, table: &Matrix, scale: f32, input: Input<'_>, h: &mut Vector) -> Result<()> {
        let (at, kind) = match &table.body {
            Body::Packed { format: Format::Dense, codes, .. } => (codes.pointer(), 0i32),
            Body::Any { values, kind: 2, .. } => (values.pointer(), 2),
            _ => anyhow::bail!("cuda: a quantized embedding, only full precision is supported"),
        };
        let (ids, tokens) = match input {
            Input::Sampled => (0, 1),
            Input::Prompt(tokens) => {
                let ids = self.scratch(Scratch::Ids, self.device.max_tokens * 4)?;
                ids.write(0, tokens)?;
                (ids.pointer(), tokens.len())
            }
        };
        h.settle();
        let (features, rows) = (table.in_features as i32, table.out_features as u32);
        let (state, to) = (sequence.state.pointer(), h.at());
        let launch = Launch { grid: (table.in_features.div_ceil(256), tokens, 1), ..Launch::new(1, 256) };
        self.driver.launch(
            &self.kernel("rows.cu", "embed", &[])?,
            launch,
            &mut Arguments::new()
                .with(&at)
                .with(&kind)
                .with(&features)
                .with(&rows)
                .with(&scale)
                .with(&ids)
                .with(&state)
                .with(&to),
        )
    }

    fn project(&self, product: &Product<'_, Self>, x: &Vector, y: &mut Vector, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, add } = *product;
        match feed {
            crate::backend::Feed::Plain => self.product(Feed::Plain, matrix, plan, (x.at(), x.delta()), y, tokens, add),
            crate::backend::Feed::Norm(norm) => {
                self.product(Feed::Norm(norm), matrix, plan, (x.at(), x.delta()), y, tokens, add)
            }
            crate::backend::Feed::Gated(activation) => self.gated_product(activation, matrix, plan, x, y, tokens, add),
        }
    }

    fn norm_qk(
        &self,
        sequence: &Sequence,
        layer: usize,
        [query, key]: [&Norm<Vector>; 2],
        qkv: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *sequence.cache.attention(layer);
        let (queries, keys) = (num_heads * head_dim, num_kv_heads * head_dim);
        let (at, delta) = (qkv.at(), qkv.delta());
        let stretches = queries / query.len + keys / key.len + usize::from(delta != 0);
        let (query_at, key_at) = (query.gamma.at(), key.gamma.at());
        let [queries, keys, query_len, key_len] = [queries, keys, query.len, key.len].map(|len| len as i32);
        self.driver.launch(
            &self.kernel("rows.cu", "norm_qk", &[])?,
            Launch { grid: (stretches, tokens, 1), ..Launch::new(1, 256) },
            &mut Arguments::new()
                .with(&at)
                .with(&delta)
                .with(&query_at)
                .with(&key_at)
                .with(&queries)
                .with(&keys)
                .with(&query_len)
                .with(&key_len)
                .with(&query.eps)
                .with(&key.eps),
        )?;
        qkv.settle();
        Ok(())
    }

    fn add_norm(&self, norm: &Norm<Vector>, branch: &Vector, h: &mut Vector, tokens: usize) -> Result<()> {
        let (at, delta, gamma) = (branch.at(), branch.delta(), norm.gamma.at());
        let (features, to, h_delta) = (norm.len as i32, h.at(), h.delta());
        self.driver.launch(
            &self.kernel("rows.cu", "add_norm", &[])?,
            Launch { grid: (norm.len.div_ceil(1024), tokens, 1), ..Launch::new(1, 256) },
            &mut Arguments::new()
                .with(&at)
                .with(&delta)
                .with(&gamma)
                .with(&norm.eps)
                .with(&features)
                .with(&to)
                .with(&h_delta),
        )?;
        h.settle();
        Ok(())
    }

    fn softcap(&self, cap: f32, logits: &mut Vector, count: usize) -> Result<()> {
        let (at, delta, numbers) = (logits.at(), logits.delta(), count as i64);
        self.driver.launch(
            &self.kernel("rows.cu", "softcap", &[])?,
            Launch::new(count.div_ceil(256), 256),
            &mut Arguments::new().with(&at).with(&delta).with(&numbers).with(&cap),
        )?;
        logits.settle();
        Ok(())
    }

    fn attend(
        &self,
        sequence: &mut Sequence,
        layer: usize,
        qkv: &Vector,
        out: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        sequence.cache.attend(self, layer, &sequence.state, (qkv, out), tokens)
    }

    fn layers(
        &self,
        sequence: &mut Sequence,
        first: usize,
        layers: &[LayerOperands<'_, Self>],
        activations: &mut Activations<Self>,
        tokens: usize,
    ) -> Result<()> {
        let mut done = 0;
        while done < layers.len() {
            let rest = &layers[done..];
            let run = if tokens == 1 { self.run_of_layers(sequence, first + done, rest) } else { 0 };
            if run > 0 && self.fused_layers(sequence, first + done, &rest[..run], activations)? {
                done += run;
            } else {
                let run = run.max(1);
                one_by_one(self, sequence, first + done, &rest[..run], activations, tokens)?;
                done += run;
            }
        }
        Ok(())
    }

    fn layer_stamps(&self) -> Result<Vec<u64>> {
        self.timeline()
    }

    fn advance(&self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        sequence.advance(self, tokens)
    }

    fn last_row(&self, h: &Vector, len: usize, tokens: usize, last: &mut Vector) -> Result<()> {
        last.settle();
        let (from, delta, row, features, to) = (h.at(), h.delta(), tokens as i32 - 1, len as i32, last.at());
        self.driver.launch(
            &self.kernel("rows.cu", "copy_row", &[])?,
            Launch::new(len.div_ceil(256), 256),
            &mut Arguments::new().with(&from).with(&delta).with(&row).with(&features).with(&to),
        )
    }

    fn sample(&self, sequence: &mut Sequence, logits: &Vector) -> Result<()> {
        sequence.sample(self, logits)
    }

    fn sampled(&self, sequence: &Sequence, i: usize) -> Result<u32> {
        sequence.sampled(self, i)
    }

    fn prepare(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.driver.wait()?;
        let uploads = self.uploads.take();
        tracing::debug!("{uploads}");
        let start = Instant::now();
        self.driver.without_launches(work)?;
        let listed = start.elapsed();
        let count = self.kernels.compile(&self.driver, &self.compiler)?;
        tracing::debug!(
            "{count} kernel files: listed in {listed:.2?}, compiled or read in {:.2?}",
            start.elapsed() - listed
        );
        Ok(())
    }

    fn replay(&self, graph: &mut Option<Graph>, token: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.options.compile < 2 {
            return token();
        }
        match graph {
            None => {
                token()?;
                *graph = Some(Graph(Recorded::Warm));
                Ok(())
            }
            Some(Graph(Recorded::Warm)) => {
                let together = self.together.get();
                let recorded = self.driver.capture(token).and_then(|graph| graph.launch().map(|()| graph));
                match recorded {
                    Ok(recorded) => *graph = Some(Graph(Recorded::Ready(recorded))),
                    // A launch that is refused may end the recording, which is begun again with the next token.
                    Err(error) if together && (error.is::<Refused>() || !self.together.get()) => {
                        self.go_one_by_one(&error);
                        token()?;
                    }
                    Err(error) => return Err(error),
                }
                Ok(())
            }
            Some(Graph(Recorded::Ready(recorded))) => match recorded.launch() {
                Err(error) if error.is::<Refused>() && self.together.get() => {
                    self.go_one_by_one(&error);
                    *graph = Some(Graph(Recorded::Warm));
                    token()
                }
                launched => launched,
            },
        }
    }
}
