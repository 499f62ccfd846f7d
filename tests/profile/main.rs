//! The sweep, from matrices to files to a tuned result, with a tiny model on the CPU.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use decdec::backend::GemvBackend;
use decdec::backend::cpu::Cpu;
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::engine::Engine;
use decdec::format::{Format, Storage};
use decdec::model::Model;
use decdec::nsys::trace::{self, Kernel, Role};
use decdec::nsys::{self, Identity, KernelRecord, Kind, Precision};
use decdec::profile::{self, Bandwidths, ByClock, Launch, Options, Outcome, Recorder, grid};
use decdec::random::RandomWeights;
use decdec::tune;
use serde_json::json;

mod killed;
mod nsight;
mod whole;

const TOKENS: usize = 2;
const LAYERS: usize = 2;

fn tiny() -> ModelConfig {
    ModelConfig::from_json(&json!({
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
    }))
    .expect("a small configuration")
}

fn options(dir: &Path, format: Format) -> Options {
    Options {
        identity: Identity {
            prefix: "tiny".into(),
            model: "random".into(),
            precision: Precision::Fp32,
            format,
            bits: 3,
        },
        weights: "random:7".into(),
        dir: dir.to_path_buf(),
        tokens: TOKENS,
        overwrite: false,
        halve_layers: false,
        min_n_tb: Some(1),
        max_n_tb: Some(5),
        max_k_chunk: Some(3),
        k_chunks: None,
        selection: Selection::Bucket,
        kind: None,
        dearest: Options::DEAREST,
        choices: Vec::new(),
    }
}

fn sweep(recorder: &mut dyn Recorder<Cpu>, options: &Options) -> Result<Outcome> {
    sweep_of(7, recorder, options)
}

/// A sweep of the model that this seed makes.
fn sweep_of(seed: u64, recorder: &mut dyn Recorder<Cpu>, options: &Options) -> Result<Outcome> {
    let model = RandomWeights::new(tiny(), Storage::ANYPREC, 3, seed).expect("valid");
    profile::run(&Cpu::new(), recorder, &model, options)
}

/// A recorder that stops, or forgets a time, at its `at`-th call.
struct Faulty {
    clock: ByClock,
    calls: usize,
    at: usize,
    zero: bool,
}

impl Recorder<Cpu> for Faulty {
    fn clock(&self) -> String {
        Recorder::<Cpu>::clock(&self.clock)
    }

