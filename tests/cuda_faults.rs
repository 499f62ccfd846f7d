//! What goes wrong on a GPU: nothing stays allocated, nothing panics, and the error says what to change.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; one test after the other, in a process of its own, since it watches
//! the device's free memory and ends with a device that is lost to the process.

mod changed;
mod cuda_common;
mod made;

use std::path::Path;

use anyhow::{Result, bail};
use changed::{Change, Changed};
use cuda_common::{cuda, options};
use decdec::backend::cuda::{Cuda, Dtype};
use decdec::backend::{DecodeBackend, GemvBackend, KvBits};
use decdec::config::{ModelConfig, Projection};
use decdec::dec::{DecPlan, Selection};
use decdec::format::Storage;
use decdec::model::{Compensation, Model};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;
use decdec::weights::{Linear, ModelWeights};
use serde_json::json;

/// A model whose tensors cannot be read from `broken` on.
struct Broken {
    model: RandomWeights,
    broken: usize,
}

impl Change for Broken {
    fn of(&self) -> &dyn ModelWeights {
        &self.model
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        if layer == self.broken && projection == Projection::Down {
            bail!("the file ends here");
        }
        self.model.projection(layer, projection)
    }
}

fn model() -> RandomWeights {
    let preset = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
    let config = preset.with(json!({ "num_hidden_layers": 6 }));
    RandomWeights::new(config.unwrap(), Storage::ANYPREC, 3, 1).unwrap()
}

/// Bytes of host memory that the process holds, pinned ones among them; 0 where the system does not say.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap_or(0) * 1024
}

/// Nothing of `what` is left on the device, but for what the driver keeps for itself.
fn leaves_nothing(cuda: &Cuda, what: &str, work: impl FnOnce()) {
    const SLACK: usize = 96 << 20;
    let (free, before) = (cuda.memory().unwrap().0, resident());
    work();
    let (now, after) = (cuda.memory().unwrap().0, resident());
    assert!(now + SLACK >= free, "{what}: {} MiB were free, {} are", free >> 20, now >> 20);
    let grown = after.saturating_sub(before);
    assert!(grown < 2 * SLACK, "{what}: the process has grown by {} MiB", grown >> 20);
}

/// The first tokens find every kernel there.
fn nothing_is_compiled_after_preparing(cuda: &Cuda, cache: &Path) {
    let kept = || std::fs::read_dir(cache).map_or(0, Iterator::count);
    let weights = model();
    for (k_chunk, prompt) in [(0, 1), (8, 1), (8, 40)] {
        let mut model = Model::load(cuda, &weights, |_| ()).unwrap();
        model.compensate(Some(&Compensation::uniform(8, k_chunk, Selection::Bucket))).unwrap();
        let mut state = model.state(1, 64).unwrap();
        let before = kept();
        model.prepare(&mut state, 0, prompt, false).unwrap();
        let prepared = kept();
        assert!(prepared > before, "k_chunk {k_chunk}, prompt of {prompt}: nothing was compiled");
        made::made(&model, &mut state, &vec![1; prompt], 5, false);
        assert_eq!(kept(), prepared, "k_chunk {k_chunk}, prompt of {prompt}: kernels were compiled afterwards");
    }
}

#[test]
fn faults_end_cleanly() {
    let cache = tempfile::tempdir().unwrap();
    // SAFETY: the only test of this process has just begun, no other thread reads the environment.
    unsafe { std::env::set_var("DECDEC_CACHE_DIR", cache.path()) };
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    nothing_is_compiled_after_preparing(&cuda, &cache.path().join("kernels"));
    // What stays for good: upload buffers, the context's own memory.
    drop(cuda.matrix(&model().projection(0, Projection::O).unwrap()).unwrap());

    let weights = Changed(Broken { model: model(), broken: 4 });
    leaves_nothing(&cuda, "a model that cannot be read to its end", || {
        let error = format!("{:#}", Model::load(&cuda, &weights, |_| ()).err().unwrap());
        assert!(error.contains("layer 4") && error.contains("the file ends here"), "{error}");
    });

    let weights = weights.0.model;
    leaves_nothing(&cuda, "a text that does not fit", || {
        let model = Model::load(&cuda, &weights, |_| ()).unwrap();
        let fields = json!({ "num_hidden_layers": 4000, "max_position_embeddings": 1 << 20 });
        let config = model.config().with(fields).unwrap();
        let mut cache = cuda.cache(&config, 1, 1 << 20, KvBits::Whole).unwrap();
        let error = format!("{:#}", cuda.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap_err());
        for part in ["MiB wanted", "MiB free", "--max-seq-len", "--residuals host"] {
            assert!(error.contains(part), "{error}");
        }
        let table = cuda.memory_table(&weights, 8192).unwrap();
        table.check().unwrap();
        let (wanted, free) = (table.device(), table.free_device);
        let tight = decdec::backend::cuda::MemoryTable { free_device: wanted - 1, ..table };
        let error = tight.check().unwrap_err().to_string();
        assert!(error.contains(&(wanted >> 20).to_string()) && error.contains("--max-seq-len"), "{error}");
        assert!(wanted < free);
    });

    // After all that the device still works.
    let linear = RandomWeights::single(1024, 64, Storage::ANYPREC, 3, 1).unwrap();
    let matrix = cuda.matrix(&linear).unwrap();
    let (mut x, mut y) = (cuda.vector(1024).unwrap(), cuda.vector(64).unwrap());
    cuda.write(&[1.0; 1024], &mut x).unwrap();
    cuda.gemv(&matrix, &x, &mut y).unwrap();
    let mut got = vec![0.0; 64];
    cuda.read(&y, &mut got).unwrap();
    assert!(got.iter().all(|y| y.is_finite()) && got.iter().any(|&y| y != 0.0), "{got:?}");

    lost(&cuda, &matrix, &mut y);
}

/// The contract broken on purpose: a plan of far more channels than the vector has makes a kernel read past everything.
fn lost(cuda: &Cuda, matrix: &<Cuda as GemvBackend>::Matrix, y: &mut <Cuda as GemvBackend>::Vector) {
    let channels = 1 << 28;
    let thresholds = vec![1.0; channels];
    let plan = DecPlan::new(channels, 8, &thresholds, 1, 1, Selection::Bucket).unwrap();
    let plan = cuda.plan(matrix, &plan).unwrap();
    let x = cuda.vector(32).unwrap();
    let error = format!("{:#}", cuda.select(&plan, &x).expect_err("memory that is not there was read"));
    assert!(error.starts_with("cuda: "), "{error}");
    // From here on everything fails, and says so; dropping it all is what is left to do.
    for _ in 0..3 {
        let error = cuda.read(y, &mut [0.0; 64]).expect_err("the device is lost").to_string();
        assert!(error.starts_with("cuda: "), "{error}");
    }
    assert!(cuda.vector(16).is_err() && cuda.matrix(&Linear::plain(common_weight())).is_err());
}

fn common_weight() -> decdec::weights::Weight<'static> {
    RandomWeights::single(64, 16, Storage::ANYPREC, 3, 1).unwrap().weight
}
