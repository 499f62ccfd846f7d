//! The CUDA backend: cudarc's driver API, kernels compiled by NVRTC for the card at hand.
//!
//! - `driver`: device, stream, memory, launches; `graph`: launches recorded once; `host`: pinned memory, and uploads through it
//! - `failure`: what goes wrong with a device, and how long it is waited for
//! - `library`: NVIDIA's libraries, opened at run time; `compiler`: NVRTC and the cache of compiled kernels; `kernel`: when they are compiled and loaded
//! - `blas`: cuBLAS for prompts, where it is installed
//! - `options`: how it is set up; `pack`, `plain`: stored formats to the layouts of the fast and of the generic kernels
//! - `matrix`, `vector`, `sequence`: what lives on the device; `attention`: what a text remembers, and how it is looked at
//! - `cupti`, `recorder`: when kernels ran, for the sweep; `doctor`: what there is of all this on a machine
//! - `occupy`: holds multiprocessors, so that fewer are left; `memory`: what a model will take
//! - `product`: which kernel multiplies what; `layers`: whole layers in one launch; the kernels are in `kernels-cuda/`

mod arguments;
mod attention;
mod blas;
mod buffer;
pub(crate) mod compiler;
mod cupti;
pub mod doctor;
mod driver;
mod failure;
mod graph;
mod host;
mod kernel;
mod launch;
mod layers;
mod library;
mod matrix;
mod memory;
mod occupy;
mod options;
mod pack;
mod plain;
mod product;
mod recorder;
mod sequence;
mod vector;

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub use failure::DeviceLost;
pub use launch::Tuning;
pub use matrix::{Matrix, Plan};
pub use memory::MemoryTable;
pub use occupy::Occupied;
pub use options::{Dtype, Options, Residuals};
pub use pack::packed;
pub use recorder::CudaRecorder;
pub use sequence::Sequence;
pub use vector::Vector;

use self::blas::Blas;
use self::buffer::Buffer;
use self::compiler::Compiler;
use self::driver::{Arguments, Driver, Launch};
use self::failure::Refused;
use self::host::{Mapped, Staging};
use self::kernel::{Kernel, Kernels};
use self::matrix::{Body, Format, Uploads};
use self::product::Feed;
use super::record::Clock;
use super::{Activations, DecodeBackend, DeviceInfo, GemvBackend, Input, LayerOperands, Norm, one_by_one};
use crate::config::{Attention, ModelConfig};
use crate::dec::DecPlan;
use crate::sampling::Sampling;
use crate::weights::Linear;

/// One NVIDIA GPU.
pub struct Cuda {
    // First, so that its handle goes before the driver does.
    blas: Option<Blas>,
    device: DeviceInfo,
    options: Options,
    compiler: Arc<Compiler>,
    kernels: Kernels,
    staging: OnceCell<Staging>,
    uploads: RefCell<Uploads>,
    scratch: RefCell<[Option<Rc<Buffer>>; Scratch::ALL]>,
    retired: RefCell<Vec<Rc<Buffer>>>,
    tables: RefCell<Vec<(Vec<u64>, Rc<Buffer>)>>,
    stamps: RefCell<Option<Rc<Buffer>>>,
    /// u32: 1 once activations were beyond what 16 bits hold.
    beyond: Mapped,
    /// That was said.
    said: Cell<bool>,
    /// Whether blocks may have to be there all at once.
    together: Cell<bool>,
    driver: Rc<Driver>,
}

/// Work space that outlives one operation, by purpose.
#[derive(Clone, Copy)]
pub(crate) enum Scratch {
    /// Activations, f32.
    X,
    /// Activations of a prompt, 16 bits.
    Half,
    /// A dequantized matrix.
    Weights,
    /// Token ids of a prompt.
    Ids,
    /// A selection.
    List,
    /// Blocks that have arrived at barriers.
    Grid,
    /// What blocks of one launch tell each other, f32.
    Flow,
}

