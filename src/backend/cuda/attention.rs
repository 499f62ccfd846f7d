//! Attention of every layer of a text, and what it remembers (`kernels-cuda/attention/attend.cu`, `attend_prompt.cu`).

use anyhow::{Result, ensure};

use super::buffer::Buffer;
use super::driver::{Arguments, Launch};
use super::sequence::Cache as Slots;
use super::vector::Vector;
use super::{Cuda, Dtype, Scratch, splits};
use crate::backend::{KvBits, Rows, cached_positions, numbered};
use crate::config::{Attention, ModelConfig};

/// Positions of a tile, `TILE` of `stored.cuh`: capacities are multiples of it.
const TILE: usize = 16;

/// Threads of a block of `attend.cu`.
const THREADS: usize = 256;

/// Queries that share a key at most.
const MOST_GROUP: usize = 32;

/// Shares of what a row sees, `MOST_SHARES` of `attend.cuh`.
const SHARES: usize = 32;

/// Rows of a launch of `attend.cu`, `MOST_ROWS` of `attend.cuh`.
const MOST_ROWS: usize = 16;

/// The widest head.
const MOST_HEAD_DIM: usize = 256;

/// The keys and values of all layers of a text, and the angles by which their heads turn.
pub(super) struct Cache {
    max_seq_len: usize,
    bits: KvBits,
    layers: Vec<Layer>,
    keys: Buffer, // per layer [num_kv_heads, capacity, head_dim], and steps of bytes behind it (stored.cuh)
    values: Buffer, // the same
    tables: Vec<Buffer>, // per RoPE f32 [max_seq_len, head_dim / 2, (cos, sin)]
}

/// The attention of one layer.
struct Layer {
    attention: Attention,
    /// Positions that its cache has room for: a ring of the window and of a pass, in tiles.
    capacity: usize,
    /// Bytes of the layers before it in `keys`, and in `values`.
    offset: usize,
}

/// `struct Numbers` of `attend.cuh`: a layer's attention as kernels are told of it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub(super) struct Numbers {
    capacity: i32,
    window: i32,
    scale: f32,
    softcap: f32,
    query_beta: f32,
    query_original: i32,
}

impl Numbers {
    /// The same in words of 8 bytes.
    pub(super) fn words(self) -> [u64; 3] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            pair(self.capacity as u32, self.window as u32),
            pair(self.scale.to_bits(), self.softcap.to_bits()),
            pair(self.query_beta.to_bits(), self.query_original as u32),
        ]
    }
}

/// `struct Attend` of `attend.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Attend {
    numbers: Numbers,
    qkv: u64,
    delta: u64,
    offset: i64,
    angles: u64,
    parts: u64,
    tickets: u64,
    out: u64,
    beyond: u64,
    max_seq_len: i32,
    appended: i32,
}

/// `struct TextRow` of `attend.cuh`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct TextRow {
    state: u64,
    keys: u64,
    values: u64,
    behind: u32,
    row: u32,
}

/// How a layer's attention is launched: `attend.cuh` says the same of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Queries to a key.
    group: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Scores and results are tensor cores'.
    tensor: bool,
    /// Queries that a block keeps.
    at_once: usize,
}

impl Shape {
    /// In blocks of `threads`; `dtype` `Float32` is lanes' own.
    pub(super) fn new(attention: &Attention, dtype: Dtype, threads: usize) -> Self {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *attention;
        Self::of((num_heads, num_kv_heads, head_dim), dtype, threads)
    }

    /// The same of heads, key-value heads and their width.
    pub(super) fn of((heads, kv_heads, head_dim): (usize, usize, usize), dtype: Dtype, threads: usize) -> Self {
        let (group, tensor) = (heads / kv_heads, dtype != Dtype::Float32 && head_dim.is_multiple_of(16));
        let most = if tensor { 8 } else { if threads <= THREADS { 4 } else { 2 } };
        Self { group, kv_heads, head_dim, tensor, at_once: group.div_ceil(group.div_ceil(most)) }
    }

