//! NVRTC, loaded at run time, and the cache of what it made.
//!
//! A kernel is named by its file and its defines. Compiled code is kept under the user's cache directory, one
//! file per (sources, defines, architecture, compiler version), written aside and renamed, checked when read.

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::{env, fs, ptr};

use anyhow::{Context, Result, bail, ensure};

use crate::files;

/// Files of `kernels-cuda/`, each by its path there and its text.
macro_rules! texts {
    ($($path:literal),* $(,)?) => { &[$(($path, include_str!(concat!("../../../kernels-cuda/", $path)))),*] };
}

/// Every kernel.
const SOURCES: &[(&str, &str)] = texts![
    "layers/layers.cu",
    "product/gemv_anyprec.cu",
    "product/gemv_lutgemm.cu",
    "product/gemv_dense.cu",
    "product/gemv_any.cu",
    "compensation/dec.cu",
    "token/rows.cu",
    "attention/attend.cu",
    "attention/attend_prompt.cu",
    "token/sample.cu",
    "device/occupy.cu",
    "device/read.cu",
    "quantize/elements.cu",
    "quantize/scores.cu",
    "quantize/watch.cu",
    "quantize/codes.cu",
    "quantize/divergence.cu",
];

/// What they include, by the name of the file alone.
const HEADERS: &[(&str, &str)] = texts![
    "attention/attend.cuh",
    "attention/attend_lanes.cuh",
    "attention/attend_tensor.cuh",
    "common.cuh",
    "compensation/dec.cuh",
    "compensation/stripe.cuh",
    "formats/anyprec.cuh",
    "formats/dense.cuh",
    "formats/lutgemm.cuh",
    "layers/flow.cuh",
    "layers/grid.cuh",
    "layers/patience.cuh",
    "layers/staging.cuh",
    "layers/stream.cuh",
    "product/dequant.cuh",
    "product/gemv.cuh",
    "product/operand.cuh",
    "product/unit.cuh",
    "quantize/block.cuh",
];

/// A path's last part.
fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Marks a cache file; the number changes with its layout.
const MAGIC: &[u8] = b"decdec02";

/// What NVRTC answers to an architecture that it does not know.
const INVALID_OPTION: c_int = 5;

type Program = *mut std::ffi::c_void;

/// The functions of NVRTC that are used, as its header declares them.
struct Api {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ptx_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

/// The compiler for one architecture.
pub(crate) struct Compiler {
    api: Api,
    version: (c_int, c_int),
    architecture: String,
    cache: Option<PathBuf>,
    _libraries: Vec<libloading::Library>,
}

impl Compiler {
    /// Loads NVRTC, to compile for `architecture`: `sm_90`, or `compute_89` for code that the driver translates. `cache` is where compiled code is kept.
    ///
    /// # Errors
    /// No NVRTC, or one without the functions that are needed; says how to get one.
    pub(crate) fn open(architecture: &str, cache: Option<PathBuf>) -> Result<Self> {
        let libraries = super::library::open("libnvrtc", "libnvrtc-builtins.so", "nvidia-cuda-nvrtc")?;
        let library = &libraries[0];
        // SAFETY: the types are those of nvrtc.h, unchanged from CUDA 12 to 13.
        let api = unsafe {
            Api {
                version: *library.get(b"nvrtcVersion\0")?,
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                ptx_size: *library.get(b"nvrtcGetPTXSize\0")?,
                ptx: *library.get(b"nvrtcGetPTX\0")?,
            }
        };
        let mut version = (0, 0);
        // SAFETY: writes two integers.
        let status = unsafe { (api.version)(&mut version.0, &mut version.1) };
        ensure!(status == 0, "cuda: nvrtcVersion failed with {status}");
        Ok(Self { api, version, architecture: architecture.to_owned(), cache, _libraries: libraries })
    }

    /// The compiler's version, as in `13.0`.
    pub(crate) fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// Compiled code of `file` with `defines` (`NAME=VALUE`), from the cache or made now.
    ///
    /// # Errors
    /// A file that is not among the kernels; the compiler's messages.
    pub(crate) fn cubin(&self, file: &str, defines: &[String]) -> Result<Vec<u8>> {
        let source = &text(file)?;
        let Some(directory) = &self.cache else {
            return Ok(self.compile(file, source, defines)?.0);
        };
        let stem = file.trim_end_matches(".cu");
        let path = directory.join(format!("{stem}-{}.cubin", &self.key(source, defines)?.to_hex()[..32]));
        if let Some(cubin) = fs::read(&path).ok().and_then(|bytes| unseal(&bytes).map(<[u8]>::to_vec)) {
            return Ok(cubin);
        }
        let (cubin, _) = self.compile(file, source, defines)?;
        let kept = files::make_directory(directory)
            .and_then(|()| files::replace(&path, |aside| Ok(fs::write(aside, seal(&cubin))?)));
        if let Err(error) = kept {
            tracing::warn!("compiled kernels are not kept: {error:#}");
        }
        Ok(cubin)
    }

