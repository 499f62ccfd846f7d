//! What the CUDA tests share: the device if it is under test, noise, a small model, a distance.

#![allow(dead_code, unused_imports, reason = "not every test program uses all of it")]

#[path = "../devices/mod.rs"]
pub(crate) mod devices;
#[path = "../noise/mod.rs"]
mod noise;

use decdec::backend::cuda::{Cuda, Dtype, Options};
use decdec::config::ModelConfig;
pub(crate) use noise::Noise;
use serde_json::json;

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

/// A model with every awkward width: rows that are no whole tiles, channels that are no whole units or chunks.
pub(crate) fn small(sliding_window: Option<usize>, kv_heads: usize) -> ModelConfig {
    ModelConfig::from_json(&json!({
        "model_type": "mistral",
        "hidden_size": 576,
        "intermediate_size": 1184,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": kv_heads,
        "head_dim": 96,
        "vocab_size": 1000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": sliding_window,
        "max_position_embeddings": 512,
        "tie_word_embeddings": true,
    }))
    .expect("a small configuration")
}

/// ‖a − b‖ / ‖b‖
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b))) / norm(&mut b.iter().map(|&b| f64::from(b)))
}
