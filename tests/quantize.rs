//! From a small random model to a checkpoint, with wrong options, and every kind of calibration.

mod small_model;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use decdec::backend::cpu::Cpu;
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::engine::Engine;
use decdec::eval;
use decdec::format::{Format, bytes};
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::progress::Silent;
use decdec::quantize::{
    Calibration, Options, Own, Refine, Report, ResidualOptions, Text, estimate, quantize, residuals,
};
use decdec::sampling::draws;
use decdec::source::simulated::Simulated;
use decdec::weights::{Linear, ModelWeights, Weight};
use small_model::{SmallModel, texts};

fn options(backend: Format, bits: f64) -> Options {
    Options {
        backend,
        bits: BitWidth::try_from(bits).unwrap(),
        group_size: None,
        awq: true,
        refine: Refine::Compensated { k_chunks: [[64; 4]; 2] },
        calibration: text(6),
        source: "random".into(),
        overwrite: false,
    }
}

/// `samples` windows of 24 tokens of a text without sense.
fn text(samples: usize) -> Calibration {
    let tokens = (0..400u32).map(|i| i * 37 % 89).collect();
    Calibration::of_text(tokens, 24, samples, "nonsense")
}

fn make(model: &dyn ModelWeights, options: &Options, out: &Path) -> Result<Report> {
    quantize(model, &texts(), options, out, &AtomicBool::new(false), &Silent)
}

/// What all files of a directory hold.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())).collect()
}

/// Mean squared difference between the model's matrix and the checkpoint's, with or without its residual.
fn loss(model: &SmallModel, checkpoint: &Checkpoint, layer: usize, projection: Projection, compensated: bool) -> f64 {
    let linear = checkpoint.projection(layer, projection).unwrap();
    let inputs = linear.weight.in_features();
    let original = &model.linears[layer][projection.index()];
    let (mut row, mut residual) = (vec![0.0; inputs], vec![0.0; inputs]);
    let mut sum = 0.0;
    for (r, original) in original.chunks_exact(inputs).enumerate() {
        linear.weight.row(r, &mut row);
        linear.residual.as_ref().unwrap().row(r, &mut residual);
        for ((w, q), lost) in original.iter().zip(&row).zip(&residual) {
            sum += f64::from(w - q - if compensated { *lost } else { 0.0 }).powi(2);
        }
    }
    sum / original.len() as f64
}

#[test]
fn more_bits_lose_less_and_residuals_hold_what_was_lost() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(1, 2, true);
    for backend in [Format::AnyPrec, Format::LutGemm] {
        let mut before = f64::INFINITY;
        for bits in [2.0, 3.0, 4.0, 8.0] {
            let out = dir.path().join(format!("{backend}-{bits}"));
            // Without AWQ: its scaled matrices are not those of the model; every weight by itself, as it is judged here.
            let plain = Options { awq: false, refine: Refine::None, ..options(backend, bits) };
            let report = make(&model, &plain, &out).unwrap();
            assert_eq!((report.bits, report.tokens), (vec![bits as u32; 2], 144));
            let checkpoint = Checkpoint::open(&out).unwrap();
            assert_eq!(checkpoint.manifest(), &report.manifest);
            assert_eq!(checkpoint.manifest().group_size, (backend == Format::LutGemm).then_some(64));
            assert_eq!(small_model::norms(&checkpoint, 1), model.norms[1]);
            let qkv = checkpoint.projection(0, Projection::Qkv).unwrap();
            assert_eq!(qkv.bias.as_deref(), model.qkv_bias.as_deref());
            let losses = Projection::ALL.map(|p| loss(&model, &checkpoint, 1, p, false));
            let compensated = Projection::ALL.map(|p| loss(&model, &checkpoint, 1, p, true));
            for (lost, left) in losses.iter().zip(compensated) {
                // Steps of max/7 leave max²/588 on average: a tenth, where the mean square was at least max²/59.
                assert!(left < 0.1 * lost, "{backend} {bits}: {lost} lost, {left} left");
            }
            let total: f64 = losses.iter().sum();
            assert!(total < before / 2.0, "{backend} {bits}: {total} after {before}");
            before = total;
        }
    }
}