    /// Queries that blocks keep, all heads together, in blocks' own.
    pub(super) fn places(self) -> usize {
        self.kv_heads * self.group.div_ceil(self.at_once)
    }

    /// Numbers that the shares of a row come to.
    pub(super) fn parts(self) -> usize {
        SHARES * self.places() * self.at_once * (self.head_dim + 2)
    }

    /// Shared memory of a block of `warps`, bytes: queries, a key and a value, what its warps' tiles come to.
    pub(super) fn shared(self, warps: usize) -> usize {
        let queries = if self.tensor { 8 } else { self.at_once };
        4 * ((queries + 2) * self.head_dim + warps * self.at_once * (self.head_dim + 2))
    }
}

/// A block of `attend_prompt.cu`: warps, and shared memory, bytes.
fn prompt_block(head_dim: usize) -> (usize, usize) {
    let (warps, stage) = if head_dim > 128 { (8, 32) } else { (12, 64) };
    let chunks = head_dim / 8;
    (warps, 2 * stage * (16 * (chunks + (12 - chunks % 8) % 8 + chunks + 1) + 8))
}

/// Checks that `attend.cu` takes the attention of every layer.
///
/// # Errors
/// Heads that it has no room for.
pub(super) fn check(config: &ModelConfig) -> Result<()> {
    for layer in &config.layers {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *layer.attention();
        ensure!(
            head_dim.is_multiple_of(8) && head_dim <= MOST_HEAD_DIM,
            "cuda: head_dim is {head_dim}, multiples of 8 up to {MOST_HEAD_DIM} are supported, use --device cpu"
        );
        ensure!(
            num_heads / num_kv_heads <= MOST_GROUP,
            "cuda: num_attention_heads is {num_heads} with num_key_value_heads {num_kv_heads}, up to {MOST_GROUP} to one \
             are supported, use --device cpu"
        );
    }
    Ok(())
}

/// Positions that a layer's cache has room for where a pass has up to `tokens` of a text: what the last of them replaces, the
/// first does not see.
fn capacity(attention: &Attention, max_seq_len: usize, tokens: usize) -> usize {
    let positions = cached_positions(attention, max_seq_len);
    (positions + tokens.saturating_sub(1)).min(max_seq_len).next_multiple_of(TILE)
}

/// Bytes of so many keys of a layer, or of its values.
fn layer_bytes(attention: &Attention, positions: usize, (dtype, bits): (Dtype, KvBits)) -> usize {
    let head = match (bits, dtype) {
        (KvBits::Eight, _) => attention.head_dim + 4,
        (KvBits::Whole, Dtype::Float32) => attention.head_dim * 4,
        (KvBits::Whole, _) => attention.head_dim * 2,
    };
    attention.num_kv_heads * positions * head
}

/// Bytes of the cache of all layers, keys and values, and of the angles of a text of `max_seq_len` tokens, of which a pass has
/// up to `tokens`.
pub(super) fn cache_bytes(config: &ModelConfig, kept: (Dtype, KvBits), max_seq_len: usize, tokens: usize) -> usize {
    let attentions = config.layers.iter().map(|layer| layer.attention());
    let cached = attentions.map(|a| 2 * layer_bytes(a, capacity(a, max_seq_len, tokens), kept));
    let tables = config.ropes.iter().map(|rope| max_seq_len * rope.head_dim * 4);
    cached.chain(tables).sum()
}

