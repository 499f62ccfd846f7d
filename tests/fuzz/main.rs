//! The fuzzing targets without a fuzzer: the committed corpus, past findings, and blind mutations of them, for
//! `DECDEC_FUZZ_SECONDS` on each target (default 1). `scripts/fuzz.sh` fuzzes the same targets by coverage.

mod allocation;
#[path = "../fixtures/mod.rs"]
mod fixtures;
mod hostile;
#[path = "../pt/mod.rs"]
#[allow(dead_code, reason = "the tests of the reader use the rest")]
mod pt;
mod seeds;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use allocation::{CAP, Counting, peak};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use targets::TARGETS;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// No input may keep a reader busy for longer, even on a machine that does other work.
const TIME: Duration = Duration::from_secs(60);

/// The targets count memory and write files for the whole process: one at a time.
static ONE: Mutex<()> = Mutex::new(());

/// The committed inputs of a target, and its past findings.
fn corpus(target: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let list = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().map(|entry| entry.expect("readable").path());
    let mut files: Vec<_> =
        list(root.join("corpus").join(target)).chain(list(root.join("findings").join(target))).collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has a corpus");
    files
}

/// A few random edits: bits, bytes, numbers that sizes overflow with, pieces doubled, moved or cut out.
fn mutate(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..rng.random_range(1..5) {
        if bytes.is_empty() {
            bytes.push(rng.random());
        }
        let at = rng.random_range(0..bytes.len());
        let end = bytes.len().min(at + rng.random_range(1..24));
        match rng.random_range(0..7) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => {
                let numbers = [0, 1, u64::MAX, u64::MAX >> 1, 1 << 60, 1 << 31, u64::from(u32::MAX)];
                let number = numbers[rng.random_range(0..numbers.len())].to_le_bytes();
                let len = bytes[at..].len().min([1, 2, 4, 8][rng.random_range(0..4)]);
                bytes[at..at + len].copy_from_slice(&number[..len]);
            }
            3 => bytes.extend_from_within(at..end),
            4 => drop(bytes.drain(at..end)),
            5 => {
                let piece = other.get(at..end).unwrap_or_default().to_vec();
                let _ = bytes.splice(at..at, piece);
            }
            _ => bytes.truncate(at),
        }
    }
}

#[test]
fn nothing_crashes_hangs_or_swallows_memory() {
    let _one = ONE.lock();
    let seconds = std::env::var("DECDEC_FUZZ_SECONDS").map_or(1.0, |s| s.parse().expect("a number of seconds"));
    for target in TARGETS {
        let inputs: Vec<Vec<u8>> = corpus(target.name).iter().map(|path| fs::read(path).expect("readable")).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let (start, mut runs, mut highest) = (Instant::now(), 0usize, 0);
        while runs < inputs.len() || start.elapsed().as_secs_f64() < seconds {
            let mut input = inputs[runs % inputs.len()].clone();
            if runs >= inputs.len() {
                let other = rng.random_range(0..inputs.len());
                mutate(&mut rng, &mut input, &inputs[other]);
            }
            let began = Instant::now();
            let run = std::panic::AssertUnwindSafe(|| {
                peak(|| {
                    (target.run)(&input);
                })
            });
            let held = std::panic::catch_unwind(run);
            let harmless = held.as_ref().is_ok_and(|&held| held <= CAP) && began.elapsed() < TIME;
            if !harmless {
                let path = std::env::temp_dir().join(format!("decdec-{}-{runs}", target.name));
                fs::write(&path, &input).expect("writable");
                panic!("{}: {held:?} bytes held, {:?}: the input is {}", target.name, began.elapsed(), path.display());
            }
            highest = highest.max(held.unwrap_or(0));
            runs += 1;
        }
        eprintln!("{}: {runs} inputs, {} of them kept, {highest} bytes at most", target.name, inputs.len());
    }
}

#[test]
fn every_seed_is_accepted() {
    let _one = ONE.lock();
    // Fuzzing starts behind the first checks, and the targets see what they are given.
    for (target, name, bytes) in seeds::all() {
        let run = TARGETS.into_iter().find(|t| t.name == target).expect("a target").run;
        assert!(run(&bytes), "{target}/{name} is refused");
        assert!(!run(&bytes[..bytes.len() / 2]), "half of {target}/{name} is accepted");
    }
}

/// One named test for every table.
macro_rules! hostile_files_are_refused {
    ($($table:ident),* $(,)?) => {
        $(#[test]
        fn $table() {
            let _one = ONE.lock();
            hostile::$table();
        })*
    };
}

hostile_files_are_refused! {
    broken_ggufs,
    broken_zips,
    broken_safetensors,
    broken_checkpoints,
    broken_texts,
    broken_profiles,
}

#[test]
#[ignore = "writes tests/fuzz/corpus"]
fn write_the_seeds() {
    for (target, name, bytes) in seeds::all() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
        fs::create_dir_all(&dir).expect("writable");
        fs::write(dir.join(name), bytes).expect("writable");
    }
}
