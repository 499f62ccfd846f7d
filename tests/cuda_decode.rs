//! Whole tokens on CUDA: against the CPU backend, and sampling against its plain rules.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails.

mod cuda_common;
mod made;
#[path = "texts/mod.rs"]
mod texts;

use cuda_common::{Noise, cuda, distance, options, small};
use decdec::backend::cpu::Cpu;
use decdec::backend::cuda::{Card, Cuda, Dtype, Options, Residuals, Tuning};
use decdec::backend::record::{Clock, Recorder};
use decdec::backend::{DecodeBackend, GemvBackend, Input, KvBits, Rows};
use decdec::config::ModelConfig;
use decdec::dec::Selection;
use decdec::format::Storage;
use decdec::model::{Compensation, Model};
use decdec::random::RandomWeights;
use decdec::sampling::{NO_TOKEN, Sampling};
use decdec::weights::{Linear, ModelWeights, Weight};

fn tokens<B: DecodeBackend>(
    backend: &B,
    weights: &RandomWeights,
    k_chunk: usize,
    prompt: usize,
) -> (Vec<u32>, Vec<f32>) {
    let mut model = Model::load(backend, weights, |_| ()).unwrap();
    let most = backend.device().max_n_tb.min(5);
    model.compensate(Some(&Compensation::uniform(most, k_chunk, Selection::Bucket))).unwrap();
    let mut state = model.state(1, 200).unwrap();
    let prompt: Vec<u32> = (0..prompt as u32).map(|i| i * 37 % 1000).collect();
    // Without effect on what follows: the texts below are those of a model that was not prepared.
    model.prepare(&mut state, 0, prompt.len(), true).unwrap();
    let made = made::made(&model, &mut state, &prompt, 60, true);
    // Twice: a state is used again, with a graph recorded anew.
    assert_eq!(made, made::made(&model, &mut state, &prompt, 60, true), "the same request gave another text");
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    let mut logits = backend.vector(prompt.len() * 1000).unwrap();
    model.logits(&mut state, 0, &prompt, true, &mut logits).unwrap();
    let mut values = vec![0f32; prompt.len() * 1000];
    backend.read(&logits, &mut values).unwrap();
    (made, values)
}

fn against_cpu(dtype: Dtype, compile: u8, most: f64) {
    let mut options = options(dtype, compile);
    for (window, kv_heads, bits, format) in [
        (None, 2, 3, Storage::ANYPREC),
        (Some(20), 3, 4, Storage::ANYPREC),
        (None, 6, 3, Storage::lutgemm(32)),
        (None, 2, 5, Storage::ANYPREC),
    ] {
        let weights = RandomWeights::new(small(window, kv_heads), format, bits, 11).unwrap();
        for (k_chunk, prompt, residuals) in
            [(0, 40, Residuals::Host), (16, 40, Residuals::Host), (16, 3, Residuals::Device)]
        {
            options.residuals = residuals;
            let Some(cuda) = cuda(options) else { return };
            let (want, cpu) = tokens(&Cpu::new(), &weights, k_chunk, prompt);
            let (got, ours) = tokens(&cuda, &weights, k_chunk, prompt);
            let what = format!("{dtype:?} {format:?} {bits} bits, k_chunk {k_chunk}, prompt of {prompt}");
            let far = distance(&ours, &cpu);
            // Rounded activations now and then select another channel, which moves a row by a whole residual.
            let most = if k_chunk > 0 && dtype != Dtype::Float32 { 4.0 * most } else { most };
            assert!(far < most, "{what}: logits {far} apart, {most} allowed");
            if dtype == Dtype::Float32 {
                assert_eq!(got, want, "{what}");
            }
            if k_chunk > 0 && prompt == 40 && dtype == Dtype::Float32 {
                let (_, plain) = tokens(&cuda, &weights, 0, prompt);
                assert!(distance(&plain, &cpu) > 10.0 * far.max(1e-6), "{what}: compensation changes nothing");
            }
        }
    }
}

#[test]
fn float32_gives_the_texts_of_the_cpu() {
    against_cpu(Dtype::Float32, 2, 2e-5);
}

#[test]
fn generic_kernels_give_the_texts_of_the_cpu() {
    against_cpu(Dtype::Float32, 0, 2e-5);
}

#[test]
fn float16_is_close_to_the_cpu() {
    against_cpu(Dtype::Float16, 2, 5e-3);
}

#[test]
fn bfloat16_is_close_to_the_cpu() {
    against_cpu(Dtype::Bfloat16, 1, 4e-2);
}