impl Cache {
    pub(super) fn new(cuda: &Cuda, config: &ModelConfig, max_seq_len: usize, bits: KvBits) -> Result<Self> {
        check(config)?;
        let driver = &cuda.driver;
        let (mut layers, mut offset) = (Vec::new(), 0);
        let longest = cuda.device.max_tokens.min(max_seq_len);
        for layer in &config.layers {
            let attention = layer.attention().clone();
            let capacity = capacity(&attention, max_seq_len, longest);
            let bytes = layer_bytes(&attention, capacity, (cuda.options.dtype, bits));
            layers.push(Layer { attention, capacity, offset });
            offset += bytes;
        }
        let tables = config.ropes.iter().map(|rope| Buffer::of(driver, &rope.table(max_seq_len)));
        Ok(Self {
            max_seq_len,
            bits,
            keys: Buffer::new(driver, offset)?,
            values: Buffer::new(driver, offset)?,
            tables: tables.collect::<Result<_>>()?,
            layers,
        })
    }

    /// The attention of a layer.
    pub(super) fn attention(&self, layer: usize) -> &Attention {
        &self.layers[layer].attention
    }

    /// Where the keys and values of a layer are.
    pub(super) fn places(&self, layer: usize) -> (u64, u64) {
        let offset = self.layers[layer].offset as u64;
        (self.keys.pointer() + offset, self.values.pointer() + offset)
    }

    /// Where the angles of a layer are; 0 where nothing turns.
    pub(super) fn angles(&self, layer: usize) -> u64 {
        self.attention(layer).rope.map_or(0, |rope| self.tables[rope].pointer())
    }

    /// What kernels are told of a layer's attention. A window that no text is longer than is none.
    pub(super) fn numbers(&self, layer: usize) -> Numbers {
        let Layer { attention: Attention { window, scale, softcap, query_scaling, .. }, capacity, .. } =
            &self.layers[layer];
        Numbers {
            capacity: *capacity as i32,
            window: window.filter(|&window| window < self.max_seq_len).unwrap_or(0) as i32,
            scale: *scale as f32,
            softcap: softcap.unwrap_or(0.0) as f32,
            query_beta: query_scaling.map_or(0.0, |scaling| scaling.beta as f32),
            query_original: query_scaling.map_or(1, |scaling| i32::try_from(scaling.original).unwrap_or(i32::MAX)),
        }
    }

    /// The constants of `attend.cuh` for a layer.
    pub(super) fn defines(&self, layer: usize, dtype: Dtype) -> Vec<String> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = self.attention(layer);
        vec![
            format!("HEADS={num_heads}"),
            format!("KV_HEADS={num_kv_heads}"),
            format!("HEAD_DIM={head_dim}"),
            format!("KV={}", if self.bits == KvBits::Eight { 3 } else { dtype as u8 }),
        ]
    }

    /// What kernels are told of a layer, but for its rows.
    fn argument(&self, cuda: &Cuda, layer: usize, shape: Shape, qkv: &Vector, out: &Vector) -> Result<Attend> {
        Ok(Attend {
            numbers: self.numbers(layer),
            qkv: qkv.at(),
            delta: qkv.delta(),
            offset: self.layers[layer].offset as i64,
            angles: self.angles(layer),
            parts: cuda.scratch(Scratch::Shares, MOST_ROWS * shape.parts() * 4)?.pointer(),
            tickets: cuda.scratch(Scratch::Tickets, MOST_ROWS * shape.places() * 4)?.pointer(),
            out: out.at(),
            beyond: cuda.beyond.pointer(),
            max_seq_len: self.max_seq_len as i32,
            appended: 0,
        })
    }
}

impl Cuda {
    /// Forgets what an interrupted launch may have left.
    pub(super) fn clear_tickets(&self) -> Result<()> {
        self.scratch(Scratch::Tickets, 4)?.clear()
    }

