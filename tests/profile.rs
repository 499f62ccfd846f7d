//! The sweep, from matrices to files to a tuned result, with a tiny model on the CPU.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use decdec::backend::GemvBackend;
use decdec::backend::cpu::Cpu;
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::format::{Format, Storage};
use decdec::nsys::trace::{self, Kernel, Role};
use decdec::nsys::{self, Identity, KernelRecord, Kind, Precision};
use decdec::profile::{self, Bandwidths, ByClock, Launch, Options, Outcome, Recorder, grid};
use decdec::random::RandomWeights;
use decdec::tune;
use serde_json::json;

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

/// The same with whole tokens: prices of being ready, of each projection and of mixes are there, products' stretches are
/// the trace's rows, and the kind is told.
#[test]
fn a_sweep_of_whole_tokens_becomes_two_files_and_a_tuned_result() {
    for format in [Format::AnyPrec, Format::LutGemm] {
        let dir = tempfile::tempdir().unwrap();
        let options = token_options(&dir.path().join("nsys"), format);
        let outcome = sweep(&mut ByClock::default(), &options).unwrap();
        let measured = outcome.measured.as_ref().unwrap();
        let said = outcome.to_string();
        assert!(said.contains("whole tokens") && said.contains("ready to compensate, nothing selected"), "{said}");
        assert_eq!((measured.capture.kind, measured.capture.layers), (Kind::Tokens, LAYERS));
        assert!(measured.capture.layers_ns > 0 && measured.capture.host_link <= measured.capture.device_memory);
        let left: Vec<_> = fs::read_dir(&options.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "nothing but the two files is left: {left:?}");

        let profile = read(&options);
        assert_eq!(profile.capture.as_ref().unwrap(), &measured.capture);
        let db = rusqlite::Connection::open(&outcome.sqlite).unwrap();
        let kind = "SELECT value FROM META_DATA_CAPTURE WHERE name = 'DECDEC_KIND'";
        assert_eq!(db.query_row(kind, [], |row| row.get::<_, String>(0)).unwrap(), "tokens");
        // At both n_tb: nothing, each projection at both k_chunk, the usual mixes of the least and every one of the most.
        let single = |i: usize| [256, 1024].map(|k| std::array::from_fn(|p| if p == i { k } else { 0 }));
        let mut expected: Vec<[usize; 4]> = (0..4).flat_map(single).chain(profile::every_mix(&[0, 1024])).collect();
        expected.extend([[256; 4], [0, 0, 256, 256]]);
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(expected.len(), CHOICES);
        for n_tb in [1, 2] {
            let of = profile.tokens.iter().filter(|token| token.n_tb == n_tb);
            let mut found: Vec<_> = of.map(|token| token.k_chunks).collect();
            found.sort_unstable();
            assert_eq!(found, expected);
        }
        let pairs = profile.kernels.iter().filter(|(line, _)| matches!(line.role, Role::Concurrent(_))).count() / 2;
        assert_eq!(pairs, profile.tokens.len() * 4 * LAYERS);
        assert!(profile.tokens.iter().all(|token| token.token_ns > 0 && token.base_ns > 0));
        tunes(&options, dir.path());
    }
}

/// What [`token_options`] has measured at each `n_tb`.
const CHOICES: usize = 22;

/// Of 64 channels, 16 and all of them; whatever they cost.
fn token_options(dir: &Path, format: Format) -> Options {
    Options {
        kind: Some(Kind::Tokens),
        max_n_tb: Some(2),
        max_k_chunk: None,
        k_chunks: Some(vec![256, 1024]),
        dearest: 1e3,
        choices: profile::every_mix(&[0, 1024]),
        ..options(dir, format)
    }
}