impl Scratch {
    const ALL: usize = 7;
}

/// The recorded operations of one token.
pub struct Graph(Recorded);

enum Recorded {
    /// Ran once, so that everything is compiled and allocated; not yet recorded.
    Warm,
    Ready(graph::Graph),
}

/// What `decdec devices` lists: one entry per GPU.
///
/// # Errors
/// No driver, or too old a one; says how to get one.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    (0..driver::count()?).map(|i| Ok(info(i, &*Driver::open(i)?))).collect()
}

fn info(ordinal: usize, driver: &Driver) -> DeviceInfo {
    let numbers = driver.numbers();
    DeviceInfo {
        id: format!("cuda:{ordinal}"),
        name: numbers.name.clone(),
        driver: format!("CUDA {}.{}", numbers.driver / 1000, numbers.driver % 1000 / 10),
        max_n_tb: numbers.multiprocessors,
        max_tokens: 512,
        lookahead: 8,
    }
}

impl Cuda {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// What is missing (driver, GPU, NVRTC) or too old, and how to get it.
    pub fn new(ordinal: usize, options: Options) -> Result<Self> {
        ensure!(options.compile <= 2, "--compile is {}, 0 to 2 are allowed", options.compile);
        let mut driver = Driver::open(ordinal)?;
        if let Some(most) = options.multiprocessors {
            driver = driver.limited(most)?;
        }
        let numbers = driver.numbers();
        let architecture = format!("sm_{}{}", numbers.major, numbers.minor);
        let compiler = Compiler::open(&architecture, compiler::cache_directory())?;
        let blas = Blas::open(&driver)
            .inspect_err(|e| tracing::warn!("{e:#}; until then prompts are processed token by token"))
            .ok();
        tracing::info!("{} ({architecture}), NVRTC {}", numbers.name, compiler.version());
        let device = info(ordinal, &driver);
        Ok(Self {
            blas,
            device,
            options,
            compiler: Arc::new(compiler),
            kernels: Kernels::default(),
            staging: OnceCell::new(),
            uploads: RefCell::default(),
            scratch: RefCell::default(),
            retired: RefCell::default(),
            tables: RefCell::default(),
            stamps: RefCell::default(),
            beyond: Mapped::new(&driver, 4)?,
            said: Cell::new(false),
            together: Cell::new(true),
            driver,
        })
    }

    /// Waits for this device end with [`Interrupted`](super::Interrupted) soon after `flag` becomes true. One that would
    /// have ended within a twentieth of a second does so.
    pub fn heed(&mut self, flag: &'static AtomicBool) {
        self.driver.heed(flag);
    }

    /// Launches whose blocks must all be there at once ask for more than there is room for, and are refused: for tests.
    #[doc(hidden)]
    pub fn overfill(&self, on: bool) {
        self.driver.overfill(on);
    }

    /// True once activations were beyond ±65504, where float16 ends, and were taken for that; never in other types.
    pub fn went_beyond(&self) -> bool {
        // SAFETY: the word is in this allocation and aligned; the device writes it whole.
        let word = unsafe { &*self.beyond.host().cast::<AtomicU32>() };
        word.load(Ordering::Relaxed) != 0
    }

    /// Says so, once.
    fn tell_if_beyond(&self) {
        if self.went_beyond() && !self.said.replace(true) {
            tracing::warn!(
                "activations were beyond 65504, where float16 ends, and were taken for that: what follows may suffer, use \
                 --dtype bfloat16"
            );
        }
    }

