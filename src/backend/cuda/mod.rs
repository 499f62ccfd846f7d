//! The CUDA backend: cudarc's driver API, kernels compiled by NVRTC for the card at hand.
//!
//! - `driver`: device, stream, memory, launches; `graph`: launches recorded once; `host`: pinned memory, and uploads through it
//! - `failure`: what goes wrong with a device, and how long it is waited for
//! - `library`: NVIDIA's libraries, opened at run time; `compiler`: NVRTC and the cache of compiled kernels; `kernel`: when they are compiled and loaded
//! - `blas`: cuBLAS for prompts, where it is installed
//! - `options`: how it is set up; `pack`, `plain`: stored formats to the layouts of the fast and of the generic kernels
//! - `matrix`, `vector`, `sequence`: what lives on the device; `attention`: what a text remembers, and how it is looked at
//! - `cupti`, `recorder`: when kernels ran, for the sweep; `doctor`: what there is of all this on a machine
//! - `card`, `occupy`: another card than the one that is there, and what is held of it; `memory`: what a model will take
//! - `quantize`: what quantization asks of a device
//! - `decode`: the operations of a token; `product`: which kernel multiplies what; `layers`: whole layers in one launch; the kernels are in `kernels-cuda/`

mod arguments;
mod attention;
mod blas;
mod buffer;
mod card;
pub(crate) mod compiler;
mod cupti;
mod decode;
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
mod quantize;
mod recorder;
mod sequence;
mod vector;

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};

pub use card::Card;
pub use decode::Graph;
pub use launch::Tuning;
pub use matrix::{Matrix, Plan};
pub use memory::MemoryTable;
pub use occupy::Occupied;
pub use options::{Dtype, Options, Residuals};
pub use pack::packed;
pub use recorder::CudaRecorder;
pub use sequence::Cache;
pub use vector::Vector;

use self::blas::Blas;
use self::buffer::Buffer;
use self::compiler::Compiler;
use self::driver::Driver;
use self::host::{Mapped, Staging};
use self::kernel::{Kernel, Kernels};
use self::matrix::Uploads;
use self::product::Feed;
use super::record::Clock;
use super::{DeviceInfo, GemvBackend, Norm};
use crate::dec::DecPlan;
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
    pub fn new(ordinal: usize, mut options: Options) -> Result<Self> {
        ensure!(options.compile <= 2, "--compile is {}, 0 to 2 are allowed", options.compile);
        let mut driver = Driver::open(ordinal)?;
        options.card = options.card.map_or_else(Card::of_environment, |card| Ok(Some(card)))?;
        if let Some(card) = &options.card {
            driver = driver.acting_as(card)?;
        }
        let numbers = driver.numbers();
        let kind = if numbers.translated { "compute" } else { "sm" };
        let architecture = format!("{kind}_{}{}", numbers.major, numbers.minor);
        let compiler = Compiler::open(&architecture, crate::files::cache_directory("kernels"))?;
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
        self.product(Feed::Plain, matrix, Some((plan, 1)), (x.at(), x.delta()), y, 1, false)
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
