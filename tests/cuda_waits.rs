//! Waits for a device end: where a word never arrives, a block never comes, a copy never ends. Each is made so by a change
//! to a copy of the kernels (`DECDEC_KERNELS`), in a process of its own, since the device is lost to it afterwards.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails.

mod cuda_common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use cuda_common::{cuda, options, small};
use decdec::backend::DeviceLost;
use decdec::backend::cuda::{Cuda, Dtype, Options, Tuning};
use decdec::backend::{GemvBackend, Interrupted};
use decdec::config::ModelConfig;
use decdec::dec::Selection;
use decdec::format::Storage;
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;

/// What a kernel leaves out.
struct Break {
    what: &'static str,
    file: &'static str,
    /// A piece of the file that is there once, and what stands in its place.
    change: (&'static str, &'static str),
    k_chunks: [usize; 4],
    hidden_size: usize,
    /// Ctrl-C comes after so many milliseconds.
    interrupted: Option<u64>,
}

const BASE: Break =
    Break { what: "", file: "", change: ("", ""), k_chunks: [0; 4], hidden_size: 576, interrupted: None };

const BREAKS: [Break; 10] = [
    Break { what: "nothing", ..BASE },
    Break {
        what: "a block's arrival at the barrier",
        file: "grid.cuh",
        change: ("            arrive(arrived);", "            if (blockIdx.x != 1) arrive(arrived);"),
        ..BASE
    },
    Break {
        what: "a row of a product",
        file: "staging.cuh",
        change: ("        put(y + row, bias", "        if (row != 3) put(y + row, bias"),
        ..BASE
    },
    Break {
        what: "a row of a product, and somebody has had enough",
        file: "staging.cuh",
        change: ("        put(y + row, bias", "        if (row != 3) put(y + row, bias"),
        interrupted: Some(300),
        ..BASE
    },
    Break {
        what: "two dimensions of a head",
        file: "attend.cuh",
        change: ("64 * j + 2 * lane < HEAD_DIM) put2(to", "64 * j + 2 * lane < HEAD_DIM && lane != 1) put2(to"),
        ..BASE
    },
    Break {
        what: "a share's weight",
        file: "attend.cuh",
        change: ("if (!out && lane == 0) put2(", "if (!out && lane == 0 && h != 0) put2("),
        ..BASE
    },
    Break {
        what: "two activations",
        file: "staging.cuh",
        change: ("            put((u32*)(act + row), two);", "            if (row != 6) put((u32*)(act + row), two);"),
        ..BASE
    },
    Break {
        what: "a row of a compensation",
        file: "stripe.cuh",
        change: ("        put(out + r, scales[r] * sum);", "        if (r != 1) put(out + r, scales[r] * sum);"),
        k_chunks: [0, 0, 24, 0],
        ..BASE
    },
    Break {
        what: "an entry of a list",
        file: "layers.cu",
        change: ("exchange.put(place(i), s);", "{ if (place(i) != 0) exchange.put(place(i), s); }"),
        k_chunks: [16, 0, 0, 0],
        hidden_size: 4640,
        ..BASE
    },
    Break {
        what: "sixteen bytes of a copy",
        file: "stream.cuh",
        change: ("        barrier_expect(barrier, bytes);", "        barrier_expect(barrier, bytes + 16);"),
        ..BASE
    },
];

/// Made missing, `what` is missing for whoever waits: the changes are still changes to the kernels as they are.
#[test]
fn every_break_changes_one_place() {
    let folder = tempfile::tempdir().unwrap();
    for (i, broken) in BREAKS.iter().enumerate() {
        broken_kernels(broken, Path::new("kernels-cuda"), &folder.path().join(i.to_string()));
    }
}

/// A copy of the kernels with one change.
fn broken_kernels(broken: &Break, from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for file in from.read_dir().unwrap().map(|file| file.unwrap().path()) {
        let name = file.file_name().unwrap();
        if file.is_dir() {
            broken_kernels(broken, &file, &to.join(name));
            continue;
        }
        let mut text = std::fs::read_to_string(&file).unwrap();
        if name == broken.file {
            let (before, after) = broken.change;
            assert_eq!(text.matches(before).count(), 1, "{}: {before:?} in {}", broken.what, broken.file);
            text = text.replace(before, after);
        }
        std::fs::write(to.join(name), text).unwrap();
    }
}