    /// Free and total device memory, bytes.
    ///
    /// # Errors
    /// A lost device.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.driver.memory()
    }

    /// `y += s · Σ q·x` without a base product, by `n_tb` blocks that do nothing else: for measuring compensation
    /// alone.
    ///
    /// # Errors
    /// A lost device, or a kernel that does not compile.
    pub fn compensate_alone(&self, matrix: &Matrix, plan: &Plan, x: &Vector, y: &mut Vector) -> Result<()> {
        y.settle();
        self.dec(matrix, Some(plan), x.at(), y.at(), 1)
    }

    /// Entry point `entry` of `file`, with `defines` and the type of products; compiled when it is first launched.
    fn kernel(&self, file: &str, entry: &str, defines: &[String]) -> Result<Kernel> {
        let mut all = vec![format!("DTYPE={}", self.options.dtype as u8)];
        all.extend_from_slice(defines);
        Ok(self.kernels.kernel(&self.driver, &self.compiler, file, entry, all))
    }

    /// At least `bytes` of work space. A smaller one before it stays: recorded graphs may point to it.
    fn scratch(&self, what: Scratch, bytes: usize) -> Result<Rc<Buffer>> {
        let slot = &mut self.scratch.borrow_mut()[what as usize];
        if let Some(buffer) = slot
            && buffer.bytes() >= bytes
        {
            return Ok(Rc::clone(buffer));
        }
        let buffer = Rc::new(Buffer::new(&self.driver, bytes)?);
        if let Some(old) = slot.replace(Rc::clone(&buffer)) {
            self.retired.borrow_mut().push(old);
        }
        Ok(buffer)
    }

    /// Blocks that share one key-value head's text.
    fn splits(&self, kv_heads: usize) -> usize {
        splits(self.driver.numbers().multiprocessors, kv_heads)
    }
}

/// Into how many shares one key-value head's text goes among `blocks`.
fn splits(blocks: usize, kv_heads: usize) -> usize {
    (blocks / kv_heads).clamp(1, 16)
}

impl GemvBackend for Cuda {
    type Vector = Vector;
    type Matrix = Matrix;
    type Plan = Plan;
    type Recorder = CudaRecorder;

    fn device(&self) -> &DeviceInfo {
        &self.device
    }

    fn vector(&self, len: usize) -> Result<Vector> {
        Vector::new(&self.driver, len)
    }

    fn room(&self, vector: &Vector) -> usize {
        vector.len
    }

    fn write(&self, values: &[f32], to: &mut Vector) -> Result<()> {
        to.write(values)
    }

    fn read(&self, from: &Vector, out: &mut [f32]) -> Result<()> {
        from.read(out)?;
        self.tell_if_beyond();
        Ok(())
    }

    fn matrix(&self, linear: &Linear<'_>) -> Result<Matrix> {
        matrix::upload(self, linear)
    }

    fn plan(&self, matrix: &Matrix, plan: &DecPlan) -> Result<Plan> {
        matrix::plan(self, matrix, plan)
    }

    fn gemv(&self, matrix: &Matrix, x: &Vector, y: &mut Vector) -> Result<()> {
        self.product(Feed::Plain, matrix, None, (x.at(), x.delta()), y, 1, false)
    }

    fn dec_gemv(&self, matrix: &Matrix, plan: &Plan, x: &Vector, y: &mut Vector) -> Result<()> {
        self.product(Feed::Plain, matrix, Some(plan), (x.at(), x.delta()), y, 1, false)
    }

    fn select(&self, plan: &Plan, x: &Vector) -> Result<Vec<u32>> {
        self.selected_channels(plan, x)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.driver.time(work)
    }

    fn recorder(&self, clock: Clock) -> Result<CudaRecorder> {
        self.driver.enter()?;
        CudaRecorder::new(clock)
    }
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

    fn project(&self, product: &super::Product<'_, Self>, x: &Vector, y: &mut Vector, tokens: usize) -> Result<()> {
        let super::Product { feed, matrix, plan, add } = *product;
        match feed {
            super::Feed::Plain => self.product(Feed::Plain, matrix, plan, (x.at(), x.delta()), y, tokens, add),
            super::Feed::Norm(norm) => {
                self.product(Feed::Norm(norm), matrix, plan, (x.at(), x.delta()), y, tokens, add)
            }
            super::Feed::Gated(activation) => self.gated_product(activation, matrix, plan, x, y, tokens, add),
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