/// A sweep of whole tokens that was cut off goes on; what was measured is not measured again.
#[test]
fn an_interrupted_sweep_of_whole_tokens_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = token_options(dir.path(), Format::AnyPrec);
    // Calls: one for the layers' time, four to set up, one for the base, then one per configuration.
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 6 + 10, zero: false };
    let error = format!("{:#}", sweep(&mut faulty, &options).unwrap_err());
    assert!(error.contains("unplugged"), "{error}");
    assert!(!options.identity.trace(dir.path()).exists());
    let mut whole = Faulty { clock: ByClock::default(), calls: 0, at: 0, zero: false };
    let measured = sweep(&mut whole, &options).unwrap().measured.unwrap();
    assert_eq!((measured.resumed, measured.configurations), (9, 2 * CHOICES));
    assert_eq!(whole.calls, 2 + measured.configurations - 9, "a base for each n_tb, and what was missing");
    assert_eq!(read(&options).tokens.len(), 2 * CHOICES);
}

/// A profile of an older format, finished or not, is neither taken for one of this format nor lost without a word.
#[test]
fn a_profile_of_an_older_format_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let sqlite = sweep(&mut ByClock::default(), &options).unwrap().sqlite;
    let older = "DELETE FROM META_DATA_CAPTURE WHERE name IN ('DECDEC_FORMAT', 'DECDEC_KIND')";
    rusqlite::Connection::open(&sqlite).unwrap().execute(older, []).unwrap();
    let before = fs::read(&sqlite).unwrap();
    let error = format!("{:#}", sweep(&mut ByClock::default(), &options).unwrap_err());
    assert!(error.contains("a profile of format 1, this program reads 2: take it again with"), "{error}");
    assert_eq!(fs::read(&sqlite).unwrap(), before);
    let again = Options { overwrite: true, ..options };
    assert!(sweep(&mut ByClock::default(), &again).unwrap().measured.is_some());
}

/// Tuned and verified with real tokens: each target holds, and nothing that was measured and holds is worth more.
#[test]
fn what_is_found_in_whole_tokens_holds() {
    let dir = tempfile::tempdir().unwrap();
    let options = token_options(&dir.path().join("nsys"), Format::AnyPrec);
    sweep(&mut ByClock::default(), &options).unwrap();
    let (identity, targets) = (options.identity.clone(), vec![0.0, 10.0, 1e6]);
    let objective = tune::Objective::Channels;
    let tuning =
        tune::Options { identity, dir: options.dir.clone(), shapes: [None; 4], targets, exhaustive: true, objective };
    let mut outcome = tune::run(&tuning).unwrap();
    let weights = RandomWeights::new(tiny(), Storage::ANYPREC, 3, 7).unwrap();
    let cpu = Cpu::new();
    let model = decdec::model::Model::load(&cpu, &weights, |_| {}).unwrap();
    let engine = decdec::engine::Engine::of(model, 64);
    let how = tune::Verification { tokens: 40, rounds: 3, selection: Selection::Bucket };
    tune::verify(&mut outcome, &engine, &how).unwrap();
    for tuning in &outcome.tunings {
        let verified = tuning.verified.as_ref().unwrap();
        assert!(verified.slowdown <= tuning.target && verified.base_ms > 0.0, "{verified:?}");
        assert!(verified.missed.iter().all(|&(_, slowdown)| slowdown > tuning.target));
    }
    let worth: Vec<_> = outcome.tunings.iter().map(|tuning| tuning.found.fine.sum_k()).collect();
    assert!(worth[0] <= worth[2] && outcome.tunings[2].found.fine.k_chunks() == [1024; 4], "{worth:?}");
}