/// Reads forty tokens, one at a time, with layers in one launch.
fn text(cuda: &Cuda, broken: &Break) -> Result<()> {
    let config = ModelConfig { hidden_size: broken.hidden_size, ..small(None, 2) };
    let weights = RandomWeights::new(config, Storage::ANYPREC, 3, 5)?;
    let mut model = Model::load(cuda, &weights, |_| ())?;
    let by_bits = vec![LayerCompensation { n_tb: 5, k_chunks: broken.k_chunks }];
    model.compensate(Some(&Compensation { by_bits, selection: Selection::Bucket }))?;
    let mut state = model.state(1, 64)?;
    model.prepare(&mut state, 0, 1, true)?;
    model.begin(&mut state, 0, &Sampling::GREEDY, &[])?;
    model.prompt(&mut state, 0, &[7], true)?;
    for i in 0..40 {
        model.step(&mut state, &[0])?;
        model.sampled(&state, 0, i)?;
    }
    Ok(())
}

static HAD_ENOUGH: AtomicBool = AtomicBool::new(false);

/// Started by `waits_end` with kernels that leave something out, which `DECDEC_TEST_BREAK` numbers.
#[test]
#[ignore = "a part of waits_end, in a process of its own"]
fn a_text_of_broken_kernels() {
    let number: usize = std::env::var("DECDEC_TEST_BREAK").unwrap().parse().unwrap();
    let broken = &BREAKS[number];
    let tuning = Tuning { one_launch: Some(true), ..Tuning::default() };
    let mut cuda = cuda(Options { tuning, ..options(Dtype::Float16, 2) }).unwrap();
    cuda.watch_layers().unwrap();
    cuda.heed(&HAD_ENOUGH);
    // Everything is compiled first: what is measured is the wait.
    if number > 0 {
        cuda.overfill(true);
        let _ = text(&cuda, broken);
        drop(cuda);
        cuda = self::cuda(Options { tuning, ..options(Dtype::Float16, 2) }).unwrap();
        cuda.watch_layers().unwrap();
        cuda.heed(&HAD_ENOUGH);
    }
    let start = Instant::now();
    if let Some(after) = broken.interrupted {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(after) + Duration::from_secs(1));
            HAD_ENOUGH.store(true, Ordering::Relaxed);
        });
    }
    let ended = text(&cuda, broken);
    let took = start.elapsed();
    let said = ended.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    eprintln!("{} missing: after {:.2} s: {said:?}", broken.what, took.as_secs_f64());
    match (number, broken.interrupted) {
        (0, _) => {
            ended.unwrap();
            assert!(!cuda.timeline().unwrap().is_empty(), "the layers went operation by operation");
        }
        (_, Some(after)) => {
            assert!(ended.unwrap_err().is::<Interrupted>(), "{said}");
            assert!(took < Duration::from_millis(after + 2000), "Ctrl-C was heard after {took:?}");
        }
        _ => {
            assert!(ended.unwrap_err().is::<DeviceLost>(), "{said}");
            assert!(said.starts_with("cuda: ") && said.contains("start it again"), "{said}");
            assert!((1..30).contains(&took.as_secs()), "{took:?}");
            // From here on nothing waits.
            let start = Instant::now();
            assert!(cuda.vector(16).is_err_and(|error| error.is::<DeviceLost>()));
            assert!(start.elapsed() < Duration::from_secs(1));
        }
    }
    let start = Instant::now();
    drop(cuda);
    // Nine other processes hang on the same device meanwhile, and the driver lets them take turns.
    assert!(start.elapsed() < Duration::from_secs(10), "dropping took {:?}", start.elapsed());
}

/// All of them beside each other: a process whose device is lost is no loss to the others.
#[test]
fn waits_end() {
    if !cuda_common::devices::is_under_test("cuda") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let child = |(i, broken): (usize, &Break)| -> Child {
        let kernels = folder.path().join(i.to_string());
        broken_kernels(broken, Path::new("kernels-cuda"), &kernels);
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_text_of_broken_kernels", "--ignored", "--nocapture"])
            .env("DECDEC_KERNELS", kernels)
            .env("DECDEC_CACHE_DIR", folder.path().join("cache"))
            .env("DECDEC_TEST_BREAK", i.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<Child> = BREAKS.iter().enumerate().map(child).collect();
    let mut failed = Vec::new();
    for (broken, child) in BREAKS.iter().zip(children) {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        eprintln!("{}: {}\n{said}", broken.what, output.status);
        if !output.status.success() || !said.contains(" missing: after ") {
            failed.push(broken.what);
        }
    }
    assert!(failed.is_empty(), "after {:?}: {failed:?}", start.elapsed());
}