#[test]
fn awq_scales_what_it_stores() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(2, 2, false);
    let out = dir.path().join("awq");
    // Where no compensation is planned for, residuals hold what was lost and nothing else.
    make(&model, &Options { refine: Refine::Output, ..options(Format::LutGemm, 4.0) }, &out).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let (input, _) = small_model::norms(&checkpoint, 0);
    assert_ne!(input, model.norms[0].0);
    // Undone channel by channel, what is stored is the model again.
    let linear = checkpoint.projection(0, Projection::Qkv).unwrap();
    let (mut row, mut residual) = (vec![0.0; 64], vec![0.0; 64]);
    linear.weight.row(3, &mut row);
    linear.residual.as_ref().unwrap().row(3, &mut residual);
    let original = &model.linears[0][0][3 * 64..4 * 64];
    let largest = original.iter().fold(0f32, |m, w| m.max(w.abs()));
    for k in 0..64 {
        let scale = model.norms[0].0[k] / input[k];
        let restored = (row[k] + residual[k]) / scale;
        assert!((restored - original[k]).abs() < 0.05 * largest, "channel {k}: {restored}, {}", original[k]);
    }
}

/// Mean divergence from the model of what was quantized, over windows that calibration did not see.
fn divergence(model: &SmallModel, checkpoint: &Path, k_chunk: usize) -> f64 {
    let cpu = Cpu::new();
    let source = Engine::of(Model::load(&cpu, model, |_| ()).unwrap(), 24);
    let mut quantized = Model::load(&cpu, &Checkpoint::open(checkpoint).unwrap(), |_| ()).unwrap();
    let own = LayerCompensation { n_tb: 1, k_chunks: [k_chunk; 4] };
    let compensation = Compensation { by_bits: vec![own], selection: Selection::Exact };
    quantized.compensate(Some(&compensation)).unwrap();
    let tokens: Vec<u32> = draws(2, 16 * 24).iter().map(|x| (x * 96.0) as u32).collect();
    let windows = eval::windows(&tokens, 24, 0..16).unwrap();
    let quantized = Engine::of(quantized, 24);
    eval::perplexity(&quantized, Some(&source), &windows, |_| Ok(())).unwrap().kl_divergence.unwrap()
}

#[test]
fn refining_brings_the_model_nearer_to_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(8, 3, false);
    for backend in [Format::AnyPrec, Format::LutGemm] {
        let with = |name: &str, refine| {
            let out = dir.path().join(format!("{backend}-{name}"));
            // Enough text for 128 channels: what is fitted to 144 tokens is fitted to chance.
            let tokens = draws(1, 64 * 24).iter().map(|x| (x * 96.0) as u32).collect();
            let calibration = Calibration::of_text(tokens, 24, 64, "random");
            make(&model, &Options { refine, calibration, ..options(backend, 3.0) }, &out).unwrap();
            [0, 64].map(|k_chunk| divergence(&model, &out, k_chunk))
        };
        let plain = with("none", Refine::None);
        let output = with("output", Refine::Output);
        let compensated = with("compensated", Refine::Compensated { k_chunks: [[64; 4]; 2] });
        let seen = format!("{backend}: {plain:?} none, {output:?} output, {compensated:?} compensated");
        assert!(output[0] < plain[0], "without compensation: {seen}");
        assert!(compensated[1] < plain[1] && compensated[0] < plain[0], "compensated: {seen}");
        assert!(plain[1] < plain[0], "compensation helps: {seen}");
    }
}

