//! Attention over whole texts: products by cuBLAS, heads or texts side by side, and the softmax between them.

use anyhow::Result;

use super::super::blas::{Operand, Precision};
use super::super::driver::Arguments;
use super::{Floats, Quantizer, blocks, of, wrap};
use crate::config::{Attention, LayerConfig};
use crate::quantize::compute::{Cache, Tensor};
use crate::quantize::forward::Ropes;
use crate::quantize::gpu::SCORES;

/// Keys and values of several texts in one layer.
pub(super) struct Kept {
    keys: Floats,   // [texts, capacity, num_kv_heads · head_dim]
    values: Floats, // the same
    capacity: usize,
    len: usize,
}

/// Products that are alike: the first of each starts so many numbers into queries (or what comes out), and keys.
struct Side {
    queries: usize,
    out: usize,
    keys: usize,
}

/// How many products go together, and how far apart they are.
struct Together {
    count: usize,
    queries: usize,
    out: usize,
    keys: usize,
}

/// Shapes of one layer's attention.
#[derive(Clone, Copy)]
struct Shape {
    d: usize,
    heads: usize,
    shared: usize,
    kv_dim: usize,
    q_dim: usize,
    width: usize,
}

impl Shape {
    fn of(attention: &Attention) -> Self {
        let Attention { num_heads: heads, num_kv_heads, head_dim: d, .. } = *attention;
        let (q_dim, kv_dim) = (heads * d, num_kv_heads * d);
        Self { d, heads, shared: heads / num_kv_heads, kv_dim, q_dim, width: q_dim + 2 * kv_dim }
    }

    /// Heads side by side for each text and query of a group, or texts side by side for each head: whichever makes fewer
    /// launches. Texts have `tokens` queries, and keys `key_rows` rows of `key_width` apart.
    fn sides(self, texts: usize, tokens: usize, key_text: usize) -> (Vec<Side>, Together) {
        let Self { d, heads, shared, q_dim, width, .. } = self;
        if texts * shared <= heads {
            let each = (0..texts).flat_map(|text| (0..shared).map(move |j| (text, j)));
            let sides = each.map(|(text, j)| Side {
                queries: text * tokens * width + j * d,
                out: text * tokens * q_dim + j * d,
                keys: text * key_text,
            });
            let apart = shared * d;
            return (sides.collect(), Together { count: heads / shared, queries: apart, out: apart, keys: d });
        }
        let sides = (0..heads).map(|head| Side { queries: head * d, out: head * d, keys: head / shared * d });
        let together = Together { count: texts, queries: tokens * width, out: tokens * q_dim, keys: key_text };
        (sides.collect(), together)
    }
}

