//! Attention of every layer of a text, and what it remembers (`kernels-cuda/attention/attend.cu`, `attend_prompt.cu`).

use anyhow::{Context, Result, ensure};

use super::buffer::Buffer;
use super::driver::{Arguments, Launch};
use super::vector::Vector;
use super::{Cuda, Dtype};
use crate::backend::cached_positions;
use crate::config::{Attention, ModelConfig};

/// Positions of a tile, `TILE` of `attend.cuh`: capacities are multiples of it.
const TILE: usize = 16;

/// Threads of a block of `attend.cu`.
const THREADS: usize = 256;

/// Queries that a warp keeps at most, `MOST_AT_ONCE` of `attend.cuh`.
const AT_ONCE: usize = 4;

/// Queries that share a key at most: as many as the warps of a block keep.
const MOST_GROUP: usize = THREADS / 32 * AT_ONCE;

/// The widest head.
const MOST_HEAD_DIM: usize = 256;

/// The keys and values of all layers, and the angles by which their heads turn.
pub(super) struct Cache {
    max_seq_len: usize,
    layers: Vec<Layer>,
    /// Per layer `[num_kv_heads, capacity, head_dim]`, and behind all of them a pass `[num_kv_heads, room, head_dim]`.
    keys: Buffer,
    /// The same.
    values: Buffer,
    /// Positions that a pass has room for, and where it begins in `keys` and in `values`, bytes.
    pass: (usize, usize),
    tables: Vec<Buffer>, // per RoPE f32 [max_seq_len, head_dim / 2, (cos, sin)]
    parts: Buffer,
    tickets: Buffer,
}

/// The attention of one layer.
struct Layer {
    attention: Attention,
    /// Positions that its cache has room for: a ring of the window, in tiles.
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
    keys: u64,
    values: u64,
    angles: u64,
    state: u64,
    parts: u64,
    tickets: u64,
    out: u64,
    beyond: u64,
    max_seq_len: i32,
}

/// `struct Aside` of `attend_prompt.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Aside {
    offset: i64,
    room: i32,
    tokens: i32,
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

/// Positions that a layer's cache has room for.
fn capacity(attention: &Attention, max_seq_len: usize) -> usize {
    cached_positions(attention, max_seq_len).next_multiple_of(TILE)
}

/// Positions that lie aside while a pass of `tokens` is attended to: its own, and others of the tile that it begins in.
fn room(tokens: usize) -> usize {
    (tokens + TILE - 1).next_multiple_of(TILE)
}

/// Bytes of so many keys of a layer, or of its values.
fn layer_bytes(attention: &Attention, positions: usize, dtype: Dtype) -> usize {
    attention.num_kv_heads * positions * attention.head_dim * dtype_bytes(dtype)
}

fn dtype_bytes(dtype: Dtype) -> usize {
    if dtype == Dtype::Float32 { 4 } else { 2 }
}

/// Bytes of the cache of all layers, keys and values, and of the angles of a text of `max_seq_len` tokens.
pub(super) fn cache_bytes(config: &ModelConfig, dtype: Dtype, max_seq_len: usize) -> usize {
    let attentions = config.layers.iter().map(|layer| layer.attention());
    let cached = attentions.map(|a| 2 * layer_bytes(a, capacity(a, max_seq_len), dtype));
    let tables = config.ropes.iter().map(|rope| max_seq_len * rope.head_dim * 4);
    cached.chain(tables).sum()
}

/// Bytes of the keys and values of a pass of `tokens`, of one layer at a time.
pub(super) fn pass_bytes(config: &ModelConfig, dtype: Dtype, tokens: usize) -> usize {
    let layers = config.layers.iter().map(|layer| 2 * layer_bytes(layer.attention(), room(tokens), dtype));
    layers.max().unwrap_or(0)
}

