//! The layers of every family in one launch, against their operations one by one: the programs of the tiny models of
//! `tests/data/models` on wider rows, with random weights, norms and biases.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails. What a launch might overlook is shown to
//! matter on the CPU, everywhere.

mod changed;
mod cuda_common;

use std::borrow::Cow;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use changed::{Change, Changed};
use cuda_common::{Noise, cuda, devices, distance, options};
use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;
use decdec::backend::cuda::{Dtype, Options, Tuning};
use decdec::config::{Attention, FeedForward, LayerNorm, Mixer, ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::format::Storage;
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;
use decdec::weights::{Linear, ModelWeights};

/// How far logits may be apart: x is rounded to float16 behind sums in another order, so that single numbers of it fall
/// otherwise (`cuda_layers.rs` allows as much).
const APART: f64 = 5e-3;
/// With compensation, such a number may select another channel.
const APART_COMPENSATED: f64 = 2e-2;

/// A model of random numbers, of which every norm and bias is random too.
struct Drawn<'a> {
    weights: &'a RandomWeights,
    overlooked: Overlooked,
}

/// What of a layer is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Overlooked {
    Nothing,
    /// A γ is another one.
    Norm(LayerNorm),
    Bias(Projection),
    Window,
    Rope,
    Scale,
    Softcap,
    Growth,
}

impl Change for Drawn<'_> {
    fn of(&self) -> &dyn ModelWeights {
        self.weights
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        let other = u64::from(self.overlooked == Overlooked::Norm(norm)) << 32;
        let mut noise = Noise::new((layer * 10 + norm.index()) as u64 + other);
        Ok(self.weights.norm(layer, norm)?.iter().map(|one| one * (0.5 + noise.uniform())).collect())
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let mut linear = self.weights.projection(layer, projection)?;
        let rows = self.config_shape(layer, projection).1;
        let mut noise = Noise::new((1000 + layer * 10 + projection.index()) as u64);
        if self.overlooked != Overlooked::Bias(projection) {
            linear.bias = Some(Cow::Owned((0..rows).map(|_| noise.normal() * 0.5).collect()));
        }
        Ok(linear)
    }
}

impl Drawn<'_> {
    fn config_shape(&self, layer: usize, projection: Projection) -> (usize, usize) {
        self.weights.config().shape(layer, projection)
    }
}

/// A model's attention and feed-forward, between rows of the width of SmolLM2's and with more heads.
fn widened(name: &str) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name).join("config.json");
    let json = serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON");
    let mut config = ModelConfig::from_json(&json).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    config.hidden_size = 576;
    // Branches of random weights are as large as the stream only where nothing is scaled.
    config.embedding_scale = config.residual_multiplier;
    for layer in &mut config.layers {
        let FeedForward::Dense { intermediate_size, .. } = &mut layer.feed_forward;
        *intermediate_size = 1184;
        let Mixer::Attention(attention) = &mut layer.mixer;
        (attention.num_heads, attention.num_kv_heads) = (4 * attention.num_heads, 4 * attention.num_kv_heads);
        // As much as shows in a short text.
        attention.softcap = attention.softcap.map(|_| 0.7);
        if let Some(scaling) = &mut attention.query_scaling {
            (scaling.beta, scaling.original) = (1.0, 8);
        }
    }
    config
}

/// The tiny models, by name.
fn names() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models");
    let folders = fs::read_dir(folder).expect("readable").map(|entry| entry.expect("an entry"));
    let models = folders.filter(|entry| entry.path().join("config.json").exists());
    let mut names: Vec<_> = models.map(|entry| entry.file_name().into_string().expect("text")).collect();
    names.sort_unstable();
    names
}

/// What of a model's layers a launch might overlook.
fn may_overlook(config: &ModelConfig) -> Vec<Overlooked> {
    let norms = config.layers.iter().flat_map(|layer| layer.norms(config.hidden_size)).map(|(norm, _)| norm);
    let mut norms: Vec<_> = norms.collect();
    norms.sort_unstable();
    norms.dedup();
    let any = |of: &dyn Fn(&Attention) -> bool| config.layers.iter().any(|layer| of(layer.attention()));
    let mut all: Vec<_> = norms.into_iter().map(Overlooked::Norm).collect();
    all.extend(Projection::ALL.map(Overlooked::Bias));
    all.push(Overlooked::Scale);
    all.extend(any(&|a| a.rope.is_some()).then_some(Overlooked::Rope));
    all.extend(any(&|a| a.window.is_some_and(|window| window < text(config).len())).then_some(Overlooked::Window));
    all.extend(any(&|a| a.softcap.is_some()).then_some(Overlooked::Softcap));
    all.extend(any(&|a| a.query_scaling.is_some()).then_some(Overlooked::Growth));
    all
}

