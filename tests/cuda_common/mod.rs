//! What the CUDA tests share: the device if it is under test, and noise.

#[path = "../devices/mod.rs"]
mod devices;
#[path = "../noise/mod.rs"]
mod noise;

use decdec::backend::cuda::{Cuda, Dtype, Options};
#[allow(unused_imports, reason = "not every test program makes noise")]
pub(crate) use noise::Noise;

/// Options of one type and `--compile`.
pub(crate) fn options(dtype: Dtype, compile: u8) -> Options {
    Options { dtype, compile, ..Options::default() }
}

/// The first CUDA device, if `DECDEC_TEST_DEVICES` names `cuda`.
pub(crate) fn cuda(options: Options) -> Option<Cuda> {
    if !devices::is_under_test("cuda") {
        return None;
    }
    Some(Cuda::new(0, options).unwrap_or_else(|e| panic!("cuda is under test, but: {e:#}")))
}
