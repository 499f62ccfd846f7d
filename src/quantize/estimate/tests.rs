//! Sizes follow the shapes of every layer, and large models fit.

use serde_json::json;

use super::*;
use crate::checkpoint::BitWidth;
use crate::config::NormPlacement;
use crate::format::Format;

/// A model of which one layer has twice the width between gate-up and down, and norms behind both branches.
#[test]
fn every_layer_counts_as_it_is() {
    let config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
    let small = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_hidden_layers": 4, "vocab_size": 1000,
    });
    let config = config.with(small).unwrap();
    let mut uneven = config.clone();
    let FeedForward::Dense { intermediate_size, .. } = &mut uneven.layers[2].feed_forward;
    *intermediate_size = 192;
    uneven.layers[2].norms = NormPlacement::Both;
    let options = Options {
        backend: Format::AnyPrec,
        bits: BitWidth::try_from(3.0).unwrap(),
        group_size: None,
        awq: false,
        refine: Refine::DEFAULT,
        calibration: Calibration::of_text(vec![1; 8192], 512, 16, "t"),
        source: "random".into(),
        overwrite: false,
    };
    let manifest = plan(&uneven, &options).unwrap();
    for layer in 0..4 {
        let [even, own] = [&config, &uneven].map(|c| layer_bytes(c, layer, &manifest));
        // 96 channels more of gate, up and down; 192 rows of gate and up; 96 channels of down; two norms.
        let (codes, residuals) = (3 * 96 * 64 * 3 / 8 + 2 * 8 * 192 + 2 * 4 * 64, 3 * 96 * 64 / 2 + 2 * 192 + 4 * 96);
        let more = if layer == 2 { (codes, residuals) } else { (0, 0) };
        assert_eq!((own.0 - even.0, own.1 - even.1), more, "layer {layer}");
        let [even, own] = [&config, &uneven].map(|c| backward::trace_bytes(c, layer));
        assert_eq!(own - even, if layer == 2 { 2 * 2 * 64 } else { 0 }, "what enters two norms is kept");
    }
    let [even, own] = [&config, &uneven].map(|c| memory(c, &options, &manifest));
    assert!(own > even, "{own}, {even}");
}

/// Layer by layer, a model of 70 billion weights goes through a GPU of 24 GB.
#[test]
fn a_model_of_70_billion_weights_fits_a_gpu_of_24_gb() {
    let tokens = vec![1; 200_704];
    let options = Options {
        backend: Format::AnyPrec,
        bits: BitWidth::try_from(3.0).unwrap(),
        group_size: None,
        awq: false,
        refine: Refine::DEFAULT,
        calibration: Calibration::of_text(tokens, 512, 392, "t"),
        source: "random".into(),
        overwrite: false,
    };
    let bytes = |preset| {
        let config = ModelConfig::preset(preset).unwrap();
        gpu::memory(&config, &options, &plan(&config, &options).unwrap())
    };
    let (small, large) = (bytes("Meta-Llama-3-8B-Instruct"), bytes("Meta-Llama-3-70B-Instruct"));
    assert!(large <= gpu::USUAL, "{large}");
    // A layer's largest matrix in f32 and a Hessian of its widest input are there at once.
    assert!(large > 4 * (57344 * 8192 + 28672 * 28672) && small <= large, "{small}, {large}");
}

/// While a small model writes its own calibration text, all of its layers are in memory in f32; while its codebooks are
/// trained, a byte and an f32 of every weight.
#[test]
fn own_text_and_training_take_the_memory_of_all_layers() {
    let config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
    let config = config.with(json!({
        "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 64, "vocab_size": 1000,
    }));
    let config = config.unwrap();
    let memory = |calibration, refine| {
        let options = Options {
            backend: Format::AnyPrec,
            bits: BitWidth::try_from(3.0).unwrap(),
            group_size: None,
            awq: false,
            refine,
            calibration,
            source: "random".into(),
            overwrite: false,
        };
        estimate(&config, &options).unwrap().memory_bytes
    };
    let layers = 4 * 64 * (4 + 4 + 2) * 1024 * 1024;
    let text = Calibration::of_text(vec![1; 16 * 256], 256, 16, "t");
    assert!(memory(Calibration::of_own(256, 16, 0), Refine::None) > layers);
    assert!(memory(text.clone(), Refine::None) < layers / 2);
    assert!(memory(text, Refine::DEFAULT) > layers / 4 * 5);
}