    /// Rotates, appends and attends, as [`DecodeBackend::attend`](crate::backend::DecodeBackend::attend) says.
    pub(super) fn attend_rows(
        &self,
        slots: &Slots,
        layer: usize,
        rows: &[Rows],
        qkv: &Vector,
        out: &mut Vector,
    ) -> Result<()> {
        out.settle();
        let Some(first) = rows.first() else { return Ok(()) };
        let cache = &slots.text(first.slot)?.cache;
        let shape = Shape::new(cache.attention(layer), self.options.dtype, THREADS);
        let argument = cache.argument(self, layer, shape, qkv, out)?;
        let mut few: Vec<(TextRow, usize)> = Vec::new();
        for (row, Rows { slot, count, .. }) in numbered(rows) {
            let text = slots.text(slot)?;
            let (keys, values) = (text.cache.keys.pointer(), text.cache.values.pointer());
            let from = TextRow { state: text.state.pointer(), keys, values, behind: 0, row: row as u32 };
            if shape.tensor && count > MOST_ROWS {
                self.attend_prompt(cache, layer, shape, &argument, from, count)?;
                continue;
            }
            let rows = (0..count as u32).map(|i| TextRow { behind: i, row: from.row + i, ..from });
            few.extend(rows.map(|row| (row, count)));
        }
        few.chunks(MOST_ROWS).try_for_each(|rows| self.attend_few(cache, layer, shape, &argument, rows))
    }

    /// Up to [`MOST_ROWS`] rows, each with how many of its text there are.
    fn attend_few(
        &self,
        cache: &Cache,
        layer: usize,
        shape: Shape,
        argument: &Attend,
        rows: &[(TextRow, usize)],
    ) -> Result<()> {
        // Two blocks to a multiprocessor.
        let blocks = 2 * self.driver.numbers().multiprocessors;
        let (splits, kv_heads) = (splits(blocks, shape.places() * rows.len()), shape.kv_heads);
        let defines = cache.defines(layer, self.options.dtype);
        let mut texts = [TextRow::default(); MOST_ROWS];
        rows.iter().zip(&mut texts).for_each(|((row, _), text)| *text = *row);
        let together = rows.iter().any(|&(_, count)| count > 1);
        let argument = Attend { appended: i32::from(together), ..*argument };
        let launch = |entry: &str, grid, shared| {
            let launch = Launch { grid, shared, ..Launch::new(1, THREADS) };
            let kernel = self.kernel("attend.cu", entry, &defines)?;
            self.driver.launch(&kernel, launch, &mut Arguments::new().with(&argument).with(&texts))
        };
        if together {
            launch("append", (rows.len(), kv_heads, 1), 0)?;
        }
        launch("attend", (shape.places(), splits, rows.len()), shape.shared(THREADS / 32))
    }

