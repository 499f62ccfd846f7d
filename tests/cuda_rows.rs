//! Rows of whole models on CUDA: the same bits in one launch, operation by operation, and in passes of any length.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails.

mod cuda_common;

use cuda_common::{cuda, options, small};
use decdec::backend::GemvBackend;
use decdec::backend::cuda::{Card, Cuda, Dtype, Options, Tuning};
use decdec::config::ModelConfig;
use decdec::format::Storage;
use decdec::model::Model;
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;
use serde_json::{Value, json};

fn changed(config: ModelConfig, changes: Value) -> ModelConfig {
    config.with(changes).unwrap()
}

/// Logits behind each of `count` tokens, read in passes of `length`.
fn logits(cuda: &Cuda, weights: &RandomWeights, count: usize, length: usize) -> Vec<u32> {
    let model = Model::load(cuda, weights, |_| ()).unwrap();
    let mut state = model.state(1, count).unwrap();
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    let text: Vec<u32> = (0..count as u32).map(|i| i * 37 % 1000).collect();
    let mut logits = cuda.vector(length * 1000).unwrap();
    let mut all = Vec::new();
    for pass in text.chunks(length) {
        model.logits(&mut state, 0, pass, true, &mut logits).unwrap();
        let mut values = vec![0f32; pass.len() * 1000];
        cuda.read(&logits, &mut values).unwrap();
        all.extend(values.iter().map(|v| v.to_bits()));
    }
    assert!(all.iter().all(|&v| f32::from_bits(v).is_finite()));
    all
}

/// Shapes, bits and format; warps of a launch of layers.
fn cases() -> Vec<(ModelConfig, usize, Storage, Option<usize>)> {
    let two_layers = |config, changes: Value| changed(changed(config, json!({ "num_hidden_layers": 2 })), changes);
    vec![
        (small(None, 2), 3, Storage::ANYPREC, None),
        (small(None, 6), 4, Storage::lutgemm(32), Some(9)),
        // Rows of 21 spans, whose chains have one or two: by as many warps as chains, by fewer, in units.
        (two_layers(small(None, 2), json!({ "intermediate_size": 5152 })), 4, Storage::ANYPREC, Some(16)),
        (two_layers(small(None, 2), json!({ "intermediate_size": 5152 })), 3, Storage::ANYPREC, Some(8)),
        (two_layers(small(None, 3), json!({ "hidden_size": 4640 })), 3, Storage::ANYPREC, Some(16)),
        (two_layers(small(None, 3), json!({ "hidden_size": 4640 })), 3, Storage::lutgemm(32), None),
    ]
}

/// A launch of layers and its operations one by one give the same bits, on all multiprocessors and on some; another bit of
/// the weights gives others.
#[test]
fn layers_in_one_launch_have_the_bits_of_single_operations() {
    for (config, bits, format, layers) in cases() {
        let device = |one_launch, card| {
            let tuning = Tuning { one_launch: Some(one_launch), layers, ..Tuning::default() };
            let mut cuda = cuda(Options { tuning, card, ..options(Dtype::Float16, 2) })?;
            cuda.watch_layers().unwrap();
            Some(cuda)
        };
        let (Some(single), Some(fused)) = (device(false, None), device(true, None)) else { return };
        let what = format!("{} × {}, {format:?}, {layers:?}", config.hidden_size, bits);
        let weights = RandomWeights::new(config.clone(), format, bits, 5).unwrap();
        let want = logits(&single, &weights, 12, 1);
        assert!(single.timeline().unwrap().is_empty(), "{what}: the layers went in one launch");
        let other = RandomWeights::new(config, format, bits, 6).unwrap();
        assert_ne!(want, logits(&single, &other, 12, 1), "{what}: other weights change nothing");
        for cuda in [fused, device(true, Some(Card::of_multiprocessors(24))).unwrap()] {
            let got = logits(&cuda, &weights, 12, 1);
            assert!(!cuda.timeline().unwrap().is_empty(), "{what}: the layers went operation by operation");
            let differ = want.iter().zip(&got).filter(|(want, got)| want != got).count();
            assert_eq!(differ, 0, "{what}: {differ} of {} logits differ", want.len());
        }
    }
}

/// Passes of 2 to 40 tokens give the logits that single tokens give, bit for bit.
#[test]
fn passes_have_the_bits_of_single_tokens() {
    for (config, bits, format, layers) in cases() {
        let tuning = Tuning { layers, ..Tuning::default() };
        let Some(cuda) = cuda(Options { tuning, ..options(Dtype::Float16, 2) }) else { return };
        let what = format!("{} × {bits}, {format:?}", config.hidden_size);
        let weights = RandomWeights::new(config, format, bits, 5).unwrap();
        let want = logits(&cuda, &weights, 40, 1);
        for length in [2, 8, 11, 16, 40] {
            let got = logits(&cuda, &weights, 40, length);
            let differ = want.iter().zip(&got).filter(|(want, got)| want != got).count();
            assert_eq!(differ, 0, "{what}: {differ} of {} logits of passes of {length} differ", want.len());
        }
    }
}