    fn record(
        &mut self,
        cpu: &Cpu,
        kinds: &[usize],
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>> {
        self.calls += 1;
        let mut recorded = self.clock.record(cpu, kinds, launch)?;
        if self.calls == self.at && self.zero {
            recorded[0].gemv = KernelRecord::default();
        } else if self.calls == self.at {
            bail!("unplugged");
        }
        Ok(recorded)
    }

    fn bandwidths(&mut self, _: &Cpu) -> Result<Option<Bandwidths>> {
        Ok(Some(Bandwidths { device_memory: 6e9, host_link: 1e8 }))
    }
}

fn read(options: &Options) -> nsys::Profile {
    let id = &options.identity;
    nsys::read(&id.trace(&options.dir), &id.sqlite(&options.dir), id).unwrap()
}

const VERIFICATION: tune::Verification = tune::Verification { tokens: 40, rounds: 3, selection: Selection::Bucket };

/// Tunes a sweep for three targets and verifies what was found with real tokens: each target holds, and `then` sees the rest.
fn verified(options: &Options, exhaustive: bool, then: impl FnOnce(&mut tune::Outcome, &Engine<'_>)) {
    let tuning = tune::Options {
        identity: options.identity.clone(),
        dir: options.dir.clone(),
        shapes: [None; 4],
        targets: vec![0.0, 10.0, 1e6],
        exhaustive,
        objective: tune::Objective::Channels,
    };
    let mut outcome = tune::run(&tuning).unwrap();
    let weights = RandomWeights::new(tiny(), Storage::ANYPREC, 3, 7).unwrap();
    let cpu = Cpu::new();
    let engine = Engine::of(Model::load(&cpu, &weights, |_| {}).unwrap(), 64);
    tune::verify(&mut outcome, &engine, &VERIFICATION).unwrap();
    for tuning in &outcome.tunings {
        let verified = tuning.verified.as_ref().unwrap();
        assert!(verified.slowdown <= tuning.target && verified.base_ms > 0.0, "{verified:?}");
        assert!(verified.missed.iter().all(|&(_, slowdown)| slowdown > tuning.target));
    }
    then(&mut outcome, &engine);
}

/// Launches of a whole sweep: for every `n_tb` that is useful somewhere one base and three compensated rounds, all
/// four modules in each, as a token has them.
fn expected(useful: &[Vec<usize>; 4]) -> (usize, usize) {
    let n_tbs: std::collections::BTreeSet<_> = useful.concat().into_iter().collect();
    let rounds = n_tbs.len() * 4 * TOKENS * LAYERS;
    (rounds, 3 * rounds)
}

#[test]
fn a_sweep_becomes_two_files_and_a_tuned_result() {
    for format in [Format::AnyPrec, Format::LutGemm] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir.path().join("nsys"), format);
        let outcome = sweep(&mut ByClock::default(), &options).unwrap();
        let measured = outcome.measured.as_ref().unwrap();
        assert!(outcome.trace.ends_with(format!("nsys/tiny_random_fp32_{}_3.trace", format.algo())));
        assert_eq!(measured.resumed, 0);
        assert!(outcome.to_string().contains("GB/s"), "{outcome}");
        let left: Vec<_> = fs::read_dir(&options.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "nothing but the two files is left: {left:?}");

        let useful = grid::useful_n_tbs(&tiny(), 1, 5).unwrap();
        let text = fs::read_to_string(&outcome.trace).unwrap();
        let first: Vec<_> = text.lines().take(12).collect();
        let gemv = format.gemv_kernel();
        assert_eq!(first[0], format!("compile {gemv} qkv"));
        assert_eq!(first[4], "compile fused_dec_kernel 1");
        let lines = trace::parse(&text, format).unwrap();
        let count = |role: fn(Role) -> bool| lines.iter().filter(|line| role(line.role)).count();
        let (bases, pairs) = expected(&useful);
        assert_eq!(count(|role| role == Role::Compile), 12);
        assert_eq!(count(|role| role == Role::Standalone), bases);
        assert_eq!(count(|role| matches!(role, Role::Concurrent(_))), 2 * pairs);

        let profile = read(&options);
        assert_eq!(profile.capture.as_ref().unwrap(), &measured.capture);
        for pair in profile.kernels.windows(2).filter(|pair| matches!(pair[0].0.role, Role::Concurrent(_))) {
            if let (Kernel::Dec(_), Kernel::Gemv(module)) = (pair[0].0.kernel, pair[1].0.kernel) {
                // No module ran with an n_tb that changes nothing for it.
                assert!(useful[module.index()].contains(&(pair[0].1.grid[0] as usize)));
            }
        }
        tunes(&options, dir.path());
    }
}

/// Tunes what was profiled, writes everything, and checks that it is for this model.
fn tunes(options: &Options, dir: &Path) {
    let outcome = tune::run(&tune::Options {
        identity: options.identity.clone(),
        dir: options.dir.clone(),
        shapes: [None; 4],
        targets: vec![5.0, 500.0],
        exhaustive: true,
        objective: tune::Objective::Channels,
    })
    .unwrap();
    for tuning in &outcome.tunings {
        assert!(tuning.found.fine.us() <= outcome.timings.base_us() * (1.0 + tuning.target / 100.0));
        assert!(tuning.exhaustive.as_ref().unwrap().sum_k() >= tuning.found.fine.sum_k());
    }
    let to = tune::Directories { csv: dir.join("csv"), plots: dir.join("plots"), tuned: dir.join("tuned") };
    let written = outcome.write(&to).unwrap();
    let tuned = decdec::tuned::Tuned::read(written.last().unwrap()).unwrap().remove(0);
    tuned.check(Cpu::new().device(), tiny().shapes(0), 3).unwrap();
    assert!(tuned.check(Cpu::new().device(), [(64, 64); 4], 3).is_err());
}