/// The configuration without it.
fn without(mut config: ModelConfig, overlooked: Overlooked) -> ModelConfig {
    for layer in &mut config.layers {
        let Mixer::Attention(attention) = &mut layer.mixer;
        match overlooked {
            Overlooked::Window => attention.window = None,
            Overlooked::Rope => attention.rope = None,
            Overlooked::Scale => attention.scale *= 1.5,
            Overlooked::Softcap => attention.softcap = None,
            Overlooked::Growth => attention.query_scaling = None,
            Overlooked::Nothing | Overlooked::Norm(_) | Overlooked::Bias(_) => {}
        }
    }
    config
}

/// A text past every window.
fn text(config: &ModelConfig) -> Vec<u32> {
    let tokens = config.max_position_embeddings.min(40);
    (0..tokens).map(|i| (i * 37 % config.vocab_size) as u32).collect()
}

/// Logits behind each token, read one at a time as when decoding.
fn logits<B: DecodeBackend>(backend: &B, config: &ModelConfig, overlooked: Overlooked, k_chunk: usize) -> Vec<f32> {
    let weights = RandomWeights::new(without(config.clone(), overlooked), Storage::ANYPREC, 3, 5).unwrap();
    let mut model = Model::load(backend, &Changed(Drawn { weights: &weights, overlooked }), |_| ()).unwrap();
    let by_bits = vec![LayerCompensation { n_tb: 2.min(backend.device().max_n_tb), k_chunks: [k_chunk; 4] }];
    model.compensate(Some(&Compensation { by_bits, selection: Selection::Bucket })).unwrap();
    let text = text(config);
    let mut state = model.state(1, text.len()).unwrap();
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    let mut logits = backend.vector(config.vocab_size).unwrap();
    let mut all = Vec::new();
    for token in text {
        model.logits(&mut state, 0, &[token], true, &mut logits).unwrap();
        let mut values = vec![0f32; config.vocab_size];
        backend.read(&logits, &mut values).unwrap();
        all.extend(values);
    }
    all
}

/// Calls `each` for every model, on several threads: kernels of one compile while another runs.
fn every_model(each: impl Fn(&str, &ModelConfig) + Sync) {
    let (names, next) = (names(), AtomicUsize::new(0));
    assert!(names.len() > 30, "{names:?}");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    each(name, &widened(name));
                }
            });
        }
    });
}

/// Every family's layers in one launch, with and without compensation, are as close to their operations one by one as
/// rounding says, and farther from those of a model of which something is overlooked.
#[test]
fn layers_of_every_family_in_one_launch() {
    if !devices::is_under_test("cuda") {
        return;
    }
    every_model(|name, config| {
        let device = |one_launch| {
            let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
            let mut cuda = cuda(Options { tuning, ..options(Dtype::Float16, 2) }).expect("a device");
            cuda.watch_layers().unwrap();
            cuda
        };
        let (fused, single) = (device(true), device(false));
        for (k_chunk, most) in [(0, APART), (24, APART_COMPENSATED)] {
            let got = logits(&fused, config, Overlooked::Nothing, k_chunk);
            let want = logits(&single, config, Overlooked::Nothing, k_chunk);
            let far = distance(&got, &want);
            eprintln!("{name}, k_chunk {k_chunk}: {far:.2e}");
            assert!(far < most, "{name}, k_chunk {k_chunk}: logits {far:.2e} apart, {most} allowed");
            assert_eq!(got, logits(&fused, config, Overlooked::Nothing, k_chunk), "{name}: another time, other logits");
            assert!(!fused.timeline().unwrap().is_empty(), "{name}: the layers went operation by operation");
            assert!(single.timeline().unwrap().is_empty(), "{name}: the layers went in one launch");
            if k_chunk == 0 {
                for overlooked in may_overlook(config) {
                    let far = distance(&logits(&fused, config, overlooked, 0), &want);
                    assert!(far > 2.0 * most, "{name}: without {overlooked:?} logits are only {far:.2e} apart");
                }
            }
        }
    });
}

/// On the CPU, of every kind of layer: what a launch might overlook moves logits by more than they may be apart.
#[test]
fn what_is_overlooked_shows() {
    every_model(|name, config| {
        let cpu = Cpu::new();
        let want = logits(&cpu, config, Overlooked::Nothing, 0);
        for overlooked in may_overlook(config) {
            let far = distance(&logits(&cpu, config, overlooked, 0), &want);
            assert!(far > 2.0 * APART, "{name}: without {overlooked:?} logits are only {far:.2e} apart");
        }
    });
}
