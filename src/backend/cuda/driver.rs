//! The driver: one device, one stream, launches. With `buffer`, `graph` and `host`, all of cudarc that decdec uses.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Result, ensure};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::card::Card;
use super::failure::Waiting;
pub(super) use super::failure::failed;
use super::kernel::Kernel;
use crate::backend::Interrupted;

/// How long everything that is queued may take: far longer than anything that ends.
const LONGEST: Duration = Duration::from_secs(300);

/// A device's numbers, asked for once.
#[derive(Debug, Clone)]
pub(super) struct Numbers {
    pub(super) name: String,
    pub(super) driver: i32,
    pub(super) major: i32,
    pub(super) minor: i32,
    /// Those that launches are made for.
    pub(super) multiprocessors: usize,
    /// Those that there are.
    pub(super) all_multiprocessors: usize,
    pub(super) shared_per_block: usize,
    /// What blocks may have of it that no launch is made for.
    pub(super) all_shared_per_block: usize,
    /// Bytes a second that memory is made for: twice its clock, times its width.
    pub(super) memory_rate: f64,
    /// Cycles a second of its multiprocessors.
    pub(super) clock: f64,
    /// Others hold multiprocessors while something is measured.
    pub(super) crowded: bool,
    /// Kernels are compiled for an older compute capability than it has, and translated by the driver.
    pub(super) translated: bool,
}

/// One device and the one stream that everything is queued on. Single-threaded, but not alone on its thread: others may
/// drive other devices there, so every call of the driver's that works on a context comes after [`Driver::enter`], which
/// is also where the stream is had from.
pub(super) struct Driver {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    numbers: Numbers,
    dry: Cell<bool>,
    /// Ends waits when it becomes true.
    interrupt: Cell<Option<&'static AtomicBool>>,
    /// The last wait was interrupted.
    interrupted: Cell<bool>,
    /// The last wait took too long.
    hangs: Cell<bool>,
    /// Launches whose blocks must all be there at once ask for more than the device holds.
    overfills: Cell<bool>,
    /// Names of the kernels queued, while somebody wants to know.
    watched: RefCell<Option<Vec<String>>>,
}

/// The device's context, for other threads.
#[derive(Clone, Copy)]
pub(super) struct Context(sys::CUcontext);

// SAFETY: a context may be used from any thread that makes it current.
unsafe impl Send for Context {}

impl Context {
    /// Makes it current on this thread, which the driver outlives.
    pub(super) fn enter(self) -> Result<()> {
        // SAFETY: the driver that lent it is alive.
        unsafe { result::ctx::set_current(self.0) }.map_err(|e| failed("using the context", e))
    }
}

/// How many devices there are.
///
/// # Errors
/// No driver, or one that is too old; says how to get one.
pub(super) fn count() -> Result<usize> {
    // SAFETY: only tries to open the library.
    let present = unsafe { sys::is_culib_present() };
    ensure!(
        present,
        "cuda: no NVIDIA driver (libcuda.so.1) on this machine, install one of version 525 or later or use --device cpu"
    );
    result::init().map_err(|e| failed("the driver does not start, check nvidia-smi or use --device cpu", e))?;
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("driver version", e))?;
    ensure!(
        version >= 12000,
        "cuda: the driver supports CUDA {}.{}, 12.0 is needed, install version 525 or later",
        version / 1000,
        version % 1000 / 10
    );
    Ok(result::device::get_count().map_err(|e| failed("counting devices", e))? as usize)
}

