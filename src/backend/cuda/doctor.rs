//! What of CUDA this machine has, and how fast its GPUs reach their own memory and the host's.
//!
//! The host link is measured while it is busy: idle, it runs at a lower generation.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{result, sys};

use super::buffer::Buffer;
use super::compiler::Compiler;
use super::cupti::Cupti;
use super::driver::{self, Driver};
use super::host::Mapped;

/// Bytes of a copy that is timed: far more than caches hold.
const COPY: usize = 256 << 20;

/// Copies in flight while the link is asked how it runs.
const COPIES: usize = 8;

/// What there is of CUDA.
#[derive(Debug)]
pub struct Report {
    /// The highest CUDA version that the driver runs, as in `13.0`.
    pub driver: Result<String>,
    /// The driver's own version, as in `580.95.05`, by NVML.
    pub driver_release: Result<String>,
    /// NVRTC's version.
    pub nvrtc: Result<String>,
    /// cuBLAS's version.
    pub cublas: Result<String>,
    /// CUPTI's version; where there is a GPU, it was tried whether it records.
    pub cupti: Result<String>,
    /// Where compiled kernels are kept.
    pub kernel_cache: Option<std::path::PathBuf>,
    /// Every GPU that the driver sees.
    pub devices: Vec<Result<Device>>,
}

/// One GPU.
#[derive(Debug)]
pub struct Device {
    /// As its maker calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of device memory: free and all.
    pub memory: (usize, usize),
    /// Bytes a second of device memory, read and written.
    pub memory_bandwidth: Result<f64>,
    /// Bytes a second from pinned host memory to the device.
    pub host_bandwidth: Result<f64>,
    /// How the host link runs while it is busy, by NVML.
    pub link: Result<Link>,
}

/// A PCI Express link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Generation now, and the highest that device and slot can do.
    pub generation: (u32, u32),
    /// Lanes now, and the most that device and slot have.
    pub width: (u32, u32),
}

/// Looks at everything; takes about a second for each GPU.
pub fn examine() -> Report {
    let nvml = Nvml::open();
    let release = match &nvml {
        Ok(nvml) => nvml.driver_release(),
        Err(error) => Err(anyhow!("{error:#}")),
    };
    let count = driver::count();
    let devices: Vec<_> = (0..*count.as_ref().unwrap_or(&0)).map(|i| device(i, nvml.as_ref().ok())).collect();
    Report {
        driver: count.and_then(|_| supported_version()),
        driver_release: release,
        nvrtc: Compiler::open("sm_80", None).map(|compiler| compiler.version()),
        cublas: cublas_version(),
        cupti: if devices.is_empty() { cupti_version() } else { cupti_at_work() },
        kernel_cache: crate::files::cache_directory("kernels"),
        devices,
    }
}

fn device(ordinal: usize, nvml: Option<&Nvml>) -> Result<Device> {
    let driver = Driver::open(ordinal)?;
    let numbers = driver.numbers().clone();
    let memory = driver.memory()?;
    let (host_bandwidth, link) = host_link(&driver, ordinal, memory.0, nvml);
    Ok(Device {
        name: numbers.name,
        capability: (numbers.major, numbers.minor),
        multiprocessors: numbers.multiprocessors,
        memory,
        memory_bandwidth: memory_bandwidth(&driver, memory.0),
        host_bandwidth,
        link,
    })
}

/// Bytes a second that a copy within device memory reads and writes.
fn memory_bandwidth(driver: &Rc<Driver>, free: usize) -> Result<f64> {
    let bytes = COPY.min(free / 4);
    let (from, to) = (Buffer::new(driver, bytes)?, Buffer::new(driver, bytes)?);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        best = best.min(driver.time(&mut || copy(driver, &from, &to))?.as_secs_f64());
    }
    ensure!(best > 0.0, "a copy of {} MiB took no time", bytes >> 20);
    Ok(2.0 * bytes as f64 / best)
}