/// Real tokens of a tiny model: nothing is promised that was not measured.
#[test]
fn what_is_verified_holds() {
    let dir = tempfile::tempdir().unwrap();
    // Of 64 channels, 16 and all of them.
    let options = Options { k_chunks: Some(vec![256, 1024]), ..options(&dir.path().join("nsys"), Format::AnyPrec) };
    let swept = sweep(&mut ByClock::default(), &options).unwrap().measured.unwrap().capture;
    assert_eq!(swept.k_chunks, [256, 1024]);
    let (identity, targets) = (options.identity.clone(), vec![0.0, 10.0, 1e6]);
    let tuning = tune::Options {
        identity,
        dir: options.dir.clone(),
        shapes: [None; 4],
        targets,
        exhaustive: false,
        objective: tune::Objective::Channels,
    };
    let mut outcome = tune::run(&tuning).unwrap();
    let weights = RandomWeights::new(tiny(), Storage::ANYPREC, 3, 7).unwrap();
    let cpu = Cpu::new();
    let model = decdec::model::Model::load(&cpu, &weights, |_| {}).unwrap();
    let engine = decdec::engine::Engine::of(model, 64);
    let how = tune::Verification { tokens: 40, rounds: 3, selection: Selection::Bucket };
    tune::verify(&mut outcome, &engine, &how).unwrap();
    for tuning in &outcome.tunings {
        let verified = tuning.verified.as_ref().unwrap();
        assert!(verified.slowdown <= tuning.target && verified.base_ms > 0.0, "{verified:?}");
        assert!(verified.missed.iter().all(|&(_, slowdown)| slowdown > tuning.target));
        assert_eq!(outcome.tuned(tuning).real_slowdown, Some(verified.slowdown));
    }
    assert_eq!(outcome.tunings[2].found.fine.k_chunks(), [1024; 4]);
    assert!(outcome.to_string().contains("Real slowdown of a token : "), "{outcome}");
    let longer = tune::Verification { tokens: 64, ..how };
    let error = tune::verify(&mut outcome, &engine, &longer).unwrap_err().to_string();
    assert!(error.contains("context is 64"), "{error}");
}

#[test]
fn what_is_there_is_kept_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), Format::AnyPrec);
    let first = sweep(&mut ByClock::default(), &options).unwrap();
    let before = fs::read(&first.sqlite).unwrap();
    let second = sweep(&mut ByClock::default(), &options).unwrap();
    assert!(second.measured.is_none());
    assert!(second.to_string().contains("kept"), "{second}");
    assert_eq!(fs::read(&first.sqlite).unwrap(), before);
    fs::remove_file(&first.trace).unwrap();
    let error = sweep(&mut ByClock::default(), &options).unwrap_err().to_string();
    assert!(error.contains("use --overwrite"), "{error}");
    options.overwrite = true;
    assert!(sweep(&mut ByClock::default(), &options).unwrap().measured.is_some());
    assert_ne!(fs::read(&first.sqlite).unwrap(), before, "measured again");
}

#[test]
fn an_interrupted_sweep_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    // Calls: four to set up, then one per configuration.
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 6, zero: false };
    let error = format!("{:#}", sweep(&mut faulty, &options).unwrap_err());
    assert!(error.contains("unplugged"), "{error}");
    assert!(!options.identity.trace(dir.path()).exists());
    let mut whole = Faulty { clock: ByClock::default(), calls: 0, at: 0, zero: false };
    let outcome = sweep(&mut whole, &options).unwrap();
    let measured = outcome.measured.unwrap();
    assert_eq!(measured.resumed, 5);
    assert_eq!(whole.calls, 4 + measured.configurations - 5, "what was measured is not measured again");
    assert_eq!(measured.capture.k_chunks, [1, 2, 3]);
    let (bases, pairs) = expected(&grid::useful_n_tbs(&tiny(), 1, 5).unwrap());
    assert_eq!(read(&options).kernels.len(), 24 + bases + 2 * pairs);
    // The second process' clock started anew, and yet every pair found its own times.
    let mut last = 0;
    for (_, record) in read(&options).kernels.iter().filter(|(line, _)| matches!(line.kernel, Kernel::Gemv(_))) {
        assert!(record.start_ns >= last);
        last = record.end_ns;
    }
}

#[test]
fn an_interrupted_sweep_with_other_options_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), Format::AnyPrec);
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 9, zero: false };
    sweep(&mut faulty, &options).unwrap_err();
    options.tokens = 1;
    let outcome = sweep(&mut ByClock::default(), &options).unwrap();
    assert_eq!(outcome.measured.unwrap().resumed, 0);
    fs::write(options.identity.sqlite(dir.path()).with_extension("sqlite.partial"), "rubbish").unwrap();
    options.overwrite = true;
    assert!(sweep(&mut ByClock::default(), &options).is_ok());
}

