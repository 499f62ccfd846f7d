//! CUPTI's activity records, taken in this process: when each kernel ran, by the device's clock.
//!
//! The library is loaded at run time, of CUDA 12 or 13. Kernel records of both begin alike (`cupti_activity.h`,
//! `CUpti_ActivityKernel5` and later), and only that beginning is read.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail, ensure};

use crate::backend::record::KernelRecord;

type Status = c_int;
type Request = extern "C" fn(*mut *mut u8, *mut usize, *mut usize);
type Complete = extern "C" fn(*mut c_void, u32, *mut u8, usize, usize);
type NextRecord = unsafe extern "C" fn(*mut u8, usize, *mut *mut u8) -> Status;

/// `CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL`; the kind `KERNEL` would make kernels wait for each other.
const CONCURRENT_KERNEL: c_int = 10;
/// `CUPTI_ACTIVITY_FLAG_FLUSH_FORCED`: unfinished buffers too.
const FORCED: u32 = 1;
/// `CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED`
const OTHER_SUBSCRIBER: Status = 39;
/// `CUPTI_ERROR_INSUFFICIENT_PRIVILEGES`
const NO_PRIVILEGES: Status = 35;

/// Bytes of a buffer that CUPTI fills; some 18,000 records.
const BUFFER: usize = 4 << 20;

/// Where a record has what: byte offsets into `CUpti_ActivityKernel5` to `…10`, all of which are 160 bytes or longer.
mod at {
    pub(super) const KIND: usize = 0;
    pub(super) const REGISTERS: usize = 6;
    pub(super) const START: usize = 16;
    pub(super) const END: usize = 24;
    pub(super) const DEVICE: usize = 40;
    pub(super) const CONTEXT: usize = 44;
    pub(super) const STREAM: usize = 48;
    pub(super) const GRID: usize = 52;
    pub(super) const BLOCK: usize = 64;
    pub(super) const STATIC_SHARED: usize = 76;
    pub(super) const DYNAMIC_SHARED: usize = 80;
    pub(super) const CORRELATION: usize = 92;
    pub(super) const NAME: usize = 104;
    pub(super) const GRAPH_NODE: usize = 144;
}

/// The functions that are used, as CUPTI's headers declare them.
struct Api {
    enable: unsafe extern "C" fn(c_int) -> Status,
    disable: unsafe extern "C" fn(c_int) -> Status,
    flush: unsafe extern "C" fn(u32) -> Status,
    dropped: unsafe extern "C" fn(*mut c_void, u32, *mut usize) -> Status,
    context_id: unsafe extern "C" fn(*mut c_void, *mut u32) -> Status,
    stream_id: unsafe extern "C" fn(*mut c_void, *mut c_void, u8, *mut u32) -> Status,
    text: unsafe extern "C" fn(Status, *mut *const c_char) -> Status,
}

/// The one recording of this process: CUPTI hands its callbacks nothing to tell two apart.
pub(super) struct Cupti {
    api: Api,
    version: u32,
}

/// One stream, as CUPTI counts: it records the kernels of the whole process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    context_id: u32,
    stream_id: u32,
}

impl Owner {
    /// The records of this stream; all of them where none is, since what a graph runs may be counted elsewhere.
    fn keep(self, mut records: Vec<KernelRecord>) -> Vec<KernelRecord> {
        let own = |r: &KernelRecord| (r.context_id, r.stream_id) == (self.context_id, self.stream_id);
        if records.iter().any(own) {
            records.retain(own);
        }
        records
    }
}

/// What CUPTI has delivered and nobody has taken, and how to read its buffers.
static DELIVERED: Mutex<(Vec<KernelRecord>, Option<NextRecord>)> = Mutex::new((Vec::new(), None));
static IN_USE: AtomicBool = AtomicBool::new(false);

/// Whether anybody in this process records.
pub(super) fn records() -> bool {
    IN_USE.load(Ordering::SeqCst)
}

impl Cupti {
    /// Loads CUPTI and tries whether it will record; a context must be current.
    ///
    /// # Errors
    /// No library, another profiler in its place, no permission, a recording already under way; each says what to
    /// do about it.
    pub(super) fn open() -> Result<Self> {
        let cupti = Self::load()?;
        ensure!(!IN_USE.swap(true, Ordering::SeqCst), "cuda: CUPTI is already recording in this process");
        // From here on dropping `cupti` ends the use.
        cupti.enable(true)?;
        cupti.enable(false)?;
        Ok(cupti)
    }