/// What another thread of the same process may do while graphs are recorded.
const BESIDE: [(&str, fn()); 4] = [
    ("devices are opened and closed", || drop(cuda(options(Dtype::Float16, 2)))),
    ("kernels are loaded", || {
        let cuda = cuda(options(Dtype::Float16, 2)).unwrap();
        product(&cuda, Storage::ANYPREC, 5);
    }),
    ("memory is pinned, copied and freed", || {
        let cuda = cuda(options(Dtype::Float16, 2)).unwrap();
        for bits in [3, 4, 3, 4] {
            product(&cuda, Storage::ANYPREC, bits);
        }
    }),
    ("graphs are recorded and timed", || {
        let cuda = cuda(options(Dtype::Float16, 2)).unwrap();
        let linear = RandomWeights::single(1024, 512, Storage::ANYPREC, 3, 1).unwrap();
        let (matrix, x) = (cuda.matrix(&linear).unwrap(), cuda.vector(1024).unwrap());
        let mut y = cuda.vector(512).unwrap();
        let mut recorder = cuda.recorder(Clock::Auto).unwrap();
        let launches = recorder.record(&cuda, &[0; 40], &mut |_| cuda.gemv(&matrix, &x, &mut y)).unwrap();
        assert_eq!(launches.len(), 40);
    }),
];

/// `y` of a random matrix and a vector of ones.
fn product(cuda: &Cuda, format: Storage, bits: usize) -> Vec<f32> {
    let linear = RandomWeights::single(1024, 512, format, bits, 1).unwrap();
    let matrix = cuda.matrix(&linear).unwrap();
    let (mut x, mut y) = (cuda.vector(1024).unwrap(), cuda.vector(512).unwrap());
    cuda.write(&[1.0; 1024], &mut x).unwrap();
    cuda.gemv(&matrix, &x, &mut y).unwrap();
    let mut values = vec![0f32; 512];
    cuda.read(&y, &mut values).unwrap();
    values
}