#[test]
fn half_of_the_layers_get_one_bit_more() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(3, 5, false);
    for backend in [Format::AnyPrec, Format::LutGemm] {
        let out = dir.path().join(backend.name());
        let report = make(&model, &options(backend, 3.5), &out).unwrap();
        assert_eq!(report.bits.iter().filter(|&&b| b == 4).count(), 2);
        assert_eq!(report.bits.iter().filter(|&&b| b == 3).count(), 3);
        assert_eq!(report.divergences.len(), 5);
        let raised = |bits| report.bits.iter().zip(&report.divergences).filter(move |(b, _)| **b == bits).map(|p| *p.1);
        let (worst, best) = (raised(4).fold(0.0, f64::max), raised(3).fold(f64::INFINITY, f64::min));
        assert!(0.0 < worst && worst <= best, "{backend}: {:?}", report.divergences);
        let checkpoint = Checkpoint::open(&out).unwrap();
        for (layer, &bits) in report.bits.iter().enumerate() {
            assert_eq!(checkpoint.bits(layer), Some(bits));
        }
        let map: BTreeMap<String, u32> =
            serde_json::from_slice(&fs::read(out.join("bitwidth_map.json")).unwrap()).unwrap();
        assert_eq!(map.len(), 5);
        assert!(map.iter().all(|(layer, bits)| report.bits[layer.parse::<usize>().unwrap()] == *bits));
    }
}

/// Whatever codes and codebooks are fitted to: one byte says 3 and 4 bits, and residuals hold what *that* lost.
#[test]
fn codebooks_are_bytes_however_they_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(9, 4, true);
    let compensated = Refine::Compensated { k_chunks: [[64; 4]; 2] };
    for (bits, refine) in [(3.0, Refine::None), (4.0, Refine::Output), (3.5, compensated), (5.0, compensated)] {
        let out = dir.path().join(format!("{bits}"));
        make(&model, &Options { refine, ..options(Format::AnyPrec, bits) }, &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        for (layer, projection) in (0..4).flat_map(|layer| Projection::ALL.map(|p| (layer, p))) {
            let linear = checkpoint.projection(layer, projection).unwrap();
            let Weight::AnyPrec(weight) = &linear.weight else { panic!("AnyPrec is asked for") };
            let lut = weight.lut().to_f32();
            let exact = bytes::one_plane_is_exact(&lut, 1 << weight.bits());
            assert_eq!(exact, bits < 5.0, "{bits} bits, layer {layer}, {projection}");
            // Negative control: one centroid of one row is one step of half precision off.
            let mut other = lut.to_vec();
            other[9] = half::f16::from_bits(half::f16::from_f32(other[9]).to_bits() ^ 1).to_f32();
            assert!(!bytes::one_plane_is_exact(&other, 1 << weight.bits()));
            let [lost, left] = [false, true].map(|c| loss(&model, &checkpoint, layer, projection, c));
            // A residual for compensation holds corrections of other channels too.
            let most = if refine == compensated { 0.8 } else { 0.2 };
            assert!(left < most * lost, "{bits} bits, layer {layer}, {projection}: {lost} lost, {left} left");
        }
    }
}

#[test]
fn sampled_text_follows_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(4, 2, false);
    let with = |name: &str, seed| {
        let calibration = Calibration::of_own(20, 3, seed);
        let out = dir.path().join(name);
        let report = make(&model, &Options { calibration, ..options(Format::AnyPrec, 3.0) }, &out).unwrap();
        assert_eq!(report.tokens, 60);
        contents(&out)
    };
    let (first, again, other) = (with("first", 1), with("again", 1), with("other", 2));
    assert_eq!(first, again);
    assert_ne!(first["thresholds.safetensors"], other["thresholds.safetensors"]);
}

#[test]
fn own_text_stands_beside_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(4, 2, false);
    let with = |name: &str, calibration: Calibration| {
        let out = dir.path().join(name);
        let report = make(&model, &Options { calibration, ..options(Format::AnyPrec, 3.0) }, &out).unwrap();
        (report.tokens, report.manifest.calibration, contents(&out))
    };
    let own = |samples, seed| Calibration { own: Some(Own { samples, seed }), ..text(6) };
    let (tokens, said, first) = with("first", own(3, 1));
    assert_eq!(tokens, 9 * 24);
    assert!(said.starts_with("nonsense, 6 x 24 tokens; the model's own text, 3 x 24 tokens, seed 1"), "{said}");
    let (_, _, other) = with("other", own(3, 2));
    let (tokens, _, alone) = with("alone", own(0, 1));
    assert_eq!(tokens, 6 * 24);
    assert_ne!(first["model.safetensors"], other["model.safetensors"]);
    assert_ne!(first["model.safetensors"], alone["model.safetensors"]);
}