    /// `count` rows of one text, of which `text` is the first.
    fn attend_prompt(
        &self,
        cache: &Cache,
        layer: usize,
        shape: Shape,
        argument: &Attend,
        text: TextRow,
        count: usize,
    ) -> Result<()> {
        let defines = cache.defines(layer, self.options.dtype);
        let (warps, shared) = prompt_block(shape.head_dim);
        let blocks = (count * shape.group).div_ceil(8 * warps);
        let tokens = count as i32;
        for (entry, grid, shared) in
            [("append_prompt", (count, shape.kv_heads, 1), 0), ("attend_prompt", (blocks, shape.kv_heads, 1), shared)]
        {
            let launch = Launch { grid, shared, ..Launch::new(1, 32 * warps) };
            let kernel = self.kernel("attend_prompt.cu", entry, &defines)?;
            let mut arguments = Arguments::new().with(argument).with(&text).with(&tokens);
            self.driver.launch(&kernel, launch, &mut arguments)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(changes: serde_json::Value) -> ModelConfig {
        ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().with(changes).unwrap()
    }

    /// A window's cache has room for it and for a pass, in tiles, and never for more than a text.
    #[test]
    fn windows_bound_the_cache() {
        let window = |window| {
            let mut config = config(json!({ "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 128 }));
            let crate::config::Mixer::Attention(attention) = &mut config.layers[1].mixer;
            attention.window = window;
            config
        };
        let tables = |tokens: usize| tokens * 128 * 4;
        let row = 2 * 4 * 128 * 2;
        for (sliding, max_seq_len, tokens, positions) in [
            (None, 5000, 512, 5008 + 5008),
            (Some(512), 5000, 1, 5008 + 512),
            (Some(512), 5000, 2, 5008 + 528),
            (Some(512), 5000, 512, 5008 + 1024),
            (Some(97), 5000, 16, 5008 + 112),
            (Some(97), 5000, 17, 5008 + 128),
            (Some(4700), 5000, 512, 5008 + 5008),
            (Some(6000), 5000, 512, 5008 + 5008),
            (Some(1), 9, 9, 16 + 16),
        ] {
            let bytes = |bits| cache_bytes(&window(sliding), (Dtype::Float16, bits), max_seq_len, tokens);
            let tables = tables(max_seq_len);
            assert_eq!(bytes(KvBits::Whole), positions * row + tables, "window {sliding:?} of {max_seq_len}");
            // A byte a number, and a step for each head.
            assert_eq!(bytes(KvBits::Eight), positions * 2 * 4 * 132 + tables, "window {sliding:?} of {max_seq_len}");
        }
    }

    #[test]
    fn heads_without_room_are_named() {
        let error = |changes| check(&config(changes)).unwrap_err().to_string();
        assert!(check(&config(json!({ "head_dim": 256 }))).is_ok());
        assert!(check(&config(json!({ "num_key_value_heads": 1 }))).is_ok(), "32 queries to a key");
        for head_dim in [264, 512, 100] {
            let found = error(json!({ "head_dim": head_dim }));
            assert!(found.contains(&format!("head_dim is {head_dim}, multiples of 8 up to 256")), "{found}");
        }
        let found = error(json!({ "num_attention_heads": 33, "num_key_value_heads": 1, "head_dim": 128 }));
        assert!(found.contains("num_attention_heads is 33 with num_key_value_heads 1, up to 32"), "{found}");
    }

    /// The sizes of `attend.cuh`: a product's rows of queries, or lanes' own, and results for each query of each warp.
    #[test]
    fn shared_memory_is_what_the_kernel_uses() {
        let shape = |group: usize, head_dim, dtype, threads| Shape::of((2 * group, 2, head_dim), dtype, threads);
        let shared = |group, head_dim, dtype, threads: usize| {
            let shape = shape(group, head_dim, dtype, threads);
            (shape.at_once, shape.places(), shape.shared(threads / 32))
        };
        let (half, single) = (Dtype::Float16, Dtype::Float32);
        assert_eq!(shared(1, 128, half, 256), (1, 2, 4 * (10 * 128 + 8 * 130)));
        assert_eq!(shared(4, 128, half, 512), (4, 2, 4 * (10 * 128 + 16 * 4 * 130)));
        assert_eq!(shared(8, 256, half, 480), (8, 2, 4 * (10 * 256 + 15 * 8 * 258)));
        assert_eq!(shared(12, 64, half, 256), (6, 4, 4 * (10 * 64 + 8 * 6 * 66)));
        assert_eq!(shared(32, 128, half, 256), (8, 8, 4 * (10 * 128 + 8 * 8 * 130)));
        // By lanes: four queries, two where threads are many.
        assert_eq!(shared(5, 128, single, 256), (3, 4, 4 * (5 * 128 + 8 * 3 * 130)));
        assert_eq!(shared(7, 40, half, 448), (2, 8, 4 * (4 * 40 + 14 * 2 * 42)));
        assert_eq!(shape(5, 128, half, 256).parts(), 32 * 2 * 5 * 130);
        // Two stages of keys and values, with room to keep rows apart, and of steps.
        assert_eq!(prompt_block(128), (12, 2 * (64 * (20 + 17) * 16 + 2 * 64 * 4)));
        assert_eq!(prompt_block(256), (8, 2 * (32 * (36 + 33) * 16 + 2 * 32 * 4)));
        assert_eq!(prompt_block(80), (12, 2 * (64 * (12 + 11) * 16 + 2 * 64 * 4)));
    }
}