/// Real tokens of a tiny model: nothing is promised that was not measured.
#[test]
fn what_is_verified_holds() {
    let dir = tempfile::tempdir().unwrap();
    // Of 64 channels, 16 and all of them.
    let options = Options { k_chunks: Some(vec![256, 1024]), ..options(&dir.path().join("nsys"), Format::AnyPrec) };
    let swept = sweep(&mut ByClock::default(), &options).unwrap().measured.unwrap().capture;
    assert_eq!(swept.k_chunks, [256, 1024]);
    verified(&options, false, |outcome, engine| {
        for tuning in &outcome.tunings {
            let slowdown = tuning.verified.as_ref().unwrap().slowdown;
            assert_eq!(outcome.tuned(tuning).real_slowdown, Some(slowdown));
        }
        assert_eq!(outcome.tunings[2].found.fine.k_chunks(), [1024; 4]);
        assert!(outcome.to_string().contains("Real slowdown of a token : "), "{outcome}");
        let longer = tune::Verification { tokens: 64, ..VERIFICATION };
        let error = tune::verify(outcome, engine, &longer).unwrap_err().to_string();
        assert!(error.contains("context is 64"), "{error}");
    });
}

#[test]
fn a_kernel_without_a_time_fails_its_configuration_only() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 3, zero: true };
    let error = format!("{:#}", sweep(&mut faulty, &options).unwrap_err());
    assert!(error.contains("n_tb 1, k_chunk 2") && error.contains("fused_dec_kernel 2 has no time"), "{error}");
    assert_eq!(sweep(&mut ByClock::default(), &options).unwrap().measured.unwrap().resumed, 2);
}

#[test]
fn options_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = options(dir.path(), Format::AnyPrec);
    type Change = fn(&mut Options);
    let cases: [(Change, &str); 8] = [
        (|o| o.tokens = 0, "--tokens is 0"),
        (|o| o.max_n_tb = Some(1000), "--max-n-tb is 1000, at most 64 are allowed on cpu"),
        (|o| o.min_n_tb = Some(0), "at least 1 thread block"),
        (|o| o.min_n_tb = Some(6), "--min-n-tb 6 and --max-n-tb 5"),
        (|o| o.max_k_chunk = Some(2000), "--max-k-chunk is 2000, 1 to 1024 are allowed"),
        (|o| o.identity.bits = 4, "--bitwidth is 4, but no layer is: the first ones are 3-bit"),
        (|o| o.identity.prefix = "../x".into(), "becomes part of a file name"),
        (|o| o.identity.model = String::new(), "becomes part of a file name"),
    ];
    for (change, says) in cases {
        let mut options = good.clone();
        change(&mut options);
        let error = format!("{:#}", sweep(&mut ByClock::default(), &options).unwrap_err());
        assert!(error.contains(says), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{says}: nothing was written");
    }
}

#[test]
fn the_grid_follows_from_bandwidths_and_partitions() {
    let h100 = Bandwidths { device_memory: 60.0, host_link: 1.0 };
    assert_eq!(h100.ratio(), 60.0);
    assert_eq!(h100.knee(3), 12.8);
    assert_eq!(grid::k_chunks(12.8, None).unwrap(), (1..=26).collect::<Vec<_>>());
    assert_eq!(grid::k_chunks(12.8, Some(2)).unwrap(), [1, 2]);
    assert_eq!(grid::k_chunks(0.1, None).unwrap(), [1, 2]);
    let wide = grid::k_chunks(768.0, None).unwrap();
    assert!(wide.len() <= 64 && wide.last() == Some(&1024), "{wide:?}");
    // 64 rows are 8 words, two of which stay together: more than 4 blocks find no more work than 4.
    let useful = grid::useful_n_tbs(&tiny(), 1, 9).unwrap();
    assert_eq!(useful[Projection::O.index()], [1, 2, 3, 4]);
    assert_eq!(useful[Projection::Down.index()], [1, 2, 3, 4]);
    assert_eq!(grid::useful_n_tbs(&tiny(), 5, 7).unwrap()[Projection::O.index()], [5]);
}

#[test]
fn layers_that_take_turns_are_halved_on_request() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { halve_layers: true, ..options(dir.path(), Format::AnyPrec) };
    let outcome = sweep(&mut ByClock::default(), &options).unwrap();
    assert_eq!(outcome.measured.unwrap().capture.layers, 1);
}