/// Residuals for what is at `quantized`, as [`make`] would have made them with `options`.
fn complete(model: &dyn ModelWeights, quantized: &Path, options: &Options, out: &Path) -> Result<Report> {
    let options =
        ResidualOptions { calibration: options.calibration.clone(), source: options.source.clone(), overwrite: false };
    let (stop, bar) = (AtomicBool::new(false), Silent);
    residuals(model, &Checkpoint::open(quantized)?, &texts(), &options, out, &stop, &bar)
}

#[test]
fn residuals_for_a_pair_are_those_that_quantizing_makes() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(8, 3, true);
    for (backend, bits) in [(Format::AnyPrec, 3.0), (Format::AnyPrec, 3.5), (Format::LutGemm, 4.0)] {
        let options = Options { awq: false, refine: Refine::None, ..options(backend, bits) };
        let [whole, pair] = ["whole", "pair"].map(|name| dir.path().join(format!("{name}-{backend}-{bits}")));
        make(&model, &options, &whole).unwrap();
        let report = complete(&model, &whole, &options, &pair).unwrap();
        assert_eq!((report.tokens, report.bits.len()), (144, 3));
        assert_eq!(contents(&pair), contents(&whole), "{backend} {bits}");
    }
    // Another original leaves other residuals, one of other shapes is refused.
    let whole = dir.path().join("whole-ap-3");
    let (mut other, out) = (SmallModel::new(8, 3, true), dir.path().join("other"));
    other.linears.iter_mut().flatten().flatten().for_each(|w| *w *= 1.01);
    complete(&other, &whole, &options(Format::AnyPrec, 3.0), &out).unwrap();
    assert_ne!(contents(&out)["residuals.safetensors"], contents(&whole)["residuals.safetensors"]);
    assert_eq!(contents(&out)["model.safetensors"], contents(&whole)["model.safetensors"]);
    let refused = |model: &dyn ModelWeights, says: &str| {
        let options = options(Format::AnyPrec, 3.0);
        let message = format!("{:#}", complete(model, &whole, &options, &dir.path().join("no")).unwrap_err());
        assert!(message.contains(says), "{message}");
    };
    refused(&SmallModel::new(8, 2, true), "2 layers, the quantized model 3");
    refused(&Checkpoint::open(&whole).unwrap(), "the original is quantized itself");
    assert!(!dir.path().join("no").exists() && !dir.path().join("no.partial").exists());
}

/// A model whose matrices are those of a checkpoint, dequantized.
fn simulated(model: &SmallModel, checkpoint: &Checkpoint) -> SmallModel {
    let row = |linear: &Linear<'_>, row| {
        let mut values = vec![0.0; linear.weight.in_features()];
        linear.weight.row(row, &mut values);
        values
    };
    let linears = (0..model.config.layers.len()).map(|layer| {
        Projection::ALL.map(|projection| {
            let linear = checkpoint.projection(layer, projection).unwrap();
            (0..linear.weight.out_features()).flat_map(|r| row(&linear, r)).collect()
        })
    });
    let mut simulated = SmallModel::new(0, model.config.layers.len(), model.qkv_bias.is_some());
    (simulated.linears, simulated.norms) = (linears.collect(), model.norms.clone());
    (simulated.embedding, simulated.qkv_bias) = (model.embedding.clone(), model.qkv_bias.clone());
    simulated
}

