//! cuBLAS, loaded at run time where it is installed: products of many tokens.

use std::ffi::{c_int, c_longlong, c_void};
use std::rc::Rc;

use anyhow::{Result, ensure};

use super::Dtype;
use super::driver::Driver;
use super::graph::undisturbed;

type Handle = *mut c_void;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    u64,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

type GemmStridedBatchedEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    c_longlong,
    u64,
    c_int,
    c_int,
    c_longlong,
    *const c_void,
    u64,
    c_int,
    c_int,
    c_longlong,
    c_int,
    c_int,
    c_int,
) -> c_int;

type Trsm =
    unsafe extern "C" fn(Handle, c_int, c_int, c_int, c_int, c_int, c_int, *const f32, u64, c_int, u64, c_int) -> c_int;

// Values of cublas_api.h and library_types.h.
const TRANSPOSE: c_int = 1;
const AS_IS: c_int = 0;
const R_32F: c_int = 0;
const R_16F: c_int = 2;
const R_16BF: c_int = 14;
const LEFT: c_int = 0;
const UPPER: c_int = 1;
const NON_UNIT: c_int = 0;
const COMPUTE_32F: c_int = 68;
const COMPUTE_32F_FAST_TF32: c_int = 77;
const ALGORITHM_DEFAULT: c_int = -1;

/// Matrices of f32 in device memory, one behind the other: element `(i, j)` of matrix `b` is at `b · stride + i · lead + j`,
/// or with `across` at `b · stride + j · lead + i`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    pub(super) pointer: u64,
    pub(super) lead: usize,
    pub(super) stride: usize,
    pub(super) across: bool,
}

impl Operand {
    /// One row-major matrix of `columns` columns.
    pub(super) fn rows(pointer: u64, columns: usize) -> Self {
        Self { pointer, lead: columns, stride: 0, across: false }
    }

    /// Its transpose.
    pub(super) fn across(self) -> Self {
        Self { across: !self.across, ..self }
    }

    /// The same from element `at` on.
    pub(super) fn from(self, at: usize) -> Self {
        Self { pointer: self.pointer + 4 * at as u64, ..self }
    }

    /// Several of them, `stride` numbers apart.
    pub(super) fn apart(self, stride: usize) -> Self {
        Self { stride, ..self }
    }
}

/// How a product of f32 matrices is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Precision {
    /// In f32 throughout.
    Full,
    /// Factors rounded to TF32's 11 bits, sums in f32: on tensor cores.
    Fast,
}

pub(super) struct Blas {
    handle: Handle,
    gemm: GemmEx,
    gemm_batched: GemmStridedBatchedEx,
    trsm: Trsm,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    driver: Rc<Driver>,
    libraries: Vec<libloading::Library>,
}

impl Blas {
    /// Opens the library on the driver's stream.
    ///
    /// # Errors
    /// No library, or one that does not start.
    pub(super) fn open(driver: &Rc<Driver>) -> Result<Self> {
        let libraries = super::library::open("libcublas", "libcublasLt.so", "nvidia-cublas")?;
        let library = &libraries[0];
        let stream = driver.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the types are those of cublas_api.h, unchanged from CUDA 12 to 13.
        let (gemm, gemm_batched, trsm, destroy, status) = unsafe {
            let create: unsafe extern "C" fn(*mut Handle) -> c_int = *library.get(b"cublasCreate_v2\0")?;
            let set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> c_int =
                *library.get(b"cublasSetStream_v2\0")?;
            let gemm: GemmEx = *library.get(b"cublasGemmEx\0")?;
            let batched: GemmStridedBatchedEx = *library.get(b"cublasGemmStridedBatchedEx\0")?;
            let trsm: Trsm = *library.get(b"cublasStrsm_v2\0")?;
            let destroy: unsafe extern "C" fn(Handle) -> c_int = *library.get(b"cublasDestroy_v2\0")?;
            let _undisturbed = undisturbed();
            let mut status = create(&mut handle);
            if status == 0 {
                status = set_stream(handle, stream.cast());
            }
            (gemm, batched, trsm, destroy, status)
        };
        ensure!(status == 0, "cuda: cuBLAS does not start: status {status}");
        Ok(Self { handle, gemm, gemm_batched, trsm, destroy, driver: Rc::clone(driver), libraries })
    }

