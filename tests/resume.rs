//! Jobs that were interrupted: they go on to the same files, and nothing of another model is in them.

mod changed;
mod small_model;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use changed::{Change, Changed};
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::config::Projection;
use decdec::format::Format;
use decdec::progress::Silent;
use decdec::quantize::{Calibration, Interrupted, Options, Refine, Report, ResidualOptions, Text, quantize, residuals};
use decdec::tokenizer::TextFiles;
use decdec::weights::{Linear, ModelWeights};
use serde_json::json;
use small_model::{SmallModel, texts};

fn options(backend: Format, bits: f64) -> Options {
    let tokens = (0..400u32).map(|i| i * 37 % 89).collect();
    Options {
        backend,
        bits: BitWidth::try_from(bits).unwrap(),
        group_size: None,
        awq: true,
        refine: Refine::Compensated { k_chunks: [[64; 4]; 2] },
        calibration: Calibration::of_text(tokens, 24, 6, "nonsense"),
        source: "random".into(),
        overwrite: false,
    }
}

fn make(model: &dyn ModelWeights, options: &Options, out: &Path) -> Result<Report> {
    quantize(model, &texts(), options, out, &AtomicBool::new(false), &Silent)
}

/// What all files of a directory hold.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())).collect()
}

/// A model during whose quantization someone presses Ctrl-C: when layer `at` is read for the second time. For the first
/// time it is read to see which model this is.
struct Interrupting<'a> {
    model: &'a SmallModel,
    stop: AtomicBool,
    at: usize,
    reads: AtomicUsize,
}

impl<'a> Interrupting<'a> {
    fn new(model: &'a SmallModel, at: usize) -> Changed<Self> {
        Changed(Self { model, stop: AtomicBool::new(false), at, reads: AtomicUsize::new(0) })
    }
}

impl Change for Interrupting<'_> {
    fn of(&self) -> &dyn ModelWeights {
        self.model
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        if layer == self.at && projection == Projection::Down && self.reads.fetch_add(1, Ordering::Relaxed) == 1 {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.model.projection(layer, projection)
    }
}

#[test]
fn an_interrupted_job_ends_in_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(5, 4, false);
    let out = dir.path().join("out");
    // At 0 the layers are done, and read again to choose between widths.
    let (mixed, single) = (&[1, 2, 3, 0][..], &[2, 3][..]);
    for (backend, bits, reads) in [(Format::AnyPrec, 3.5, mixed), (Format::LutGemm, 3.0, single)] {
        let whole = dir.path().join(format!("whole-{backend}"));
        make(&model, &options(backend, bits), &whole).unwrap();
        let before = out.exists().then(|| contents(&out));
        let overwriting = Options { overwrite: true, ..options(backend, bits) };
        for &at in reads {
            let model = Interrupting::new(&model, at);
            let error = quantize(&model, &texts(), &overwriting, &out, &model.0.stop, &Silent);
            assert!(error.unwrap_err().is::<Interrupted>());
            assert_eq!(out.exists().then(|| contents(&out)), before, "what was there is left alone");
        }
        let kept = fs::read_dir(dir.path().join("out.partial")).unwrap().count();
        assert!(kept > 3, "finished layers are kept");
        make(&model, &overwriting, &out).unwrap();
        assert_eq!(contents(&out), contents(&whole));
        assert!(!dir.path().join("out.partial").exists());
    }
}

#[test]
fn interrupted_residuals_end_in_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = SmallModel::new(11, 4, false);
    let options = Options { awq: false, refine: Refine::None, ..options(Format::LutGemm, 3.0) };
    let [whole, out] = ["whole", "out"].map(|name| dir.path().join(name));
    make(&model, &options, &whole).unwrap();
    let quantized = Checkpoint::open(&whole).unwrap();
    let wanted = ResidualOptions { calibration: options.calibration, source: options.source, overwrite: false };
    for at in [1, 3] {
        let model = Interrupting::new(&model, at);
        let bar = Silent;
        let error = residuals(&model, &quantized, &texts(), &wanted, &out, &model.0.stop, &bar);
        assert!(error.unwrap_err().is::<Interrupted>() && !out.exists());
        assert!(dir.path().join("out.partial/layer-000-3bit.safetensors").exists(), "finished layers are kept");
    }
    let running = AtomicBool::new(false);
    residuals(&model, &quantized, &texts(), &wanted, &out, &running, &Silent).unwrap();
    assert_eq!(contents(&out), contents(&whole));
    assert!(!dir.path().join("out.partial").exists());
}

