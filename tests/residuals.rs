//! Residuals are made against the model that was quantized, however badly, and against no other.

mod small_model;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::config::Projection;
use decdec::format::Format;
use decdec::progress::Silent;
use decdec::quantize::{Calibration, Options, Refine, ResidualOptions, quantize, residuals};
use decdec::source::simulated::Simulated;
use decdec::weights::ModelWeights;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use small_model::{SmallModel, random, texts};

/// Layers of the models here.
const LAYERS: usize = 2;

fn calibration() -> Calibration {
    let tokens = (0..200u32).map(|i| i * 37 % 89).collect();
    Calibration::of_text(tokens, 24, 4, "nonsense")
}

fn quantized(model: &SmallModel, backend: Format, bits: f64, awq: bool, refine: Refine, out: &Path) -> Checkpoint {
    let options = Options {
        backend,
        bits: BitWidth::try_from(bits).expect("a width"),
        group_size: None,
        awq,
        refine,
        calibration: calibration(),
        source: "random".into(),
        overwrite: true,
    };
    quantize(model, &texts(), &options, out, &AtomicBool::new(false), &Silent).expect("quantized");
    Checkpoint::open(out).expect("it opens")
}

fn complete(original: &SmallModel, quantized: &dyn ModelWeights, out: &Path) -> Result<()> {
    let options = ResidualOptions { calibration: calibration(), source: "random".into(), overwrite: true };
    let (stop, bar) = (AtomicBool::new(false), Silent);
    residuals(original, quantized, &texts(), &options, out, &stop, &bar).map(drop)
}

/// Checks the message of a refusal: the tensor, the share, and what to do. Nothing is left.
fn assert_strangers(result: Result<()>, tensor: &str, out: &Path) -> f64 {
    let message = format!("{:#}", result.expect_err("strangers"));
    let rest = message.split_once(&format!("tensor {tensor}: what the quantized model lost of the original has "));
    let (_, rest) = rest.unwrap_or_else(|| panic!("{message}"));
    let (share, rest) = rest.split_once(' ').expect("a share");
    assert_eq!(
        rest,
        "of the energy of both, up to 0.5 is expected and 1 is what two unrelated models have: give the very model \
         that was quantized"
    );
    assert!(!out.exists(), "nothing is written");
    share.parse().expect("a number")
}

#[test]
fn every_way_to_quantize_is_related_to_its_original_and_no_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let [model, stranger] = [1, 2].map(|seed| SmallModel::new(seed, LAYERS, true));
    let (made, out) = (dir.path().join("made"), dir.path().join("out"));
    for (backend, awq) in [(Format::AnyPrec, false), (Format::LutGemm, false), (Format::LutGemm, true)] {
        for bits in [2.0, 2.5, 3.0, 4.0, 8.0] {
            for refine in [Refine::None, Refine::DEFAULT] {
                let quantized = quantized(&model, backend, bits, awq, refine, &made);
                complete(&model, &quantized, &out)
                    .unwrap_or_else(|e| panic!("{backend} {bits} {awq} {refine:?}: {e:#}"));
                std::fs::remove_dir_all(&out).expect("removable");
                let refused = complete(&stranger, &quantized, &out);
                // 64 x 64 weights: 1 give or take 2 / 64, three times over.
                let share = assert_strangers(refused, "model.layers.0.self_attn.q_proj.weight", &out);
                assert!(awq || (0.9..1.1).contains(&share), "{share}");
            }
        }
    }
}

/// The model with every matrix changed by `change(layer, projection, weights)`.
fn changed(model: &SmallModel, mut change: impl FnMut(usize, Projection, &mut [f32])) -> SmallModel {
    let mut new = SmallModel::new(1, LAYERS, true);
    for (layer, linears) in new.linears.iter_mut().enumerate() {
        for projection in Projection::ALL {
            let weights = &mut linears[projection.index()];
            weights.clone_from(&model.linears[layer][projection.index()]);
            change(layer, projection, weights);
        }
    }
    new
}

/// Rounds every row to four levels between its smallest and its largest weight: as bad as rounding to 2 bits gets.
fn rounded(weights: &mut [f32], row: usize) {
    for row in weights.chunks_exact_mut(row) {
        let (min, max) = row.iter().fold((f32::MAX, f32::MIN), |(min, max), &w| (min.min(w), max.max(w)));
        let step = (max - min) / 3.0;
        row.iter_mut().for_each(|w| *w = min + ((*w - min) / step).round() * step);
    }
}

