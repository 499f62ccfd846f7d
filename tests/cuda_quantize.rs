//! A small model quantized on a GPU: as good as on the cores, the same bytes again, and after an interruption.

mod devices;
mod small_model;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use decdec::backend::cpu::Cpu;
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::dec::Selection;
use decdec::device::Device;
use decdec::engine::Engine;
use decdec::eval;
use decdec::format::Format;
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::progress::{Progress, Silent};
use decdec::quantize::{Calibration, Interrupted, Options, Refine, ResidualOptions};
use decdec::sampling::draws;
use small_model::{SmallModel, texts};

fn options(backend: Format, bits: f64, calibration: Calibration) -> Options {
    Options {
        backend,
        bits: BitWidth::try_from(bits).unwrap(),
        group_size: None,
        awq: true,
        refine: Refine::Compensated { k_chunks: [[64; 4]; 2] },
        calibration,
        source: "random".into(),
        overwrite: false,
    }
}

fn text() -> Calibration {
    let tokens = draws(1, 64 * 24).iter().map(|x| (x * 96.0) as u32).collect();
    Calibration::of_text(tokens, 24, 64, "random")
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())).collect()
}

fn divergence(model: &SmallModel, checkpoint: &Path, k_chunk: usize) -> f64 {
    let cpu = Cpu::new();
    let source = Engine::of(Model::load(&cpu, model, |_| ()).unwrap(), 24);
    let mut quantized = Model::load(&cpu, &Checkpoint::open(checkpoint).unwrap(), |_| ()).unwrap();
    let own = LayerCompensation { n_tb: 1, k_chunks: [k_chunk; 4] };
    quantized.compensate(Some(&Compensation { by_bits: vec![own], selection: Selection::Exact })).unwrap();
    let tokens: Vec<u32> = draws(2, 32 * 24).iter().map(|x| (x * 96.0) as u32).collect();
    let windows = eval::windows(&tokens, 24, 0..32).unwrap();
    eval::perplexity(&Engine::of(quantized, 24), Some(&source), &windows, |_| Ok(())).unwrap().kl_divergence.unwrap()
}

/// Sets a flag after so many steps.
struct StopAfter<'a>(&'a AtomicBool, AtomicUsize);

impl Progress for StopAfter<'_> {
    fn inc(&self, _: u64) {
        if self.1.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_gpu_quantizes_as_well_and_gives_the_same_bytes_again() {
    if !devices::is_under_test("cuda") {
        return;
    }
    let (gpu, dir, never) = (Device::open("cuda").unwrap(), tempfile::tempdir().unwrap(), AtomicBool::new(false));
    let model = SmallModel::new(8, 3, true);
    for (name, backend, bits) in
        [("ap", Format::AnyPrec, 3.0), ("lutgemm", Format::LutGemm, 3.0), ("mixed", Format::AnyPrec, 3.5)]
    {
        let options = options(backend, bits, text());
        let make = |device: &Device, out: &str| {
            let out = dir.path().join(format!("{name}-{out}"));
            device.quantize(&model, &texts(), &options, &out, &never, &Silent).unwrap();
            out
        };
        let (own, host) = (make(&gpu, "gpu"), make(&Device::open("cpu").unwrap(), "cpu"));
        assert!(contents(&own) == contents(&make(&gpu, "again")), "{name}: other bytes the second time");
        for k_chunk in [0, 64] {
            let [own, host] = [&own, &host].map(|out| divergence(&model, out, k_chunk));
            // Of a model of three layers of 64 channels, where one code weighs much more than in a real one.
            assert!((own / host - 1.0).abs() < 0.15, "{name}, k_chunk {k_chunk}: {own}, {host} on the cores");
        }
        let mut stops = 0;
        for steps in [1, 3, 5, 9, 14, 20, 27] {
            let (stop, out) = (AtomicBool::new(false), dir.path().join(format!("{name}-stopped")));
            let bar = StopAfter(&stop, AtomicUsize::new(steps));
            match gpu.quantize(&model, &texts(), &options, &out, &stop, &bar) {
                Ok(_) => break,
                Err(error) => assert!(error.is::<Interrupted>(), "{error:#}"),
            }
            stops += 1;
        }
        assert!(stops > 1, "{name}: it was not interrupted");
        let out = dir.path().join(format!("{name}-stopped"));
        if !out.exists() {
            gpu.quantize(&model, &texts(), &options, &out, &never, &Silent).unwrap();
        }
        assert!(contents(&out) == contents(&own), "{name}: other bytes after interruptions");
    }
}

#[test]
fn residuals_and_sampled_text_of_a_gpu() {
    if !devices::is_under_test("cuda") {
        return;
    }
    let (gpu, dir, never) = (Device::open("cuda").unwrap(), tempfile::tempdir().unwrap(), AtomicBool::new(false));
    let model = SmallModel::new(5, 2, false);
    let sampled = Calibration::of_own(40, 9, 7);
    let quantized = dir.path().join("quantized");
    let options = options(Format::LutGemm, 4.0, sampled.clone());
    gpu.quantize(&model, &texts(), &options, &quantized, &never, &Silent).unwrap();
    let residual_options = ResidualOptions { calibration: sampled, source: "random".into(), overwrite: false };
    let checkpoint = Checkpoint::open(&quantized).unwrap();
    let [own, host] = [("gpu", &gpu), ("cpu", &Device::open("cpu").unwrap())].map(|(name, device)| {
        let out = dir.path().join(name);
        device.residuals(&model, &checkpoint, &texts(), &residual_options, &out, &never, &Silent).unwrap();
        contents(&out)
    });
    // The residuals are against the same weights; what they were watched with is rounded otherwise.
    assert!(own["model.safetensors"] == host["model.safetensors"]);
    assert!(own["residuals.safetensors"].len() == host["residuals.safetensors"].len());
    let same = own["residuals.safetensors"].iter().zip(&host["residuals.safetensors"]).filter(|(a, b)| a == b).count();
    assert!(same * 100 > own["residuals.safetensors"].len() * 95, "{same} bytes alike");
}