/// The same name and the same flags, but the checkpoint at that path is another one by now.
#[test]
fn an_interrupted_sweep_of_another_model_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let interrupt = || {
        let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 6, zero: false };
        sweep(&mut faulty, &options).unwrap_err();
    };
    interrupt();
    assert_eq!(sweep_of(7, &mut ByClock::default(), &options).unwrap().measured.unwrap().resumed, 5);
    fs::remove_file(options.identity.trace(dir.path())).unwrap();
    fs::remove_file(options.identity.sqlite(dir.path())).unwrap();
    interrupt();
    assert_eq!(sweep_of(8, &mut ByClock::default(), &options).unwrap().measured.unwrap().resumed, 0);
}

/// Makes a database say that it was taken on another device.
fn on_another_card(sqlite: &Path) {
    let db = rusqlite::Connection::open(sqlite).unwrap();
    let changed = "UPDATE META_DATA_CAPTURE SET value = 'Another Card' WHERE name = 'DECDEC_DEVICE_NAME'";
    assert_eq!(db.execute(changed, []).unwrap(), 1);
}

#[test]
fn two_devices_do_not_take_turns_with_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), Format::AnyPrec);
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 6, zero: false };
    sweep(&mut faulty, &options).unwrap_err();
    // Half of a sweep of another device, then a whole one: neither is dropped nor taken for this one's.
    let (sqlite, trace) = (options.identity.sqlite(dir.path()), options.identity.trace(dir.path()));
    for there in [sqlite.with_extension("sqlite.partial"), sqlite.clone()] {
        if there == sqlite {
            options.overwrite = true;
            sweep(&mut ByClock::default(), &options).unwrap();
            options.overwrite = false;
        }
        on_another_card(&there);
        let before = fs::read(&there).unwrap();
        let error = sweep(&mut ByClock::default(), &options).unwrap_err().to_string();
        assert!(error.contains("is of Another Card (cpu), this is ") && error.contains("another prefix"), "{error}");
        assert_eq!(fs::read(&there).unwrap(), before);
        assert_eq!(trace.exists(), there == sqlite);
    }
    options.overwrite = true;
    assert!(sweep(&mut ByClock::default(), &options).unwrap().measured.is_some());
}

#[test]
fn a_second_writer_waits_or_takes_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let sqlite = options.identity.sqlite(dir.path());
    let first = sweep(&mut ByClock::default(), &options).unwrap().measured.unwrap().capture;
    let writer = nsys::Writer::create(&sqlite, &first).unwrap();
    for overwrite in [false, true] {
        let options = Options { overwrite, ..options.clone() };
        let error = sweep(&mut ByClock::default(), &options).unwrap_err().to_string();
        assert!(error.contains("another process is writing"), "{error}");
    }
    assert!(sqlite.with_extension("sqlite.partial").exists(), "the first one's work is left alone");
    let other = Identity { prefix: "other".into(), ..options.identity.clone() };
    sweep(&mut ByClock::default(), &Options { identity: other, ..options.clone() }).unwrap();
    drop(writer);
    assert!(sweep(&mut ByClock::default(), &options).unwrap().measured.is_some());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "two profiles and nothing else");
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

/// A stand-in for `nsys`: runs what it is given, then "exports" a prepared file.
fn fake_nsys(dir: &Path, export: &Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo 'Nsight Systems 2099.1'; exit 0; }}\n\
         while [ \"$1\" != --output ]; do shift; done\nout=\"$2\"; shift 2\n\
         \"$@\" || exit 1\ncp '{}' \"$out.sqlite\"\n",
        export.display()
    );
    let path = dir.join("nsys");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What a program under `nsys` leaves: every third nanosecond count wrong, its launches named as the device
