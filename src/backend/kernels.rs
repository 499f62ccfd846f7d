//! Which kernel of `kernels-wgsl/` is the obvious form of which in `kernels-cuda/`, and which stand alone.
//!
//! A test reads both folders and holds this table against their entry points. Quantization has no kernels in WGSL: the twin of
//! what is in `kernels-cuda/quantize/` is the arithmetic of the host (`quantize/host.rs`).

use crate::config::Activation;

/// An entry point on either side, or both.
#[derive(Debug, Clone, Copy)]
pub struct Twin {
    /// Entry point in `kernels-wgsl/`.
    pub wgsl: Option<&'static str>,
    /// Entry point in `kernels-cuda/`.
    pub cuda: Option<&'static str>,
    /// Why a side is missing or goes by another name; empty where the twins agree.
    pub why: &'static str,
}

const fn twins(name: &'static str) -> Twin {
    Twin { wgsl: Some(name), cuda: Some(name), why: "" }
}

const fn renamed(wgsl: &'static str, cuda: &'static str, why: &'static str) -> Twin {
    Twin { wgsl: Some(wgsl), cuda: Some(cuda), why }
}

const fn wgsl_only(wgsl: &'static str, why: &'static str) -> Twin {
    Twin { wgsl: Some(wgsl), cuda: None, why }
}

const fn cuda_only(cuda: &'static str, why: &'static str) -> Twin {
    Twin { wgsl: None, cuda: Some(cuda), why }
}

/// What kernels of both sides call an activation.
pub(super) const fn activation(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// Every kernel.
pub const TWINS: &[Twin] = &[
    twins("gemv_anyprec"),
    twins("gemv_lutgemm"),
    twins("gemv_dense"),
    renamed(
        "dec_select",
        "select_channels",
        "on CUDA a compensating block also selects for itself; this writes the list",
    ),
    renamed("dec_apply", "dec", "on CUDA selection and sum are one launch, mostly inside the product's"),
    renamed("rms_norm", "stage", "on CUDA one kernel normalizes, gates or only rounds the input of a product"),
    twins("embed"),
    twins("norm_qk"),
    renamed(
        "rope",
        "set_aside",
        "on CUDA keys and values take the cache's type, queries are rotated where they are used",
    ),
    wgsl_only("round_bytes", "CUDA keeps keys and values in 16 bits"),
    wgsl_only("append_bytes", "CUDA keeps keys and values in 16 bits"),
    twins("append"),
    twins("attend"),
    twins("gated"),
    cuda_only("gated_select", "the same, and the next product's selection beside it"),
    twins("add_norm"),
    twins("softcap"),
    renamed("argmax", "sample", "in WGSL only greedy choices stay on the device, others are the host's"),
    cuda_only("attend_prompt", "the WGSL attend takes any number of tokens"),
    cuda_only("decode_layers", "the operations of a token's layers in one launch; in WGSL each is a kernel of its own"),
    cuda_only("gemv_any", "widths and types without a fast form; the WGSL products take all"),
    cuda_only("dequant_any", "prompts are dense products of a library; the WGSL products take any number of tokens"),
    cuda_only("dequant_anyprec", "as dequant_any"),
    cuda_only("dequant_lutgemm", "as dequant_any"),
    cuda_only("dequant_dense", "as dequant_any"),
    cuda_only("add_bias", "after a library's product; the WGSL products add it themselves"),
    cuda_only("copy_row", "a row may await its compensation; in WGSL it is a copy of the queue"),
    cuda_only("read", "measures bandwidth; in WGSL the products measure it"),
    cuda_only(
        "occupy",
        "holds multiprocessors, to measure as a smaller card would; the WGSL reference is not measured",
    ),
    cuda_only("advance", "a replayed token reads its position from the device; in WGSL the host counts"),
];