impl Driver {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// No driver, no such device, compute capability below 8.0.
    pub(super) fn open(ordinal: usize) -> Result<Rc<Self>> {
        let count = count()?;
        ensure!(count > 0, "cuda: the driver sees no GPU, check nvidia-smi or use --device cpu");
        ensure!(ordinal < count, "cuda: there is no device cuda:{ordinal}, cuda:0 to cuda:{} are allowed", count - 1);
        let device = result::device::get(ordinal as c_int).map_err(|e| failed("opening the device", e))?;
        // SAFETY: `device` was returned by the driver.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(|e| failed("attribute", e));
        let mut driver = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut driver) }.result().map_err(|e| failed("driver version", e))?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let numbers = Numbers {
            name: result::device::get_name(device).map_err(|e| failed("name", e))?,
            driver,
            major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors,
            all_multiprocessors: multiprocessors,
            shared_per_block: shared,
            all_shared_per_block: shared,
            memory_rate: 2e3
                * f64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?)
                * f64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?)
                / 8.0,
            clock: 1e3 * f64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?),
            crowded: false,
            translated: false,
        };
        ensure!(
            numbers.major >= 8,
            "cuda: {} has compute capability {}.{}, 8.0 is needed, use --device cpu",
            numbers.name,
            numbers.major,
            numbers.minor
        );
        // SAFETY: `device` is valid; the context is released when the driver is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("creating a context", e))?;
        Context(context).enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| failed("creating a stream", e))?;
        Ok(Rc::new(Self {
            ordinal,
            device,
            context,
            stream,
            numbers,
            dry: Cell::new(false),
            interrupt: Cell::new(None),
            interrupted: Cell::new(false),
            hangs: Cell::new(false),
            overfills: Cell::new(false),
            watched: RefCell::default(),
        }))
    }

    /// The same device as if it were `card`.
    ///
    /// # Errors
    /// No multiprocessors, or more of anything than there is.
    pub(super) fn acting_as(self: Rc<Self>, card: &Card) -> Result<Rc<Self>> {
        let mut driver = self.beside()?;
        if let Some(driver) = Rc::get_mut(&mut driver) {
            card.replace(&mut driver.numbers)?;
        }
        Ok(driver)
    }

    /// The same device with a stream of its own.
    pub(super) fn beside(&self) -> Result<Rc<Self>> {
        let driver = Self::open(self.ordinal)?;
        driver.interrupt.set(self.interrupt.get());
        Ok(driver)
    }

    /// Makes this device the one that the thread's calls are for, and returns the stream to queue them on.
    pub(super) fn enter(&self) -> Result<sys::CUstream> {
        self.context().enter()?;
        Ok(self.stream)
    }

    /// Waits end when `flag` becomes true.
    pub(super) fn heed(&self, flag: &'static AtomicBool) {
        self.interrupt.set(Some(flag));
    }

    /// Whether launches whose blocks must all be there at once ask for more of them than there is room for.
    pub(super) fn overfill(&self, on: bool) {
        self.overfills.set(on);
    }

    pub(super) fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// Context and stream, as other libraries of CUDA's take them.
    pub(super) fn handles(&self) -> (*mut c_void, *mut c_void) {
        (self.context.cast(), self.stream.cast())
    }

    /// What other threads need to speak to this device.
    pub(super) fn context(&self) -> Context {
        Context(self.context)
    }

    /// Runs `work` with all its launches left out.
    pub(super) fn without_launches(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.dry.set(true);
        let done = work();
        self.dry.set(false);
        done
    }

    /// Free and total device memory in bytes.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        result::mem_get_info().map_err(|e| failed("asking for free memory", e))
    }

    /// Waits for everything queued.
    ///
    /// # Errors
    /// A failed kernel, [`Interrupted`], or a device that has not ended in [`LONGEST`].
    pub(super) fn wait(&self) -> Result<()> {
        let waiting = self.waiting(LONGEST);
        while !self.idle()? {
            self.pause(&waiting)?;
        }
        self.interrupted.set(false);
        self.hangs.set(false);
        Ok(())
    }

    /// A wait that begins now. Where one has failed before, the next fails sooner: there are as many as there are buffers.
    pub(super) fn waiting(&self, most: Duration) -> Waiting {
        let most = if self.hangs.get() { Duration::ZERO } else { most };
        Waiting::new(most, self.interrupt.get(), self.interrupted.get())
    }

    /// Lets some time pass.
    pub(super) fn pause(&self, waiting: &Waiting) -> Result<()> {
        waiting.pause().inspect_err(|error| {
            let why = if error.is::<Interrupted>() { &self.interrupted } else { &self.hangs };
            why.set(true);
        })
    }

    /// Waits until nothing queued uses memory any more that is about to go; false if it may use it for as long as this
    /// process lives, and the memory has to stay.
    pub(super) fn settles(&self) -> bool {
        self.wait().is_ok() || !(self.interrupted.get() || self.hangs.get())
    }

    /// True if nothing is queued any more.
    pub(super) fn idle(&self) -> Result<bool> {
        let stream = self.enter()?;
        // SAFETY: the stream lives as long as the driver.
        match unsafe { sys::cuStreamQuery(stream) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(failed("a kernel failed", DriverError(error))),
        }
    }

    /// Runs `work` and returns the names of the kernels that it queued, in order.
    pub(super) fn watch(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<String>> {
        self.watched.replace(Some(Vec::new()));
        let done = work();
        let names = self.watched.take().unwrap_or_default();
        done.map(|()| names)
    }

    /// Queues a kernel.
    pub(super) fn launch(&self, kernel: &Kernel, launch: Launch, arguments: &mut Arguments<'_>) -> Result<()> {
        if self.dry.get() {
            return Ok(());
        }
        let function = kernel.function()?;
        let stream = self.enter()?;
        let more = if launch.together && self.overfills.get() { 64 } else { 1 };
        // Beside blocks that hold multiprocessors the driver would wait for those, too. What is left has room for all blocks.
        let cooperates = launch.together && !self.numbers.crowded;
        let (id, value) = if cooperates {
            (sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, sys::CUlaunchAttributeValue { cooperative: 1 })
        } else {
            (
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            )
        };
        let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let config = sys::CUlaunchConfig {
            gridDimX: (more * launch.grid.0) as c_uint,
            gridDimY: launch.grid.1 as c_uint,
            gridDimZ: launch.grid.2 as c_uint,
            blockDimX: launch.block as c_uint,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as c_uint,
            hStream: stream,
            attrs: &mut attribute,
            // Before compute capability 9.0 kernels do not wait for their predecessors themselves.
            numAttrs: u32::from(cooperates || self.numbers.major >= 9 && launch.overlap),
        };
        if let Some(names) = &mut *self.watched.borrow_mut() {
            names.push(kernel.entry().to_owned());
        }
        // SAFETY: the kernel belongs to this context, and the arguments are those of its parameter list: each
        // call site passes them in the order and with the types of the kernel's source.
        unsafe { sys::cuLaunchKernelEx(&config, function, arguments.pointers.as_mut_ptr(), ptr::null_mut()) }
            .result()
            .map_err(|e| failed(&format!("launching {}", kernel.entry()), e))
    }

    /// The device's time for what `work` queues.
    pub(super) fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        let stream = self.enter()?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|e| failed("event", e));
        let (start, end) = (event()?, event()?);
        let timed = (|| {
            // SAFETY: both events are alive until the end of this function.
            unsafe { result::event::record(start, stream) }.map_err(|e| failed("event", e))?;
            work()?;
            let stream = self.enter()?;
            // SAFETY: as above.
            unsafe { result::event::record(end, stream) }.map_err(|e| failed("event", e))?;
            self.wait()?;
            // SAFETY: as above; both have been recorded and waited for.
            unsafe { result::event::elapsed(start, end) }.map_err(|e| failed("event", e))
        })();
        // SAFETY: nothing refers to the events any more.
        unsafe {
            let _ = result::event::destroy(start);
            let _ = result::event::destroy(end);
        }
        Ok(Duration::from_secs_f64(f64::from(timed?) / 1e3))
    }

    /// Loads compiled code.
    pub(super) fn module(self: &Rc<Self>, cubin: &[u8]) -> Result<Rc<Module>> {
        self.enter()?;
        // SAFETY: a cubin carries its own length; it was checked when it was compiled or read.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map_err(|e| failed("loading a kernel (a driver older than the compiler cannot)", e))?;
        Ok(Rc::new(Module { driver: Rc::clone(self), module }))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if !self.settles() || self.enter().is_err() {
            return;
        }
        // SAFETY: everything that uses the stream or the context holds an `Rc` of this driver.
        unsafe {
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Loaded code.
pub(super) struct Module {
    driver: Rc<Driver>,
    module: sys::CUmodule,
}

impl Module {
    /// An entry point, allowed to use all of the device's shared memory; it lives as long as the module.
    pub(super) fn function(&self, name: &str) -> Result<sys::CUfunction> {
        let symbol = CString::new(name)?;
        self.driver.enter()?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.module, symbol) }
            .map_err(|e| failed(&format!("kernel {name}"), e))?;
        let used = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: `function` lives as long as its module.
        let used = unsafe { result::function::get_function_attribute(function, used) }
            .map_err(|e| failed(&format!("attribute of {name}"), e))?;
        let room = self.driver.numbers.all_shared_per_block as i32 - used;
        let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        unsafe { result::function::set_function_attribute(function, limit, room) }
            .map_err(|e| failed("shared memory", e))?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let settles = self.driver.settles();
        // CUPTI's records point into the code of whatever ran in this process: meanwhile all of it stays.
        if settles && !super::cupti::records() {
            // SAFETY: loaded by `Driver::module`, unloaded once; kernels hold an `Rc` of it.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// How many blocks, how large, and how they may start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    pub(super) grid: (usize, usize, usize),
    pub(super) block: usize,
    pub(super) shared: usize,
    /// While the kernel before them still runs.
    pub(super) overlap: bool,
    /// All blocks must be there at once, since they wait for each other; excludes `overlap`.
    pub(super) together: bool,
}

impl Launch {
    /// `blocks` blocks of `threads` threads.
    pub(super) fn new(blocks: usize, threads: usize) -> Self {
        Self { grid: (blocks, 1, 1), block: threads, shared: 0, overlap: true, together: false }
    }
}

/// A kernel's arguments, in order.
pub(super) struct Arguments<'a> {
    pointers: Vec<*mut c_void>,
    values: PhantomData<&'a ()>,
}

impl<'a> Arguments<'a> {
    pub(super) fn new() -> Self {
        Self { pointers: Vec::with_capacity(12), values: PhantomData }
    }

    /// The next one.
    pub(super) fn with<T: Copy>(mut self, value: &'a T) -> Self {
        self.pointers.push(ptr::from_ref(value).cast_mut().cast());
        self
    }
}