    fn load() -> Result<Self> {
        let libraries = super::library::open("libcupti", "", "nvidia-cuda-cupti")?;
        let library = &libraries[0];
        let mut version = 0;
        // SAFETY: the types are those of cupti_activity.h, cupti_result.h and cupti_version.h, unchanged from
        // CUDA 12 to 13; the two callbacks are `extern "C"` functions that live as long as the program.
        let (api, status) = unsafe {
            let get_version: unsafe extern "C" fn(*mut u32) -> Status = *library.get(b"cuptiGetVersion\0")?;
            let register: unsafe extern "C" fn(Request, Complete) -> Status =
                *library.get(b"cuptiActivityRegisterCallbacks\0")?;
            let next: NextRecord = *library.get(b"cuptiActivityGetNextRecord\0")?;
            let api = Api {
                enable: *library.get(b"cuptiActivityEnable\0")?,
                disable: *library.get(b"cuptiActivityDisable\0")?,
                flush: *library.get(b"cuptiActivityFlushAll\0")?,
                dropped: *library.get(b"cuptiActivityGetNumDroppedRecords\0")?,
                context_id: *library.get(b"cuptiGetContextId\0")?,
                stream_id: *library.get(b"cuptiGetStreamIdEx\0")?,
                text: *library.get(b"cuptiGetResultString\0")?,
            };
            lock().1 = Some(next);
            get_version(&mut version);
            (api, register(requested, completed))
        };
        // CUPTI has threads of its own: it stays loaded.
        std::mem::forget(libraries);
        let cupti = Self { api, version };
        cupti.check("registering for records", status)?;
        Ok(cupti)
    }

    /// As in `13.0`, or CUPTI's own count in versions before 13.
    pub(super) fn version(&self) -> String {
        match self.version {
            v if v >= 130_000 => format!("{}.{}", v / 10_000, v % 10_000 / 100),
            v => format!("API {v}"),
        }
    }

    /// Starts or stops recording kernels.
    pub(super) fn enable(&self, on: bool) -> Result<()> {
        let call = if on { self.api.enable } else { self.api.disable };
        // SAFETY: takes a kind.
        let status = unsafe { call(CONCURRENT_KERNEL) };
        self.check(if on { "starting to record" } else { "ending to record" }, status)
    }

    /// What CUPTI calls a stream and its context, given by the driver's handles.
    ///
    /// # Errors
    /// Handles that are none.
    pub(super) fn owner(&self, (context, stream): (*mut c_void, *mut c_void)) -> Result<Owner> {
        let (mut context_id, mut stream_id) = (0, 0);
        // SAFETY: CUPTI checks both handles and writes one number each; 0: streams are not per thread.
        let statuses = unsafe {
            [(self.api.context_id)(context, &mut context_id), (self.api.stream_id)(context, stream, 0, &mut stream_id)]
        };
        statuses.into_iter().try_for_each(|status| self.check("numbering the stream", status))?;
        Ok(Owner { context_id, stream_id })
    }

    /// The kernels of `owner` that ran since this was called last, in the order of their starts. None of its own may
    /// be running; what others in this process run is left out.
    ///
    /// # Errors
    /// CUPTI lost some.
    pub(super) fn take(&self, owner: Owner) -> Result<Vec<KernelRecord>> {
        let mut records = owner.keep(self.flush()?);
        records.sort_by_key(|record| (record.start_ns, record.end_ns));
        Ok(records)
    }

    fn flush(&self) -> Result<Vec<KernelRecord>> {
        // SAFETY: takes a flag; the callbacks run inside this call or on CUPTI's thread.
        let status = unsafe { (self.api.flush)(FORCED) };
        self.check("fetching records", status)?;
        let mut lost = 0;
        // SAFETY: writes one number; null asks for records of no context in particular.
        unsafe { (self.api.dropped)(ptr::null_mut(), 0, &mut lost) };
        ensure!(lost == 0, "cuda: CUPTI lost {lost} records: take the profile again");
        Ok(std::mem::take(&mut lock().0))
    }

