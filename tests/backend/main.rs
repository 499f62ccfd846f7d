//! Every property of a backend, once, on every backend that `DECDEC_TEST_DEVICES` names.

#[path = "../answers/mod.rs"]
mod answers;
#[path = "../changed/mod.rs"]
mod changed;
#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../reference_read/decoder.rs"]
mod decoder;
#[path = "../made/mod.rs"]
mod made;
#[path = "../noise/mod.rs"]
mod noise;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../small_model/mod.rs"]
mod small_model;
#[path = "../texts/mod.rs"]
mod texts;

mod agree;
mod attention;
mod cases;
mod dec;
mod decode;
mod gemv;
mod misuse;
mod operations;
mod record;
mod recording;
mod reference;
mod rows;
mod sampling;
mod whole;

use common::devices;
use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;

/// A backend, and what its results may differ by.
trait UnderTest: DecodeBackend {
    /// Relative error of a stored vector: 0 for f32, 2^-11 for f16.
    const ROUNDING: f64;
    /// What a product may be off by near zero: the least f32, or the least normal one where others become 0.
    const SMALLEST: f64 = 1.4e-45;
    /// How many random cases of selection and compensation it is held against.
    const CASES: usize;
}

impl UnderTest for Cpu {
    const ROUNDING: f64 = 0.0;
    const CASES: usize = 2000;
}

/// In float32; its other types have tests of their own, `tests/cuda_*.rs`.
impl UnderTest for decdec::backend::cuda::Cuda {
    const ROUNDING: f64 = 0.0;
    const CASES: usize = 10_000;
}

#[cfg(feature = "reference-wgpu")]
impl UnderTest for decdec::backend::wgsl::Wgpu {
    const ROUNDING: f64 = 0.0;
    // WGSL lets an implementation flush subnormal numbers.
    const SMALLEST: f64 = 1.18e-38;
    const CASES: usize = 300;
}

/// One named test per backend for every body.
macro_rules! on_every_backend {
    ($($module:ident :: $body:ident),* $(,)?) => {
        mod cpu {
            $(#[test]
            fn $body() {
                if crate::common::devices::is_under_test("cpu") {
                    crate::$module::$body(&decdec::backend::cpu::Cpu::new());
                }
            })*
        }

        mod cuda {
            $(#[test]
            fn $body() {
                use decdec::backend::cuda::{Cuda, Dtype, Options};
                if crate::common::devices::is_under_test("cuda") {
                    let options = Options { dtype: Dtype::Float32, ..Options::default() };
                    crate::$module::$body(&Cuda::new(0, options).unwrap());
                }
            })*
        }

        #[cfg(feature = "reference-wgpu")]
        mod wgpu {
            $(#[test]
            fn $body() {
                if crate::common::devices::is_under_test("wgpu") {
                    crate::$module::$body(&decdec::backend::wgsl::Wgpu::open(None).unwrap());
                }
            })*
        }
    };
}

on_every_backend! {
    gemv::anyprec_one_hot,
    gemv::lutgemm_one_hot,
    gemv::dense_one_hot,
    gemv::random_input,
    gemv::many_tokens,
    gemv::wide_input,
    gemv::nan_and_infinity,
    gemv::overwrites_its_rows_only,
    dec::selection,
    dec::selection_of_edges,
    dec::correction_one_hot,
    dec::correction_alone,
    dec::whole_product,
    dec::no_channels_is_the_base_product,
    dec::every_n_tb_agrees,
    dec::too_large_n_tb,
    dec::nan_comes_out,
    cases::random_cases,
    decode::embed_and_gather,
    decode::norm,
    decode::swiglu,
    decode::attention,
    decode::sliding_window,
    decode::rotation_far_out,
    decode::time_passes,
    operations::embedding_scale,
    operations::gates,
    operations::compensated_gates,
    operations::after_a_compensated_product,
    operations::norms_of_queries_and_keys,
    operations::norms_behind_a_branch,
    operations::caps_of_logits,
    attention::attention_by_layer,
    operations::operations_of_any_shape,
    attention::attention_of_any_shape,
    attention::what_layers_remember,
    attention::attention_to_bytes,
    sampling::greedy,
    sampling::draws_decide,
    sampling::awkward_logits,
    sampling::after_no_token,
    misuse::past_the_end,
    misuse::compensation_changes,
    misuse::a_state_of_another_model,
    misuse::arguments,
    misuse::logits_that_are_no_numbers,
    misuse::two_texts,
    record::every_launch_is_timed,
    record::bandwidths_are_measured,
    reference::reference_directories,
    rows::rows_of_several_texts,
    rows::a_row_of_another_slot_shows,
    rows::passes_that_cannot_be,
    rows::choices_are_taken_back,
    whole::small_models,
    whole::small_heads,
}

/// The kernels that compensate beside a product, which CUDA has in its 16-bit types.
#[test]
fn random_cases_on_cuda_in_float16() {
    use decdec::backend::cuda::{Cuda, Options, Tuning};
    if common::devices::is_under_test("cuda") {
        let cuda = Cuda::new(0, Options::default()).unwrap();
        cases::random_cases_on(&cuda, |matrices| {
            let matrices: Vec<_> = matrices.iter().collect();
            cuda.compile_ahead(&matrices, &[Tuning::default()], false, true).unwrap();
        });
    }
}

/// Gates in CUDA's 16-bit types, to which it rounds what enters a product; sums stay f32.
#[test]
fn gates_on_cuda_in_16_bits() {
    use decdec::backend::cuda::{Cuda, Dtype, Options};
    if common::devices::is_under_test("cuda") {
        for (dtype, rounding) in [(Dtype::Float16, 2f64.powi(-11)), (Dtype::Bfloat16, 2f64.powi(-8))] {
            let cuda = Cuda::new(0, Options { dtype, ..Options::default() }).unwrap();
            operations::gates_within(&cuda, rounding);
            operations::compensated_gates_within(&cuda, rounding);
            operations::after_a_compensated_product(&cuda);
        }
    }
}

/// A device that is named but not built in would otherwise pass unseen.
#[test]
fn named_devices_exist() {
    let built_in = if cfg!(feature = "reference-wgpu") { &["cpu", "cuda", "wgpu"][..] } else { &["cpu", "cuda"] };
    for name in common::devices::named_devices() {
        assert!(
            built_in.contains(&name.as_str()),
            "DECDEC_TEST_DEVICES names {name}, this build has {}",
            built_in.join(" and ")
        );
    }
}