/// What is changed, and how.
type Difference = (&'static str, fn(&mut SmallModel));

/// Everything in a small model that can be another number.
const CHANGES: [Difference; 12] = [
    ("embedding", |m| m.embedding[4000] += 0.25),
    ("head", |m| m.head.as_mut().unwrap()[95 * 64] += 0.25),
    ("final norm", |m| m.final_norm[63] += 0.25),
    ("first input norm", |m| m.norms[0].0[5] += 0.25),
    ("last post norm", |m| m.norms[2].1[63] += 0.25),
    ("q", |m| m.linears[0][0][7] += 0.25),
    ("k", |m| m.linears[1][0][64 * 64 + 7] += 0.25),
    ("v", |m| m.linears[2][0][96 * 64 + 7] += 0.25),
    ("bias", |m| m.qkv_bias.as_mut().unwrap()[127] += 0.25),
    ("o", |m| m.linears[0][1][63 * 64] += 0.25),
    ("up", |m| m.linears[0][2][130 * 64] += 0.25),
    ("down", |m| m.linears[2][3][128 * 64 - 1] += 0.25),
];

fn untied() -> SmallModel {
    let mut model = SmallModel::new(21, 3, true);
    model.config.tie_word_embeddings = false;
    model.head = Some(model.embedding.iter().rev().copied().collect());
    model
}

/// Whatever changes between an interruption and the same command: what is made is what would have been made from nothing.
#[test]
fn nothing_of_another_model_survives_an_interruption() {
    let dir = tempfile::tempdir().unwrap();
    let (model, wanted) = (untied(), Options { refine: Refine::Output, ..options(Format::AnyPrec, 3.0) });
    let interrupted = |out: &Path| {
        let model = Interrupting::new(&model, 2);
        let error = quantize(&model, &texts(), &wanted, out, &model.0.stop, &Silent);
        assert!(error.unwrap_err().is::<Interrupted>());
        assert!(out.with_extension("partial").join("layer-001-3bit.safetensors").exists(), "two layers are kept");
    };
    let goes_on = |name: &str, model: &SmallModel, texts: &TextFiles, options: &Options| {
        let [out, fresh] = ["out", "fresh"].map(|what| dir.path().join(format!("{what} {name}").replace(' ', "-")));
        interrupted(&out);
        for out in [&out, &fresh] {
            quantize(model, texts, options, out, &AtomicBool::new(false), &Silent).unwrap();
        }
        assert_eq!(contents(&out), contents(&fresh), "{name}");
        contents(&out)
    };
    let unchanged = goes_on("nothing", &model, &texts(), &wanted);
    for (name, change) in CHANGES {
        let mut other = untied();
        change(&mut other);
        assert_ne!(goes_on(name, &other, &texts(), &wanted), unchanged, "{name} makes a difference");
    }
    let mut other = untied();
    other.config = other.config.with(json!({ "rope_theta": 10_001.0 })).unwrap();
    assert_ne!(goes_on("configuration", &other, &texts(), &wanted)["config.json"], unchanged["config.json"]);
    let tokenizer = TextFiles { tokenizer_json: b"{ }".to_vec(), ..texts() };
    assert_ne!(goes_on("tokenizer", &model, &tokenizer, &wanted), unchanged);
    let template = TextFiles { chat_template: None, ..texts() };
    assert_ne!(goes_on("template", &model, &template, &wanted), unchanged);
    let mut calibration = wanted.clone();
    if let Some(Text { tokens, .. }) = &mut calibration.calibration.text {
        tokens[143] = 5;
    }
    assert_ne!(goes_on("text", &model, &texts(), &calibration), unchanged);
    let refine = Options { refine: Refine::None, ..wanted.clone() };
    assert_ne!(goes_on("refine", &model, &texts(), &refine), unchanged);
}

/// The same of residuals: either model may have changed.
#[test]
fn residuals_of_another_pair_are_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (model, quantized) = (untied(), dir.path().join("quantized"));
    let options = Options { awq: false, refine: Refine::None, ..options(Format::LutGemm, 3.0) };
    make(&model, &options, &quantized).unwrap();
    let wanted = ResidualOptions { calibration: options.calibration.clone(), source: "s".into(), overwrite: false };
    let bar = Silent;
    for (name, change) in [CHANGES[5], CHANGES[9]] {
        let mut other = untied();
        change(&mut other);
        let other_quantized = dir.path().join(format!("quantized {name}"));
        make(&other, &options, &other_quantized).unwrap();
        for (original, quantized_at) in [(&other, &quantized), (&model, &other_quantized)] {
            let [out, fresh] = ["out", "fresh"].map(|out| dir.path().join(out));
            let first = Interrupting::new(&model, 2);
            let error =
                residuals(&first, &Checkpoint::open(&quantized).unwrap(), &texts(), &wanted, &out, &first.0.stop, &bar);
            assert!(error.unwrap_err().is::<Interrupted>());
            for out in [&out, &fresh] {
                let quantized = Checkpoint::open(quantized_at).unwrap();
                residuals(original, &quantized, &texts(), &wanted, out, &AtomicBool::new(false), &bar).unwrap();
            }
            assert_eq!(contents(&out), contents(&fresh), "{name}");
            [out, fresh].iter().for_each(|dir| fs::remove_dir_all(dir).unwrap());
        }
    }
}