impl Cache {
    pub(super) fn new(cuda: &Cuda, config: &ModelConfig, max_seq_len: usize) -> Result<Self> {
        check(config)?;
        let driver = &cuda.driver;
        let (mut layers, mut offset) = (Vec::new(), 0);
        for layer in &config.layers {
            let attention = layer.attention().clone();
            let capacity = capacity(&attention, max_seq_len);
            let bytes = layer_bytes(&attention, capacity, cuda.options.dtype);
            layers.push(Layer { attention, capacity, offset });
            offset += bytes;
        }
        let longest = cuda.device.max_tokens.min(max_seq_len);
        let bytes = offset + pass_bytes(config, cuda.options.dtype, longest) / 2;
        let most = |of: &dyn Fn(&Attention) -> usize| layers.iter().map(|l| of(&l.attention)).max().unwrap_or(0);
        let parts = most(&|a| a.num_heads * cuda.splits(a.num_kv_heads) * (a.head_dim + 2));
        let tickets = most(&|a| a.num_kv_heads);
        let tables = config.ropes.iter().map(|rope| Buffer::of(driver, &rope.table(max_seq_len)));
        Ok(Self {
            max_seq_len,
            keys: Buffer::new(driver, bytes)?,
            values: Buffer::new(driver, bytes)?,
            pass: (room(longest), offset),
            tables: tables.collect::<Result<_>>()?,
            parts: Buffer::new(driver, parts * 4)?,
            tickets: Buffer::new(driver, tickets * 4)?,
            layers,
        })
    }

    /// Forgets what an interrupted text may have left.
    pub(super) fn begin(&self) -> Result<()> {
        self.tickets.clear()
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

    /// The constants of `attend.cuh` for a layer, `splits` blocks to a key-value head.
    pub(super) fn defines(&self, layer: usize, dtype: Dtype, splits: usize) -> Vec<String> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = self.attention(layer);
        vec![
            format!("HEADS={num_heads}"),
            format!("KV_HEADS={num_kv_heads}"),
            format!("HEAD_DIM={head_dim}"),
            format!("KV={}", dtype as u8),
            format!("SPLITS={splits}"),
        ]
    }

    /// Rotates, appends and attends, as [`DecodeBackend::attend`](crate::backend::DecodeBackend::attend) says; `state` is
    /// where the text's length is, and `first` the row of `qkv` and `out` that its `tokens` begin at.
    pub(super) fn attend(
        &self,
        cuda: &Cuda,
        layer: usize,
        state: &Buffer,
        (qkv, out): (&Vector, &mut Vector),
        (first, tokens): (usize, usize),
    ) -> Result<()> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *self.attention(layer);
        let before = |width: usize| (first * width * 4) as u64;
        let (keys, values) = self.places(layer);
        let arguments = Attend {
            numbers: self.numbers(layer),
            qkv: qkv.at() + before(self.attention(layer).qkv_rows()),
            delta: qkv.delta(),
            keys,
            values,
            angles: self.angles(layer),
            state: state.pointer(),
            parts: self.parts.pointer(),
            tickets: self.tickets.pointer(),
            out: out.at() + before(num_heads * head_dim),
            beyond: cuda.beyond.pointer(),
            max_seq_len: self.max_seq_len as i32,
        };
        let splits = cuda.splits(num_kv_heads);
        let defines = self.defines(layer, cuda.options.dtype, splits);
        let shared = attend_shared(num_heads / num_kv_heads, head_dim, THREADS).context("a group that was checked")?;
        let launch = |file: &str, entry: &str, grid, shared, mut arguments: Arguments<'_>| {
            let launch = Launch { grid, shared, ..Launch::new(1, THREADS) };
            cuda.driver.launch(&cuda.kernel(file, entry, &defines)?, launch, &mut arguments)
        };
        out.settle();
        if tokens == 1 {
            let grid = (num_kv_heads, splits, 1);
            return launch("attend.cu", "attend", grid, shared, Arguments::new().with(&arguments));
        }
        let (room, offset) = self.pass;
        let numbers = (offset - self.layers[layer].offset) / dtype_bytes(cuda.options.dtype);
        let aside = Aside { offset: numbers as i64, room: room as i32, tokens: tokens as i32 };
        for (entry, grid, shared) in [
            ("set_aside", (tokens + TILE - 1, num_kv_heads, 1), 0),
            ("attend_prompt", (num_kv_heads, 1, tokens), shared),
            ("append", (tokens, num_kv_heads, 1), 0),
        ] {
            launch("attend_prompt.cu", entry, grid, shared, Arguments::new().with(&arguments).with(&aside))?;
        }
        Ok(())
    }
}

