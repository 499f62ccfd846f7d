//! Every command with a stdout or stderr that nobody reads, or that is full: one line at most, and no panic.

use std::path::Path;
use std::process::{Command as Process, ExitStatus, Stdio};

use rayon::prelude::*;

use super::flags::words;
use super::*;

/// Command lines that use all ways out; `[OUT]` is a place of its own for each run.
const LINES: [&str; 29] = [
    "--help",
    "--version",
    "generate --help",
    "eval --help",
    "generate --no-such-flag",
    "no-such-command",
    "",
    "quantize small.gguf --backend ap --bitwidth 3 --refine none --seq-len 16 --samples 2 --out [OUT]",
    "quantize small.gguf --backend ap --bitwidth 3 --refine none --seq-len 16 --samples 2 --out [OUT] --dry-run",
    "convert plain --out [OUT]",
    "convert plain --out plain",
    "residuals --original small.gguf --quantized plain --seq-len 16 --samples 2 --out [OUT]",
    "generate --checkpoint-path plain --prompt ab --max-new-tokens 3",
    "generate --checkpoint-path plain --prompt ab --max-new-tokens 3 --json --temperature 1",
    "generate --checkpoint-path plain --max-new-tokens 3",
    "generate --checkpoint-path nowhere",
    "eval perplexity plain --text text.txt --windows 0..2 --seq-len 32 --compare small.gguf",
    "eval perplexity plain --text text.txt --windows 0..2 --seq-len 32 --json",
    "eval compare plain --source small.gguf --text text.txt --windows 0..2 --seq-len 32 --k-chunks 0 0,0,64,64 --tokens 4",
    "bench --checkpoint-path plain --tokens 4 --timeline",
    "profile run --checkpoint-path plain --tokens 1 --max-n-tb 1 --max-k-chunk 20 --nsys-dir [OUT]",
    "tune run --checkpoint-path plain --target-slowdown 100 --verify --verify-tokens 2",
    "inspect plain",
    "inspect plain --json",
    "devices",
    "devices --json",
    "doctor",
    "doctor --json",
    "completions bash",
];

/// The workshop's files, so that every line finds what it names.
fn workshop() -> Workshop {
    let shop = Workshop::new();
    shop.plain_checkpoint();
    std::fs::write(shop.path("text.txt"), "ab ba abab bbaa ".repeat(40)).expect("written");
    let mut profile = decdec();
    profile.current_dir(shop.dir.path()).args(["profile", "run", "--checkpoint-path", "plain", "--tokens", "1"]);
    profile.args(["--max-n-tb", "1", "--max-k-chunk", "20"]).assert().success();
    shop
}

/// A pipe whose reader has gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

/// A disk without room.
fn full() -> Stdio {
    std::fs::OpenOptions::new().write(true).open("/dev/full").expect("opens").into()
}

/// Runs a line; what is not given is collected.
fn run(shop: &Workshop, line: &str, stdout: Option<Stdio>, stderr: Option<Stdio>) -> (ExitStatus, String, String) {
    let place = tempfile::tempdir_in(shop.dir.path()).expect("a directory");
    let line = line.replace("[OUT]", place.path().join("out").to_str().expect("text"));
    let mut command = Process::new(assert_cmd::cargo::cargo_bin("decdec"));
    command.current_dir(shop.dir.path()).args(words(&line));
    settle(&mut command);
    command.stdout(stdout.unwrap_or_else(Stdio::piped)).stderr(stderr.unwrap_or_else(Stdio::piped));
    let output = command.output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status, text(output.stdout), text(output.stderr))
}

#[test]
fn nobody_listens() {
    if !Path::new("/dev/full").exists() {
        devices::skip("no /dev/full");
        return;
    }
    let shop = workshop();
    LINES.par_iter().for_each(|line| {
        let (plain, said, _) = run(&shop, line, None, None);
        let errors = |stderr: &str| stderr.lines().filter(|line| line.starts_with("error:")).count();
        for (name, way) in [("closed", closed as fn() -> Stdio), ("full", full)] {
            // What cannot be said aside is lost, and nothing else.
            let (status, stdout, _) = run(&shop, line, None, Some(way()));
            assert_eq!(status.code(), plain.code(), "{line}, stderr {name}");
            assert_eq!(stdout.is_empty(), said.is_empty(), "{line}, stderr {name}");
            let (status, _, stderr) = run(&shop, line, Some(way()), None);
            let expected = match name {
                _ if said.is_empty() => plain.code(),
                "closed" => Some(141),
                _ => Some(1),
            };
            assert_eq!(status.code(), expected, "{line}, stdout {name}: {stderr}");
            assert!(!stderr.contains("bug in decdec") && !stderr.contains("backtrace"), "{line}: {stderr}");
            if !said.is_empty() {
                assert_eq!(errors(&stderr), usize::from(name == "full"), "{line}, stdout {name}: {stderr}");
                assert_eq!(
                    stderr.contains("cannot write to stdout: No space left"),
                    name == "full",
                    "{line}: {stderr}"
                );
            }
            let (status, ..) = run(&shop, line, Some(way()), Some(way()));
            assert_eq!(status.code(), expected, "{line}, both {name}");
        }
    });
}

/// The search's files are all there although nobody reads its report.
#[test]
fn what_is_asked_for_is_done_before_it_is_reported() {
    let shop = workshop();
    let line = "tune run --checkpoint-path plain --target-slowdown 100 --save";
    assert_eq!(run(&shop, line, Some(closed()), None).0.code(), Some(141));
    assert!(shop.path("plain/tuned.json").is_file() && shop.path("csv").is_dir());
}

/// As `head` does: the first line is read, the rest is not made.
#[test]
fn a_reader_that_has_had_enough_ends_it() {
    use std::io::BufRead;
    let shop = workshop();
    let mut command = Process::new(assert_cmd::cargo::cargo_bin("decdec"));
    command.current_dir(shop.dir.path()).args(["generate", "--checkpoint-path", "plain", "--json"]);
    command.args(["--max-new-tokens", "3", "--num-samples", "1000000000000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
    assert!(line.starts_with('{') && line.ends_with("}\n"), "{line}");
    assert_eq!(child.wait().expect("ends").code(), Some(141));
}