/// Bytes a second from pinned memory, and how the link runs meanwhile.
fn host_link(driver: &Rc<Driver>, ordinal: usize, free: usize, nvml: Option<&Nvml>) -> (Result<f64>, Result<Link>) {
    let bytes = COPY.min(free / 4);
    let buffers = Mapped::new(driver, bytes).and_then(|from| Ok((from, Buffer::new(driver, bytes)?)));
    let (from, to) = match buffers {
        Ok(buffers) => buffers,
        Err(error) => {
            let link = Err(anyhow!("the link could not be kept busy: {error:#}"));
            return (Err(error), link);
        }
    };
    let mut link = nvml.context("no NVML (libnvidia-ml.so.1), it comes with the driver").map(|_| None);
    let measured = (|| {
        let mut best = f64::INFINITY;
        for round in 0..4 {
            let took = driver.time(&mut || {
                for _ in 0..COPIES {
                    fetch(driver, &from, &to)?;
                }
                // All of them are queued and most still to come: the link is at work.
                if let (Some(nvml), 2, Ok(None)) = (nvml, round, &link) {
                    link = bus_id(ordinal).and_then(|id| nvml.link(&id)).map(Some);
                }
                Ok(())
            });
            best = best.min(took?.as_secs_f64());
        }
        ensure!(best > 0.0, "{COPIES} copies of {} MiB took no time", bytes >> 20);
        Ok((COPIES * bytes) as f64 / best)
    })();
    let link = link.and_then(|link| link.context("the link was never busy"));
    (measured, link)
}

/// Queues a copy of device memory; both buffers are as long.
fn copy(driver: &Driver, from: &Buffer, to: &Buffer) -> Result<()> {
    assert_eq!(from.bytes(), to.bytes(), "bytes of a copy");
    let stream = driver.enter()?;
    // SAFETY: both ranges are whole buffers of this device, which wait for the stream before they are freed.
    unsafe { result::memcpy_dtod_async(to.pointer(), from.pointer(), to.bytes(), stream) }
        .map_err(|e| anyhow!("cuda: copying on the device: {e:?}"))
}

/// Queues a copy of pinned memory, which is at least as long as the buffer.
fn fetch(driver: &Driver, from: &Mapped, to: &Buffer) -> Result<()> {
    let stream = driver.enter()?;
    // SAFETY: the caller made `from` as long as `to`; nobody writes to it, and it waits for the stream before it is
    // freed.
    unsafe {
        let bytes = std::slice::from_raw_parts(from.host(), to.bytes());
        result::memcpy_htod_async(to.pointer(), bytes, stream)
    }
    .map_err(|e| anyhow!("cuda: copying to the device: {e:?}"))
}

/// The highest CUDA version that the driver runs, as in `13.0`; the driver is known to be there.
fn supported_version() -> Result<String> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| anyhow!("cuda: driver version: {e:?}"))?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// A device's place on the PCI bus, as in `0000:3B:00.0`.
fn bus_id(ordinal: usize) -> Result<CString> {
    let place = |e| anyhow!("cuda: asking for the PCI bus: {e:?}");
    let device = result::device::get(ordinal as c_int).map_err(place)?;
    let mut text = [0u8; 32];
    // SAFETY: writes a text of at most the length that is passed, a zero at its end included.
    unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as c_int, device) }
        .result()
        .map_err(place)?;
    Ok(CStr::from_bytes_until_nul(&text)?.to_owned())
}

fn cublas_version() -> Result<String> {
    let libraries = super::library::open("libcublas", "libcublasLt.so", "nvidia-cublas")?;
    let part = |which: c_int| -> Result<c_int> {
        let mut value = 0;
        // SAFETY: the type is that of cublas_api.h, unchanged from CUDA 12 to 13; writes one integer.
        let status = unsafe {
            let property: unsafe extern "C" fn(c_int, *mut c_int) -> c_int =
                *libraries[0].get(b"cublasGetProperty\0")?;
            property(which, &mut value)
        };
        ensure!(status == 0, "cuda: cublasGetProperty failed with {status}");
        Ok(value)
    };
    Ok(format!("{}.{}.{}", part(0)?, part(1)?, part(2)?))
}