impl Quantizer<'_> {
    pub(super) fn kept(&self, layer: &LayerConfig, texts: usize, capacity: usize) -> Result<Cache> {
        let len = texts * capacity * layer.attention().num_kv_heads * layer.attention().head_dim;
        let (keys, values) = (self.floats(len)?, self.floats(len)?);
        Ok(Cache::Device(Box::new(Kept { keys, values, capacity, len: 0 })))
    }

    /// Turns queries and keys of texts of `tokens` tokens from `past` on.
    pub(super) fn turn(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        (past, tokens): (usize, usize),
        back: bool,
        qkv: &Floats,
    ) -> Result<()> {
        let Some(rope) = attention.rope else { return Ok(()) };
        let shape = Shape::of(attention);
        let table = self.constant(bytemuck::cast_slice(&ropes.0[rope]))?;
        let (half, heads) = (shape.d / 2, shape.heads + shape.kv_dim / shape.d);
        let count = qkv.len / shape.width * heads * half;
        let (half, heads, stride) = (half as i32, heads as i32, shape.width as i32);
        let (past, tokens, back) = (past as i32, tokens as i32, i32::from(back));
        let (at, table, all) = (qkv.at(), table.at(), count as i64);
        let arguments = Arguments::new().with(&at).with(&table).with(&half).with(&heads).with(&stride);
        let arguments = arguments.with(&past).with(&tokens).with(&back).with(&all);
        self.launch("elements.cu", "rotate", &[], blocks(count), arguments)
    }

    /// The factors of scores at each of the first `positions`.
    fn scales(&self, attention: &Attention, positions: usize) -> Result<std::rc::Rc<Floats>> {
        self.constant(&(0..positions).map(|p| attention.scale_at(p) as f32).collect::<Vec<_>>())
    }

    pub(super) fn attended(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        cache: &mut Cache,
        texts: usize,
        qkv: &Tensor,
    ) -> Result<Tensor> {
        let Cache::Device(cache) = cache else { panic!("a cache of this device is expected") };
        let kept = cache.downcast_mut::<Kept>().expect("a cache of this device");
        let (qkv, shape) = (of(qkv), Shape::of(attention));
        let Shape { d, kv_dim, q_dim, width, .. } = shape;
        let tokens = qkv.len / width / texts;
        let (past, capacity) = (kept.len, kept.capacity);
        self.turn(attention, ropes, (past, tokens), false, qkv)?;
        let count = texts * tokens * 2 * kv_dim;
        {
            let numbers = [width, q_dim, kv_dim, capacity, past, tokens].map(|n| n as i32);
            let (from, keys, values, all) = (qkv.at(), kept.keys.at(), kept.values.at(), count as i64);
            let arguments = Arguments::new().with(&from).with(&keys).with(&values);
            let arguments = numbers.iter().fold(arguments, |arguments, number| arguments.with(number));
            self.launch("elements.cu", "append", &[], blocks(count), arguments.with(&all))?;
        }
        kept.len += tokens;
        let out = self.floats(texts * tokens * q_dim)?;
        let (sides, together) = shape.sides(texts, tokens, capacity * kv_dim);
        let scales = self.scales(attention, past + tokens)?;
        let step = (SCORES / 4 / together.count / (past + tokens)).clamp(1, tokens);
        let scores = self.floats(together.count * step * (past + tokens))?;
        for first in (0..tokens).step_by(step) {
            let queries = step.min(tokens - first);
            let len = past + first + queries;
            for side in &sides {
                let q = Operand::rows(qkv.at(), width).from(side.queries + first * width).apart(together.queries);
                let k = Operand::rows(kept.keys.at(), kv_dim).from(side.keys).apart(together.keys);
                let v = Operand::rows(kept.values.at(), kv_dim).from(side.keys).apart(together.keys);
                let s = Operand::rows(scores.at(), len).apart(queries * len);
                self.multiply([queries, len, d], [q, k.across(), s], (1.0, 0.0), together.count, Precision::Full)?;
                self.softmax(attention, &scores, &scales, [together.count, queries, len, past + first], None)?;
                let y = Operand::rows(out.at(), q_dim).from(side.out + first * q_dim).apart(together.out);
                self.multiply([queries, d, len], [s, v, y], (1.0, 0.0), together.count, Precision::Full)?;
            }
        }
        Ok(wrap(out))
    }

    /// Scores `[heads, queries, len]` to probabilities, the first query at `first`; with `back`, derivatives by them to those
    /// by products with keys, beside work space.
    fn softmax(
        &self,
        attention: &Attention,
        scores: &Floats,
        scales: &Floats,
        [heads, queries, len, first]: [usize; 4],
        back: Option<(&Floats, &Floats)>,
    ) -> Result<()> {
        let numbers = [queries, len, first, attention.window.unwrap_or(0)].map(|n| n as i32);
        let cap = attention.softcap.map_or(0f32, |cap| cap as f32);
        let (at, scales) = (scores.at(), scales.at());
        let back = back.map(|(d, slopes)| (d.at(), slopes.at()));
        let mut arguments = Arguments::new().with(&at);
        if let Some((d, slopes)) = &back {
            arguments = arguments.with(d).with(slopes);
        }
        let arguments = numbers.iter().fold(arguments.with(&scales), |arguments, number| arguments.with(number));
        let entry = if back.is_some() { "softmax_back" } else { "softmax" };
        let threads = if len > 512 { 256 } else { 64 };
        self.launch("scores.cu", entry, &[], (heads * queries, threads), arguments.with(&cap))
    }

    pub(super) fn attended_back(
        &self,
        attention: &Attention,
        ropes: &Ropes,
        texts: usize,
        qkv: &Floats,
        d_out: &Floats,
    ) -> Result<Tensor> {
        let shape = Shape::of(attention);
        let Shape { d, kv_dim, q_dim, width, .. } = shape;
        let tokens = qkv.len / width / texts;
        let out = self.floats(qkv.len)?;
        out.room.buffer().clear()?;
        let (sides, together) = shape.sides(texts, tokens, tokens * width);
        let scales = self.scales(attention, tokens)?;
        let step = (SCORES / 4 / together.count / tokens).clamp(1, tokens);
        let room = together.count * step * tokens;
        let (scores, d_scores) = (self.floats(room)?, self.floats(room)?);
        let slopes = self.floats(if attention.softcap.is_some() { room } else { 1 })?;
        let rows = |values: &Floats, at: usize, apart: usize| Operand::rows(values.at(), width).from(at).apart(apart);
        for first in (0..tokens).step_by(step) {
            let queries = step.min(tokens - first);
            let (len, down) = (first + queries, first * width);
            for side in &sides {
                let q = rows(qkv, side.queries + down, together.queries);
                let d_q = rows(&out, side.queries + down, together.queries);
                let [k, d_k] = [qkv, &out].map(|of| rows(of, q_dim + side.keys, together.keys));
                let [v, d_v] = [qkv, &out].map(|of| rows(of, q_dim + kv_dim + side.keys, together.keys));
                let d_y = Operand::rows(d_out.at(), q_dim).from(side.out + first * q_dim).apart(together.out);
                let s = Operand::rows(scores.at(), len).apart(queries * len);
                let d_s = Operand::rows(d_scores.at(), len).apart(queries * len);
                let multiply = |sizes, operands, beta| {
                    self.multiply(sizes, operands, (1.0, beta), together.count, Precision::Full)
                };
                multiply([queries, len, d], [q, k.across(), s], 0.0)?;
                multiply([queries, len, d], [d_y, v.across(), d_s], 0.0)?;
                let sizes = [together.count, queries, len, first];
                self.softmax(attention, &scores, &scales, sizes, Some((&d_scores, &slopes)))?;
                multiply([queries, d, len], [d_s, k, d_q], 0.0)?;
                // Several queries share a key: their derivatives are added one behind the other.
                multiply([len, d, queries], [d_s.across(), q, d_k], 1.0)?;
                multiply([len, d, queries], [s.across(), d_y, d_v], 1.0)?;
            }
        }
        self.turn(attention, ropes, (0, tokens), true, &out)?;
        Ok(wrap(out))
    }
}