#[test]
fn a_quantization_that_was_simulated_is_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(12, 2, true);
    let [whole, pair] = ["whole", "pair"].map(|name| dir.path().join(name));
    let options = Options { refine: Refine::None, ..options(Format::AnyPrec, 4.0) };
    make(&model, &options, &whole).unwrap();
    let checkpoint = Checkpoint::open(&whole).unwrap();
    let recovered = Simulated::recover(Box::new(simulated(&model, &checkpoint))).unwrap();
    let wanted = ResidualOptions { calibration: options.calibration, source: options.source, overwrite: false };
    let (stop, bar) = (AtomicBool::new(false), Silent);
    residuals(&model, &recovered, &texts(), &wanted, &pair, &stop, &bar).unwrap();
    let pair = Checkpoint::open(&pair).unwrap();
    for (layer, projection) in (0..2).flat_map(|layer| Projection::ALL.map(|p| (layer, p))) {
        let [whole, pair] = [&checkpoint, &pair].map(|c| c.projection(layer, projection).unwrap());
        assert_eq!(pair.weight.out_features(), whole.weight.out_features());
        let (mut a, mut b) = (vec![0.0; whole.weight.in_features()], vec![0.0; whole.weight.in_features()]);
        for row in 0..whole.weight.out_features() {
            whole.weight.row(row, &mut a);
            pair.weight.row(row, &mut b);
            assert_eq!(a, b, "layer {layer}, {projection}, row {row}");
        }
        assert_eq!((whole.residual, whole.thresholds, whole.bias), (pair.residual, pair.thresholds, pair.bias));
    }
    let error = Simulated::recover(Box::new(SmallModel::new(12, 2, true))).err().unwrap().to_string();
    assert!(error.contains("of layer 0's qkv has 64 different values, at most 16 are expected"), "{error}");
}

#[test]
fn the_scales_of_a_pair_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(10, 2, false);
    // What makes residuals for a pair does not know which channels will be taken.
    let options = Options { refine: Refine::Output, ..options(Format::LutGemm, 4.0) };
    let [whole, pair] = ["whole", "pair"].map(|name| dir.path().join(name));
    make(&model, &options, &whole).unwrap();
    complete(&model, &whole, &options, &pair).unwrap();
    let [whole, pair] = [whole, pair].map(|dir| Checkpoint::open(&dir).unwrap());
    for (layer, projection) in (0..2).flat_map(|layer| Projection::ALL.map(|p| (layer, p))) {
        let [whole, pair] = [&whole, &pair].map(|c| c.projection(layer, projection).unwrap());
        assert_eq!(whole.weight, pair.weight);
        // Scales of q, k, v and gate, up are known but for the last bits of f32. Others follow from rows of 64 weights
        // with rounding errors of a tenth (a step of a 15th of 5 deviations, over √12): 0.1 / √64.
        let (known, estimated) = (1e-4, 0.1 / 8.0);
        let off = |a: &[f32], b: &[f32]| {
            let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            squares(&mut a.iter().zip(b).map(|(a, b)| a - b)) / squares(&mut a.iter().copied())
        };
        let thresholds = off(whole.thresholds.as_ref().unwrap(), pair.thresholds.as_ref().unwrap());
        let exact = matches!(projection, Projection::Qkv | Projection::GateUp);
        let bound = if exact { known } else { 3.0 * estimated };
        assert!(thresholds < bound, "layer {layer} {projection}: thresholds are off by {thresholds}");
        // Original = weight + residual, up to what residuals round.
        let (inputs, outputs) = model.config.shape(0, projection);
        let (mut sum, mut a, mut b) = (vec![0.0; inputs], vec![0.0; inputs], vec![0.0; inputs]);
        let mut worst = 0f64;
        for row in 0..outputs {
            whole.weight.row(row, &mut sum);
            whole.residual.as_ref().unwrap().row(row, &mut a);
            pair.residual.as_ref().unwrap().row(row, &mut b);
            sum.iter_mut().zip(&mut a).zip(&mut b).for_each(|((w, a), b)| (*a, *b) = (*w + *a, *w + *b));
            worst = worst.max(off(&a, &b));
        }
        assert!(worst < 5.0 * estimated, "layer {layer} {projection}: a row is off by {worst}");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let model = SmallModel::new(6, 2, false);
    let refused = |options: Options, says: &[&str]| {
        let message = format!("{:#}", make(&model, &options, &out).unwrap_err());
        assert!(says.iter().all(|s| message.contains(s)), "{message}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{message}");
    };
    let lutgemm = options(Format::LutGemm, 3.0);
    refused(Options { group_size: Some(128), ..lutgemm.clone() }, &["128", "64 or 32"]);
    refused(Options { group_size: Some(48), ..lutgemm.clone() }, &["48", "64 or 32"]);
    let ap = options(Format::AnyPrec, 3.0);
    refused(Options { group_size: Some(64), ..ap.clone() }, &["lutgemm"]);
    let refine = Refine::Compensated { k_chunks: [[8; 4], [8, 8, 1025, 8]] };
    refused(Options { refine, ..ap.clone() }, &["--for-k-chunks", "1025", "1024"]);
    let text = |tokens, seq_len, samples| Options {
        calibration: Calibration::of_text(vec![1; tokens], seq_len, samples, "t"),
        ..ap.clone()
    };
    refused(text(10, 24, 4), &["10 tokens", "24"]);
    refused(text(400, 129, 1), &["129", "128"]);
    refused(text(400, 0, 1), &["0 tokens", "--seq-len"]);
    refused(text(400, 24, 0), &["--samples"]);
    // An id the model does not have shows when it is looked up; nothing but the unfinished job is left then.
    let mut foreign = text(24, 24, 1);
    if let Some(Text { tokens, .. }) = &mut foreign.calibration.text {
        tokens[7] = 96;
    }
    let message = make(&model, &foreign, &out).unwrap_err().to_string();
    assert!(message.contains("token 96") && !out.exists(), "{message}");

    make(&model, &ap, &out).unwrap();
    let quantized = Checkpoint::open(&out).unwrap();
    let message = make(&quantized, &ap, &dir.path().join("twice")).unwrap_err().to_string();
    assert!(message.contains("already quantized"), "{message}");
}