/// Shared memory of a block of `threads`, bytes: queries, a key and a value, results of its warps. `None` if it has fewer
/// warps than the `group` of queries to a key needs.
pub(super) fn attend_shared(group: usize, head_dim: usize, threads: usize) -> Option<usize> {
    // `TENSOR` and `MOST_AT_ONCE` of `attend.cuh`, of 16-bit numbers where threads are many.
    let narrow = threads <= THREADS;
    let tensor = head_dim.is_multiple_of(16) && head_dim <= if narrow { MOST_HEAD_DIM } else { 128 };
    let sets = group.div_ceil(if tensor || narrow { AT_ONCE } else { 2 });
    let set_warps = (threads / 32).checked_div(sets).filter(|&warps| warps > 0)?;
    Some(4 * ((sets * AT_ONCE + 2) * head_dim + sets * set_warps * group.div_ceil(sets) * (head_dim + 2)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(changes: serde_json::Value) -> ModelConfig {
        ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().with(changes).unwrap()
    }

    /// A window's cache has room for it, in tiles, and a pass for its tokens once, whatever the number of layers; both are
    /// said.
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
        for (sliding, max_seq_len, positions) in [
            (None, 5000, 5008 + 5008),
            (Some(512), 5000, 5008 + 512),
            (Some(100), 5000, 5008 + 112),
            (Some(97), 5000, 5008 + 112),
            (Some(96), 5000, 5008 + 96),
            (Some(4700), 5000, 5008 + 4704),
            (Some(6000), 5000, 5008 + 5008),
            (Some(1), 9, 16 + 16),
        ] {
            let bytes = cache_bytes(&window(sliding), Dtype::Float16, max_seq_len);
            assert_eq!(bytes, positions * row + tables(max_seq_len), "window {sliding:?} of {max_seq_len}");
        }
        // Wherever in a tile a pass begins.
        for (tokens, positions) in [(512, 528), (2, 32), (1, 16), (17, 32), (18, 48)] {
            assert_eq!(pass_bytes(&window(Some(100)), Dtype::Float16, tokens), positions * row, "{tokens} tokens");
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

    /// The sizes of `attend.cuh`: queries in fours, and results for each query of each warp.
    #[test]
    fn shared_memory_is_what_the_kernel_uses() {
        let shared_bytes = |group, head_dim| attend_shared(group, head_dim, THREADS).unwrap();
        assert_eq!(shared_bytes(1, 128), 4 * (6 * 128 + 8 * 130));
        assert_eq!(shared_bytes(4, 128), 4 * (6 * 128 + 8 * 4 * 130));
        assert_eq!(shared_bytes(5, 64), 4 * (10 * 64 + 8 * 3 * 66));
        assert_eq!(shared_bytes(7, 256), 4 * (10 * 256 + 8 * 4 * 258));
        // Three sets of two warps; two warps have nothing to do.
        assert_eq!(shared_bytes(12, 64), 4 * (14 * 64 + 6 * 4 * 66));
        assert_eq!(shared_bytes(32, 128), 4 * (34 * 128 + 8 * 4 * 130));
        // Of blocks with many threads, which keep two queries a warp where heads are wide or no multiple of 16.
        assert_eq!(attend_shared(5, 128, 320), Some(4 * (10 * 128 + 10 * 3 * 130)));
        assert_eq!(attend_shared(2, 256, 480), Some(4 * (6 * 256 + 15 * 2 * 258)));
        assert_eq!(attend_shared(7, 40, 448), Some(4 * (18 * 40 + 12 * 2 * 42)));
        assert_eq!(attend_shared(1, 128, 512), Some(4 * (6 * 128 + 16 * 130)));
        assert_eq!(attend_shared(33, 128, 256), None);
    }
}