/// Where there is a GPU: opened as a profile does, which says what else may keep it from recording.
fn cupti_at_work() -> Result<String> {
    let _driver = Driver::open(0)?;
    Cupti::open().map(|cupti| cupti.version())
}

fn cupti_version() -> Result<String> {
    let libraries = super::library::open("libcupti", "", "nvidia-cuda-cupti")?;
    let mut version = 0;
    // SAFETY: the type is that of cupti_version.h; writes one integer.
    let status = unsafe {
        let get: unsafe extern "C" fn(*mut c_uint) -> c_int = *libraries[0].get(b"cuptiGetVersion\0")?;
        get(&mut version)
    };
    // CUPTI has threads of its own once it is loaded: it stays.
    std::mem::forget(libraries);
    ensure!(status == 0, "cuda: cuptiGetVersion failed with {status}");
    Ok(version.to_string())
}

type Handle = *mut std::ffi::c_void;
type Number = unsafe extern "C" fn(Handle, *mut c_uint) -> c_int;

/// NVIDIA's management library, which knows links.
struct Nvml {
    library: libloading::Library,
}

impl Nvml {
    fn open() -> Result<Self> {
        // SAFETY: NVIDIA's libraries run nothing of consequence when they are opened.
        let library = unsafe { libloading::Library::new("libnvidia-ml.so.1") };
        let library = library.ok().context("cuda: no NVML (libnvidia-ml.so.1), it comes with the NVIDIA driver")?;
        // SAFETY: the type is that of nvml.h.
        let status = unsafe {
            let init: unsafe extern "C" fn() -> c_int = *library.get(b"nvmlInit_v2\0")?;
            init()
        };
        ensure!(status == 0, "cuda: NVML does not start: status {status}");
        Ok(Self { library })
    }

    fn driver_release(&self) -> Result<String> {
        let mut text: [c_char; 96] = [0; 96];
        // SAFETY: the type is that of nvml.h; the text is closed by a zero within the length that is passed.
        unsafe {
            let version: unsafe extern "C" fn(*mut c_char, c_uint) -> c_int =
                *self.library.get(b"nvmlSystemGetDriverVersion\0")?;
            let status = version(text.as_mut_ptr(), text.len() as c_uint - 1);
            ensure!(status == 0, "cuda: NVML does not know the driver's version: status {status}");
            Ok(CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
        }
    }

    /// How the link of the device at `bus_id` runs now.
    fn link(&self, bus_id: &CStr) -> Result<Link> {
        let mut device = std::ptr::null_mut();
        // SAFETY: the types are those of nvml.h.
        let status = unsafe {
            let find: unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int =
                *self.library.get(b"nvmlDeviceGetHandleByPciBusId_v2\0")?;
            find(bus_id.as_ptr(), &mut device)
        };
        ensure!(status == 0, "cuda: NVML does not know device {}: status {status}", bus_id.to_string_lossy());
        let ask = |name: &[u8]| -> Result<u32> {
            let mut value = 0;
            // SAFETY: these functions of nvml.h have one type; `device` is NVML's own handle.
            let status = unsafe {
                let ask: Number = *self.library.get(name)?;
                ask(device, &mut value)
            };
            ensure!(status == 0, "cuda: NVML does not tell about the link: status {status}");
            Ok(value)
        };
        Ok(Link {
            generation: (ask(b"nvmlDeviceGetCurrPcieLinkGeneration\0")?, ask(b"nvmlDeviceGetMaxPcieLinkGeneration\0")?),
            width: (ask(b"nvmlDeviceGetCurrPcieLinkWidth\0")?, ask(b"nvmlDeviceGetMaxPcieLinkWidth\0")?),
        })
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: the type is that of nvml.h; started by `open`.
        unsafe {
            if let Ok(shutdown) = self.library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlShutdown\0") {
                shutdown();
            }
        }
    }
}