#[test]
fn estimated_sizes_are_those_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(7, 4, false);
    for (backend, bits) in [(Format::AnyPrec, 3.0), (Format::AnyPrec, 3.5), (Format::LutGemm, 4.0)] {
        let options = options(backend, bits);
        let estimated = estimate(&model.config, &options).unwrap();
        let out = dir.path().join(format!("{backend}-{bits}"));
        make(&model, &options, &out).unwrap();
        let size = |name: &str| fs::metadata(out.join(name)).unwrap().len() as usize;
        // A header has about a hundred bytes for every tensor.
        let headers = 8192;
        let device = size("model.safetensors");
        assert!(estimated.device_bytes < device && device < estimated.device_bytes + headers);
        let host = size("residuals.safetensors") + size("thresholds.safetensors");
        assert!(estimated.host_bytes < host && host < estimated.host_bytes + headers);
        assert!(estimated.disk_bytes > 2 * host && !estimated.time.is_zero());
    }
    let wrong = Options { group_size: Some(128), ..options(Format::LutGemm, 4.0) };
    assert!(estimate(&model.config, &wrong).is_err());
}

#[test]
fn a_model_of_8_billion_weights_fits_16_gb() {
    let config = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
    let calibration = Calibration::of_text(vec![1; 24 * 512], 512, 24, "t");
    for (backend, bits) in [(Format::AnyPrec, 3.0), (Format::LutGemm, 3.5)] {
        let options = Options { calibration: calibration.clone(), ..options(backend, bits) };
        let estimated = estimate(&config, &options).unwrap();
        assert!(estimated.memory_bytes < 12 << 30, "{backend}: {} bytes", estimated.memory_bytes);
        // Codes of 7 billion weights, embedding and head of half a billion each in 16 bits.
        let codes = 7.0e9 * bits / 8.0 + 4.0 * 128_256.0 * 4096.0;
        assert!((estimated.device_bytes as f64 / codes - 1.0).abs() < 0.25);
    }
}