    fn key(&self, source: &str, defines: &[String]) -> Result<blake3::Hash> {
        let headers = HEADERS.iter().map(|(path, _)| text(name(path))).collect::<Result<Vec<_>>>()?;
        Ok(blake3::hash(format!("{:?}", (&self.architecture, self.version, headers, source, defines)).as_bytes()))
    }

    /// Compiled code, and the compiler's log with the resources that each kernel takes.
    fn compile(&self, file: &str, source: &str, defines: &[String]) -> Result<(Vec<u8>, String)> {
        let c = |s: &str| CString::new(s).map_err(anyhow::Error::from);
        let (file_name, source) = (c(file)?, c(source)?);
        let texts = HEADERS.iter().map(|(path, _)| c(&text(name(path))?)).collect::<Result<Vec<_>>>()?;
        let names = HEADERS.iter().map(|(path, _)| c(name(path))).collect::<Result<Vec<_>>>()?;
        let mut options =
            vec![c(&format!("--gpu-architecture={}", self.architecture))?, c("--std=c++17")?, c("--ptxas-options=-v")?];
        for define in defines {
            options.push(c(&format!("-D{define}"))?);
        }
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (texts_at, names_at, options_at) = (pointers(&texts), pointers(&names), pointers(&options));

        let mut program: Program = ptr::null_mut();
        // SAFETY: every pointer is to a C string that lives to the end of this function.
        let status = unsafe {
            (self.api.create)(
                &mut program,
                source.as_ptr(),
                file_name.as_ptr(),
                HEADERS.len() as c_int,
                texts_at.as_ptr(),
                names_at.as_ptr(),
            )
        };
        ensure!(status == 0, "cuda: nvrtcCreateProgram failed with {status} for {file}");
        // SAFETY: as above; the program is destroyed below, once.
        let status = unsafe { (self.api.compile)(program, options_at.len() as c_int, options_at.as_ptr()) };
        // SAFETY: a program has a log once it was compiled, whatever came of it.
        let log = unsafe { fetch(program, self.api.log_size, self.api.log) }.unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
        let result = if status == 0 {
            let text = self.architecture.starts_with("compute_");
            let (size, get) =
                if text { (self.api.ptx_size, self.api.ptx) } else { (self.api.cubin_size, self.api.cubin) };
            // SAFETY: the program is compiled.
            unsafe { fetch(program, size, get) }.map(|code| (code, log))
        } else if status == INVALID_OPTION {
            Err(anyhow::anyhow!(
                "cuda: NVRTC {} does not know {}, install a newer CUDA toolkit (12.8 or later for sm_120): {}",
                self.version(),
                self.architecture,
                log.trim()
            ))
        } else {
            Err(anyhow::anyhow!(
                "cuda: {file} does not compile for {} with NVRTC {}: {}",
                self.architecture,
                self.version(),
                log.trim()
            ))
        };
        // SAFETY: created above, destroyed once.
        unsafe { (self.api.destroy)(&mut program) };
        result
    }
}

/// The text of a kernel file or header; from the folder `DECDEC_KERNELS` if that is set, for work on kernels.
fn text(file: &str) -> Result<Cow<'static, str>> {
    let Some((path, text)) = SOURCES.iter().chain(HEADERS).find(|(path, _)| name(path) == file) else {
        bail!("cuda: there is no kernel file {file}");
    };
    let Some(folder) = env::var_os("DECDEC_KERNELS") else {
        return Ok(Cow::Borrowed(text));
    };
    let path = PathBuf::from(folder).join(path);
    Ok(fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?.into())
}

/// What one of NVRTC's pairs of functions gives: a size, then as many bytes.
///
/// # Safety
/// `program` must be alive and hold what the functions return.
unsafe fn fetch(
    program: Program,
    size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
) -> Result<Vec<u8>> {
    let mut len = 0;
    // SAFETY: promised by the caller.
    let status = unsafe { size(program, &mut len) };
    ensure!(status == 0, "cuda: NVRTC failed with {status}");
    let mut bytes = vec![0u8; len];
    // SAFETY: promised by the caller; the buffer is as long as NVRTC asked for.
    let status = unsafe { get(program, bytes.as_mut_ptr().cast()) };
    ensure!(status == 0, "cuda: NVRTC failed with {status}");
    Ok(bytes)
}