/// names them. And what `nsys` exports: the same launches with other times, after some of bandwidth's.
fn profiled_under_nsys(dir: &Path, options: &Options, missing: usize) -> (std::path::PathBuf, std::path::PathBuf) {
    struct Named(ByClock);
    impl Recorder<Cpu> for Named {
        fn clock(&self) -> String {
            "events".into()
        }
        fn record(
            &mut self,
            cpu: &Cpu,
            kinds: &[usize],
            launch: &mut dyn FnMut(usize) -> Result<()>,
        ) -> Result<Vec<Launch>> {
            let mut recorded = self.0.record(cpu, kinds, launch)?;
            for launch in &mut recorded {
                launch.gemv.name = "void anyprec_gemv<3>(int)".into();
            }
            Ok(recorded)
        }
        fn bandwidths(&mut self, _: &Cpu) -> Result<Option<Bandwidths>> {
            Ok(None)
        }
    }
    let own = dir.join("own");
    sweep(&mut Named(ByClock::default()), &Options { dir: own.clone(), ..options.clone() }).unwrap();
    // The recorder names the launch; what compensates inside of it has no name of its own.
    let db = rusqlite::Connection::open(options.identity.sqlite(&own)).unwrap();
    let launches = "shortName = (SELECT id FROM StringIds WHERE value = 'matmul_kbit_32')";
    let count: usize = db
        .query_row(&format!("SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE {launches}"), [], |row| {
            row.get::<_, i64>(0)
        })
        .unwrap() as usize;
    drop(db);
    let export = dir.join("export.sqlite");
    let db = rusqlite::Connection::open(&export).unwrap();
    db.execute_batch(
        "BEGIN; CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT); INSERT INTO StringIds VALUES (1, 'anyprec_gemv');
         CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, shortName INTEGER, gridX INTEGER);",
    )
    .unwrap();
    for i in 0..count + 5 - missing {
        // The five of the bandwidth measurement took long, the i-th of the sweep 1000 + i ns.
        let start = 1_000_000 * (i as i64 + 1);
        let ns = if i < 5 { 500_000 } else { 1000 + i as i64 - 5 };
        db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?1, ?2, 1, 132)", [start, start + ns]).unwrap();
    }
    db.execute_batch("COMMIT").unwrap();
    (own, export)
}

#[test]
fn times_of_a_real_nsys_replace_our_own() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(&dir.path().join("nsys-files"), Format::AnyPrec);
    let (own, export) = profiled_under_nsys(dir.path(), &options, 0);
    let nsys = fake_nsys(dir.path(), &export);
    let child = |staging: &Path| vec!["cp".into(), "-R".into(), own.join(".").into(), staging.into()];
    profile::under_nsight(&nsys, &options, child).unwrap();
    let profile = read(&options);
    assert_eq!(profile.capture.unwrap().clock, "Nsight Systems 2099.1");
    let gemvs = profile.kernels.iter().filter(|(line, _)| matches!(line.kernel, Kernel::Gemv(_)));
    for (i, (_, record)) in gemvs.enumerate() {
        assert_eq!(record.end_ns - record.start_ns, 1000 + i as u64);
    }
    for pair in profile.kernels.windows(2).filter(|pair| matches!(pair[0].0.kernel, Kernel::Dec(_))) {
        let (dec, launch) = (&pair[0].1, &pair[1].1);
        assert!(launch.start_ns <= dec.start_ns && dec.end_ns <= launch.end_ns, "inside its launch");
        assert!(dec.grid[0] <= 5 && launch.grid[0] == 132);
    }
    let error = profile::under_nsight(&nsys, &options, child).unwrap_err().to_string();
    assert!(error.contains("use --overwrite"), "{error}");
    let options = Options { overwrite: true, ..options };
    let error = format!("{:#}", profile::under_nsight(&nsys, &options, |_| vec!["false".into()]).unwrap_err());
    assert!(error.contains("ended with"), "{error}");
    let error = format!("{:#}", profile::under_nsight(Path::new("/no/nsys"), &options, child).unwrap_err());
    assert!(error.contains("--nsys-path is the program nsys"), "{error}");
}

#[test]
fn an_export_that_lacks_launches_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(&dir.path().join("nsys-files"), Format::AnyPrec);
    let (own, export) = profiled_under_nsys(dir.path(), &options, 6);
    let error = nsys::adopt(&options.identity, &own, &export, &options.dir, "nsys").unwrap_err();
    assert!(format!("{error:#}").contains("anyprec_gemv was launched"), "{error:#}");
}