    /// `y[tokens, rows] = x[tokens, k] · w[rows, k]ᵀ` (`+ y` if `add`), sums and `y` in f32.
    #[allow(clippy::too_many_arguments, reason = "a matrix product has as many")]
    pub(super) fn product(
        &self,
        dtype: Dtype,
        w: u64,
        x: u64,
        y: u64,
        rows: usize,
        k: usize,
        tokens: usize,
        add: bool,
    ) -> Result<()> {
        let kind = match dtype {
            Dtype::Float16 => R_16F,
            Dtype::Bfloat16 => R_16BF,
            Dtype::Float32 => R_32F,
        };
        let (one, beta) = (1f32, if add { 1f32 } else { 0f32 });
        self.driver.enter()?;
        // SAFETY: the caller's buffers hold these shapes; column-major [rows, tokens] is row-major [tokens, rows].
        let status = unsafe {
            (self.gemm)(
                self.handle,
                TRANSPOSE,
                AS_IS,
                rows as c_int,
                tokens as c_int,
                k as c_int,
                (&raw const one).cast(),
                w,
                kind,
                k as c_int,
                x,
                kind,
                k as c_int,
                (&raw const beta).cast(),
                y,
                R_32F,
                rows as c_int,
                COMPUTE_32F,
                ALGORITHM_DEFAULT,
            )
        };
        ensure!(status == 0, "cuda: a product of {tokens} tokens with {rows} × {k} failed in cuBLAS: status {status}");
        Ok(())
    }

    /// `c[m, n] = alpha · a[m, k] · b[k, n] + beta · c`, for each of `count` matrices, all in f32; `c` is not `across`.
    ///
    /// # Errors
    /// A lost device, or sizes beyond what the library takes.
    pub(super) fn multiply(
        &self,
        [m, n, k]: [usize; 3],
        [a, b, c]: [Operand; 3],
        (alpha, beta): (f32, f32),
        count: usize,
        precision: Precision,
    ) -> Result<()> {
        assert!(!c.across, "results are row-major");
        if m == 0 || n == 0 || k == 0 || count == 0 {
            return Ok(());
        }
        let compute = match precision {
            Precision::Full => COMPUTE_32F,
            Precision::Fast => COMPUTE_32F_FAST_TF32,
        };
        let turned = |operand: Operand| if operand.across { TRANSPOSE } else { AS_IS };
        self.driver.enter()?;
        // SAFETY: the caller's buffers hold these shapes. The library is column-major: what is row-major here are transposes
        // there, and (a · b)ᵀ = bᵀ · aᵀ.
        let status = unsafe {
            (self.gemm_batched)(
                self.handle,
                turned(b),
                turned(a),
                c_int::try_from(n)?,
                c_int::try_from(m)?,
                c_int::try_from(k)?,
                (&raw const alpha).cast(),
                b.pointer,
                R_32F,
                c_int::try_from(b.lead)?,
                b.stride as c_longlong,
                a.pointer,
                R_32F,
                c_int::try_from(a.lead)?,
                a.stride as c_longlong,
                (&raw const beta).cast(),
                c.pointer,
                R_32F,
                c_int::try_from(c.lead)?,
                c.stride as c_longlong,
                c_int::try_from(count)?,
                compute,
                ALGORITHM_DEFAULT,
            )
        };
        ensure!(status == 0, "cuda: a product of {m} × {k} and {k} × {n} failed in cuBLAS: status {status}");
        Ok(())
    }

    /// Overwrites `rows` `[m, n]` with `rows · (L·Lᵀ)⁻¹`, for a lower triangle `L` `[n, n]` whose upper half is anything.
    ///
    /// # Errors
    /// A lost device, or sizes beyond what the library takes.
    pub(super) fn solve(&self, triangle: u64, n: usize, rows: u64, m: usize) -> Result<()> {
        let (one, n, m) = (1f32, c_int::try_from(n)?, c_int::try_from(m)?);
        self.driver.enter()?;
        // Column by column, L is an upper triangle U = Lᵀ, and rows are columns x of Uᵀ·U·x.
        for turned in [TRANSPOSE, AS_IS] {
            // SAFETY: the caller's buffers hold these shapes.
            let status =
                unsafe { (self.trsm)(self.handle, LEFT, UPPER, turned, NON_UNIT, n, m, &one, triangle, n, rows, n) };
            ensure!(status == 0, "cuda: a triangle of {n} and {m} rows failed in cuBLAS: status {status}");
        }
        Ok(())
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // It waits for the whole device, and so does the library when it is closed.
        if !self.driver.settles() {
            return std::mem::forget(std::mem::take(&mut self.libraries));
        }
        let _undisturbed = undisturbed();
        // SAFETY: created by `open`, destroyed once.
        unsafe { (self.destroy)(self.handle) };
    }
}