    fn check(&self, what: &str, status: Status) -> Result<()> {
        match status {
            0 => return Ok(()),
            OTHER_SUBSCRIBER => bail!("cuda: CUPTI is busy: another profiler is attached to this program"),
            NO_PRIVILEGES => bail!(
                "cuda: CUPTI may not record for this user: allow it with the driver's option \
                 NVreg_RestrictProfilingToAdminUsers=0, or run as root"
            ),
            _ => {}
        }
        let mut text = ptr::null();
        // SAFETY: writes a pointer to a constant, or leaves null.
        unsafe { (self.api.text)(status, &mut text) };
        // SAFETY: a constant C string if it is not null.
        let text = if text.is_null() { "".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy() };
        bail!("cuda: CUPTI failed at {what}: {status} {text}")
    }
}

impl Drop for Cupti {
    fn drop(&mut self) {
        let _ = self.enable(false);
        let _ = self.flush();
        IN_USE.store(false, Ordering::SeqCst);
    }
}

fn lock() -> std::sync::MutexGuard<'static, (Vec<KernelRecord>, Option<NextRecord>)> {
    DELIVERED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const LAYOUT: Layout = match Layout::from_size_align(BUFFER, 64) {
    Ok(layout) => layout,
    Err(_) => panic!("a valid layout"),
};

/// CUPTI asks for a buffer.
extern "C" fn requested(buffer: *mut *mut u8, size: *mut usize, most: *mut usize) {
    // SAFETY: CUPTI passes three places to write to; the layout is not empty.
    unsafe {
        let memory = alloc(LAYOUT);
        *buffer = memory;
        *size = if memory.is_null() { 0 } else { BUFFER };
        *most = 0;
    }
}

/// CUPTI gives a buffer back, `valid` bytes of it filled.
extern "C" fn completed(_: *mut c_void, _: u32, buffer: *mut u8, _: usize, valid: usize) {
    let mut delivered = lock();
    if let (Some(next), true) = (delivered.1, valid > 0) {
        let mut record = ptr::null_mut();
        // SAFETY: `buffer` was filled by CUPTI, which walks it from record to record.
        while unsafe { next(buffer, valid, &mut record) } == 0 {
            // SAFETY: a record of CUPTI's, inside the buffer.
            delivered.0.extend(unsafe { kernel(record) });
        }
    }
    drop(delivered);
    if !buffer.is_null() {
        // SAFETY: allocated by `requested` with this layout, given back once.
        unsafe { dealloc(buffer, LAYOUT) };
    }
}

