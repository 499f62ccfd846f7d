//! A whole token on a GPU: operation by operation, whole layers where they fuse, and recorded for replay.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::buffer::Buffer;
use super::driver::{Arguments, Launch};
use super::failure::Refused;
use super::graph;
use super::matrix::{Body, Format, Matrix};
use super::product::Feed;
use super::sequence::Cache;
use super::vector::Vector;
use super::{Cuda, Scratch};
use crate::backend::{
    Activations, DecodeBackend, Input, KvBits, LayerOperands, Norm, Pass, Product, Rows, numbered, one_by_one,
};
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
    type Cache = Cache;
    /// By the slots whose tokens they make.
    type Graphs = HashMap<Vec<usize>, Graph>;

    fn cache(&self, config: &ModelConfig, slots: usize, max_seq_len: usize, bits: KvBits) -> Result<Cache> {
        ensure!(
            bits == KvBits::Whole,
            "cuda: --kv-bits 8, only 16 are supported here, leave it out or use --device cpu"
        );
        Cache::new(config, slots, max_seq_len)
    }

    fn begin(&self, cache: &mut Cache, slot: usize, sampling: &Sampling, draws: &[f32]) -> Result<()> {
        cache.begin(self, slot, sampling, draws)
    }

    fn cut(&self, cache: &mut Cache, slot: usize, tokens: usize, sampled: usize) -> Result<()> {
        cache.text(slot)?.cut(self, tokens, sampled)
    }

    fn embed(
        &self,
        cache: &Cache,
        rows: &[Rows],
        (table, scale): (&Matrix, f32),
        input: Input<'_>,
        h: &mut Vector,
    ) -> Result<()> {
        h.settle();
        let first = rows.first().map_or(0, |rows| rows.slot);
        match input {
            Input::Tokens(tokens) => {
                let ids = self.scratch(Scratch::Ids, self.device.max_tokens * 4)?;
                ids.write(0, tokens)?;
                self.embed_at((table, scale), ids.pointer(), &cache.text(first)?.state, h.at(), tokens.len())
            }
            Input::Sampled => numbered(rows).try_for_each(|(row, Rows { slot, .. })| {
                let to = h.at() + (row * table.in_features * 4) as u64;
                self.embed_at((table, scale), 0, &cache.text(slot)?.state, to, 1)
            }),
        }
    }

    fn project(&self, product: &Product<'_, Self>, x: &Vector, y: &mut Vector, tokens: usize) -> Result<()> {
        let Product { feed, matrix, plan, compensated, add } = *product;
        let plan = plan.map(|plan| (plan, compensated));
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
        cache: &Cache,
        layer: usize,
        [query, key]: [&Norm<Vector>; 2],
        qkv: &mut Vector,
        tokens: usize,
    ) -> Result<()> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *cache.attention(layer);
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

    fn attend(&self, cache: &mut Cache, layer: usize, rows: &[Rows], qkv: &Vector, out: &mut Vector) -> Result<()> {
        numbered(rows).try_for_each(|(first, Rows { slot, count, .. })| {
            let text = cache.text(slot)?;
            text.cache.attend(self, layer, &text.state, (qkv, out), (first, count))
        })
    }

    fn layers(
        &self,
        cache: &mut Cache,
        pass: Pass<'_>,
        first: usize,
        layers: &[LayerOperands<'_, Self>],
        activations: &mut Activations<Self>,
    ) -> Result<()> {
        let mut done = 0;
        while done < layers.len() {
            let rest = &layers[done..];
            let run = match pass.rows {
                [Rows { slot, count: 1, .. }] => {
                    let text = cache.text(*slot)?;
                    let run = self.run_of_layers(text, first + done, rest);
                    if run > 0 && self.fused_layers(text, first + done, &rest[..run], activations)? {
                        done += run;
                        continue;
                    }
                    run
                }
                _ => 0,
            };
            let run = run.max(1);
            one_by_one(self, cache, pass, first + done, &rest[..run], activations)?;
            done += run;
        }
        Ok(())
    }

    fn fuses_layers(&self) -> bool {
        self.options.compile > 0
    }

    fn layer_stamps(&self) -> Result<Vec<u64>> {
        self.timeline()
    }

    fn advance(&self, cache: &mut Cache, rows: &[Rows]) -> Result<()> {
        rows.iter().try_for_each(|rows| cache.text(rows.slot)?.advance(self, rows.count))
    }

    fn gather(&self, from: &Vector, len: usize, which: &[usize], to: &mut Vector) -> Result<()> {
        to.settle();
        let (at, delta, features) = (from.at(), from.delta(), len as i32);
        which.iter().enumerate().try_for_each(|(i, &row)| {
            let (row, to) = (row as i32, to.at() + (i * len * 4) as u64);
            self.driver.launch(
                &self.kernel("rows.cu", "copy_row", &[])?,
                Launch::new(len.div_ceil(256), 256),
                &mut Arguments::new().with(&at).with(&delta).with(&row).with(&features).with(&to),
            )
        })
    }

    fn sample(&self, cache: &mut Cache, slots: &[usize], logits: &Vector) -> Result<()> {
        slots.iter().enumerate().try_for_each(|(row, &slot)| cache.text(slot)?.sample(self, logits, row))
    }

    fn sampled(&self, cache: &Cache, slot: usize, i: usize) -> Result<u32> {
        cache.text(slot)?.sampled(self, i)
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

    fn replay(
        &self,
        graphs: &mut HashMap<Vec<usize>, Graph>,
        rows: &[Rows],
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        if self.options.compile < 2 {
            return work();
        }
        let slots: Vec<_> = rows.iter().map(|rows| rows.slot).collect();
        match graphs.get(&slots) {
            None => {
                work()?;
                graphs.insert(slots, Graph(Recorded::Warm));
                Ok(())
            }
            Some(Graph(Recorded::Warm)) => {
                let together = self.together.get();
                let recorded = self.driver.capture(work).and_then(|graph| graph.launch().map(|()| graph));
                match recorded {
                    Ok(recorded) => {
                        graphs.insert(slots, Graph(Recorded::Ready(recorded)));
                    }
                    // A launch that is refused may end the recording, which is begun again with the next token.
                    Err(error) if together && (error.is::<Refused>() || !self.together.get()) => {
                        self.go_one_by_one(&error);
                        work()?;
                    }
                    Err(error) => return Err(error),
                }
                Ok(())
            }
            Some(Graph(Recorded::Ready(recorded))) => match recorded.launch() {
                Err(error) if error.is::<Refused>() && self.together.get() => {
                    self.go_one_by_one(&error);
                    graphs.insert(slots, Graph(Recorded::Warm));
                    work()
                }
                launched => launched,
            },
        }
    }
}

impl Cuda {
    /// Embeds `tokens` tokens: those of `ids`, or (0) the one that `state` says was sampled last.
    fn embed_at(&self, (table, scale): (&Matrix, f32), ids: u64, state: &Buffer, to: u64, tokens: usize) -> Result<()> {
        let (at, kind) = match &table.body {
            Body::Packed { format: Format::Dense, codes, .. } => (codes.pointer(), 0i32),
            Body::Any { values, kind: 2, .. } => (values.pointer(), 2),
            _ => anyhow::bail!("cuda: a quantized embedding, only full precision is supported"),
        };
        let (features, rows, state) = (table.in_features as i32, table.out_features as u32, state.pointer());
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
}
