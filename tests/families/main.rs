//! The model families: for each a module of tests, one for every column of the table of models (`docs/models.md`).
//!
//! Their models are the tiny ones of `tests/data/models`; a family is called what `config.json` calls it.

#[path = "../devices/mod.rs"]
mod devices;
#[path = "../made/mod.rs"]
mod made;

mod asks;
mod chat;
mod half;
mod library;
mod logits;
mod models;
mod program;
mod table;

use decdec::backend::cuda::{Cuda, Dtype, Options};

/// Runs `test` on the first CUDA device, if that is under test.
fn on_cuda(dtype: Dtype, test: impl FnOnce(&Cuda)) {
    if devices::is_under_test("cuda") {
        test(&Cuda::new(0, Options { dtype, ..Options::default() }).expect("cuda is under test"));
    }
}

/// Runs `test` on the first Vulkan device, if that is under test.
#[cfg(feature = "reference-wgpu")]
fn on_wgpu(test: impl FnOnce(&decdec::backend::wgsl::Wgpu)) {
    if devices::is_under_test("wgpu") {
        test(&decdec::backend::wgsl::Wgpu::open(None).expect("wgpu is under test"));
    }
}

/// The tests of each family; bodies do what they say for all of its models.
macro_rules! families {
    ($($family:ident)*) => {$(
        mod $family {
            use decdec::backend::cpu::Cpu;
            use decdec::backend::cuda::Dtype;

            #[cfg(feature = "reference-wgpu")]
            use crate::on_wgpu;
            use crate::{chat, half, library, logits, on_cuda, program};

            const FAMILY: &str = stringify!($family);

            mod cpu {
                use super::*;

                #[test]
                fn logits() {
                    if crate::devices::is_under_test("cpu") {
                        logits::of_directories(&Cpu::new(), FAMILY);
                    }
                }
            }

            #[cfg(feature = "reference-wgpu")]
            mod wgpu {
                use super::*;

                #[test]
                fn logits() {
                    on_wgpu(|backend| logits::of_directories(backend, FAMILY));
                }
            }

            mod cuda {
                use super::*;

                #[test]
                fn float32() {
                    on_cuda(Dtype::Float32, |backend| logits::of_directories(backend, FAMILY));
                }

                #[test]
                fn float16() {
                    on_cuda(Dtype::Float16, |backend| half::within_rounding(backend, FAMILY, "float16"));
                }

                #[test]
                fn bfloat16() {
                    on_cuda(Dtype::Bfloat16, |backend| half::within_rounding(backend, FAMILY, "bfloat16"));
                }
            }

            mod gguf {
                use super::*;

                #[test]
                fn cpu() {
                    if crate::devices::is_under_test("cpu") {
                        logits::of_gguf(&Cpu::new(), FAMILY);
                    }
                }

                #[cfg(feature = "reference-wgpu")]
                #[test]
                fn wgpu() {
                    on_wgpu(|backend| logits::of_gguf(backend, FAMILY));
                }

                #[test]
                fn cuda() {
                    on_cuda(Dtype::Float32, |backend| logits::of_gguf(backend, FAMILY));
                }
            }

            #[test]
            fn chat() {
                chat::chat(FAMILY);
            }

            #[test]
            fn library() {
                library::lives(FAMILY);
            }

            families!(@program quantize residuals convert generate eval profile tune);
        }
    )*};
    (@program $($road:ident)*) => {$(
        #[test]
        fn $road() {
            program::on_each_model(FAMILY, program::$road);
        }
    )*};
}

families! {
    llama
    mistral
    ministral3
    phi3
    qwen2
    qwen3
    smollm3
    gemma2
    gemma3_text
    olmo2
    olmo3
    granite
    glm4
}