/// What a record says, if it is one of a kernel.
///
/// # Safety
/// `record` must point to a whole activity record.
unsafe fn kernel(record: *const u8) -> Option<KernelRecord> {
    // SAFETY: promised by the caller: kernel records are longer than all that is read here. Records are packed to
    // 8 bytes, reads assume nothing.
    let (u16_at, u32_at, u64_at) = unsafe {
        (
            |at: usize| record.add(at).cast::<u16>().read_unaligned(),
            |at: usize| record.add(at).cast::<u32>().read_unaligned(),
            |at: usize| record.add(at).cast::<u64>().read_unaligned(),
        )
    };
    if u32_at(at::KIND) as c_int != CONCURRENT_KERNEL {
        return None;
    }
    let name = u64_at(at::NAME) as *const c_char;
    // SAFETY: CUPTI keeps the name as long as its module is loaded, and says so with a C string or null.
    let name = if name.is_null() { "".into() } else { unsafe { CStr::from_ptr(name) }.to_string_lossy() };
    let three = |at: usize| [u32_at(at), u32_at(at + 4), u32_at(at + 8)];
    Some(KernelRecord {
        name: name.into_owned(),
        start_ns: u64_at(at::START),
        end_ns: u64_at(at::END),
        grid: three(at::GRID),
        block: three(at::BLOCK),
        registers: u32::from(u16_at(at::REGISTERS)),
        static_shared: u32_at(at::STATIC_SHARED),
        dynamic_shared: u32_at(at::DYNAMIC_SHARED),
        device_id: u32_at(at::DEVICE),
        context_id: u32_at(at::CONTEXT),
        stream_id: u32_at(at::STREAM),
        correlation_id: u64::from(u32_at(at::CORRELATION)),
        graph_node_id: u64_at(at::GRAPH_NODE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs the library, not a GPU: `scripts/cuda-toolchain.sh tests`, then `DECDEC_CUDA_LIBRARIES=.cache/cuda/lib`.
    #[test]
    fn the_library_has_all_that_is_called() {
        match Cupti::load() {
            Ok(cupti) => assert!(cupti.version > 0 && !cupti.version().is_empty()),
            Err(error) => {
                let text = format!("{error:#}");
                assert!(text.contains("libcupti.so of CUDA 12 or 13 not found"), "{text}");
                crate::devices::skip("no CUPTI");
            }
        }
    }

    /// The offsets against NVIDIA's own header, by the C compiler.
    #[test]
    fn offsets_are_those_of_the_header() {
        let include = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/cuda/include");
        if !include.join("cupti_activity.h").exists() || !include.join("cuda.h").exists() {
            let what = "no cupti_activity.h and cuda.h in .cache/cuda/include (scripts/cuda-toolchain.sh)";
            crate::devices::skip(what);
            return;
        }
        let fields = [
            ("kind", at::KIND),
            ("registersPerThread", at::REGISTERS),
            ("start", at::START),
            ("end", at::END),
            ("deviceId", at::DEVICE),
            ("contextId", at::CONTEXT),
            ("streamId", at::STREAM),
            ("gridX", at::GRID),
            ("blockX", at::BLOCK),
            ("staticSharedMemory", at::STATIC_SHARED),
            ("dynamicSharedMemory", at::DYNAMIC_SHARED),
            ("correlationId", at::CORRELATION),
            ("name", at::NAME),
            ("graphNodeId", at::GRAPH_NODE),
        ];
        let mut text = "#include <stddef.h>\n#include \"cupti_activity.h\"\n".to_owned();
        for kind in ["CUpti_ActivityKernel5", "CUpti_ActivityKernel9"] {
            for (field, offset) in fields {
                text += &format!("_Static_assert(offsetof({kind}, {field}) == {offset}, \"{kind} {field}\");\n");
            }
        }
        text += &format!("_Static_assert(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL == {CONCURRENT_KERNEL}, \"kind\");\n");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("offsets.c");
        std::fs::write(&file, text).unwrap();
        let compiled = std::process::Command::new("cc")
            .args(["-fsyntax-only", "-I"])
            .arg(&include)
            .arg(&file)
            .output()
            .expect("a C compiler, which SQLite needs too");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    }

    /// Of a process that uses the card on other streams and in other contexts, too.
    #[test]
    fn only_the_own_stream_is_kept() {
        let record = |context_id, stream_id, start_ns| KernelRecord {
            context_id,
            stream_id,
            start_ns,
            ..KernelRecord::default()
        };
        let records = vec![record(1, 7, 10), record(1, 8, 11), record(2, 7, 12), record(1, 7, 13)];
        let kept = Owner { context_id: 1, stream_id: 7 }.keep(records.clone());
        assert_eq!(kept.iter().map(|r| r.start_ns).collect::<Vec<_>>(), [10, 13]);
        assert_eq!(Owner { context_id: 1, stream_id: 9 }.keep(records).len(), 4, "nothing is known to be ours");
    }

    /// A record as CUPTI lays it out, through the callbacks.
    #[test]
    fn a_record_is_read_field_by_field() {
        let mut bytes = [0u8; 216];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(at::KIND, &10u32.to_le_bytes());
        put(at::REGISTERS, &96u16.to_le_bytes());
        put(at::START, &7_000_000_000u64.to_le_bytes());
        put(at::END, &7_000_004_000u64.to_le_bytes());
        put(at::GRID, &132u32.to_le_bytes());
        put(at::BLOCK, &640u32.to_le_bytes());
        put(at::NAME, &(c"gemv_anyprec".as_ptr() as u64).to_le_bytes());
        put(at::GRAPH_NODE, &9u64.to_le_bytes());
        // SAFETY: as long as the longest record.
        let record = unsafe { kernel(bytes.as_ptr()) }.expect("a kernel");
        assert_eq!((record.name.as_str(), record.end_ns - record.start_ns), ("gemv_anyprec", 4000));
        assert_eq!((record.grid[0], record.block[0], record.registers, record.graph_node_id), (132, 640, 96, 9));
        bytes[0] = 1;
        // SAFETY: as above.
        assert_eq!(unsafe { kernel(bytes.as_ptr()) }, None, "a copy is no kernel");
    }
}
