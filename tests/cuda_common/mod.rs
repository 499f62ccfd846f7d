//! What the CUDA tests share: the device if it is under test, and noise.

#[path = "../noise/mod.rs"]
mod noise;

use decdec::backend::cuda::{Cuda, Dtype, Options};
pub(crate) use noise::Noise;

/// Options of one type and `--compile`.
pub(crate) fn options(dtype: Dtype, compile: u8) -> Options {
    Options { dtype, compile, ..Options::default() }
}

/// The first CUDA device, if `DECDEC_TEST_DEVICES` names `cuda`.
pub(crate) fn cuda(options: Options) -> Option<Cuda> {
    let devices = std::env::var("DECDEC_TEST_DEVICES").unwrap_or_default();
    if !devices.split(',').any(|d| d.trim() == "cuda") {
        eprintln!("skipped: cuda not in DECDEC_TEST_DEVICES");
        return None;
    }
    Some(Cuda::new(0, options).unwrap_or_else(|e| panic!("cuda is under test, but: {e:#}")))
}