#[test]
fn bad_quantizers_pass() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = SmallModel::new(1, LAYERS, true);
    let out = dir.path().join("out");
    let two_bits = changed(&model, |_, projection, weights| rounded(weights, model.config.shape(0, projection).0));
    complete(&model, &Simulated::recover(Box::new(two_bits)).expect("few values"), &out).expect("related");
    // One row of huge weights takes all levels of a matrix, not of its rows.
    let mut outliers = SmallModel::new(1, LAYERS, true);
    outliers.linears.iter_mut().flatten().for_each(|weights| weights[..32].iter_mut().for_each(|w| *w *= 50.0));
    let two_bits =
        changed(&outliers, |_, projection, weights| rounded(weights, outliers.config.shape(0, projection).0));
    complete(&outliers, &Simulated::recover(Box::new(two_bits)).expect("few values"), &out).expect("related");
}

#[test]
fn one_stranger_among_the_tensors_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let [model, stranger] = [1, 2].map(|seed| SmallModel::new(seed, LAYERS, true));
    let (made, out) = (dir.path().join("made"), dir.path().join("out"));
    let quantized = quantized(&model, Format::AnyPrec, 3.0, false, Refine::None, &made);
    // Rows of the fused matrices, channels of them: q, k, v, o, gate, up, down.
    let parts = [
        ("self_attn.q_proj", Projection::Qkv, 0..64),
        ("self_attn.k_proj", Projection::Qkv, 64..96),
        ("self_attn.v_proj", Projection::Qkv, 96..128),
        ("self_attn.o_proj", Projection::O, 0..64),
        ("mlp.gate_proj", Projection::GateUp, 0..128),
        ("mlp.up_proj", Projection::GateUp, 128..256),
        ("mlp.down_proj", Projection::Down, 0..64),
    ];
    for layer in 0..LAYERS {
        for (name, of, rows) in &parts {
            let columns = model.config.shape(0, *of).0;
            let range = rows.start * columns..rows.end * columns;
            let other = changed(&model, |l, projection, weights| {
                if (l, projection) == (layer, *of) {
                    let theirs = &stranger.linears[layer][of.index()];
                    weights[range.clone()].copy_from_slice(&theirs[range.clone()]);
                }
            });
            let refused = complete(&other, &quantized, &out);
            let share = assert_strangers(refused, &format!("model.layers.{layer}.{name}.weight"), &out);
            assert!((0.85..1.15).contains(&share), "{name}: {share}");
        }
    }
    for factor in [100.0, 0.01, -1.0] {
        let scaled = changed(&model, |_, _, weights| weights.iter_mut().for_each(|w| *w *= factor));
        let share =
            assert_strangers(complete(&scaled, &quantized, &out), "model.layers.0.self_attn.q_proj.weight", &out);
        assert!(share > 0.9, "{factor}: {share}");
    }
    complete(&model, &quantized, &out).expect("the model itself");
}

/// Noise of `n` times the energy of the weights is `n / (2 + n)` of both: the limit is at twice the energy.
#[test]
fn the_limit_is_where_the_message_says() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = SmallModel::new(1, LAYERS, true);
    let (made, out) = (dir.path().join("made"), dir.path().join("out"));
    let quantized = quantized(&model, Format::AnyPrec, 8.0, false, Refine::None, &made);
    let noisy = |n: f32| {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        changed(&model, |_, projection, weights| {
            let amplitude = 2.0 / (model.config.shape(0, projection).0 as f32).sqrt() * n.sqrt();
            let noise = random(&mut rng, weights.len(), amplitude);
            weights.iter_mut().zip(noise).for_each(|(w, noise)| *w += noise);
        })
    };
    for n in [0.5, 1.0, 1.7] {
        complete(&noisy(n), &quantized, &out).unwrap_or_else(|e| panic!("{n}: {e:#}"));
        std::fs::remove_dir_all(&out).expect("removable");
    }
    for n in [2.4f32, 4.0] {
        let share =
            assert_strangers(complete(&noisy(n), &quantized, &out), "model.layers.0.self_attn.q_proj.weight", &out);
        let expected = f64::from(n / (2.0 + n));
        assert!((share - expected).abs() < 0.05, "{share}, {expected} is expected");
    }
}