fn seal(cubin: &[u8]) -> Vec<u8> {
    [MAGIC, blake3::hash(cubin).as_bytes(), cubin].concat()
}

/// The code in a cache file, if it is whole.
fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (sum, cubin) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<{ blake3::OUT_LEN }>()?;
    (blake3::hash(cubin) == *sum).then_some(cubin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    /// Layers in one launch, of each family that differs: shape and program.
    const LAYERS: [(&str, &str); 11] = [
        ("H=4096 I=14336 HEADS=32 KV_HEADS=8 HEAD_DIM=128 SPLITS=16 WARPS=16", LLAMA),
        ("H=2048 I=8192 HEADS=32 KV_HEADS=8 HEAD_DIM=64 SPLITS=16 WARPS=16", LLAMA),
        ("H=5120 I=17920 HEADS=40 KV_HEADS=10 HEAD_DIM=128 SPLITS=13 WARPS=10", LLAMA),
        ("H=3072 I=8192 HEADS=32 KV_HEADS=32 HEAD_DIM=96 SPLITS=4 WARPS=12", LLAMA),
        ("H=3584 I=18944 HEADS=28 KV_HEADS=4 HEAD_DIM=128 SPLITS=16 WARPS=14", LLAMA),
        ("H=8192 I=28672 HEADS=64 KV_HEADS=8 HEAD_DIM=128 SPLITS=16 WARPS=16", LLAMA),
        (
            "H=5120 I=17408 HEADS=40 KV_HEADS=8 HEAD_DIM=128 SPLITS=16 WARPS=10",
            "BEFORE=1 AFTER=0 QK_NORM=1 ACTIVATION=0 CAPPED=0 GROWS=0",
        ),
        (
            "H=3840 I=15360 HEADS=16 KV_HEADS=8 HEAD_DIM=256 SPLITS=16 WARPS=15",
            "BEFORE=1 AFTER=1 QK_NORM=1 ACTIVATION=1 CAPPED=0 GROWS=0",
        ),
        (
            "H=4608 I=36864 HEADS=32 KV_HEADS=16 HEAD_DIM=128 SPLITS=8 WARPS=9",
            "BEFORE=1 AFTER=1 QK_NORM=0 ACTIVATION=1 CAPPED=1 GROWS=0",
        ),
        (
            "H=4096 I=11008 HEADS=32 KV_HEADS=32 HEAD_DIM=128 SPLITS=4 WARPS=16",
            "BEFORE=0 AFTER=1 QK_NORM=2 ACTIVATION=0 CAPPED=0 GROWS=0",
        ),
        (
            "H=4096 I=14336 HEADS=32 KV_HEADS=8 HEAD_DIM=128 SPLITS=16 WARPS=16",
            "BEFORE=1 AFTER=0 QK_NORM=0 ACTIVATION=0 CAPPED=0 GROWS=1",
        ),
    ];
    /// Bytes that layers in one launch may keep on the stack between two phases, where a thread has 128 registers or 168 and
    /// many queries share a key; in no loop.
    const LAYERS_KEEP: u32 = 320;
    const LLAMA: &str = "BEFORE=1 AFTER=0 QK_NORM=0 ACTIVATION=0 CAPPED=0 GROWS=0";

    /// Every hot kernel as models ask for it, and every other one: file, defines.
    fn variants() -> Vec<(&'static str, Vec<String>)> {
        let split = |s: &str| s.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut all = Vec::new();
        let plain = "K=4096 R=6144 WARPS=20 STAGES=2";
        let beside = "K=4096 R=6144 WARPS=12 STAGES=3 DEC_WARPS=8 DEC_STAGED=1 DEC_WORDS=2";
        for dtype in [0, 1] {
            let inputs = ["0", "1", "2", "2 ACTIVATION=1"].into_iter().flat_map(|input| [(input, 0), (input, 1)]);
            for (input, dec) in inputs {
                let shape = if dec == 1 { beside } else { plain };
                for bits in [3, 4] {
                    let common = format!("DTYPE={dtype} INPUT={input} DEC={dec} {shape}");
                    for planes in [1, 2] {
                        all.push(("gemv_anyprec.cu", split(&format!("{common} BITS={bits} PLANES={planes}"))));
                    }
                    all.push(("gemv_lutgemm.cu", split(&format!("{common} BITS={bits} GROUP=128"))));
                }
            }
            all.push(("gemv_dense.cu", split(&format!("DTYPE={dtype} INPUT=1 DEC=0 {plain}"))));
            for (shape, rest) in [(plain, "DEC=0 GROUP=128"), (plain, "DEC=0 GROUP=32"), (beside, "DEC=1 GROUP=64")] {
                all.push(("gemv_lutgemm.cu", split(&format!("DTYPE={dtype} INPUT=1 BITS=8 {shape} {rest}"))));
            }
        }
        // SmolLM2's shapes: rows that are no whole tiles, channels that are no whole units, narrow residuals.
        let small = "K=576 R=72 WARPS=12 STAGES=3 DEC_WARPS=8 DEC_STAGED=1 DEC_WORDS=1 DTYPE=0 INPUT=1 DEC=1";
        all.push(("gemv_anyprec.cu", split(&format!("{small} BITS=3 PLANES=1"))));
        all.push(("gemv_lutgemm.cu", split(&format!("{small} BITS=4 GROUP=64"))));
        all.push(("gemv_lutgemm.cu", split(&format!("{small} BITS=4 GROUP=32"))));
        for dtype in [0, 1, 2] {
            all.push(("gemv_any.cu", split(&format!("DTYPE={dtype}"))));
            all.push(("rows.cu", split(&format!("DTYPE={dtype}"))));
            // Each group of queries and each width of heads that families have, and lanes' own.
            for (heads, kv_heads, head_dim) in [
                (32, 8, 128),
                (9, 3, 64),
                (64, 8, 128),
                (16, 8, 256),
                (8, 1, 256),
                (32, 32, 96),
                (32, 4, 80),
                (40, 8, 128),
                (24, 4, 64),
                (28, 4, 128),
                (32, 2, 128),
                (32, 1, 128),
                (12, 2, 40),
                (4, 2, 8),
            ] {
                let heads = format!("HEADS={heads} KV_HEADS={kv_heads} HEAD_DIM={head_dim}");
                for file in ["attend.cu", "attend_prompt.cu"] {
                    all.push((file, split(&format!("DTYPE={dtype} KV={dtype} SPLITS=16 {heads}"))));
                }
            }
        }
        all.push(("attend.cu", split("DTYPE=0 KV=0 SPLITS=13 HEADS=40 KV_HEADS=10 HEAD_DIM=128")));
        let formats = [(3, "FORMAT=0"), (4, "FORMAT=0"), (3, "FORMAT=1 GROUP=128"), (4, "FORMAT=1 GROUP=128")];
        for (i, (model, program)) in LAYERS.into_iter().enumerate() {
            // Formats and types with the first one's shapes.
            let (formats, dtypes) = if i == 0 { (&formats[..], 0..2) } else { (&formats[..1], 0..1) };
            for &(bits, format) in formats {
                let books = if format == "FORMAT=0" { 14 * ((16 << bits) + 128) } else { 0 };
                let sizes = format!(
                    "XS=66560 PARTS=20480 NARROW_PARTS=4096 BOOKS={books} TURNS=4 LAYER_BYTES=400 SETS=5 STAGES=3 BLOCKS=132"
                );
                for (dec, dtype) in dtypes.clone().flat_map(|dtype| [(0, dtype), (1, dtype)]) {
                    let rest = format!("DTYPE={dtype} KV={dtype} DEC={dec} BITS={bits} PLANES=1");
                    all.push(("layers.cu", split(&format!("{format} {model} {program} {sizes} {rest}"))));
                }
            }
        }
        all.push(("dec.cu", split("DTYPE=0 DEC_WORDS=2")));
        all.push(("dec.cu", split("DTYPE=0 DEC_WORDS=1")));
        all.push(("sample.cu", split("DTYPE=0 NO_TOKEN=4294967294")));
        all.push(("read.cu", split("DTYPE=0")));
        for file in ["occupy.cu", "elements.cu", "scores.cu", "watch.cu", "divergence.cu"] {
            all.push((file, split("DTYPE=0")));
        }
        for codes in ["LEVELS=8 GROUP=0", "LEVELS=256 GROUP=0", "LEVELS=8 GROUP=64"] {
            all.push(("codes.cu", split(codes)));
        }
        all
    }

    /// Needs NVRTC, not a GPU: `scripts/cuda-toolchain.sh`, then `DECDEC_CUDA_LIBRARIES=.cache/cuda/lib`; with
    /// `CUDA_SERIES=12.8` before the one and `.cache/cuda-12.8/lib` in the other, CUDA 12's. `DECDEC_TEST_ARCHITECTURES`
    /// names fewer (`sm_90,sm_120`).
    #[test]
    fn every_kernel_compiles_for_every_architecture_without_spilling() {
        let Ok(probe) = Compiler::open("sm_80", None) else {
            crate::devices::skip("no NVRTC");
            return;
        };
        drop(probe);
        let architectures = env::var("DECDEC_TEST_ARCHITECTURES");
        let architectures = architectures.as_deref().unwrap_or("sm_80,sm_86,sm_89,sm_90,sm_100,sm_103,sm_120");
        for architecture in architectures.split(',') {
            let compiler = Compiler::open(architecture, None).unwrap();
            variants().par_iter().for_each(|(file, defines)| {
                let (_, log) = compiler.compile(file, &text(file).unwrap(), defines).unwrap();
                assert!(log.contains("bytes stack frame"), "no resource report for {file}: {log}");
                // Choosing a token runs once per token, in one block: 72 bytes of stack do not show there. Layers in one
                // launch have no room in a block of sm_120 (plan.rs): they run one by one there. NVRTC 12.8 spills 16
                // bytes where 13.0 does not (sm_120, SmolLM2's LUT-GEMM). Said, not refused.
                let hot = *file != "sample.cu" && !(*file == "layers.cu" && architecture == "sm_120");
                let most = match (*file, compiler.version.0) {
                    ("layers.cu", _) => LAYERS_KEEP,
                    // In float32, of sixteen queries to a key: 12 bytes on sm_120.
                    ("attend_prompt.cu", _) | (_, ..13) => 16,
                    _ => 0,
                };
                for line in log.lines().filter(|line| hot && line.contains("bytes stack frame")) {
                    let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
                    assert!(
                        numbers.len() == 3 && numbers.iter().all(|&bytes| bytes <= most),
                        "{architecture} {file} {defines:?}: {}",
                        line.trim()
                    );
                    if numbers != [0; 3] {
                        eprintln!("NVRTC {} for {architecture}, {file}: {}", compiler.version(), line.trim());
                    }
                }
            });
        }
    }

    #[test]
    fn a_kernel_that_does_not_compile_says_why() {
        let Ok(compiler) = Compiler::open("sm_90", None) else {
            crate::devices::skip("no NVRTC");
            return;
        };
        let error = compiler.compile("dec.cu", "nonsense", &[]).unwrap_err().to_string();
        assert!(error.contains("sm_90") && error.contains("nonsense"), "{error}");
    }

    #[test]
    fn an_architecture_that_nvrtc_does_not_know_is_named() {
        let Ok(compiler) = Compiler::open("sm_999", None) else {
            crate::devices::skip("no NVRTC");
            return;
        };
        let error = compiler.cubin("rows.cu", &["DTYPE=0".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("does not know sm_999") && error.contains("12.8"), "{error}");
    }

    /// A cache that starts empty, is written by several at once, damaged, cut short, and cannot be written at all.
    #[test]
    fn the_cache_is_shared_mended_and_not_needed() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("kernels");
        let open = |cache: &std::path::Path| Compiler::open("sm_90", Some(cache.to_owned()));
        if open(&folder).is_err() {
            crate::devices::skip("no NVRTC");
            return;
        }
        let code = |cache: &std::path::Path| open(cache).unwrap().cubin("dec.cu", &["DEC_WORDS=1".to_owned()]).unwrap();
        let files = || fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();

        let made: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| code(&folder))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(made.iter().all(|code| *code == made[0] && !code.is_empty()));
        let [file] = &files()[..] else { panic!("one file is expected: {:?}", files()) };
        let whole = fs::read(file).unwrap();
        assert_eq!(unseal(&whole), Some(&made[0][..]));

        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 0x10;
        for bad in [&damaged[..], &whole[..whole.len() - 1], &[]] {
            fs::write(file, bad).unwrap();
            assert_eq!(code(&folder), made[0]);
            assert_eq!(fs::read(file).unwrap(), whole, "the file is whole again");
        }
        // What is in it is used: nothing is compiled when another code lies there.
        fs::write(file, seal(b"other")).unwrap();
        assert_eq!(code(&folder), b"other");

        // No folder can be made below a file.
        assert_eq!(code(&file.join("below")), made[0]);
        assert_eq!(files().len(), 1, "nothing else was left behind");
    }

    #[test]
    fn a_damaged_cache_file_is_not_code() {
        let sealed = seal(b"code");
        assert_eq!(unseal(&sealed), Some(b"code".as_slice()));
        for i in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[i] ^= 1;
            assert_eq!(unseal(&damaged), None, "byte {i}");
            assert_eq!(unseal(&sealed[..i]), None, "cut at {i}");
        }
    }
}