/// One thread records and replays graphs all the time, another does everything else: neither fails, results are the same.
#[test]
fn graphs_are_recorded_beside_other_work() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let want = product(&cuda, Storage::ANYPREC, 3);
    let linear = RandomWeights::single(1024, 512, Storage::ANYPREC, 3, 1).unwrap();
    let matrix = cuda.matrix(&linear).unwrap();
    let (mut x, mut y) = (cuda.vector(1024).unwrap(), cuda.vector(512).unwrap());
    cuda.write(&[1.0; 1024], &mut x).unwrap();
    let mut round = || -> anyhow::Result<()> {
        let (mut graphs, rows) = (Default::default(), [Rows { slot: 0, position: 0, count: 1 }]);
        for _ in 0..3 {
            // Long enough to be met by whatever the other thread does.
            cuda.replay(&mut graphs, &rows, &mut || (0..500).try_for_each(|_| cuda.gemv(&matrix, &x, &mut y)))?;
        }
        let mut got = vec![0f32; 512];
        cuda.read(&y, &mut got)?;
        anyhow::ensure!(got == want, "a replayed product differs");
        Ok(())
    };
    let mut failures = Vec::new();
    for (what, work) in BESIDE {
        let other = std::thread::spawn(move || (0..30).for_each(|_| work()));
        let mut rounds = 0;
        while !other.is_finished() {
            match round() {
                Ok(()) => rounds += 1,
                Err(error) => {
                    failures.push(format!("{what}: after {rounds} graphs: {error:#}"));
                    break;
                }
            }
        }
        if other.join().is_err() {
            failures.push(format!("{what}: that failed itself"));
        }
        eprintln!("{what}: {rounds} graphs were recorded meanwhile");
        assert!(rounds > 0 || !failures.is_empty(), "{what}: nothing was recorded meanwhile");
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The same, for the small models of the other tests: several at a time, each on a thread of its own, operation by
/// operation and with layers in one launch, of which there are then several on the device.
#[test]
fn texts_beside_each_other_are_those_of_one_alone() {
    let weights = || RandomWeights::new(small(None, 2), Storage::ANYPREC, 3, 11).unwrap();
    for one_launch in [false, true] {
        let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
        let options = Options { tuning, card: Some(Card::of_multiprocessors(24)), ..options(Dtype::Float16, 2) };
        let Some(alone) = cuda(options).map(|cuda| tokens(&cuda, &weights(), 16, 3)) else { return };
        let text = move || tokens(&cuda(options).unwrap(), &weights(), 16, 3);
        let threads: Vec<_> =
            (0..4).map(|_| std::thread::spawn(move || (0..5).map(|_| text()).collect::<Vec<_>>())).collect();
        for thread in threads {
            for text in thread.join().expect("a text beside others fails") {
                assert!(text == alone, "another text beside others, layers in one launch: {one_launch}");
            }
        }
    }
}

/// Two texts in turn on two states, and one whose model is compensated otherwise under it: in one launch, which shares
/// its work space and its table of layers, and operation by operation.
#[test]
fn texts_on_two_states_are_those_of_one() {
    for (dtype, compile, one_launch) in [
        (Dtype::Float16, 2, true),
        (Dtype::Bfloat16, 2, true),
        (Dtype::Float16, 1, true),
        (Dtype::Float16, 2, false),
        (Dtype::Float32, 2, false),
    ] {
        let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
        let Some(mut cuda) = cuda(Options { tuning, ..options(dtype, compile) }) else { return };
        cuda.watch_layers().unwrap();
        for (bits, format) in [(3, Storage::ANYPREC), (4, Storage::lutgemm(32))] {
            let weights = RandomWeights::new(small(None, 2), format, bits, 5).unwrap();
            let mut model = Model::load(&cuda, &weights, |_| ()).unwrap();
            texts::interleaved(&model);
            model.compensate(Some(&Compensation::uniform(5, 32, Selection::Bucket))).unwrap();
            texts::interleaved(&model);
            texts::recompensated(&mut model, 32);
        }
        let fused = !cuda.timeline().unwrap().is_empty();
        assert_eq!(fused, one_launch, "{dtype:?}, --compile {compile}: layers in one launch");
    }
}

/// The contract broken on purpose: a text that is longer than its cache, more tokens than it has places for, ids that the
/// embedding does not have. Nothing lies there, so nothing is read or written.
#[test]
fn nothing_is_touched_behind_the_end() {
    for dtype in [Dtype::Float16, Dtype::Bfloat16, Dtype::Float32] {
        let Some(cuda) = cuda(options(dtype, 2)) else { return };
        let weights = RandomWeights::new(small(None, 2), Storage::ANYPREC, 3, 5).unwrap();
        let config = weights.config();
        let mut cache = cuda.cache(config, 1, 8, KvBits::Whole).unwrap();
        let of = |count| [Rows { slot: 0, position: 0, count }];
        cuda.begin(&mut cache, 0, &Sampling::GREEDY, &[]).unwrap();
        let attention = config.layers[0].attention();
        let (width, attended) = (attention.qkv_rows(), attention.num_heads * attention.head_dim);
        let (qkv, mut out) = (cuda.vector(3 * width).unwrap(), cuda.vector(3 * attended).unwrap());
        for tokens in [1, 3] {
            cuda.advance(&mut cache, &of(1 << 30)).unwrap();
            cuda.attend(&mut cache, config.layers.len() - 1, &of(tokens), &qkv, &mut out).unwrap();
        }
        let logits = cuda.vector(config.vocab_size).unwrap();
        (0..50).for_each(|_| cuda.sample(&mut cache, &[0], &logits).unwrap());
        assert_eq!((cuda.sampled(&cache, 0, 8).unwrap(), cuda.sampled(&cache, 0, 9).is_err()), (0, true), "{dtype:?}");

        let table = cuda.matrix(&Linear::plain(Weight::Dense(weights.embedding().unwrap()))).unwrap();
        let mut h = cuda.vector(5 * config.hidden_size).unwrap();
        let ids = [999, 1000, 1007, NO_TOKEN, u32::MAX];
        cuda.embed(&cache, &of(5), (&table, 1.0), Input::Tokens(&ids), &mut h).unwrap();
        let mut values = vec![0f32; 5 * config.hidden_size];
        cuda.read(&h, &mut values).unwrap();
        let (there, not) = values.split_at(config.hidden_size);
        assert!(there.iter().all(|h| h.is_finite()) && not.iter().all(|h| h.is_nan()), "{dtype:?}");
    }
}

#[test]
fn sampling_follows_the_rules() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut noise = Noise::new(3);
    let config = ModelConfig { vocab_size: 5003, ..small(None, 2) };
    let mut cache = cuda.cache(&config, 1, 64, KvBits::Whole).unwrap();
    let mut logits = cuda.vector(config.vocab_size).unwrap();
    let mut different = 0;
    for case in 0..200 {
        let rules = Sampling {
            temperature: [0.0, 0.3, 1.0, 2.5][case % 4],
            top_k: [0, 1, 7, 50, 6000][case % 5],
            top_p: [1.0, 0.9, 0.3, 0.01][case / 4 % 4],
            min_p: [0.0, 0.05, 0.5][case % 3],
        };
        let mut values: Vec<f32> = (0..config.vocab_size).map(|_| noise.normal() * 4.0).collect();
        if case % 7 == 0 {
            values.iter_mut().for_each(|v| *v = v.round());
        }
        let draws: Vec<f32> = (0..4).map(|_| noise.uniform()).collect();
        cuda.write(&values, &mut logits).unwrap();
        cuda.begin(&mut cache, 0, &rules, &draws).unwrap();
        for (i, &draw) in draws.iter().enumerate() {
            cuda.sample(&mut cache, &[0], &logits).unwrap();
            let (got, want) = (cuda.sampled(&cache, 0, i).unwrap(), rules.choose(&values, draw));
            assert_eq!(Some(got), want, "case {case}, {rules:?}, draw {draw}");
            different += usize::from(want != rules.choose(&values, 0.0));
        }
    }
    assert!(different > 50, "the draws decided only {different} times");
}
